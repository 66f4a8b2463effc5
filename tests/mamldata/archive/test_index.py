"""The archive format: other tools read it, and nothing crafted or damaged gets past its reader."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mamldata.archive.index as archive_module
from mamldata.archive.build import build
from mamldata.archive.index import INDEX, INDEX_SUM, Archive, index_sum, parse_archive, read_archive, shard_sizes
from mamldata.archive.layout import BLOCK, END, EpisodeLayout
from mamldata.archive.plan import BuildRequest
from mamldata.archive.shard import open_shard
from mamldata.errors import DamagedError, RequestError
from mamldata.io.digest import canonical_json
from mamldata.sampling.sampler import EpisodeSampler

REQUEST = BuildRequest(
    n_way=3, k_shot=2, k_query=3, episodes={"train": 7, "val": 2, "test": 3}, seed=5, episodes_per_shard=4
)
FAST = settings(max_examples=100, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, glyphs_manifest, glyphs_bank) -> Path:
    """A finished archive; not to be written to."""
    out = tmp_path_factory.mktemp("archive") / "glyphs-3w2s"
    build(glyphs_manifest, glyphs_bank, out, REQUEST)
    return out


@pytest.fixture(scope="module")
def archive(folder) -> Archive:
    return read_archive(folder)


@pytest.fixture
def own(folder, tmp_path) -> Path:
    """A copy of the archive's description, to be damaged."""
    for name in (INDEX, INDEX_SUM):
        shutil.copyfile(folder / name, tmp_path / name)
    return tmp_path


def members_of(folder: Path, archive: Archive, split: str) -> list[dict[str, np.ndarray]]:
    """Every episode of a split as mamldata's own views see it."""
    episodes = []
    for shard in archive.split(split).shards:
        mapped = open_shard(folder / shard.file, shard, archive.layout, verify=True)
        views = {member.name: archive.layout.view(mapped, member) for member in archive.layout.members}
        episodes += [{name: np.array(view[i]) for name, view in views.items()} for i in range(shard.episodes)]
    return episodes


class TestOtherReaders:
    def test_tarfile_and_numpy_read_the_same_arrays(self, folder, archive):
        """Plain tarfile and numpy.load give what the archive's own views give."""
        for split in archive.splits:
            own = members_of(folder, archive, split)
            count = 0
            for shard in archive.split(split).shards:
                with tarfile.open(folder / shard.file) as tar:
                    infos = tar.getmembers()
                    assert len(infos) == 3 * shard.episodes
                    for info in infos:
                        key, name, suffix = info.name.split(".")
                        assert suffix == "npy"
                        array = np.load(io.BytesIO(tar.extractfile(info).read()), allow_pickle=False)
                        expected = own[int(key)][name]
                        assert array.dtype == expected.dtype
                        assert array.shape == expected.shape
                        assert np.array_equal(array, expected)
                        count += 1
            assert count == 3 * archive.split(split).episodes

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
    def test_plain_webdataset_reads_the_same_arrays(self, folder, archive):
        """Webdataset without a word of ours decodes every episode to the same arrays."""
        webdataset = pytest.importorskip("webdataset")
        for split in archive.splits:
            own = members_of(folder, archive, split)
            paths = [str(folder / shard.file) for shard in archive.split(split).shards]
            samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
            assert [int(sample["__key__"]) for sample in samples] == list(range(len(own)))
            for sample, expected in zip(samples, own, strict=True):
                for name, array in expected.items():
                    assert sample[f"{name}.npy"].dtype == array.dtype
                    assert np.array_equal(sample[f"{name}.npy"], array)

    def test_the_systems_tar_lists_every_member(self, folder, archive):
        """Tar tvf lists names, sizes, modes and times, and finds nothing odd."""
        program = shutil.which("tar")
        if program is None:
            pytest.skip("there is no tar program here")
        shard = archive.split("train").shards[1]
        done = subprocess.run(
            [program, "tvf", str(folder / shard.file), "--numeric-owner"],
            capture_output=True,
            text=True,
            check=True,
            env={"TZ": "UTC", "LC_ALL": "C", "PATH": "/usr/bin:/bin"},
        )
        assert done.stderr == ""
        lines = done.stdout.splitlines()
        assert len(lines) == 3 * shard.episodes
        assert lines[0].split()[0] == "-rw-r--r--"
        assert "0/0" in lines[0]
        assert "1970" in lines[0]
        assert lines[0].endswith("00000004.support.npy")

    def test_every_image_is_the_banks_row_turned_as_its_class_says(self, folder, archive, glyphs_bank):
        """An image is the row that source.npy names, in the class that it names, turned by that class's angle."""
        bank = glyphs_bank.open_images()
        turns_seen = set()
        for split in archive.splits:
            table = archive.split(split).classes
            for episode in members_of(folder, archive, split):
                for way, (class_, *rows) in enumerate(episode["source"].tolist()):
                    turns_seen.add(int(table.quarter_turns[class_]))
                    images = [*episode["support"][way], *episode["query"][way]]
                    for row, image in zip(rows, images, strict=True):
                        first = table.first_row[class_]
                        assert first <= row < first + table.images[class_]
                        assert np.array_equal(image, np.rot90(bank[row], table.quarter_turns[class_]))
        assert turns_seen == {0, 1, 2, 3}


class TestLayout:
    def test_fixed_fields_of_the_tar_headers(self, folder, archive):
        """A header says nothing of who wrote it or when, and is ustar."""
        shard = archive.split("train").shards[0]
        with tarfile.open(folder / shard.file) as tar:
            for info in tar:
                assert (info.mtime, info.uid, info.gid, info.mode) == (0, 0, 0, 0o644)
                assert (info.uname, info.gname, info.linkname) == ("", "", "")
                assert info.type == tarfile.REGTYPE
                assert info.pax_headers == {}
        assert (folder / shard.file).read_bytes()[257:265] == b"ustar\x0000"

    @given(index=st.integers(0, 10**8 - 1))
    @FAST
    def test_headers_are_those_of_pythons_tarfile(self, index):
        """Equal to what tarfile writes for the same fields, but for the device numbers, which stay empty."""
        layout = EpisodeLayout(5, 1, 15, (28, 28, 1))
        for ours, member in zip(layout.headers(index, 1)[0], layout.members, strict=True):
            info = tarfile.TarInfo(f"{index:08d}.{member.name}.npy")
            info.size = member.data - member.header - BLOCK + member.bytes
            expected = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
            expected[329:345] = bytes(16)
            expected[148:156] = b" " * 8
            expected[148:156] = f"{sum(expected):06o}\0 ".encode()
            assert ours.tobytes() == bytes(expected)

    @given(first=st.one_of(st.integers(0, 10**8 - 9), st.sampled_from([7, 97, 9_996, 9_999_995, 99_999_991])))
    @FAST
    def test_checksums_hold_across_digit_carries(self, first):
        """Headers of many episodes at once are each one's own, and tarfile accepts their checksums."""
        layout = EpisodeLayout(5, 5, 15, (84, 84, 3))
        together = layout.headers(first, 9)
        for i, headers in enumerate(together):
            assert np.array_equal(headers, layout.headers(first + i, 1)[0])
            for header in headers:
                assert tarfile.TarInfo.frombuf(header.tobytes(), "ascii", "strict").name.startswith(f"{first + i:08d}.")

    @given(
        n_way=st.integers(2, 60),
        k_shot=st.integers(1, 30),
        k_query=st.integers(1, 30),
        side=st.integers(1, 100),
        channels=st.sampled_from([1, 3]),
    )
    @FAST
    def test_members_stand_one_after_the_other(self, n_way, k_shot, k_query, side, channels):
        """Blocks of 512 bytes, no overlap, less than a block of padding, npy data aligned to 64."""
        layout = EpisodeLayout(n_way, k_shot, k_query, (side, side, channels))
        end = 0
        for member in layout.members:
            assert member.header == end
            assert member.header % BLOCK == 0
            assert (member.data - member.header) % 64 == 0
            assert member.data >= member.header + BLOCK + 64
            unpadded = member.data + member.bytes
            end = unpadded + (-unpadded) % BLOCK
        assert layout.stride == end
        assert layout.shard_bytes(3) == 3 * layout.stride + END
        assert layout.support.bytes == n_way * k_shot * side * side * channels
        assert layout.query.bytes == n_way * k_query * side * side * channels
        assert layout.source.bytes == n_way * (1 + k_shot + k_query) * 4

    @given(episodes=st.integers(1, 5000), per_shard=st.integers(1, 6000))
    @FAST
    def test_shards_cover_the_episodes_once(self, episodes, per_shard):
        """No gap, no overlap, and only the last shard is smaller."""
        sizes = list(shard_sizes(episodes, per_shard))
        assert [first for first, _ in sizes] == list(range(0, episodes, per_shard))
        assert sum(count for _, count in sizes) == episodes
        assert all(count == per_shard for _, count in sizes[:-1])
        assert 1 <= sizes[-1][1] <= per_shard

    def test_a_member_too_large_for_a_tar(self):
        """A tar header has eleven octal digits for a length: more is refused, not written wrongly."""
        assert EpisodeLayout(2, 1, 1, (60_000, 60_000, 1)).query.bytes == 2 * 60_000**2
        with pytest.raises(RequestError, match=r"query file would be [89],[0-9,]+ bytes; tar allows less than 8 GiB"):
            EpisodeLayout(2, 1, 2, (47_377, 47_375, 1))

    def test_a_view_is_no_copy_and_ignores_the_closing_blocks(self):
        """Views look at the block's own memory, with or without the two empty blocks behind it."""
        layout = EpisodeLayout(2, 1, 1, (3, 3, 1))
        block = np.zeros(layout.shard_bytes(4), dtype=np.uint8)
        for member in layout.members:
            view = layout.view(block, member)
            assert view.shape == (4, *member.shape)
            assert np.shares_memory(view, block)
        layout.view(block, layout.query)[3] = 9
        start = 3 * layout.stride + layout.query.data
        assert np.flatnonzero(block).tolist() == list(range(start, start + layout.query.bytes))


class TestArchiveJson:
    def test_its_sha256_is_the_digest_and_stands_beside_it(self, folder, archive):
        """The cited digest is the plain SHA-256 of the file, and sha256sum's line says so."""
        data = (folder / INDEX).read_bytes()
        assert archive.digest == hashlib.sha256(data).hexdigest()
        assert (folder / INDEX_SUM).read_text() == f"{archive.digest}  archive.json\n"

    def test_it_holds_no_times_paths_or_versions_of_tools(self, folder):
        """Its keys are what the format lists, and nothing else."""
        document = json.loads((folder / INDEX).read_bytes())
        assert set(document) == {
            *("format", "dataset", "dataset_version", "bank_sha256", "split_scheme", "rotations", "seed"),
            *("n_way", "k_shot", "k_query", "image_shape", "normalisation", "splits"),
        }
        for split in document["splits"].values():
            assert set(split) == {"classes", "episodes", "shards"}
            assert set(split["shards"][0]) == {"file", "first_episode", "episodes", "bytes", "sha256"}
            assert set(split["classes"][0]) == {"name", "quarter_turns", "first_row", "images"}

    def test_reading_and_writing_again_gives_the_same_bytes(self, folder):
        """parse_archive and to_json are each other's inverse."""
        data = (folder / INDEX).read_bytes()
        assert parse_archive(data).to_json() == data

    @pytest.mark.slow
    @pytest.mark.parametrize("flip", [0x01, 0x80])
    def test_any_flipped_byte_is_found(self, own, flip):
        """Whatever byte of archive.json is flipped, reading it is refused and the file named."""
        path = own / INDEX
        good = path.read_bytes()
        # Everything but the long class tables byte by byte, and the tables in steps.
        positions = [*range(300), *range(300, len(good) - 500, 997), *range(len(good) - 500, len(good))]
        for position in positions:
            bad = bytearray(good)
            bad[position] ^= flip
            path.write_bytes(bad)
            with pytest.raises(DamagedError, match=r"archive\.json"):
                read_archive(own)
        path.write_bytes(good)
        read_archive(own)

    def test_a_truncated_file_is_found(self, own):
        """archive.json cut off anywhere is refused."""
        path = own / INDEX
        good = path.read_bytes()
        for length in [*range(40), *range(40, len(good), 211), len(good) - 1]:
            path.write_bytes(good[:length])
            with pytest.raises(DamagedError, match=r"archive\.json: "):
                read_archive(own)

    def test_any_flipped_byte_of_its_sum_is_found(self, own):
        """archive.json.sha256 with one flipped byte is refused, naming both files."""
        path = own / INDEX_SUM
        good = path.read_bytes()
        for position in range(len(good)):
            bad = bytearray(good)
            bad[position] ^= 1
            path.write_bytes(bad)
            with pytest.raises(DamagedError, match=r"archive\.json is damaged: .* not what archive\.json\.sha256 says"):
                read_archive(own)

    def test_another_version_is_named(self, own):
        """An archive of a later format is refused with both versions named."""
        document = json.loads((own / INDEX).read_bytes())
        document["format"] = "mamldata/2"
        (own / INDEX).write_bytes(canonical_json(document))
        with pytest.raises(DamagedError, match=r"archive\.json: its format is 'mamldata/2'; .* reads 'mamldata/1'"):
            read_archive(own)

    @pytest.mark.parametrize(
        "spelling",
        [
            {"indent": 1, "sort_keys": True},
            {"separators": (", ", ": "), "sort_keys": True},
            {"separators": (",", ":"), "sort_keys": False},
        ],
        ids=["indented", "spaced", "unsorted"],
    )
    def test_only_canonical_json_is_accepted(self, folder, spelling):
        """The same content in another spelling has another digest, so it is refused."""
        document = json.loads((folder / INDEX).read_bytes())
        if not spelling["sort_keys"]:
            document = dict(reversed(document.items()))
        with pytest.raises(DamagedError, match="it has changed since the archive was built"):
            parse_archive(json.dumps(document, **spelling).encode() + b"\n")

    @pytest.mark.parametrize("tail", [b"", b"\n\n", b"\n "])
    def test_only_one_final_newline_is_accepted(self, folder, tail):
        """Bytes added or missing at the end are refused."""
        data = (folder / INDEX).read_bytes().rstrip(b"\n")
        with pytest.raises(DamagedError, match="it has changed"):
            parse_archive(data + tail)


class TestNotAnArchive:
    def test_a_folder_of_something_else(self, tmp_path):
        """A folder without archive.json is refused with the command that makes one."""
        with pytest.raises(RequestError, match=r"is not an archive: it has no archive\.json.*mamldata build"):
            read_archive(tmp_path)

    def test_a_folder_that_is_not_there(self, tmp_path):
        """A missing folder is refused, named."""
        with pytest.raises(RequestError, match="nothing-here is not an archive"):
            read_archive(tmp_path / "nothing-here")

    def test_an_unfinished_build(self, tmp_path):
        """An unfinished build is called that, and the remedy is named."""
        (tmp_path / ".build").mkdir()
        (tmp_path / ".build" / "plan.json").touch()
        with pytest.raises(RequestError, match=r"is an unfinished build. Run the same mamldata build again"):
            read_archive(tmp_path)

    def test_a_split_without_episodes(self, archive):
        """Asking for a split that is not there names those that are."""
        shorter = dataclasses.replace(archive, splits={"train": archive.splits["train"]})
        with pytest.raises(RequestError, match=r"no episodes of split 'val'; it has train\. Build one that has val"):
            shorter.split("val")

    def test_a_misspelt_split(self, archive):
        """It is called that, with the likely one, and no advice to build an archive with it."""
        with pytest.raises(
            RequestError, match=r"no split 'tets'; the splits are train, val, test. Did you mean 'test'?"
        ):
            archive.split("tets")


def consistent(document: dict) -> bytes:
    """The JSON of a document whose shards were made to fit its numbers, as a forger would."""
    layout = EpisodeLayout(document["n_way"], document["k_shot"], document["k_query"], document["image_shape"])
    for split in document["splits"].values():
        for shard in split["shards"]:
            shard["bytes"] = layout.shard_bytes(shard["episodes"])
    return canonical_json(document)


@pytest.fixture(scope="module")
def document(folder) -> dict:
    """The content of a sound archive.json with short class tables. Copy it before changing it."""
    document = json.loads((folder / INDEX).read_bytes())
    for split in document["splits"].values():
        split["classes"] = split["classes"][:8]  # short, so that mutations hit the rest as well
    parse_archive(canonical_json(document))
    return document


class TestCrafted:
    @pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"7", b'"format"', b"\xff\xfe", b"{" * 9, b"NaN"])
    def test_other_json_and_no_json(self, data):
        """What is no description at all is called that."""
        with pytest.raises(DamagedError, match="not the description of an archive"):
            parse_archive(data)

    def test_a_bomb_of_small_values(self):
        """Millions of empty lists are counted, and none of them is made."""
        data = b"[" + b"[]," * (5 << 20) + b"[]]"
        tracemalloc.start()
        try:
            with pytest.raises(DamagedError, match=r"not the description of an archive \(more than 8,388,608 values"):
                parse_archive(data)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()

    def test_a_million_classes_have_fewer_values(self, document):
        """What is refused as a bomb is more than 10**6 classes with a comma or two in their names."""
        split = document["splits"]["train"]
        classes = [{**split["classes"][0], "name": f"tench, Tinca tinca {number}"} for number in range(1000)]
        data = canonical_json({**split, "classes": classes})
        assert 1000 * sum(map(data.count, (b",", b"[", b"{"))) < archive_module._MOST_VALUES

    def test_a_file_that_is_longer_than_any_index(self, own):
        """Its length is looked at before it is read."""
        with (own / INDEX).open("rb+") as stream:
            stream.truncate((1 << 28) + 1)
        with pytest.raises(
            DamagedError, match=r"archive\.json cannot be read \(268,435,457 bytes, more than the limit of 268,435,456"
        ):
            read_archive(own)

    @pytest.mark.parametrize("place", ["format", "key"])
    def test_no_message_is_as_long_as_the_file(self, document, place):
        """What a description says of itself is shown as a few plain characters."""
        words, document = "\x1b[2J" + "x" * 100_000, json.loads(canonical_json(document))
        if place == "format":
            document["format"] = words
        else:
            document["splits"]["train"]["shards"][0][words] = 1
        with pytest.raises(DamagedError, match=r"its format is|damaged") as caught:
            parse_archive(canonical_json(document))
        assert len(str(caught.value)) < 400
        assert str(caught.value).isprintable()

    def test_deeply_nested_json(self):
        """Nesting that exhausts the parser is one more kind of damage."""
        with pytest.raises(DamagedError, match="not the description of an archive"):
            parse_archive(b"[" * 200_000)

    @pytest.mark.parametrize("key", ["seed", "format"])
    def test_nesting_that_the_parser_allows(self, document, key):
        """What can be parsed, but not written again, is damage, too; at which depth depends on the caller's own."""
        text = canonical_json({**document, key: "HERE"})
        for depth in range(700, 1000):
            data = text.replace(b'"HERE"', b"[" * depth + b"]" * depth)
            with pytest.raises(DamagedError, match=r"its format is|damaged|not the description"):
                parse_archive(data)

    @pytest.mark.parametrize(
        "name",
        ["../train-00000.tar", "/etc/passwd", "sub/train-00000.tar", "pipe:cat /etc/passwd", "train-00001.tar", ""],
    )
    def test_shard_names_that_point_elsewhere(self, document, name):
        """A shard has the name that its place gives it, and no other."""
        document = copy.deepcopy(document)
        document["splits"]["train"]["shards"][0]["file"] = name
        with pytest.raises(DamagedError, match="damaged"):
            parse_archive(canonical_json(document))

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("n_way", -3),
            ("n_way", 1),
            ("n_way", 3.0),
            ("n_way", True),
            ("k_shot", 0),
            ("k_shot", -2),
            ("k_query", 0),
            pytest.param("k_query", 10**400, id="k_query-huge"),
            ("seed", -1),
            ("seed", "5"),
            ("seed", None),
            ("seed", 5.0),
            ("image_shape", [0, 28, 1]),
            ("image_shape", [-28, -28, 1]),
            ("image_shape", [28.0, 28, 1]),
            ("image_shape", [10**9, 10**9, 10**9]),
            ("dataset", None),
            ("dataset", 7),
            ("dataset_version", 1),
            ("bank_sha256", "00"),
            ("bank_sha256", None),
            ("split_scheme", ["seeded"]),
            ("rotations", "some"),
            ("splits", {}),
        ],
    )
    def test_settings_that_no_build_writes(self, document, key, value):
        """A setting of a wrong type or out of its range is refused, even if all else was made to fit it."""
        document = copy.deepcopy(document)
        document[key] = value
        try:
            data = consistent(document)
        except (TypeError, ValueError, OverflowError, RequestError):
            data = canonical_json(document)
        with pytest.raises(DamagedError, match="damaged"):
            parse_archive(data)

    def test_two_wrongs_that_make_a_right(self, document):
        """Negative numbers whose products are positive are refused all the same."""
        document = {**copy.deepcopy(document), "n_way": -3, "k_shot": -2, "k_query": -3}
        with pytest.raises(DamagedError, match="damaged"):
            parse_archive(consistent(document))

    @pytest.mark.parametrize(
        ("key", "value"),
        [("name", None), ("name", 3), ("quarter_turns", 4), ("quarter_turns", -1), ("first_row", -1), ("images", 0)],
    )
    def test_classes_that_no_build_writes(self, document, key, value):
        """A class table entry of a wrong type or out of its range is refused."""
        document = copy.deepcopy(document)
        document["splits"]["val"]["classes"][2][key] = value
        with pytest.raises(DamagedError, match="damaged"):
            parse_archive(canonical_json(document))

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("episodes", 0),
            ("episodes", -4),
            ("episodes", 4.0),
            ("episodes", 2**63),
            ("first_episode", 1),
            ("first_episode", False),
            ("bytes", 1.5),
            ("sha256", "0" * 63),
            ("sha256", "0" * 64 + "\n"),
            ("sha256", None),
            ("extra", 1),
        ],
    )
    def test_shards_that_no_build_writes(self, document, key, value):
        """A shard's entry of a wrong type or out of its range is refused."""
        document = copy.deepcopy(document)
        document["splits"]["train"]["shards"][0][key] = value
        with pytest.raises(DamagedError, match="damaged"):
            parse_archive(canonical_json(document))

    def test_a_split_of_no_episodes(self, document):
        """Build leaves such a split out, so one that is there was not built."""
        document = copy.deepcopy(document)
        document["splits"]["val"].update(episodes=0, shards=[])
        with pytest.raises(DamagedError, match="damaged"):
            parse_archive(canonical_json(document))

    @given(data=st.data())
    @settings(max_examples=400, deadline=None)
    def test_any_mutation_is_refused_or_harmless(self, document, data):
        """Keys removed, values replaced by anything JSON can say: a clear error, or an archive that makes sense."""
        mutated = copy.deepcopy(document)
        for _ in range(data.draw(st.integers(1, 3))):
            _mutate(mutated, data)
        # Python's own reader takes NaN, Infinity and huge numbers, and so must what comes after it.
        text = json.dumps(mutated, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"
        try:
            archive = parse_archive(text)
        except DamagedError:
            return
        assert archive.to_json() == text
        for name in archive.splits:
            archive.spec(name)
            assert archive.layout.stride > 0


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-3, 60),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-5, 5), max_size=4),
    st.dictionaries(st.sampled_from(["name", "file", "episodes", "train"]), st.integers(-5, 5), max_size=2),
    st.sampled_from(["pipe:ls", "../x", "\ud800", "all", 1 << 63, 10**40, -0.0, 1e308]),
)


def _mutate(node: object, data: st.DataObject) -> None:
    """Change one thing somewhere below ``node``."""
    while True:
        keys = sorted(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        child = node[key]
        if isinstance(child, dict | list) and child and data.draw(st.integers(0, 4)):
            node = child
            continue
        if data.draw(st.booleans()) and data.draw(st.booleans()):
            del node[key]
        else:
            node[key] = data.draw(JUNK)
        return


class TestOpenShard:
    def test_the_sum_line_is_that_of_sha256sum(self):
        """The line of archive.json.sha256 is what sha256sum -c reads."""
        assert index_sum("ab") == b"ab  archive.json\n"

    def test_a_shard_of_another_length(self, folder, archive, tmp_path):
        """A shard that is too short or too long is refused with both lengths and its episodes."""
        shard = archive.split("train").shards[1]
        data = (folder / shard.file).read_bytes()
        for other in (data[:-1], data + b"\0", b""):
            (tmp_path / shard.file).write_bytes(other)
            text = rf"{shard.file} \(episodes 4 to 6\) has {len(other):,} bytes, expected {len(data):,}"
            with pytest.raises(DamagedError, match=text):
                open_shard(tmp_path / shard.file, shard, archive.layout)

    def test_a_missing_shard(self, archive, tmp_path):
        """A shard that is not there is named with its episodes."""
        shard = archive.split("train").shards[0]
        with pytest.raises(DamagedError, match=rf"{shard.file} is missing \(episodes 0 to 3\)"):
            open_shard(tmp_path / shard.file, shard, archive.layout)

    def test_the_shard_of_other_episodes(self, folder, archive, tmp_path):
        """A shard in another's place is noticed by its first header."""
        first, last = archive.split("train").shards[0], archive.split("test").shards[0]
        short = archive.split("train").shards[1]
        assert short.bytes == last.bytes
        shutil.copyfile(folder / last.file, tmp_path / short.file)
        with pytest.raises(DamagedError, match=f"{short.file} is damaged: episode 4 does not start as it should"):
            open_shard(tmp_path / short.file, short, archive.layout)
        assert first.episodes == 4

    def test_the_shard_of_another_split(self, folder, archive, tmp_path):
        """A shard of the same length and headers is noticed by the episodes in it, be it the last one alone."""
        shard, other = (archive.split(split).shards[0] for split in ("train", "test"))
        shard = replace(shard, episodes=other.episodes, bytes=other.bytes)
        sampler = EpisodeSampler(archive.spec("train"), archive.split("train").classes)
        stride = archive.layout.stride
        right = (folder / shard.file).read_bytes()[: shard.episodes * stride]
        wrong = (folder / other.file).read_bytes()[: shard.episodes * stride]
        for data, episode in ((wrong, 0), (right[:-stride] + wrong[-stride:], 2)):
            (tmp_path / shard.file).write_bytes(data + bytes(END))
            open_shard(tmp_path / shard.file, shard, archive.layout)
            text = rf"{shard.file} holds other episodes than archive\.json says: its episode {episode}"
            with pytest.raises(DamagedError, match=text):
                open_shard(tmp_path / shard.file, shard, archive.layout, sampler=sampler)

    def test_a_class_of_more_images_than_memory(self, folder, archive):
        """However many images archive.json claims for a class, its episodes are compared, in little memory."""
        split = archive.split("train")
        table = replace(split.classes, images=np.full(len(split.classes), 2**31 - 1))
        sampler = EpisodeSampler(archive.spec("train"), table)
        with pytest.raises(DamagedError, match=r"holds other episodes than archive\.json says: its episode 0"):
            open_shard(folder / split.shards[0].file, split.shards[0], archive.layout, sampler=sampler)

    def test_a_file_is_checked_once(self, folder, archive, tmp_path):
        """A version of a file that has passed is mapped without checks; a change is noticed, even under an old date."""
        shard = archive.split("train").shards[0]
        path = tmp_path / shard.file
        shutil.copyfile(folder / shard.file, path)
        before, checked = path.stat(), {}
        open_shard(path, shard, archive.layout, checked=checked)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mamldata.archive.shard._first_broken_episode", lambda *_: pytest.fail("checked again"))
            assert open_shard(path, shard, archive.layout, checked=checked).tobytes() == path.read_bytes()
        time.sleep(0.02)  # the file system's clock is coarse
        with path.open("r+b") as stream:
            stream.write(b"X")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(DamagedError, match="episode 0 does not start as it should"):
            open_shard(path, shard, archive.layout, checked=checked)

    def test_the_map_is_read_only(self, folder, archive):
        """Nobody can write into an archive through what open_shard gives."""
        shard = archive.split("val").shards[0]
        mapped = open_shard(folder / shard.file, shard, archive.layout)
        with pytest.raises(ValueError, match="read-only"):
            mapped[0] = 0
