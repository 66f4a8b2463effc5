"""Raw files: which are right, and what their receipts say. ``check_raw`` over flipped bytes is in ``test_fetch``."""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mamldata.datasets.load import load_manifest
from mamldata.datasets.manifest import Manifest, SourceFile
from mamldata.datasets.paths import DatasetFolder
from mamldata.fetching.receipts import (
    Match,
    Receipt,
    is_verified,
    most_bytes,
    read_receipt,
    receipt_of,
    verify_file,
    write_receipt,
)
from mamldata.fetching.verify import check_raw
from mamldata.io.content_digest import content_sha256

MEMBERS = {"a/1.png": b"one" * 50, "a/2.png": b"two" * 50}


def tar_of(members: dict[str, bytes], *odd: tarfile.TarInfo) -> bytes:
    """A tar of these members, behind some odd ones."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for info in odd:
            tar.addfile(info)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    """A link as a member."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.fixture
def entry(tmp_path: Path) -> SourceFile:
    """A manifest's entry for a tar with a content digest."""
    genuine = tmp_path / "genuine.tar"
    genuine.write_bytes(tar_of(MEMBERS))
    digest, content = hashlib.sha256(genuine.read_bytes()).hexdigest(), content_sha256(genuine, 300)
    return SourceFile("file.tar", genuine.stat().st_size, digest, ("http://x.example/f",), content, 300)


def manifest_of(entry: SourceFile) -> Manifest:
    return replace(load_manifest("glyphs"), name="thing", reference="my thing.toml", files=(entry,))


@pytest.fixture
def offered(tmp_path: Path) -> Callable[[bytes], Path]:
    def offer(data: bytes) -> Path:
        path = tmp_path / "offered"
        path.write_bytes(data)
        return path

    return offer


class TestJudge:
    """Which files are right."""

    def test_by_its_own_digest(self, entry: SourceFile, offered: Callable[[bytes], Path]):
        """The very file is right without a look inside."""
        verdict = verify_file(offered(tar_of(MEMBERS)), replace(entry, content_bytes=1))
        assert (verdict.checked_by, verdict.sha256, verdict.problem) == ("sha256", entry.sha256, "")

    def test_by_its_content(self, entry: SourceFile, offered: Callable[[bytes], Path]):
        """Another order of members is another container of the same content."""
        data = tar_of(dict(reversed(MEMBERS.items())))
        verdict = verify_file(offered(data), entry)
        assert verdict.checked_by == "content_sha256"
        assert verdict.sha256 == hashlib.sha256(data).hexdigest() != entry.sha256

    @pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
    def test_a_link_in_place_of_a_member(self, kind: bytes, entry: SourceFile, offered: Callable[[bytes], Path]):
        """A link that leads out of the tar is no file: it cannot stand in for a member."""
        data = tar_of({"a/1.png": MEMBERS["a/1.png"]}, link("a/2.png", "/etc/passwd", kind))
        verdict = verify_file(offered(data), entry)
        assert verdict.checked_by is None
        assert f"content digest {verdict.content_sha256}, expected {entry.content_sha256}" in verdict.problem

    @pytest.mark.parametrize("name", ["/etc/cron.d/x", "../../x", "a\\..\\x"])
    def test_a_member_of_a_tar_that_points_outside(
        self, name: str, entry: SourceFile, offered: Callable[[bytes], Path]
    ):
        """Such a tar is refused, and the member named."""
        verdict = verify_file(offered(tar_of(MEMBERS | {name: b""})), entry)
        assert verdict.checked_by is None
        assert f"the member {name!r} points outside the container" in verdict.problem

    @pytest.mark.parametrize(
        "kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE]
    )
    def test_a_bomb_in_a_header(self, kind: bytes, entry: SourceFile, offered: Callable[[bytes], Path]):
        """A header that unpacks to any length is refused before tarfile takes it into memory."""
        header = tarfile.TarInfo("x")
        header.type, header.size = kind, 1 << 33
        verdict = verify_file(offered(gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20))), entry)
        assert verdict.checked_by is None
        refused = f"a tar header of type {kind!r} and 8,589,934,592 bytes"
        assert ("'x' is a sparse file" if kind == tarfile.GNUTYPE_SPARSE else refused) in verdict.problem

    def test_too_large_a_container_is_not_opened(self, entry: SourceFile, offered: Callable[[bytes], Path]):
        """Padding that a tar allows does not pass the bound on a repacked copy."""
        small = replace(entry, bytes=10, sha256="0" * 64)
        data = tar_of(MEMBERS).ljust(most_bytes(small) + 1, b"\0")
        verdict = verify_file(offered(data), small)
        assert verdict.checked_by is None
        assert "too large to be a repacked copy" in verdict.problem
        assert verify_file(offered(data[:-1]), small).checked_by == "content_sha256"

    def test_without_a_content_digest_only_the_file_itself_is_right(
        self, entry: SourceFile, offered: Callable[[bytes], Path]
    ):
        """The problem gives both digests and both lengths."""
        plain = replace(entry, content_sha256=None, content_bytes=None)
        verdict = verify_file(offered(b"x"), plain)
        expected = (
            f"sha256 {hashlib.sha256(b'x').hexdigest()} (1 bytes), expected {plain.sha256} ({plain.bytes:,} bytes)"
        )
        assert (verdict.checked_by, verdict.problem) == (None, expected)
        assert most_bytes(plain) == plain.bytes

    def test_every_hashed_byte_is_counted(self, entry: SourceFile, offered: Callable[[bytes], Path]):
        """``advance`` ends at the file's length."""
        counts: list[int] = []
        verify_file(offered(tar_of(MEMBERS)), entry, counts.append)
        assert sum(counts) == entry.bytes


class TestReceipts:
    """What is noted of a verified file."""

    @pytest.mark.parametrize("match", [None, Match("content_sha256", "1" * 64, 5)])
    def test_sha256sum_reads_them(self, match: Match | None, entry: SourceFile, tmp_path: Path):
        """They are what sha256sum writes; what else was right is a comment to it."""
        folder = DatasetFolder(tmp_path, "thing")
        folder.raw.mkdir(parents=True)
        (folder.raw / entry.name).write_bytes(tar_of(MEMBERS))
        write_receipt(folder, entry.name, Receipt(entry.sha256, match))
        told = subprocess.run(
            ["sha256sum", "--check", "--strict", f"{entry.name}.sha256"],
            cwd=folder.raw, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (told.returncode, told.stdout) == (0, f"{entry.name}: OK\n")
        assert read_receipt(folder, entry.name) == Receipt(entry.sha256, match)

    @pytest.mark.parametrize(
        "text",
        [b"", b"0", b"0" * 64, b"0" * 64 + b"  file.tar", b"0" * 64 + b" file.tar\n", b"0" * 64 + b"  file.zip\n",
         b"0" * 63 + b"G  file.tar\n", b"0" * 63 + b"\xff  file.tar\n", b"0" * 64 + b"  file.tar\n\n",
         b"0" * 64 + b"  file.tar\n# md5 00, 5 bytes", b"0" * 64 + b"  file.tar\n# md5 00, 05 bytes\n",
         b"0" * 64 + b"  file.tar\n# sha1 00, 5 bytes\n", b"0" * 64 + b"  file.tar\n# md5 00, 5 bytes\n\n"],
    )  # fmt: skip
    def test_others_are_none(self, text: bytes, tmp_path: Path):
        """What nobody wrote so, to the byte, is not believed."""
        folder = DatasetFolder(tmp_path, "thing")
        folder.raw.mkdir(parents=True)
        folder.receipt("file.tar").write_bytes(text)
        assert read_receipt(folder, "file.tar") is None

    def test_one_that_is_too_long(self, tmp_path: Path):
        """It is not read."""
        folder = DatasetFolder(tmp_path, "thing")
        folder.raw.mkdir(parents=True)
        with folder.receipt("file.tar").open("wb") as stream:
            stream.truncate((1 << 26) + 1)
        tracemalloc.start()
        try:
            assert read_receipt(folder, "file.tar") is None
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


class TestIsVerified:
    """Which files need not be looked at again; ``content``, ``md5``, and a length that is not published."""

    def sealed(self, root: Path, entry: SourceFile, data: bytes) -> DatasetFolder:
        """A file as fetch leaves it."""
        folder = DatasetFolder(root, "thing")
        folder.raw.mkdir(parents=True)
        path = folder.raw / entry.name
        path.write_bytes(data)
        write_receipt(folder, entry.name, receipt_of(verify_file(path, entry), entry, len(data)))
        return folder

    @pytest.fixture
    def md5_entry(self, entry: SourceFile) -> SourceFile:
        digest = hashlib.md5(tar_of(MEMBERS)).hexdigest()
        return replace(entry, sha256=None, content_sha256=None, content_bytes=None, md5=digest)

    def test_by_its_own_digest(self, entry: SourceFile, tmp_path: Path):
        """Of the manifest's sha256 and length: the receipt is what sha256sum writes, no more."""
        folder = self.sealed(tmp_path, entry, tar_of(MEMBERS))
        assert folder.receipt(entry.name).read_text() == f"{entry.sha256}  {entry.name}\n"
        assert is_verified(folder, entry)
        assert not is_verified(folder, replace(entry, sha256="0" * 64))

    def test_by_its_content(self, entry: SourceFile, tmp_path: Path):
        """A repacked copy is right only while the manifest wants that content."""
        folder = self.sealed(tmp_path, entry, tar_of(dict(reversed(MEMBERS.items()))))
        assert is_verified(folder, entry)
        assert is_verified(folder, replace(entry, sha256="0" * 64, bytes=1)), "no digest of the copy"
        assert not is_verified(folder, replace(entry, content_sha256="0" * 64))
        assert not is_verified(folder, replace(entry, content_sha256=None))

    def test_by_its_md5(self, md5_entry: SourceFile, tmp_path: Path):
        """The same for an MD5."""
        folder = self.sealed(tmp_path, md5_entry, tar_of(MEMBERS))
        assert is_verified(folder, md5_entry)
        assert not is_verified(folder, replace(md5_entry, md5="0" * 32))

    @pytest.mark.parametrize("kind", ["sha256", "content", "md5", "no length", "wrong length"])
    def test_a_file_that_lost_its_end(self, kind: str, entry: SourceFile, md5_entry: SourceFile, tmp_path: Path):
        """It is noticed by its length, whatever made it right, and also where the manifest gives none or another."""
        entry = {"md5": md5_entry, "no length": replace(entry, bytes=0), "wrong length": replace(entry, bytes=7)}.get(
            kind, entry
        )
        data = tar_of(dict(reversed(MEMBERS.items())) if kind == "content" else MEMBERS)
        folder = self.sealed(tmp_path, entry, data)
        assert is_verified(folder, entry)
        (folder.raw / entry.name).write_bytes(data[:-1])
        assert not is_verified(folder, entry)
        (folder.raw / entry.name).unlink()
        assert not is_verified(folder, entry)

    def test_an_older_receipt(self, entry: SourceFile, tmp_path: Path):
        """One that does not say why a repacked copy was right is read, and the file looked at again."""
        data = tar_of(dict(reversed(MEMBERS.items())))
        folder = self.sealed(tmp_path, entry, data)
        write_receipt(folder, entry.name, Receipt(hashlib.sha256(data).hexdigest()))
        assert not is_verified(folder, entry)
        (problem,) = check_raw(manifest_of(entry), tmp_path)
        assert "file.tar.sha256 was altered, or is for another manifest; file.tar beside it is correct" in problem
        assert "Run: mamldata fetch 'my thing.toml'" in problem


class TestCheck:
    """What ``check_raw`` says; a line for each bad file, with what to do."""

    def put(self, root: Path, entry: SourceFile, data: bytes, receipt: str) -> None:
        folder = DatasetFolder(root, "thing")
        folder.raw.mkdir(parents=True)
        (folder.raw / entry.name).write_bytes(data)
        write_receipt(folder, entry.name, Receipt(receipt))

    def test_a_receipt_of_another_file(self, entry: SourceFile, tmp_path: Path):
        """Genuine content with a receipt of another container: one of the two was altered, and both are shown."""
        root = tmp_path / "a root"
        data = tar_of(dict(reversed(MEMBERS.items())))
        self.put(root, entry, data, "0" * 64)
        (problem,) = check_raw(manifest_of(entry), root)
        assert (
            f"has sha256 {hashlib.sha256(data).hexdigest()}, but its receipt file.tar.sha256 says {'0' * 64}" in problem
        )
        assert f"run: mamldata fetch 'my thing.toml' --root '{root}'" in problem

    def test_a_receipt_that_agrees_with_a_wrong_file(self, entry: SourceFile, tmp_path: Path):
        """Whoever alters both is found by the manifest."""
        self.put(tmp_path, entry, b"other", hashlib.sha256(b"other").hexdigest())
        (problem,) = check_raw(manifest_of(entry), tmp_path)
        assert "file.tar is damaged: sha256 " in problem
        assert f"expected {entry.sha256}" in problem

    def test_a_damaged_receipt(self, entry: SourceFile, tmp_path: Path):
        """The file is right, its receipt is not: said so."""
        self.put(tmp_path, entry, tar_of(MEMBERS), entry.sha256)
        assert check_raw(manifest_of(entry), tmp_path) == []
        DatasetFolder(tmp_path, "thing").receipt(entry.name).write_bytes(b"")
        (problem,) = check_raw(manifest_of(entry), tmp_path)
        assert "file.tar.sha256 is damaged; file.tar beside it is correct" in problem

    def test_every_file_is_looked_at(self, entry: SourceFile, tmp_path: Path):
        """A problem of one file does not hide that of the next."""
        thing = replace(manifest_of(entry), files=(entry, replace(entry, name="other.tar")))
        problems = check_raw(thing, tmp_path)
        assert [problem.split(" is missing")[0] for problem in problems] == [
            str(tmp_path / "thing" / "raw" / name) for name in ("file.tar", "other.tar")
        ]
