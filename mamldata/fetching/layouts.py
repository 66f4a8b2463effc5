"""The layouts in which users have a dataset's images: by name, by position in the class, or in pickled arrays."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mamldata.datasets.manifest import ImageForm
from mamldata.errors import DamagedError, Fault, Report, RequestError
from mamldata.io.containers import (
    ARCHIVE_SUFFIXES,
    MOST_IMAGE_BYTES,
    Member,
    list_members,
    open_tar,
    reading_container,
    tar_members,
)
from mamldata.io.pickles import StoredArray, load_values
from mamldata.readers.image import is_image
from mamldata.readers.split_files import MembersByName, Row

# Where ImageNet's class folders lie in common copies.
_CLASS_ROOTS = ("", "train", "ILSVRC2012_img_train", "Data/CLS-LOC/train", "ILSVRC/Data/CLS-LOC/train")


@dataclass(frozen=True)
class Found:
    """Images at a place: their layout and their path (a folder or a file)."""

    form: ImageForm
    path: Path


@dataclass(frozen=True)
class Item:
    """One image to collect: its name in the dataset, and where it is: a member of a file, or a row of an array."""

    name: str
    file: Path
    member: Member | None = None
    array: StoredArray | None = None
    row: int = 0

    @property
    def size(self) -> int:
        """Its approximate length in bytes."""
        return self.member.size if self.member else math.prod(self.array.shape[1:]) if self.array else 0


def find_images(forms: Sequence[ImageForm], place: Path) -> Found | None:
    """The first layout in which ``place`` seems to have the images. Only looks at names.

    Args:
        forms: tried in turn.
        place: a folder, or a file.
    """
    return next((Found(form, path) for form in forms if (path := _FINDERS[form.type](form, place)) is not None), None)


def list_images(found: Found, rows: Sequence[Row] | None, report: Report) -> list[Item]:
    """Where each wanted image is; missing images are reported.

    Args:
        found: the result of ``find_images``.
        rows: the images that split files name; None for all images.
        report: called with each fault.

    Raises:
        DamagedError: a whole file cannot be read.
    """
    items = _LISTERS[found.form.type](found, rows, report)
    first: dict[tuple[Path, Member | None, int], Item] = {}
    for item in items:
        other = first.setdefault((item.file, item.member, item.row), item)
        if other is not item:
            where = f"{item.file}, {item.member.name if item.member else f'image {item.row}'}"
            report(Fault("layout", f"{other.name} and {item.name} mean the same image: {where}"))
    return items


# By name.


def _find_by_name(_form: ImageForm, place: Path) -> Path | None:
    if place.is_file():
        return place if place.name.endswith(ARCHIVE_SUFFIXES) else None
    return place if any(True for _ in _name_places(place)) else None


def _name_places(place: Path) -> Iterator[Path]:
    """Where images may be at a place: the folder ``images``, archives, or the place itself."""
    if place.is_file():
        yield place
        return
    if (place / "images").is_dir():
        yield place / "images"
    yield from (path for path in sorted(place.iterdir()) if path.is_file() and path.name.endswith(ARCHIVE_SUFFIXES))
    if _has_images(place):
        yield place


def _has_images(place: Path) -> bool:
    """Whether there is an image in a folder or at most three levels below: split, class, and one more."""
    for here, folders, files in os.walk(place, followlinks=True):
        if any(is_image(name) for name in files):
            return True
        if len(Path(here).relative_to(place).parts) >= 3:
            folders.clear()
    return False


def _list_by_name(found: Found, rows: Sequence[Row] | None, report: Report) -> list[Item]:
    """Find images by name. The first place that has the name counts; a name twice in one place is a fault.

    A path equal to the name wins over one that only ends in it.
    """
    if rows is None:
        return [Item(member.name, file, member) for file, member in _all_images(found.path)]
    left = {row.filename: row for row in rows}
    items: list[Item] = []
    for file in _name_places(found.path):
        members = MembersByName((file, member) for member in _members_or_none(file))
        for name in sorted(left):
            if matches := [member for _, member in members.find(name)]:
                if len(matches) > 1:
                    twice = " and ".join(member.name for member in matches)
                    report(Fault("layout", f"{left[name].place}: {name} appears twice in {file}: {twice}"))
                items.append(Item(name, file, matches[-1]))
                del left[name]
        if not left:
            break
    for row in left.values():
        report(row.missing())
    return items


def _all_images(place: Path) -> Iterator[tuple[Path, Member]]:
    seen: set[str] = set()
    # A folder called images is nothing special here: it may be a class.
    for file in (file for file in _name_places(place) if file != place / "images"):
        for member in _members_or_none(file):
            if is_image(member.name) and member.name not in seen:
                seen.add(member.name)
                yield file, member
        if seen:
            return


def _members_or_none(file: Path) -> list[Member]:
    if file.is_dir():
        return list_members(file)
    try:
        return list_members(file)
    except DamagedError:
        return []  # an unrelated file in the user's folder; missing images are reported later


# By position.


def _find_by_position(form: ImageForm, place: Path) -> Path | None:
    if place.is_file():
        return place if place.name == form.container else None
    if form.container and (place / form.container).is_file():
        return place / form.container
    return next((root for base in _CLASS_ROOTS if _has_classes(root := place / base)), None)


def _has_classes(root: Path) -> bool:
    """Whether a folder has ImageNet's classes: folders with images named after them, or tars."""
    if not root.is_dir():
        return False
    for path in sorted(root.iterdir())[:20]:
        if path.is_dir() and any(inner.name.startswith(f"{path.name}_") for inner in path.iterdir()):
            return True
        if re.fullmatch(r"n\d{8}\.tar", path.name):
            return True
    return False


def _list_by_position(found: Found, rows: Sequence[Row] | None, report: Report) -> list[Item]:
    if rows is None:
        raise RequestError("Images by position need split files to name them.")
    classes = _class_lists(found.path, sorted({row.label for row in rows}))
    items = []
    for row in rows:
        position = _position(row, found.form.digits)
        images = classes.get(row.label)
        if position is None:
            report(Fault("table", f"{row.place}: {row.filename} does not end in {found.form.digits} digits"))
        elif images is None:
            report(Fault("missing", f"{row.place}: there is no class {row.label} in {found.path}"))
        elif not 1 <= position <= len(images):
            report(
                Fault(
                    "missing",
                    f"{row.place}: {row.filename} is image {position:,} of its class, which has only {len(images):,} "
                    f"in {found.path}: the class is incomplete",
                )
            )
        else:
            file, member = images[position - 1]
            items.append(Item(row.filename, file, member))
    return items


def _position(row: Row, digits: int) -> int | None:
    tail = PurePosixPath(row.filename).stem[-digits:]
    return int(tail) if len(tail) == digits and tail.isascii() and tail.isdigit() else None


def _class_lists(path: Path, labels: Sequence[str]) -> Mapping[str, list[tuple[Path, Member]]]:
    """The images of each class in order."""
    found = _nested(path, set(labels)) if path.is_file() else {c: _class_members(path, c) for c in labels}
    return {c: sorted(images, key=lambda image: _numbered(image[1].name)) for c, images in found.items() if images}


def _class_members(root: Path, label: str) -> list[tuple[Path, Member]]:
    for container in (root / label, root / f"{label}.tar"):
        if container.exists():
            return [(container, m) for m in list_members(container) if is_image(m.name)]
    return []


def _nested(path: Path, labels: set[str]) -> dict[str, list[tuple[Path, Member]]]:
    """The members of the tars in a tar: offsets into the outer one."""
    found: dict[str, list[tuple[Path, Member]]] = {}
    outer = [member for member in list_members(path) if PurePosixPath(member.name).stem in labels]
    with reading_container(path), path.open("rb") as stream:
        for member in outer:
            if member.offset is None:
                raise DamagedError(f"{path}: a compressed tar of tars; unpack it one level and give the folder.")
            stream.seek(member.offset)
            end = member.offset + member.size
            with open_tar(path, stream) as tar:
                inner = tar_members(tar, f"{path}, {member.name}")
            label = PurePosixPath(member.name).stem
            found[label] = [(path, m) for m in inner if (m.offset or 0) + m.size <= end and is_image(m.name)]
    return found


def _numbered(name: str) -> tuple[int, str]:
    """A sort key that puts ``n01532829_98.JPEG`` before ``n01532829_1000.JPEG``."""
    stem = PurePosixPath(name).stem
    digits = re.search(r"\d+$", stem)
    return int(digits.group()) if digits else 0, stem


# Pickled arrays.


def _find_pickles(form: ImageForm, place: Path) -> Path | None:
    if not place.is_dir():
        return None
    there = all(any((place / name).is_file() for name in names) for names in form.files.values())
    return place if there and form.files else None


def _list_pickles(found: Found, rows: Sequence[Row] | None, report: Report) -> list[Item]:
    """Find images in pickles, where those of a class are in the order of the split file's rows.

    The pickle of a class is looked up, not taken from the file name: some copies have val and test swapped.
    """
    if rows is None:
        raise RequestError("Pickled arrays need split files that name the images.")
    classes: dict[str, tuple[Path, StoredArray, list[int]]] = {}
    for names in found.form.files.values():
        file = next(path for name in names if (path := found.path / name).is_file())
        array, numbers_of = _load_pickle(file)
        for label, numbers in numbers_of.items():
            if label in classes:
                report(Fault("class", f"{file}: the class {label} is also in {classes[label][0].name}"))
            classes[label] = (file, array, numbers)
    wanted: dict[str, list[Row]] = {}
    for row in rows:
        wanted.setdefault(row.label, []).append(row)
    items = []
    for label, images in wanted.items():
        if label not in classes:
            report(Fault("missing", f"{images[0].place}: no pickle in {found.path} has the class {label}"))
            continue
        file, array, numbers = classes[label]
        if len(numbers) != len(images):
            need = f"needs {len(images):,} images, but has {len(numbers):,}"
            report(Fault("missing", f"{file}: the class {label} {need}"))
        elif not all(0 <= number < array.shape[0] for number in numbers):
            report(
                Fault("layout", f"{file}: the class {label} has an image number outside the {array.shape[0]:,} images")
            )
        else:
            pairs = zip(images, numbers, strict=True)
            items += [Item(row.filename, file, array=array, row=number) for row, number in pairs]
    return items


def _load_pickle(file: Path) -> tuple[StoredArray, dict[str, list[int]]]:
    with file.open("rb") as stream:
        values = load_values(stream, str(file))
        named = {_label(key): value for key, value in values.items()} if isinstance(values, dict) else {}
        array, classes = named.get("image_data"), named.get("class_dict")
        shaped = isinstance(array, StoredArray) and array.dtype == np.uint8 and len(array.shape) == 4
        if (
            not isinstance(array, StoredArray)
            or not shaped
            or array.shape[3] != 3
            or math.prod(array.shape[1:]) > MOST_IMAGE_BYTES
            or not isinstance(classes, dict)
            or _count_numbers(classes) > min(array.shape[0], _MOST_NUMBERS)
        ):
            raise DamagedError(
                f"{file} does not have the layout of MiniImagenet's caches: a dict with image_data, uint8 "
                "[n, H, W, 3], and class_dict."
            )
        return array, {_label(key): _numbers(value, stream, file) for key, value in classes.items()}


def _count_numbers(classes: Mapping[Any, Any]) -> int:
    """Number of elements in a dict's arrays; an array under several keys counts once for each."""
    return sum(math.prod(value.shape) for value in classes.values() if isinstance(value, StoredArray))


_MOST_NUMBERS = 1 << 24


def _label(key: object) -> str:
    return key.decode("latin-1") if isinstance(key, bytes) else str(key)


def _numbers(value: object, stream: io.BufferedReader, file: Path) -> list[int]:
    numbers = value.rows(stream, 0, value.shape[0]).tolist() if isinstance(value, StoredArray) else value
    if not isinstance(numbers, list) or not all(isinstance(number, int) for number in numbers):
        raise DamagedError(f"{file}: class_dict does not have a list of image numbers for each class.")
    return numbers


_FINDERS: Mapping[str, Callable[[ImageForm, Path], Path | None]] = {
    "by-name": _find_by_name,
    "by-position": _find_by_position,
    "pickled-arrays": _find_pickles,
}
_LISTERS: Mapping[str, Callable[[Found, Sequence[Row] | None, Report], list[Item]]] = {
    "by-name": _list_by_name,
    "by-position": _list_by_position,
    "pickled-arrays": _list_pickles,
}
