"""The bank: a memory-mapped array of all images, and its JSON description. Opened and checked here, but not made."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mamldata.bank.checked import hash_and_note
from mamldata.datasets.paths import DatasetFolder
from mamldata.errors import DamagedError, DataMissingError, enough_resources
from mamldata.io.atomic import read_whole
from mamldata.io.digest import canonical_json, parse_json, sha256_bytes
from mamldata.io.npy import npy_bytes, npy_header
from mamldata.progress import Progress, silent
from mamldata.readers.left_out import LeftOut
from mamldata.sampling.normalization import Normalization, normalization
from mamldata.words import counted

FORMAT = "mamldata-bank/3"  # increased when the same raw images decode to other pixels
_MOST_BYTES = 1 << 28  # of a bank's JSON
_MOST_VALUES = 1 << 24  # values in it: 10**6 classes have 13 million
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
        class_offsets: the first row of each class, then the number of images: ``classes + 1`` numbers.
        class_splits: the split of each class, if the raw files give it; else empty.
        class_sums: for each class and channel the sum of all values and the sum of their squares.
        left_out: images that could not be read, if the manifest says to leave them out.
        files_left_out: all files that were left out when the bank was made; None if they were not recorded.
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

    def __repr__(self) -> str:
        images, classes = counted(self.shape[0], "image"), counted(len(self.class_names), "class", "classes")
        return f"<Bank: {self.name}, {images} {list(self.shape[1:])} of {classes}, {self.path}>"

    def open_images(self) -> Images:
        """Map the images: uint8 ``[images, H, W, C]``, read-only."""
        return map_images(self.path, self.shape)

    def normalization(self, classes: Sequence[int]) -> Normalization:
        """Mean and standard deviation over the classes at these positions; 0 and 1 without any."""
        images = sum(self.class_offsets[c + 1] - self.class_offsets[c] for c in classes)
        sums = [
            (sum(self.class_sums[c][channel][0] for c in classes), sum(self.class_sums[c][channel][1] for c in classes))
            for channel in range(self.shape[3])
        ]
        return normalization(sums, images * self.shape[1] * self.shape[2])


def open_bank(folder: DatasetFolder, size: int) -> Bank:
    """Open an existing bank. Checks its description and its length, not its pixels.

    Raises:
        DataMissingError: there is none.
        DamagedError: the description or the length is not what was written.
    """
    path, description_path = folder.bank(size), folder.bank_json(size)
    if not description_path.is_file() or not path.is_file():
        raise DataMissingError(f"There is no bank {path}: mamldata build makes it from the raw files.")
    return described_bank(path, read_description(description_path))


def _require_right_to_read(path: Path) -> None:
    """Check read permission: in a shared root, files of other users may be private.

    Raises:
        DataMissingError: the file exists but is not readable.
    """
    if path.exists() and not os.access(path, os.R_OK):
        raise DataMissingError(
            f"{path} exists but is not readable. Ask its owner for read permission, or choose another data root."
        )


def described_bank(path: Path, description: dict[str, Any]) -> Bank:
    """The bank of a description; its array must have the described length.

    Raises:
        DamagedError: it has another length.
        DataMissingError: the array exists but is not readable.
    """
    _require_right_to_read(path)
    shape: tuple[int, int, int, int] = tuple(description["shape"])
    expected = npy_bytes("|u1", shape)
    try:
        got = path.stat().st_size
    except FileNotFoundError:
        raise
    except OSError as error:  # such as a link that leads in a circle
        raise DamagedError(f"{path} cannot be read ({error.strerror}). Delete it and run the command again.") from error
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
    """The files left out according to a bank's description; None in descriptions of older versions."""
    groups = description.get("files_left_out")
    return None if groups is None else tuple(LeftOut.from_values(values) for values in groups)


def open_images(path: Path, sha256: str) -> Images:
    """Map the images of a bank that another process named by file and digest.

    Args:
        path: the ``.npy`` file, its description beside it.
        sha256: the bank's digest.

    Returns:
        uint8 ``[images, H, W, C]``, read-only.

    Raises:
        DataMissingError: there is no such file, it is not readable, or it is another bank.
        DamagedError: its description is not what was written.
    """
    return map_images(path, _shape(path, sha256))


def map_images(path: Path, shape: tuple[int, int, int, int]) -> Images:
    """Map an array that has been checked: uint8 ``[images, H, W, C]``, read-only."""
    # A plain array over the map, because np.memmap's own indexing is slower by half.
    with enough_resources():
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
        raise DataMissingError(f"{path} is another bank: its digest is not {sha256}.")
    return shape


def read_description(path: Path) -> dict[str, Any]:
    """Read a bank's JSON and check it against the digest of itself that it contains.

    Raises:
        DamagedError: it has changed since it was written, or is of another version.
        DataMissingError: it exists but is not readable.
        FileNotFoundError: there is none.
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
        intact = described(description) == data and claimed == sha256_bytes(canonical_json(description))
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact or description["format"] != FORMAT:
        raise DamagedError(
            f"{path} is damaged, or of another version: it has changed since the bank was made. "
            "Delete it and run the command again: the bank is made again."
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
    problem = damage_of(path, digest, progress)
    return [problem] if problem else []


def damage_of(path: Path, sha256: str, progress: Progress) -> str:
    """What is wrong with a bank's file, which is always hashed, regardless of notes; empty if it is intact."""
    try:
        with progress(path.name, path.stat().st_size, "B") as advance:
            got = hash_and_note(path, sha256, advance)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}). Check its disk, or delete it: the next build makes it again."
    if got == sha256:
        return ""
    return f"{path} is damaged: sha256 {got}, expected {sha256}. Delete it: the next build makes it again."


def described(description: dict[str, Any]) -> bytes:
    """The bytes of a bank's JSON: the description and its own digest."""
    return canonical_json({**description, "description_sha256": sha256_bytes(canonical_json(description))})
