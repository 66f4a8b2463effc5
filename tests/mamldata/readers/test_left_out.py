"""What is not taken for an image is counted and named: no file and no class vanishes without a word."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mamldata.archive.build import build
from mamldata.archive.plan import BuildRequest
from mamldata.bank import make as banks
from mamldata.bank.format import Bank, described
from mamldata.bank.inventory import files_left_out_of
from mamldata.bank.make import files_left_out, make_bank
from mamldata.datasets.load import load_manifest
from mamldata.datasets.manifest import Manifest
from mamldata.errors import DamagedError, DatasetError, RequestError
from mamldata.fetching.act import fetch
from mamldata.fetching.author import write_manifest
from mamldata.readers.image import ReaderRecipe
from mamldata.readers.index import index_images
from mamldata.readers.left_out import LeftOut

STRAY = (
    "README.txt",
    "a/1.HEIC",
    "a/.DS_Store",
    "a/Thumbs.db",
    "__MACOSX/a/._0.png",
    "b/notes.txt",
    "above/readme.txt",
    "flowers/1.heic",
    "flowers/2.heic",
    "deep/er/x.heic",
    "loose.png",
)
LEFT_OUT = (
    LeftOut("no image", 7, {".heic": 4, ".txt": 3}, ("README.txt", "a/1.HEIC", "above/readme.txt")),
    LeftOut("no class", 1, {}, ("loose.png",)),
    LeftOut("hidden", 3),
    LeftOut("folder without images", 2, {}, ("deep/er", "flowers")),
)


def photos(folder: Path, stray: Sequence[str] = STRAY) -> Path:
    """Two images of each of four classes, and files that are none."""
    for number, label in enumerate(("a", "b", "c", "above/d")):
        (folder / label).mkdir(parents=True)
        for n in range(2):
            Image.fromarray(np.full((9, 9), 20 * number + n, dtype=np.uint8)).save(folder / label / f"{n}.png")
    for name in stray:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def zipped(folder: Path, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as box:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            box.write(file, file.relative_to(folder))
    return path


def fetched(place: Path) -> Manifest:
    """The manifest of a zip of such photographs, which is under the root."""
    zipped(photos(place / "away"), place / "packed" / "a.zip")
    manifest = write_manifest(place / "packed", place / "mine.toml")
    fetch(manifest, place / "root", [str(place / "packed")], offline=True)
    return manifest


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_files_that_are_no_images(kind: str, tmp_path: Path):
    """By reason, with endings and the first names; classes of such files only are named, hidden files counted."""
    place = photos(tmp_path / "p")
    if kind == "zip":
        place = zipped(place, tmp_path / "p.zip")
    index = index_images(ReaderRecipe("class-folders", depth=0), [place])
    assert len(index.images) == 8
    found = {group.why: group for group in index.left_out}
    assert found.keys() == {group.why for group in LEFT_OUT}
    for group in LEFT_OUT:
        got = found[group.why]
        assert (got.count, got.endings, sorted(got.names)) == (group.count, group.endings, sorted(group.names))


def test_the_text():
    """One line that says how many, what, and which."""
    assert [str(group) for group in LEFT_OUT] == [
        "7 files that are not read as images (.heic 4, .txt 3): README.txt, a/1.HEIC, above/readme.txt, …",
        "1 image outside all class folders: loose.png",
        "3 hidden files",
        "2 folders of files without any image: deep/er, flowers",
    ]
    assert [LeftOut.from_values(json.loads(json.dumps(group.to_values()))) for group in LEFT_OUT] == list(LEFT_OUT)


def test_names_are_shown_in_one_line(tmp_path: Path):
    """Long ones are cut off, and what would move the cursor is spelt out; of many endings some are told."""
    folder = photos(tmp_path / "p", ())
    for name in ("\x1b[2J\n", "x" * 250, *(f"y.{n:02}" for n in range(30))):
        (folder / "a" / name).write_bytes(b"x")
    (group,) = index_images(ReaderRecipe("class-folders"), [folder]).left_out
    assert group.count == 32
    assert group.names[:2] == (r"a/\x1b[2J\n", f"a/{'x' * 98}…")
    assert len(group.endings) == 8


def test_a_link_to_a_folder_in_a_zip(tmp_path: Path):
    """It is no image by its name; which one it is, is told."""
    path = zipped(photos(tmp_path / "p", ()), tmp_path / "p.zip")
    link = zipfile.ZipInfo("e")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as box:
        box.writestr(link, "a")
    (group,) = index_images(ReaderRecipe("class-folders"), [path]).left_out
    assert str(group) == "1 link or folder that cannot be followed: e"


def test_a_class_that_is_a_link_to_nowhere(tmp_path: Path):
    """Of a folder, as after a disk was not mounted."""
    folder = photos(tmp_path / "p", ())
    (folder / "e").symlink_to(tmp_path / "nowhere")
    (group,) = index_images(ReaderRecipe("class-folders"), [folder]).left_out
    assert str(group) == "1 link or folder that cannot be followed: e"


def test_a_link_to_nothing_that_is_an_image_by_its_name(tmp_path: Path):
    """It is a fault of that image, named with the others."""
    path = zipped(photos(tmp_path / "p", ()), tmp_path / "packed" / "p.zip")
    link = zipfile.ZipInfo("a/x.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as box:
        box.writestr(link, "/etc/passwd")
    manifest = write_manifest(tmp_path / "packed", tmp_path / "mine.toml")
    fetch(manifest, tmp_path / "root", [str(tmp_path / "packed")], offline=True)
    with pytest.raises(DatasetError, match=r"a/x\.png: it is a link to '/etc/passwd', which points outside"):
        make_bank(manifest, tmp_path / "root")


def test_no_image_at_all(tmp_path: Path):
    """The message tells what there was instead."""
    for name in ("a/1.heic", "b/1.heic"):
        (tmp_path / "p" / name).parent.mkdir(parents=True)
        (tmp_path / "p" / name).write_bytes(b"x")
    told = r"Left out: 2 files that are not read as images \(\.heic 2\): a/1\.heic, b/1\.heic"
    with pytest.raises(RequestError, match=told):
        load_manifest(str(tmp_path / "p"))
    with pytest.raises(DamagedError, match=told):
        index_images(ReaderRecipe("class-folders"), [zipped(tmp_path / "p", tmp_path / "p.zip")])
    Image.new("L", (9, 9)).save(tmp_path / "p" / "a" / "1.png")
    with pytest.raises(RequestError, match=rf"has images of 1 class.*{told}"):
        load_manifest(str(tmp_path / "p"))


def test_a_bank_notes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A later call knows them without looking at the raw files; an archive's bank is found by its digest."""
    manifest, root = fetched(tmp_path), tmp_path / "root"
    bank = make_bank(manifest, root)
    assert {group.why: group.count for group in bank.files_left_out or ()} == {
        group.why: group.count for group in LEFT_OUT
    }
    request = BuildRequest(n_way=2, k_query=1, episodes={"train": 1})
    archive = build(manifest, bank, tmp_path / "archive", request)
    monkeypatch.setattr(banks, "index_images", None)
    assert files_left_out(manifest, make_bank(manifest, root), root) == bank.files_left_out
    assert files_left_out_of(archive.dataset, archive.image_shape[0], archive.bank_sha256, root) == bank.files_left_out
    assert (
        files_left_out_of(archive.dataset, archive.image_shape[0], archive.bank_sha256, tmp_path / "elsewhere") is None
    )
    bank.path.with_suffix(".json").write_text("{}")
    assert files_left_out_of(archive.dataset, archive.image_shape[0], archive.bank_sha256, root) is None


def without_note(bank: Bank) -> None:
    """Make a bank's description one of an earlier version."""
    path = bank.path.with_suffix(".json")
    description = json.loads(path.read_bytes())
    del description["description_sha256"], description["files_left_out"]
    path.write_bytes(described(description))


def test_a_bank_of_an_earlier_version(tmp_path: Path):
    """It is opened as it is, and what it does not say is looked up in the raw files."""
    manifest, root = fetched(tmp_path), tmp_path / "root"
    noted = (bank := make_bank(manifest, root)).files_left_out
    without_note(bank)
    made = bank.path.stat().st_mtime_ns
    bank = make_bank(manifest, root)
    assert (bank.files_left_out, bank.path.stat().st_mtime_ns) == (None, made)
    assert files_left_out(manifest, bank, root) == noted


def test_the_bank_does_not_depend_on_them(tmp_path: Path):
    """Not its bytes; and in a folder they come and go while it stays, and are told as they are."""
    folder, root = photos(tmp_path / "p"), tmp_path / "root"
    manifest = load_manifest(str(folder))
    bank = make_bank(manifest, root, 8)
    made = bank.path.stat().st_mtime_ns
    (folder / "flowers" / "3.heic").write_bytes(b"x")
    again = make_bank(manifest, root, 8)
    assert (again.sha256, again.path.stat().st_mtime_ns) == (bank.sha256, made)
    assert next(iter(files_left_out(manifest, again, root))).count == 8
    clean = make_bank(load_manifest(str(photos(tmp_path / "clean", ()))), root, 8)
    assert (clean.sha256, clean.files_left_out) == (bank.sha256, ())


def test_damaged_images_that_a_manifest_leaves_out(tmp_path: Path):
    """They are told with the others."""
    folder = photos(tmp_path / "away", ())
    (folder / "a" / "1.png").write_bytes(b"x")
    zipped(folder, tmp_path / "packed" / "a.zip")
    write_manifest(tmp_path / "packed", tmp_path / "mine.toml")
    text = (tmp_path / "mine.toml").read_text().replace("[reader]", '[reader]\ndamaged = "leave-out"')
    (tmp_path / "mine.toml").write_text(text)
    manifest = load_manifest(str(tmp_path / "mine.toml"))
    fetch(manifest, tmp_path / "root", [str(tmp_path / "packed")], offline=True)
    bank = make_bank(manifest, tmp_path / "root")
    (group,) = files_left_out(manifest, bank, tmp_path / "root")
    assert str(group).startswith("1 image that is missing or cannot be read: ")
    without_note(bank)
    assert files_left_out(manifest, make_bank(manifest, tmp_path / "root"), tmp_path / "root") == (group,)
