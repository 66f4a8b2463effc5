"""The storm (``make storm``) in a breeze: every campaign still runs, and the harness tells what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
# Carries out the rehearsal in a folder, and prints each try that it makes.
REHEARSE = """\
import os, sys
from pathlib import Path
from tests.storm.harness import carry_out
from tests.storm.rehearsal import REHEARSAL
from tests.storm.report import Row, markdown
if __name__ == "__main__":
    work = os.environ["STORM_PLACE"] = sys.argv[1]
    tries = carry_out(REHEARSAL, 0, int(sys.argv[2]), 2, Path(work), lambda one: print(one.number, one.outcome))
    print(markdown([Row.of(REHEARSAL, tries.values())], 0, 1, 2), file=sys.stderr)
"""


def run(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), *sys.path])}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the storm is for Linux")
def test_a_breeze(tmp_path: Path):
    """A few tries of every campaign keep every promise, and their table goes into a page between its markers."""
    page = tmp_path / "page.md"
    page.write_text((PROJECT / "docs" / "reliability.md").read_text())
    options = ["--scale", 0.0002, "--processes", 0, "--work", tmp_path / "work", "--write", page]
    done = run("-m", "tests.storm", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout
    assert "scale 0.0002" in page.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the storm is for Linux")
def test_what_goes_wrong_is_told(tmp_path: Path):
    """Broken promises, bugs, deaths and hangs are failures with a reason; the journal goes on where it stopped."""
    script = tmp_path / "rehearse.py"
    script.write_text(REHEARSE)
    first, second = run(script, tmp_path, 8), run(script, tmp_path, 12)
    assert [int(line.split()[0]) for line in sorted(second.stdout.splitlines())] == [10, 11, 8, 9]
    head, *tries = map(json.loads, (tmp_path / "rehearsal.jsonl").read_text().splitlines())
    assert head["seed"] == 0
    assert len(first.stdout.splitlines()) == 8
    outcomes = Counter((one["outcome"], one["reason"].strip().rpartition("\n")[2]) for one in tries)
    assert outcomes == {
        ("same", ""): 4,
        ("failed", "a promise"): 3,
        ("failed", "RuntimeError: a bug"): 1,
        ("failed", "the process died (exit code -9)"): 1,
        ("failed", "it did not end within 1 s"): 1,
        ("skipped", "no luck"): 2,
    }
    assert "| rehearsal | everything goes wrong | 12 (2 skipped: no luck) | 4 | 0 | 6 |" in second.stderr
