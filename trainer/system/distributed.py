"""Several processes that work together, as torchrun starts them; with one process nothing here has any effect."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mamldata.errors import LostPeerError, MamldataError, PeerError, RequestError, StoppedError
from trainer.system.signals import Stop

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a job, and the rank of this one.

    Methods marked "called by all" must be called by all processes in the same order. ``together`` keeps a process
    that fails in between from leaving the others waiting.

    Attributes:
        rank: of this process, from 0. The one with rank 0 writes and reports for all.
        world_size: the number of processes.
        local_rank: of this process among those of its machine; it chooses the GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports for all."""
        return self.rank == 0

    def device(self, chosen: torch.device) -> torch.device:
        """Choose this process's own device of the given kind.

        Raises:
            RequestError: there are too few, or processes cannot exchange gradients on this kind.
        """
        if self.world_size == 1 or chosen.type == "cpu":
            return chosen
        if chosen.type != "cuda":
            raise RequestError(f"Several processes train on cpu or cuda, not on {chosen.type}. Set device to cpu.")
        if self.local_rank >= torch.cuda.device_count():
            raise RequestError(
                f"This machine has {torch.cuda.device_count()} GPUs, too few for the process of local rank "
                f"{self.local_rank}. Start one process per GPU, or set device to cpu."
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    @contextmanager
    def together(self, stop: Stop | None = None) -> Iterator[None]:
        """Let a failure of one rank in this block fail all, so that none waits for a process that is gone.

        Called by all. The block must not contain other methods that are called by all.

        Args:
            stop: whether this process has been asked to stop. If any has, ``agreed`` is set in all.

        Raises:
            PeerError: another rank has failed; that rank raises its own error.
        """
        if self.world_size == 1:
            yield
            if stop is not None:
                stop.agreed = stop.asked
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        asked = stop.asked if stop is not None else None
        with _talking():
            # On the CPU, so as not to wait for a GPU.
            counts = torch.tensor([failure is not None, asked is not None], dtype=torch.int64)
            dist.all_reduce(counts)
        failed, asking = counts.tolist()
        if failed:
            self._fail(failure)
        if asking and stop is not None:
            stop.agreed = next(name for name in self.gather(asked) if name)

    def _fail(self, own: Exception | None) -> None:
        code = getattr(own, "exit_code", 1)
        failures = self.gather(None if own is None else (f"{own}" or repr(own), code))
        _part()
        rank, (message, code) = next((rank, failure) for rank, failure in enumerate(failures) if failure)
        if own is not None and rank == self.rank:
            raise own
        # Of several failures, which are mostly the same, all ranks raise the first.
        raise PeerError(rank, message, code) from own

    def from_first(self, make: Callable[[], T]) -> T:
        """The result of ``make`` on rank 0, on every rank. Called by all; a failure there fails all."""
        made: list[Any] = [None]
        with self.together():
            if self.first:
                made = [make()]
        if self.world_size > 1:
            with _talking():
                dist.broadcast_object_list(made, src=0)
        result: T = made[0]
        return result

    def gather(self, thing: T) -> list[T]:
        """The ``thing`` of each rank, in the order of ranks, on every rank. Called by all."""
        if self.world_size == 1:
            return [thing]
        things: list[Any] = [None] * self.world_size
        with _talking():
            dist.all_gather_object(things, thing)
        return things

    def all(self, truth: bool) -> bool:
        """Whether it is true on every rank. Called by all."""
        if self.world_size == 1:
            return truth
        with _talking():
            count = torch.tensor(int(truth))
            dist.all_reduce(count)
        return int(count) == self.world_size

    def average(self, tensors: Sequence[Tensor], share: float) -> list[Tensor]:
        """The mean over the episodes of all ranks, from each rank's mean over its own. Called by all.

        One exchange for each dtype, whatever the number of tensors. All ranks get the same bits: one rank computes
        each part of the sum, and sends it to the others.

        Args:
            tensors: of the same shapes and dtypes on each rank, on one device; they are not changed.
            share: this rank's fraction of all episodes, in [0, 1].
        """
        if self.world_size == 1:
            return list(tensors)
        means = [torch.empty_like(tensor) for tensor in tensors]
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [(tensor, mean) for tensor, mean in zip(tensors, means, strict=True) if tensor.dtype == dtype]
            whole = torch.cat([tensor.reshape(-1) for tensor, _ in alike]).mul_(share)
            with _talking():
                dist.all_reduce(whole)
            parts = torch.split(whole, [mean.numel() for _, mean in alike])
            for part, (_, mean) in zip(parts, alike, strict=True):
                mean.copy_(part.view(mean.shape))
        return means

    def spread_(self, tensors: Sequence[Tensor]) -> None:
        """Copy rank 0's values into the tensors of all ranks. Called by all."""
        if self.world_size == 1:
            return
        with torch.no_grad(), _talking():
            for tensor in tensors:
                values = tensor.contiguous()
                dist.broadcast(values, src=0)
                tensor.copy_(values)

    def require_same(self, tensors: Sequence[Tensor], what: str) -> None:
        """Check that all ranks hold the same bits. Called by all.

        Raises:
            MamldataError: they do not.
        """
        if self.world_size == 1:
            return
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        digests = self.gather(digest.hexdigest())
        others = [str(rank) for rank, other in enumerate(digests) if other != digests[0]]
        with self.together():
            if others:
                raise MamldataError(
                    f"{what} differ between rank 0 and {', '.join(others)}: the machines of this job compute "
                    "differently, or one of them is faulty. Resume the run on machines of one kind."
                )


ALONE = World()


class _SumOverRanks(torch.autograd.Function):
    """A sum over ranks, with its derivative for losses that are means over each rank's own images."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        total = value.clone(memory_format=torch.contiguous_format)
        with _talking():
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        total = slope * ctx.weight
        with _talking():
            dist.all_reduce(total)
        return total / ctx.weight, None


def sum_over_ranks(value: Tensor, weight: float) -> Tensor:
    """The sum of a tensor over ranks; differentiable once, by all ranks together.

    Args:
        value: of the same shape on all ranks.
        weight: of this rank's loss in the total loss, up to a factor that is the same for all.
    """
    total: Tensor = _SumOverRanks.apply(value, weight)
    return total


@contextmanager
def joined() -> Iterator[World]:
    """Join the processes that torchrun's variables describe; without these variables, this process alone.

    Tensors on the CPU are exchanged by gloo, those on GPUs by NCCL.

    Raises:
        RequestError: the variables are invalid.
        LostPeerError: the other processes cannot be reached.
    """
    world = world_of(os.environ)
    if world.world_size == 1:
        yield world
        return
    with _talking():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        try:
            yield world
        except StoppedError:  # all have agreed to stop
            _part()
            raise
        _part()
    except BaseException:
        # torchrun ends all processes when one fails; let this one report its error first.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _break_off()
        raise
    dist.destroy_process_group()


def world_of(environment: Mapping[str, str]) -> World:
    """The world that torchrun's variables describe.

    Raises:
        RequestError: one is missing or invalid.
    """
    if environment.get("WORLD_SIZE", "1") == "1":
        return ALONE
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise RequestError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']}, but not set: {', '.join(missing)}. Start several processes "
            "with torchrun, or unset WORLD_SIZE to run one."
        )
    numbers = [environment.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if not all(number.isascii() and number.isdigit() for number in numbers) or int(numbers[0]) >= int(numbers[1]):
        raise RequestError(
            "RANK, WORLD_SIZE and LOCAL_RANK are {}, {} and {}, but must be numbers from 0, with RANK below "
            "WORLD_SIZE.".format(*numbers)
        )
    return World(*(int(number) for number in numbers))


def _break_off() -> None:
    """Leave without waiting for the exchanges between GPUs, which never end if another process is gone."""
    abort = getattr(dist.distributed_c10d, "_abort_process_group", None)  # torch 2.6 and newer
    if abort is None or not torch.cuda.is_available():
        dist.destroy_process_group()
        return
    with suppress(Exception):  # the error that ends this process is another one
        abort()


def _part() -> None:
    """Wait for all before leaving, so that no process closes a connection that another one still reads from."""
    with _talking():
        dist.barrier()


@contextmanager
def _talking() -> Iterator[None]:
    """Turn torch's error into ours if another process is gone during an exchange."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise LostPeerError(
            "A process of this job was killed, or cannot be reached. Start the job again; training can resume from "
            f"its last checkpoint, also with fewer processes. torch's error: {reason}"
        ) from error
