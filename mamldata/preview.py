"""An episode of a source as a picture in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mamldata.errors import RequestError
from mamldata.io.atomic import commit, make_folder, temporary, writing
from mamldata.sources.source import Source
from mamldata.words import counted

Images = npt.NDArray[np.uint8]


def episode(source: Source, index: int) -> tuple[Images, list[Images], list[str]]:
    """An episode's images and the names of its classes.

    Args:
        source: an archive's split, or a live one.
        index: the episode's index in its split.

    Returns:
        Support ``[n_way, k_shot, H, W, C]``; for each way its queries ``[k_query, H, W, C]``, uint8; ``n_way`` names.

    Raises:
        RequestError: there is no such episode.
    """
    if index < 0 or (source.episodes is not None and index >= source.episodes):
        raise RequestError(
            f"There is no episode {index}: split {source.info.split!r} has {counted(source.episodes or 0, 'episode')}."
        )
    info = source.info
    shapes = [(info.n_way, k, *info.image_shape) for k in (info.k_shot, info.k_query)]
    support, query = (np.empty(shape, dtype=np.uint8) for shape in shapes)
    place = np.array([index], dtype=np.int64)
    source.read(place, support.reshape(-1), query.reshape(-1))
    counts = source.query_counts(place)
    ends = np.cumsum(np.full(info.n_way, info.k_query) if counts is None else counts[0])
    classes = source.class_labels(index)
    return support, np.split(query.reshape(-1, *info.image_shape), ends[:-1]), classes


def save(sheet: Image.Image, path: Path) -> None:
    """Write a picture as PNG, whole or not at all.

    Raises:
        RequestError: the name does not end in .png.
        WriteError: the place cannot be written to.
    """
    if path.suffix.lower() != ".png":
        raise RequestError(f"{path}: pictures are written as PNG. Choose a name that ends in .png.")
    make_folder(path.parent)
    with writing(path):
        sheet.save(temporary(path), format="PNG")
        commit(path)


def title(source: Source, index: int) -> str:
    """One line that describes the episode."""
    info = source.info
    origin = f"archive {info.archive_sha256[:12]}" if info.archive_sha256 else f"live, seed {info.episode_seed}"
    return (
        f"{info.dataset} {info.split} episode {index}: {info.n_way}-way {info.k_shot}-shot, "
        f"split scheme {info.split_scheme}, {origin}"
    )
