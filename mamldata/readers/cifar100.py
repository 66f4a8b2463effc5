"""The reader ``cifar-100``: CIFAR-100's own pickles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from mamldata.errors import DamagedError, Report
from mamldata.io.containers import list_members
from mamldata.readers.image import CIFAR_SHAPE, ImageRef, Reader, ReaderRecipe, class_names, load_member
from mamldata.readers.left_out import Tally


def _cifar_100(_recipe: ReaderRecipe, files: Sequence[Path], _report: Report, _tally: Tally) -> Iterator[ImageRef]:
    """CIFAR-100's pickles for Python: ``train`` and ``test``, whose images are rows of 3 x 32 x 32, and ``meta``.

    An image is named after its part and its row in it.
    """
    (file,) = files
    members = {PurePosixPath(member.name).name: member for member in list_members(file)}
    wrong = f"{file} does not have the layout of cifar-100-python.tar.gz"
    try:
        names = class_names(load_member(file, members["meta"])["fine_label_names"])
        for part in ("train", "test"):
            content = load_member(file, members[part])
            labels, pixels = content["fine_labels"], content["data"]
            if pixels.dtype != np.uint8 or pixels.shape != (len(labels), math.prod(CIFAR_SHAPE)):
                raise DamagedError(f"{wrong}: {part} has {len(labels)} labels and images of shape {pixels.shape}.")
            for row, label in enumerate(labels):
                yield ImageRef(names[label], f"{part}-{row:05d}", file, members[part], row)
    except (LookupError, TypeError, AttributeError) as error:
        raise DamagedError(f"{wrong} ({error!r}).") from error


READER = Reader("cifar-100", (), _cifar_100)
