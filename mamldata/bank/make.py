"""The image bank: all images of a dataset at one size, decoded once, memory-mapped ever after."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

from mamldata.bank.checked import hash_and_note, is_noted
from mamldata.bank.decode import decode_image
from mamldata.bank.folder_digest import folder_sha256
from mamldata.datasets.manifest import ImageRecipe, Manifest
from mamldata.datasets.paths import DatasetFolder
from mamldata.errors import DamagedError, DataMissingError, DatasetError, Fault, RequestError
from mamldata.fetching.receipts import fetch_command, verified_digests
from mamldata.io.atomic import commit, locked, make_folder, read_whole, require_space, temporary, write_atomic, writing
from mamldata.io.digest import canonical_json, parse_json, sha256_bytes
from mamldata.io.npy import npy_bytes, npy_header
from mamldata.parallel import run_tasks
from mamldata.progress import Progress, silent
from mamldata.readers.index import ImageIndex, ImageRef, index_images, read_images
from mamldata.readers.left_out import LeftOut, group
from mamldata.sampling.normalization import Normalisation, normalisation

FORMAT = "mamldata-bank/3"  # goes up when the same raw images come out as other pixels
_MOST_BYTES = 1 << 28  # of a bank's JSON
_MOST_VALUES = 1 << 24  # in it: 10**6 classes have 13 million
_TASK_IMAGES = 4096  # opening a zip of 20,000 members takes as long as decoding some hundred images
_TASK_BYTES = 64 << 20  # of the bank, mapped and written by one worker at a time
_CHUNK_BYTES = 4 << 20

Images = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Bank:
    """A dataset's images and classes.

    Attributes:
        name: the dataset.
        path: the ``.npy`` file.
        sha256: the digest of that file, which is the bank's digest.
        shape: ``(images, H, W, C)``.
        class_names: the classes in canonical order.
        class_offsets: the first row of each class, and the number of images at the end: ``classes + 1`` numbers.
        class_splits: the split of each class, where the raw files say it; else empty.
        class_sums: for each class and channel the sum of all values and the sum of their squares.
        left_out: images that could not be read, where the manifest says to leave such out.
        files_left_out: files of every kind that were left out when the bank was made; None where nobody noted them.
    """

    name: str
    path: Path
    sha256: str
    shape: tuple[int, int, int, int]
    class_names: tuple[str, ...]
    class_offsets: tuple[int, ...]
    class_splits: tuple[str, ...]
    class_sums: tuple[tuple[tuple[int, int], ...], ...]
    left_out: tuple[str, ...] = ()
    files_left_out: tuple[LeftOut, ...] | None = None

    def open_images(self) -> Images:
        """Map the images: uint8 ``[images, H, W, C]``, read-only."""
        return _mapped(self.path, self.shape)

    def normalisation(self, classes: Sequence[int]) -> Normalisation:
        """Mean and deviation over the classes at these positions; of none, 0 and 1."""
        images = sum(self.class_offsets[c + 1] - self.class_offsets[c] for c in classes)
        sums = [
            (sum(self.class_sums[c][channel][0] for c in classes), sum(self.class_sums[c][channel][1] for c in classes))
            for channel in range(self.shape[3])
        ]
        return normalisation(sums, images * self.shape[1] * self.shape[2])


def make_bank(
    manifest: Manifest, root: Path, size: int | None = None, *, workers: int = 1, progress: Progress = silent
) -> Bank:
    """The bank of a dataset at one image size: opened if it is there, else made from the raw files.

    It is made anew only when the recipe or the raw files changed. If the process dies, the next call goes on.
    Opening one that is there writes nothing in the root, and waits for no other process. It is hashed when it is
    opened, unless this user has hashed it before and it has not changed since (see ``mamldata.bank.checked``).

    Args:
        manifest: the dataset.
        root: the data root.
        size: height and width in pixels; the manifest's if None.
        workers: processes that decode images.
        progress: told of images and of hashed bytes.

    Raises:
        DataMissingError: the raw files are not there, or not verified as the manifest describes them.
        DatasetError: raw files that do not fit together, and images that cannot be decoded: all of them.
        DamagedError: a raw file that cannot be read; or a bank whose digest is known came out different; or the bank
            that is there has other bytes than were written.
        WriteError: the folder cannot be written to.
    """
    side = manifest.image.size if size is None else size
    if not 1 <= side <= 4096:
        raise RequestError(f"An image size of {side} is not between 1 and 4096 pixels.")
    folder = manifest.home(root)
    identity = _identity(manifest, side, _source_digests(manifest, folder, progress))
    known = manifest.image.bank_sha256.get(side)
    # Without the lock first: another process may hold it for an hour, and nobody can where the root is read-only.
    if (bank := _current(folder, side, identity, known)) is None:
        make_folder(folder.path)
        with locked(folder.lock):
            # Again, because whoever held the lock may have made it.
            if (bank := _current(folder, side, identity, known)) is None:
                _make(manifest, folder, side, identity, workers, progress)
                return open_bank(folder, side)  # which was hashed when it was made
    if not is_noted(bank.path, bank.sha256) and (problem := _damage(bank.path, bank.sha256, progress)):
        command = f"mamldata verify {shlex.quote(manifest.reference)}"
        raise DamagedError(f"{problem} To check the raw files too, run: {command}")
    return bank


def _source_digests(manifest: Manifest, folder: DatasetFolder, progress: Progress) -> dict[str, str]:
    if manifest.folder is None:
        return raw_digests(manifest, folder)
    return {manifest.folder.name: folder_sha256(manifest.folder, folder.path / "folder.json", progress)}


def _source_files(manifest: Manifest, folder: DatasetFolder) -> list[Path]:
    return [manifest.folder] if manifest.folder else [folder.raw / name for name in manifest.raw_names]


def files_left_out(manifest: Manifest, bank: Bank, root: Path) -> tuple[LeftOut, ...]:
    """Which of a dataset's files are not in its bank, because they are no images, or none that can be read.

    Args:
        manifest: the dataset.
        bank: its bank, which notes them. But in a user's own folder such files come and go while the bank stays, so
            that is listed again.
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
    index = index_images(manifest.reader, _source_files(manifest, folder))
    path = folder.bank(side)
    shape = (len(index.images), side, side, manifest.image.channels)
    damage = _preprocess(index, manifest.image, path, shape, identity, workers, progress)
    faults = [*index.faults, *(index.images[row].fault(why) for row, why in sorted(damage.items()))]
    if fatal := manifest.reader.fatal(faults):
        temporary(path).unlink(missing_ok=True)
        raise DatasetError(manifest.name, fatal, _advice(manifest, fatal))
    kept = ImageIndex(tuple(image for row, image in enumerate(index.images) if row not in damage))
    if damage:
        shape = _drop_rows(path, shape, damage)
    classes = kept.classes()
    with progress("hash", npy_bytes("|u1", shape), "B") as advance:
        digest, sums = _measure(temporary(path), shape, [count for _, _, count in classes], advance)
    _check_known(manifest, side, digest, temporary(path))
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


def _advice(manifest: Manifest, faults: Iterable[Fault]) -> str:
    if manifest.folder is not None:
        return "Mend or remove these files, and run the same command again."
    if all(fault.of_one_image for fault in faults):
        return (
            'Get these images anew; or put damaged = "leave-out" under [reader] in a manifest of your own, and the '
            "bank lists what it lacks."
        )
    return f"Mend the files, and run: mamldata fetch {manifest.reference} --from FOLDER"


def open_bank(folder: DatasetFolder, size: int) -> Bank:
    """A bank that was made before. Checks its description and its length, not its pixels.

    Raises:
        DataMissingError: there is none.
        DamagedError: the description or the length is not what was written.
    """
    path, description_path = folder.bank(size), folder.bank_json(size)
    if not description_path.is_file() or not path.is_file():
        raise DataMissingError(f"There is no bank {path}: mamldata build makes it from the raw files.")
    return _described_bank(path, read_description(description_path))


def _require_right_to_read(path: Path) -> None:
    """Others' files in a shared root may be private.

    Raises:
        DataMissingError: this one is.
    """
    if path.exists() and not os.access(path, os.R_OK):
        raise DataMissingError(
            f"{path} is there, and may not be read. Ask its owner for the right to, or choose another root with --root."
        )


def _described_bank(path: Path, description: dict[str, Any]) -> Bank:
    _require_right_to_read(path)
    shape: tuple[int, int, int, int] = tuple(description["shape"])
    expected, got = npy_bytes("|u1", shape), path.stat().st_size
    if got != expected:
        raise DamagedError(f"{path} has {got:,} bytes, expected {expected:,}. Delete it and run the command again.")
    return Bank(
        name=description["name"],
        path=path,
        sha256=description["sha256"],
        shape=shape,
        class_names=tuple(description["class_names"]),
        class_offsets=tuple(description["class_offsets"]),
        class_splits=tuple(description["class_splits"]),
        class_sums=tuple(tuple((total, squares) for total, squares in sums) for sums in description["class_sums"]),
        left_out=tuple(description["left_out"]),
        files_left_out=noted_left_out(description),
    )


def noted_left_out(description: dict[str, Any]) -> tuple[LeftOut, ...] | None:
    """What a bank's description says of files that were left out; older ones say nothing."""
    groups = description.get("files_left_out")
    return None if groups is None else tuple(LeftOut.from_values(values) for values in groups)


def open_images(path: Path, sha256: str) -> Images:
    """Map the images of a bank by its file and its digest, as another process named them.

    Args:
        path: the ``.npy`` file, its description beside it.
        sha256: the bank's digest.

    Returns:
        uint8 ``[images, H, W, C]``, read-only.

    Raises:
        DataMissingError: there is no such file, or it is another bank.
        DamagedError: its description is not what was written.
    """
    return _mapped(path, _shape(path, sha256))


def _mapped(path: Path, shape: tuple[int, int, int, int]) -> Images:
    # A plain array over the map: np.memmap's own indexing is slower by half.
    return np.asarray(np.memmap(path, np.uint8, "r", len(npy_header("|u1", shape)), shape))


@lru_cache(maxsize=4)  # a worker asks once for each shard, and a description of many classes is long
def _shape(path: Path, sha256: str) -> tuple[int, int, int, int]:
    try:
        description = read_description(path.with_suffix(".json"))
        there = path.stat().st_size
    except OSError as error:
        raise DataMissingError(f"The bank {path} cannot be read ({error.strerror}).") from error
    shape: tuple[int, int, int, int] = tuple(description["shape"])
    if description["sha256"] != sha256 or there != npy_bytes("|u1", shape):
        raise DataMissingError(f"The bank {path} is another one: its digest is not {sha256}.")
    return shape


def read_description(path: Path) -> dict[str, Any]:
    """A bank's JSON, checked against the digest of itself that it carries.

    Raises:
        DamagedError: a byte of it is not what was written.
        DataMissingError: it is another user's, who keeps it private.
    """
    _require_right_to_read(path)
    try:
        data = read_whole(path, _MOST_BYTES)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror}). Delete it and run the command again.") from error
    try:
        description: dict[str, Any] = parse_json(data, _MOST_VALUES)
        claimed = description.pop("description_sha256")
        intact = _described(description) == data and claimed == sha256_bytes(canonical_json(description))
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact or description["format"] != FORMAT:
        raise DamagedError(
            f"{path} is damaged, or of another version: it is not what was written when the bank was made. "
            "Delete it and run the command again: the bank is made anew."
        )
    return description


def check_bank(description_path: Path, progress: Progress = silent) -> list[str]:
    """Hash a bank and its description again; one line for each problem."""
    path = description_path.with_suffix(".npy")
    try:
        description = read_description(description_path)
        digest = description["sha256"]
        if not path.is_file():
            return [f"{path} is missing. Delete {description_path.name} and build again."]
        _require_right_to_read(path)
    except (DamagedError, DataMissingError) as error:
        return [str(error)]
    problem = _damage(path, digest, progress)
    return [problem] if problem else []


def _damage(path: Path, sha256: str, progress: Progress) -> str:
    """What is wrong with a bank's file, hashed now whatever was noted before; empty if nothing is."""
    try:
        with progress(path.name, path.stat().st_size, "B") as advance:
            got = hash_and_note(path, sha256, advance)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}). Mend its disk, or delete it: the next build makes it again."
    if got == sha256:
        return ""
    return f"{path} is damaged: sha256 {got}, expected {sha256}. Delete it: the next build makes it again."


def raw_digests(manifest: Manifest, folder: DatasetFolder) -> dict[str, str]:
    """The sha256 of each raw file, as noted when it was verified.

    Raises:
        DataMissingError: files that are not there, or others than the manifest wants; the message names the command
            that gets or verifies them.
    """
    digests = verified_digests(manifest, folder)
    unverified = " (there, but not verified as the manifest describes it)"
    missing = [name + unverified * (folder.raw / name).exists() for name in manifest.raw_names if name not in digests]
    if missing:
        raise DataMissingError(
            f"The raw files of {manifest.name} are not in {folder.raw}: {', '.join(missing)}. "
            f"Run: {fetch_command(manifest, folder.root)}"
        )
    return digests


@dataclass(frozen=True)
class _Piece:
    """Consecutive images for one worker, and where they go."""

    images: tuple[ImageRef, ...]
    first_row: int
    part: Path
    shape: tuple[int, int, int, int]
    recipe: ImageRecipe


def _write_piece(piece: _Piece) -> dict[int, str]:
    """Decode a piece into its rows of the unfinished bank; gives the rows that cannot be, each with the reason."""
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
            rows[row] = decode_image(data, size, channels, recipe.resampling, recipe.invert, recipe.upright)
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
    """Fill the temporary file of the bank, going on from the pieces that an earlier process finished.

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
    """Lists the finished pieces of an unfinished bank, below a line that says of what bank."""
    return path.with_name(path.name + ".journal")


def _resume(
    part: Path, journal: Path, shape: tuple[int, int, int, int], work: dict[str, Any]
) -> dict[int, dict[int, str]]:
    """The first rows of finished pieces, each with its damaged rows, if the unfinished file is of this very bank.

    Else a new one is started.
    """
    key = sha256_bytes(canonical_json(work))
    if part.is_file() and journal.is_file() and part.stat().st_size == npy_bytes("|u1", shape):
        first, *lines = journal.read_text().split("\n")
        if first == key:
            # After the last newline stands nothing, or half a line: no next line may be joined to that.
            write_atomic(journal, "".join(f"{line}\n" for line in [key, *lines[:-1]]).encode())
            pieces = [json.loads(line) for line in lines[:-1]]
            return {start: {int(row): why for row, why in damage.items()} for start, damage in pieces}
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
    """Claim the blocks now: a memory-mapped write to a full disk ends a process without a word (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):
        with part.open("rb+") as stream:
            os.posix_fallocate(stream.fileno(), 0, npy_bytes("|u1", shape))


def _drop_rows(path: Path, shape: tuple[int, int, int, int], rows: Iterable[int]) -> tuple[int, int, int, int]:
    """Take rows out of the unfinished bank, through a copy, so that a kill leaves no half-moved rows.

    Returns:
        The shape of what is left.
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
    part: Path, shape: tuple[int, int, int, int], class_sizes: Sequence[int], advance: Callable[[int], object]
) -> tuple[str, list[list[list[int]]]]:
    """The bank's sha256, and for each class and channel the sum of values and of squares, in one pass."""
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
    """How often each value stands in each channel, int64 ``[channels, 256]``; Pillow counts fastest."""
    pixels = Image.frombuffer("L" if channels == 1 else "RGB", (len(data) // channels, 1), data)
    return np.array(pixels.histogram(), dtype=np.int64).reshape(channels, 256)


def _finish(folder: DatasetFolder, size: int, description: dict[str, Any]) -> None:
    path, description_path = folder.bank(size), folder.bank_json(size)
    # A description of the bank that is replaced would be wrong from here on.
    with writing(description_path):
        description_path.unlink(missing_ok=True)
    with writing(path):
        commit(path)
    write_atomic(description_path, _described(description))
    _journal(path).unlink(missing_ok=True)


def _described(description: dict[str, Any]) -> bytes:
    return canonical_json({**description, "description_sha256": sha256_bytes(canonical_json(description))})


def _identity(manifest: Manifest, size: int, sources: dict[str, str]) -> dict[str, Any]:
    """What a bank is made of; while it stays the same, the bank need not be made again."""
    image = {key: value for key, value in asdict(manifest.image).items() if key != "bank_sha256"}
    return {
        "reader": asdict(manifest.reader),
        "image": {**image, "size": size},
        "sources": [{"name": name, "sha256": digest} for name, digest in sources.items()],
    }


def _current(folder: DatasetFolder, size: int, identity: dict[str, Any], known: str | None) -> Bank | None:
    """The bank that is there, if it is of this identity and digest."""
    try:
        # Read once: a process that holds the lock may put that of another bank in its place meanwhile.
        description = read_description(folder.bank_json(size))
        if all(description.get(key) == value for key, value in identity.items()):
            bank = _described_bank(folder.bank(size), description)
            return bank if known in {None, bank.sha256} else None
    except (FileNotFoundError, DamagedError):
        pass
    return None


def _check_known(manifest: Manifest, size: int, digest: str, part: Path) -> None:
    known = manifest.image.bank_sha256.get(size)
    if known is not None and digest != known:
        part.unlink()
        raise DamagedError(
            f"{manifest.name} at {size} pixels came out as sha256 {digest}, where {known} is known to be right. "
            f"Either a raw file is damaged (run: mamldata verify {manifest.reference}), or this Pillow "
            f"({PIL.__version__}) computes other pixels: install another version of it."
        )
