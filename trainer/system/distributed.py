"""Several processes that work as one, as torchrun starts them; with one process nothing here does anything."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    """The processes of a job, and which of them this one is.

    What all of them must call together, in the same order, is said of each method; a process that fails in between
    would leave the others waiting, which is what ``together`` is for.

    Attributes:
        rank: of this process, from 0. The one with rank 0 writes and speaks for all.
        world_size: how many there are.
        local_rank: of this process among those of its machine; it chooses the GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    def device(self, chosen: torch.device) -> torch.device:
        """Of the kind that was chosen, this process's own device.

        Raises:
            RequestError: there are too few, or processes cannot exchange gradients from there.
        """
        if self.world_size == 1 or chosen.type == "cpu":
            return chosen
        if chosen.type != "cuda":
            raise RequestError(f"Several processes train on cpu or cuda, not on {chosen.type}. Give --device cpu.")
        if self.local_rank >= torch.cuda.device_count():
            raise RequestError(
                f"This machine has {torch.cuda.device_count()} GPUs, too few for the process of local rank "
                f"{self.local_rank}. Start one process a GPU (--nproc-per-node), or give --device cpu."
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    @contextmanager
    def together(self, stop: Stop | None = None) -> Iterator[None]:
        """What fails in this block on one rank fails on all, so that nobody waits for a process that is gone.

        Called by all ranks. No other method that all must call may be called in the block.

        Args:
            stop: whether this process has been asked to stop. If any has, ``agreed`` is set in all.

        Raises:
            PeerError: another rank has failed, and raises what happened.
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
            # On the CPU, so that no GPU is waited for.
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
        # Of several failures one is told: mostly they are the same.
        raise PeerError(rank, message, code) from own

    def from_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank. Called by all; what fails there fails on all."""
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
        """What each rank gives, in the order of ranks, on every rank. Called by all."""
        if self.world_size == 1:
            return [thing]
        things: list[Any] = [None] * self.world_size
        with _talking():
            dist.all_gather_object(things, thing)
        return things

    def average(self, tensors: Sequence[Tensor], share: float) -> list[Tensor]:
        """The mean over the episodes of all ranks, from each rank's mean over its own. Called by all.

        One exchange for each dtype, whatever the number of tensors. All ranks get the same bits: each part of the
        sum is formed by one of them, and handed to the others.

        Args:
            tensors: of the same shapes and dtypes on each rank, on one device; they are not changed.
            share: this rank's part of all episodes, in [0, 1].
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
        """Put rank 0's values into the tensors of all. Called by all."""
        if self.world_size == 1:
            return
        with torch.no_grad(), _talking():
            for tensor in tensors:
                values = tensor.contiguous()
                dist.broadcast(values, src=0)
                tensor.copy_(values)

    def require_same(self, tensors: Sequence[Tensor], what: str) -> None:
        """Make sure that all ranks hold the same bits. Called by all.

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
                    f"{what} differ between rank 0 and {', '.join(others)}: the machines of this job do not compute "
                    "alike, or one of them is faulty. Run on machines of one kind, with --resume."
                )


ALONE = World()


class _SumOverRanks(torch.autograd.Function):
    """A sum over ranks, and its derivative where each rank's loss is the mean over its own images."""

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
    """The sum of a tensor over ranks; differentiable once, and then all ranks must differentiate together.

    Args:
        value: of one shape on all ranks.
        weight: of this rank's loss in the loss of all, up to a factor that is the same for all.
    """
    total: Tensor = _SumOverRanks.apply(value, weight)
    return total


@contextmanager
def joined() -> Iterator[World]:
    """The processes that torchrun has started together, or whoever sets the same variables; else this one alone.

    The CPU's tensors go through gloo and, where there are GPUs, theirs through NCCL.

    Raises:
        RequestError: the variables cannot be.
        LostPeerError: the others cannot be reached.
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
        except StoppedError:  # on which all have agreed
            _part()
            raise
        _part()
    except BaseException:
        # torchrun ends all processes when one has failed: this one, which ends by itself, shall say why before.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    finally:
        dist.destroy_process_group()


def world_of(environment: Mapping[str, str]) -> World:
    """What torchrun's variables say.

    Raises:
        RequestError: one is missing, or no fitting number.
    """
    if environment.get("WORLD_SIZE", "1") == "1":
        return ALONE
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise RequestError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']}, but {', '.join(missing)} not set. Start several processes "
            "with torchrun, or unset WORLD_SIZE for one."
        )
    numbers = [environment.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if not all(number.isascii() and number.isdigit() for number in numbers) or int(numbers[0]) >= int(numbers[1]):
        raise RequestError(
            "RANK, WORLD_SIZE and LOCAL_RANK are {}, {} and {}: ranks are numbers from 0 below WORLD_SIZE.".format(
                *numbers
            )
        )
    return World(*(int(number) for number in numbers))


def _part() -> None:
    """Wait for all before leaving, so that nobody closes a connection that another one still reads from."""
    with _talking():
        dist.barrier()


@contextmanager
def _talking() -> Iterator[None]:
    """An exchange with the other processes; that one of them is gone shows as an error of ours."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise LostPeerError(
            "A process of this job was killed, or cannot be reached. Start the job again; training goes on from its "
            f"last checkpoint (--resume), with fewer processes, too. What was seen of it: {reason}"
        ) from error
