"""The image bank: all images of a dataset at one size, decoded once, memory-mapped ever after."""

from __future__ import annotations

import io
import json
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

from mamldata.digest import canonical_json, sha256_bytes, sha256_file
from mamldata.errors import DamagedError, DataMissingError, RequestError
from mamldata.files import commit, locked, make_folder, temporary, write_atomic, writing
from mamldata.manifest import ImageRecipe, Manifest
from mamldata.npy import npy_bytes, npy_header
from mamldata.parallel import run_tasks
from mamldata.progress import Progress, silent
from mamldata.readers import ImageIndex, ImageRef, index_images, read_members
from mamldata.root import DatasetFolder

FORMAT = "mamldata-bank/1"
_TASK_IMAGES = 4096  # opening a zip of 20,000 members takes as long as decoding some hundred images
_MOST_PIXELS = 1 << 26  # of one image; more is a decompression bomb, not a photograph

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
    """

    name: str
    path: Path
    sha256: str
    shape: tuple[int, int, int, int]
    class_names: tuple[str, ...]
    class_offsets: tuple[int, ...]

    def open_images(self) -> Images:
        """Map the images: uint8 ``[images, H, W, C]``, read-only."""
        start = len(npy_header("|u1", self.shape))
        # A plain array over the map: np.memmap's own indexing is slower by half.
        return np.asarray(np.memmap(self.path, np.uint8, "r", start, self.shape))


def make_bank(
    manifest: Manifest, root: Path, size: int | None = None, *, workers: int = 1, progress: Progress = silent
) -> Bank:
    """The bank of a dataset at one image size: opened if it is there, else made from the raw files.

    It is made anew only when the recipe or the raw files changed. If the process dies, the next call goes on.

    Args:
        manifest: the dataset.
        root: the data root.
        size: height and width in pixels; the manifest's if None.
        workers: processes that decode images.
        progress: told of images and of hashed bytes.

    Raises:
        DataMissingError: the raw files are not there.
        DamagedError: an image that cannot be decoded; or a bank whose digest is known came out different.
        WriteError: the folder cannot be written to.
    """
    side = manifest.image.size if size is None else size
    if not 1 <= side <= 4096:
        raise RequestError(f"An image size of {side} is not between 1 and 4096 pixels.")
    folder = DatasetFolder(root, manifest.name)
    identity = _identity(manifest, side, raw_digests(manifest, folder))
    known = manifest.image.bank_sha256.get(side)
    make_folder(folder.path)
    with locked(folder.lock):
        if (bank := _current(folder, side, identity)) is not None and known in {None, bank.sha256}:
            return bank
        files = [folder.raw / file.name for file in manifest.files]
        index = index_images(manifest.reader, files)
        path = folder.bank(side)
        shape = (len(index.images), side, side, manifest.image.channels)
        _preprocess(index, manifest.image, path, shape, identity, workers, progress)
        with progress("hash", npy_bytes("|u1", shape), "B") as advance:
            digest = sha256_file(temporary(path), advance)
        _check_known(manifest, side, digest, temporary(path))
        _finish(index, folder, side, shape, digest, identity)
    return open_bank(folder, side)


def open_bank(folder: DatasetFolder, size: int) -> Bank:
    """A bank that was made before. Checks its description and its length, not its pixels.

    Raises:
        DataMissingError: there is none.
        DamagedError: the description or the length is not what was written.
    """
    path, description_path = folder.bank(size), folder.bank_json(size)
    if not description_path.is_file() or not path.is_file():
        raise DataMissingError(f"There is no bank {path}: mamldata build makes it from the raw files.")
    description = read_description(description_path)
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
    )


def read_description(path: Path) -> dict[str, Any]:
    """A bank's JSON, checked against the digest of itself that it carries.

    Raises:
        DamagedError: a byte of it is not what was written.
    """
    data = path.read_bytes()
    try:
        description: dict[str, Any] = json.loads(data)
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
    except DamagedError as error:
        return [str(error)]
    if not path.is_file():
        return [f"{path} is missing. Delete {description_path.name} and build again."]
    with progress(path.name, path.stat().st_size, "B") as advance:
        got = sha256_file(path, advance)
    if got == digest:
        return []
    return [f"{path} is damaged: sha256 {got}, expected {digest}. Delete it: the next build makes it anew."]


def raw_digests(manifest: Manifest, folder: DatasetFolder) -> dict[str, str]:
    """The sha256 of each raw file, as noted when it was verified.

    Raises:
        DataMissingError: files that are not there; the message names the command that gets them.
    """
    missing = [
        file.name
        for file in manifest.files
        if not ((folder.raw / file.name).is_file() and folder.receipt(file.name).is_file())
    ]
    if missing:
        raise DataMissingError(
            f"The raw files of {manifest.name} are not in {folder.raw}: {', '.join(missing)}. "
            f"Run: mamldata fetch {manifest.reference} --root {folder.root}"
        )
    return {file.name: folder.receipt(file.name).read_text().split(" ", 1)[0] for file in manifest.files}


def decode_image(data: bytes, size: int, channels: int, resampling: str, invert: bool) -> Images:
    """An encoded image as uint8 ``[size, size, channels]``: to grey or RGB, resized, inverted if asked for.

    Raises:
        ValueError: not an image, a damaged one, or one of too many pixels.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of bombs before it refuses them; our bound is lower than its, and an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} pixels are too many")
                small = image.convert("L" if channels == 1 else "RGB").resize(
                    (size, size), Image.Resampling[resampling.upper()]
                )
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error
    pixels = np.asarray(small).reshape(size, size, channels)
    return 255 - pixels if invert else pixels


@dataclass(frozen=True)
class _Piece:
    """Consecutive images for one worker, and where they go."""

    images: tuple[ImageRef, ...]
    first_row: int
    part: Path
    shape: tuple[int, int, int, int]
    resampling: str
    invert: bool


def _write_piece(piece: _Piece) -> int:
    """Decode a piece into its rows of the unfinished bank; gives the number of images."""
    _, size, _, channels = piece.shape
    start = len(npy_header("|u1", piece.shape))
    rows = np.memmap(piece.part, np.uint8, "r+", start, piece.shape)
    encoded = read_members(piece.images)
    for row, (image, data) in enumerate(zip(piece.images, encoded, strict=True), piece.first_row):
        try:
            rows[row] = decode_image(data, size, channels, piece.resampling, piece.invert)
        except ValueError as error:
            raise DamagedError(f"{image.file}: the image {image.member} cannot be decoded ({error}).") from error
    rows.flush()
    return len(piece.images)


def _preprocess(
    index: ImageIndex,
    recipe: ImageRecipe,
    path: Path,
    shape: tuple[int, int, int, int],
    identity: dict[str, Any],
    workers: int,
    progress: Progress,
) -> None:
    """Fill the temporary file of the bank, going on from the pieces that an earlier process finished."""
    part, journal = temporary(path), _journal(path)
    with writing(part):
        done = _resume(part, journal, shape, identity)
        starts = range(0, len(index.images), _TASK_IMAGES)
        pieces = [
            _Piece(index.images[s : s + _TASK_IMAGES], s, part, shape, recipe.resampling, recipe.invert)
            for s in starts
            if s not in done
        ]
        with progress("preprocess", len(index.images), "images") as advance, journal.open("a") as log:
            advance(len(index.images) - sum(len(piece.images) for piece in pieces))
            for piece, count in run_tasks(_write_piece, pieces, workers):
                log.write(f"{piece.first_row}\n")
                log.flush()
                advance(count)


def _journal(path: Path) -> Path:
    """Lists the finished pieces of an unfinished bank, below a line that says of what bank."""
    return path.with_name(path.name + ".journal")


def _resume(part: Path, journal: Path, shape: tuple[int, int, int, int], identity: dict[str, Any]) -> set[int]:
    """The first rows of finished pieces, if the unfinished file is of this very bank; else start a new one."""
    key = sha256_bytes(canonical_json({"identity": identity, "shape": shape, "piece": _TASK_IMAGES}))
    if part.is_file() and journal.is_file() and part.stat().st_size == npy_bytes("|u1", shape):
        first, *lines = journal.read_text().split("\n")
        if first == key:
            # After the last newline stands nothing, or half a number: no next line may be joined to that.
            write_atomic(journal, "".join(f"{line}\n" for line in [key, *lines[:-1]]).encode())
            return {int(line) for line in lines[:-1]}
    journal.unlink(missing_ok=True)
    with part.open("wb") as stream:
        stream.write(npy_header("|u1", shape))
        stream.truncate(npy_bytes("|u1", shape))
    _require_space(part, shape)
    write_atomic(journal, f"{key}\n".encode())
    return set()


def _require_space(part: Path, shape: tuple[int, int, int, int]) -> None:
    """Claim the blocks now: a memory-mapped write to a full disk ends a process without a word (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):
        with part.open("rb+") as stream:
            os.posix_fallocate(stream.fileno(), 0, npy_bytes("|u1", shape))


def _finish(
    index: ImageIndex,
    folder: DatasetFolder,
    size: int,
    shape: tuple[int, int, int, int],
    digest: str,
    identity: dict[str, Any],
) -> None:
    path, description_path = folder.bank(size), folder.bank_json(size)
    # A description of the bank that is replaced would be wrong from here on.
    with writing(description_path):
        description_path.unlink(missing_ok=True)
    with writing(path):
        commit(path)
    offsets = [0, *np.cumsum(index.class_sizes).tolist()]
    description = {
        "format": FORMAT,
        "name": folder.name,
        "shape": list(shape),
        "sha256": digest,
        "class_names": list(index.class_names),
        "class_offsets": offsets,
        **identity,
    }
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


def _current(folder: DatasetFolder, size: int, identity: dict[str, Any]) -> Bank | None:
    try:
        description = read_description(folder.bank_json(size))
        if all(description.get(key) == value for key, value in identity.items()):
            return open_bank(folder, size)
    except (FileNotFoundError, DataMissingError, DamagedError):
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
