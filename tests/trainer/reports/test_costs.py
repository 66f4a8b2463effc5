"""What an outer step costs."""

from __future__ import annotations

import os
from typing import Any

import pytest
from synthetic import Synthetic

from mamldata.errors import MamldataError
from trainer.reports.costs import measure_costs
from trainer.settings import TrainSettings


@pytest.mark.slow
def test_costs_are_those_of_the_settings() -> None:
    """More work takes more time and, where a graph is kept of it, more memory; what trains nothing is left out."""
    small = TrainSettings(inner_lr=0.01, meta_batch_size=1, device="cpu")
    plans = {
        "short": small,
        "long": TrainSettings(inner_steps=10, inner_lr=0.01, meta_batch_size=1, device="cpu"),
        "first": TrainSettings(algorithm="fomaml", inner_steps=10, inner_lr=0.01, meta_batch_size=1, device="cpu"),
        "joint": TrainSettings(algorithm="pretrain", meta_batch_size=1, device="cpu"),
        "random": TrainSettings(algorithm="random", device="cpu"),
    }
    costs = measure_costs(plans, Synthetic(size=28, k_query=1), rounds=2)
    assert list(costs) == ["short", "long", "first", "joint"]
    for cost in costs.values():
        assert 0 < cost.fastest <= cost.milliseconds <= cost.slowest
    assert costs["long"].fastest > 2 * costs["short"].fastest
    # Ten inner steps' graphs of five 28x28 images, of 64 channels at 14x14 and less, against one's.
    assert costs["long"].peak_mib > 1.5 * costs["first"].peak_mib > 0


@pytest.mark.slow
def test_the_last_step_is_measured() -> None:
    """After all annealing: the first order of the first epochs would look cheaper than training is."""
    settings = TrainSettings(first_order_epochs=1, epoch_steps=10, steps=11, inner_steps=10, inner_lr=0.01)
    early = TrainSettings(first_order_epochs=1, epoch_steps=10, steps=10, inner_steps=10, inner_lr=0.01)
    costs = measure_costs({"second": settings, "first": early}, Synthetic(size=28, k_query=1), rounds=1)
    assert costs["second"].peak_mib > 1.5 * costs["first"].peak_mib


class Deadly:
    """Ends the process that unpickles it, as a machine out of memory does."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (9,)


class DeadlyElsewhere(Synthetic):
    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "source": Deadly()}


@pytest.mark.slow
def test_a_killed_measurement_is_named() -> None:
    """Whose step it was, and what needs less memory."""
    plans = {"large": TrainSettings(meta_batch_size=1, device="cpu")}
    with pytest.raises(MamldataError, match=r"^large: the process that measures the memory .* was killed.*checkpoint_"):
        measure_costs(plans, DeadlyElsewhere(size=8), rounds=1)
