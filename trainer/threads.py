"""How many threads torch works with on a CPU: no more than this process has processors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mamldata.parallel import default_workers


@dataclass(frozen=True)
class Threads:
    """A choice, with its reason in words."""

    count: int
    reason: str

    def __str__(self) -> str:
        return f"{self.count} thread{'' if self.count == 1 else 's'} ({self.reason})"


def choose_threads() -> Threads:
    """What torch has been given, by ``OMP_NUM_THREADS`` or by the program, which is never raised.

    Where ``OMP_NUM_THREADS`` is not set, it is lowered to the processors that this process may use: torch counts those
    of the machine, also in a container that gets the time of two.
    """
    count, usable = torch.get_num_threads(), default_workers()
    if os.environ.get("OMP_NUM_THREADS"):
        return Threads(count, f"OMP_NUM_THREADS is {os.environ['OMP_NUM_THREADS']}")
    if usable < count:
        return Threads(usable, "as many as this process may use processors")
    return Threads(count, "torch's own number")


@contextmanager
def limited_threads() -> Iterator[Threads]:
    """Let torch work with ``choose_threads()`` in this block."""
    before, threads = torch.get_num_threads(), choose_threads()
    if threads.count == before:
        yield threads
        return
    torch.set_num_threads(threads.count)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)
