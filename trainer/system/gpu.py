"""Time and memory on a GPU, which computes behind the CPU's back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mamldata.errors import RequestError


class Wait:
    """How long a device has nothing to do, from when this is made until ``end``: ``float(wait)``, in seconds.

    On a GPU the time begins when all work that was asked for is done, and ``float`` may be called once the GPU has
    come as far as ``end``; on another device it is the time on the CPU.

    Args:
        device: which waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._begin: Any = self._now()
        self._end = self._begin

    def end(self) -> None:
        """Now the next work is there."""
        self._end = self._now()

    def __float__(self) -> float:
        return float(self._begin.elapsed_time(self._end) / 1000 if self._on_gpu else self._end - self._begin)

    def _now(self) -> Any:  # seconds, or an event
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory that tensors took on a GPU, and that torch reserved for them, in MiB; empty elsewhere."""
    if device.type != "cuda":
        return {}
    return {
        "allocated_mib": torch.cuda.max_memory_allocated(device) / 2**20,
        "reserved_mib": torch.cuda.max_memory_reserved(device) / 2**20,
    }


@contextmanager
def enough_memory(purpose: str) -> Iterator[None]:
    """Explain an error of torch about too little memory on a GPU.

    Args:
        purpose: what it is too little for, and how to need less.

    Raises:
        RequestError: the GPU's memory is too small.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise RequestError(f"The GPU has too little memory for {purpose} torch: {reason}") from error
