"""The ``csv-splits`` reader through to the bank: equal whatever holds the images, and every fault in one report."""

from __future__ import annotations

import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mamldata.bank import make as banks
from mamldata.bank.format import Bank
from mamldata.bank.make import make_bank
from mamldata.datasets.load import load_manifest
from mamldata.datasets.manifest import ImageRecipe, Manifest, SourceFile
from mamldata.datasets.paths import DatasetFolder
from mamldata.errors import DatasetError, Fault
from mamldata.fetching.act import fetch
from mamldata.io.digest import sha256_file
from mamldata.readers import split_files as csv_splits
from mamldata.readers.image import ReaderRecipe
from mamldata.readers.index import index_images
from mamldata.readers.split_files import read_rows
from mamldata.sampling.splits import SplitScheme, divide
from mamldata.sources.live import live

CLASSES = {"train": {"cat": 3, "dog": 5}, "val": {"emu": 2}, "test": {"ape": 4, "bee": 3}}
CSV = ReaderRecipe("csv-splits")


@dataclass
class Made:
    """A made-up dataset: its files under a root, which tests may change before a bank is made."""

    root: Path
    tables: dict[str, list[str]]  # split: lines
    images: dict[str, bytes]  # name: encoded
    kind: str = "zip"
    reader: ReaderRecipe = CSV

    @property
    def raw(self) -> Path:
        return DatasetFolder(self.root, "beasts").raw

    def manifest(self) -> Manifest:
        """Writes the files, with receipts, as fetch would."""
        self.raw.mkdir(parents=True, exist_ok=True)
        for split, lines in self.tables.items():
            (self.raw / f"{split}.csv").write_text("".join(f"{line}\n" for line in lines))
        holder = self.raw / f"images.{self.kind}"
        write(holder, self.kind, {f"images/{name}": data for name, data in self.images.items()})
        files = []
        for name in [*(f"{split}.csv" for split in self.tables), holder.name]:
            digest = sha256_file(self.raw / name)
            (self.raw / f"{name}.sha256").write_text(f"{digest}  {name}\n")
            files.append(SourceFile(name, (self.raw / name).stat().st_size, digest))
        return Manifest(
            reference="beasts.toml",
            name="beasts",
            title="Beasts",
            version="1",
            licence="none",
            homepage="none",
            citation="none",
            files=tuple(files),
            reader=self.reader,
            image=ImageRecipe(8, 3, "lanczos", invert=False, bank_sha256={}),
            rotations="none",
            split_scheme="csv",
            schemes={"csv": SplitScheme("csv", "as the files say", {}, {}, by_files=True)},
        )

    def bank(self, workers: int = 1) -> Bank:
        return make_bank(self.manifest(), self.root, workers=workers)

    def faults(self) -> list[str]:
        """Of the report when a bank is made."""
        with pytest.raises(DatasetError) as caught:
            self.bank()
        folder = DatasetFolder(self.root, "beasts")
        assert not list(folder.path.glob("*.part")), "nothing half-made is left"
        assert all(fault.text in str(caught.value) for fault in caught.value.faults[:20])
        return [fault.text.replace(f"{self.raw}/", "") for fault in caught.value.faults]


def write(path: Path, kind: str, files: Mapping[str, bytes]) -> None:
    items = list(files.items())
    random.Random(0).shuffle(items)  # no container promises an order
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as container:
            for name, data in items:
                container.writestr(zipfile.ZipInfo(name), data)
        return
    with tarfile.open(path, "w:gz" if kind.endswith("gz") else "w") as tar:
        for name, data in items:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def beasts(tmp_path: Path) -> Made:
    """Five classes of unequal size in three splits; one image is grey, one a JPEG."""
    chance = np.random.default_rng(0)
    tables: dict[str, list[str]] = {split: ["filename,label"] for split in CLASSES}
    images = {}
    for split, classes in CLASSES.items():
        for label, count in classes.items():
            for number in range(count):
                name = f"{label}{number}.{'jpg' if number == 1 else 'png'}"
                tables[split].append(f"{name},{label}")
                shape = (12, 12) if number == 0 else (12, 12, 3)
                kind = "JPEG" if number == 1 else "PNG"
                images[name] = encoded(chance.integers(0, 256, shape, dtype=np.uint8), kind)
    return Made(tmp_path / "root", tables, images)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tgz"])
def test_the_bank_is_the_same_whatever_holds_the_images(kind: str, beasts: Made):
    """Every image by Pillow alone, in the canonical order; splits and class sizes from the CSV files."""
    beasts.kind = kind
    bank = beasts.bank()
    assert bank.class_names == ("ape", "bee", "cat", "dog", "emu")
    assert bank.class_splits == ("test", "test", "train", "train", "val")
    assert bank.class_offsets == (0, 4, 7, 10, 15, 17)
    for row, name in enumerate(sorted(beasts.images)):
        with Image.open(io.BytesIO(beasts.images[name])) as image:
            expected = image.convert("RGB").resize((8, 8), Image.Resampling.LANCZOS)
        assert np.array_equal(bank.open_images()[row], np.asarray(expected)), name
    manifest = beasts.manifest()
    division = divide(manifest.scheme(), bank.class_names, "beasts", bank.class_splits)
    assert division == {"train": (2, 3), "val": (4,), "test": (0, 1)}


def test_statistics_are_those_of_the_pixels(beasts: Made):
    """The exact sums of each class; mean and deviation of the train split as NumPy has them."""
    bank = beasts.bank(workers=2)
    images = bank.open_images().astype(np.int64)
    for c, (start, stop) in enumerate(zip(bank.class_offsets, bank.class_offsets[1:], strict=False)):
        for channel, (total, squares) in enumerate(bank.class_sums[c]):
            values = images[start:stop, :, :, channel]
            assert (total, squares) == (values.sum(), (values**2).sum())
    train = images[7:15].reshape(-1, 3) / 255
    mean, std = bank.normalization((2, 3))
    assert np.allclose(mean, train.mean(0), atol=5e-7)
    assert np.allclose(std, train.std(0), atol=5e-7)


def test_episodes_of_unequal_classes(beasts: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three and five images: every row stays in its class."""
    bank = beasts.bank()
    manifest = beasts.manifest()
    monkeypatch.setattr("mamldata.sources.live.load_manifest", lambda _: manifest)
    source = live("beasts.toml", "train", n_way=2, k_shot=1, k_query=2, root=beasts.root)
    drawn = source.sampler.sample(0, 200)
    for way in drawn.reshape(-1, 4):
        start, stop = {0: (7, 10), 1: (10, 15)}[int(way[0])]
        assert all(start <= row < stop for row in way[1:])
        assert len(set(way[1:].tolist())) == 3
    assert source.info.normalization == bank.normalization((2, 3))


# --- every fault


def change(split: str, line: int, text: str | None) -> Callable[[Made], None]:
    """Another text in a line of a CSV file, counted from 1; None takes it out."""

    def act(made: Made) -> None:
        lines = made.tables[split]
        lines[line - 1 : line] = [] if text is None else [text]

    return act


def image(name: str, data: bytes | None) -> Callable[[Made], None]:
    def act(made: Made) -> None:
        made.images.pop(name)
        if data is not None:
            made.images[name] = data

    return act


BOMB = b"P6\n10000 10000\n255\n" + bytes(100)
FAULTS = [
    (change("train", 1, "file,class"), ["train.csv, line 1: the header is 'file,class', not 'filename,label'"]),
    (change("val", 2, "emu0.png"), ["val.csv, line 2: 1 fields, expected a file name and a label"]),
    (change("val", 2, "emu0.png,emu,1"), ["val.csv, line 2: 3 fields, expected a file name and a label"]),
    (change("val", 2, "emu0.png,"), ["val.csv, line 2: the label is empty"]),
    (change("val", 2, ",emu"), ["val.csv, line 2: the filename is empty"]),
    (change("val", 2, "../emu0.png,emu"), ["val.csv, line 2: '../emu0.png' points outside the images' folder"]),
    (change("val", 2, "/etc/passwd,emu"), ["val.csv, line 2: '/etc/passwd' points outside the images' folder"]),
    (change("val", 2, "emu0.png,../emu"), ["val.csv, line 2: '../emu' is not a valid class name"]),
    (change("val", 2, '"emu0.png,emu'), ["val.csv, line 3: unexpected end of data", "val.csv: it names no image"]),
    (change("train", 3, "cat0.png,cat"), ["train.csv, line 3: cat0.png is already in train.csv, line 2"]),
    (
        change("val", 2, "cat0.png,emu"),
        ["val.csv, line 2: cat0.png is already in train.csv, line 2"],
    ),
    (
        change("test", 2, "ape0.png,dog"),
        ["test.csv, line 2: the class dog is also in train.csv, line 5, which is another split"],
    ),
    (change("test", 2, "ape9.png,ape"), ["test.csv, line 2: there is no image ape9.png"]),
    (image("dog2.png", None), ["train.csv, line 7: there is no image dog2.png"]),
    (
        image("dog2.png", b"<html>not found</html>"),
        ["train.csv, line 7: images.zip, images/dog2.png: not an image in a supported format"],
    ),
    (image("dog2.png", b""), ["train.csv, line 7: images.zip, images/dog2.png: not an image in a supported format"]),
    (
        image("dog2.png", encoded(np.full((64, 64, 3), 7, dtype=np.uint8))[:60]),
        ["train.csv, line 7: images.zip, images/dog2.png: "],
    ),
    (image("dog2.png", BOMB), ["train.csv, line 7: images.zip, images/dog2.png: 10000x10000 pixels are more than"]),
]


@pytest.mark.parametrize(("act", "expected"), FAULTS)
def test_each_fault_is_told_with_file_and_line(act: Callable[[Made], None], expected: list[str], beasts: Made):
    """One change, and the report that it makes."""
    act(beasts)
    found = beasts.faults()
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True)), found


def test_a_table_of_too_many_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Lines of two bytes would each be a fault of some hundred; the table is one."""
    monkeypatch.setattr(csv_splits, "_MOST_LINES", 5)
    found: list[Fault] = []
    (tmp_path / "a.csv").write_text("filename,label\n" + "x\n" * 4)
    read_rows(tmp_path / "a.csv", "train", found.append)
    assert len(found) == 5
    assert not any("lines" in fault.text for fault in found)
    (tmp_path / "a.csv").write_text("filename,label\n" + "1.png,a\n" * 5)
    assert read_rows(tmp_path / "a.csv", "train", found.append) == []
    assert found[-1].text == "a.csv: more than 5 lines"


def test_two_rows_that_mean_one_image(beasts: Made):
    """One of them must mean another image, which is not there; it is not taken twice."""
    beasts.images["more/dog2.png"] = beasts.images.pop("dog2.png")
    beasts.tables["train"].append("more/dog2.png,dog")
    (fault,) = beasts.faults()
    assert fault == (
        "train.csv, line 10: more/dog2.png means the same image as dog2.png in train.csv, line 7: "
        "images.zip/images/more/dog2.png"
    )


def test_a_name_that_is_the_end_of_another(beasts: Made):
    """What has the very name of a row is meant before what only ends in it, as in a tar of collected images."""
    beasts.tables["train"].append("images/dog2.png,dog")
    beasts.images["images/dog2.png"] = beasts.images["cat0.png"]
    beasts.tables["train"] = [line.replace("dog2.png", "images/dog2.png", 1) for line in beasts.tables["train"]]
    beasts.tables["train"][-1] = "images/images/dog2.png,dog"
    assert beasts.bank().class_offsets == (0, 4, 7, 10, 16, 18)


def test_an_image_twice_in_the_container(beasts: Made):
    """Two files that end alike: which one is meant?"""
    beasts.images["more/dog2.png"] = beasts.images["dog2.png"]
    (fault,) = beasts.faults()
    assert fault.startswith("train.csv, line 7: dog2.png exists more than once: images.zip/images/")


def test_a_missing_table(beasts: Made):
    """Two CSV files in place of three."""
    del beasts.tables["val"]
    assert beasts.faults() == ["there is no val.csv among the raw files"]


def test_a_table_that_is_no_text(beasts: Made):
    """Latin-1, or an archive under a table's name."""
    manifest = beasts.manifest()
    (beasts.raw / "val.csv").write_bytes(b"filename,label\nemu\xe9.png,emu\n")
    files = [beasts.raw / file.name for file in manifest.files]
    (fault,) = index_images(CSV, files).faults
    assert fault.text.startswith("val.csv: not UTF-8 text")


def test_a_byte_order_mark_and_carriage_returns(beasts: Made):
    """What Excel writes is read."""
    expected = beasts.bank().sha256
    beasts.tables["val"] = ["\ufefffilename,label\r", *(f"{line}\r" for line in beasts.tables["val"][1:])]
    assert beasts.bank().sha256 == expected


def test_all_faults_at_once(beasts: Made):
    """Of tables, classes and images, in one report; images are looked at although the tables are wrong."""
    for act in (
        change("val", 2, "emu0.png"),
        change("test", 3, "ape9.png,ape"),
        change("test", 2, "ape0.png,dog"),
        image("dog2.png", b"x"),
        image("cat0.png", BOMB),
    ):
        act(beasts)
    found = beasts.faults()
    assert [text.split(":")[0] for text in found] == [
        "val.csv, line 2",
        "test.csv, line 2",
        "test.csv, line 3",
        "train.csv, line 2",
        "train.csv, line 7",
    ]


def test_many_faults_are_counted(beasts: Made):
    """The report shows the first of each kind and says how many there are."""
    beasts.tables["test"] += [f"ape{number}.png,ape" for number in range(100, 150)]
    with pytest.raises(DatasetError) as caught:
        beasts.bank()
    text = str(caught.value)
    assert "beasts has 50 faults:" in text
    assert text.count("there is no image") == 20
    assert "… and 30 more like these" in text
    assert len(caught.value.faults) == 50


def test_damaged_images_can_be_left_out(beasts: Made):
    """They are listed in the bank's JSON; the others keep their pixels and order. Other faults are still fatal."""
    whole = beasts.bank().open_images().copy()
    rows = {name: row for row, name in enumerate(sorted(beasts.images))}
    beasts.reader = replace(CSV, damaged="leave-out")
    for act in (image("dog2.png", b"x"), image("ape0.png", BOMB), image("emu1.jpg", None)):
        act(beasts)
    bank = beasts.bank(workers=2)
    gone = [rows[name] for name in ("dog2.png", "ape0.png", "emu1.jpg")]
    assert np.array_equal(bank.open_images(), np.delete(whole, gone, axis=0))
    assert bank.class_offsets == (0, 3, 6, 9, 13, 14)
    described = json.loads(bank.path.with_suffix(".json").read_bytes())
    assert [text.split(":")[0] for text in described["left_out"]] == [
        "val.csv, line 3",
        "test.csv, line 2",
        "train.csv, line 7",
    ]
    assert tuple(described["left_out"]) == bank.left_out
    assert beasts.bank().sha256 == bank.sha256

    change("val", 2, "emu0.png")(beasts)
    assert beasts.faults() == ["val.csv, line 2: 1 fields, expected a file name and a label"]


def test_damage_is_remembered_by_an_interrupted_bank(beasts: Made, monkeypatch: pytest.MonkeyPatch):
    """What an earlier process found damaged is left out by the one that goes on."""
    monkeypatch.setattr(banks, "_TASK_IMAGES", 3)
    beasts.reader = replace(CSV, damaged="leave-out")
    image("bee1.jpg", b"x")(beasts)
    manifest = beasts.manifest()
    expected = make_bank(manifest, beasts.root).sha256
    DatasetFolder(beasts.root, "beasts").bank_json(8).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(banks, "_measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_bank(manifest, beasts.root)
    # Before rows were taken out of it, every piece was done.
    again = make_bank(manifest, beasts.root)
    assert (again.sha256, len(again.left_out)) == (expected, 1)

    DatasetFolder(beasts.root, "beasts").bank_json(8).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(banks, "_drop_rows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_bank(manifest, beasts.root)
    decoded: list[int] = []
    write_piece = banks._write_piece
    monkeypatch.setattr(banks, "_write_piece", lambda piece: (decoded.append(1), write_piece(piece))[1])
    again = make_bank(manifest, beasts.root)
    assert (again.sha256, len(again.left_out), decoded) == (expected, 1, [])


def test_the_class_folders_reader_takes_splits_from_folders(tmp_path: Path):
    """``split/class/image`` at any depth below; a class in two splits, and a folder that is no split, are faults."""
    classes = [f"{split}/{label}" for split, labels in CLASSES.items() for label in labels]
    files = {f"x/{home}/{number}.png": b"x" for home in classes for number in (0, 1)}
    write(tmp_path / "a.tar", "tar", files)
    recipe = ReaderRecipe("class-folders", splits=True)
    index = index_images(recipe, [tmp_path / "a.tar"])
    assert not index.faults
    assert [(name, split) for name, split, _ in index.classes()] == [
        ("ape", "test"),
        ("bee", "test"),
        ("cat", "train"),
        ("dog", "train"),
        ("emu", "val"),
    ]
    write(tmp_path / "b.tar", "tar", {**files, "x/val/cat/0.png": b"x", "x/valid/fox/0.png": b"x"})
    found = index_images(recipe, [tmp_path / "b.tar"]).faults
    texts = {fault.text.replace(str(tmp_path / "b.tar"), "b.tar") for fault in found}
    assert "b.tar, x/valid/fox/0.png: 'valid' is not one of train, val, test" in texts
    (shared,) = [fault for fault in found if fault.kind == "class"]
    assert "the class 'cat' is in 'train' and 'val'" in shared.text


def test_a_fault_is_data():
    """Programs can tell the kinds apart."""
    error = DatasetError("x", [Fault("image", "one"), Fault("table", "two")], "Mend them.")
    assert str(error) == "x has 2 faults:\n  one\n  two\nMend them."
    assert error.exit_code == 1


@pytest.mark.real_data
def test_the_genuine_split_files(real_data: Path):
    """MiniImagenet's own: 64, 16 and 20 classes of 600, and not one fault but that the images are not there."""
    manifest = load_manifest("mini-imagenet")
    files = [real_data / "mini-imagenet" / file.name for file in manifest.files]
    for file, path in zip(manifest.files, files, strict=True):
        assert sha256_file(path) == file.sha256
        assert path.stat().st_size == file.bytes
    faults = index_images(manifest.reader, files).faults
    assert {fault.kind for fault in faults} == {"missing"}
    assert len(faults) == 60_000


@pytest.mark.real_data
def test_the_worked_example(real_data: Path, tmp_path: Path):
    """30,000 real photographs, a few of them grey: the golden bank, and splits of 64, 16 and 20 classes of 300."""
    manifest = load_manifest(str(Path(__file__).parents[3] / "examples" / "tiny-imagenet.toml"))
    fetch(manifest, tmp_path, [str(real_data / "tiny-imagenet-fewshot")], offline=True)
    bank = make_bank(manifest, tmp_path, workers=2)
    assert bank.sha256 == "80e12b070d7bc43d85f3f9592a7daaef93c7c97a66740a0148a83aee5b2a732f"
    assert bank.class_offsets == tuple(range(0, 30_001, 300))
    division = divide(manifest.scheme(), bank.class_names, bank.name, bank.class_splits)
    assert [len(division[split]) for split in ("train", "val", "test")] == [64, 16, 20]
