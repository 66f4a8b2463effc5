"""Remix: every way once in each epoch, no class twice in an episode, the same whoever asks, wherever one goes on."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mamldata import EpisodeStream, live
from mamldata.archive.build import build
from mamldata.archive.index import read_archive
from mamldata.archive.plan import BuildRequest
from mamldata.errors import DamagedError, RequestError
from mamldata.sampling.order import Order, permutation, share
from mamldata.sampling.remix import remix
from mamldata.sources.remixed import RemixedSource
from mamldata.sources.stored import ArchiveSource

EPISODES, N_WAY, K_SHOT, K_QUERY, BATCH = 23, 3, 2, 4, 8
PER_EPOCH = EPISODES // BATCH
REQUEST = BuildRequest(
    n_way=N_WAY,
    k_shot=K_SHOT,
    k_query=K_QUERY,
    episodes={"train": EPISODES, "val": 2},
    seed=9,
    episodes_per_shard=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, glyphs_manifest, glyphs_bank) -> Path:
    """A small archive; not to be written to."""
    out = tmp_path_factory.mktemp("remix") / "archive"
    build(glyphs_manifest, glyphs_bank, out, REQUEST)
    return out


@st.composite
def stored(draw) -> np.ndarray:
    """Classes of stored episodes, ``[episodes, n_way]``: from as many classes as ways (the hardest) to many more."""
    episodes, n_way = draw(st.integers(1, 60)), draw(st.integers(2, 12))
    pool = n_way + draw(st.integers(0, 12) | st.integers(0, 500))
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    return chance.random((episodes, pool)).argsort(axis=1)[:, :n_way].astype(np.int32)


def by_the_book(classes: np.ndarray, seed: int, epoch: int) -> list[list[int]]:
    """What docs/format.md says an epoch of remix is, with no thought of speed."""
    n_way = classes.shape[1]
    class_of = classes.reshape(-1).tolist()
    ways = permutation(seed, epoch, classes.size, "remix").tolist()
    size = len(ways)

    def row(p: int) -> list[int]:
        return [class_of[way] for way in ways[p - p % n_way : p - p % n_way + n_way]]

    def is_twin(p: int) -> bool:
        return class_of[ways[p]] in row(p)[: p % n_way]

    while twins := [p for p in range(size) if is_twin(p)]:
        for p in filter(is_twin, twins):
            a = class_of[ways[p]]
            q = next(
                q
                for q in (at % size for at in range(p + 1, p + size))
                if a not in row(q) and (is_twin(q) or class_of[ways[q]] not in row(p))
            )
            ways[p], ways[q] = ways[q], ways[p]
    return [ways[start : start + n_way] for start in range(0, size, n_way)]


def stream(folder, **options) -> EpisodeStream:
    return EpisodeStream(folder, batch_size=BATCH, seed=3, remix=True, dtype=torch.uint8, **options)


def stored_ways(folder: Path) -> dict[int, tuple[int, bytes, bytes]]:
    """Class, support and query bytes of each way of the train split, read with nothing but tarfile and NumPy."""
    ways = {}
    for shard in sorted(folder.glob("train-*.tar")):
        with tarfile.open(shard) as tar:
            arrays = {member.name: np.load(io.BytesIO(tar.extractfile(member).read())) for member in tar}
        for key in {name.partition(".")[0] for name in arrays}:
            support, query, source = (arrays[f"{key}.{part}.npy"] for part in ("support", "query", "source"))
            for place in range(N_WAY):
                way = int(key) * N_WAY + place
                ways[way] = (int(source[place, 0]), support[place].tobytes(), query[place].tobytes())
    return ways


def ways_of(batch) -> list[list[tuple[bytes, bytes]]]:
    """Support and query bytes of each way of each episode of a batch."""
    parts = [
        images.permute(0, 1, 3, 4, 2).reshape(len(images), N_WAY, -1).numpy()
        for images in (batch.support_x, batch.query_x)
    ]
    return [
        [(support[place].tobytes(), query[place].tobytes()) for place in range(N_WAY)]
        for support, query in zip(*parts, strict=True)
    ]


def kept(batches) -> list[tuple[list[int], bytes]]:
    return [(batch.index.tolist(), b"".join(tensor.numpy().tobytes() for tensor in batch)) for batch in batches]


class TestRemix:
    @given(classes=stored(), seed=st.integers(0, 2**70), epoch=st.integers(0, 2**40))
    def test_every_way_once_and_no_class_twice(self, classes, seed, epoch):
        """An epoch is a permutation of all ways, none left over, and no episode has a class twice."""
        ways = remix(classes, seed, epoch)
        assert ways.shape == classes.shape
        assert np.array_equal(np.sort(ways, axis=None), np.arange(classes.size))
        found = np.sort(classes.reshape(-1)[ways], axis=1)
        assert (found[:, 1:] != found[:, :-1]).all()

    @given(classes=stored(), seed=st.integers(0, 2**70), epoch=st.integers(0, 2**40))
    def test_it_is_what_the_format_says(self, classes, seed, epoch):
        """The exchanges are those of section 3.2 of docs/format.md, taken word by word."""
        assert remix(classes, seed, epoch).tolist() == by_the_book(classes, seed, epoch)

    def test_as_many_classes_as_ways(self):
        """Where every episode must hold every class, two thirds of the ways and more are exchanged, and soon."""
        classes = np.random.default_rng(0).random((5000, 20)).argsort(axis=1).astype(np.int32)
        found = np.sort(classes.reshape(-1)[remix(classes, 0, 0)], axis=1)
        assert (found == np.arange(20)).all()

    @given(classes=stored(), seed=st.integers(0, 2**70), epoch=st.integers(0, 2**40))
    def test_it_is_pure(self, classes, seed, epoch):
        """Asked again, with other questions between, it is the same."""
        first = remix(classes, seed, epoch).copy()
        remix(classes, seed + 1, epoch)
        assert np.array_equal(remix(classes.copy(), seed, epoch), first)

    def test_epochs_and_seeds_differ(self):
        """Other epochs and seeds give other episodes, and (seed, epoch) is not their sum."""
        classes = np.arange(500 * 5, dtype=np.int32).reshape(500, 5)
        found = [remix(classes, *pair) for pair in ((0, 0), (0, 1), (1, 0), (1, 1))]
        assert all(not np.array_equal(a, b) for i, a in enumerate(found) for b in found[:i])

    def test_episodes_are_mixed(self):
        """Ways of one stored episode hardly ever meet again."""
        classes = np.arange(500 * 5, dtype=np.int32).reshape(500, 5)
        episodes = remix(classes, 0, 0) // 5
        assert sum(len(set(row)) == 5 for row in episodes.tolist()) > 480

    def test_what_has_no_twins_is_the_permutation_itself(self):
        """Where no exchange is needed, none is made; where one is, only a few ways move."""
        distinct = np.arange(5000, dtype=np.int32).reshape(1000, 5)
        twins = (distinct % 2500).astype(np.int32)
        moved = (remix(distinct, 1, 2) != remix(twins, 1, 2)).sum()
        assert 0 < moved < 40

    def test_the_golden_digest(self):
        """The episodes that resumed runs depend on, pinned: with and without exchanges."""
        digest = hashlib.sha256()
        for classes, seed, epoch in [(4400, 0, 0), (7, 5, 1), (5, 2**70, 12)]:
            table = (np.arange(300)[:, None] * 3 + np.arange(5)) % classes
            digest.update(remix(table.astype(np.int32), seed, epoch).astype("<i8").tobytes())
        assert digest.hexdigest() == "0662d3487025dd0bcfde6af4cea43575cd472a93550fb145fc880d3de44df6e9"

    def test_a_stored_episode_with_a_class_twice(self):
        """What no build makes is refused, and not searched for ever."""
        with pytest.raises(DamagedError, match="Episode 1 of the train split holds a class twice"):
            remix(np.array([[0, 1], [2, 2], [0, 1]], dtype=np.int32), 0, 0)

    def test_it_cannot_be_written_to(self):
        """Nobody changes an epoch for the others."""
        with pytest.raises(ValueError, match="read-only"):
            remix(np.array([[0, 1]], dtype=np.int32), 0, 0)[0] = 3


class TestStream:
    def test_an_epoch_is_the_stored_ways(self, folder):
        """Images and labels are those of stored ways; in an epoch none twice, and no class twice in an episode."""
        ways = stored_ways(folder)
        names = {images: (way, class_) for way, (class_, *pair) in ways.items() for images in [tuple(pair)]}
        mixed = stream(folder)
        for epoch in range(3):
            seen: list[int] = []
            for batch in mixed:
                assert batch.support_y.tolist() == [[way for way in range(N_WAY) for _ in range(K_SHOT)]] * BATCH
                for episode in ways_of(batch):
                    found = [names[images] for images in episode]
                    assert len({class_ for _, class_ in found}) == N_WAY
                    seen += [way for way, _ in found]
            assert len(seen) == len(set(seen)) == PER_EPOCH * BATCH * N_WAY
            assert mixed.next_batch == (epoch + 1) * PER_EPOCH

    def test_no_way_is_left_over_with_a_batch_that_fits(self, folder):
        """With meta-batches that divide the epoch, every way of the archive is used exactly once."""
        ways = stored_ways(folder)
        batches = EpisodeStream(folder, batch_size=EPISODES, remix=True, dtype=torch.uint8)
        (batch,) = batches
        assert sorted(way for episode in ways_of(batch) for way in episode) == sorted(w[1:] for w in ways.values())

    def test_index_and_labels(self, folder):
        """The index counts through all epochs, and from it and the seed alone the episode is known again."""
        ways = stored_ways(folder)
        table = read_archive(folder).split("train").classes
        mixed = stream(folder)
        other = RemixedSource(ArchiveSource(folder), 3)
        for epoch in range(2):
            for step, batch in enumerate(mixed):
                first = epoch * EPISODES + step * BATCH
                assert batch.index.tolist() == list(range(first, first + BATCH))
                for index, episode in zip(batch.index.tolist(), ways_of(batch), strict=True):
                    expected = [ways[way] for way in other.ways(np.array([index]))[0].tolist()]
                    assert episode == [tuple(images) for _, *images in expected]
                    assert other.class_labels(index) == [table.label(class_) for class_, *_ in expected]

    def test_with_rotations_turns_are_classes(self, folder):
        """A class and its turn may meet in an episode: they are different classes."""
        source = ArchiveSource(folder)
        table = read_archive(folder).split("train").classes
        mixed = RemixedSource(source, 0).ways(np.arange(20 * EPISODES))
        episodes = [[table.label(c) for c in row] for row in source.way_classes().reshape(-1)[mixed].tolist()]
        assert all(len(set(row)) == N_WAY for row in episodes)
        assert any(len({name.partition(",")[0] for name in row}) < N_WAY for row in episodes)

    @pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
    @pytest.mark.parametrize("device", [None, "cpu"])
    @pytest.mark.parametrize("remixed", [True, False])
    def test_ranks_share_the_meta_batches(self, folder, world_size, device, remixed):
        """The parts of all ranks, put together, are the meta-batches of one process."""
        whole = [batch.index.tolist() for batch in EpisodeStream(folder, None, BATCH, 3, remix=remixed)]
        parts = []
        for rank in range(world_size):
            part = EpisodeStream(folder, None, BATCH, 3, remix=remixed, rank=rank, world_size=world_size)
            parts.append([tuple(t.clone() for t in batch) for batch in (part.to(device) if device else part)])
        joined = [[torch.cat(tensors) for tensors in zip(*of_t, strict=True)] for of_t in zip(*parts, strict=True)]
        assert [batch[4].tolist() for batch in joined] == whole
        alone = EpisodeStream(folder, None, BATCH, 3, remix=remixed)
        for batch, reference in zip(joined, alone, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(batch, reference, strict=True))

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
    @pytest.mark.parametrize(("workers", "context"), [(0, None), (1, "spawn"), (4, "fork")])
    def test_workers_change_nothing(self, folder, workers, context):
        """A DataLoader of any number of workers gives the same epoch."""
        alone, inside = stream(folder), stream(folder)
        expected = [kept(alone) for _ in range(2)][1]
        inside.set_epoch(1)
        loader = DataLoader(inside, batch_size=None, num_workers=workers, multiprocessing_context=context)
        assert kept(loader) == expected

    def test_resume_at_every_point(self, folder):
        """From behind any meta-batch of three epochs, also with other ranks, it goes on the same."""
        mixed = stream(folder)
        states, expected = [], []
        for _ in range(4):
            for batch in mixed:
                expected += kept([batch])
                states.append(mixed.state_dict())
        for state in states[: 3 * PER_EPOCH]:
            again = stream(folder)
            again.load_state_dict(state)
            start = state["next_batch"]
            stop = (start // PER_EPOCH + 1) * PER_EPOCH
            assert kept(again) == expected[start:stop]
            part = stream(folder, rank=1, world_size=3)
            part.load_state_dict(state)
            found = [batch.index.tolist() for batch in part]
            assert found == [share(np.array(index), 1, 3).tolist() for index, _ in expected[start:stop]]

    def test_the_state_records_remix(self, folder):
        """The state of a plain stream is not taken for that of a remixed one, nor the other way round."""
        plain = EpisodeStream(folder, batch_size=BATCH, seed=3, shuffle=False)
        with pytest.raises(RequestError, match="remix: False saved, True here"):
            stream(folder).load_state_dict(plain.state_dict())
        with pytest.raises(RequestError, match="remix: True saved, False here"):
            plain.load_state_dict(stream(folder).state_dict())

    def test_pickling(self, folder):
        """A remixed stream travels light, and goes on the same."""
        mixed = stream(folder)
        expected = [kept(mixed) for _ in range(2)][1]
        again = pickle.loads(pickle.dumps(mixed))
        again.set_epoch(1)
        assert kept(again) == expected
        assert pickle.loads(pickle.dumps(mixed.source))._classes is None

    def test_what_cannot_be(self, folder, glyphs_root):
        """Remix where there is nothing to remix, and ranks that cannot share, are refused at once."""
        endless = live("glyphs", root=glyphs_root)
        for call, message in [
            (lambda: EpisodeStream(endless, remix=True), "live episodes never repeat"),
            (lambda: EpisodeStream(folder, "val", remix=True), "val is evaluated on the archive's own"),
            (lambda: EpisodeStream(folder, remix=True, shuffle=True), "has its own order"),
            (lambda: EpisodeStream(folder, None, 24, remix=True), "batch_size is 24, but there are only 23"),
            (lambda: EpisodeStream(folder, None, 4, rank=4, world_size=4), "rank 4 of 4 cannot share"),
            (
                lambda: EpisodeStream(folder, None, 4, rank=0, world_size=5),
                "rank 0 of 5 cannot share a meta-batch of 4",
            ),
        ]:
            with pytest.raises(RequestError, match=message):
                call()


class TestShare:
    @given(size=st.integers(0, 100), world_size=st.integers(1, 20))
    def test_all_parts_are_the_whole(self, size, world_size):
        """Parts follow one another, and differ by at most one."""
        whole = np.arange(size)
        parts = [share(whole, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(parts), whole)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1

    @given(episodes=st.integers(1, 400), batch=st.integers(1, 400), epoch=st.integers(0, 50))
    def test_remixed_episodes_are_counted_through_all_epochs(self, episodes, batch, epoch):
        """Each epoch begins at its own number, and leaves out less than a meta-batch at its end."""
        batch = min(batch, episodes)
        order = Order(episodes, batch, False, 0, remix=True)
        per_epoch = order.batches_per_epoch
        found = np.concatenate([order.indices(t) for t in range(epoch * per_epoch, (epoch + 1) * per_epoch)])
        assert found.tolist() == list(range(epoch * episodes, epoch * episodes + episodes // batch * batch))
