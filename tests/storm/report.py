"""The table of a storm, for the terminal and for ``docs/reliability.md``."""

from __future__ import annotations

import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mamldata.version import __version__
from tests.storm.harness import PROJECT, Campaign, Try

BEGIN = "<!-- storm: `make storm` writes what follows -->"
END = "<!-- /storm -->"


@dataclass(frozen=True)
class Row:
    """What became of the tries of one campaign."""

    name: str
    what: str
    tries: int
    same: int
    refused: int
    skipped: int
    failed: int
    seconds: float
    why_skipped: str

    @classmethod
    def of(cls, campaign: Campaign, tries: Iterable[Try]) -> Row:
        """Count the tries of a campaign."""
        tries = list(tries)
        counts = Counter(one.outcome for one in tries)
        reasons = sorted({one.reason for one in tries if one.outcome == "skipped"})
        numbers = (counts[outcome] for outcome in ("same", "refused", "skipped", "failed"))
        seconds = sum(one.seconds for one in tries)
        return cls(campaign.name, campaign.what, len(tries), *numbers, seconds, "; ".join(reasons))

    def line(self) -> str:
        """For the terminal."""
        skipped = f", {self.skipped} skipped ({self.why_skipped})" if self.skipped else ""
        return (
            f"{self.name}: {self.tries:,} tries, {self.same:,} the same, {self.refused:,} refused, "
            f"{self.failed:,} failed{skipped}"
        )


def markdown(rows: Sequence[Row], seed: int, scale: float, processes: int) -> str:
    """The table and what it was measured with."""
    minutes = sum(row.seconds for row in rows) / 60 / max(1, processes)
    measured = (
        f"Measured with `make storm` at {_version()}, seed {seed}, scale {scale:g}, on {platform.system()} with "
        f"{os.cpu_count()} processors, Python {platform.python_version()} and NumPy {np.__version__}: "
        f"{sum(row.tries for row in rows):,} tries in {minutes:.0f} minutes of {processes} processes."
    )
    lines = [
        measured,
        "",
        "| campaign | what happens | tries | as if nothing had happened | clear error | failed |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        tries = f"{row.tries:,}" + (f" ({row.skipped:,} skipped: {row.why_skipped})" if row.skipped else "")
        lines.append(f"| {row.name} | {row.what} | {tries} | {row.same:,} | {row.refused:,} | {row.failed:,} |")
    return "\n".join(lines) + "\n"


def _version() -> str:
    """The commit, if this is a checkout with Git; else the version."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "mamldata", "trainer", "cli", "manifests", "tests/storm")
        return f"commit `{git('rev-parse', '--short=12', 'HEAD')}`" + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return f"version {__version__}"


def write_table(page: Path, table: str) -> None:
    """Put the table between the markers of a page."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}")
