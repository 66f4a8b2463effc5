"""One image in a raw file: where it is, what it is called, and how its bytes are read."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from mamldata.errors import DamagedError, Fault, Report
from mamldata.io.containers import IMAGE_FORMATS, MOST_IMAGE_BYTES, Member, read_members
from mamldata.io.pickles import StoredArray, load_values
from mamldata.readers.left_out import Tally, Why, is_hidden

DAMAGED = ("fail", "leave-out")
_IMAGE_SUFFIXES = frozenset(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)
_MOST_ARRAY_BYTES = 1 << 28  # of a pickle in a container: CIFAR-100's images are one of 155 MB
CIFAR_SHAPE = (3, 32, 32)
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ReaderRecipe:
    """Which reader finds the images in the raw files.

    Attributes:
        type: ``class-folders``: every image lies in a folder named after its class. ``csv-splits``: ``train.csv``,
            ``val.csv`` and ``test.csv`` name images and classes. ``webdataset``: a label lies beside every image.
            ``cifar-100`` and ``tiered-imagenet``: their pickles.
        depth: how many path components above the image form its class name; 0 for all of them.
        splits: whether the component above them is the split.
        classes: the names of labels that are numbers, from 0 on; empty: the numbers are the names.
        min_images: leave out classes with fewer images than this; damaged images count.
        damaged: ``fail``, or ``leave-out`` images that are missing or cannot be read; the bank's JSON lists them.
    """

    type: str
    depth: int = 1
    splits: bool = False
    damaged: str = "fail"
    classes: tuple[str, ...] = ()
    min_images: int = 0

    def to_json(self) -> dict[str, Any]:
        """The values as they are stored in JSON."""
        values = {**asdict(self), "classes": list(self.classes)}
        # Those that files of earlier versions do not have are only there if they are set.
        return {key: value for key, value in values.items() if value or key not in {"classes", "min_images"}}

    def fatal(self, faults: Iterable[Fault]) -> list[Fault]:
        """The faults that leaving images out cannot resolve."""
        return [fault for fault in faults if not (fault.of_one_image and self.damaged == "leave-out")]


@dataclass(frozen=True)
class ImageRef:
    """One image: its class and name, and where it is.

    Attributes:
        class_name, name: what the image is called; names are unique in their class.
        file: the raw file, or the folder, that holds it.
        member: the file in it.
        row: the image's row, if the member is an array of images.
        split: the split of its class in the raw files; empty if they give none.
        asked: where a list names it, such as ``train.csv, line 7``; for messages.
    """

    class_name: str
    name: str
    file: Path
    member: Member
    row: int | None = None
    split: str = ""
    asked: str = ""

    def fault(self, why: str) -> Fault:
        """What is wrong with this image."""
        where = f"{self.asked}: " if self.asked else ""
        return Fault("image", f"{where}{self.file}, {self.place}: {why}")

    @property
    def place(self) -> str:
        """Where in its file the image is."""
        return self.member.name if self.row is None else f"{self.member.name}, image {self.row}"


@dataclass(frozen=True)
class Reader:
    """A raw format.

    Attributes:
        name: its name in a manifest.
        options: the fields of ``ReaderRecipe`` that it uses, besides ``type``.
        find: yields each image in the raw files; reports faults and counts the files it leaves out.
    """

    name: str
    options: tuple[str, ...]
    find: Callable[[ReaderRecipe, Sequence[Path], Report, Tally], Iterator[ImageRef]]


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image, and not of a leftover of a file manager."""
    path = PurePosixPath(name)
    return path.suffix.lower() in _IMAGE_SUFFIXES and not is_hidden(path)


def why_not(member: Member) -> Why:
    """Why a file that is not an image of a class is left out."""
    if is_hidden(PurePosixPath(member.name)):
        return "hidden"
    if is_image(member.name):
        return "no class"
    return "unreadable" if member.problem else "no image"


def as_text(name: str) -> str:
    """A file's name as text. Names in file systems and tars may be any bytes; those not in UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def read_images(images: Sequence[ImageRef]) -> Iterator[tuple[int, bytes | Pixels | str]]:
    """Each image's position in ``images``, and its encoded bytes, its pixels, or why it cannot be read.

    In the order that reads the files fastest; each container is opened once.

    Raises:
        DamagedError: a whole file cannot be read.
    """
    numbered = sorted(enumerate(images), key=lambda item: (str(item[1].file), item[1].row is not None))
    for (file, stored), group in groupby(numbered, key=lambda item: (item[1].file, item[1].row is not None)):
        run = list(group)
        if stored:
            for position, image in run:
                yield position, _array_image(file, image)
            continue
        places: dict[Member, list[int]] = {}
        for position, image in run:
            places.setdefault(image.member, []).append(position)
        for member, data in read_members(file, places, MOST_IMAGE_BYTES):
            for position in places[member]:
                yield position, data


def _array_image(file: Path, image: ImageRef) -> Pixels | str:
    pixels: Pixels = load_member(file, image.member)["data"]
    assert image.row is not None
    return np.ascontiguousarray(pixels[image.row].reshape(CIFAR_SHAPE).transpose(1, 2, 0))


@lru_cache(maxsize=3)  # the three of CIFAR-100; a worker reads many pieces of each
def load_member(file: Path, member: Member) -> dict[str, Any]:
    """Load a dict from a pickle in a container, with its arrays in memory.

    Raises:
        DamagedError: the member cannot be read, or is not a pickled dict.
    """
    ((_, data),) = read_members(file, [member], _MOST_ARRAY_BYTES)
    if isinstance(data, str):
        raise DamagedError(f"{file}, {member.name}: {data}")
    stream = io.BytesIO(data)
    values = load_values(stream, f"{file}, {member.name}")
    if not isinstance(values, dict):
        raise DamagedError(f"{file}, {member.name}: it is not a dict")
    # A pickle may have one array under many keys; it is read only once.
    arrays = {id(value): value for value in values.values() if isinstance(value, StoredArray)}
    loaded = {key: array.rows(stream, 0, array.shape[0]) for key, array in arrays.items()}
    return {str(key): loaded.get(id(value), value) for key, value in values.items()}


def class_names(value: Any) -> list[str]:
    """Class names from a pickle: only strings, because the text of other values might be endless."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError("class names are not a list of strings")
    return value
