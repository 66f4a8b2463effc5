"""Remembered episodes are those that the sampler draws; unequal queries are shared out as the format says."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamldata.errors import RequestError
from mamldata.sampling.draws import DrawnEpisodes
from mamldata.sampling.sampler import ClassTable, EpisodeSampler, EpisodeSpec, class_table

SPEC = EpisodeSpec("a" * 64, "some", "train", n_way=3, k_shot=1, k_query=2, quarter_turns=1, seed=5)


def table(sizes: tuple[int, ...] = (9, 7, 30, 8, 12)) -> ClassTable:
    offsets = np.cumsum([4, *sizes]).tolist()
    return class_table([f"class {number}" for number in range(len(sizes))], offsets, range(len(sizes)), 1)


def drawn(spec: EpisodeSpec = SPEC, **options: Any) -> DrawnEpisodes:
    return DrawnEpisodes(EpisodeSampler(spec, table()), **{"episodes": 1000, **options})


@given(index=st.lists(st.integers(0, 999), max_size=40), remembered=st.booleans(), unequal=st.booleans())
def test_any_episodes_in_any_order(index, remembered, unequal):
    """What is remembered, drawn ahead or drawn on its own is the same."""
    spec = replace(SPEC, query_alpha=2 if unequal else None)
    episodes = drawn(spec, episodes=1000 if remembered else None)
    places = np.array(index, dtype=np.int64)
    for wanted in (places, np.sort(places), np.arange(len(index))):
        expected = EpisodeSampler(spec, table()).draw(wanted)
        for got, right in zip(episodes.get(wanted), expected, strict=True):
            assert np.array_equal(got, right) if right is not None else got is None


def test_one_by_one_and_all_at_once():
    """An episode does not depend on those that are drawn with it."""
    sampler = EpisodeSampler(SPEC, table())
    shuffled = np.random.default_rng(0).permutation(300)
    together = sampler.draw(shuffled)
    for place, index in enumerate(shuffled.tolist()):
        alone = sampler.draw(np.array([index]))
        assert np.array_equal(alone.classes[0], together.classes[place])
        assert np.array_equal(alone.images[0], together.images[place])


def test_far_away():
    """The counter of the generator goes round at 2**256, which no index reaches; large ones and small ones mix."""
    index = np.array([2**40, 0, 2**40 + 1, 3], dtype=np.int64)
    sampler = EpisodeSampler(SPEC, table())
    expected = [sampler.sample(int(one), 1)[0] for one in index]
    assert np.array_equal(sampler.draw(index).classes, [one[:, 0] for one in expected])


def test_reading_on_draws_ahead(monkeypatch):
    """Those who read one meta-batch after the other draw a thousand episodes at a time."""
    calls: list[int] = []
    draw = EpisodeSampler.draw
    monkeypatch.setattr(EpisodeSampler, "draw", lambda self, index: (calls.append(len(index)), draw(self, index))[1])
    episodes = drawn(episodes=None)
    for start in range(0, 4096, 32):
        episodes.get(np.arange(start, start + 32))
    assert calls == [1024] * 4


def test_pickling():
    """Another process draws episodes itself: nothing that is remembered goes with them."""
    episodes = drawn()
    before = len(pickle.dumps(episodes))
    episodes.get(np.arange(1000))
    assert len(pickle.dumps(episodes)) == before
    again = pickle.loads(pickle.dumps(episodes))
    assert np.array_equal(again.get(np.arange(9)).images, episodes.get(np.arange(9)).images)


@pytest.mark.parametrize(("alpha", "episode"), [(None, 0), (None, 1), (2, 1)])
def test_the_example_of_the_format(alpha, episode):
    """The page on the format shows the episodes that its example gives."""
    classes = class_table([f"class {number}" for number in range(10)], range(0, 51, 5), range(10), 1)
    spec = EpisodeSpec("0" * 64, "example", "train", 3, 1, 2, 1, 7, alpha)
    found = EpisodeSampler(spec, classes).draw(np.array([episode]))
    shares = [2, 2, 2] if found.queries is None else found.queries[0].tolist()
    ways = []
    for class_, images, share in zip(found.classes[0].tolist(), found.images[0], shares, strict=True):
        first, *others = (5 * class_ + images[: 1 + share]).tolist()
        ways.append(f"{class_}: {first} | {' '.join(map(str, others))}")
    page = (Path(__file__).parents[3] / "docs/format.md").read_text(encoding="utf-8")
    assert f"\n{', '.join(ways)}\n" in page
    assert ", ".join(f"0x{part:016x}" for part in spec.key) in page


# --- unequal queries


def by_the_book(spec: EpisodeSpec, classes: ClassTable, episode: int) -> tuple[list[int], list[list[int]]]:
    """An episode as ``docs/format.md`` 2.1 tells it, with Python's own numbers: its classes, and each way's images."""
    alpha, total = spec.query_alpha or 0, spec.n_way * spec.k_query
    wanted = spec.n_way + (spec.n_way * alpha - 1) + spec.n_way * (spec.k_shot + total)
    blocks = -(-wanted // 4)
    key = np.array(spec.key, dtype=np.uint64)
    numbers = iter(np.random.Philox(key=key, counter=episode * blocks).random_raw(wanted).tolist())

    def draw(count: int, things: int, given: list[int]) -> list[int]:
        pool = list(range(things))
        for j in range(count):
            at = j + given[j] % (things - j)
            pool[j], pool[at] = pool[at], pool[j]
        return pool[:count]

    ways = draw(spec.n_way, len(classes), [next(numbers) for _ in range(spec.n_way)])
    points = sorted(next(numbers) >> 32 for _ in range(spec.n_way * alpha - 1))
    cuts = [points[way * alpha - 1] for way in range(1, spec.n_way)]
    ends = [0, *((cut * total + 2**31) // 2**32 for cut in cuts), total]
    room = [int(classes.images[way]) - spec.k_shot for way in ways]
    shares = [min(ends[way + 1] - ends[way], room[way]) for way in range(spec.n_way)]
    for way in sorted(range(spec.n_way), key=lambda way: room[way] - shares[way]):
        shares[way] += min(total - sum(shares), room[way] - shares[way])
    images = []
    for way, share in zip(ways, shares, strict=True):
        own = [next(numbers) for _ in range(spec.k_shot + total)]
        images.append(draw(spec.k_shot + share, int(classes.images[way]), own))
    return ways, images


@pytest.mark.parametrize("alpha", [1, 2, 5])
@pytest.mark.parametrize("n_way", [2, 3, 5])
def test_as_the_format_says(alpha, n_way):
    """A second, plain implementation of the page on the format draws the same episodes."""
    spec, classes = replace(SPEC, query_alpha=alpha, n_way=n_way, k_query=6), table()
    found = EpisodeSampler(spec, classes).draw(np.arange(40))
    assert found.queries is not None
    for episode in range(40):
        ways, images = by_the_book(spec, classes, episode)
        assert found.classes[episode].tolist() == ways
        shares = found.queries[episode].tolist()
        assert [len(one) - spec.k_shot for one in images] == shares
        assert [found.images[episode, way, : 1 + share].tolist() for way, share in enumerate(shares)] == images


def moments(counts: npt.NDArray[np.int32]) -> tuple[Any, Any]:
    return counts.mean(axis=0), counts.var(axis=0)


@pytest.mark.parametrize("alpha", [1, 2, 10])
def test_the_distribution(alpha):
    """With room for all, the shares have the mean and the variance of a symmetric Dirichlet distribution."""
    spec = replace(SPEC, n_way=5, k_query=15, query_alpha=alpha)
    classes = table((100,) * 8)
    counts = EpisodeSampler(spec, classes).draw(np.arange(20_000)).queries
    assert counts is not None
    assert (counts.sum(axis=1) == 75).all()
    mean, variance = moments(counts)
    # Rounding adds 1/6 where both ends of a share are rounded, and 1/12 where one is.
    expected = 75**2 * 4 / (25 * (5 * alpha + 1)) + 1 / 6
    assert np.abs(mean - 15).max() < 5 * np.sqrt(expected / 20_000)
    assert np.abs(variance / expected - 1).max() < 0.06


def test_what_does_not_fit():
    """No class gives more images than it has, and the queries stay as many as were asked for."""
    spec = replace(SPEC, n_way=4, k_query=6, query_alpha=1)
    classes = table((7, 7, 8, 30, 7))
    found = EpisodeSampler(spec, classes).draw(np.arange(500))
    assert found.queries is not None
    room = classes.images[found.classes] - spec.k_shot
    assert (found.queries <= room).all()
    assert (found.queries.sum(axis=1) == 24).all()
    assert (found.queries == room).any()


def test_equal_queries_are_as_before():
    """The key of episodes with equal queries does not know of unequal ones."""
    assert SPEC.key == replace(SPEC, query_alpha=None).key != replace(SPEC, query_alpha=1).key


@pytest.mark.parametrize("alpha", [0, -1, 1001])
def test_other_parameters(alpha):
    """The parameter is a whole number."""
    with pytest.raises(RequestError, match="query_alpha must be a whole number from 1 to 1000"):
        replace(SPEC, query_alpha=alpha)
