"""Manifests written for files at hand: with them, others get the very same dataset."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mamldata.archive.build import build
from mamldata.archive.plan import BuildRequest
from mamldata.bank.make import make_bank
from mamldata.datasets.load import load_manifest
from mamldata.errors import DatasetError, FetchError, RequestError
from mamldata.fetching.act import fetch
from mamldata.fetching.author import write_manifest
from mamldata.sampling.splits import divide

CLASSES = {"train": ["ant", "bee"], "val": ["cow"], "test": ["dog"]}


def photos(folder: Path, prefix: str = "", mode: str = "RGB", side: int = 20) -> Path:
    """Two images of each of four classes: ``prefix/class/image``."""
    chance = np.random.default_rng(0)
    for label in (label for labels in CLASSES.values() for label in labels):
        home = folder / prefix / label
        home.mkdir(parents=True)
        for n in range(2):
            pixels = chance.integers(0, 256, (side, side, 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
            (image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)).save(home / f"{label}{n}.png")
    return folder


def zipped(folder: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as container:
        for file in sorted(folder.rglob("*.png")):
            container.write(file, file.relative_to(folder))


def tables(folder: Path) -> None:
    for split, labels in CLASSES.items():
        rows = [f"{label}{n}.png,{label}" for label in labels for n in range(2)]
        (folder / f"{split}.csv").write_text("\n".join(["filename,label", *rows, ""]))


def by_split(folder: Path) -> Path:
    for split, labels in CLASSES.items():
        for label in labels:
            (folder / split).mkdir(exist_ok=True)
            (folder / label).rename(folder / split / label)
    return folder


def make(kind: str, place: Path) -> Path:
    """A folder of files at hand."""
    folder = place / "Files at Hand"
    if kind == "loose classes":
        return photos(folder)
    if kind == "loose splits":
        return by_split(photos(folder))
    if kind == "loose with tables":
        photos(folder, "images")
        tables(folder)
        return folder
    zipped(by_split(photos(place / "away")) if kind == "zip of splits" else photos(place / "away"), folder / "a.zip")
    if kind == "zip with tables":
        tables(folder)
    return folder


KINDS = ("loose classes", "loose splits", "loose with tables", "zip", "zip of splits", "zip with tables")


@pytest.mark.parametrize("kind", KINDS)
def test_others_get_the_same_dataset(kind: str, tmp_path: Path):
    """Fetch by the manifest, at another place, gives the same bank; the splits are the files' where they have them."""
    folder = make(kind, tmp_path)
    out = tmp_path / "sub" / "mine.toml"
    written = write_manifest(folder, out)
    assert written.name == "files-at-hand"
    manifest = load_manifest(str(out))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere)
    fetch(manifest, tmp_path / "root", [str(elsewhere)], offline=True)
    bank = make_bank(manifest, tmp_path / "root")
    side = 84 if kind in {"loose classes", "loose splits"} else 20
    assert (bank.class_names, bank.shape) == (("ant", "bee", "cow", "dog"), (8, side, side, 3))
    given = kind not in {"loose classes", "zip"}
    assert bank.class_splits == (("train", "train", "val", "test") if given else ())
    assert manifest.scheme().by_files == given


def drawings(folder: Path, homes: Sequence[str]) -> Path:
    """Two images in each of these folders, which no two have in common."""
    for number, home in enumerate(homes):
        (folder / home).mkdir(parents=True, exist_ok=True)
        for n in range(2):
            pixels = np.full((9, 9), 20 * number + n, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / home / f"{number:02d}_{n}.png")
    return folder


NESTED = [f"alphabet{a}/character{c}" for a in range(3) for c in range(2)]


@pytest.mark.parametrize(
    "homes",
    [
        ["ant", "bee", "cow"],
        NESTED,
        [*NESTED, "ant", "bee"],
        [f"drawings/{home}" for home in NESTED],
        [f"images/{home}" for home in NESTED],
        ["images", "tables", "texts"],
        ["images/a", "images/b", "tables"],
        ["train/a/x", "train/b/x", "val/a/y", "test/c"],
        ["train/a", "train/b", "train/c"],
    ],
    ids=" ".join,
)
def test_loose_images_have_the_classes_of_the_folder(homes: list[str], tmp_path: Path):
    """The manifest of a folder, and the folder itself as a dataset: the same classes in the same splits."""
    folder = drawings(tmp_path / "Drawings", homes)
    manifest, itself = write_manifest(folder, tmp_path / "mine.toml"), load_manifest(str(folder))
    fetch(manifest, tmp_path / "root", [str(folder)], offline=True)
    banks = [make_bank(one, tmp_path / "root", 8) for one in (manifest, itself)]
    assert banks[0].class_names == banks[1].class_names
    assert len(banks[0].class_names) == len(homes)
    divisions = [
        divide(one.scheme(), bank.class_names, one.name, bank.class_splits)
        for one, bank in zip((manifest, itself), banks, strict=True)
    ]
    assert divisions[0] == divisions[1]


@pytest.mark.parametrize(
    ("boxes", "classes", "splits"),
    [
        ([["pets/cat", "pets/dog", "pets/emu"]], ["cat", "dog", "emu"], ()),
        ([[f"omni/{home}" for home in NESTED]], NESTED, ()),
        ([NESTED[:2], NESTED[2:]], NESTED, ()),
        ([["a/x", "a/y"], ["b/x", "b/y"]], ["a/x", "a/y", "b/x", "b/y"], ()),
        ([["cat"], ["dog"], ["emu"]], ["cat", "dog", "emu"], ()),
        ([["pets/cat", "pets/dog", "pets/birds/emu"]], ["pets/birds/emu", "pets/cat", "pets/dog"], ()),
        ([["pets/train/cat", "pets/val/dog", "pets/test/emu"]], ["cat", "dog", "emu"], ("train", "val", "test")),
        ([["train/x/cat"], ["val/dog"], ["test/emu"]], ["dog", "emu", "x/cat"], ("val", "test", "train")),
    ],
    ids=str,
)
def test_classes_in_archives(boxes: list[list[str]], classes: list[str], splits: tuple[str, ...], tmp_path: Path):
    """The folder that all of it was packed in is no part of a class's name; no two classes become one."""
    folder = tmp_path / "packed"
    for number, homes in enumerate(boxes):
        zipped(drawings(tmp_path / f"away{number}", homes), folder / f"{number}.zip")
    manifest = write_manifest(folder, tmp_path / "mine.toml")
    fetch(manifest, tmp_path / "root", [str(folder)], offline=True)
    bank = make_bank(manifest, tmp_path / "root", 8)
    assert (list(bank.class_names), bank.class_splits) == (classes, splits)
    if not splits:
        assert sum(manifest.scheme().counts.values()) == len(classes)


@pytest.mark.parametrize(
    ("homes", "message"),
    [
        (
            ["p/train/x/cat", "p/val/dog", "p/test/emu"],
            "different depths below p/train, val and test: pack",
        ),
        (["p/train/cat", "p/val/dog", "p/more/emu"], "has classes below train, val, but also 'more', which is not"),
    ],
)
def test_splits_that_cannot_be_described(homes: list[str], message: str, tmp_path: Path):
    """Rather than to divide anew what was divided."""
    zipped(drawings(tmp_path / "away", homes), tmp_path / "packed" / "a.zip")
    with pytest.raises(RequestError, match=message):
        write_manifest(tmp_path / "packed", tmp_path / "mine.toml")


@pytest.mark.parametrize("kind", KINDS)
def test_other_files_are_refused(kind: str, tmp_path: Path):
    """One image is another one: the manifest tells."""
    folder = make(kind, tmp_path)
    manifest = write_manifest(folder, tmp_path / "mine.toml")
    if (folder / "a.zip").exists():
        shutil.rmtree(tmp_path / "away")
        zipped(photos(tmp_path / "away", side=21), folder / "a.zip")
    else:
        next(folder.rglob("bee1.png")).write_bytes(next(folder.rglob("ant1.png")).read_bytes())
    with pytest.raises(FetchError, match=r"these are other images|another file came"):
        fetch(manifest, tmp_path / "root", [str(folder)], offline=True)


def test_a_repacked_zip_is_taken(tmp_path: Path):
    """By its content digest."""
    folder = make("zip", tmp_path)
    manifest = write_manifest(folder, tmp_path / "mine.toml")
    with zipfile.ZipFile(folder / "a.zip") as old:
        members = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in members[::-1]:
            new.writestr(name, data)
    (fetched,) = fetch(manifest, tmp_path / "root", [str(folder)], offline=True)
    assert fetched.checked_by == "content_sha256"


@pytest.mark.parametrize(
    ("mode", "side", "size", "channels"),
    [("L", 28, 28, 1), ("1", 105, 84, 1), ("LA", 28, 28, 1), ("I;16", 28, 28, 1), ("RGB", 200, 84, 3)],
)
def test_size_and_channels_are_the_images(mode: str, side: int, size: int, channels: int, tmp_path: Path):
    """Of those in archives small ones are not enlarged, large ones become what is usual; all are turned upright."""
    zipped(photos(tmp_path / "away", mode=mode, side=side), tmp_path / "p" / "a.zip")
    recipe = write_manifest(tmp_path / "p", tmp_path / "mine.toml").image
    assert (recipe.size, recipe.channels, recipe.upright) == (size, channels, True)


def test_what_is_there_is_not_overwritten(tmp_path: Path):
    """A manifest may have been filled in by hand."""
    folder = photos(tmp_path / "p")
    write_manifest(folder, tmp_path / "mine.toml", "my-name")
    assert load_manifest(str(tmp_path / "mine.toml")).name == "my-name"
    with pytest.raises(RequestError, match=r"mine\.toml already exists"):
        write_manifest(folder, tmp_path / "mine.toml")


def test_what_cannot_be_described(tmp_path: Path):
    """Each with what is missing; nothing is written."""
    out = tmp_path / "mine.toml"
    empty, flat, few, partly = (tmp_path / name for name in ("empty", "flat", "few", "partly"))
    empty.mkdir()
    photos(few)
    for label in ("ant", "bee"):
        shutil.rmtree(few / label)
    flat.mkdir()
    shutil.copyfile(few / "cow" / "cow0.png", flat / "cow0.png")
    make("loose with tables", tmp_path).rename(partly)
    (partly / "val.csv").unlink()
    for folder, message in {
        empty: "There are no images in .*empty",
        flat: "have no classes: put them into folders named after their classes",
        few: "need at least one class each; the images have 2",
        partly: "has train.csv, but not all of train.csv, val.csv, test.csv",
        tmp_path / "none": "is not a folder",
    }.items():
        with pytest.raises(RequestError, match=message):
            write_manifest(folder, out)
    (make("loose with tables", tmp_path) / "images" / "ant" / "ant0.png").unlink()
    with pytest.raises(DatasetError, match=r"train\.csv, line 2: there is no image ant0\.png"):
        write_manifest(tmp_path / "Files at Hand", out)
    assert not out.exists()


@pytest.mark.real_data
def test_the_worked_example(real_data: Path, tmp_path: Path):
    """The example in the docs has the digests that would be written for the real files."""
    example = load_manifest(str(Path(__file__).parents[3] / "examples" / "tiny-imagenet.toml"))
    written = write_manifest(real_data / "tiny-imagenet-fewshot", tmp_path / "mine.toml")
    assert [(file.name, file.sha256) for file in example.files] == [(file.name, file.sha256) for file in written.files]
    assert example.reader == written.reader


def photographs(folder: Path, homes: Sequence[str]) -> Path:
    """Four JPEGs in each of these folders, of unequal sizes; cameras noted that some were turned. The first is grey."""
    chance = np.random.default_rng(1)
    for home in homes:
        (folder / home).mkdir(parents=True)
        for n in range(4):
            exif = Image.Exif()
            exif[0x0112] = (1, 3, 6, 8)[n]
            pixels = chance.integers(0, 256, (30 + n, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / home / f"{n}.jpg", exif=exif)
    Image.new("L", (9, 9)).save(folder / homes[0] / "0.png")
    return folder


@pytest.mark.parametrize(
    "homes",
    [
        [f"kind {letter}" for letter in "ZaBc"] + ["Z/x", "Z-y/x"],
        ["train/b", "train/a", "val/c", "val/x/d", "test/e", "test/f"],
    ],
    ids=["classes", "splits"],
)
@pytest.mark.parametrize("name", ["Photos", "omniglot"])
def test_a_folders_manifest_gives_the_folders_archive(name: str, homes: list[str], tmp_path: Path):
    """Image by image, upright and of one size, and episode by episode; under a built-in dataset's name, too."""
    folder = photographs(tmp_path / name, homes)
    (folder / homes[0] / ".hidden.jpg").write_bytes(b"x")
    manifest, itself = write_manifest(folder, tmp_path / "mine.toml"), load_manifest(str(folder))
    fetch(manifest, tmp_path / "root", [str(folder)], offline=True)
    banks = [make_bank(one, tmp_path / "root") for one in (manifest, itself)]
    assert banks[0].path.read_bytes() == banks[1].path.read_bytes()
    assert banks[0].shape == (25, 84, 84, 3)
    request = BuildRequest(n_way=2, k_query=1, episodes={"train": 3})
    archives = [
        build(one, bank, tmp_path / f"archive-{bank.path.stem}", request)
        for one, bank in zip((manifest, itself), banks, strict=True)
    ]
    assert archives[0].digest == archives[1].digest
