"""Images that have no published hash: collected from every form that people have, checked, pinned; equal banks."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mamldata.bank.make import make_bank
from mamldata.bank.verify import verify_dataset
from mamldata.datasets.load import load_manifest
from mamldata.datasets.manifest import Manifest
from mamldata.errors import FetchError, WriteError
from mamldata.fetching.act import Fetched, fetch
from mamldata.fetching.plan import plan

CLASSES = {"train": ["n00000001", "n00000002"], "val": ["n00000003"], "test": ["n00000004"]}
PER_CLASS = 12  # of "ImageNet"; the dataset takes some of them
TAKEN = (1, 2, 5, 10, 12)

MANIFEST = """\
format = "mamldata-manifest/1"
name = "mini"
title = "Made up in MiniImagenet's likeness"
version = "1"
licence = "none"
homepage = "none"
citation = "none"
split_scheme = "csv"
{files}
[images]
how = "Ask for an account at example.org, and be patient."
[[images.forms]]
type = "pickled-arrays"
files = {{ train = ["cache-train.pkl"], val = ["cache-val.pkl", "cache-validation.pkl"], test = ["cache-test.pkl"] }}
[[images.forms]]
type = "by-position"
container = "all.tar"
digits = 8
[[images.forms]]
type = "by-name"
[reader]
type = "csv-splits"
[image]
size = 8
channels = 3
resampling = "lanczos"
[splits.csv]
description = "as the files say"
by = "files"
"""


@dataclass(frozen=True)
class World:
    """A made-up MiniImagenet and the ImageNet that it is of.

    Attributes:
        place: where its CSV files are, and forms are made.
        manifest: by path.
        imagenet: for each class its encoded images, in the order of their numbers.
    """

    place: Path
    manifest: Manifest
    imagenet: dict[str, list[bytes]]

    @property
    def named(self) -> dict[str, bytes]:
        """The dataset's images under its own names."""
        return {f"{label}{n:08d}.jpg": images[n - 1] for label, images in self.imagenet.items() for n in TAKEN}

    def fetch(self, root: Path, *places: Path, manifest: Manifest | None = None) -> Fetched:
        """The CSV files from their place, the images from ``places``; gives what came of the images."""
        sources = [str(place) for place in (self.place / "tables", *places)]
        return fetch(manifest or self.manifest, root, sources, offline=True)[-1]


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Twelve images of each of four classes; five of each are the dataset."""
    place = tmp_path / "place"
    (place / "tables").mkdir(parents=True)
    chance = np.random.default_rng(0)
    imagenet = {
        label: [jpeg(chance.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for _ in range(PER_CLASS)]
        for labels in CLASSES.values()
        for label in labels
    }
    files = ""
    for split, labels in CLASSES.items():
        rows = [f"{label}{n:08d}.jpg,{label}" for label in labels for n in TAKEN]
        data = "\n".join(["filename,label", *rows, ""]).encode()
        (place / "tables" / f"{split}.csv").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        files += f'[[files]]\nname = "{split}.csv"\nbytes = {len(data)}\nsha256 = "{digest}"\n'
    path = tmp_path / "mini.toml"
    path.write_text(MANIFEST.format(files=files))
    return World(place, load_manifest(str(path)), imagenet)


def jpeg(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


# --- the forms: each makes one below the world's place, and gives what is to be said after --from


def names_in_folder(world: World) -> Path:
    folder = world.place / "mini"
    (folder / "images").mkdir(parents=True)
    for name, data in world.named.items():
        (folder / "images" / name).write_bytes(data)
    (folder / "images" / "n0000000900000001.jpg").write_bytes(b"of no class here")
    return folder


def names_in_folder_itself(world: World) -> Path:
    return names_in_folder(world) / "images"


def names_in_zip(world: World) -> Path:
    folder = world.place / "zipped"
    folder.mkdir()
    with zipfile.ZipFile(folder / "mini-imagenet.zip", "w") as container:
        for name, data in world.named.items():
            container.writestr(f"mini-imagenet/images/{name}", data)
    (folder / "unrelated.zip").write_bytes(b"no zip at all")
    return folder


def names_in_tar(world: World, mode: str = "w", name: str = "mini.tar") -> Path:
    folder = world.place / "tarred"
    folder.mkdir()
    with tarfile.open(folder / name, mode) as tar:
        for image, data in world.named.items():
            add(tar, f"./images/{image}", data)
    return folder


def names_in_tar_gz(world: World) -> Path:
    return names_in_tar(world, "w:gz", "mini.tar.gz")


def names_in_a_zip_itself(world: World) -> Path:
    return names_in_zip(world) / "mini-imagenet.zip"


def names_in_three_zips(world: World) -> Path:
    folder = world.place / "parts"
    folder.mkdir()
    for part in range(3):
        with zipfile.ZipFile(folder / f"part{part}.zip", "w") as container:
            for name, data in list(world.named.items())[part::3]:
                container.writestr(name, data)
    return folder


def number(position: int) -> int:
    """ImageNet's numbers have gaps, and different lengths: sorted as text they would be in another order."""
    return position * 7


def tar_of_tars(world: World) -> Path:
    folder = world.place / "imagenet"
    folder.mkdir()
    with tarfile.open(folder / "all.tar", "w") as outer:
        for label in ["n00000009", *reversed(world.imagenet)]:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                images = list(enumerate(world.imagenet.get(label, [b"x"]), 1))
                for position, data in images[::-1]:
                    add(tar, f"{label}_{number(position)}.JPEG", data)
            add(outer, f"{label}.tar", inner.getvalue())
    return folder


def tar_of_tars_itself(world: World) -> Path:
    return tar_of_tars(world) / "all.tar"


def tar_of_tars_with_links(world: World) -> Path:
    path = world.place / "all.tar"
    with tarfile.open(path, "w") as outer:
        for label, images in world.imagenet.items():
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for position, data in enumerate(images, 1):
                    add(tar, f"{position}", data)
                    link = tarfile.TarInfo(f"{label}_{number(position)}.JPEG")
                    link.type, link.linkname = (tarfile.SYMTYPE, tarfile.LNKTYPE)[position % 2], str(position)
                    tar.addfile(link)
            add(outer, f"{label}.tar", inner.getvalue())
    return path


def class_folders(world: World, below: str = "") -> Path:
    folder = world.place / "folders"
    for label, images in world.imagenet.items():
        (folder / below / label).mkdir(parents=True)
        for position, data in enumerate(images, 1):
            (folder / below / label / f"{label}_{number(position)}.JPEG").write_bytes(data)
    return folder


def class_folders_of_kaggle(world: World) -> Path:
    return class_folders(world, "ILSVRC/Data/CLS-LOC/train")


def class_tars(world: World) -> Path:
    folder = world.place / "tars"
    folder.mkdir()
    for label, images in world.imagenet.items():
        with tarfile.open(folder / f"{label}.tar", "w") as tar:
            for position, data in enumerate(images, 1):
                add(tar, f"{label}_{number(position)}.JPEG", data)
    return folder


def pickles(world: World, protocol: int = 4) -> Path:
    folder = world.place / "pickles"
    folder.mkdir()
    for split, labels in CLASSES.items():
        named = [(label, data) for name, data in world.named.items() if (label := name[:9]) in labels]
        order = np.random.default_rng(1).permutation(len(named))
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(named[i][1]))) for i in order])
        classes: dict[str, list[int]] = defaultdict(list)
        for place, i in sorted(enumerate(order), key=lambda pair: pair[1]):
            classes[named[i][0]].append(place)
        value = {"image_data": pixels, "class_dict": dict(classes)}
        (folder / f"cache-{split}.pkl").write_bytes(pickle.dumps(value, protocol))
    return folder


def pickles_of_old(world: World) -> Path:
    folder = pickles(world, 2)
    (folder / "cache-val.pkl").rename(folder / "cache-validation.pkl")
    return folder


def pickles_with_exchanged_names(world: World) -> Path:
    folder = pickles(world)
    (folder / "cache-val.pkl").rename(folder / "x")
    (folder / "cache-test.pkl").rename(folder / "cache-val.pkl")
    (folder / "x").rename(folder / "cache-test.pkl")
    return folder


def pickles_with_bytes_for_names(world: World) -> Path:
    folder = pickles(world)
    for path in folder.iterdir():
        values = pickle.loads(path.read_bytes())
        classes = {label.encode(): numbers for label, numbers in values["class_dict"].items()}
        path.write_bytes(pickle.dumps({b"image_data": values["image_data"], b"class_dict": classes}))
    return folder


FORMS = [
    names_in_folder,
    names_in_folder_itself,
    names_in_zip,
    names_in_a_zip_itself,
    names_in_tar,
    names_in_tar_gz,
    names_in_three_zips,
    tar_of_tars,
    tar_of_tars_itself,
    tar_of_tars_with_links,
    class_folders,
    class_folders_of_kaggle,
    class_tars,
    pickles,
    pickles_of_old,
    pickles_with_exchanged_names,
    pickles_with_bytes_for_names,
]


@pytest.mark.parametrize("form", FORMS)
def test_equal_banks_from_every_form(form: Callable[[World], Path], world: World, tmp_path: Path):
    """Given the same pixels, the bank is the same to the bit; it is the images' by Pillow alone."""
    root = tmp_path / "root"
    fetched = world.fetch(root, form(world))
    assert (fetched.how, fetched.images) == ("collected", 4 * len(TAKEN))
    bank = make_bank(world.manifest, root)
    assert bank.class_names == tuple(world.imagenet)
    assert bank.class_splits == ("train", "train", "val", "test")
    for row, (_, data) in enumerate(sorted(world.named.items())):
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(bank.open_images()[row], image.resize((8, 8), Image.Resampling.LANCZOS))
    assert verify_dataset(world.manifest, root) == []
    # By name and by position the bytes are the same, and so is the digest that is pinned.
    if "pickles" not in form.__name__:
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in world.named.items()}
        lines = sorted(name.encode() + b"\0" + digest.encode() + b"\n" for name, digest in digests.items())
        assert fetched.content_sha256 == hashlib.sha256(b"".join(lines)).hexdigest()


def test_again_and_from_what_was_collected(world: World, tmp_path: Path):
    """A second fetch finds everything there; another root can take the tar from the first one."""
    place = names_in_folder(world)
    first = world.fetch(tmp_path / "root", place)
    again = world.fetch(tmp_path / "root")
    assert (again.how, again.content_sha256, again.images) == ("had", first.content_sha256, first.images)
    other = world.fetch(tmp_path / "other", tmp_path / "root" / "mini" / "raw")
    assert (other.how, other.content_sha256) == ("collected", first.content_sha256)


def test_the_plan_says_where_from(world: World, tmp_path: Path):
    """Before anything is done."""
    assert [action.kind for action in plan(world.manifest, tmp_path / "root")] == ["missing"] * 4
    place = tar_of_tars(world)
    action = plan(world.manifest, tmp_path / "root", [str(place)])[-1]
    assert (action.kind, action.sources) == ("collect", (str(place / "all.tar"),))
    assert not (tmp_path / "root").exists()


def test_without_images_it_says_how_to_get_them(world: World, tmp_path: Path):
    """What needs an account says so; nothing is made."""
    with pytest.raises(FetchError) as caught:
        world.fetch(tmp_path / "root")
    text = str(caught.value)
    assert "images.tar: looked for in" in text
    assert "Ask for an account at example.org, and be patient." in text
    assert "--from FOLDER" in text
    assert not (tmp_path / "root").exists()


def test_the_first_good_images_are_pinned(world: World, tmp_path: Path):
    """Other images do not take their place unless the pin is taken away; what was refused leaves nothing."""
    root, place = tmp_path / "root", names_in_folder(world)
    raw = root / "mini" / "raw"
    first = world.fetch(root, place)
    assert json.loads((raw / "images.json").read_bytes()) == {
        "content_sha256": first.content_sha256,
        "images": first.images,
    }
    (raw / "images.tar").unlink()
    one = place / "images" / "n0000000100000001.jpg"
    genuine = one.read_bytes()
    one.write_bytes(world.imagenet["n00000001"][3])
    with pytest.raises(FetchError, match=r"these are other images: .*\(pinned in .*images\.json at the first fetch"):
        world.fetch(root, place)
    assert sorted(path.name for path in raw.iterdir() if "images" in path.name) == ["images.json", "images.tar.sha256"]
    one.write_bytes(genuine)
    assert world.fetch(root, place).content_sha256 == first.content_sha256


def test_any_flipped_byte_beside_the_images_is_found(world: World, tmp_path: Path):
    """Of the pin and of the receipt: verify names the file, and what it says to do mends it."""
    root = tmp_path / "root"
    world.fetch(root, names_in_folder(world))
    raw = root / "mini" / "raw"
    for name in ("images.json", "images.tar.sha256"):
        whole = (raw / name).read_bytes()
        for position in range(0, len(whole), 7):
            for bit in (1, 6):
                flipped = bytes([whole[position] ^ bit])
                (raw / name).write_bytes(whole[:position] + flipped + whole[position + 1 :])
                assert [name in problem for problem in verify_dataset(world.manifest, root)] == [True], position
        (raw / name).unlink()
        (problem,) = verify_dataset(world.manifest, root)
        assert f"{name} is missing" in problem
        assert world.fetch(root).how == "checked"
        assert (raw / name).read_bytes() == whole
        assert verify_dataset(world.manifest, root) == []
    with tarfile.open(raw / "images.tar") as tar:
        last = tar.getmembers()[-1]
    (raw / "images.tar").chmod(0o644)
    os.truncate(raw / "images.tar", last.offset)
    assert plan(world.manifest, root)[-1].kind == "check", "a tar that lost its end"


def test_a_known_content_digest(world: World, tmp_path: Path):
    """A manifest can name it: then only those images will do."""
    place = names_in_folder(world)
    digest = world.fetch(tmp_path / "one", place).content_sha256
    text = Path(world.manifest.reference).read_text()
    for known, good in ((digest, True), ("0" * 64, False)):
        path = tmp_path / "known.toml"
        path.write_text(text.replace("[images]\n", f'[images]\ncontent_sha256 = "{known}"\n'))
        manifest = load_manifest(str(path))
        if good:
            assert world.fetch(tmp_path / "two", place, manifest=manifest).content_sha256 == digest
        else:
            with pytest.raises(FetchError, match=r"these are other images: .* \(the manifest\)"):
                world.fetch(tmp_path / "three", place, manifest=manifest)
            assert plan(manifest, tmp_path / "two")[-1].kind == "check", "those of another version are there"
            (problem,) = verify_dataset(manifest, tmp_path / "two")
            assert "images.tar.sha256 was altered, or is for another manifest" in problem


def test_a_tar_put_there_by_hand(world: World, tmp_path: Path):
    """It is looked at, and pinned if all the images are in it."""
    world.fetch(tmp_path / "one", names_in_folder(world))
    raw = tmp_path / "two" / "mini" / "raw"
    raw.mkdir(parents=True)
    shutil.copyfile(tmp_path / "one" / "mini" / "raw" / "images.tar", raw / "images.tar")
    assert world.fetch(tmp_path / "two").how == "checked"
    (raw / "images.tar.sha256").unlink()
    (raw / "images.tar").unlink()
    with tarfile.open(raw / "images.tar", "w") as tar:
        add(tar, "n0000000100000001.jpg", b"one only")
    with pytest.raises(FetchError, match=r"there is no image n0000000100000002\.jpg"):
        world.fetch(tmp_path / "two")


def test_any_flipped_byte_is_found(world: World, tmp_path: Path):
    """Verify names the tar."""
    root = tmp_path / "root"
    world.fetch(root, names_in_folder(world))
    path = root / "mini" / "raw" / "images.tar"
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    for position in range(0, len(data), len(data) // 20):
        data[position] ^= 1
        path.write_bytes(data)
        (problem,) = verify_dataset(world.manifest, root)
        assert problem.startswith(f"{path} is damaged: sha256")
        data[position] ^= 1
    path.unlink()
    (problem,) = verify_dataset(world.manifest, root)
    assert "images.tar is missing. Run: mamldata fetch" in problem


# --- what people get wrong


def refused(world: World, root: Path, place: Path) -> list[str]:
    """The report; the CSV files came, the images did not."""
    with pytest.raises(FetchError) as caught:
        world.fetch(root, place)
    raw = root / "mini" / "raw"
    assert (raw / "test.csv").exists()
    assert not (raw / "images.tar").exists()
    assert not list(raw.glob("*.part"))
    return [line.strip().replace(f"{world.place}/", "") for line in str(caught.value).splitlines()]


def test_missing_images(world: World, tmp_path: Path):
    """All of them, with file and line."""
    place = names_in_folder(world)
    for name in ("n0000000100000002.jpg", "n0000000400000012.jpg"):
        (place / "images" / name).unlink()
    assert refused(world, tmp_path / "root", place)[:3] == [
        "mini has 2 faults:",
        "train.csv, line 3: there is no image n0000000100000002.jpg",
        "test.csv, line 6: there is no image n0000000400000012.jpg",
    ]


def renamed(world: World, tmp_path: Path, old: str, new: str) -> Manifest:
    """A manifest and a split file in which one image is called otherwise."""
    table = world.place / "tables" / "train.csv"
    before, after = table.read_bytes(), table.read_bytes().replace(old.encode(), new.encode(), 1)
    table.write_bytes(after)
    text = (tmp_path / "mini.toml").read_text()
    for was, now in zip(*([len(data), hashlib.sha256(data).hexdigest()] for data in (before, after)), strict=True):
        text = text.replace(str(was), str(now), 1)
    (tmp_path / "renamed.toml").write_text(text)
    return load_manifest(str(tmp_path / "renamed.toml"))


FIRST, SECOND = "n0000000100000001.jpg", "n0000000100000002.jpg"


def test_two_names_of_one_image(world: World, tmp_path: Path):
    """One of them must mean another image, which is not there; it is not taken twice, and not taken for both."""
    place = names_in_folder(world)
    (place / "images" / "x").mkdir()
    (place / "images" / FIRST).rename(place / "images" / "x" / FIRST)
    manifest = renamed(world, tmp_path, SECOND, f"x/{FIRST}")
    with pytest.raises(FetchError, match=rf"{FIRST} and x/{FIRST} mean the same image: .*, x/{FIRST}"):
        world.fetch(tmp_path / "root", place, manifest=manifest)


def test_two_numbers_of_one_image(world: World, tmp_path: Path):
    """By position, too."""
    manifest = renamed(world, tmp_path, SECOND, f"x{FIRST}")
    with pytest.raises(FetchError, match=rf"{FIRST} and x{FIRST} mean the same image"):
        world.fetch(tmp_path / "root", class_folders(world), manifest=manifest)


def test_a_name_that_is_the_end_of_another(world: World, tmp_path: Path):
    """Both are taken, each for what it is, by the collection and by its reader."""
    place = names_in_folder(world)
    (place / "images" / "x").mkdir()
    (place / "images" / SECOND).rename(place / "images" / "x" / FIRST)
    manifest = renamed(world, tmp_path, SECOND, f"x/{FIRST}")
    assert world.fetch(tmp_path / "root", place, manifest=manifest).images == 20
    images = make_bank(manifest, tmp_path / "root").open_images()
    for row, number in ((0, 0), (4, 1)):  # x/ comes after the other names of the class
        with Image.open(io.BytesIO(world.imagenet["n00000001"][number])) as image:
            assert np.array_equal(images[row], np.asarray(image.resize((8, 8), Image.Resampling.LANCZOS)))


def test_an_incomplete_imagenet(world: World, tmp_path: Path):
    """A class of which images are missing has other images at the positions, so it is not used."""
    place = class_folders(world)
    shutil.rmtree(place / "n00000003")
    for path in sorted((place / "n00000001").iterdir())[:3]:
        path.unlink()
    report = refused(world, tmp_path / "root", place)
    assert (
        "train.csv, line 5: n0000000100000010.jpg is image 10 of its class, which has only 9 in folders: "
        "the class is incomplete" in report
    )
    assert "val.csv, line 2: there is no class n00000003 in folders" in report


def test_pickles_that_do_not_fit(world: World, tmp_path: Path):
    """Fewer images of a class than the split file names, numbers beyond the array, classes twice or nowhere."""
    place = pickles(world)
    changes = {
        "train": {"n00000002": None, "n00000003": [0]},
        "val": {"n00000003": [0, 1, 2, 3]},
        "test": {"n00000004": [0, 1, 2, 3, 99]},
    }
    for split, classes in changes.items():
        values = pickle.loads((place / f"cache-{split}.pkl").read_bytes())
        kept = {**values["class_dict"], **classes}
        values["class_dict"] = {label: numbers for label, numbers in kept.items() if numbers is not None}
        (place / f"cache-{split}.pkl").write_bytes(pickle.dumps(values))
    report = refused(world, tmp_path / "root", place)
    assert "pickles/cache-val.pkl: the class n00000003 needs 5 images, but has 4" in report
    assert "pickles/cache-test.pkl: the class n00000004 has an image number outside the 5 images" in report
    assert "pickles/cache-val.pkl: the class n00000003 is also in cache-train.pkl" in report
    assert "train.csv, line 7: no pickle in pickles has the class n00000002" in report


def test_a_pickle_that_would_run_something(world: World, tmp_path: Path):
    """It is refused, and nothing in it runs."""

    class Payload:
        def __reduce__(self) -> object:
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    place = pickles(world)
    (place / "cache-test.pkl").write_bytes(pickle.dumps({"image_data": Payload(), "class_dict": {}}))
    text = "\n".join(refused(world, tmp_path / "root", place))
    assert "cache-test.pkl is refused: it names posix.system" in text
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("value", [[], {"image_data": 1, "class_dict": {}}, {"image_data": np.zeros((2, 3), np.uint8)}])
def test_a_pickle_of_something_else(value: object, world: World, tmp_path: Path):
    """Its layout is said."""
    place = pickles(world)
    (place / "cache-test.pkl").write_bytes(pickle.dumps(value))
    assert "does not have the layout of MiniImagenet's caches" in "\n".join(refused(world, tmp_path / "root", place))


def test_a_truncated_tar_of_tars(world: World, tmp_path: Path):
    """What a broken download leaves."""
    place = tar_of_tars(world)
    whole = (place / "all.tar").read_bytes()
    for length in (700, len(whole) // 2, len(whole) - 12_000):
        (place / "all.tar").write_bytes(whole[:length])
        refused(world, tmp_path / f"root{length}", place)


def test_too_little_space(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Said before an hour is spent."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("mamldata.io.atomic.shutil.disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr("mamldata.fetching.act.require_space", lambda *_: None)
    with pytest.raises(WriteError, match=r"images\.tar needs [\d,]+ more bytes in .*, where 1,000 are free"):
        world.fetch(tmp_path / "root", names_in_folder(world))


KILLED = """\
import os, signal, sys
from pathlib import Path
from mamldata.fetching import collect, act as fetch
from mamldata.datasets.load import load_manifest
manifest, root, moment, *places = sys.argv[1:]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "reading":
    hash_, left = collect.sha256_bytes, [7]
    def counted(*arguments):
        left[0] -= 1
        return hash_(*arguments) if left[0] else die()
    collect.sha256_bytes = counted
if moment == "pin":
    fetch.write_pin = die
if moment == "receipt":
    fetch.write_receipt = lambda folder, name, digest: die() if name == "images.tar" else None
fetch.fetch(load_manifest(manifest), Path(root), places, offline=True)
"""


@pytest.mark.parametrize("moment", ["reading", "pin", "receipt"])
def test_killed_and_called_again(moment: str, world: World, tmp_path: Path):
    """After kill -9 at any moment the same call ends with the same images."""
    place = tar_of_tars(world)
    expected = world.fetch(tmp_path / "whole", place)
    root = tmp_path / "root"
    places = [str(world.place / "tables"), str(place)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    command = [sys.executable, "-c", KILLED, world.manifest.reference, str(root), moment, *places]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    fetched = world.fetch(root, place)
    assert (fetched.sha256, fetched.content_sha256) == (expected.sha256, expected.content_sha256)
    names = {path.name for path in (root / "mini" / "raw").iterdir()}
    assert not {name for name in names if name.endswith(".part")}


@pytest.fixture
def insects(tmp_path: Path) -> tuple[Path, Manifest]:
    """A folder of classes, and a manifest for such a collection."""
    place = tmp_path / "insects"
    for label in ("ant", "bee", "cow"):
        (place / label).mkdir(parents=True)
        for n in range(3):
            (place / label / f"{n}.jpg").write_bytes(jpeg(np.full((9, 9, 3), n, dtype=np.uint8)))
    (place / "notes.txt").write_text("no image")
    path = tmp_path / "insects.toml"
    head, tail = MANIFEST.format(files="").split("[images]")
    path.write_text(
        head
        + '[images]\nhow = "ask"\n[reader]\ntype = "class-folders"\n'
        + tail[tail.index("[image]") :].replace('by = "files"', 'train = ["ant"]\nval = ["bee"]\ntest = ["cow"]')
    )
    return place, load_manifest(str(path))


def test_a_folder_without_split_files(insects: tuple[Path, Manifest], tmp_path: Path):
    """With the class-folders reader, all images that there are count."""
    place, manifest = insects
    (fetched,) = fetch(manifest, tmp_path / "root", [str(place)])
    assert fetched.images == 9
    assert make_bank(manifest, tmp_path / "root").class_names == ("ant", "bee", "cow")


def test_a_name_that_is_no_text(insects: tuple[Path, Manifest], tmp_path: Path):
    """No two machines agree on its digest: it is named, and nothing is collected."""
    place, manifest = insects
    (place / "bee" / os.fsdecode(b"\xe9.jpg")).write_bytes(jpeg(np.zeros((9, 9, 3), dtype=np.uint8)))
    with pytest.raises(FetchError, match=r"bee/\\udce9\.jpg in .*insects: its name is not UTF-8; rename it"):
        fetch(manifest, tmp_path / "root", [str(place)])


def test_a_folder_that_links_to_itself(insects: tuple[Path, Manifest], tmp_path: Path):
    """That is said, and not that there are no images."""
    place, manifest = insects
    (place / "bee" / "all").symlink_to(place)
    with pytest.raises(FetchError, match="bee/all is a link to a folder that it lies in"):
        fetch(manifest, tmp_path / "root", [str(place)])
