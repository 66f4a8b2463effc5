"""The sinusoid problem: what its tasks are, and that they never change."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from mamldata.errors import RequestError
from trainer.sinusoid import Sinusoids


def test_a_task_is_a_function_of_seed_and_index() -> None:
    """Task 7 is the same whichever tasks are drawn beside it, and another one with another seed."""
    alone, among = Sinusoids(3).batch(7, 1), Sinusoids(3).batch(5, 4)
    assert all(torch.equal(one[0], many[2]) for one, many in zip(alone, among, strict=True))
    assert not torch.equal(alone.support_x, Sinusoids(4).batch(7, 1).support_x)


def test_golden_digest() -> None:
    """The tasks of a seed are the same on every machine, for good; inputs to the bit, values to rounding."""
    batch = Sinusoids(0, 5, 5).batch(0, 100)
    x = torch.cat([batch.support_x, batch.query_x], 1)
    assert hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16] == "1ef83175516c8a2c"


def test_shapes_and_ranges() -> None:
    """Points ``[B, k, 1]`` all over the interval; amplitudes reach up to 5, and no value goes beyond."""
    batch = Sinusoids(0, 10, 100).batch(0, 500)
    assert [tuple(part.shape) for part in batch] == [(500, 10, 1)] * 2 + [(500, 100, 1)] * 2 + [(500,)]
    assert {part.dtype for part in batch[:4]} == {torch.float32}
    assert -5 <= batch.query_x.min() < -4.99
    assert 4.99 < batch.query_x.max() <= 5
    heights = batch.query_y.abs().amax(1).flatten()
    assert 4.9 < heights.max() <= 5
    assert heights.min() < 0.2
    assert heights.mean() == pytest.approx((0.1 + 5) / 2, abs=0.2)


def test_both_sets_are_of_one_sinusoid() -> None:
    """All values of a task fit ``a sin x + b cos x``, whose phase is from 0 to pi; and tasks differ."""
    batch = Sinusoids(1, 10, 20).batch(0, 50)
    x, y = (torch.cat(parts, 1).double() for parts in (batch[0::2][:2], batch[1::2][:2]))
    waves = torch.cat([x.sin(), x.cos()], 2)
    found = torch.linalg.lstsq(waves, y).solution
    torch.testing.assert_close(waves @ found, y, rtol=0, atol=1e-5)
    sine, cosine = found[:, 0, 0], found[:, 1, 0]
    phase = torch.atan2(-cosine, sine)
    assert -1e-4 < phase.min() < 0.3
    assert math.pi - 0.3 < phase.max() < math.pi + 1e-4


def test_wrong_numbers_are_refused() -> None:
    """By name, with the least that can be."""
    with pytest.raises(RequestError, match="k_shot must be at least 1, not 0"):
        Sinusoids(0, k_shot=0)
    with pytest.raises(RequestError, match="seed must be at least 0, not -1"):
        Sinusoids(-1)
