"""What the processes run that test_distributed.py starts: ``job.py FOLDER WHAT``."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from synthetic import Synthetic, SyntheticStream

from mamldata.errors import DamagedError, StoppedError
from mamldata.streaming.batch import EpisodeBatch
from trainer.evaluation import evaluate
from trainer.loop import train
from trainer.maml.algorithms import ALGORITHMS
from trainer.results import save_result
from trainer.runs.folder import alone_in
from trainer.settings import TrainSettings
from trainer.system.distributed import World, joined

# Five episodes a step, so that two processes and four have uneven shares; and a window of the log that a stop cuts.
SETTINGS = TrainSettings(
    steps=20, meta_batch_size=5, inner_lr=0.1, eval_every=10, eval_episodes=13, log_every=4, seed=3, device="cpu"
)
EQUAL = {
    "maml": replace(SETTINGS, engine="vmap"),
    "maml++": replace(
        SETTINGS, steps=10, algorithm="maml++", bn="per-step", inner_steps=2, meta_clip_norm=1.0, msl_epochs=1
    ),
    "pretrain": replace(SETTINGS, steps=10, algorithm="pretrain"),
}
SLOW = replace(SETTINGS, log_every=1)


def equal(folder: Path, world: World) -> None:
    """Runs that come out as those of one process."""
    for name, settings in EQUAL.items():
        train(settings, Synthetic(size=8), folder / name, world=world)
        evaluation = evaluate(folder / name, Synthetic(size=8), episodes=14, device="cpu", world=world)
        (folder / f"{name}.{world.rank}.json").write_text(json.dumps(evaluation.to_json()))
        if world.first:
            save_result(evaluation)


def slow(folder: Path, world: World) -> None:
    """A run that goes on, and leaves time to be disturbed."""
    (folder / f"pid.{world.rank}").write_text(str(os.getpid()))

    def tell(line: str) -> None:
        print(line, flush=True)
        time.sleep(0.1)

    train(SLOW, Synthetic(size=8), folder / "run", resume=True, notify=tell, world=world)


def rest(folder: Path, world: World) -> None:
    """The rest of such a run, and a run that nobody disturbs."""
    for name in ("run", "undisturbed"):
        train(SLOW, Synthetic(size=8), folder / name, resume=True, world=world)


class SignalledAtVal(Synthetic):
    """At one of whose validations one process gets a signal."""

    def __init__(self, rank: int) -> None:
        super().__init__(size=8)
        self.rank = rank

    def eval(self, *arguments: Any, rank: int = 0, **more: Any) -> Iterator[EpisodeBatch]:
        for number, batch in enumerate(super().eval(*arguments, rank=rank, **more)):
            if number == 1 and rank == self.rank:
                signal.raise_signal(signal.SIGUSR1)
            yield batch


def validating(folder: Path, world: World) -> None:
    """A run that is stopped amid its first validation."""
    train(SLOW, SignalledAtVal(1), folder / "run", world=world)


class DamagedInTheMiddle(Synthetic):
    """One of whose meta-batches cannot be read by one process."""

    def __init__(self, split: str, rank: int) -> None:
        super().__init__(size=8)
        self.split, self.rank = split, rank

    def train(self, *arguments: Any, rank: int = 0, world_size: int = 1, **more: Any) -> SyntheticStream:
        self.broken = rank == self.rank
        return super().train(*arguments, rank=rank, world_size=world_size, **more)

    def batch(self, split: str, indices: list[int]) -> EpisodeBatch:
        if self.broken and split == self.split and len(set(indices) & {11, 12}):
            raise DamagedError(f"{split} episode {indices[0]} is damaged.")
        return super().batch(split, indices)


class NoNumbers(Synthetic):
    """Whose val episodes give a loss of NaN, as a network that has diverged does."""

    def batch(self, split: str, indices: list[int]) -> EpisodeBatch:
        batch = super().batch(split, indices)
        return batch._replace(query_x=batch.query_x * float("nan")) if split == "val" else batch


def failing(folder: Path, world: World) -> None:
    """Every way in which a process can fail alone: all end, and all know why."""
    settings, data = replace(SETTINGS, seed=0, steps=6, eval_every=2), Synthetic(size=8)

    def locked() -> None:
        if not world.first:
            train(settings, data, folder / "locked", world=world)
        with alone_in(folder / "locked"):
            train(settings, data, folder / "locked", world=world)

    def full() -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if world.first:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # less than a checkpoint
        try:
            train(settings, data, folder / "full", world=world)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def otherwise() -> None:
        mine = replace(settings, inner_lr=0.1 + world.rank)
        train(mine, data, folder / "otherwise", world=world)

    def bug() -> None:
        with world.together():
            assert world.rank == 0, "a bug"

    def spread() -> None:
        values = torch.full((2, 3, 4, 4), float(world.rank)).to(memory_format=torch.channels_last)
        world.spread_([values])
        world.require_same([values], "What rank 0 had")
        assert not values.any()

    scenes: dict[str, Callable[[], object]] = {
        "too many": lambda: train(replace(settings, meta_batch_size=1), data, folder / "few", world=world),
        "locked": locked,
        "full": full,
        "otherwise": otherwise,
        "damaged": lambda: train(settings, DamagedInTheMiddle("train", 1), folder / "a", world=world),
        "damaged val": lambda: train(settings, DamagedInTheMiddle("val", 1), folder / "b", world=world),
        "diverged": lambda: train(settings, NoNumbers(size=8), folder / "diverged", world=world),
        "no checkpoint": lambda: evaluate(folder / "nothing.pt", data, world=world),
        "bug": bug,
        "spread": spread,
        "apart": lambda: world.require_same([torch.full((3,), world.rank)], "The weights at step 7"),
    }
    told = {}
    for name, scene in scenes.items():
        try:
            scene()
        except Exception as error:
            told[name] = [type(error).__name__, str(error), getattr(error, "exit_code", None)]
    (folder / f"told.{world.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    assert set(EQUAL) <= set(ALGORITHMS)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    code = 0
    try:
        with joined() as job:
            {"equal": equal, "slow": slow, "rest": rest, "failing": failing, "validating": validating}[sys.argv[2]](
                Path(sys.argv[1]), job
            )
    except StoppedError as error:
        print(error, flush=True)
        code = error.exit_code
    sys.stdout.flush()
    os._exit(code)  # as cli.main does: torch's threads can abort a process that is shutting down
