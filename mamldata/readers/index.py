"""Readers: where the images of a dataset are inside its raw files, and which class each shows.

A reader finds images and faults; it decodes nothing. Files are read in place and never unpacked.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from mamldata.errors import DamagedError, Fault, Report
from mamldata.io.containers import IMAGE_FORMATS, MOST_IMAGE_BYTES, Member, Window, list_members, read_members
from mamldata.io.pickles import StoredArray, load_values
from mamldata.readers.csv_splits import Row, check_classes, read_rows
from mamldata.readers.left_out import LeftOut, Tally, Why, is_hidden
from mamldata.sampling.splits import SPLITS

READERS: Mapping[str, tuple[str, ...]] = {  # reader: its options
    "class-folders": ("depth", "splits", "damaged"),
    "csv-splits": ("damaged",),
    "cifar-100": (),
    "tiered-imagenet": (),
}
DAMAGED = ("fail", "leave-out")

_IMAGE_SUFFIXES = frozenset(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)
_MOST_ARRAY_BYTES = 1 << 28  # of a pickle in a container: CIFAR-100's images are one of 155 MB
_CIFAR_SHAPE = (3, 32, 32)

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ReaderRecipe:
    """Which reader finds the images in the raw files.

    Attributes:
        type: ``class-folders``: every image lies in a folder named after its class. ``csv-splits``: ``train.csv``,
            ``val.csv`` and ``test.csv`` name images and classes. ``cifar-100`` and ``tiered-imagenet``: their pickles.
        depth: how many path components above the image name its class; 0 for all of them.
        splits: whether the component above those is the split.
        damaged: ``fail``, or ``leave-out`` images that are missing or cannot be read; the bank's JSON lists them.
    """

    type: str
    depth: int = 1
    splits: bool = False
    damaged: str = "fail"

    def fatal(self, faults: Iterable[Fault]) -> list[Fault]:
        """Those that cannot be passed over by leaving images out."""
        return [fault for fault in faults if not (fault.of_one_image and self.damaged == "leave-out")]


@dataclass(frozen=True)
class ImageRef:
    """One image: its class and name, and where it is.

    Attributes:
        class_name, name: what the image is called; names are unique in their class.
        file: the raw file, or the folder, that holds it.
        member: the file in it.
        row: the image's row, if the member is an array of images.
        split: the split that the raw files put its class in; empty if they do not.
        asked: where a list asked for it, such as ``train.csv, line 7``; for messages.
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
class ImageIndex:
    """All images of a dataset in canonical order: classes by path components, then images by name.

    Attributes:
        images: every image, the classes contiguous.
        faults: what is wrong with the raw files; images that are not there have no place in ``images``.
        left_out: files that the reader took for no images, where it looks at all files.
    """

    images: tuple[ImageRef, ...]
    faults: tuple[Fault, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    def classes(self) -> list[tuple[str, str, int]]:
        """Each class in order: its name, the split that the raw files put it in (or nothing), its number of images."""
        groups = groupby(self.images, key=lambda image: (image.class_name, image.split))
        return [(name, split, sum(1 for _ in group)) for (name, split), group in groups]


def index_images(recipe: ReaderRecipe, files: Sequence[Path]) -> ImageIndex:
    """Find every image in the raw files.

    Args:
        recipe: which reader, with its options.
        files: the raw files, in the manifest's order; or one folder of images.

    Raises:
        DamagedError: a file that the reader cannot read, or no image at all.
    """
    faults: list[Fault] = []
    tally = Tally()
    found = sorted(_READERS[recipe.type](recipe, files, faults.append, tally), key=_canonical)
    if not found and not faults:
        raise DamagedError(f"No image in {', '.join(str(file) for file in files)}: is it the right file?{tally}")
    return ImageIndex(tuple(found), tuple(faults), tally.groups())


def _canonical(image: ImageRef) -> tuple[tuple[str, ...], str]:
    return PurePosixPath(image.class_name).parts, image.name


def _class_folders(recipe: ReaderRecipe, files: Sequence[Path], report: Report, tally: Tally) -> Iterator[ImageRef]:
    """Images in folders named after their class: ``[split/]class/image``.

    The same class and image name twice, in one file or in two, is one image if the bytes are the same.
    """
    seen: dict[tuple[str, str], list[ImageRef]] = {}
    homes: dict[str, dict[str, Path]] = {}
    for file in files:
        for member in list_members(file):
            path = PurePosixPath(member.name)
            split, class_name = _folders(recipe, path.parts[:-1])
            if not is_image(member.name) or not class_name:
                tally.leave_out(member.name, why_not(member), in_class=bool(class_name))
                continue
            tally.take(member.name)
            if recipe.splits and split not in SPLITS:
                report(Fault("layout", f"{file}, {member.name}: {split!r} is not one of {', '.join(SPLITS)}"))
                continue
            if as_text(class_name) != class_name:
                report(Fault("layout", f"{file}, {as_text(member.name)}: the name of its class is not UTF-8"))
                continue
            homes.setdefault(class_name, {})[split] = file
            image = ImageRef(class_name, path.name, file, member, split=split)
            alike = seen.setdefault((class_name, path.name), [])
            if not alike:
                yield image
            alike.append(image)
    _check_doubles([alike for alike in seen.values() if len(alike) > 1], report)
    for class_name, splits in homes.items():
        if len(splits) > 1:
            where = " and ".join(repr(split) for split in splits)
            report(Fault("class", f"{files[0]}: the class {class_name!r} is in {where}; splits share no class"))


def _check_doubles(doubles: Sequence[Sequence[ImageRef]], report: Report) -> None:
    """Report images that have the class and the name of another, and other bytes. The first of each is taken."""
    sums = _checksums([image for alike in doubles for image in alike])
    for first, *others in doubles:
        for image in others:
            mine, its = sums[id(image)], sums[id(first)]
            if isinstance(mine, str):
                report(image.fault(mine))
            elif (mine, image.member.size) != (its, first.member.size) and not isinstance(its, str):
                same = f"the image that {first.file.name} has under the same class and name"
                where = f"{image.file}, {image.member.name}"
                report(Fault("layout", f"{where}: not {same} ({image.class_name}/{image.name})"))


def _checksums(images: Sequence[ImageRef]) -> dict[int, int | str]:
    """For the ``id`` of each image the CRC-32 of its bytes, which zips note; or why it cannot be read."""
    sums: dict[int, int | str] = {id(image): image.member.crc for image in images if image.member.crc is not None}
    unknown: dict[Path, list[ImageRef]] = {}
    for image in images:
        if id(image) not in sums:
            unknown.setdefault(image.file, []).append(image)
    for file, wanted in unknown.items():
        found: dict[Member, list[int | str]] = {}  # in a compressed tar two of a name and size are equal members
        for member, data in read_members(file, [image.member for image in wanted], MOST_IMAGE_BYTES):
            found.setdefault(member, []).append(data if isinstance(data, str) else zlib.crc32(data))
        sums |= {id(image): found[image.member].pop(0) for image in wanted}
    return sums


def _folders(recipe: ReaderRecipe, folders: tuple[str, ...]) -> tuple[str, str]:
    """The split and the class that an image's folders name; no class where there are too few of them."""
    if len(folders) < (recipe.depth or 1) + recipe.splits:
        return "", ""
    start = len(folders) - recipe.depth if recipe.depth else int(recipe.splits)
    return folders[start - 1] if recipe.splits else "", "/".join(folders[start:])


def is_image(name: str) -> bool:
    """Whether a file is an image by its name, and not one that a file manager left behind."""
    path = PurePosixPath(name)
    return path.suffix.lower() in _IMAGE_SUFFIXES and not is_hidden(path)


def why_not(member: Member) -> Why:
    """Why a file that is in no class, or no image, is left out."""
    if is_hidden(PurePosixPath(member.name)):
        return "hidden"
    if is_image(member.name):
        return "no class"
    return "unreadable" if member.problem else "no image"


def as_text(name: str) -> str:
    """A file's name as text. File systems and tars name files by any bytes; those that are no UTF-8 are spelt out."""
    return name.encode("utf-8", "backslashreplace").decode()


def _csv_splits(_recipe: ReaderRecipe, files: Sequence[Path], report: Report, _tally: Tally) -> Iterator[ImageRef]:
    """Images that ``train.csv``, ``val.csv`` and ``test.csv`` name, wherever in the other files they are."""
    rows: list[Row] = []
    tables = {file.name: file for file in files if file.suffix == ".csv"}
    for split in SPLITS:
        if (table := tables.get(f"{split}.csv")) is None:
            report(Fault("layout", f"there is no {split}.csv among the raw files"))
        else:
            rows += read_rows(table, split, report)
    check_classes(rows, report)
    by_name: dict[str, list[tuple[Path, Member]]] = {}
    for file in files:
        if file.suffix != ".csv":
            for member in list_members(file):
                by_name.setdefault(member.name.rpartition("/")[2], []).append((file, member))
    known: dict[tuple[Path, Member], Row] = {}
    for row in rows:
        matches = [
            (file, member)
            for file, member in by_name.get(row.filename.rpartition("/")[2], ())
            if f"/{member.name}".endswith(f"/{row.filename}")
        ]
        # What has the very name is meant before what only ends in it.
        matches = [(file, member) for file, member in matches if member.name == row.filename] or matches
        if len(matches) == 1:
            file, member = matches[0]
            if (other := known.setdefault((file, member), row)).filename != row.filename:
                where = f"{other.filename} in {other.place}: {file.name}/{member.name}"
                report(Fault("layout", f"{row.place}: {row.filename} would be one and the same image as {where}"))
                continue
            yield ImageRef(row.label, row.filename, file, member, split=row.split, asked=row.place)
        elif matches:
            places = ", ".join(f"{file.name}/{member.name}" for file, member in matches)
            report(Fault("layout", f"{row.place}: {row.filename} is there more than once: {places}"))
        else:
            report(row.missing())


def _cifar_100(_recipe: ReaderRecipe, files: Sequence[Path], _report: Report, _tally: Tally) -> Iterator[ImageRef]:
    """CIFAR-100's pickles for Python: ``train`` and ``test``, whose images are rows of 3 x 32 x 32, and ``meta``.

    An image's name is its part and its row there.
    """
    (file,) = files
    members = {PurePosixPath(member.name).name: member for member in list_members(file)}
    wrong = f"{file} is not laid out as cifar-100-python.tar.gz is"
    try:
        names = _names(load_member(file, members["meta"])["fine_label_names"])
        for part in ("train", "test"):
            content = load_member(file, members[part])
            labels, pixels = content["fine_labels"], content["data"]
            if pixels.dtype != np.uint8 or pixels.shape != (len(labels), math.prod(_CIFAR_SHAPE)):
                raise DamagedError(f"{wrong}: {part} has {len(labels)} labels and images of shape {pixels.shape}.")
            for row, label in enumerate(labels):
                yield ImageRef(names[label], f"{part}-{row:05d}", file, members[part], row)
    except (LookupError, TypeError, AttributeError) as error:
        raise DamagedError(f"{wrong} ({error!r}).") from error


def _names(value: Any) -> list[str]:
    """Class names out of a pickle: strings, and nothing whose text might be endless."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError("class names that are no list of strings")
    return value


def _tiered_imagenet(
    _recipe: ReaderRecipe, files: Sequence[Path], _report: Report, _tally: Tally
) -> Iterator[ImageRef]:
    """TieredImageNet's pickles: for each split a list of PNGs, each an array, and the labels.

    Classes are called after their split, number and words: two classes of ImageNet are called "crane".
    """
    (file,) = files
    members = {PurePosixPath(member.name).name: member for member in list_members(file)}
    wrong = f"{file} is not laid out as tiered-imagenet.tar is"
    try:
        for split in SPLITS:
            labels = load_member(file, members[f"{split}_labels.pkl"])
            names, numbers = _names(labels["label_specific_str"]), labels["label_specific"].tolist()
            packed = members[f"{split}_images_png.pkl"]
            with file.open("rb") as whole:
                window = io.BufferedReader(Window(whole, packed.offset or 0, packed.size))
                arrays = load_values(window, f"{file}, {packed.name}")
            if packed.offset is None or len(arrays) != len(numbers):
                raise DamagedError(f"{wrong}: {split} has {len(numbers)} labels and {len(arrays)} images.")
            for row, (number, array) in enumerate(zip(numbers, arrays, strict=True)):
                span = array.data
                member = Member(f"{packed.name}, image {row}", span.size, offset=packed.offset + span.offset)
                name = f"{split}/{number:03d} {names[number]}"
                yield ImageRef(name, f"{row:06d}.png", file, member, split=split)
    except (LookupError, TypeError, AttributeError) as error:
        raise DamagedError(f"{wrong} ({error!r}).") from error


_READERS: Mapping[str, Callable[[ReaderRecipe, Sequence[Path], Report, Tally], Iterator[ImageRef]]] = {
    "class-folders": _class_folders,
    "csv-splits": _csv_splits,
    "cifar-100": _cifar_100,
    "tiered-imagenet": _tiered_imagenet,
}


def read_images(images: Sequence[ImageRef]) -> Iterator[tuple[int, bytes | Pixels | str]]:
    """Each image's position in ``images``, and its encoded bytes, its pixels, or why it cannot be read.

    In the order that suits the files; a container is opened once for all images in it.

    Raises:
        DamagedError: a file that cannot be read at all.
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
    return np.ascontiguousarray(pixels[image.row].reshape(_CIFAR_SHAPE).transpose(1, 2, 0))


@lru_cache(maxsize=3)  # the three of CIFAR-100; a worker reads many pieces of each
def load_member(file: Path, member: Member) -> dict[str, Any]:
    """A dict that a container holds as a pickle, its arrays in memory.

    Raises:
        DamagedError: it is no such thing.
    """
    ((_, data),) = read_members(file, [member], _MOST_ARRAY_BYTES)
    if isinstance(data, str):
        raise DamagedError(f"{file}, {member.name}: {data}")
    stream = io.BytesIO(data)
    values = load_values(stream, f"{file}, {member.name}")
    if not isinstance(values, dict):
        raise DamagedError(f"{file}, {member.name}: it holds no dict")
    # A pickle may have one array under many keys: it is read once.
    arrays = {id(value): value for value in values.values() if isinstance(value, StoredArray)}
    loaded = {key: array.rows(stream, 0, array.shape[0]) for key, array in arrays.items()}
    return {str(key): loaded.get(id(value), value) for key, value in values.items()}
