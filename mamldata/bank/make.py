"""Make a bank: decode all images of a dataset once, in pieces, and resume where a killed process stopped."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

from mamldata.bank.checked import is_noted
from mamldata.bank.decode import decode_image
from mamldata.bank.folder_digest import folder_sha256
from mamldata.bank.format import FORMAT, Bank, damage_of, described, described_bank, open_bank, read_description
from mamldata.datasets.manifest import ImageRecipe, Manifest
from mamldata.datasets.paths import DatasetFolder
from mamldata.errors import DamagedError, DataMissingError, DatasetError, Fault, RequestError
from mamldata.fetching.receipts import dataset_command, fetch_command, verified_digests
from mamldata.io.atomic import commit, locked, make_folder, read_whole, require_space, temporary, write_atomic, writing
from mamldata.io.digest import canonical_json, parse_json, sha256_bytes, sha256_file
from mamldata.io.npy import npy_bytes, npy_header
from mamldata.parallel import run_tasks
from mamldata.progress import Advance, Progress, silent
from mamldata.readers.image import ImageRef, read_images
from mamldata.readers.index import ImageIndex, index_images
from mamldata.readers.left_out import LeftOut, group

_TASK_IMAGES = 4096  # opening a zip of 20,000 members takes as long as decoding some hundred images
_TASK_BYTES = 64 << 20  # of the bank, mapped and written by one worker at a time
_CHUNK_BYTES = 4 << 20
_MOST_JOURNAL = 1 << 28  # bytes: enough for a million damaged images


def make_bank(
    manifest: Manifest, root: Path, size: int | None = None, *, workers: int = 1, progress: Progress = silent
) -> Bank:
    """The bank of a dataset at one image size: opened if it exists, else made from the raw files.

    It is made again only if the recipe or the raw files changed. If the process dies, the next call resumes.
    Opening an existing bank writes nothing in the root and waits for no other process. It is hashed when opened,
    unless this user has hashed it before and it has not changed since (see ``mamldata.bank.checked``).

    Args:
        manifest: the dataset.
        root: the data root.
        size: height and width in pixels; the manifest's if None.
        workers: processes that decode images.
        progress: told of images and of hashed bytes.

    Raises:
        RequestError: the size is not between 1 and 4096.
        DataMissingError: the raw files are missing, or not verified for this manifest; or the bank is not readable.
        DatasetError: raw files do not fit together, or images cannot be decoded; all are named.
        DamagedError: a raw file cannot be read; a new bank differs from the known digest; or an existing bank has
            changed since it was written.
        WriteError: the folder cannot be written to.
    """
    side = manifest.image.size if size is None else size
    if not 1 <= side <= 4096:
        raise RequestError(f"An image size of {side} is not between 1 and 4096 pixels.")
    folder = manifest.home(root)
    identity = _identity(manifest, side, _source_digests(manifest, folder, progress))
    known = manifest.image.bank_sha256.get(side)
    # First without the lock: another process may hold it for an hour, and a read-only root has none.
    if (bank := _current(folder, side, identity, known)) is None:
        make_folder(folder.path)
        with locked(folder.lock):
            # Again, because the process that held the lock may have made it.
            if (bank := _current(folder, side, identity, known)) is None:
                _make(manifest, folder, side, identity, workers, progress)
                return open_bank(folder, side)  # hashed when it was made
    if not is_noted(bank.path, bank.sha256) and (problem := damage_of(bank.path, bank.sha256, progress)):
        command = dataset_command("verify", manifest, root)
        raise DamagedError(f"{problem} To check the raw files too, run: {command}")
    return bank


def _source_digests(manifest: Manifest, folder: DatasetFolder, progress: Progress) -> dict[str, str]:
    if manifest.folder is None:
        return raw_digests(manifest, folder)
    return {manifest.folder.name: folder_sha256(manifest.folder, folder.path / "folder.json", progress)}


def _source_files(manifest: Manifest, folder: DatasetFolder) -> list[Path]:
    return [manifest.folder] if manifest.folder else [folder.raw / name for name in manifest.raw_names]


def files_left_out(manifest: Manifest, bank: Bank, root: Path) -> tuple[LeftOut, ...]:
    """Which of a dataset's files are not in its bank because they are not images, or not readable ones.

    Args:
        manifest: the dataset.
        bank: its bank, which records them. A user's own folder is listed again, because such files may change there
            while the bank stays valid.
        root: the data root.

    Raises:
        DamagedError: the raw files or the folder cannot be read.
    """
    if bank.files_left_out is not None and manifest.folder is None:
        return bank.files_left_out
    return _left_out(index_images(manifest.reader, _source_files(manifest, manifest.home(root))), bank.left_out)


def _left_out(index: ImageIndex, damaged: Sequence[str]) -> tuple[LeftOut, ...]:
    return (*index.left_out, group("damaged", damaged)) if damaged else index.left_out


def _make(
    manifest: Manifest, folder: DatasetFolder, side: int, identity: dict[str, Any], workers: int, progress: Progress
) -> None:
    if manifest.folder is None:
        _require_unchanged(manifest, folder, progress)
    index = index_images(manifest.reader, _source_files(manifest, folder))
    path = folder.bank(side)
    shape = (len(index.images), side, side, manifest.image.channels)
    damage = _preprocess(index, manifest.image, path, shape, identity, workers, progress)
    faults = [*index.faults, *(index.images[row].fault(why) for row, why in sorted(damage.items()))]
    if fatal := manifest.reader.fatal(faults):
        temporary(path).unlink(missing_ok=True)
        raise DatasetError(manifest.name, fatal, _advice(manifest, folder.root, fatal))
    kept = ImageIndex(tuple(image for row, image in enumerate(index.images) if row not in damage))
    if damage:
        shape = _drop_rows(path, shape, damage)
    classes = kept.classes()
    with progress("hash", npy_bytes("|u1", shape), "B") as advance:
        digest, sums = _measure(temporary(path), shape, [count for _, _, count in classes], advance)
    _check_known(manifest, folder.root, side, digest, temporary(path))
    description = {
        "format": FORMAT,
        "name": manifest.name,
        "shape": list(shape),
        "sha256": digest,
        "class_names": [name for name, _, _ in classes],
        "class_offsets": [0, *np.cumsum([count for _, _, count in classes]).tolist()],
        "class_splits": [split for _, split, _ in classes] if any(split for _, split, _ in classes) else [],
        "class_sums": sums,
        "left_out": (damaged := [fault.text for fault in faults]),
        "files_left_out": [some.to_values() for some in _left_out(index, damaged)],
        **identity,
    }
    _finish(folder, side, description)


def _require_unchanged(manifest: Manifest, folder: DatasetFolder, progress: Progress) -> None:
    """Hash the raw files again: a container without check sums gives other images after a single changed bit.

    Raises:
        DamagedError: one has changed since it was fetched.
    """
    for name, expected in raw_digests(manifest, folder).items():
        path = folder.raw / name
        with progress(name, path.stat().st_size, "B") as advance:
            got = sha256_file(path, advance)
        if got != expected:
            raise DamagedError(
                f"{path} has changed since it was fetched: sha256 {got}, expected {expected}. Delete it, and run: "
                f"{fetch_command(manifest, folder.root)}"
            )


def _advice(manifest: Manifest, root: Path, faults: Iterable[Fault]) -> str:
    if manifest.folder is not None:
        return (
            "Repair or remove these files and run the same command again; or leave out damaged images with "
            "--skip-damaged (in Python skip_damaged=True)."
        )
    if all(fault.of_one_image for fault in faults):
        return (
            'Get these images again, or put damaged = "leave-out" under [reader] in a manifest of your own: the '
            "bank then lists the missing images."
        )
    return f"Repair the files, and run: {fetch_command(manifest, root)} --from FOLDER"


def raw_digests(manifest: Manifest, folder: DatasetFolder) -> dict[str, str]:
    """The SHA-256 of each raw file, as recorded when it was verified.

    Raises:
        DataMissingError: files are missing, or not those of the manifest; the message has the command that gets or
            verifies them.
    """
    digests = verified_digests(manifest, folder)
    unverified = " (exists, but is not verified for this manifest)"
    missing = [name + unverified * (folder.raw / name).exists() for name in manifest.raw_names if name not in digests]
    if missing:
        raise DataMissingError(
            f"The raw files of {manifest.name} are not in {folder.raw}: {', '.join(missing)}. "
            f"Run: {fetch_command(manifest, folder.root)}"
        )
    return digests


@dataclass(frozen=True)
class _Piece:
    """Consecutive images for one worker, and where to write them."""

    images: tuple[ImageRef, ...]
    first_row: int
    part: Path
    shape: tuple[int, int, int, int]
    recipe: ImageRecipe


def _write_piece(piece: _Piece) -> dict[int, str]:
    """Decode a piece into its rows of the unfinished bank; return the rows that cannot be decoded, with reasons."""
    _, size, _, channels = piece.shape
    recipe = piece.recipe
    start = len(npy_header("|u1", piece.shape))
    rows = np.memmap(piece.part, np.uint8, "r+", start, piece.shape)
    damage = {}
    for position, data in read_images(piece.images):
        row = piece.first_row + position
        try:
            if isinstance(data, str):
                raise ValueError(data)
            rows[row] = decode_image(data, size, channels, recipe.resampling, recipe.invert, recipe.upright, recipe.fit)
        except ValueError as error:
            damage[row] = str(error)
    rows.flush()
    return damage


def _preprocess(
    index: ImageIndex,
    recipe: ImageRecipe,
    path: Path,
    shape: tuple[int, int, int, int],
    identity: dict[str, Any],
    workers: int,
    progress: Progress,
) -> dict[int, str]:
    """Fill the temporary file of the bank, keeping the pieces that an earlier process finished.

    Returns:
        The rows of images that cannot be decoded, each with the reason.
    """
    part, journal = temporary(path), _journal(path)
    step = min(_TASK_IMAGES, max(1, _TASK_BYTES // math.prod(shape[1:])))
    with writing(part):
        done = _resume(part, journal, shape, {"format": FORMAT, "identity": identity, "shape": shape, "piece": step})
        damage = {row: why for piece in done.values() for row, why in piece.items()}
        pieces = [
            _Piece(index.images[start : start + step], start, part, shape, recipe)
            for start in range(0, len(index.images), step)
            if start not in done
        ]
        with progress("preprocess", len(index.images), "images") as advance, journal.open("a") as log:
            advance(len(index.images) - sum(len(piece.images) for piece in pieces))
            for piece, found in run_tasks(_write_piece, pieces, workers):
                log.write(json.dumps([piece.first_row, found]) + "\n")
                log.flush()
                damage |= found
                advance(len(piece.images))
    return damage


def _journal(path: Path) -> Path:
    """The file that lists the finished pieces of an unfinished bank, below a line that identifies the bank."""
    return path.with_name(path.name + ".journal")


def _resume(
    part: Path, journal: Path, shape: tuple[int, int, int, int], work: dict[str, Any]
) -> dict[int, dict[int, str]]:
    """The first rows of finished pieces, each with its damaged rows, if the unfinished file belongs to this bank.

    Otherwise start a new file.
    """
    key = sha256_bytes(canonical_json(work))
    if part.is_file() and part.stat().st_size == npy_bytes("|u1", shape):
        with suppress(OSError, ValueError, TypeError, AttributeError):  # nothing vouches for what a journal says
            first, *lines, _ = read_whole(journal, _MOST_JOURNAL).decode().split("\n")  # the last line is half-written
            pieces = [parse_json(line.encode()) for line in lines]
            done = {int(start): {int(row): str(why) for row, why in damage.items()} for start, damage in pieces}
            if first == key and all(row in range(shape[0]) for damage in done.values() for row in damage):
                write_atomic(journal, "".join(f"{line}\n" for line in [key, *lines]).encode())
                return done
    journal.unlink(missing_ok=True)
    part.unlink(missing_ok=True)
    require_space(part.with_suffix(""), npy_bytes("|u1", shape))
    with part.open("wb") as stream:
        stream.write(npy_header("|u1", shape))
        stream.truncate(npy_bytes("|u1", shape))
    _claim_space(part, shape)
    write_atomic(journal, f"{key}\n".encode())
    return {}


def _claim_space(part: Path, shape: tuple[int, int, int, int]) -> None:
    """Allocate the blocks now: a memory-mapped write to a full disk kills the process without a message (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):
        with part.open("rb+") as stream:
            os.posix_fallocate(stream.fileno(), 0, npy_bytes("|u1", shape))


def _drop_rows(path: Path, shape: tuple[int, int, int, int], rows: Iterable[int]) -> tuple[int, int, int, int]:
    """Remove rows from the unfinished bank, through a copy, so that a kill leaves no half-moved rows.

    Returns:
        The new shape.
    """
    part, copy = temporary(path), path.with_name(path.name + ".kept.part")
    bounds = [-1, *sorted(rows), shape[0]]
    left = (shape[0] - len(bounds) + 2, *shape[1:])
    start, stride = len(npy_header("|u1", shape)), math.prod(shape[1:])
    with writing(copy), part.open("rb") as source, copy.open("wb") as target:
        target.write(npy_header("|u1", left))
        for before, after in pairwise(bounds):
            source.seek(start + (before + 1) * stride)
            for _ in range(before + 1, after):
                target.write(source.read(stride))
    copy.replace(part)
    return left


def _measure(
    part: Path, shape: tuple[int, int, int, int], class_sizes: Sequence[int], advance: Advance
) -> tuple[str, list[list[list[int]]]]:
    """The bank's SHA-256, and for each class and channel the sum of values and of squares, in one pass."""
    digest, sums = hashlib.sha256(), []
    stride = math.prod(shape[1:])
    with part.open("rb") as stream:
        header = stream.read(len(npy_header("|u1", shape)))
        digest.update(header)
        advance(len(header))
        for size in class_sizes:
            counts = np.zeros((shape[3], 256), dtype=np.int64)
            for first in range(0, size, step := max(1, _CHUNK_BYTES // stride)):
                data = stream.read(min(step, size - first) * stride)
                digest.update(data)
                counts += _histogram(data, shape[3])
                advance(len(data))
            values = np.arange(256, dtype=np.int64)
            sums.append([[int(count @ values), int(count @ values**2)] for count in counts])
    return digest.hexdigest(), sums


def _histogram(data: bytes, channels: int) -> npt.NDArray[np.int64]:
    """How often each value occurs in each channel, int64 ``[channels, 256]``; Pillow counts fastest."""
    pixels = Image.frombuffer("L" if channels == 1 else "RGB", (len(data) // channels, 1), data)
    return np.array(pixels.histogram(), dtype=np.int64).reshape(channels, 256)


def _finish(folder: DatasetFolder, size: int, description: dict[str, Any]) -> None:
    path, description_path = folder.bank(size), folder.bank_json(size)
    # From here on, the description of the replaced bank would be wrong.
    with writing(description_path):
        description_path.unlink(missing_ok=True)
    with writing(path):
        commit(path)
        # Before the description: once there is one, no build looks for a journal.
        _journal(path).unlink(missing_ok=True)
    write_atomic(description_path, described(description))


def _identity(manifest: Manifest, size: int, sources: dict[str, str]) -> dict[str, Any]:
    """The inputs of a bank; while they stay the same, the bank need not be made again."""
    return {
        "reader": manifest.reader.to_json(),
        "image": {**manifest.image.to_json(), "size": size},
        "sources": [{"name": name, "sha256": digest} for name, digest in sources.items()],
    }


def _current(folder: DatasetFolder, size: int, identity: dict[str, Any], known: str | None) -> Bank | None:
    """The existing bank, if it has this identity and digest."""
    try:
        # Read once: meanwhile, a process that holds the lock may replace it.
        description = read_description(folder.bank_json(size))
        if all(description.get(key) == value for key, value in identity.items()):
            bank = described_bank(folder.bank(size), description)
            return bank if known in {None, bank.sha256} else None
    except (FileNotFoundError, DamagedError):
        pass
    return None


def _check_known(manifest: Manifest, root: Path, size: int, digest: str, part: Path) -> None:
    known = manifest.image.bank_sha256.get(size)
    if known is not None and digest != known:
        part.unlink()
        raise DamagedError(
            f"{manifest.name} at {size} pixels has sha256 {digest}, but the known digest is {known}. "
            f"Either a raw file is damaged (run: {dataset_command('verify', manifest, root)}), or this Pillow "
            f"({PIL.__version__}) computes other pixels: install another version of it."
        )
