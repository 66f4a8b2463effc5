"""The reader ``tiered-imagenet``: tieredImageNet's own pickles."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from mamldata.errors import DamagedError, Report
from mamldata.io.containers import Member, Window, list_members
from mamldata.io.pickles import load_values
from mamldata.readers.image import ImageRef, Reader, ReaderRecipe, class_names, load_member
from mamldata.readers.left_out import Tally
from mamldata.sampling.splits import SPLITS


def _tiered_imagenet(
    _recipe: ReaderRecipe, files: Sequence[Path], _report: Report, _tally: Tally
) -> Iterator[ImageRef]:
    """TieredImageNet's pickles: for each split a list of PNGs, each an array of bytes, and the labels.

    Classes are named by their split, number and words, because two classes of ImageNet are called "crane".
    """
    (file,) = files
    members = {PurePosixPath(member.name).name: member for member in list_members(file)}
    wrong = f"{file} does not have the layout of tiered-imagenet.tar"
    try:
        for split in SPLITS:
            labels = load_member(file, members[f"{split}_labels.pkl"])
            names, numbers = class_names(labels["label_specific_str"]), labels["label_specific"].tolist()
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


READER = Reader("tiered-imagenet", (), _tiered_imagenet)
