"""The run folder: ``config.json``, ``metrics.jsonl`` and checkpoints; and whether a run may go on in it."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mamldata.archive.index import INDEX
from mamldata.errors import DamagedError, RequestError
from mamldata.io.atomic import MOST_NOTE, locked, make_folder, read_whole, write_atomic
from mamldata.io.digest import parse_json
from mamldata.version import __version__
from trainer.runs import metrics
from trainer.runs.checkpoint import Checkpoint, find_best, find_last, load_checkpoint
from trainer.settings import CHANGEABLE, TrainSettings, saved_settings
from trainer.system.distributed import World

CONFIG = "config.json"
COMPARISON = "compare.json"

_KINDS = {INDEX: "an archive", CONFIG: "a run", COMPARISON: "a comparison"}  # by the file that tells
# Of what data are: where they are, and what follows from the rest; the first runs did not note that.
_INCIDENTAL = frozenset({"source", "normalisation"})


@dataclass(frozen=True)
class RunResult:
    """Where a run ended.

    Attributes:
        run_dir: its folder.
        step: outer steps done.
        accuracy: of the last validation, in [0, 1].
        best_step, best_accuracy: of the best validation.
        last, best: their checkpoints.
    """

    run_dir: Path
    step: int
    accuracy: float
    best_step: int
    best_accuracy: float
    last: Path
    best: Path


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Keep other processes out of a run folder.

    Raises:
        RequestError: one is at work there.
        WriteError: the folder cannot be written to.
    """

    def refuse() -> None:
        raise RequestError(f"Another process is training in {run_dir}. Wait for it, or choose another folder.")

    make_folder(run_dir)
    lock = run_dir / ".lock"
    with locked(lock, refuse):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def refuse_others(folder: Path, own: str) -> None:
    """Keep a run or a comparison out of a folder that holds something else.

    Args:
        folder: where to write; it need not be there.
        own: ``CONFIG`` or ``COMPARISON``.

    Raises:
        RequestError: the folder is another thing's.
    """
    for name, kind in _KINDS.items():
        if name != own and (folder / name).exists():
            raise RequestError(f"{folder} holds {kind}. Choose another folder.")


def require_agreement(world: World, settings: TrainSettings, data: dict[str, Any]) -> None:
    """Make sure that all processes were told the same, and have the same data. Called by all.

    Raises:
        RequestError: they were not; the message says in what they differ.
    """
    told = world.gather(json.loads(json.dumps([settings.resolved(), data])))  # lists in place of tuples
    with world.together():
        for rank, (its_settings, its_data) in enumerate(told):
            pairs = [(told[0][0], its_settings, frozenset()), (told[0][1], its_data, _INCIDENTAL)]
            if lines := [line for before, now, free in pairs for line in _differences(before, now, free)]:
                raise RequestError(
                    f"Rank {rank} of this job (here) was told otherwise than rank 0 (there):\n"
                    + "\n".join(f"  {line}" for line in lines)
                    + "\nGive all processes the same command and the same data."
                )


def open_run(run_dir: Path, settings: TrainSettings, data: dict[str, Any], *, resume: bool) -> Checkpoint | None:
    """Look at a run folder, and change nothing.

    Returns:
        The checkpoint to go on from; None for a start from the beginning.

    Raises:
        RequestError: the folder holds a run and ``resume`` was not asked for, or that run was another one.
        DamagedError: the last checkpoint or ``config.json`` is damaged.
    """
    last = find_last(run_dir)
    config = run_dir / CONFIG
    if not resume and (last or config.exists()):
        raise RequestError(f"{run_dir} already holds a run. Go on with it (--resume), or choose another folder.")
    refuse_others(run_dir, CONFIG)
    if config.exists():
        _refuse_another_run(config, settings, data)
    elif last:
        raise RequestError(f"{run_dir} holds checkpoints, but no {CONFIG} to say of what. Choose another folder.")
    return load_checkpoint(last) if last else None


def begin_run(run_dir: Path, settings: TrainSettings, data: dict[str, Any], checkpoint: Checkpoint | None) -> None:
    """Note what the run is, and drop what was measured after the checkpoint that it goes on from.

    Raises:
        WriteError: the folder cannot be written to.
    """
    write_atomic(run_dir / CONFIG, json.dumps(_config(settings, data), indent=2).encode() + b"\n")
    metrics.rewind(run_dir, checkpoint.step if checkpoint else 0)


def _config(settings: TrainSettings, data: dict[str, Any]) -> dict[str, Any]:
    versions = {
        "mamldata": __version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    return {"settings": settings.resolved(), "data": data, "versions": versions}


def _refuse_another_run(config: Path, settings: TrainSettings, data: dict[str, Any]) -> None:
    try:
        saved = parse_json(read_whole(config, MOST_NOTE))
        # Read as settings, for one that did not exist then has its default.
        there = saved_settings(saved["settings"], config).resolved()
        pairs = [(there, settings.resolved(), CHANGEABLE), (saved["data"], data, _INCIDENTAL)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{config} is damaged ({error!r}). Start again in another folder.") from error
    differences = [line for before, now, free in pairs for line in _differences(before, now, free)]
    if differences:
        raise RequestError(
            f"{config.parent} holds another run:\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nGo on with its own settings, or choose another folder."
        )


def _differences(before: dict[str, Any], now: dict[str, Any], free: frozenset[str]) -> Iterator[str]:
    now = json.loads(json.dumps(now))  # as it would come back: tuples become lists
    for key in sorted((before.keys() | now.keys()) - free):
        if before.get(key) != now.get(key):
            yield f"{key}: {before.get(key)!r} there, {now.get(key)!r} here"


def run_result(run_dir: Path, last: Checkpoint, world: World) -> RunResult:
    """Where the run ended whose last checkpoint is given. Called by all processes."""
    assert last.accuracy is not None  # runs end with a validation
    return RunResult(
        run_dir=run_dir,
        step=last.step,
        accuracy=last.accuracy,
        best_step=last.best_step,
        best_accuracy=last.best_accuracy,
        last=run_dir / last.name,
        best=world.from_first(lambda: find_best(run_dir)),
    )
