"""Verify: whatever byte is flipped, wherever anything is missing or forged, it is found and named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamldata.archive.build import build
from mamldata.archive.index import INDEX, INDEX_SUM, index_sum, read_archive
from mamldata.archive.layout import BLOCK, END
from mamldata.archive.plan import BuildRequest
from mamldata.archive.verify import verify_archive
from mamldata.bank.verify import verify_dataset
from mamldata.errors import DataMissingError, RequestError
from mamldata.io.digest import canonical_json, sha256_bytes, sha256_file

REQUEST = BuildRequest(
    n_way=3, k_shot=1, k_query=2, episodes={"train": 5, "val": 2}, seed=3, episodes_per_shard=3, rotations="all"
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, glyphs_manifest, glyphs_bank) -> Path:
    """A sound archive; not to be written to."""
    out = tmp_path_factory.mktemp("verify") / "archive"
    build(glyphs_manifest, glyphs_bank, out, REQUEST)
    return out


@pytest.fixture
def own(reference, tmp_path) -> Path:
    """A copy of the archive, to be damaged."""
    return Path(shutil.copytree(reference, tmp_path / "own"))


def flip(path: Path, position: int, bits: int = 1) -> None:
    """Flip bits of one byte in place."""
    with path.open("rb+") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ bits]))


def rewrite(folder: Path, change) -> None:
    """Change archive.json as a forger would: canonical, and with a sum that fits."""
    document = json.loads((folder / INDEX).read_bytes())
    change(document)
    data = canonical_json(document)
    (folder / INDEX).write_bytes(data)
    (folder / INDEX_SUM).write_bytes(index_sum(sha256_bytes(data)))


def the_problem(folder: Path, **options: str) -> str:
    """The one problem of an archive."""
    problems = verify_archive(folder, **options)
    assert len(problems) == 1, problems
    return problems[0]


class TestFlippedBytes:
    def test_a_sound_archive_has_no_problem(self, reference):
        """Nothing is found where nothing is wrong, with or without the cited digest."""
        digest = read_archive(reference).digest
        assert verify_archive(reference) == []
        for cited in (digest, f"sha256:{digest}", digest.upper()):
            assert verify_archive(reference, digest=cited) == []

    @pytest.mark.slow
    @given(data=st.data())
    @settings(max_examples=150)
    def test_any_byte_of_a_shard(self, reference, data):
        """One flipped bit anywhere in any shard is found, and the shard named."""
        folder = reference.parent / "flipped"
        if not folder.is_dir():
            shutil.copytree(reference, folder)
        path = data.draw(st.sampled_from(sorted(folder.glob("*.tar"))))
        position = data.draw(st.integers(0, path.stat().st_size - 1))
        bit = 1 << data.draw(st.integers(0, 7))
        flip(path, position, bit)
        try:
            assert f"The shard {path} " in the_problem(folder)
        finally:
            flip(path, position, bit)

    def test_every_region_of_an_episode(self, own):
        """Tar header, npy header, data and padding of each member, and the closing blocks: all are found."""
        archive = read_archive(own)
        shard = archive.split("train").shards[0]
        path = own / shard.file
        layout = archive.layout
        episode = 1
        start = episode * layout.stride
        ends = [member.header for member in layout.members[1:]] + [layout.stride]
        for member, end in zip(layout.members, ends, strict=True):
            padding = range(member.data + member.bytes, end)
            assert len(padding) > 0
            for region, broken in [
                (range(member.header, member.header + BLOCK), True),
                (range(member.header + BLOCK, member.data), True),
                (range(member.data, member.data + member.bytes), False),
                (padding, False),
            ]:
                for position in (region[0], region[len(region) // 2], region[-1]):
                    flip(path, start + position)
                    expected = "episode 1 does not start as it should" if broken else "is damaged: sha256 "
                    problem = the_problem(own)
                    assert expected in problem
                    assert str(path) in problem
                    flip(path, start + position)
        for position in range(shard.bytes - END, shard.bytes, 101):
            flip(path, position)
            assert f"{path} is damaged: episode 2 " in the_problem(own)
            flip(path, position)
        assert verify_archive(own) == []

    def test_bytes_of_archive_json(self, own):
        """A flipped byte of archive.json is found, and the file named."""
        path = own / INDEX
        for position in [*range(0, path.stat().st_size, 499), path.stat().st_size - 1]:
            flip(path, position)
            assert the_problem(own).startswith(str(path))
            flip(path, position)

    def test_every_byte_of_its_sum(self, own):
        """A flipped byte of archive.json.sha256 is found, and the file named."""
        path = own / INDEX_SUM
        for position in range(path.stat().st_size):
            flip(path, position)
            assert INDEX_SUM in the_problem(own)
            flip(path, position)

    def test_all_problems_are_told(self, own):
        """Two damaged shards and a stranger are three problems."""
        flip(own / "train-00001.tar", 700)
        flip(own / "val-00000.tar", 5000)
        (own / "extra.tar").write_bytes(b"")
        problems = verify_archive(own)
        assert [name for line in problems for name in ("train-00001", "val-00000", "extra") if name in line] == [
            *("train-00001", "val-00000", "extra")
        ]


class TestMissing:
    def test_truncated_at_every_block(self, own):
        """A shard cut off at any block of 512 bytes, or in its midst, is found, with both lengths."""
        path = own / "val-00000.tar"
        data = path.read_bytes()
        for length in sorted({*range(0, len(data), BLOCK), *range(100, len(data), 1700), len(data) - 1}):
            path.write_bytes(data[:length])
            problem = the_problem(own)
            assert f"{path} (episodes 0 to 1) has {length:,} bytes, expected {len(data):,}" in problem

    def test_a_missing_shard(self, own):
        """A shard that is gone is named with its episodes."""
        (own / "train-00001.tar").unlink()
        assert "train-00001.tar is missing (episodes 3 to 4)" in the_problem(own)

    def test_a_shard_that_cannot_be_looked_at(self, own):
        """A link in a circle is a damaged shard, not a crash."""
        (own / "train-00001.tar").unlink()
        (own / "train-00001.tar").symlink_to("train-00001.tar")
        assert "train-00001.tar (episodes 3 to 4) cannot be read (Too many levels of symbolic links)" in the_problem(
            own
        )

    def test_a_missing_sum(self, own):
        """Without archive.json.sha256 the digest is told, with the command that mends it."""
        (own / INDEX_SUM).unlink()
        problem = the_problem(own)
        assert f"{own / INDEX_SUM} is missing" in problem
        assert read_archive(own).digest in problem
        if shutil.which("sha256sum") is None:
            pytest.skip("there is no sha256sum program here")
        command = problem.split("write it with: ")[1]
        assert os.system(command) == 0
        assert verify_archive(own) == []

    def test_no_archive(self, tmp_path):
        """A folder that is no archive is an error, not a problem of one."""
        with pytest.raises(RequestError, match="is not an archive"):
            verify_archive(tmp_path)


class TestForged:
    def test_another_archive_than_the_one_cited(self, own):
        """A sound archive of another digest is not the one that was cited."""
        digest = read_archive(own).digest
        problem = the_problem(own, digest="sha256:" + "0" * 64)
        assert f"{own} is another archive: its digest is {digest}, expected sha256:000" in problem

    def test_a_digest_that_is_cited_in_short(self, own):
        """The first twelve digits will do, as previews show them; fewer, or what is no digest, says nothing."""
        digest = read_archive(own).digest
        for asked in (digest, digest[:12], f"SHA256:{digest[:20]}".lower(), digest.upper()):
            assert not verify_archive(own, digest=asked)
        for asked in (digest[:11], "", "nonsense", digest + "0"):
            with pytest.raises(RequestError, match=r"is not a digest. Give its 64 hexadecimal digits"):
                verify_archive(own, digest=asked)

    def test_a_stranger_among_the_shards(self, own):
        """A tar that does not belong is named: plain readers would take it."""
        (own / "train-00002.tar").write_bytes((own / "train-00001.tar").read_bytes())
        assert the_problem(own) == f"{own / 'train-00002.tar'} does not belong to the archive. Move it elsewhere."

    @pytest.mark.parametrize(
        ("field", "value"),
        [("seed", 4), ("split_scheme", "other"), ("bank_sha256", "0" * 64)],
    )
    def test_settings_altered_with_their_sum(self, own, field, value):
        """archive.json with another setting and a sum that fits is found: its episodes are drawn again."""
        rewrite(own, lambda document: document.update({field: value}))
        problems = verify_archive(own)
        assert len(problems) == 3
        assert "train-00000.tar is whole, but its episode 0 is not the one that the settings" in problems[0]

    def test_a_class_table_altered_with_its_sum(self, own):
        """Classes that are fewer, or have other images, draw other episodes."""

        def shorten(document):
            del document["splits"]["train"]["classes"][-4:]

        rewrite(own, shorten)
        problems = verify_archive(own)
        assert any("train-00000.tar is whole, but its episode" in problem for problem in problems)

    def test_a_class_table_too_small_for_its_episodes(self, own):
        """Settings that no episode could have are told as an altered archive.json, and the other splits go on."""

        def shrink(document):
            for entry in document["splits"]["train"]["classes"]:
                entry["images"] = 2

        rewrite(own, shrink)
        flip(own / "val-00000.tar", 700)
        problems = verify_archive(own)
        assert len(problems) == 2
        assert f"{own / INDEX} was altered: split 'train'" in problems[0]
        assert "val-00000.tar (episodes 0 to 1) is damaged" in problems[1]

    def test_a_source_altered_with_every_digest(self, own):
        """An episode whose source was altered, and all digests made to fit, is found by drawing it again."""
        archive = read_archive(own)
        path = own / "train-00001.tar"
        flip(path, 1 * archive.layout.stride + archive.layout.source.data + 4)

        def fit(document):
            document["splits"]["train"]["shards"][1]["sha256"] = sha256_file(path)

        rewrite(own, fit)
        assert "train-00001.tar is whole, but its episode 4 is not the one" in the_problem(own)

    def test_progress_counts_every_byte_once(self, reference):
        """Progress is told of as many bytes as it was promised."""
        seen = []

        class Bar:
            def __init__(self, label, total, unit):
                assert (label, unit) == ("verify", "B")
                self.total = total

            def __enter__(self):
                return seen.append

            def __exit__(self, *error):
                assert sum(seen) == self.total == sum(path.stat().st_size for path in reference.glob("*.tar"))

        verify_archive(reference, Bar)


class TestDataset:
    @pytest.fixture(scope="class")
    @classmethod
    def root(cls, glyphs_root, tmp_path_factory) -> Path:
        """A copy of the root, whose files are damaged and mended again."""
        root = tmp_path_factory.mktemp("root") / "copy"
        shutil.copytree(glyphs_root, root)
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        return root

    def test_a_sound_dataset_has_no_problem(self, glyphs_manifest, root):
        """Nothing is found where nothing is wrong."""
        assert verify_dataset(glyphs_manifest, root) == []

    @pytest.mark.parametrize("name", ["raw/glyphs.zip", "raw/glyphs.zip.sha256", "glyphs-28.npy", "glyphs-28.json"])
    @pytest.mark.parametrize("place", [0.0, 0.3, 0.77, 1.0])
    def test_a_flipped_byte(self, glyphs_manifest, root, name, place):
        """A flipped byte in a raw file, its receipt, the bank or its description is found, and the file named."""
        path = root / "glyphs" / name
        position = int(place * (path.stat().st_size - 1))
        flip(path, position)
        try:
            problems = verify_dataset(glyphs_manifest, root)
            assert problems
            assert any(str(path) in problem or path.name in problem for problem in problems)
        finally:
            flip(path, position)
        assert verify_dataset(glyphs_manifest, root) == []

    @pytest.mark.parametrize("name", ["raw/glyphs.zip", "raw/glyphs.zip.sha256", "glyphs-28.npy", "glyphs-28.json"])
    def test_a_missing_file(self, glyphs_manifest, root, name):
        """A file that is gone is named, or the one beside it that needs it."""
        path = root / "glyphs" / name
        aside = path.rename(root / "aside")
        try:
            problems = verify_dataset(glyphs_manifest, root)
            assert any(path.name in problem for problem in problems), problems
        finally:
            aside.rename(path)

    def test_all_banks_are_checked(self, glyphs_manifest, root):
        """Banks of other sizes are hashed too; a nameless array is told."""
        extra = root / "glyphs" / "glyphs-84.npy"
        extra.write_bytes(b"x")
        try:
            problems = verify_dataset(glyphs_manifest, root)
            assert problems == [f"{extra} has no description glyphs-84.json. Delete it: the next build makes it again."]
        finally:
            extra.unlink()

    def test_nothing_there(self, glyphs_manifest, tmp_path):
        """A dataset of which nothing is there is an error that names the command."""
        with pytest.raises(DataMissingError, match=r"There is nothing of glyphs in .* Run: mamldata fetch glyphs"):
            verify_dataset(glyphs_manifest, tmp_path)
