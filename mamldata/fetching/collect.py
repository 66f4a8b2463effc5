"""Collect images without a published hash, in any layout that a user has, into one tar under ``raw/``.

They are streamed in place: of a 138 GB tar of tars only the wanted images are read, and nothing is unpacked. The tar
holds them under the dataset's own names with their original bytes (pixels from arrays become PPM).
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from mamldata.datasets.manifest import Manifest
from mamldata.errors import DatasetError, Fault, Report
from mamldata.fetching.layouts import Found, Item, list_images
from mamldata.fetching.receipts import Collected
from mamldata.io.atomic import require_space, temporary, writing
from mamldata.io.containers import MOST_IMAGE_BYTES, list_members, read_members
from mamldata.io.content_digest import digest_of_contents
from mamldata.io.digest import sha256_bytes
from mamldata.progress import Advance, Progress, silent
from mamldata.readers.image import as_text
from mamldata.readers.split_files import Row, check_classes, read_rows
from mamldata.sampling.splits import SPLITS


def collect(manifest: Manifest, found: Found, raw: Path, path: Path, progress: Progress = silent) -> Collected:
    """Write the dataset's images to the temporary file of ``path``, a tar.

    Args:
        manifest: the dataset.
        found: where the images are.
        raw: the folder of its raw files; it must already have the split files.
        path: of the tar.
        progress: told of images.

    Raises:
        DatasetError: images are missing or cannot be read; all are named.
        DamagedError: a whole file cannot be read.
        WriteError: they do not fit on the disk, or the tar cannot be written.
    """
    faults: list[Fault] = []
    items = list_images(found, wanted_rows(manifest, raw, faults.append), faults.append)
    require_space(path, sum(item.size + 1024 for item in items))
    with (
        writing(path),
        tarfile.open(temporary(path), "w", format=tarfile.PAX_FORMAT) as tar,
        progress("collect", len(items), "images") as advance,
    ):

        def add(name: str, data: bytes) -> None:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all

        digests = _hash(_read(items), found.path, faults.append, advance, add)
    return _accept(manifest, found.path, faults, digests)


def digest_images(manifest: Manifest, found: Found, raw: Path, progress: Progress = silent) -> Collected:
    """What ``collect`` would return, without writing anything.

    Raises:
        DatasetError: images are missing or cannot be read; all are named.
        DamagedError: a whole file cannot be read.
    """
    faults: list[Fault] = []
    items = list_images(found, wanted_rows(manifest, raw, faults.append), faults.append)
    with progress("hash", len(items), "images") as advance:
        digests = _hash(_read(items), found.path, faults.append, advance)
    return _accept(manifest, found.path, faults, digests)


def check_collected(manifest: Manifest, raw: Path, path: Path, progress: Progress = silent) -> Collected:
    """Check a tar of images that was put under ``raw/``.

    Raises:
        DatasetError: images are missing from it.
        DamagedError: it is not a tar, or is damaged.
    """
    faults: list[Fault] = []
    rows = wanted_rows(manifest, raw, faults.append)
    members = list_members(path)
    there = {member.name for member in members}
    faults += [row.missing() for row in rows or () if row.filename not in there]
    images = ((member.name, data) for member, data in read_members(path, members, MOST_IMAGE_BYTES))
    with progress("check", len(members), "images") as advance:
        digests = _hash(images, path, faults.append, advance)
    return _accept(manifest, path, faults, digests)


def _hash(
    images: Iterable[tuple[str, bytes | str]],
    place: Path,
    report: Report,
    advance: Advance,
    keep: Callable[[str, bytes], object] = lambda _name, _data: None,
) -> list[tuple[str, str]]:
    """Each image's name and SHA-256. Images that cannot be read are reported; the others are passed to ``keep``."""
    digests = []
    for name, data in images:
        if isinstance(data, str):
            report(Fault("image", f"{name} in {place}: {data}"))
        elif as_text(name) != name:
            report(Fault("image", f"{as_text(name)} in {place}: its name is not UTF-8; rename it"))
        else:
            keep(name, data)
            digests.append((name, sha256_bytes(data)))
        advance(1)
    return digests


def _accept(manifest: Manifest, place: Path, faults: Sequence[Fault], digests: Sequence[tuple[str, str]]) -> Collected:
    if fatal := manifest.reader.fatal(faults):
        raise DatasetError(
            manifest.name,
            fatal,
            f"{place} does not have all images of {manifest.name}. Get these images again, or give another source.",
        )
    return Collected(len(digests), digest_of_contents(digests))


def wanted_rows(manifest: Manifest, raw: Path, report: Report) -> list[Row] | None:
    """The images that the split files name; None for datasets without split files, which take all images."""
    if manifest.reader.type != "csv-splits":
        return None
    rows: list[Row] = []
    for split in SPLITS:
        table = raw / f"{split}.csv"
        if table.is_file():
            rows += read_rows(table, split, report)
    check_classes(rows, report)
    return rows


def _read(items: Sequence[Item]) -> Iterator[tuple[str, bytes | str]]:
    for file, group in groupby(sorted(items, key=lambda item: str(item.file)), key=lambda item: item.file):
        run = list(group)
        # One name each: list_images has reported images with two names.
        members = {item.member: item.name for item in run if item.member}
        for member, data in read_members(file, members, MOST_IMAGE_BYTES):
            yield members[member], data
        with file.open("rb") if file.is_file() else io.BytesIO() as stream:
            for item in run:
                if item.array:
                    yield item.name, _ppm(item.array.rows(stream, item.row, item.row + 1)[0])


def _ppm(pixels: np.ndarray) -> bytes:
    height, width, _ = pixels.shape
    return f"P6\n{width} {height}\n255\n".encode() + pixels.tobytes()
