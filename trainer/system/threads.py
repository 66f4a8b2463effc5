"""The number of torch's threads on a CPU, and the distribution of a meta-batch's tasks among them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import nn

from mamldata.parallel import default_workers
from mamldata.words import counted

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Threads:
    """A number of threads, with its reason in words."""

    count: int
    reason: str

    def __str__(self) -> str:
        return f"{counted(self.count, 'thread')} ({self.reason})"


def choose_threads() -> Threads:
    """Torch's number of threads, set by ``OMP_NUM_THREADS`` or by the program; never raised.

    If ``OMP_NUM_THREADS`` is not set, it is lowered to the processors that this process may use: torch counts those
    of the machine, even in a container that is limited to two.
    """
    count, usable = torch.get_num_threads(), default_workers()
    if os.environ.get("OMP_NUM_THREADS"):
        return Threads(count, f"OMP_NUM_THREADS is {os.environ['OMP_NUM_THREADS']}")
    if usable < count:
        return Threads(usable, "one per processor that this process may use")
    return Threads(count, "torch's setting")


@contextmanager
def limited_threads() -> Iterator[Threads]:
    """Set torch's threads to ``choose_threads()`` in this block."""
    before, threads = torch.get_num_threads(), choose_threads()
    if threads.count == before:
        yield threads
        return
    torch.set_num_threads(threads.count)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)


def each_task(
    work: Callable[[nn.Module, Item], Result],
    network: nn.Module,
    tasks: Sequence[Item],
    device: torch.device,
) -> Iterator[Result]:
    """``work(network, task)`` of each task, in order.

    On a CPU with several threads, each task runs on one of them; torch by itself would divide each single operation
    among all. The operations of one episode are too small for that, and if other programs use the processors too,
    threads that share an operation spend their time waiting for one that is not running. Results do not depend on
    the number of threads; memory holds a graph for each. On other devices this is a plain loop.

    Args:
        work: a pure function; it may replace the network's parameters temporarily (``functional_call``).
        network: shared by all tasks; each thread has its own copy, with the same parameters.
        tasks: of a meta-batch.
        device: of the tasks.
    """
    threads = torch.get_num_threads()
    crew = min(threads, len(tasks)) if device.type == "cpu" else 1
    if crew <= 1:  # also without tasks, as one of several processes can be
        yield from (work(network, task) for task in tasks)
        return
    copies: SimpleQueue[nn.Module] = SimpleQueue()
    for _ in range(crew):
        copies.put(copy.deepcopy(network, {id(value): value for value in network.parameters()}))

    def one(task: Item) -> Result:
        own = copies.get()
        try:
            return work(own, task)
        finally:
            copies.put(own)

    try:
        torch.set_num_threads(1)  # the caller works on the results meanwhile
        pool = ThreadPoolExecutor(crew, initializer=torch.set_num_threads, initargs=(threads // crew,))
        wait = True
        try:
            yield from pool.map(one, tasks)
        except KeyboardInterrupt:
            wait = False  # the tasks under way may take long
            raise
        finally:
            pool.shutdown(wait, cancel_futures=True)
    finally:
        torch.set_num_threads(threads)  # new threads take the number set last in any thread
