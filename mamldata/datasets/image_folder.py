"""A user's own folder of images as a dataset: ``[split/]class/image``, without a manifest."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TypedDict, Unpack

from mamldata.datasets.manifest import FITS, ImageRecipe, Manifest
from mamldata.datasets.toml import builtin_names
from mamldata.errors import RequestError
from mamldata.io.containers import Member, list_members
from mamldata.readers.image import ReaderRecipe, as_text, is_image, why_not
from mamldata.readers.left_out import Tally
from mamldata.sampling.splits import SPLITS, SplitScheme
from mamldata.words import counted

# How the images of a folder are stored in a bank.
FOLDER_IMAGES = ImageRecipe(84, 3, "lanczos", invert=False, bank_sha256={}, upright=True)
# MiniImagenet's: 64 of 100 classes to train, 16 to validate, 20 to test.
_SHARES = {"val": 16, "test": 20}
_MOST_SHOWN = 5
_ARCHIVE_INDEX = "archive.json"  # as in mamldata.archive.index, which this module must not import


class FolderOptions(TypedDict, total=False):
    """How a folder of images is read.

    Attributes:
        min_images: leave out classes with fewer images than this; the default, 0, leaves out none.
        skip_damaged: leave out images that cannot be read, which the bank lists; by default they are an error.
        fit: a key of ``FITS``, how images that are not square become so; ``stretch`` by default.
    """

    min_images: int
    skip_damaged: bool
    fit: str


def folder_manifest(folder: Path, **how: Unpack[FolderOptions]) -> Manifest:
    """The manifest of a folder of images.

    Its classes are the folders that contain images. If all of them are below ``train``, ``val`` and ``test``, those are
    the splits; otherwise 64 % of the classes are train, 16 % val and 20 % test, drawn with seed 0. Images become 84x84
    RGB, turned upright by their EXIF orientation.

    Args:
        folder: of the images.
        how: see ``FolderOptions``.

    Raises:
        RequestError: ``fit`` or ``min_images`` is invalid; there are no images in class folders; or fewer than three
            classes.
    """
    least, fit = how.get("min_images", 0), how.get("fit", "stretch")
    if least < 0 or fit not in FITS:
        raise RequestError(f"min_images must be at least 0 and fit one of {', '.join(FITS)}, not {least} and {fit!r}.")
    folder = folder.resolve()
    if (folder / _ARCHIVE_INDEX).is_file():
        raise RequestError(f"{folder} is an archive. Give what it was built from: a dataset's name or its images.")
    members = list_members(folder)
    names = [member.name for member in members if is_image(member.name)]
    if no_text := [path for path in (str(folder), *names) if as_text(path) != path]:
        raise RequestError(
            f"{as_text(str(folder))} has names that are not UTF-8 and would differ on another machine: "
            f"{', '.join(map(as_text, no_text[:_MOST_SHOWN]))}{', …' if no_text[_MOST_SHOWN:] else ''}. Rename them "
            "(convmv does it for a whole folder)."
        )
    homes = Counter(PurePosixPath(name).parts[:-1] for name in names)
    classes = sorted(home for home, images in homes.items() if home and images >= least)
    if not any(homes):
        raise RequestError(
            f"{folder} is neither an archive (it has no archive.json) nor a folder of images in folders named after "
            f"their classes: class/image or split/class/image.{_others(members)}"
        )
    by_split = lie_in_splits(classes, folder)
    scheme = _by_folders(classes) if by_split else _seeded(folder, len(classes), members, least)
    damaged = "leave-out" if how.get("skip_damaged") else "fail"
    return Manifest(
        reference=str(folder),
        name=folder_name(folder),
        title=f"The images in the folder {folder.name}",
        version="1",
        licence="the user's own",
        homepage="none",
        citation="none",
        files=(),
        reader=ReaderRecipe("class-folders", depth=0, splits=by_split, damaged=damaged, min_images=least),
        image=replace(FOLDER_IMAGES, fit=fit),
        rotations="none",
        split_scheme=scheme.name,
        schemes={scheme.name: scheme},
        folder=folder,
    )


def lie_in_splits(classes: Collection[tuple[str, ...]], place: Path) -> bool:
    """Whether all classes lie below ``train``, ``val`` and ``test``.

    Args:
        classes: the path components of each.
        place: where they are, for the message.

    Raises:
        RequestError: some do and others do not.
    """
    tops = {home[0] for home in classes if len(home) > 1}
    by_split = tops <= set(SPLITS) and all(len(home) > 1 for home in classes)
    if not by_split and tops & set(SPLITS):
        inside, outside = sorted(tops & set(SPLITS)), sorted({home[0] for home in classes} - set(SPLITS))
        raise RequestError(
            f"{place} has classes below {', '.join(inside)}, but also {outside[0]!r}, which is not train, val or test. "
            "Put every class below one of these three."
        )
    return by_split


def _others(members: Iterable[Member]) -> str:
    """The files of a folder that are not images, for a message: they may be images in an unsupported format."""
    tally = Tally()
    for member in members:
        if not is_image(member.name):
            tally.leave_out(member.name, why_not(member), in_class=False)
    return str(tally)


def _by_folders(classes: list[tuple[str, ...]]) -> SplitScheme:
    counts = {split: sum(home[0] == split for home in classes) for split in SPLITS}
    return SplitScheme("folders", f"{_counted(counts)} classes, as their folders say", {}, {}, by_files=True)


def _seeded(folder: Path, classes: int, members: Iterable[Member], least: int) -> SplitScheme:
    if classes < len(SPLITS):
        enough = f" with at least {counted(least, 'image')}" if least else ""
        raise RequestError(
            f"{folder} has images of {counted(classes, 'class', 'classes')}{enough}; train, val and test need at "
            f"least one each, and n_way classes each to build episodes.{_others(members)}"
        )
    counts = seeded_counts(classes)
    return SplitScheme("seeded", f"{_counted(counts)} classes at random, seed 0", {}, counts, seed=0)


def seeded_counts(classes: int) -> dict[str, int]:
    """How many classes each split gets: 64, 16 and 20 of 100 classes, and at least one.

    Args:
        classes: at least three.
    """
    counts = {split: max(1, classes * share // 100) for split, share in _SHARES.items()}
    return {"train": classes - sum(counts.values()), **counts}


def _counted(counts: Mapping[str, int]) -> str:
    return "/".join(str(counts[split]) for split in SPLITS)


def folder_name(folder: Path) -> str:
    """The dataset name of a folder: derived from the folder's name, and different from all built-in datasets."""
    name = dataset_name(folder.resolve().name)
    return name if name not in builtin_names() else f"my-{name}"


def dataset_name(text: str) -> str:
    """A dataset name derived from any text: lowercase letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "images"
