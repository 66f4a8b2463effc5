"""Episodes that share no image: none is used twice, as many as possible, and the same everywhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

import mamldata
from mamldata.errors import RequestError
from mamldata.sampling.disjoint import DisjointSampler
from mamldata.sampling.sampler import EpisodeSpec, class_table


def sampler(sizes: list[int], turns: int = 1, seed: int = 3, **spec: int) -> DisjointSampler:
    offsets = [0, *np.cumsum(sizes).tolist()]
    table = class_table([f"class {i}" for i in range(len(sizes))], offsets, range(len(sizes)), turns)
    counts = {"n_way": 3, "k_shot": 1, "k_query": 2, **spec}
    return DisjointSampler(EpisodeSpec("bank", "scheme", "test", quarter_turns=turns, seed=seed, **counts), table)


def rows(drawn: DisjointSampler) -> np.ndarray:
    """The bank's rows of all images of all episodes, ``[episodes, n_way, images]``."""
    classes, images, _ = drawn.draw(np.arange(drawn.episodes))
    return drawn.table.first_row[classes][..., None] + images


@pytest.mark.parametrize("turns", [1, 4])
@pytest.mark.parametrize("sizes", [[12] * 5, [3, 9, 60, 4, 30, 7], [3, 3, 3], [30, 30, 3, 3, 3, 3]])
def test_no_image_is_in_two_episodes(sizes: list[int], turns: int) -> None:
    """Nor twice in one; classes of an episode are different, and their images are their own."""
    drawn = sampler(sizes, turns)
    found = rows(drawn)
    assert len(np.unique(found)) == found.size
    owner = np.searchsorted(np.cumsum(sizes), found, side="right")
    assert (owner == owner[..., :1]).all()
    assert all(len(set(ways)) == 3 for ways in owner[..., 0].tolist())


@pytest.mark.parametrize(
    ("sizes", "episodes"),
    [([12] * 5, 6), ([9] * 7, 7), ([300, 3, 3], 1), ([30, 30, 3, 3, 3, 3], 4), ([600] * 20, 1333)],
)
def test_as_many_as_the_images_allow(sizes: list[int], episodes: int) -> None:
    """Where some classes have more images than others, too: each must be in almost every episode."""
    drawn = sampler(sizes)
    assert drawn.episodes == episodes
    assert rows(drawn).shape == (episodes, 3, 3)


def test_an_episode_is_a_function_of_seed_and_index() -> None:
    """In any order and number; another seed gives others; after the last one they begin again."""
    one = sampler([30] * 8)
    index = np.array([7, 0, 7, 26, 26 - one.episodes])
    classes, images, _ = one.draw(index)
    all_of = sampler([30] * 8).draw(np.arange(one.episodes))
    assert np.array_equal(classes, all_of.classes[index % one.episodes])
    assert np.array_equal(images, all_of.images[index % one.episodes])
    assert not np.array_equal(rows(one), rows(sampler([30] * 8, seed=4)))


def test_the_episodes_are_the_same_everywhere() -> None:
    """Pinned, because results are compared by their description, which names a seed."""
    content = rows(sampler([30, 45, 12, 30, 9, 20], turns=4)).astype("<i8").tobytes()
    assert hashlib.sha256(content).hexdigest() == "97e3d2f5f6278d075b20c30e7f37702ed72aace71c1e1baedd276021dbdd538b"


def test_classes_turns_and_images_are_mixed() -> None:
    """Every class meets every other one, in every turn, and images are not in the order of the bank."""
    drawn = sampler([60] * 6, turns=4)
    classes, images, _ = drawn.draw(np.arange(drawn.episodes))
    pairs = {tuple(sorted((a, b))) for ways in (classes // 4).tolist() for a in ways for b in ways if a != b}
    assert len(pairs) == 15
    assert set((classes % 4).flatten().tolist()) == {0, 1, 2, 3}
    assert set((classes // 4)[:, 0].tolist()) == set(range(6))
    assert (np.diff(images, axis=-1) == 1).mean() < 0.2


def test_what_cannot_be_is_refused() -> None:
    """More ways than classes of different images, too few images, unequal queries."""
    with pytest.raises(RequestError, match="n_way is 3, but split 'test' has 2 classes of different images"):
        sampler([12, 12], turns=4)
    with pytest.raises(RequestError, match="it has 2 images"):
        sampler([12, 12, 2])
    with pytest.raises(RequestError, match="leave out query_alpha"):
        sampler([30] * 4, query_alpha=2)


def test_live_episodes_share_no_image(glyphs_root: Path) -> None:
    """As many as there are, or fewer if so asked; their description tells them from others, and reading is the same."""
    source = mamldata.live("glyphs", "test", n_way=3, k_query=4, rotations="none", disjoint=True, root=glyphs_root)
    assert source.episodes == len(source.table) * 4 // 3
    assert source.info.identity()["disjoint"] is True
    assert "disjoint" not in mamldata.live("glyphs", "test", root=glyphs_root).info.identity()
    images = 3 * 28 * 28
    support, query = np.empty(source.episodes * images, np.uint8), np.empty(source.episodes * 4 * images, np.uint8)
    source.read(np.arange(source.episodes), support, query)
    seen = np.concatenate([support.reshape(-1, 784), query.reshape(-1, 784)])
    assert len(np.unique(seen, axis=0)) == len(seen)
    assert mamldata.live("glyphs", "test", episodes=2, disjoint=True, root=glyphs_root).episodes == 2
