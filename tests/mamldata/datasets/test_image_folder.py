"""A folder of one's own images: a dataset with no manifest to write, and a bank that follows what is in it."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from mamldata.archive.build import build
from mamldata.archive.plan import BuildRequest
from mamldata.bank.make import make_bank
from mamldata.bank.verify import verify_dataset
from mamldata.datasets.image_folder import dataset_name, folder_manifest, seeded_counts
from mamldata.datasets.load import load_manifest
from mamldata.errors import DamagedError, DataMissingError, DatasetError, RequestError
from mamldata.io import atomic
from mamldata.progress import silent
from mamldata.sampling.splits import divide
from mamldata.sources.live import live

SIZES = {f"kind {letter}": 3 + number for number, letter in enumerate("abcdefghij")}


def photos(folder: Path, sizes: Mapping[str, int] = SIZES) -> Path:
    """JPEGs of noise, in one folder for each class."""
    chance = np.random.default_rng(0)
    for name, count in sizes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(chance.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / name / f"{number}.jpg")
    return folder


def test_classes_are_divided_as_stated(tmp_path: Path):
    """64, 16 and 20 % of the classes, drawn with the seed 0; classes keep their unequal sizes."""
    manifest = load_manifest(str(photos(tmp_path / "My Photos")))
    assert (manifest.name, manifest.split_scheme, manifest.rotations) == ("my-photos", "seeded", "none")
    assert manifest.scheme().description == "7/1/2 classes at random, seed 0"
    bank = make_bank(manifest, tmp_path / "root")
    assert bank.shape == (sum(SIZES.values()), 84, 84, 3)
    assert [stop - start for start, stop in zip(bank.class_offsets, bank.class_offsets[1:], strict=False)] == [
        SIZES[name] for name in bank.class_names
    ]
    division = divide(manifest.scheme(), bank.class_names, manifest.name)
    assert {split: len(classes) for split, classes in division.items()} == {"train": 7, "val": 1, "test": 2}


@pytest.mark.parametrize(
    ("classes", "expected"), [(3, (1, 1, 1)), (5, (3, 1, 1)), (100, (64, 16, 20)), (1000, (640, 160, 200))]
)
def test_the_shares(classes: int, expected: tuple[int, ...]):
    """At least one class each."""
    assert tuple(seeded_counts(classes).values()) == expected


def test_folders_that_are_splits(tmp_path: Path):
    """train, val and test above the classes are taken as they are."""
    for split, classes in {"train": ["a", "b"], "val": ["c"], "test": ["deep/d"]}.items():
        photos(tmp_path / "p" / split, dict.fromkeys(classes, 2))
    manifest = load_manifest(str(tmp_path / "p"))
    assert manifest.scheme().description == "2/1/1 classes, as their folders say"
    bank = make_bank(manifest, tmp_path / "root", 8)
    assert bank.class_names == ("a", "b", "c", "deep/d")
    assert bank.class_splits == ("train", "train", "val", "test")


def test_the_same_class_below_two_splits(tmp_path: Path):
    """As folders for plain classifiers have it: few-shot splits share no class."""
    for split in ("train", "val", "test"):
        photos(tmp_path / "p" / split, {"cat": 2, split: 2})
    with pytest.raises(DatasetError, match=r"class 'cat' is in 'test' and 'train' and 'val'; splits share no class"):
        make_bank(load_manifest(str(tmp_path / "p")), tmp_path / "root", 8)


def test_photographs_are_turned_upright(tmp_path: Path):
    """As the camera noted: EXIF orientation 6 is a quarter turn."""
    folder = photos(tmp_path / "p")
    picture = Image.fromarray(np.zeros((84, 84, 3), dtype=np.uint8))
    picture.paste((255, 255, 255), (0, 0, 84, 42))  # white above
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "kind a" / "0.jpg", exif=exif, quality=95)
    pixels = make_bank(load_manifest(str(folder)), tmp_path / "root").open_images()[0]
    assert pixels[:, 50:].mean() > 240 > 15 > pixels[:, :34].mean(), "white on the right"


def test_the_bank_follows_the_folder(tmp_path: Path):
    """An image added, changed or removed makes a new bank; a file merely touched or listed again does not."""
    folder, root = photos(tmp_path / "p"), tmp_path / "root"
    first = make_bank(load_manifest(str(folder)), root, 8)
    made = first.path.stat().st_mtime_ns

    os.utime(folder / "kind b" / "0.jpg", ns=(1, 1))
    (folder / "notes.txt").write_text("no image")
    assert make_bank(load_manifest(str(folder)), root, 8).path.stat().st_mtime_ns == made
    assert verify_dataset(load_manifest(str(folder)), root) == []

    shutil.copyfile(folder / "kind a" / "1.jpg", folder / "kind a" / "9.jpg")
    (problem,) = verify_dataset(load_manifest(str(folder)), root)
    assert "is not what p-" in problem
    more = make_bank(load_manifest(str(folder)), root, 8)
    assert more.shape[0] == first.shape[0] + 1
    (folder / "kind a" / "9.jpg").unlink()
    assert make_bank(load_manifest(str(folder)), root, 8).sha256 == first.sha256
    stored = (folder / "kind c" / "0.jpg").read_bytes()
    (folder / "kind c" / "0.jpg").write_bytes((folder / "kind d" / "0.jpg").read_bytes())
    assert make_bank(load_manifest(str(folder)), root, 8).sha256 != first.sha256
    (folder / "kind c" / "0.jpg").write_bytes(stored)
    assert make_bank(load_manifest(str(folder)), root, 8).sha256 == first.sha256


def test_a_folder_that_has_just_changed_is_not_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A later change could leave the same time: it is hashed again until it has been still for a while."""
    folder, root = photos(tmp_path / "p"), tmp_path / "root"
    monkeypatch.setattr(atomic, "_TICK_NS", 3600 * 10**9)
    note = make_bank(load_manifest(str(folder)), root, 8).path.parent / "folder.json"
    assert not note.exists()
    monkeypatch.setattr(atomic, "_TICK_NS", 0)
    make_bank(load_manifest(str(folder)), root, 8)
    assert note.exists()


def test_a_change_that_keeps_length_and_mtime_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The note counts only while the ctime of each image is the same, too."""
    monkeypatch.setattr(atomic, "_TICK_NS", 0)
    folder, root = photos(tmp_path / "p"), tmp_path / "root"
    first = make_bank(load_manifest(str(folder)), root, 8)
    small, image = sorted(folder.glob("kind */0.jpg"), key=lambda path: path.stat().st_size)[:: len(SIZES) - 1]
    before = image.stat()
    image.write_bytes(small.read_bytes().ljust(before.st_size, b"\0"))
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert make_bank(load_manifest(str(folder)), root, 8).sha256 != first.sha256


def test_a_folder_is_hashed_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whoever comes while another hashes it waits, and takes over what that one noted."""
    monkeypatch.setattr(atomic, "_TICK_NS", 0)
    folder, root = photos(tmp_path / "p"), tmp_path / "root"
    manifest = load_manifest(str(folder))
    note = make_bank(manifest, root, 8).path.parent / "folder.json"
    aside = note.rename(tmp_path / "aside")
    labels: list[str] = []

    def progress(label: str, total: int | None, unit: str) -> AbstractContextManager[Callable[[int], object]]:
        labels.append(label)
        return silent(label, total, unit)

    with ThreadPoolExecutor() as pool, FileLock(note.with_suffix(".lock")):
        later = pool.submit(make_bank, manifest, root, 8, progress=progress)
        with pytest.raises(TimeoutError):
            later.result(timeout=0.5)
        aside.rename(note)
    assert later.result().shape[0] > 0
    assert "hash" not in labels  # only the bank itself may be


def test_two_folders_of_one_name_do_not_meet(tmp_path: Path):
    """Both banks stay, and so does what is open."""
    root = tmp_path / "root"
    banks = [
        make_bank(load_manifest(str(photos(tmp_path / place / "data", sizes))), root, 8)
        for place, sizes in (("one", SIZES), ("two", dict.fromkeys(SIZES, 2)))
    ]
    assert banks[0].path != banks[1].path
    assert all(bank.path.exists() for bank in banks)


def test_a_folder_called_as_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A built-in name means the built-in dataset; the folder keeps a name of its own."""
    photos(tmp_path / "omniglot")
    monkeypatch.chdir(tmp_path)
    assert load_manifest("omniglot").title.startswith("Omniglot")
    assert load_manifest("./omniglot").name == "my-omniglot"


def test_an_archive_says_nothing_of_the_place(tmp_path: Path):
    """The same photographs at two places make the same archive."""
    archives = []
    for place in ("here", "there"):
        folder = photos(tmp_path / place / "photos")
        manifest = load_manifest(str(folder))
        bank = make_bank(manifest, tmp_path / "root", 8)
        request = BuildRequest(n_way=2, k_shot=1, k_query=2, episodes={"train": 5, "test": 3})
        archives.append(build(manifest, bank, tmp_path / place / "archive", request))
    assert archives[0].digest == archives[1].digest
    assert str(tmp_path) not in archives[0].to_json().decode()


def test_live_episodes(tmp_path: Path):
    """Streams straight from a folder."""
    folder = photos(tmp_path / "p")
    source = live(str(folder), n_way=2, k_shot=1, k_query=2, image_size=8, root=tmp_path / "root")
    assert source.info.image_shape == (8, 8, 3)
    assert len(source.class_labels(0)) == 2


# --- what people get wrong


def test_no_images_at_all(tmp_path: Path):
    """The message says how the images should lie."""
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "x.jpg").write_bytes(b"x")  # in no class's folder
    with pytest.raises(RequestError, match="class/image or split/class/image"):
        folder_manifest(tmp_path / "p")


def test_an_archive_is_no_folder_of_images(tmp_path: Path):
    """An archive where a dataset is asked for is called by its name."""
    (tmp_path / "archive.json").write_text("{}")
    with pytest.raises(RequestError, match=r"is an archive\. Give what it was built from"):
        folder_manifest(tmp_path)


def test_splits_by_other_names(tmp_path: Path):
    """``valid`` is no split here; rather than to take its classes for others, that is said."""
    for split in ("train", "valid", "test"):
        photos(tmp_path / "p" / split, {split: 2})
    with pytest.raises(RequestError, match=r"classes below test, train, but also 'valid', which is not train"):
        folder_manifest(tmp_path / "p")


def test_a_split_without_classes(tmp_path: Path):
    """The other ones can be built."""
    for split in ("train", "test"):
        photos(tmp_path / "p" / split, {f"{split}{n}": 3 for n in range(2)})
    manifest = load_manifest(str(tmp_path / "p"))
    bank = make_bank(manifest, tmp_path / "root", 8)
    with pytest.raises(RequestError, match=r"scheme 'folders', has no classes in val; it has classes in train, test"):
        build(manifest, bank, tmp_path / "a", BuildRequest(2, 1, 2, {"train": 3, "val": 1}))
    assert build(manifest, bank, tmp_path / "a", BuildRequest(2, 1, 2, {"train": 3, "test": 1})).digest


def test_too_few_classes(tmp_path: Path):
    """Three are the least that can be divided."""
    with pytest.raises(RequestError, match="has images of 2 classes; train, val and test need at least one each"):
        folder_manifest(photos(tmp_path / "p", {"a": 3, "b": 3}))


def test_damaged_images_are_all_named(tmp_path: Path):
    """Each with its file; nothing is left behind."""
    folder = photos(tmp_path / "p")
    for name in ("kind a/0.jpg", "kind c/2.jpg"):
        (folder / name).write_bytes(b"<html>")
    with pytest.raises(DatasetError, match="p has 2 faults") as caught:
        make_bank(load_manifest(str(folder)), tmp_path / "root", 8)
    assert "kind a/0.jpg: not an image in a supported format" in str(caught.value)
    assert "kind c/2.jpg: not an image in a supported format" in str(caught.value)
    assert "Repair or remove these files" in str(caught.value)


@pytest.mark.usefixtures("impatient")
def test_what_cannot_be_hashed_is_named_before_anything_is(tmp_path: Path):
    """A pipe, a device and a sparse file as long as a disk: all at once, and none of them is opened."""
    folder = photos(tmp_path / "p")
    os.mkfifo(folder / "kind a" / "pipe.jpg")
    (folder / "kind b" / "device.jpg").symlink_to("/dev/null")
    with (folder / "kind c" / "sparse.jpg").open("wb") as stream:
        stream.truncate(30_000_000_000)
    manifest = load_manifest(str(folder))
    with pytest.raises(DatasetError, match="p has 3 faults") as caught:
        make_bank(manifest, tmp_path / "root", 8)
    assert "kind a/pipe.jpg: not a regular file\n" in str(caught.value)
    assert "kind b/device.jpg: not a regular file\n" in str(caught.value)
    assert "kind c/sparse.jpg: it has 30,000,000,000 bytes; the limit for an image is 67,108,864" in str(caught.value)
    assert "Repair or remove these files" in str(caught.value)


def test_a_link_to_nowhere(tmp_path: Path):
    """It is named before anything is hashed."""
    folder = photos(tmp_path / "p")
    (folder / "kind a" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DamagedError, match=r"gone\.jpg cannot be read \(No such file"):
        make_bank(load_manifest(str(folder)), tmp_path / "root", 8)


def test_names_that_are_no_text(tmp_path: Path):
    """Of images and of the folder itself: all that are shown are named, and what to do."""
    folder = photos(tmp_path / "p")
    for number in range(7):
        (folder / "kind a" / os.fsdecode(b"%d\xe9.jpg" % number)).write_bytes(b"x")
    (folder / os.fsdecode(b"notes\xe9.txt")).write_bytes(b"what is no image does not matter")
    shown = ", ".join(rf"kind a/{number}\\udce9\.jpg" for number in range(5))
    with pytest.raises(RequestError, match=rf"names that are not UTF-8.*: {shown}, …\. Rename them"):
        load_manifest(str(folder))
    for path in (folder / "kind a").glob("?*[!0-9].jpg"):
        path.unlink()
    assert load_manifest(str(folder))
    folder.rename(tmp_path / os.fsdecode(b"p\xe9"))
    with pytest.raises(RequestError, match=r"p\\udce9 has names that are not UTF-8"):
        load_manifest(str(tmp_path / os.fsdecode(b"p\xe9")))


def test_a_link_to_the_folder_itself(tmp_path: Path):
    """It would make classes of classes; a link to another folder makes one."""
    folder = photos(tmp_path / "p")
    elsewhere = photos(tmp_path / "elsewhere", {"kind z": 4})
    (folder / "kind z").symlink_to(elsewhere / "kind z")
    assert make_bank(load_manifest(str(folder)), tmp_path / "root", 8).class_names[-1] == "kind z"
    (folder / "all").symlink_to(folder)
    with pytest.raises(DamagedError, match="p/all is a link to a folder that it lies in"):
        load_manifest(str(folder))


def test_verify_before_there_is_a_bank(tmp_path: Path):
    """There is nothing to compare the folder with."""
    with pytest.raises(DataMissingError, match=r"There is no bank of .* yet"):
        verify_dataset(load_manifest(str(photos(tmp_path / "p"))), tmp_path / "root")


def test_names():
    """Any text makes a dataset's name."""
    assert [dataset_name(text) for text in ("My Photos!", "a__b", "été", "…")] == ["my-photos", "a-b", "t", "images"]


def test_encoded_images_are_what_pillow_says(tmp_path: Path):
    """Every format that a reader takes by its name, it can also read."""
    folder = photos(tmp_path / "p")
    for number, kind in enumerate(("PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")):
        stream = io.BytesIO()
        Image.fromarray(np.full((9, 9, 3), 40, dtype=np.uint8)).save(stream, kind)
        (folder / "kind a" / f"more{number}.{kind.lower()}").write_bytes(stream.getvalue())
    bank = make_bank(load_manifest(str(folder)), tmp_path / "root", 8)
    assert bank.class_offsets[1] == SIZES["kind a"] + 6
