"""The run folder: ``config.json``, ``metrics.jsonl`` and checkpoints; and whether a run may resume in it."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mamldata.archive.index import INDEX
from mamldata.errors import DamagedError, RequestError, RunExistsError
from mamldata.io.atomic import MOST_NOTE, locked, make_folder, read_whole, write_atomic
from mamldata.io.digest import parse_json
from mamldata.version import __version__
from trainer.runs import metrics
from trainer.runs.checkpoint import Checkpoint, find_best, find_last, load_checkpoint
from trainer.settings import CHANGEABLE, DEPENDENT, TrainSettings, saved_settings
from trainer.system.distributed import World

CONFIG = "config.json"
COMPARISON = "compare.json"

_KINDS = {INDEX: "an archive", CONFIG: "a run", COMPARISON: "a comparison"}  # by the file that identifies it
# Keys of the data's description that may differ: the place, and those that follow from the rest, which early runs lack.
_INCIDENTAL = frozenset({"source", "normalisation", "image"})


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

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
        RequestError: another process is using it.
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
        folder: where to write; it need not exist.
        own: ``CONFIG`` or ``COMPARISON``.

    Raises:
        RequestError: the folder holds something else.
    """
    for name, kind in _KINDS.items():
        if name != own and (folder / name).exists():
            raise RequestError(f"{folder} holds {kind}. Choose another folder.")


def require_agreement(world: World, settings: TrainSettings, data: dict[str, Any]) -> None:
    """Check that all processes have the same settings and data. Called by all.

    Raises:
        RequestError: they differ; the message lists the differences.
    """
    told = world.gather(json.loads(json.dumps([settings.resolved(), data])))  # lists in place of tuples
    with world.together():
        for rank, (its_settings, its_data) in enumerate(told):
            pairs = [(told[0][0], its_settings, frozenset()), (told[0][1], its_data, _INCIDENTAL)]
            if lines := [line for before, now, free in pairs for line in _differences(before, now, free)]:
                raise RequestError(
                    f"Rank {rank} of this job (here) has different settings or data from rank 0 (there):\n"
                    + "\n".join(f"  {line}" for line in lines)
                    + "\nGive all processes the same command and the same data."
                )


def open_run(
    run_dir: Path,
    settings: TrainSettings,
    data: dict[str, Any],
    *,
    resume: bool,
    start: dict[str, Any] | None = None,
) -> Checkpoint | None:
    """Inspect a run folder without changing it.

    Args:
        run_dir: the folder.
        settings, data: of the run.
        resume: whether it may hold this run.
        start: ``Start.record`` of the weights to start from; a run with a checkpoint of its own needs none.

    Returns:
        The checkpoint to resume from; None to start from the beginning.

    Raises:
        RequestError: the folder holds a run and ``resume`` is False, or it holds a different run.
        DamagedError: the last checkpoint or ``config.json`` is damaged.
    """
    last = find_last(run_dir)
    config = run_dir / CONFIG
    if not resume and (last or config.exists()):
        raise RunExistsError(f"{run_dir} already holds a run. Resume it, or choose another folder.")
    refuse_others(run_dir, CONFIG)
    if config.exists():
        _refuse_another_run(config, settings, data)
        _refuse_another_start(config, start, begun=last is not None)
    elif last:
        raise RequestError(f"{run_dir} holds checkpoints, but no {CONFIG} with their settings. Choose another folder.")
    return load_checkpoint(last) if last else None


def as_begun(run_dir: Path, settings: TrainSettings) -> TrainSettings:
    """Settings to resume with: those given, but with those of the run where none are given, since defaults change.

    Raises:
        DamagedError: ``config.json`` is damaged.
    """
    config = run_dir / CONFIG
    if not config.exists():
        return settings
    there, _ = _saved(config)
    if there.algorithm != settings.algorithm:  # another run, as open_run will say
        return settings
    kept = [name for name in DEPENDENT if getattr(settings, name) is None]
    return replace(settings, **{name: getattr(there, name) for name in kept})


def begin_run(
    run_dir: Path,
    settings: TrainSettings,
    data: dict[str, Any],
    checkpoint: Checkpoint | None,
    start: dict[str, Any] | None = None,
) -> None:
    """Write the run's settings and data, and drop metrics from after the checkpoint that it resumes from.

    Raises:
        WriteError: the folder cannot be written to.
    """
    content = _config(settings, data)
    if start := start or _start(run_dir / CONFIG):
        content["start"] = start
    write_atomic(run_dir / CONFIG, json.dumps(content, indent=2).encode() + b"\n")
    if checkpoint is None:
        metrics.rewind(run_dir, 0, -1)
    else:
        window = checkpoint.window.get("losses", ())  # steps that have no line yet
        validated = checkpoint.step - (checkpoint.accuracy is None)
        metrics.rewind(run_dir, checkpoint.step - len(window), validated)


def _config(settings: TrainSettings, data: dict[str, Any]) -> dict[str, Any]:
    return {"settings": settings.resolved(), "data": data, "versions": _versions()}


def _versions() -> dict[str, str]:
    return {
        "mamldata": __version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def environment(device: torch.device, world: World) -> dict[str, Any]:
    """What a result was computed with, as values for JSON: versions, hardware, threads and processes.

    Args:
        device: that computed it.
        world: the processes that computed it together.
    """
    return {
        "versions": _versions(),
        "platform": platform.platform(),
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "processes": world.world_size,
    }


def _processor() -> str:
    """The processor's name; its architecture if the system does not tell the name."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        if names := [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]:
            return names[0]
    return platform.processor() or platform.machine()


def _saved(config: Path) -> tuple[TrainSettings, dict[str, Any]]:
    """The settings of a run, in which one that did not exist then has its default, and its data."""
    try:
        saved = parse_json(read_whole(config, MOST_NOTE))
        return saved_settings(saved["settings"], config), dict(saved["data"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{config} is damaged ({error!r}). Start again in another folder.") from error


def trained_with(run_dir: Path) -> str | None:
    """The version of mamldata that a run was trained with; None if the folder does not say it."""
    try:
        version = parse_json(read_whole(run_dir / CONFIG, MOST_NOTE))["versions"]["mamldata"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return version if isinstance(version, str) else None


def _refuse_another_run(config: Path, settings: TrainSettings, data: dict[str, Any]) -> None:
    there, its_data = _saved(config)
    pairs = [(there.resolved(), settings.resolved(), CHANGEABLE), (its_data, data, _INCIDENTAL)]
    differences = [line for before, now, free in pairs for line in _differences(before, now, free)]
    if differences:
        raise RequestError(
            f"{config.parent} holds another run:\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nResume it with its own settings, or choose another folder."
        )


def _start(config: Path) -> dict[str, Any] | None:
    """The weights that a run started from, see ``Start.record``; None if it started from its seed."""
    start = parse_json(read_whole(config, MOST_NOTE)).get("start") if config.exists() else None
    if start is not None and not (isinstance(start, dict) and {"file", "sha256"} <= start.keys()):
        raise DamagedError(f"{config} is damaged (its start has no file). Start again in another folder.")
    return start


def _refuse_another_start(config: Path, start: dict[str, Any] | None, *, begun: bool) -> None:
    there = _start(config)
    if (start is None and begun) or (start or {}).get("sha256") == (there or {}).get("sha256"):
        return
    shown = [f"from {one['file']}, sha256 {one['sha256'][:12]}…" if one else "from its seed" for one in (there, start)]
    raise RequestError(
        f"{config.parent} holds another run, which started {shown[0]}, not {shown[1]}. Resume it with the weights "
        "that it started from, or choose another folder."
    )


def _differences(before: dict[str, Any], now: dict[str, Any], free: frozenset[str]) -> Iterator[str]:
    now = json.loads(json.dumps(now))  # as it is when read back: tuples become lists
    for key in sorted((before.keys() | now.keys()) - free):
        if before.get(key) != now.get(key):
            yield f"{key}: {before.get(key)!r} there, {now.get(key)!r} here"


def run_result(run_dir: Path, last: Checkpoint, world: World) -> RunResult:
    """The result of a run whose last checkpoint is ``last``. Called by all processes."""
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
