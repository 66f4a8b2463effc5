"""Find every image of a dataset with the reader of its format, and put them in canonical order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath

from mamldata.errors import DamagedError, Fault
from mamldata.readers import cifar100, class_folders, csv_splits, tiered_imagenet, webdataset
from mamldata.readers.image import ImageRef, ReaderRecipe
from mamldata.readers.left_out import LeftOut, Tally


@dataclass(frozen=True)
class ImageIndex:
    """All images of a dataset in canonical order: classes by path components, then images by name.

    Attributes:
        images: every image, the classes contiguous.
        faults: what is wrong with the raw files; missing images are not in ``images``.
        left_out: files that the reader did not take as images, if it looks at all files.
    """

    images: tuple[ImageRef, ...]
    faults: tuple[Fault, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    def classes(self) -> list[tuple[str, str, int]]:
        """Each class in order: its name, its split in the raw files (or an empty string), its number of images."""
        groups = groupby(self.images, key=lambda image: (image.class_name, image.split))
        return [(name, split, sum(1 for _ in group)) for (name, split), group in groups]


def index_images(recipe: ReaderRecipe, files: Sequence[Path]) -> ImageIndex:
    """Find every image in the raw files.

    Args:
        recipe: which reader, with its options.
        files: the raw files, in the manifest's order; or one folder of images.

    Raises:
        DamagedError: the reader cannot read a file, or there is no image at all.
    """
    faults: list[Fault] = []
    tally = Tally()
    found = sorted(READERS[recipe.type].find(recipe, files, faults.append, tally), key=_canonical)
    if not found and not faults:
        raise DamagedError(f"No image in {', '.join(str(file) for file in files)}: is it the right file?{tally}")
    counts = Counter(image.class_name for image in found)
    small = {name: count for name, count in sorted(counts.items()) if count < recipe.min_images}
    for name, count in small.items():
        tally.leave_out(f"{name} ({count})", "few images", in_class=False)
    return ImageIndex(tuple(one for one in found if one.class_name not in small), tuple(faults), tally.groups())


def _canonical(image: ImageRef) -> tuple[tuple[str, ...], str]:
    return PurePosixPath(image.class_name).parts, image.name


READERS = {
    reader.name: reader
    for reader in (
        class_folders.READER,
        csv_splits.READER,
        cifar100.READER,
        tiered_imagenet.READER,
        webdataset.READER,
    )
}
