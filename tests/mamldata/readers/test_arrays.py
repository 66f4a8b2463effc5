"""Datasets that come as pickled arrays, as Python 2 wrote them: CIFAR-100 and tieredImageNet."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import tarfile
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mamldata.bank.make import make_bank
from mamldata.datasets.load import load_manifest
from mamldata.datasets.manifest import ImageForm, Manifest
from mamldata.errors import DamagedError, FetchError
from mamldata.fetching.act import fetch
from mamldata.fetching.layouts import Found, list_images
from mamldata.io.containers import list_members
from mamldata.readers.image import load_member
from mamldata.readers.split_files import Row
from mamldata.sampling.splits import divide

COARSE = 20


def python_2(value: Any) -> bytes:
    """A pickle as Python 2 writes it with protocol 2: its strings are bytes."""
    return b"\x80\x02" + _python_2(value) + b"."


def _python_2(value: Any) -> bytes:
    if isinstance(value, str | bytes):
        data = value.encode() if isinstance(value, str) else value
        return b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_python_2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_python_2(part) for item in value.items() for part in item) + b"u"
    assert isinstance(value, np.ndarray)
    order, code = ("|", "u1") if value.dtype == np.uint8 else ("<", "i4")
    dtype = b"cnumpy\ndtype\n" + _python_2(code) + b"K\x00K\x01\x87R(K\x03" + _python_2(order)
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"(" + b"".join(map(_python_2, value.shape)) + b"t"
    start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return start + b"(K\x01" + shape + dtype + b"\x89" + _python_2(value.tobytes()) + b"tb"


def write_tar(path: Path, files: Mapping[str, bytes], mode: str) -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


# --- CIFAR-100


@pytest.fixture
def cifar(tmp_path: Path) -> tuple[Path, dict[str, list[np.ndarray]]]:
    """A made-up file in the layout of the real one: 3 and 1 images of each class; and the images of each class."""
    names = sorted(class_names())
    chance = np.random.default_rng(0)
    expected: dict[str, list[np.ndarray]] = {name: [] for name in names}
    files = {"cifar-100-python/file.txt~": b"", "cifar-100-python/meta": python_2({"fine_label_names": names})}
    for part, count in (("test", 1), ("train", 3)):
        labels = chance.permutation(np.repeat(np.arange(100), count)).tolist()
        images = chance.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
        for label, image in zip(labels, images, strict=True):
            expected[names[label]].append(image)
        rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(-1, 3072)
        content = {"filenames": ["x_s_000001.png"] * len(labels), "fine_labels": labels, "data": rows}
        files[f"cifar-100-python/{part}"] = python_2(content)
    return write_tar(tmp_path / "cifar-100-python.tar.gz", files, "w:gz"), expected


def class_names() -> set[str]:
    lists = load_manifest("cifar-fs").scheme().lists
    return {name for names in lists.values() for name in names}


def as_published(name: str, path: Path, **changes: Any) -> Manifest:
    """The built-in manifest, for a made-up file."""
    manifest = load_manifest(name)
    data = path.read_bytes()
    (file,) = manifest.files
    digest = {"sha256": hashlib.sha256(data).hexdigest()} if file.sha256 else {"md5": hashlib.md5(data).hexdigest()}
    return replace(manifest, files=(replace(file, urls=(), bytes=len(data) if file.bytes else 0, **digest, **changes),))


@pytest.mark.parametrize(("name", "counts"), [("cifar-fs", (64, 16, 20)), ("fc100", (60, 20, 20))])
def test_the_published_divisions(name: str, counts: tuple[int, ...], cifar: Any, tmp_path: Path):
    """Every class of CIFAR-100 is in one split, and its images are those with its label, test before train."""
    path, expected = cifar
    manifest = as_published(name, path)
    (fetched,) = fetch(manifest, tmp_path / "root", [str(tmp_path)], offline=True)
    assert fetched.checked_by == "sha256"
    bank = make_bank(manifest, tmp_path / "root", workers=2)
    assert bank.shape == (400, 32, 32, 3)
    assert bank.class_names == tuple(sorted(expected))
    assert np.array_equal(bank.open_images(), np.concatenate([expected[name] for name in sorted(expected)]))
    division = divide(manifest.scheme(), bank.class_names, name)
    assert tuple(len(division[split]) for split in ("train", "val", "test")) == counts
    assert sorted(sum(division.values(), ())) == list(range(100))


def test_fc100_divides_by_superclass():
    """The comments in the lists name 12, 4 and 4 superclasses of five classes each."""
    folder = Path(__file__).parents[3] / "manifests" / "fc100"
    text = {split: (folder / f"{split}.txt").read_text().splitlines() for split in ("train", "val", "test")}
    coarse = {split: [line for line in lines if line.startswith("#")] for split, lines in text.items()}
    assert {split: len(names) for split, names in coarse.items()} == {"train": 12, "val": 4, "test": 4}
    assert len({name for names in coarse.values() for name in names}) == COARSE
    assert all(len(text[split]) == 6 * len(coarse[split]) for split in text)
    assert {line for lines in text.values() for line in lines if line[0] != "#"} == class_names()


def test_cub_divides_by_number():
    """Of the species in order every second one is train; the others are val and test in turn."""
    lists = load_manifest("cub-200").scheme().lists
    numbers = {split: [int(name[:3]) for name in names] for split, names in lists.items()}
    assert numbers == {"train": [*range(1, 201, 2)], "val": [*range(2, 201, 4)], "test": [*range(4, 201, 4)]}


@pytest.mark.parametrize(
    "files",
    [
        {"x": b"1"},
        {
            # A tuple of itself twice, 200 times: a name of 2 to the 200 letters.
            "meta": python_2({"fine_label_names": []})[:-3] + b")" + b"2\x86" * 200 + b"eu.",
            "train": python_2({"fine_labels": [0], "data": np.zeros((1, 3072), np.uint8)}),
            "test": b"",
        },
        {"train": python_2({"data": 1}), "test": b"", "meta": python_2({"fine_label_names": ["a"]})},
        {"train": python_2([1]), "test": python_2([1]), "meta": python_2([1])},
        {
            "meta": python_2({"fine_label_names": ["a"]}),
            "train": python_2({"fine_labels": [0, 0], "data": np.zeros((1, 3072), np.uint8)}),
            "test": b"",
        },
        {
            "meta": python_2({"fine_label_names": ["a"]}),
            "train": python_2({"fine_labels": [7], "data": np.zeros((1, 3072), np.uint8)}),
            "test": b"",
        },
    ],
)
def test_other_files_under_cifars_name(files: dict[str, bytes], tmp_path: Path):
    """Whatever is in them: an error that names the file."""
    path = write_tar(tmp_path / "cifar-100-python.tar.gz", files, "w:gz")
    manifest = as_published("cifar-fs", path)
    fetch(manifest, tmp_path / "root", [str(tmp_path)], offline=True)
    with pytest.raises(DamagedError, match=r"cifar-100-python\.tar\.gz"):
        make_bank(manifest, tmp_path / "root")


# --- tieredImageNet


CLASSES = {"train": ["crane", "bee", "maillot"], "val": ["crane"], "test": ["dog", "emu"]}


@pytest.fixture
def tiered(tmp_path: Path) -> tuple[Path, dict[str, list[np.ndarray]]]:
    """A made-up tar in the layout of the real one, and the images of each class."""
    chance = np.random.default_rng(0)
    files, expected = {}, {}
    for split, names in CLASSES.items():
        numbers = chance.permutation(np.repeat(np.arange(len(names)), [2 + n for n in range(len(names))]))
        images = chance.integers(0, 256, (len(numbers), 84, 84, 3), dtype=np.uint8)
        for number, image in zip(numbers.tolist(), images, strict=True):
            expected.setdefault(f"{split}/{number:03d} {names[number]}", []).append(image)
        labels = {"label_specific": numbers.astype(np.int32), "label_specific_str": names}
        files[f"tiered-imagenet/{split}_labels.pkl"] = python_2(labels)
        packed = [np.frombuffer(png(image), np.uint8)[:, None] for image in images]
        files[f"tiered-imagenet/{split}_images_png.pkl"] = python_2(packed)
    return write_tar(tmp_path / "tiered-imagenet.tar", files, "w"), expected


def test_tiered_imagenet(tiered: Any, tmp_path: Path):
    """Checked by its MD5, which is all that is published; PNGs are read where they stand in the tar."""
    path, expected = tiered
    manifest = as_published("tiered-imagenet", path)
    (fetched,) = fetch(manifest, tmp_path / "root", [str(tmp_path)], offline=True)
    assert (fetched.checked_by, fetched.bytes) == ("md5", path.stat().st_size)
    assert fetch(manifest, tmp_path / "root")[0].how == "had"
    bank = make_bank(manifest, tmp_path / "root", workers=2)
    assert bank.class_names == tuple(sorted(expected))
    assert bank.class_splits == ("test", "test", "train", "train", "train", "val")
    assert np.array_equal(bank.open_images(), np.concatenate([expected[name] for name in sorted(expected)]))


def test_a_file_with_another_md5(tiered: Any, tmp_path: Path):
    """One byte is enough."""
    path, _ = tiered
    manifest = as_published("tiered-imagenet", path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(FetchError, match=r"another file came: md5 \w+ \([\d,]+ bytes\), expected \w+"):
        fetch(manifest, tmp_path / "root", [str(tmp_path)], offline=True)


def test_how_to_get_it_by_hand(tmp_path: Path):
    """There is no address to download it from."""
    with pytest.raises(FetchError, match=r"Google Drive gives it \(12\.9 GB\), and asks for a browser: https://"):
        fetch(load_manifest("tiered-imagenet"), tmp_path / "root")


@pytest.mark.parametrize("damage", ["a label too many", "no labels", "no list", "no arrays"])
def test_other_files_under_tiereds_name(damage: str, tiered: Any, tmp_path: Path):
    """An error that names the file."""
    path, _ = tiered
    with tarfile.open(path) as tar:
        files = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    labels, images = "tiered-imagenet/val_labels.pkl", "tiered-imagenet/val_images_png.pkl"
    if damage == "a label too many":
        files[labels] = python_2({"label_specific": np.zeros(9, np.int32), "label_specific_str": ["crane"]})
    if damage == "no labels":
        del files[labels]
    if damage == "no list":
        files[images] = python_2({"a": 1})
    if damage == "no arrays":
        files[images] = python_2([1, 2])
    write_tar(path, files, "w")
    manifest = as_published("tiered-imagenet", path)
    fetch(manifest, tmp_path / "root", [str(tmp_path)], offline=True)
    with pytest.raises(DamagedError, match=r"tiered-imagenet\.tar"):
        make_bank(manifest, tmp_path / "root")


def test_one_array_under_many_keys(tmp_path: Path):
    """It is read once: a pickle of a megabyte does not become one for each key."""
    array = np.zeros((1 << 20, 1), np.uint8)
    path = write_tar(tmp_path / "box.tar", {"data": pickle.dumps({str(key): array for key in range(50)}, 3)}, "w")
    (member,) = list_members(path)
    tracemalloc.start()
    try:
        loaded = load_member(path, member)
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
    finally:
        tracemalloc.stop()
    assert len(loaded) == 50
    assert all(np.array_equal(value, array) for value in loaded.values())


@pytest.mark.parametrize("shape", [(1, 5000, 5000, 3), (2, 2, 2, 3)], ids=["image", "numbers"])
def test_a_cache_of_more_than_images(shape: tuple[int, ...], tmp_path: Path):
    """An image that is larger than images are, or more numbers than there are images, is no cache."""
    images, numbers = np.zeros(shape, np.uint8), np.zeros(200, np.int64)
    cache = {"image_data": images, "class_dict": {"a": numbers[: shape[0]], "b": numbers if shape[0] > 1 else []}}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(cache, 4))
    found = Found(ImageForm("pickled-arrays", files={"train": ("a.pkl",)}), tmp_path)
    with pytest.raises(DamagedError, match=r"a\.pkl does not have the layout of MiniImagenet's caches"):
        list_images(found, [Row("1.jpg", "a", "train", "train.csv", 2)], lambda _: None)
