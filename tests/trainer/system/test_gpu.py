"""Time and memory on a GPU, on one that is not there."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from synthetic import Synthetic

from mamldata.errors import RequestError
from trainer.maml.engines import Outcome
from trainer.maml.parameters import MetaParameters
from trainer.runs.metrics import Window
from trainer.system.gpu import Wait, enough_memory, peak_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_wait_lasts_until_its_end(device, fake_gpu, monkeypatch) -> None:
    """In seconds; on a GPU by two events, which nobody waits for before the time is read."""
    ticks = itertools.count(5.0)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    before = len(fake_gpu.log)
    wait = Wait(device)
    wait.end()
    time.perf_counter()
    assert float(wait) == 1.0
    asked = [what for what, *_ in fake_gpu.log[before:]]
    assert asked == (["record", "record"] if device.type == "cuda" else [])


def test_the_share_of_waiting_is_what_the_device_waited() -> None:
    """The window reads a wait when it sums up, not before: then the device has come so far."""

    class Reached:
        there = False

        def __float__(self) -> float:
            assert self.there, "the device has not come so far yet"
            return 0.25 * window_seconds

    window, waits = Window(0), [Reached(), Reached()]
    batch = Synthetic().batch("train", [0])
    outcome = Outcome(MetaParameters({}), torch.tensor(1.0), torch.tensor([0.5]))
    for wait in waits:
        window.add(batch, outcome, wait)
    Reached.there, window_seconds = True, 0.001
    row = window.sum_up()
    seconds = 2 * row["ms_per_step"] / 1000
    assert row["data_wait_percent"] == pytest.approx(100 * 0.5 * window_seconds / seconds)


def test_peak_memory(monkeypatch) -> None:
    """Of tensors, and of what torch reserves for them, which grows alone where memory is kept apart."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 << 20)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 5 << 20)
    assert peak_memory(CUDA) == {"allocated_mib": 3.0, "reserved_mib": 5.0}
    assert peak_memory(CPU) == {}


def test_too_little_memory() -> None:
    """Is told with its purpose; other errors are left alone."""
    error = torch.cuda.OutOfMemoryError("CUDA out of memory.\nSee the docs.")
    message = r"^The GPU has too little memory for tea. Drink water. torch: CUDA out of memory\.$"
    with pytest.raises(RequestError, match=message), enough_memory("tea. Drink water."):
        raise error
    with pytest.raises(RuntimeError, match="another"), enough_memory("tea."):
        raise RuntimeError("another")
