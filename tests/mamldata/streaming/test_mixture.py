"""Mixtures: meta-batches of several sources by weight, resumed and shared as those of one source."""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mamldata import EpisodeStream, live
from mamldata.archive.build import build
from mamldata.archive.plan import BuildRequest
from mamldata.errors import RequestError
from mamldata.sampling.mixture import MixedOrder, shares
from mamldata.sampling.normalization import Normalization, mixed_normalization
from mamldata.sampling.order import Order

BATCH = 4
GOLDEN = [
    *((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 3), (0, 4), (0, 5), (0, 6), (0, 7), (2, 1)),
    *((0, 499), (1, 300), (0, 500_000), (2, 2 * 10**14)),
]
WEIGHTS = st.lists(st.floats(0, 1e6), min_size=1, max_size=5).filter(any)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, glyphs_manifest, glyphs_bank) -> tuple[Path, Path]:
    """An archive of 10 episodes, and a thin one of 9 others."""
    place = tmp_path_factory.mktemp("mixture")
    for name, episodes, seed, thin in (("a", 10, 1, False), ("b", 9, 2, True)):
        request = BuildRequest(n_way=3, k_shot=2, k_query=3, episodes={"train": episodes}, seed=seed, thin=thin)
        build(glyphs_manifest, glyphs_bank, place / name, request)
    return place / "a", place / "b"


def mixture(folders, root, rank=0, world_size=1, **options) -> EpisodeStream:
    """Of a full archive, a remixed one, a thin one and live episodes."""
    sources = [
        folders[0],
        EpisodeStream(folders[0], None, BATCH, 5, remix=True),
        folders[1],
        live("glyphs", n_way=3, k_shot=2, k_query=3, seed=3, root=root),
    ]
    options = {"dtype": torch.uint8, "weights": [3, 1, 2, 1], **options}
    return EpisodeStream(sources, None, BATCH, 5, rank=rank, world_size=world_size, **options)


def kept(batch) -> tuple[list[int], bytes, bytes]:
    return batch.index.tolist(), batch.support_x.numpy().tobytes(), batch.query_x.numpy().tobytes()


@pytest.fixture(scope="module")
def expected(folders, glyphs_root):
    """The first 40 meta-batches of one process."""
    return [kept(batch) for batch in islice(mixture(folders, glyphs_root), 40)]


def orders(weights, seed=0) -> MixedOrder:
    parts = tuple(Order(10 + number, 2, True, seed) for number in range(len(weights)))
    return MixedOrder(None, 2, False, seed, parts=parts, weights=tuple(weights))


def test_each_source_continues_its_own_order(folders, glyphs_root, expected) -> None:
    """The meta-batches from one source, one after the other, are those of a stream of that source alone."""
    streams = [
        EpisodeStream(one, None, BATCH, 5, dtype=torch.uint8, remix=remix)
        for one, remix in (
            (folders[0], False),
            (folders[0], True),
            (folders[1], False),
            (live("glyphs", n_way=3, k_shot=2, k_query=3, seed=3, root=glyphs_root), False),
        )
    ]
    alone = [map(kept, chain.from_iterable(repeat(stream, 20))) for stream in streams]
    numbers = [index[0] % 4 for index, _, _ in expected]
    assert set(numbers) == {0, 1, 2, 3}
    for (index, *images), number in zip(expected, numbers, strict=True):
        its_index, *its_images = next(alone[number])
        assert [one // 4 for one in index] == its_index
        assert {one % 4 for one in index} == {number}
        assert images == its_images


@pytest.mark.parametrize("seed", [0, 1, 2024])
def test_weights_are_kept(seed: int) -> None:
    """Every 1,000 meta-batches have 700 of one source and 300 of the other; in between, as chance has it."""
    order = orders((0.7, 0.3), seed)
    numbers = np.array([order.place(t)[0] for t in range(3000)])
    assert numbers.reshape(3, 1000).sum(1).tolist() == [300, 300, 300]
    # Without order: neighbours are equal as often as independent draws, up to five standard deviations.
    equal, share = (numbers[1:] == numbers[:-1]).mean(), 0.7**2 + 0.3**2
    assert abs(equal - share) < 5 * math.sqrt(share * (1 - share) / 2999)
    tenths = numbers.reshape(30, 100).sum(1)
    assert 30 / 3 < np.var(tenths, ddof=1) < 30 * 2  # of independent draws 21, of an even rhythm 0
    assert not np.array_equal(numbers[:1000], numbers[1000:2000])


def test_golden_order() -> None:
    """Which source each meta-batch comes from is the same on every machine and in every version."""
    places = [orders((0.5, 0.3, 0.2), 7).place(t) for t in (*range(12), 999, 1000, 10**6, 10**15 + 1)]
    assert places == GOLDEN


@given(weights=WEIGHTS, t=st.integers(0, 2**62), seed=st.integers(0, 5))
def test_any_meta_batch_is_known_at_once(weights: list[float], t: int, seed: int) -> None:
    """However far, a source's meta-batches follow one another; a source of weight 0 has none."""
    order = orders(weights, seed)
    seen: dict[int, int] = {}
    for number, own in map(order.place, range(t, t + 30)):
        assert seen.get(number, own) == own
        assert weights[number] > 0
        seen[number] = own + 1


@given(weights=WEIGHTS, count=st.integers(0, 10**9), more=st.integers(0, 1000))
def test_shares_add_up_and_never_shrink(weights: list[float], count: int, more: int) -> None:
    """The numbers of all sources are together what is shared out, near the weights, and none falls."""
    before, after = shares(weights, count), shares(weights, count + more)
    assert (sum(before), sum(after)) == (count, count + more)
    assert all(one <= other for one, other in zip(before, after, strict=True))
    for number, weight in zip(before, weights, strict=True):
        assert abs(number - count * weight / math.fsum(weights)) <= len(weights) / 2 + 1e-6


@pytest.mark.parametrize("at", [0, 1, 7, 23, 39])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (4, 2)])
def test_resumed_with_other_ranks(folders, glyphs_root, expected, at: int, before: int, after: int) -> None:
    """Any meta-batch is the first after a resume, for more or fewer processes, whose parts make up the same ones."""
    earlier = [mixture(folders, glyphs_root, rank, before) for rank in range(before)]
    for _ in zip(range(at), *earlier, strict=False):
        pass
    (state,) = {json.dumps(stream.state_dict()) for stream in earlier}
    later = [mixture(folders, glyphs_root, rank, after) for rank in range(after)]
    for stream in later:
        stream.load_state_dict(json.loads(state))
    for whole in expected[at : at + 5]:
        indices, support, query = zip(*(kept(next(iter(stream))) for stream in later), strict=True)
        assert (list(chain(*indices)), b"".join(support), b"".join(query)) == whole


def test_read_ahead_and_pickled(folders, glyphs_root, expected) -> None:
    """The same on a device, read ahead, whose state is the consumer's; and of a copy for another process."""
    stream = mixture(folders, glyphs_root)
    ahead = pickle.loads(pickle.dumps(stream)).to("cpu")
    assert [kept(batch) for batch in islice(ahead, 10)] == expected[:10]
    stream.load_state_dict(ahead.state_dict())
    assert kept(next(iter(stream))) == expected[10]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_change_nothing(folders, glyphs_root, expected) -> None:
    """Worker processes give the same meta-batches in the same order."""
    stream = mixture(folders, glyphs_root)
    loader = DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [batch.index.tolist() for batch in islice(loader, 12)] == [index for index, _, _ in expected[:12]]


def test_names_and_length(folders, glyphs_root) -> None:
    """Classes have the names that their own source gives them; a mixture has no length and no epochs."""
    stream = mixture(folders, glyphs_root)
    for batch in islice(stream, 12):
        number, own = stream.source.place(batch.index.numpy())
        part = stream.source.parts[number]
        assert stream.class_names(batch) == [part.class_labels(int(one)) for one in own]
    with pytest.raises(TypeError, match="never ends"):
        len(stream)
    with pytest.raises(RequestError, match="never ends"):
        stream.set_epoch(1)
    assert Counter(part.dataset for part in stream.info.sources) == {"glyphs": 4}


def test_augmentation_differs_from_epoch_to_epoch(folders) -> None:
    """An episode that comes again in its source's next epoch gets other random numbers, the same when resumed."""

    def noise(image: torch.Tensor) -> torch.Tensor:
        return torch.rand_like(image)

    def stream() -> EpisodeStream:
        return EpisodeStream([folders[0], folders[1]], None, BATCH, 5, transform=noise)

    seen: dict[int, set[bytes]] = {}
    batches = [
        (batch.index.tolist(), [one.numpy().tobytes() for one in batch.support_x]) for batch in islice(stream(), 12)
    ]
    for index, images in batches:
        for one, image in zip(index, images, strict=True):
            seen.setdefault(one, set()).add(image)
    counts = Counter(one for index, _ in batches for one in index)
    assert max(counts.values()) > 1
    assert {one: len(images) for one, images in seen.items()} == counts
    again = stream()
    again.load_state_dict(again.state_dict() | {"next_batch": 9})
    assert [one.numpy().tobytes() for one in next(iter(again)).support_x] == batches[9][1]


def test_normalized_by_all_images_together() -> None:
    """Mean and deviation are those of the pixels of all sources, in the proportions of the weights."""
    chance = np.random.default_rng(0)
    parts = [chance.random((size, 2)) * scale for size, scale in ((300, 1.0), (100, 0.3))]
    found = mixed_normalization(
        [Normalization(tuple(part.mean(0).tolist()), tuple(part.std(0).tolist())) for part in parts], [3, 1]
    )
    whole = np.concatenate(parts)
    assert np.allclose(found.mean, whole.mean(0), atol=1e-6)
    assert np.allclose(found.std, whole.std(0), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1, 2, 3]}, r"weights has 3 numbers, but there are 2 sources"),
        ({"weights": [1, -0.5]}, r"finite numbers from 0, not -0\.5"),
        ({"weights": [1, math.nan]}, r"finite numbers from 0, not nan"),
        ({"weights": [math.inf, 1]}, r"finite numbers from 0, not inf"),
        ({"weights": ["1", "2"]}, r"finite numbers from 0, not '1'"),
        ({"weights": [0, 0]}, r"must not all be 0"),
        ({"weights": [1e308, 1e308]}, r"must be at most 1e\+300"),
        ({"weights": [10**400, 1]}, r"must be at most 1e\+300"),
        ({"remix": True, "shuffle": True}, r"its own order"),
    ],
)
def test_refused_at_the_start(folders, options, message: str) -> None:
    """Weights that are no weights, and options that do not fit together."""
    with pytest.raises(RequestError, match=message):
        EpisodeStream(list(folders), batch_size=2, **options)


def test_shapes_must_agree(folders, glyphs_root) -> None:
    """Episodes of other shapes, splits or meta-batch sizes are refused with the place, and can be made narrower."""
    others = [
        ({"n_way": 5, "k_shot": 2}, r"n_way is 3 in the first \(glyphs\), and 5 in number 2.*Take fewer"),
        ({"n_way": 3, "k_shot": 2, "image_size": 14}, r"image_shape is \(28, 28, 1\).*\(14, 14, 1\) in number 2"),
        ({"n_way": 3, "k_shot": 2, "split": "test"}, r"split is train .* test"),
    ]
    for other, message in others:
        with pytest.raises(RequestError, match=message):
            EpisodeStream([folders[0], live("glyphs", root=glyphs_root, k_query=3, **other)])
    with pytest.raises(RequestError, match="batch_size is 2 in one of them, not 4"):
        EpisodeStream([folders[0], EpisodeStream(folders[1], batch_size=2)], batch_size=4)
    with pytest.raises(RequestError, match="at least one source"):
        EpisodeStream([])
    with pytest.raises(RequestError, match="give a list of sources"):
        EpisodeStream(folders[0], weights=[1])
    wide = live("glyphs", root=glyphs_root, n_way=5, k_shot=2, k_query=3)
    stream = EpisodeStream([folders[0], wide], n_way=3, k_shot=1)
    assert {next(iter(stream)).support_x.shape[1] for _ in range(4)} == {3}


def test_another_mixture_is_not_resumed(folders, glyphs_root) -> None:
    """A state of other weights or another source is refused, and the message names what differs."""
    state = mixture(folders, glyphs_root).state_dict()
    with pytest.raises(RequestError, match=r"weights: \[3\.0, 1\.0, 2\.0, 1\.0\] saved, \[1\.0"):
        mixture(folders, glyphs_root, weights=[1, 1, 1, 1]).load_state_dict(state)
    with pytest.raises(RequestError, match="sources: "):
        EpisodeStream([folders[1], folders[0]], None, BATCH, 5).load_state_dict(
            EpisodeStream(list(folders), None, BATCH, 5).state_dict()
        )
