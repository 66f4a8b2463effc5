"""The bank: an array of all images, memory-mapped, and its JSON. Opened, described and checked; never made here."""

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
from mamldata.errors import DamagedError, DataMissingError
from mamldata.io.atomic import read_whole
from mamldata.io.digest import canonical_json, parse_json, sha256_bytes
from mamldata.io.npy import npy_bytes, npy_header
from mamldata.progress import Progress, silent
from mamldata.readers.left_out import LeftOut
from mamldata.sampling.normalization import Normalization, normalization

FORMAT = "mamldata-bank/3"  # goes up when the same raw images come out as other pixels
_MOST_BYTES = 1 << 28  # of a bank's JSON
_MOST_VALUES = 1 << 24  # in it: 10**6 classes have 13 million
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

    def normalization(self, classes: Sequence[int]) -> Normalization:
        """Mean and deviation over the classes at these positions; of none, 0 and 1."""
        images = sum(self.class_offsets[c + 1] - self.class_offsets[c] for c in classes)
        sums = [
            (sum(self.class_sums[c][channel][0] for c in classes), sum(self.class_sums[c][channel][1] for c in classes))
            for channel in range(self.shape[3])
        ]
        return normalization(sums, images * self.shape[1] * self.shape[2])


def open_bank(folder: DatasetFolder, size: int) -> Bank:
    """A bank that was made before. Checks its description and its length, not its pixels.

    Raises:
        DataMissingError: there is none.
        DamagedError: the description or the length is not what was written.
    """
    path, description_path = folder.bank(size), folder.bank_json(size)
    if not description_path.is_file() or not path.is_file():
        raise DataMissingError(f"There is no bank {path}: mamldata build makes it from the raw files.")
    return described_bank(path, read_description(description_path))


def _require_right_to_read(path: Path) -> None:
    """Others' files in a shared root may be private.

    Raises:
        DataMissingError: this one is.
    """
    if path.exists() and not os.access(path, os.R_OK):
        raise DataMissingError(
            f"{path} is there, and may not be read. Ask its owner for the right to, or choose another root with --root."
        )


def described_bank(path: Path, description: dict[str, Any]) -> Bank:
    """The bank that a description is of, whose array must have its length.

    Raises:
        DamagedError: it has another.
    """
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
        intact = described(description) == data and claimed == sha256_bytes(canonical_json(description))
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
    problem = damage_of(path, digest, progress)
    return [problem] if problem else []


def damage_of(path: Path, sha256: str, progress: Progress) -> str:
    """What is wrong with a bank's file, hashed now whatever was noted before; empty if nothing is."""
    try:
        with progress(path.name, path.stat().st_size, "B") as advance:
            got = hash_and_note(path, sha256, advance)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}). Mend its disk, or delete it: the next build makes it again."
    if got == sha256:
        return ""
    return f"{path} is damaged: sha256 {got}, expected {sha256}. Delete it: the next build makes it again."


def described(description: dict[str, Any]) -> bytes:
    """The bytes of a bank's JSON: the description and the digest of itself."""
    return canonical_json({**description, "description_sha256": sha256_bytes(canonical_json(description))})
