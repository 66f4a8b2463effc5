"""The cost of an outer step: its time, measured in turn with other settings, and its peak memory."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamldata.errors import MamldataError
from mamldata.parallel import end_with_parent
from mamldata.streaming.batch import EpisodeBatch
from trainer.learner import Learner
from trainer.protocol import TrainData
from trainer.settings import TrainSettings, pick_device
from trainer.system.malloc import keep_large_buffers, return_large_buffers

ROUNDS = 7
_PATIENCE = 0.2  # seconds between two looks at whether to go on waiting


@dataclass(frozen=True)
class Costs:
    """The cost of one outer step on a meta-batch that is already loaded.

    Attributes:
        milliseconds: median over the rounds.
        fastest, slowest: the extremes, in milliseconds.
        peak_mib: peak memory of the step beyond that of the network and its data, in MiB: of the whole process on a
            CPU, of tensors on a GPU.
    """

    milliseconds: float
    fastest: float
    slowest: float
    peak_mib: float


def measure_costs(
    plans: Mapping[str, TrainSettings],
    data: TrainData,
    *,
    rounds: int = ROUNDS,
    network: nn.Module | None = None,
    before_step: Callable[[], object] = lambda: None,
) -> dict[str, Costs]:
    """Time the outer steps of several settings in turn, A B C A B C …, so that a slowdown affects all.

    On a CPU the memory of each is measured in a new process, because a process keeps its peak memory. Settings
    without outer steps are left out.

    Args:
        plans: settings by name; the last outer step of each is measured, after all annealing.
        data: its first meta-batch is used.
        network: the user's own, if the settings name one.
        rounds: timed steps of each, after one that is not timed.
        before_step: called before each step, and again and again while a process measures; what it raises ends the
            measurement.

    Raises:
        MamldataError: such a process was killed; the message names the settings.
    """
    plans = {name: settings for name, settings in plans.items() if settings.outer_steps}
    keys = {
        name: (settings.meta_batch_size, settings.seed, bool(settings.normalize)) for name, settings in plans.items()
    }
    joint = any(settings.point.outer == "joint" for settings in plans.values())
    drawn = {
        key: _sample(*key, data, network, joint=joint) for key in set(keys.values())
    }  # shared where meta-batches are equal
    samples = {name: drawn[key] for name, key in keys.items()}
    keep_large_buffers()
    steps = {name: _outer_step(settings, samples[name]) for name, settings in plans.items()}
    taken: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            before_step()
            start = time.perf_counter()
            step()
            if turn:
                taken[name].append(1000 * (time.perf_counter() - start))
    del steps
    peaks = {name: _peak(name, plans[name], samples[name], before_step) for name in taken}
    return {name: Costs(statistics.median(times), min(times), max(times), peaks[name]) for name, times in taken.items()}


@dataclass(frozen=True)
class _Sample:
    """One meta-batch and the data of a step, in a form that can be sent to another process."""

    about: dict[str, Any]
    batch: EpisodeBatch
    labels: Tensor
    count: int
    network: nn.Module | None

    def class_count(self) -> int:
        return self.count

    def classes(self, index: Tensor) -> Tensor:  # noqa: ARG002
        return self.labels


def _sample(
    batch_size: int, seed: int, normalize: bool, data: TrainData, network: nn.Module | None, *, joint: bool
) -> _Sample:
    device = torch.device("cpu")
    batches = iter(data.train(batch_size, seed, device, normalize=normalize, transform=None, rank=0, world_size=1))
    batch = EpisodeBatch(*(part.clone() for part in next(batches)))
    labels, classes = (data.classes(batch.index), data.class_count()) if joint else (batch.index, 0)
    return _Sample(data.describe(), batch, labels, classes, network)


def _outer_step(settings: TrainSettings, sample: _Sample) -> Callable[[], None]:
    """An outer step without the reading of its meta-batch."""
    device = pick_device(settings.device)
    learner = Learner(settings, sample, sample.about, device, network=sample.network)
    batch = EpisodeBatch(*(part.to(device) for part in sample.batch))

    def step() -> None:
        outcome = learner.gradient(batch, settings.steps - 1, every_step=False)
        learner.descend(outcome, settings.steps - 1)
        outcome.loss.item()  # waits for the device

    return step


def _peak(name: str, settings: TrainSettings, sample: _Sample, waiting: Callable[[], object]) -> float:
    if pick_device(settings.device).type == "cuda":
        return _peak_here(settings, sample)
    context = multiprocessing.get_context("spawn")
    answer, its_end = context.Pipe(duplex=False)
    process = context.Process(target=_tell_peak, args=(its_end, settings, sample), daemon=True)
    process.start()
    its_end.close()  # so that the answer ends when the process does
    try:
        while not answer.poll(_PATIENCE):
            waiting()
        peak: float = answer.recv()
    except EOFError as error:
        raise MamldataError(
            f"{name}: the process that measures the memory of an outer step was killed, most likely because memory "
            "ran out. Use fewer inner steps, filters or episodes in a meta-batch, or set checkpoint_inner; or free "
            "some memory, and run the same command again."
        ) from error
    finally:
        process.kill()
        process.join()
    return peak


def _tell_peak(answer: Connection, settings: TrainSettings, sample: _Sample) -> None:
    """In a process of its own, which its parent ends."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both
    answer.send(_peak_here(settings, sample))


def _peak_here(settings: TrainSettings, sample: _Sample) -> float:
    return_large_buffers()
    _outer_step(settings, _one_image(sample))()  # load kernels before the measurement
    step = _outer_step(settings, sample)
    device = pick_device(settings.device)
    before = most_memory(device, restart=True)
    step()
    return (most_memory(device) - before) / 2**20


def _one_image(sample: _Sample) -> _Sample:
    """The first episode, with one query image of each class."""
    batch = EpisodeBatch(*(part[:1] for part in sample.batch))
    k_query = sample.about["k_query"]
    few = batch._replace(query_x=batch.query_x[:, ::k_query], query_y=batch.query_y[:, ::k_query])
    return replace(sample, batch=few, labels=sample.labels[:1])


def most_memory(device: torch.device, *, restart: bool = False) -> int:
    """Peak memory in bytes, since the last restart if the system supports restarting."""
    if device.type == "cuda":
        if restart:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if restart:
        with suppress(OSError):  # the peak then counts from the start, and the difference is too small
            Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
