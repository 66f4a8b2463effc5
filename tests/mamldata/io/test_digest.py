"""Digests: the same content has the same digest, and nothing damaged or crafted gets past them or crashes them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mamldata.errors import DamagedError
from mamldata.io.containers import list_members, safe_member_name
from mamldata.io.content_digest import content_sha256
from mamldata.io.digest import canonical_json, parse_json, sha256_bytes, sha256_file

MEMBERS = {"a/1.png": b"one" * 50, "a/2.png": bytes(range(256)), "b/ä.png": b"", "b/z.png": b"x" * 300}
LIMIT = 10_000

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED, folders: bool = False) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as container:
        if folders:
            container.mkdir("a")
        for name, data in members.items():
            container.writestr(name, data)
    return stream.getvalue()


def tarred(members: dict[str, bytes], mode: str = "w:", layout: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode, format=layout) as container:  # type: ignore[call-overload]
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        container.addfile(folder)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            container.addfile(info, io.BytesIO(data))
    return stream.getvalue()


CONTAINERS = {
    "stored": zipped(MEMBERS, zipfile.ZIP_STORED),
    "deflated": zipped(MEMBERS),
    "tar": tarred(MEMBERS),
    "gnu": tarred(MEMBERS, layout=tarfile.GNU_FORMAT),
    "tar.gz": tarred(MEMBERS, "w:gz"),
    "tar.bz2": tarred(MEMBERS, "w:bz2"),
    "tar.xz": tarred(MEMBERS, "w:xz"),
}


def by_hand(members: dict[str, bytes]) -> str:
    lines = sorted(
        name.encode() + b"\0" + hashlib.sha256(data).hexdigest().encode() + b"\n" for name, data in members.items()
    )
    return hashlib.sha256(b"".join(lines)).hexdigest()


@given(JSON)
def test_canonical_json(value: object) -> None:
    """It is JSON, ASCII, one line, the same for equal values whatever the order of their keys."""
    data = canonical_json(value)
    assert json.loads(data) == value
    assert data.isascii()
    assert data.count(b"\n") == 1
    if isinstance(value, dict):
        assert canonical_json(dict(reversed(value.items()))) == data


def test_canonical_json_to_the_byte() -> None:
    """What every digest rests on, byte for byte."""
    assert canonical_json({"b": [1, True, None], "a": "ä\n"}) == b'{"a":"\\u00e4\\n","b":[1,true,null]}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_sha256(tmp_path: Path) -> None:
    """Files and bytes, also beyond one chunk; progress adds up to the file."""
    data = b"x" * ((1 << 20) + 17)
    (tmp_path / "file").write_bytes(data)
    told: list[int] = []
    assert sha256_file(tmp_path / "file", told.append) == sha256_bytes(data) == hashlib.sha256(data).hexdigest()
    assert told == [1 << 20, 17]


@pytest.mark.parametrize("kind", sorted(CONTAINERS))
def test_content_digest_is_of_the_content(kind: str, tmp_path: Path) -> None:
    """Any container, compression, order of members, and folder entries: one digest, that of the members."""
    path = tmp_path / "container"
    path.write_bytes(CONTAINERS[kind])
    assert content_sha256(path, LIMIT) == by_hand(MEMBERS)


def test_content_digest_ignores_order_and_folders(tmp_path: Path) -> None:
    """A repacked container has the digest of the first."""
    path = tmp_path / "container"
    path.write_bytes(zipped(dict(reversed(MEMBERS.items())), folders=True))
    assert content_sha256(path, LIMIT) == by_hand(MEMBERS)


@pytest.mark.parametrize(
    "other",
    [
        {**MEMBERS, "a/1.png": b"One" * 50},
        {**MEMBERS, ".DS_Store": b""},
        {("A/1.png" if name == "a/1.png" else name): data for name, data in MEMBERS.items()},
        {name: data for name, data in MEMBERS.items() if name != "b/ä.png"},
    ],
    ids=["byte", "stray", "name", "gone"],
)
def test_content_digest_differs(other: dict[str, bytes], tmp_path: Path) -> None:
    """One byte, one name, one member more or less: another digest."""
    path = tmp_path / "container"
    path.write_bytes(zipped(other))
    assert content_sha256(path, LIMIT) == by_hand(other) != by_hand(MEMBERS)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "bytes_", "digest"),
    [
        ("images_background_small1.zip", 656_309, "a322856af6a87f0abbbb9e07eb5595f6d5210fa4e9d1b3c5fdb19b4821c619c1"),
        ("images_background_small2.zip", 798_023, "326818df8d4197e0825f5075b2c4a169f9c76d3218ceb52a999172b16414e97b"),
        ("images_background.zip", 4_810_560, "7c563fb7d98dbd312c5e0ccb87230ca9d7e8a13d672e5de6186245e7905ed43e"),
        ("images_evaluation.zip", 3_371_735, "e5a69b751aa33f555bdc92febd48220b69a811b2ff01de32bf4d1bca47bd1809"),
    ],
)
def test_content_digest_of_omniglot(name: str, bytes_: int, digest: str, real_data: Path) -> None:
    """The published figures, within exactly the bound that the manifest sets."""
    assert content_sha256(real_data / "omniglot" / name, bytes_) == digest


@pytest.mark.parametrize("kind", ["deflated", "tar.gz"])
def test_bombs(kind: str, tmp_path: Path) -> None:
    """What unpacks to more than the bound is given up, on the byte."""
    path = tmp_path / "bomb"
    members = {f"a/{i}": bytes(3 << 20) for i in range(3)}
    path.write_bytes(zipped(members) if kind == "deflated" else tarred(members, "w:gz"))
    with pytest.raises(DamagedError, match="its members unpack to more than 9,437,183 bytes; the file is not used"):
        content_sha256(path, (9 << 20) - 1)
    assert content_sha256(path, 9 << 20) == by_hand(members)


@pytest.mark.parametrize(("method", "name"), [(zipfile.ZIP_BZIP2, r"bzip2 \(12\)"), (zipfile.ZIP_LZMA, r"lzma \(14\)")])
@pytest.mark.parametrize("read", [lambda path: content_sha256(path, LIMIT), list_members], ids=["digest", "list"])
def test_methods_that_unpack_without_a_bound(
    method: int, name: str, read: Callable[[Path], object], tmp_path: Path
) -> None:
    """A zip of some kilobytes is refused with the member and its method; the 64 MB in it are not unpacked."""
    path = tmp_path / "bomb.zip"
    path.write_bytes(zipped({"a/1.png": bytes(64 << 20)}, method))
    tracemalloc.start()
    try:
        with pytest.raises(DamagedError, match=rf"bomb\.zip: the member 'a/1\.png' is compressed by the method {name}"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("data", [b"[" + b"[]," * 99 + b"[]]", b'["' + b",[{" * 40 + b'"]', b"[" * 101])
def test_json_of_too_many_values(data: bytes) -> None:
    """They are counted before any of them is made; what is in strings counts too."""
    with pytest.raises(ValueError, match="more than 100 values"):
        parse_json(data, 100)
    if data.endswith(b"]"):
        assert parse_json(data, 300) == json.loads(data)


def test_json_that_is_nested_too_deep() -> None:
    """One kind of error for all that cannot be parsed."""
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json(b"[" * 200_000)


def test_a_member_that_lies_about_its_size(tmp_path: Path) -> None:
    """A zip whose directory says 1 byte where there are millions is damaged, not unpacked."""
    data = bytearray(zipped({"a": bytes(5 << 20)}))
    for signature, offset in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
        at = data.index(signature) + offset
        data[at : at + 4] = (1).to_bytes(4, "little")
    path = tmp_path / "liar"
    path.write_bytes(data)
    with pytest.raises(DamagedError):
        content_sha256(path, LIMIT)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\\..\\x", "a\0b", ".."])
def test_unsafe_names(name: str, tmp_path: Path) -> None:
    """Names that point outside make the container unfit."""
    with pytest.raises(DamagedError, match=r"box: the member .* points outside the container"):
        safe_member_name(name, "box")
    if "\0" not in name:
        for data in (zipped({name: b"x"}), tarred({name: b"x"})):
            path = tmp_path / "container"
            path.write_bytes(data)
            with pytest.raises(DamagedError, match="points outside the container"):
                content_sha256(path, LIMIT)


@pytest.mark.parametrize("name", ["a", "a/b.png", "a/..b/c", "...", "a/b c.png", "ä/ß.png"])
def test_safe_names(name: str) -> None:
    """Plain relative paths are left as they are."""
    assert safe_member_name(name, "box") == name


def test_links_and_devices_in_a_tar_are_no_members(tmp_path: Path) -> None:
    """Only files count; a link is not followed."""
    stream = io.BytesIO(tarred(MEMBERS))
    with tarfile.open(fileobj=stream, mode="a:") as container:
        for kind, name in ((tarfile.SYMTYPE, "link"), (tarfile.CHRTYPE, "device"), (tarfile.FIFOTYPE, "pipe")):
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "/etc/passwd"
            container.addfile(info)
    path = tmp_path / "container"
    path.write_bytes(stream.getvalue())
    assert content_sha256(path, LIMIT) == by_hand(MEMBERS)


@pytest.mark.parametrize(
    "data", [b"", b"<html>not found</html>", b"PK\3\4", bytes(10)], ids=["empty", "html", "zip", "nul"]
)
def test_no_container_at_all(data: bytes, tmp_path: Path) -> None:
    """An error page saved as a zip is called what it is."""
    path = tmp_path / "page.zip"
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"page\.zip: neither a zip nor a tar"):
        content_sha256(path, LIMIT)


def test_missing_file_is_not_damage(tmp_path: Path) -> None:
    """What the operating system says about the place itself is left as it is."""
    with pytest.raises(FileNotFoundError):
        content_sha256(tmp_path / "gone", LIMIT)


def test_a_tar_name_that_is_no_text(tmp_path: Path) -> None:
    """A member name in another encoding has no digest that two machines agree on."""
    path = tmp_path / "latin.tar"
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:", format=tarfile.USTAR_FORMAT, encoding="latin-1") as container:
        container.addfile(tarfile.TarInfo("ä.png"))
    path.write_bytes(stream.getvalue())
    with pytest.raises(DamagedError, match="a damaged container"):
        content_sha256(path, LIMIT)


@pytest.mark.parametrize("kind", sorted(CONTAINERS))
def test_a_damaged_container_never_crashes(kind: str, tmp_path: Path) -> None:
    """Bytes changed or cut off: a digest, another or the same, or DamagedError, and no other exception."""
    whole, path = CONTAINERS[kind], tmp_path / "container"

    @settings(max_examples=100, suppress_health_check=list(HealthCheck))
    @example(changes=[(whole.find(b"PK\1\2") + 10, 12)], length=len(whole))  # the method of compression: bzip2
    @given(
        changes=st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=3),
        length=st.just(len(whole)) | st.integers(0, len(whole)),
    )
    def check(changes: list[tuple[int, int]], length: int) -> None:
        data = bytearray(whole)
        for position, value in changes:
            data[position] = value
        path.write_bytes(data[:length])
        try:
            digest = content_sha256(path, LIMIT)
        except DamagedError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert len(digest) == 64

    check()


def test_every_changed_byte_of_an_image_is_found(tmp_path: Path) -> None:
    """In a member's bytes there is none whose change gives the genuine digest."""
    whole, path = CONTAINERS["stored"], tmp_path / "container"
    with zipfile.ZipFile(io.BytesIO(whole)) as container:
        info = container.getinfo("a/2.png")
    start = info.header_offset + 30 + len("a/2.png")
    found = 0
    for position in range(start, start + info.compress_size):
        data = bytearray(whole)
        data[position] ^= 0x10
        path.write_bytes(data)
        try:
            found += content_sha256(path, LIMIT) != by_hand(MEMBERS)
        except DamagedError:
            found += 1
    assert found == info.compress_size
