"""Intervals that hold what they promise, at any number of episodes."""

from __future__ import annotations

import numpy as np
import pytest

from mamldata.errors import RequestError
from trainer.intervals import class_half_width, half_width, student_quantile

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


def evaluations(classes: int, episodes: int, spread: float, runs: int) -> tuple[float, float]:
    """How often the interval for other classes and the usual one hold the truth, on classes of unequal difficulty.

    Each class is harder to recognize, and to tell others from, than the next; the truth is the mean over endless ones.
    """
    chance, ways, queries = np.random.default_rng(7), 5, 15

    def shares(skill: np.ndarray, lure: np.ndarray) -> np.ndarray:
        odds = 1 + skill - 0.2 * (lure.sum(-1, keepdims=True) - lure) + chance.normal(0, 0.3, skill.shape)
        return 1 / (1 + np.exp(-odds))

    truth = shares(*(chance.normal(0, spread, (200_000, ways)) for _ in range(2))).mean()
    hits = np.zeros(2)
    for _ in range(runs):
        skill, lure = chance.normal(0, spread, (2, classes))
        drawn = chance.random((episodes, classes)).argpartition(ways, axis=1)[:, :ways]
        right = chance.binomial(queries, shares(skill[drawn], lure[drawn])).sum(1) / (ways * queries)
        widths = class_half_width(right, drawn), half_width(right.std(ddof=1).item(), episodes)
        hits += np.abs(right.mean() - truth) <= np.array(widths)
    other, usual = hits / runs
    return other, usual


@pytest.mark.parametrize(("classes", "episodes"), [(12, 100), (20, 200), (40, 100)])
def test_intervals_for_other_classes_hold_the_truth(classes: int, episodes: int) -> None:
    """In 95 % of evaluations, within the error of 400 of them; the usual ones, for more episodes, in far fewer."""
    other, usual = evaluations(classes, episodes, 0.7, 400)
    assert 0.925 <= other <= 0.98
    assert usual < 0.8


def test_intervals_for_equal_classes_are_the_usual_ones() -> None:
    """Where no class is harder than another, they are hardly wider: what the episodes add is subtracted."""
    chance = np.random.default_rng(3)
    ratios = []
    for _ in range(200):
        drawn = chance.random((300, 30)).argpartition(5, axis=1)[:, :5]
        shares = chance.binomial(75, 0.7, 300) / 75
        ratios.append(class_half_width(shares, drawn) / half_width(shares.std(ddof=1).item(), 300))
    assert min(ratios) >= 1.0
    assert np.median(ratios) < 1.2


def test_classes_in_every_pair_have_a_closed_form() -> None:
    """On all pairs of five classes whose effects add up, it is Student's interval of the mean of the effects."""
    effects = np.array([0.1, 0.5, 0.2, 0.9, 0.4])
    pairs = np.array([(i, j) for i in range(5) for j in range(5) if i != j] * 3)
    expected = student_quantile(4) * effects.std(ddof=1) / np.sqrt(5)
    assert class_half_width(effects[pairs].mean(1), pairs) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("classes", "episodes"), [([[0, 1], [0, 2], [0, 3], [0, 1], [0, 2]], 5), ([[0, 1], [2, 3], [4, 5]], 3)]
)
def test_classes_that_cannot_be_left_out(classes: list[list[int]], episodes: int) -> None:
    """One that is in every episode, or hardly any episode for each, is refused in words."""
    with pytest.raises(RequestError, match=f"{episodes} episodes of . classes do not show how accuracy varies"):
        class_half_width(np.linspace(0, 1, episodes), np.array(classes))
