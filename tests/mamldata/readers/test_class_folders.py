"""Readers: the images and nothing else, in an order that no container can change."""

from __future__ import annotations

import io
import random
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mamldata.datasets.load import load_manifest
from mamldata.errors import DamagedError
from mamldata.readers.image import ReaderRecipe, read_images
from mamldata.readers.index import ImageIndex, index_images

DEPTH_1, DEPTH_2 = ReaderRecipe("class-folders", 1), ReaderRecipe("class-folders", 2)


def write_zip(path: Path, members: Sequence[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as container:
        for name, data in members:
            container.writestr(zipfile.ZipInfo(name), data)
    return path


def listed(index: ImageIndex) -> list[tuple[str, str]]:
    return [(image.class_name, image.name) for image in index.images]


def class_names(index: ImageIndex) -> list[str]:
    return [name for name, _, _ in index.classes()]


def class_sizes(index: ImageIndex) -> list[int]:
    return [size for _, _, size in index.classes()]


def contents(index: ImageIndex) -> list[object]:
    """What is read of each image, in the index's order."""
    return [data for _, data in sorted(read_images(index.images), key=lambda item: item[0])]


NAMES = ["s/a/x/2.png", "s/a/x/10.png", "s/a/y/1.png", "s/a b/x/1.png", "s/a-b/x/1.png", "s/A/x/1.JPEG"]


@given(order=st.permutations(NAMES))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_canonical_order(order: list[str], tmp_path: Path) -> None:
    """Classes by path components, images by name, whatever the order in the container."""
    index = index_images(DEPTH_2, [write_zip(tmp_path / "x.zip", [(name, name.encode()) for name in order])])
    # By components "a" comes before "a b" and "a-b"; by the whole path "a b/x" and "a-b/x" would come before "a/x".
    assert listed(index) == [
        ("A/x", "1.JPEG"),
        ("a/x", "10.png"),
        ("a/x", "2.png"),
        ("a/y", "1.png"),
        ("a b/x", "1.png"),
        ("a-b/x", "1.png"),
    ]
    assert class_names(index) == ["A/x", "a/x", "a/y", "a b/x", "a-b/x"]
    assert class_sizes(index) == [1, 2, 1, 1, 1]
    assert [data.decode().rsplit("/", 1)[1] for data in contents(index)] == [image.name for image in index.images]


def test_stray_files_are_left_out(tmp_path: Path) -> None:
    """What a Mac or a careless hand put into the zip is no image."""
    stray = [
        "s/a/.DS_Store",
        "s/a/._1.png",
        "__MACOSX/s/a/2.png",
        "s/.git/3.png",
        "s/a/Thumbs.db",
        "s/a/readme.txt",
        "s/a/1.png.txt",
        "1.png",
        "s/a/png",
    ]
    members = [(name, b"x") for name in [*stray, "s/a/1.png", "s/b/1.pbm"]]
    index = index_images(DEPTH_1, [write_zip(tmp_path / "x.zip", members)])
    assert listed(index) == [("a", "1.png"), ("b", "1.pbm")]


def test_depth(tmp_path: Path) -> None:
    """The nearest folders are the class; an image with too few of them above it is none."""
    path = write_zip(tmp_path / "x.zip", [("s/a/x/1.png", b"1"), ("a/1.png", b"2")])
    assert listed(index_images(DEPTH_1, [path])) == [("a", "1.png"), ("x", "1.png")]
    assert listed(index_images(DEPTH_2, [path])) == [("a/x", "1.png")]


def test_the_same_image_in_two_files_is_taken_once(tmp_path: Path) -> None:
    """Two containers that share a class with the same bytes."""
    one = write_zip(tmp_path / "1.zip", [("one/a/1.png", b"same"), ("one/b/1.png", b"b")])
    two = write_zip(tmp_path / "2.zip", [("two/a/1.png", b"same"), ("two/a/2.png", b"new")], zipfile.ZIP_DEFLATED)
    index = index_images(DEPTH_1, [one, two])
    assert listed(index) == [("a", "1.png"), ("a", "2.png"), ("b", "1.png")]
    assert [image.file for image in index.images] == [one, two, one]


KINDS = ["zip", "stored zip", "tar", "tar.gz", "folder"]


def write(kind: str, path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """The members in a container of a kind, or in a folder."""
    if kind.endswith("zip"):
        return write_zip(path, members, zipfile.ZIP_STORED if "stored" in kind else zipfile.ZIP_DEFLATED)
    if kind == "folder":
        for name, data in members:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        return path
    with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", ["t/a/1.png", "s/a/1.png"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_same_image_twice_in_one_file_is_taken_once(again: str, kind: str, tmp_path: Path) -> None:
    """A doubled image would be in support and query at once; every container may have one, a name twice too."""
    path = write(kind, tmp_path / "x", [("s/a/1.png", b"x"), ("s/a/2.png", b"x"), (again, b"x"), ("u/a/1.png", b"x")])
    index = index_images(DEPTH_1, [path])
    assert (listed(index), index.faults) == ([("a", "1.png"), ("a", "2.png")], ())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_the_same_image_in_containers_of_two_kinds(other: str, kind: str, tmp_path: Path) -> None:
    """Their bytes are compared, whatever the containers note of them."""
    one = write(kind, tmp_path / "1", [("one/a/1.png", b"same"), ("one/b/1.png", b"this")])
    two = write(other, tmp_path / "2", [("two/a/1.png", b"same"), ("two/b/1.png", b"that")])
    index = index_images(DEPTH_1, [one, two])
    fault = f"{two}, two/b/1.png: differs from the image of the same class and name in 1 (b/1.png)"
    assert listed(index) == [("a", "1.png"), ("b", "1.png")]
    assert [found.text for found in index.faults] == [fault]


@pytest.mark.parametrize(
    ("kind", "again"),
    [
        (kind, again)
        for kind in KINDS
        for again in ("t/a/1.png", "s/a/1.png")
        if (kind, again) != ("folder", "s/a/1.png")
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_clash_is_refused(kind: str, again: str, tmp_path: Path) -> None:
    """Different images under one class and name: neither is the right one, whether they are as long or not."""
    members = [("s/a/1.png", b"this"), (again, b"that"), ("u/a/1.png", b"longer")]
    path = write(kind, tmp_path / "x", members)
    fault = "{}, {}: differs from the image of the same class and name in x (a/1.png)"
    found = [fault.text for fault in index_images(DEPTH_1, [path]).faults]
    assert found == [fault.format(path, again), fault.format(path, "u/a/1.png")]


def test_a_double_that_cannot_be_read(tmp_path: Path) -> None:
    """It is a damaged image, which a manifest may leave out; the other one stays."""
    path = write("folder", tmp_path / "x", [("s/a/1.png", b"x"), ("s/a/2.png", b"x")])
    (path / "t" / "a").mkdir(parents=True)
    (path / "t" / "a" / "1.png").symlink_to(tmp_path / "nowhere")
    index = index_images(DEPTH_1, [path])
    assert listed(index) == [("a", "1.png"), ("a", "2.png")]
    assert [(fault.kind, fault.text) for fault in index.faults] == [
        ("image", f"{path}, t/a/1.png: it cannot be read (No such file or directory)")
    ]


def test_a_class_whose_name_is_no_text(tmp_path: Path) -> None:
    """Archives name classes, and names decide splits: they are the same everywhere, or refused."""
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        for name in ("s/caf\xe9/1.png", "s/tea/\xe9.png"):
            tar.addfile(tarfile.TarInfo(name))
    index = index_images(DEPTH_1, [tmp_path / "x.tar"])
    assert class_names(index) == ["tea"]
    assert [fault.text for fault in index.faults] == [
        f"{tmp_path / 'x.tar'}, s/caf\\udce9/1.png: the name of its class is not UTF-8"
    ]


def test_no_image(tmp_path: Path) -> None:
    """A container without images is the wrong file."""
    path = write_zip(tmp_path / "x.zip", [("readme.txt", b"x")])
    with pytest.raises(DamagedError, match=r"No image in .*x\.zip: is it the right file\?"):
        index_images(DEPTH_1, [path])


def test_names_that_point_elsewhere(tmp_path: Path) -> None:
    """A zip with an escaping name is not used at all."""
    path = write_zip(tmp_path / "x.zip", [("s/a/1.png", b"x"), ("../a/1.png", b"x")])
    with pytest.raises(DamagedError, match="points outside the container"):
        index_images(DEPTH_1, [path])


def test_not_a_zip(tmp_path: Path) -> None:
    """An error page saved as a zip is a damaged container."""
    path = tmp_path / "x.zip"
    path.write_bytes(b"<html>")
    with pytest.raises(DamagedError, match=r"x\.zip: neither a zip nor a tar file"):
        index_images(DEPTH_1, [path])


def test_a_damaged_member(tmp_path: Path) -> None:
    """A byte changed in an image is found when it is read, and the member is named."""
    path = write_zip(tmp_path / "x.zip", [("s/a/1.png", b"the image")])
    path.write_bytes(path.read_bytes().replace(b"the image", b"the imago"))
    index = index_images(DEPTH_1, [path])
    assert contents(index) == ["Bad CRC-32 for file 's/a/1.png'"]


def test_a_member_too_large_to_be_an_image(tmp_path: Path) -> None:
    """More than 64 MiB is not even unpacked."""
    path = write_zip(tmp_path / "x.zip", [("s/a/1.png", bytes((64 << 20) + 1))], zipfile.ZIP_DEFLATED)
    index = index_images(DEPTH_1, [path])
    assert contents(index) == ["it has 67,108,865 bytes; the limit for an image is 67,108,864"]


def test_flipped_bytes_never_crash_it(tmp_path: Path) -> None:
    """Index and images of a damaged zip: read, or said to be damaged, and no other exception."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as container:
        for number in range(3):
            container.writestr(f"s/a/{number}.png", bytes(range(number, 200)))
    whole, path, chance, failed = stream.getvalue(), tmp_path / "x.zip", random.Random(0), 0
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        try:
            failed += any(isinstance(data, str) for data in contents(index_images(DEPTH_1, [path])))
        except DamagedError:
            failed += 1
    assert failed > len(whole) // 2


@pytest.mark.real_data
def test_omniglot(real_data: Path) -> None:
    """1,623 characters of 20 drawings, of two files."""
    manifest = load_manifest("omniglot")
    index = index_images(manifest.reader, [real_data / "omniglot" / file.name for file in manifest.files])
    assert not index.faults
    assert len(class_names(index)) == 1623
    assert set(class_sizes(index)) == {20}
    assert len({name.split("/")[0] for name in class_names(index)}) == 50
    assert class_names(index) == sorted(class_names(index), key=lambda name: name.split("/"))


@pytest.mark.real_data
def test_omniglot_small_shares_two_alphabets(real_data: Path) -> None:
    """136 and 156 characters, of which 50 are the same: 242, in both orders of the files."""
    manifest = load_manifest("omniglot-small")
    files = [real_data / "omniglot" / file.name for file in manifest.files]
    apart = [len(class_names(index_images(manifest.reader, [file]))) for file in files]
    both = index_images(manifest.reader, files)
    assert apart == [136, 156]
    assert len(class_names(both)) == 242
    assert set(class_sizes(both)) == {20}
    turned = index_images(manifest.reader, files[::-1])
    assert listed(turned) == listed(both)
