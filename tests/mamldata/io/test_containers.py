"""Containers: the same members and bytes from a folder, a zip and every tar; damage is said, and crashes nothing."""

from __future__ import annotations

import contextlib
import io
import lzma
import os
import random
import shutil
import socket
import stat
import struct
import subprocess
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from mamldata.errors import DamagedError
from mamldata.io import containers
from mamldata.io.containers import Member, is_inside, list_members, read_members
from mamldata.io.content_digest import content_sha256

FILES = {f"images/{name}": bytes([number]) * (number * 300) for number, name in enumerate(["b.jpg", "a.jpg", "é.png"])}
KINDS = ("folder", "zip", "tar", "tar.gz", "tar.bz2", "tar.xz", "gnu", "v7")


def make(kind: str, place: Path, files: Mapping[str, bytes] = FILES) -> Path:
    """The files in a container of a kind."""
    path = place / f"box-{kind}"
    if kind == "folder":
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as container:
            for name, data in files.items():
                container.writestr(name, data)
    else:
        mode = {"tar.gz": "w:gz", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}.get(kind, "w")
        layout = tarfile.GNU_FORMAT if kind == "gnu" else tarfile.PAX_FORMAT
        with tarfile.open(path, mode, format=layout) as tar:
            tar.addfile(_folder("images"))
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        if kind == "v7":
            path.write_bytes(_without_marks(path.read_bytes()))
    return path


def _folder(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def _without_marks(data: bytes) -> bytes:
    """A tar as it was before POSIX: no ``ustar`` in the headers, whose checksums follow."""
    blocks = [data[start : start + 512] for start in range(0, len(data), 512)]
    for number, block in enumerate(blocks):
        if block[257:262] == b"ustar":
            plain = bytearray(block[:257] + bytes(255))
            plain[148:156] = b" " * 8
            plain[148:156] = f"{sum(plain):06o}\0 ".encode()
            blocks[number] = bytes(plain)
    return b"".join(blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same(kind: str, tmp_path: Path):
    """Names, lengths and bytes."""
    files = FILES if kind != "v7" else {name: data for name, data in FILES.items() if name.isascii()}
    path = make(kind, tmp_path, files)
    members = list_members(path)
    assert {member.name: member.size for member in members} == {name: len(data) for name, data in files.items()}
    got = {member.name: data for member, data in read_members(path, members, 1000)}
    assert got == files


@pytest.mark.parametrize("kind", KINDS)
def test_some_members(kind: str, tmp_path: Path):
    """Only what is asked for is read; what is too long, or gone, is said."""
    path = make(kind, tmp_path, {"1.png": b"one", "2.png": b"long" * 10, "3.png": b"three"})
    members = {member.name: member for member in list_members(path)}
    wanted = [members["3.png"], members["2.png"]]
    assert {member.name: data for member, data in read_members(path, wanted, 9)} == {
        "3.png": b"three",
        "2.png": "it has 40 bytes; the limit for an image is 9",
    }
    if kind != "tar" and kind != "gnu":  # whose bytes are read where they stood
        ((_, data),) = read_members(path, [Member("4.png", 1)], 9)
        assert isinstance(data, str)


def test_a_plain_tar_is_read_where_its_bytes_stand(tmp_path: Path):
    """Any process can read any image at once; a cut tar is noticed."""
    path = make("tar", tmp_path)
    members = list_members(path)
    whole = path.read_bytes()
    for member in members:
        assert member.offset is not None
        assert whole[member.offset : member.offset + member.size] == FILES[member.name]
    last = max(members, key=lambda member: member.offset or 0)
    path.write_bytes(whole[: (last.offset or 0) + 10])
    got = {member.name: data for member, data in read_members(path, members, 1000)}
    assert got.pop(last.name) == "it is cut off after 10 bytes"
    assert got == {name: data for name, data in FILES.items() if name != last.name}


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", "a\\x.png"])
def test_names_that_point_outside(kind: str, name: str, tmp_path: Path):
    """Such a container is not used at all."""
    with pytest.raises(DamagedError, match="points outside the container"):
        list_members(make(kind, tmp_path, {"good.png": b"x", name: b"x"}))


@pytest.mark.parametrize("read", [list_members, lambda path: content_sha256(path, 100)], ids=["list", "digest"])
def test_a_member_without_a_name(read: Callable[[Path], object], tmp_path: Path):
    """A zip whose directory has lost a name is damaged, however Python's zipfile sees it."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as box:
        box.writestr("a", b"x")
    data = path.read_bytes()
    at = data.index(b"PK\x01\x02") + 28
    path.write_bytes(data[:at] + struct.pack("<HHH", 0, 0, 1) + data[at + 6 :])  # what was the name is a comment
    with pytest.raises(DamagedError, match=r"x\.zip: a damaged container \(a member has no name\)"):
        read(path)


def linked(path: Path, entries: Sequence[tuple[str, bytes | str]], mode: str = "w") -> Path:
    """A container with these entries: a file's bytes, or a link's target; that of a hard link begins with ``=``."""
    if mode in {"stored", "deflated"}:
        method = zipfile.ZIP_STORED if mode == "stored" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(path, "w", method) as box:
            for name, content in entries:
                header = zipfile.ZipInfo(name)
                header.external_attr = (stat.S_IFLNK if isinstance(content, str) else stat.S_IFREG) << 16
                header.compress_type = method
                box.writestr(header, content)
        return path
    with tarfile.open(path, mode, format=tarfile.GNU_FORMAT) as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type = tarfile.LNKTYPE if content.startswith("=") else tarfile.SYMTYPE
                info.linkname = content.removeprefix("=")
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def everything(path: Path) -> list[tuple[str, bytes | str]]:
    """The name and content of each member, in the order of the names."""
    return sorted((member.name, data) for member, data in read_members(path, list_members(path), 1000))


TARS = ("w", "w:gz")
ALL = (*TARS, "stored", "deflated")


@pytest.mark.parametrize("mode", ALL)
def test_symbolic_links_are_followed(mode: str, tmp_path: Path):
    """From the folder that they lie in, before and after their target, and through other links."""
    entries = [("a/early.png", "../b/1.png"), ("b/1.png", b"one"), ("b/2.png", "./1.png"), ("c", "a/../b/2.png")]
    path = linked(tmp_path / "box", entries, mode)
    assert everything(path) == [("a/early.png", b"one"), ("b/1.png", b"one"), ("b/2.png", b"one"), ("c", b"one")]
    (only,) = [member for member in list_members(path) if member.name == "b/2.png"]
    assert list(read_members(path, [only], 1000)) == [(only, b"one")]
    assert list(read_members(path, [only], 2)) == [(only, "it has 3 bytes; the limit for an image is 2")]


@pytest.mark.parametrize("mode", TARS)
def test_hard_links_are_followed(mode: str, tmp_path: Path):
    """From the container's root; one to a symbolic link is one, too, in its own folder."""
    entries = [
        ("./a/1.png", b"one"),
        ("./b/1.png", "=./a/1.png"),
        ("./a/link.png", "1.png"),
        ("./c/1.png", b"other"),
        ("./c/hard.png", "=./a/link.png"),
    ]
    path = linked(tmp_path / "box", entries, mode)
    contents = [b"one", b"one", b"one", b"other", b"other"]
    names = ["./a/1.png", "./a/link.png", "./b/1.png", "./c/1.png", "./c/hard.png"]
    assert everything(path) == list(zip(names, contents, strict=True))


@pytest.mark.parametrize("mode", TARS)
def test_a_link_to_a_name_that_a_tar_has_twice(mode: str, tmp_path: Path):
    """As when unpacked: a hard link is the one before it, a symbolic link the last; equal lengths confuse nothing."""
    entries = [("1", b"old"), ("hard", "=1"), ("soft", "1"), ("1", b"new"), ("hard2", "=1"), ("1", "=1")]
    got = everything(linked(tmp_path / "box", entries, mode))
    assert got == [("1", b"new"), ("1", b"old"), ("hard", b"old"), ("hard2", b"new"), ("soft", b"new")]


@pytest.mark.parametrize("mode", ALL)
@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("/etc/passwd", "points outside the container"),
        ("../../1.png", "points outside the container"),
        ("..\\1.png", "points outside the container"),
        ("gone.png", "is not a file in the container"),
        ("..", "is not a file in the container"),
        ("x.png", "leads from link to link"),
        ("y.png", "leads from link to link"),
        ("9" * 5000, "is not a file in the container"),
    ],
)
def test_links_to_no_file(mode: str, target: str, why: str, tmp_path: Path):
    """Each is named when it is read, and nothing outside is; they do not make the container unfit."""
    path = linked(tmp_path / "box", [("1.png", b"one"), ("a/x.png", target), ("a/y.png", "x.png")], mode)
    (first, one), (x, problem), (y, _) = everything(path)
    assert ((first, one), x, y) == (("1.png", b"one"), "a/x.png", "a/y.png")
    assert problem == f"it is a link to {target[:4096]!r}, which {why}"


@pytest.mark.parametrize("mode", ALL)
def test_a_long_chain_of_links(mode: str, tmp_path: Path):
    """As in Linux, it ends after forty."""
    chain = [(f"{n:02}", f"{n + 1:02}") for n in range(41)]
    contents = dict(everything(linked(tmp_path / "box", [*chain, ("41", b"end")], mode)))
    assert contents["01"] == b"end"
    assert "from link to link" in str(contents["00"])


@pytest.mark.parametrize("mode", ALL)
def test_a_link_with_a_name_that_points_outside(mode: str, tmp_path: Path):
    """Such a container is not used at all."""
    with pytest.raises(DamagedError, match="points outside the container"):
        list_members(linked(tmp_path / "box", [("1.png", b"x"), ("../x.png", "1.png")], mode))


@pytest.mark.parametrize("mode", ALL)
def test_the_content_digest_counts_links_as_their_targets(mode: str, tmp_path: Path):
    """It does not matter how a file that has two names was packed; links to nothing count nothing."""
    entries = [("a", "b"), ("b", b"one"), ("c", b"one"), ("gone", "nowhere")]
    copies = linked(tmp_path / "copies", [(name, b"one") for name in "cab"], mode)
    assert content_sha256(linked(tmp_path / "links", entries, mode), 6) == content_sha256(copies, 9)


SPARSE = {
    "old GNU": {},
    "0.0": {"GNU.sparse.size": "9", "GNU.sparse.numblocks": "0"},
    "0.1": {"GNU.sparse.size": "9", "GNU.sparse.map": "4,1", "GNU.sparse.name": "x.bmp"},
    "1.0": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "x.bmp", "GNU.sparse.realsize": "9"},
    "2.0": {"GNU.sparse.major": "2", "GNU.sparse.minor": "0", "GNU.sparse.name": "x.bmp", "GNU.sparse.realsize": "9"},
    "star": {"SCHILY.realsize": "9"},
}


@pytest.mark.parametrize("mode", TARS)
@pytest.mark.parametrize("form", SPARSE)
def test_sparse_files_are_refused(form: str, mode: str, tmp_path: Path):
    """Their bytes are not those that stand in the tar; which file it is, and how to mend it, is said."""
    path = tmp_path / "box.tar"
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("x.bmp" if form in {"old GNU", "0.0", "star"} else "GNUSparseFile.0/x.bmp")
        info.type = tarfile.GNUTYPE_SPARSE if form == "old GNU" else tarfile.REGTYPE
        info.pax_headers = SPARSE[form]
        data = b"1000000000\n" + b"0\n" * 512  # a list of holes that does not end: who reads it finds a damaged tar
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    for look in (list_members, lambda path: content_sha256(path, 10_000)):
        with pytest.raises(DamagedError, match=r"box\.tar: 'x\.bmp' is a sparse file, .* again without --sparse"):
            look(path)


@pytest.mark.skipif(not shutil.which("tar"), reason="there is no tar")
@pytest.mark.parametrize("options", [[], ["-z"], ["--format=posix"]], ids=str)
def test_tars_by_tar(options: list[str], tmp_path: Path):
    """A folder in which files have several names, as the usual program packs it, has all of them."""
    place = make("folder", tmp_path, {"a/1.png": b"one", "b/2.png": b"two"})
    (place / "b" / "1.png").hardlink_to(place / "a" / "1.png")
    (place / "a" / "2.png").symlink_to("../b/2.png")
    subprocess.run(["tar", "-C", place, *options, "-cf", tmp_path / "box", "a", "b"], check=True)
    assert everything(tmp_path / "box") == [
        ("a/1.png", b"one"),
        ("a/2.png", b"two"),
        ("b/1.png", b"one"),
        ("b/2.png", b"two"),
    ]


@pytest.mark.usefixtures("permissions_count")
def test_a_folder_that_may_not_be_listed(tmp_path: Path):
    """It is named, and the others are read."""
    path = make("folder", tmp_path, {"a/1.png": b"one", "b/2.png": b"two"})
    (path / "b").chmod(0)
    try:
        assert everything(path) == [("a/1.png", b"one"), ("b", "it cannot be read (Permission denied)")]
    finally:
        (path / "b").chmod(0o700)


def test_links_in_a_folder_are_followed(tmp_path: Path):
    """People link the folders of large datasets; a link to nowhere is said when it is read."""
    make("folder", tmp_path)
    box = tmp_path / "box"
    box.mkdir()
    (box / "linked").symlink_to(tmp_path / "box-folder" / "images")
    (box / "gone.png").symlink_to(tmp_path / "nowhere")
    got = {member.name: data for member, data in read_members(box, list_members(box), 1000)}
    assert got.pop("gone.png") == "it cannot be read (No such file or directory)"
    assert got == {name.replace("images", "linked"): data for name, data in FILES.items()}


@pytest.mark.usefixtures("permissions_count")
def test_a_file_that_may_not_be_read(tmp_path: Path):
    """It is said, and the others are read."""
    path = make("folder", tmp_path)
    (path / "images" / "a.jpg").chmod(0)
    got = {member.name: data for member, data in read_members(path, list_members(path), 1000)}
    assert got["images/a.jpg"] == "it cannot be read (Permission denied)"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "folder"])
def test_flipped_bytes_never_crash_it(kind: str, tmp_path: Path):
    """A damaged container: read, or said to be damaged, and no other exception."""
    path = make(kind, tmp_path, {f"{n}.png": bytes(range(n, 120)) for n in range(3)})
    whole, chance = path.read_bytes(), random.Random(0)
    for position in range(0, len(whole), max(1, len(whole) // 400)):
        data = bytearray(whole)
        data[position] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        with contextlib.suppress(DamagedError):
            list(read_members(path, list_members(path), 1000))


def test_neither_a_zip_nor_a_tar(tmp_path: Path):
    """An error page saved as an archive."""
    path = tmp_path / "images.zip"
    path.write_bytes(b"<html>" * 200)
    with pytest.raises(DamagedError, match=r"images\.zip: neither a zip nor a tar file"):
        list_members(path)


@pytest.mark.parametrize("target", [".", "..", "../..", "../b"])
def test_a_link_to_a_folder_that_it_lies_in(target: str, tmp_path: Path):
    """Without end it would be read again and again, and give classes that nobody made."""
    for name in ("a", "b"):
        (tmp_path / "box" / name).mkdir(parents=True)
        (tmp_path / "box" / name / "1.png").write_bytes(b"1")
    (tmp_path / "box" / "a" / "all").symlink_to(target)
    if target == "../b":
        assert [member.name for member in list_members(tmp_path / "box")] == ["a/1.png", "a/all/1.png", "b/1.png"]
        (tmp_path / "box" / "b" / "back").symlink_to("../a")
    with pytest.raises(DamagedError, match=r"box/.* is a link to a folder that it lies in.* Remove the link\."):
        list_members(tmp_path / "box")


def test_one_folder_under_several_names(tmp_path: Path):
    """Links beside one another, and to folders elsewhere in the same one: no cycle, and each name counts."""
    make("folder", tmp_path, {"all/x/1.png": b"1", "all/y/1.png": b"2"})
    box = tmp_path / "box-folder"
    (box / "train").mkdir()
    (box / "train" / "x").symlink_to(box / "all" / "x")
    (box / "train" / "also-x").symlink_to(box / "all" / "x")
    names = [member.name for member in list_members(box)]
    assert names == ["all/x/1.png", "all/y/1.png", "train/also-x/1.png", "train/x/1.png"]


def test_a_tar_that_ends_with_a_zip(tmp_path: Path):
    """It is a tar, though a zip is known by its end: its members are read, and have their digest."""
    inner = make("zip", tmp_path, {"inner.png": b"x"}).read_bytes()
    files = {"a/1.png": b"a" * 5000, "extra.zip": inner}
    path = make("tar", tmp_path, files)
    members = list_members(path)
    assert [member.name for member in members] == list(files)
    assert {member.name: data for member, data in read_members(path, members, 10_000)} == files
    assert content_sha256(path, 10_000) == content_sha256(make("tar.gz", tmp_path, files), 10_000)


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_a_name_that_a_tar_has_twice(kind: str, tmp_path: Path):
    """Each of them is read, the shorter and the longer."""
    path = tmp_path / "box"
    contents = [b"first", b"second, longer", b"third"]
    with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as tar:
        for data in contents:
            info = tarfile.TarInfo("1.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    members = list_members(path)
    assert [data for _, data in read_members(path, members, 100)] == contents
    assert [data for _, data in read_members(path, members[1:2], 100)] == contents[1:2]


def test_a_deflated_member_longer_than_its_directory_says(tmp_path: Path):
    """No more of it is unpacked than the directory says, and it is said to be damaged."""
    path = make("zip", tmp_path, {"1.png": bytes(64 << 20)})
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\1\2") + 24
    data[at : at + 4] = (1000).to_bytes(4, "little")
    path.write_bytes(data)
    members = list_members(path)
    tracemalloc.start()
    try:
        ((_, why),) = read_members(path, members, 1000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert why == "Bad CRC-32 for file '1.png'"


def test_a_deflated_member_shorter_than_its_directory_says(tmp_path: Path):
    """Its check sum may fit what there is, as that of nothing, which is 0; it is damaged all the same."""
    path = make("zip", tmp_path, {"1.png": b""})
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\1\2") + 24
    data[at : at + 4] = (150).to_bytes(4, "little")
    path.write_bytes(data)
    ((_, why),) = read_members(path, list_members(path), 1000)
    assert why == "it has 0 bytes, and the directory says 150"


@pytest.mark.parametrize("read", [list_members, lambda path: content_sha256(path, 1000)], ids=["list", "digest"])
def test_a_tar_of_too_many_members(read: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Empty ones take next to no room when compressed, and each some of memory."""
    path = make("tar.gz", tmp_path, {f"{number}.png": b"" for number in range(9)})
    monkeypatch.setattr(containers, "_MOST_MEMBERS", 10)
    read(path)
    monkeypatch.setattr(containers, "_MOST_MEMBERS", 9)  # a folder is one of them
    with pytest.raises(DamagedError, match=r"box-tar\.gz: more than 9 members, .*; the file is not used"):
        read(path)


def test_headers_for_all_members_that_grow(tmp_path: Path):
    """Each such header of a tar may be short, and all of them together more than memory has."""
    path = tmp_path / "box.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for number in range(3):
            notes = tarfile.TarInfo.create_pax_global_header({f"note{number}": "x" * (400 << 10)})
            assert tar.fileobj is not None
            tar.fileobj.write(notes)
            tar.addfile(tarfile.TarInfo(f"{number}.png"))
    with pytest.raises(DamagedError, match=r"more than 1,048,576 bytes in the headers that apply to all of them"):
        list_members(path)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_regular_file_in_a_folder(kind: str, tmp_path: Path):
    """It is said, the others are read, and nobody waits for the other end of a pipe."""
    path = make("folder", tmp_path)
    odd = path / "images" / "odd.jpg"
    if kind == "pipe":
        os.mkfifo(odd)
    elif kind == "device":
        odd.symlink_to("/dev/null")
    else:
        with socket.socket(socket.AF_UNIX) as end, contextlib.chdir(odd.parent):  # its path may be too long for one
            end.bind(odd.name)
    got = {member.name: data for member, data in read_members(path, list_members(path), 1000)}
    why = "No such device or address" if kind == "socket" else "not a regular file"
    assert got.pop("images/odd.jpg") == f"it cannot be read ({why})"
    assert got == FILES


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("read", [list_members, lambda path: content_sha256(path, 1000)], ids=["list", "digest"])
def test_a_pipe_in_place_of_an_archive(read: Callable[[Path], object], tmp_path: Path):
    """It is damaged, and nobody waits for its other end."""
    os.mkfifo(tmp_path / "box.tar")
    with pytest.raises(DamagedError, match=r"box\.tar: a damaged container \(.*not a regular file"):
        read(tmp_path / "box.tar")


def test_inside():
    """What may be joined to a folder."""
    assert all(map(is_inside, ["a", "a/b.png", "a b/é"]))
    assert not any(map(is_inside, ["/a", "..", "a/../b", "a\\b", "a\0b"]))


def test_xz_that_asks_for_much_memory_is_refused(tmp_path: Path):
    """A header that states a dictionary of 1.5 GiB takes none of it: the file is refused."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("class/a.png"))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 20}]
    packed = bytearray(lzma.compress(data.getvalue(), filters=filters))
    header = packed[12 : 12 + 4 * (packed[12] + 1)]  # of the first block: its length, flags, the filter, and a CRC-32
    at = header.index(bytes([0x21, 1])) + 2  # LZMA2, one byte of properties: the size of its dictionary
    header[at] = 37
    header[-4:] = zlib.crc32(header[:-4]).to_bytes(4, "little")
    packed[12 : 12 + len(header)] = header
    path = tmp_path / "images.tar.xz"
    path.write_bytes(packed)
    with pytest.raises(DamagedError, match=r"(?i)images\.tar\.xz.*memory usage limit"):
        list_members(path)


def test_xz_of_several_streams(tmp_path: Path):
    """An xz file may consist of streams with padding between them."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name in ("class/a.png", "class/b.png"):
            header = tarfile.TarInfo(name)
            header.size = 700
            tar.addfile(header, io.BytesIO(name.encode() * 64))
    path, half = tmp_path / "images.tar.xz", len(data.getvalue()) // 2
    path.write_bytes(lzma.compress(data.getvalue()[:half]) + bytes(8) + lzma.compress(data.getvalue()[half:]))
    members = list_members(path)
    assert [member.name for member in members] == ["class/a.png", "class/b.png"]
    assert [len(data) for _, data in read_members(path, members[::-1], 1000)] == [700, 700]
