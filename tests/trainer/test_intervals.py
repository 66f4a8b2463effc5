"""Intervals that hold what they promise, at any number of episodes."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.intervals import half_width, student_quantile

# NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2, the column 0.975.
PUBLISHED = {
    **{1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228},
    **{15: 2.131, 20: 2.086, 30: 2.042, 50: 2.009, 100: 1.984, 10**9: 1.960},
}


@pytest.mark.parametrize(("freedom", "quantile"), PUBLISHED.items())
def test_quantiles_are_those_that_are_published(freedom: int, quantile: float) -> None:
    """To the last published digit."""
    assert round(student_quantile(freedom), 3) == quantile


@pytest.mark.parametrize("episodes", [2, 3, 4, 10, 100])
def test_the_interval_holds_the_mean_95_times_in_100(episodes: int) -> None:
    """Of normal draws, however few; 1.96 standard errors would hold it 70 times at two episodes."""
    draws = np.random.default_rng(episodes).normal(size=(20_000, episodes))
    widths = [half_width(deviation, episodes) for deviation in draws.std(1, ddof=1)]
    assert np.mean(np.abs(draws.mean(1)) <= widths) == pytest.approx(0.95, abs=0.005)


def test_of_many_episodes_it_is_the_fields() -> None:
    """Papers report 1.96 standard errors over 600 episodes: this is 0.2 % wider."""
    assert half_width(0.1, 600) == pytest.approx(1.96 * 0.1 / 600**0.5, rel=2.1e-3)
