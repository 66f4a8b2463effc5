"""Images in a page: sheets and strips of small pictures as data URIs, and episodes row by row."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image

from mamldata.errors import RequestError
from mamldata.preview import episode
from mamldata.sources.source import SplitSource

Images = npt.NDArray[np.uint8]

_MOST_EPISODE = 1 << 26  # bytes of an episode that is read
_MOST_WAYS, _MOST_IMAGES = 20, 20  # shown of an episode, and of each of its parts
_SIDE = 84  # pixels of a side that larger images are shrunk to
_QUALITIES = (85, 60)  # of JPEG


def data_uri(images: Images, columns: int, most: int) -> Markup:
    """Images side by side as the address of one picture, with its bytes in it.

    Args:
        images: uint8 ``[N, H, W, C]``, at least one; row by row from the left.
        columns: pictures in a row.
        most: bytes of the address, as far as shrinking the images to one pixel allows.
    """
    count, height, width, channels = images.shape
    lines = math.ceil(count / columns)
    filled = np.zeros((lines * columns, height, width, channels), dtype=np.uint8)
    filled[:count] = images
    pixels = filled.reshape(lines, columns, height, width, channels).swapaxes(1, 2)
    pixels = pixels.reshape(lines * height, columns * width, channels)
    picture = Image.fromarray(pixels if channels == 3 else np.ascontiguousarray(pixels[..., 0]))
    side = min(max(height, width), _SIDE)
    while True:
        size = tuple(max(1, length * side // max(height, width)) for length in (columns * width, lines * height))
        shrunk = picture if size == picture.size else picture.resize(size, Image.Resampling.BOX)
        for kind, options in _encodings(channels):
            content = io.BytesIO()
            shrunk.save(content, format=kind, **options)
            address = f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
            if len(address) <= most or side == 1:
                return Markup(address)  # ready for a page as it is
        side = max(1, side * 2 // 3)


def _encodings(channels: int) -> Iterable[tuple[str, dict[str, Any]]]:
    """Without loss for drawings, which are of one channel."""
    if channels != 3:
        yield "PNG", {"optimize": True}
    yield from (("JPEG", {"quality": quality}) for quality in _QUALITIES)


def episode_rows(
    source: SplitSource, index: int, most: int, given: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """An episode as rows of a page, one for each class: at most 20 classes, with at most 20 images of a kind.

    Args:
        source: its split.
        index: of the episode in it.
        most: bytes of all its pictures.
        given: the label given to each query image, by their true labels.

    Returns:
        Dicts with ``name``, ``support`` and ``query`` (the addresses of pictures), ``shots`` and ``queries`` (how many
        images are in them), and ``given`` (labels from 1 for the query images, 0 for a right one; empty if not known).

    Raises:
        RequestError: there is no such episode, or it is too large to show.
        DamagedError: a file with its images is damaged.
        FetchError: such a file could not be fetched.
    """
    _require_small(source)
    info = source.info
    support, query, names = episode(source, index)
    share = most // (2 * min(info.n_way, _MOST_WAYS))
    rows, start = [], 0
    for way in range(min(info.n_way, _MOST_WAYS)):
        shots, queries = support[way][:_MOST_IMAGES], query[way][:_MOST_IMAGES]
        answers = [] if given is None else list(given[start : start + len(queries)])
        start += len(query[way])
        rows.append(
            {
                "name": names[way],
                "support": data_uri(shots, len(shots), share),
                "shots": len(shots),
                "query": data_uri(queries, len(queries), share) if len(queries) else "",
                "queries": len(queries),
                "given": [0 if label == way else label + 1 for label in answers],
            }
        )
    return rows


def support_images(source: SplitSource, ways: npt.NDArray[np.int64]) -> Iterator[Images]:
    """The first support image of each of some ways, uint8 ``[H, W, C]``.

    Args:
        source: the split.
        ways: int64 ``[N]``: number ``w % n_way`` of episode ``w // n_way``.

    Raises:
        RequestError: the episodes are too large to show.
        DamagedError, FetchError: as ``episode_rows``.
    """
    _require_small(source)
    if source.info.query_alpha is None:
        source = source.narrowed(k_shot=1, k_query=1)
    info = source.info
    support, query = (np.empty((info.n_way, k, *info.image_shape), np.uint8) for k in (info.k_shot, info.k_query))
    for episode_index, way in zip(*(part.tolist() for part in np.divmod(ways, info.n_way)), strict=True):
        source.read(np.array([episode_index]), support.reshape(-1), query.reshape(-1))
        yield support[way, 0]


def _require_small(source: SplitSource) -> None:
    info = source.info
    if info.n_way * (info.k_shot + info.k_query) * math.prod(info.image_shape) > _MOST_EPISODE:
        raise RequestError(f"Episodes of more than {_MOST_EPISODE >> 20} MiB are not shown.")
