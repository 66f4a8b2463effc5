"""Runs in processes of their own that are killed, and then go on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import Synthetic

from trainer.loop import train
from trainer.maml.algorithms import ALGORITHMS
from trainer.runs import checkpoint as checkpoint_module
from trainer.runs.checkpoint import Checkpoint, find_last, load_checkpoint
from trainer.settings import TrainSettings

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
SETTINGS = TrainSettings(
    steps=40, meta_batch_size=2, inner_lr=0.1, eval_every=2, eval_episodes=2, log_every=1, seed=3, device="cpu"
)
SCRIPT = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parents[1])!r}]
import torch
torch.set_num_threads(1)
from test_resume import SETTINGS, go_on
go_on(*sys.argv[1:])
"""


def go_on(run_dir: str, pace: str = "", algorithm: str = "") -> None:
    """In the process that gets killed: train, telling of each step; slowly, mostly write checkpoints."""
    if pace == "slow":
        checkpoint_module.write_atomic = crawl
    settings = settings_of(algorithm) if algorithm else SETTINGS
    train(settings, Synthetic(size=8), run_dir, resume=True, notify=lambda line: print(line, flush=True))


def settings_of(algorithm: str) -> TrainSettings:
    """With everything that changes in the course of a run: learned rates and norms, both annealings, clipping."""
    if algorithm == "protonet":  # without an inner loop
        return replace(SETTINGS, algorithm=algorithm, inner_lr=None, steps=14, meta_clip_norm=1.0)
    annealed = {"first_order_epochs": 1, "epoch_steps": 4, "msl_epochs": 2} if algorithm == "maml++" else {}
    return replace(SETTINGS, algorithm=algorithm, steps=14, inner_steps=2, meta_clip_norm=1.0, **annealed)


def crawl(path: Path, data: bytes) -> None:
    """``write_atomic`` in slow motion, so that a signal finds it at work."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as stream:
        for start in range(0, len(data), 1 + len(data) // 5):
            stream.write(data[start : start + 1 + len(data) // 5])
            stream.flush()
            time.sleep(0.002)
    time.sleep(0.002)
    part.replace(path)
    time.sleep(0.002)


def start(run_dir: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(run_dir), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("step "):
        assert line  # or it ended without a single step
    return process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return train(SETTINGS, Synthetic(size=8), tmp_path_factory.mktemp("undisturbed")).run_dir


@pytest.mark.parametrize("slow_writes", [False, True])
def test_killed_at_any_moment_a_run_ends_the_same(tmp_path: Path, undisturbed: Path, slow_writes: bool) -> None:
    """SIGKILL again and again, then to the end: weights and states are equal to the bit, no metric missing or twice."""
    chance = random.Random(slow_writes)
    kills = 0
    for _ in range(3):
        process = start(tmp_path, *["slow"][: int(slow_writes)])
        time.sleep(chance.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 2
    train(SETTINGS, Synthetic(size=8), tmp_path, resume=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in undisturbed.iterdir()}
    for name in names:
        if name.endswith(".pt"):
            assert plain(load_checkpoint(tmp_path / name)) == plain(load_checkpoint(undisturbed / name))
    assert strip_times(tmp_path) == strip_times(undisturbed)


@pytest.mark.parametrize("algorithm", [name for name, point in ALGORITHMS.items() if point.outer != "none"])
def test_every_algorithm_killed_ends_the_same(tmp_path: Path, algorithm: str) -> None:
    """SIGKILL amid a run of each, then to the end: all that was learned is equal to the bit."""
    process = start(tmp_path / "killed", "slow", algorithm)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    at_once = train(settings_of(algorithm), Synthetic(size=8), tmp_path / "undisturbed")
    later = train(settings_of(algorithm), Synthetic(size=8), tmp_path / "killed", resume=True)
    assert later.step == settings_of(algorithm).steps
    for one, other in ((at_once.last, later.last), (at_once.best, later.best)):
        assert plain(load_checkpoint(one)) == plain(load_checkpoint(other))
    assert strip_times(at_once.run_dir) == strip_times(later.run_dir)


def plain(thing: Any) -> Any:
    """Comparable to the bit: tensors as their bytes."""
    if isinstance(thing, torch.Tensor):
        return str(thing.dtype), thing.shape, thing.stride(), thing.numpy().tobytes()
    if isinstance(thing, Checkpoint):
        return plain(vars(thing))
    return {key: plain(value) for key, value in thing.items()} if isinstance(thing, dict) else thing


def strip_times(run_dir: Path) -> list[str]:
    timed = {"ms_per_step", "images_per_second", "data_wait_percent", "seconds"}
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [str({key: value for key, value in row.items() if key not in timed}) for row in rows]


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interrupted_process_keeps_its_checkpoint(tmp_path: Path) -> None:
    """Ctrl-C in a real process ends it after the step under way, whose checkpoint can be read."""
    process = start(tmp_path)
    assert process.stdout is not None
    while "val" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode != 0
    last = find_last(tmp_path)
    assert last is not None
    step = load_checkpoint(last).step
    assert step >= 2
    assert f"StoppedError: Stopped by SIGINT: step {step} of 40 is saved in {tmp_path}" in stderr
