"""Thin archives: the very episodes of full ones, from images that are stored once; and what is said of damage."""

from __future__ import annotations

import errno
import hashlib
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mamldata import EpisodeStream, live
from mamldata.archive import plan as planning
from mamldata.archive.build import Portion, build, build_portion
from mamldata.archive.index import INDEX, INDEX_SUM, Archive, index_sum, parse_archive, read_archive
from mamldata.archive.plan import BuildRequest, plan_archive
from mamldata.archive.remote import ShardCache
from mamldata.archive.verify import verify_archive
from mamldata.bank.format import Bank
from mamldata.datasets.load import load_manifest
from mamldata.datasets.manifest import Manifest
from mamldata.errors import DamagedError, FetchError, RequestError
from mamldata.fetching.http import Network
from mamldata.io.digest import canonical_json, sha256_bytes, sha256_file
from mamldata.sources import pixels
from mamldata.sources.open import open_archive
from mamldata.sources.thin import thin_from_address
from mamldata.streaming.batch import EpisodeBatch
from tests.mamldata.sources.test_remote import Server

REQUEST = BuildRequest(n_way=3, k_shot=2, k_query=4, episodes={"train": 23, "val": 7}, seed=9, episodes_per_shard=5)
THIN = replace(REQUEST, episodes_per_shard=None, thin=True)
QUICK = Network(connect_timeout=5, read_timeout=5, rounds=3, backoff=0, longest_pause=0)
ROWS = 200  # images in a shard of the small thin archive


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, glyphs_manifest: Manifest, glyphs_bank: Bank) -> Path:
    """A full archive, which tests only read."""
    out = tmp_path_factory.mktemp("full") / "archive"
    build(glyphs_manifest, glyphs_bank, out, REQUEST)
    return out


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory, glyphs_manifest: Manifest, glyphs_bank: Bank) -> Path:
    """The thin archive of the same settings, in several shards; tests only read it."""
    return built_thin(tmp_path_factory.mktemp("thin") / "archive", glyphs_manifest, glyphs_bank, THIN)


def built_thin(out: Path, manifest: Manifest, bank: Bank, request: BuildRequest) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_SHARD_BYTES", ROWS * 28 * 28)
        build(manifest, bank, out, request)
    return out


@pytest.fixture
def copied(thin: Path, tmp_path: Path) -> Path:
    """A copy of the thin archive, to be damaged."""
    return Path(shutil.copytree(thin, tmp_path / "copied"))


def same(one: Any, other: Any) -> bool:
    """Whether two runs of meta-batches are equal to the bit."""
    return all(
        len(mine) == len(theirs) and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        for mine, theirs in zip(one, other, strict=True)
    )


def altered(folder: Path, **changes: Any) -> None:
    """Write ``archive.json`` with other values, and its sum, as a forger would."""
    document = json.loads((folder / INDEX).read_bytes()) | changes
    (folder / INDEX).write_bytes(canonical_json(document))
    (folder / INDEX_SUM).write_bytes(index_sum(sha256_bytes(canonical_json(document))))


class TestEqualEpisodes:
    """What is drawn from a thin archive is what a full one stores."""

    @pytest.mark.parametrize("split", ["train", "val"])
    @pytest.mark.parametrize("shuffle", [None, True, False])
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    def test_every_epoch_in_the_same_order(self, full, thin, split, shuffle, dtype):
        """Both give the same meta-batches in every epoch, whatever the order."""
        streams = [EpisodeStream(f, split, 4, seed=2, shuffle=shuffle, dtype=dtype) for f in (full, thin)]
        for _ in range(3):
            assert same(*streams)

    def test_remixed(self, full, thin):
        """Remix takes the drawn episodes apart as it does the stored ones."""
        one, other = (EpisodeStream(folder, batch_size=4, seed=5, remix=True) for folder in (full, thin))
        for _ in range(3):
            assert same(one, other)
        index = np.arange(40)
        assert np.array_equal(one.source.classes(index), other.source.classes(index))

    @pytest.mark.parametrize("remix", [False, True])
    def test_ranks_and_resuming(self, full, thin, remix):
        """A stream of one rank goes on where it was, and reads what that rank of the full archive reads."""
        whole = EpisodeStream(full, batch_size=5, seed=1, remix=remix, rank=1, world_size=3)
        expected = [batch for _ in range(2) for batch in whole]
        first = EpisodeStream(thin, batch_size=5, seed=1, remix=remix, rank=1, world_size=3)
        passing = iter(first)
        got = [next(passing), next(passing)]
        again = EpisodeStream(thin, batch_size=5, seed=1, remix=remix, rank=1, world_size=3)
        again.load_state_dict(first.state_dict())
        got += [batch for _ in range(2) for batch in again]
        assert same(expected, got)

    @pytest.mark.slow
    @settings(max_examples=25)
    @given(data=st.data())
    def test_any_settings(self, data, glyphs_manifest, glyphs_bank, glyphs_root, tmp_path_factory):
        """Full, thin and live episodes are equal to the bit, whatever their settings."""
        n_way, k_shot, k_query = (data.draw(st.integers(low, high)) for low, high in ((2, 6), (1, 4), (1, 6)))
        options: dict[str, Any] = {"n_way": n_way, "k_shot": k_shot, "k_query": k_query}
        options |= {"seed": data.draw(st.integers(0, 2**40)), "rotations": data.draw(st.sampled_from(["all", "none"]))}
        count, split = data.draw(st.integers(1, 12)), data.draw(st.sampled_from(["train", "val", "test"]))
        place = tmp_path_factory.mktemp("any")
        request = BuildRequest(**options, episodes={split: count})
        build(glyphs_manifest, glyphs_bank, place / "full", request)
        built_thin(place / "thin", glyphs_manifest, glyphs_bank, replace(request, thin=True))
        drawn = live("glyphs", split, root=glyphs_root, episodes=count, **options)
        streams = [
            EpisodeStream(source, split, batch_size=3, shuffle=False, dtype=torch.uint8)
            for source in (place / "full", place / "thin", drawn)
        ]
        batches = [list(stream) for stream in streams]
        assert same(batches[0], batches[1])
        assert same(batches[0], batches[2])

    @pytest.mark.parametrize("limit", ["_MOST_TURNED", "_PIECE"])
    def test_what_is_kept_in_memory_changes_nothing(self, full, thin, limit, monkeypatch):
        """Images that are turned one by one, or copied a few at a time, are the same."""
        monkeypatch.setattr(pixels, limit, 1)
        assert same(*(EpisodeStream(folder, batch_size=4, seed=2) for folder in (full, thin)))

    def test_episodes_that_are_not_remembered(self, full, thin, monkeypatch):
        """An archive with too many episodes to remember them gives the same, shuffled, in order and remixed."""
        monkeypatch.setattr("mamldata.sampling.draws._MOST_BYTES", 0)
        for options in ({}, {"shuffle": False}, {"remix": True}):
            one, other = (EpisodeStream(folder, batch_size=4, seed=2, **options) for folder in (full, thin))
            assert same([*one, *one], [*other, *other])

    def test_in_worker_processes(self, full, thin):
        """A DataLoader's workers map the images themselves; the stream that is sent to them is small."""
        stream = EpisodeStream(thin, batch_size=4, seed=2)
        next(iter(stream))
        assert len(pickle.dumps(stream)) < read_archive(thin).images[0].bytes
        stream = EpisodeStream(thin, batch_size=4, seed=2)
        stream.set_epoch(0)
        loaded = list(DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context="fork"))
        assert same(loaded, EpisodeStream(full, batch_size=4, seed=2))

    def test_as_many_episodes_as_one_likes(self, glyphs_manifest, glyphs_bank, tmp_path):
        """Ten million episodes take the space of the images, and any of them is there at once."""
        out = tmp_path / "thin"
        build(glyphs_manifest, glyphs_bank, out, replace(THIN, episodes={"train": 10**7}))
        assert sum(path.stat().st_size for path in out.iterdir()) < glyphs_bank.path.stat().st_size + 50_000
        source = open_archive(out)
        assert source.classes(np.array([10**7 - 1])).shape == (1, 3)


class TestFormat:
    """The bytes of a thin archive."""

    def test_golden(self, thin, glyphs_bank):
        """The same bytes on every machine."""
        archive = read_archive(thin)
        assert archive.digest == "2fe807e1b2b271a4158065bd468a67dd8513f51db99571b45822df8a96dfb979"
        assert archive.bank_sha256 == glyphs_bank.sha256

    @pytest.mark.real_data
    @pytest.mark.slow
    def test_golden_omniglot(self, omniglot_bank, tmp_path):
        """The archive of the documentation."""
        request = BuildRequest(episodes={"train": 1_000_000, "val": 200, "test": 600}, thin=True)
        archive = build(load_manifest("omniglot"), omniglot_bank, tmp_path / "thin", request)
        assert archive.digest == "c207024017e1edc4f11a31c77a200c7581c57669688d560ad563879a4bf4e692"

    def test_shards_are_the_bank(self, thin, glyphs_bank):
        """NumPy reads the shards, which are the bank's rows in order."""
        shards = [np.load(thin / shard.file, mmap_mode="r") for shard in read_archive(thin).images]
        assert len(shards) > 3
        assert np.array_equal(np.concatenate(shards), glyphs_bank.open_images())

    def test_full_archives_do_not_change(self, full):
        """A full archive has none of the keys of a thin one."""
        document = json.loads((full / INDEX).read_bytes())
        assert document["format"] == "mamldata/1"
        assert not {"images", "query_alpha"} & set(document)

    def test_portions_and_an_interrupted_build(self, thin, glyphs_manifest, glyphs_bank, tmp_path):
        """Shards of images are built in portions, too; a last build closes the archive and gives the same bytes."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planning, "_SHARD_BYTES", ROWS * 28 * 28)
            built = build_portion(glyphs_manifest, glyphs_bank, tmp_path / "out", Portion(2, 3), THIN)
            assert 0 < built.written < built.of_shards
            build(glyphs_manifest, glyphs_bank, tmp_path / "out", THIN, workers=2)
        names = {path.name for path in thin.iterdir()}
        assert {path.name for path in (tmp_path / "out").iterdir()} == names
        assert all((thin / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in names)

    def test_few_shards_of_a_large_bank(self, glyphs_manifest, glyphs_bank, monkeypatch):
        """However large the bank, there are at most 64 shards, all of which are mapped at once."""
        monkeypatch.setattr(planning, "_SHARD_BYTES", 1)
        assert len(plan_archive(glyphs_manifest, glyphs_bank, THIN).images) == 64

    def test_a_folder_with_another_archive(self, full, glyphs_manifest, glyphs_bank):
        """A thin archive is not built over a full one."""
        with pytest.raises(RequestError, match="format 'mamldata/1' there, 'mamldata-thin/1' asked for"):
            build(glyphs_manifest, glyphs_bank, full, THIN)

    def test_shards_of_episodes_are_refused(self):
        """``episodes_per_shard`` would have no effect."""
        with pytest.raises(RequestError, match="no shards of episodes"):
            replace(THIN, episodes_per_shard=3)

    @given(data=st.data())
    def test_any_mutation_is_refused_or_harmless(self, thin, data):
        """No value of another kind in ``archive.json`` gives a traceback."""
        document = json.loads((thin / INDEX).read_bytes())
        node: Any = document
        keys: list[Any] = [data.draw(st.sampled_from(sorted(node)))]
        while isinstance(node[keys[-1]], dict | list) and node[keys[-1]] and data.draw(st.booleans()):
            node = node[keys[-1]]
            keys.append(data.draw(st.sampled_from(sorted(node)) if isinstance(node, dict) else st.just(0)))
        junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just([]) | st.just({})
        node[keys[-1]] = data.draw(junk)
        try:
            archive = parse_archive(canonical_json(document))
        except DamagedError:
            return
        assert isinstance(archive, Archive)


class TestDamage:
    """Nothing but the stored images is given."""

    def test_a_missing_shard(self, copied):
        """A shard with images of the split must exist when the archive is opened."""
        (copied / "images-00001.npy").unlink()
        with pytest.raises(DamagedError, match=r"images-00001\.npy is missing \(images 200 to 399\)"):
            EpisodeStream(copied)

    def test_a_cut_shard(self, copied):
        """Nor may it have another length."""
        path = copied / "images-00000.npy"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(DamagedError, match=r"images-00000\.npy \(images 0 to 199\) has .* bytes, expected"):
            EpisodeStream(copied)

    def test_a_changed_byte(self, copied):
        """A file that this user has not seen whole is hashed before its images are used, without being asked to."""
        path = copied / "images-00000.npy"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(DamagedError, match=r"images-00000\.npy .* is damaged: sha256"):
            list(EpisodeStream(copied))
        assert any("images-00000.npy" in problem for problem in verify_archive(copied))

    def test_exchanged_shards(self, copied):
        """Two shards of equal length cannot take each other's place."""
        one, other = copied / "images-00000.npy", copied / "images-00001.npy"
        data = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(data)
        with pytest.raises(DamagedError, match="sha256"):
            list(EpisodeStream(copied))

    def test_a_header_of_another_array(self, copied):
        """The header must be that of the described array."""
        path = copied / "images-00000.npy"
        path.write_bytes(path.read_bytes().replace(b"'|u1'", b"'|i1'", 1))
        with pytest.raises(DamagedError, match="does not start as it should"):
            list(EpisodeStream(copied))

    def test_images_of_another_bank(self, copied):
        """``verify`` compares the images with ``bank_sha256``, which full archives cite."""
        assert verify_archive(copied) == []
        altered(copied, bank_sha256="0" * 64)
        assert any("not of bank_sha256" in problem for problem in verify_archive(copied))

    def test_a_file_that_is_not_ours(self, copied):
        """A shard that the archive does not list is reported."""
        shutil.copy(copied / "images-00000.npy", copied / "images-00099.npy")
        assert verify_archive(copied) == [
            f"{copied / 'images-00099.npy'} does not belong to the archive. Move it elsewhere."
        ]

    def test_hashed_once(self, copied, monkeypatch):
        """A shard that was found whole is not hashed again, unless that is asked for."""
        hashed: list[Path] = []
        monkeypatch.setattr("mamldata.io.atomic._TICK_NS", -(10**12))
        monkeypatch.setattr(
            "mamldata.bank.checked.sha256_file", lambda path, *rest: hashed.append(path) or sha256_file(path, *rest)
        )
        list(EpisodeStream(copied))
        first = len(hashed)
        list(EpisodeStream(copied))
        assert len(hashed) == first > 0
        list(EpisodeStream(copied, verify=True))
        assert len(hashed) == 2 * first


@pytest.fixture
def server(thin: Path):
    running = Server(thin)
    yield running
    running.close()


class TestAddress:
    """A thin archive at an address."""

    def test_the_images_come_once(self, thin, server, tmp_path):
        """Each shard is fetched once, whatever is read; the order is that of the folder."""
        stream = EpisodeStream(server.url, batch_size=4, seed=3, cache_dir=tmp_path)
        local = EpisodeStream(thin, batch_size=4, seed=3)
        for _ in range(3):
            assert same(stream, local)
        assert same(*(EpisodeStream(p, "val", cache_dir=c) for p, c in ((server.url, tmp_path), (thin, None))))
        names = [name for name, _ in server.asked]
        shards = [name for name in names if name.endswith(".npy")]
        assert len(shards) == len(set(shards))
        server.asked.clear()
        remixed = [EpisodeStream(p, remix=True, cache_dir=c) for p, c in ((server.url, tmp_path), (thin, None))]
        assert same(*remixed)
        assert {name for name, _ in server.asked} == {INDEX, INDEX_SUM}

    def test_only_what_the_split_needs(self, thin, server, tmp_path):
        """Shards without images of the split's classes are not fetched."""
        list(EpisodeStream(server.url, "val", cache_dir=tmp_path))
        shards = {name for name, _ in server.asked if name.endswith(".npy")}
        table = read_archive(thin).splits["val"].classes
        rows = np.concatenate([np.arange(a, a + n) for a, n in zip(table.first_row, table.images, strict=True)])
        assert shards == {f"images-{number:05d}.npy" for number in (rows // ROWS).tolist()}
        assert len(shards) < len(read_archive(thin).images)

    def test_without_a_cache_folder(self, thin, server, tmp_path, monkeypatch):
        """A temporary folder holds the shards, and is removed with the stream."""
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        stream = EpisodeStream(server.url, batch_size=4, seed=3)
        assert same(stream, EpisodeStream(thin, batch_size=4, seed=3))
        assert list(tmp_path.glob("mamldata-*"))
        del stream
        assert not list(tmp_path.glob("mamldata-*"))

    def test_a_cache_with_too_little_room(self, server, tmp_path):
        """A bound that does not hold the split's images is refused at once."""
        with pytest.raises(RequestError, match="room for all images of the train split"):
            EpisodeStream(server.url, cache_dir=tmp_path, cache_bytes=100_000)
        with pytest.raises(RequestError, match="needs a cache_dir"):
            EpisodeStream(server.url, cache_bytes=10**9)

    def test_wrong_bytes(self, thin, server, tmp_path):
        """What the server sends is hashed before it is used."""
        shutil.copytree(thin, tmp_path / "wrong")
        path = tmp_path / "wrong" / "images-00000.npy"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        server.folder = tmp_path / "wrong"
        source = thin_from_address(server.url, read_archive(thin), "train", cache_dir=tmp_path / "cache", network=QUICK)
        with pytest.raises(FetchError, match=r"images-00000\.npy could not be fetched: another file came"):
            next(iter(EpisodeStream(source)))

    def test_a_missing_shard(self, thin, server, tmp_path):
        """A shard that is not at the address is named."""
        shutil.copytree(thin, tmp_path / "wrong")
        (tmp_path / "wrong" / "images-00001.npy").unlink()
        server.folder = tmp_path / "wrong"
        with pytest.raises(FetchError, match=r"images-00001\.npy could not be fetched: .*404"):
            next(iter(EpisodeStream(server.url, cache_dir=tmp_path / "cache")))

    def test_verify(self, server):
        """An archive at an address is verified, shard by shard."""
        assert verify_archive(server.url) == []

    def test_shared_with_full_archives(self, server, tmp_path):
        """Images lie in the cache as other shards do, so that its bound counts and removes them."""
        list(EpisodeStream(server.url, "val", cache_dir=tmp_path))
        cache = ShardCache(tmp_path, 1)
        shards = list(cache.own.glob("*.tar"))
        assert shards
        assert {sha256_file(path) for path in shards} == {path.stem for path in shards}


def labels(batch: EpisodeBatch) -> list[list[int]]:
    """The number of queries of each way, for each episode."""
    return [torch.bincount(row, minlength=int(row.max()) + 1).tolist() for row in batch.query_y]


class TestNarrower:
    """Fewer ways or images than there are: the first ones."""

    @pytest.mark.parametrize("kind", ["full", "thin", "live"])
    @pytest.mark.parametrize("numbers", [(2, 1, 3), (3, 2, 1), (3, 1, 4), (2, 2, 4), (3, 2, 4)])
    def test_the_first_of_each(self, full, thin, glyphs_root, kind, numbers):
        """Narrower episodes are parts of the whole ones."""
        n_way, k_shot, k_query = numbers
        drawn = live("glyphs", root=glyphs_root, n_way=3, k_shot=2, k_query=4, seed=9, episodes=23)
        source = {"full": full, "thin": thin, "live": drawn}[kind]
        options = {"batch_size": 4, "seed": 2, "shuffle": True}
        narrow = EpisodeStream(source, **options, n_way=n_way, k_shot=k_shot, k_query=k_query)
        for some, whole in zip(narrow, EpisodeStream(source, **options), strict=True):
            for part, k, k_all in (("support_x", k_shot, 2), ("query_x", k_query, 4)):
                every = getattr(whole, part).reshape(-1, 3, k_all, 1, 28, 28)
                expected = every[:, :n_way, :k].reshape(-1, n_way * k, 1, 28, 28)
                assert torch.equal(getattr(some, part), expected)
            assert some.query_y[0].tolist() == [way for way in range(n_way) for _ in range(k_query)]
        assert narrow.info.k_query == k_query

    def test_remixed(self, full, thin):
        """Ways are mixed first and narrowed then."""
        options = {"batch_size": 4, "seed": 2, "remix": True}
        narrow = [EpisodeStream(folder, **options, n_way=2, k_query=1) for folder in (full, thin)]
        assert same(*narrow)
        narrow[0].set_epoch(0)
        for some, whole in zip(narrow[0], EpisodeStream(full, **options), strict=True):
            assert torch.equal(some.query_x, whole.query_x.reshape(-1, 3, 4, 1, 28, 28)[:, :2, 0])
        assert narrow[0].source.classes(np.arange(5)).shape == (5, 2)

    @pytest.mark.parametrize("numbers", [{"k_query": 5}, {"k_shot": 3}, {"n_way": 4}, {"k_query": 0}, {"n_way": 1}])
    def test_more_than_there_are(self, full, numbers):
        """What the episodes do not have is refused, with what they have."""
        with pytest.raises(RequestError, match=f"{next(iter(numbers))} must be from"):
            EpisodeStream(full, **numbers)

    def test_the_state_of_a_wider_stream(self, full):
        """A stream's state does not fit one of other episodes."""
        state = EpisodeStream(full).state_dict()
        with pytest.raises(RequestError, match="k_query: 4 saved, 2 here"):
            EpisodeStream(full, k_query=2).load_state_dict(state)


class TestUnequalQueries:
    """Queries that are shared out by a Dirichlet distribution."""

    def test_labels_and_images(self, glyphs_root):
        """Each query has the label of its class, no image occurs twice, and none of the support is asked for."""
        source = live("glyphs", "train", root=glyphs_root, n_way=4, k_shot=1, k_query=3, query_alpha=1, episodes=60)
        whole = np.empty((60, 12, 784), dtype=np.uint8)
        support = np.empty((60, 4, 784), dtype=np.uint8)
        source.read(np.arange(60), support.reshape(-1), whole.reshape(-1))
        stream = EpisodeStream(source, batch_size=60, shuffle=False, dtype=torch.uint8)
        batch = next(iter(stream))
        counts = source.query_counts(np.arange(60))
        assert counts is not None
        assert (counts.sum(axis=1) == 12).all()
        assert labels(batch) == [np.trim_zeros(row, "b").tolist() for row in counts]
        pool = live("glyphs", "train", root=glyphs_root, n_way=4, k_shot=1, k_query=3, episodes=1)._pixels
        for episode in range(60):
            seen = set()
            for place, label in enumerate(batch.query_y[episode].tolist()):
                class_ = int(source.classes(np.array([episode]))[0, label])
                every = np.empty((1, 1, int(source.table.images[class_]), 784), dtype=np.uint8)
                pool.copy(np.array([[class_]]), np.arange(every.shape[2])[None, None], every.reshape(-1))
                image = batch.query_x[episode, place].numpy().tobytes()
                assert image in {one.tobytes() for one in every[0, 0]}
                seen.add((label, image))
            assert len(seen) == 12
            assert not {(way, support[episode, way].tobytes()) for way in range(4)} & seen

    def test_thin_and_live_are_equal(self, glyphs_manifest, glyphs_bank, glyphs_root, tmp_path):
        """A thin archive with unequal queries has the episodes that live ones of the same settings are."""
        request = replace(THIN, query_alpha=2, episodes={"test": 30})
        folder = built_thin(tmp_path / "thin", glyphs_manifest, glyphs_bank, request)
        options: dict[str, Any] = {"n_way": 3, "k_shot": 2, "k_query": 4, "seed": 9, "query_alpha": 2}
        drawn = live("glyphs", "test", root=glyphs_root, episodes=30, **options)
        streams = [EpisodeStream(source, "test", batch_size=7, shuffle=False) for source in (folder, drawn)]
        assert same(list(streams[0]), list(streams[1]))
        digest = hashlib.sha256()
        for batch in EpisodeStream(folder, "test", dtype=torch.uint8):
            digest.update(batch.query_x.numpy().tobytes() + batch.query_y.numpy().tobytes())
        assert digest.hexdigest() == "722ad8074398999a124910f4f1ce285c529d582113f687350a71be8e2d252bcc"
        assert same(*(stream.to("cpu") for stream in streams))

    def test_not_for_everything(self, glyphs_manifest, glyphs_bank, glyphs_root, tmp_path):
        """Full archives, remix and narrower episodes need equal numbers of queries, and say so."""
        with pytest.raises(RequestError, match="Build a thin one"):
            BuildRequest(query_alpha=2)
        folder = built_thin(tmp_path / "thin", glyphs_manifest, glyphs_bank, replace(THIN, query_alpha=2))
        with pytest.raises(RequestError, match="unequal numbers of queries"):
            EpisodeStream(folder, remix=True)
        with pytest.raises(RequestError, match="unequal numbers of queries"):
            EpisodeStream(folder, k_query=2)
        assert next(iter(EpisodeStream(folder, k_shot=1))).support_x.shape[1] == 3
        with pytest.raises(RequestError, match="query_alpha must be a whole number from 1"):
            live("glyphs", root=glyphs_root, k_query=2, query_alpha=0)


@pytest.mark.parametrize("kind", ["full", "thin"])
def test_too_little_memory_to_map(full, thin, kind, monkeypatch):
    """A shard that the system has no memory to map is Python's own error, which the command line tells in words."""

    def refuse(*_: object, **__: object) -> object:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("mamldata.archive.shard.mmap.mmap", refuse)
    source = open_archive({"full": full, "thin": thin}[kind])
    size = 3 * 4 * 28 * 28
    with pytest.raises(MemoryError):
        source.read(np.array([0]), np.empty(size, np.uint8), np.empty(size, np.uint8))
