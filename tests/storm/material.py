"""What the tries are made of: a tiny dataset, its bank, archives and run, made once for each process."""

from __future__ import annotations

import hashlib
import math
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from mamldata.archive.build import build
from mamldata.archive.index import Archive, read_archive
from mamldata.archive.plan import BuildRequest
from mamldata.bank.format import Bank
from mamldata.bank.make import make_bank
from mamldata.sources.drawn import ThinSource
from mamldata.sources.open import open_archive
from mamldata.sources.stored import StoredSource
from tests.conftest import TinyDataset, make_tiny
from tests.storm.harness import workplace

EPISODES = {"train": 23, "val": 7}
REQUEST = BuildRequest(n_way=3, k_shot=1, k_query=2, episodes=EPISODES, seed=9, episodes_per_shard=5)
THIN_REQUEST = BuildRequest(n_way=3, k_shot=1, k_query=2, episodes=EPISODES, seed=9, thin=True)
OTHER = {"one": "other", "thin": "other-thin"}  # for each archive one of the same shape with other content
Files = dict[str, bytes]


@cache
def tiny() -> TinyDataset:
    """A dataset of 43 images in a zip, fetched."""
    return make_tiny(workplace() / "material")


@cache
def bank() -> Bank:
    """Its bank."""
    return make_bank(tiny().manifest, tiny().root)


@cache
def other_bank() -> Bank:
    """A bank of the same size with other images."""
    manifest = replace(tiny().manifest, image=replace(tiny().manifest.image, invert=False))
    root = workplace() / "material" / "other-root"
    clone(tiny().root / "tiny" / "raw", root / "tiny" / "raw")
    return make_bank(manifest, root)


@cache
def archive(which: str = "one") -> Path:
    """An archive of it: ``one``, the ``thin`` one, or one of the others, which have another seed and other images."""
    place = workplace() / "material" / f"archive-{which}"
    request = THIN_REQUEST if "thin" in which else REQUEST
    if which in OTHER:
        build(tiny().manifest, bank(), place, request)
    else:
        build(tiny().manifest, other_bank(), place, replace(request, seed=10))
    return place


@cache
def archive_of(which: str = "one") -> Archive:
    """What its ``archive.json`` says."""
    return read_archive(archive(which))


def contents(folder: Path) -> Files:
    """Every file below a folder, by its path relative to it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@cache
def archive_files(which: str = "one") -> Files:
    """The files of an archive."""
    return contents(archive(which))


def put(files: Files, folder: Path) -> None:
    """Write files below a folder."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def digest_of(folder: Path) -> str:
    """One digest over all files below a folder, with their names; locks do not count."""
    digest = hashlib.sha256()
    for name, data in sorted(contents(folder).items()):
        if not name.endswith(".lock"):
            digest.update(name.encode(errors="surrogateescape") + b"\0" + hashlib.sha256(data).digest())
    return digest.hexdigest()


def episodes_of(source: StoredSource | ThinSource) -> bytes:
    """The bytes of all episodes of a source, and what it says of them."""
    info = source.info
    image = math.prod(info.image_shape)
    support = np.empty(source.episodes * info.n_way * info.k_shot * image, dtype=np.uint8)
    query = np.empty(source.episodes * info.n_way * info.k_query * image, dtype=np.uint8)
    if isinstance(source, StoredSource):
        source.prefetch(range(len(source.shard_episodes)))
    source.read(np.arange(source.episodes), support, query)
    classes = source.classes(np.arange(source.episodes))
    return b"".join([support.tobytes(), query.tobytes(), classes.tobytes(), repr(info).encode()])


@cache
def true_episodes(split: str = "train", which: str = "one") -> bytes:
    """The episodes of an archive, as they should be."""
    return episodes_of(open_archive(archive(which), split, verify=True))


def clone(files: Path, folder: Path) -> Path:
    """Copy a folder of the material into a new one."""
    shutil.copytree(files, folder)
    return folder
