"""The ``webdataset`` reader: the samples that the package webdataset reads, and every fault."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import mamldata
from mamldata.datasets.load import load_manifest
from mamldata.errors import DatasetError, ManifestError
from mamldata.io.digest import sha256_file
from mamldata.readers.image import ReaderRecipe, read_images
from mamldata.readers.index import ImageIndex, index_images

PLAIN = ReaderRecipe("webdataset")
NAMED = ReaderRecipe("webdataset", classes=("ape", "bee", "cat"))
SAMPLES = {
    "a/001.jpg": b"one",
    "a/001.cls": b"0",
    "002.left.png": b"two",
    "002.json": b'{"label": 2, "caption": "a cat"}',
    "003.PNG": b"three",
    "003.CLS": b"bee\n",
    "003.txt": b"left out",
    "004.cls": b"1",
}


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as container:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            container.addfile(info, io.BytesIO(data))
    return path


def listed(index: ImageIndex) -> list[tuple[str, str, bytes]]:
    data = dict(read_images(index.images))
    return [(image.class_name, image.name, data[row]) for row, image in enumerate(index.images)]


def test_labels_and_names(tmp_path: Path) -> None:
    """Numbers, JSON and names as labels; numbers get names from the list of classes; other files are left out."""
    index = index_images(NAMED, [tar(tmp_path / "s.tar", SAMPLES)])
    assert not index.faults
    assert listed(index) == [
        ("ape", "s.tar/a/001.jpg", b"one"),
        ("bee", "s.tar/003.PNG", b"three"),
        ("cat", "s.tar/002.left.png", b"two"),
    ]
    assert [str(group) for group in index.left_out] == ["1 file that is not read as an image (.txt 1): 003.txt"]
    assert [name for name, _, _ in listed(index_images(PLAIN, [tmp_path / "s.tar"]))] == ["0", "2", "bee"]


@pytest.mark.parametrize("kind", ["tar.gz", "zip", "folder"])
def test_other_containers(tmp_path: Path, kind: str) -> None:
    """A compressed tar, a zip and a folder hold the same images as a tar."""
    expected = [(label, data) for label, _, data in listed(index_images(NAMED, [tar(tmp_path / "s.tar", SAMPLES)]))]
    place = tmp_path / f"s.{kind}"
    if kind == "folder":
        for name, data in SAMPLES.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(data)
    elif kind == "zip":
        with zipfile.ZipFile(place, "w") as container:
            for name, data in SAMPLES.items():
                container.writestr(name, data)
    else:
        tar(place, SAMPLES)
    assert [(label, data) for label, _, data in listed(index_images(NAMED, [place]))] == expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves shards open
def test_what_webdataset_writes_and_reads(tmp_path: Path) -> None:
    """Shards that webdataset wrote hold the images and labels that it reads, in any number of shards."""
    webdataset = pytest.importorskip("webdataset")
    shards = []
    for shard in range(2):
        shards.append(str(tmp_path / f"s-{shard}.tar"))
        with webdataset.TarWriter(shards[-1]) as writer:
            for number in range(4):  # the same keys in both
                image = Image.new("RGB", (4, 4), (shard, number, 0))
                label = {"cls": number % 3} if number % 2 else {"json": {"label": number % 3}}
                writer.write({"__key__": f"{number:03d}", "png": image, **label})
    index = index_images(PLAIN, [Path(shard) for shard in shards])
    assert not index.faults
    read = []
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        label = sample["cls"].decode() if "cls" in sample else str(json.loads(sample["json"])["label"])
        read.append((label, f"{Path(sample['__url__']).name}/{sample['__key__']}.png", sample["png"]))
    assert len(read) == 8
    assert listed(index) == sorted(read)


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        ({"1.jpg": b""}, "1.jpg: it has no label, 1.cls or 1.json"),
        ({"1.jpg": b"", "1.png": b"", "1.cls": b"0"}, "the sample 1 has several images: 1.jpg, 1.png"),
        (
            {"1.jpg": b"", "1.cls": b"3"},
            "its label 1.cls is 3, which is neither one of the 3 classes nor the number of",
        ),
        ({"1.jpg": b"", "1.cls": b"dog"}, "its label 1.cls is dog, which is neither one of the 3 classes"),
        ({"1.jpg": b"", "1.cls": b"-1"}, "its label 1.cls is -1, which is neither"),
        ({"1.jpg": b"", "1.cls": b" "}, "its label 1.cls is not a valid class name"),
        ({"1.jpg": b"", "1.cls": b"../x"}, "its label 1.cls is not a valid class name"),
        ({"1.jpg": b"", "1.cls": b"9" * 9000}, "its label 1.cls is not a valid class name"),
        ({"1.jpg": b"", "1.cls": b"\xff"}, 'its label 1.cls is not UTF-8 text, or not JSON with a "label"'),
        ({"1.jpg": b"", "1.json": b'{"cls": 1}'}, 'its label 1.json is not UTF-8 text, or not JSON with a "label"'),
        ({"1.jpg": b"", "1.json": b"[]"}, "its label 1.json is not UTF-8 text, or not JSON"),
        ({"1.jpg": b"", "1.json": b'{"label": 1.5}'}, "its label 1.json is neither a whole number nor a name"),
        ({"1.jpg": b"", "1.json": b'{"label": true}'}, "its label 1.json is neither a whole number nor a name"),
        ({"1.jpg": b"", "1.cls": b"0" * 70000}, "its label 1.cls cannot be read: it has 70,000 bytes"),
    ],
)
def test_faults(tmp_path: Path, members: dict[str, bytes], fault: str) -> None:
    """Each names the shard, the image or sample, and what is wrong; the other images are found."""
    index = index_images(NAMED, [tar(tmp_path / "s.tar", {**members, "2.jpg": b"", "2.cls": b"2"})])
    (found,) = index.faults
    assert str(tmp_path / "s.tar") in found.text
    assert fault in found.text
    assert [image.name for image in index.images] == ["s.tar/2.jpg"]


MANIFEST = """\
format = "mamldata-manifest/1"
name = "beasts"
title = "Beasts"
version = "1"
licence = "none"
homepage = "none"
citation = "none"
split_scheme = "own"
{files}
[reader]
type = "webdataset"
classes = {classes}
[image]
size = 8
channels = 3
resampling = "lanczos"
[splits.own]
description = "made up"
train = ["ape"]
val = ["bee"]
test = ["cat"]
"""


def make_beasts(folder: Path, classes: str = '["ape", "bee", "cat"]') -> Path:
    """Two shards with three images each, their manifest, and a broken image as the last."""
    files = ""
    for shard in range(2):
        members = {}
        for number in range(3):
            data = io.BytesIO()
            Image.new("RGB", (9, 9), (50 * shard, 50 * number, 0)).save(data, "PNG")
            members |= {f"{number}.png": data.getvalue(), f"{number}.cls": str(number).encode()}
        path = tar(folder / f"s-{shard}.tar", members)
        digest = sha256_file(path)
        files += f'[[files]]\nname = "{path.name}"\nbytes = {path.stat().st_size}\nsha256 = "{digest}"\n'
    manifest = folder / "beasts.toml"
    manifest.write_text(MANIFEST.format(files=files, classes=classes))
    return manifest


def test_from_manifest_to_bank(tmp_path: Path) -> None:
    """A manifest with the reader and names of classes, in it or in a text file, through fetch to the split's images."""
    pytest.importorskip("torchvision")
    manifest = make_beasts(tmp_path)
    mamldata.fetch(manifest, root=tmp_path / "root", sources=[str(tmp_path)], offline=True)
    images = mamldata.images(manifest, "val", root=tmp_path / "root")
    assert images.classes == ["bee"]
    assert [image.getpixel((4, 4)) for image, _ in images] == [(0, 50, 0), (50, 50, 0)]
    made = [path.stat().st_mtime_ns for path in (tmp_path / "root" / "beasts").glob("beasts-8.*")]
    mamldata.images(manifest, root=tmp_path / "root")
    assert [path.stat().st_mtime_ns for path in (tmp_path / "root" / "beasts").glob("beasts-8.*")] == made
    (tmp_path / "names.txt").write_text("ape\nbee\ncat\n")
    listed = load_manifest(str(make_beasts(tmp_path, '"names.txt"')))
    assert listed.reader == load_manifest(str(make_beasts(tmp_path))).reader == NAMED


def test_a_bad_list_of_classes(tmp_path: Path) -> None:
    """It is refused with its place."""
    with pytest.raises(ManifestError, match=r"reader.classes: must be a list of classes or the name of a text file"):
        load_manifest(str(make_beasts(tmp_path, "3")))


def test_faults_reach_the_user(tmp_path: Path) -> None:
    """A bank is refused with the labels that are wrong."""
    manifest = make_beasts(tmp_path, '["ape", "bee"]')
    mamldata.fetch(manifest, root=tmp_path / "root", sources=[str(tmp_path)], offline=True)
    with pytest.raises(
        DatasetError, match=r"s-1.tar, 2.png: its label 2.cls is 2, which is neither one of the 2 classes"
    ):
        mamldata.live(str(manifest), root=tmp_path / "root")


def test_banks_of_other_readers_keep_their_description() -> None:
    """A reader without a list of classes is described as before there was one."""
    assert ReaderRecipe("class-folders").to_json() == {
        "type": "class-folders",
        "depth": 1,
        "splits": False,
        "damaged": "fail",
    }
    assert NAMED.to_json()["classes"] == ["ape", "bee", "cat"]
