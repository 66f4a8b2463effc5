"""An episode as a picture: rows are classes, support images left, query images right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from mamldata.errors import RequestError
from mamldata.io.atomic import commit, make_folder, temporary, writing
from mamldata.sources.source import Source
from mamldata.words import counted

Images = npt.NDArray[np.uint8]

_CELL = 64  # pixels that smaller images are enlarged to
_MARGIN = 10
_GAP = 2
_BETWEEN = 18  # between support and query
_TEXT = 14
_COLOURS = {"paper": "white", "ink": "black", "support": "#1f5fa8", "query": "#a8501f"}


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


def contact_sheet(support: Images, query: Sequence[Images], names: Sequence[str], title: str) -> Image.Image:
    """Draw an episode.

    Args:
        support: uint8 ``[n_way, k_shot, H, W, C]``.
        query: for each way uint8 ``[k_query, H, W, C]``.
        names: the names of the ``n_way`` classes.
        title: the line above the images.
    """
    n_way, k_shot, height, width, _ = support.shape
    scale = max(1, _CELL // max(height, width))
    step_x, step_y = width * scale + _GAP, height * scale + _GAP
    font = ImageFont.load_default(_TEXT)
    label_width = max(int(font.getlength(text)) for text in names) + _MARGIN
    top = _MARGIN + 2 * (_TEXT + 6)
    left = _MARGIN + label_width
    query_left = left + k_shot * step_x + _BETWEEN
    right = query_left + max(len(part) for part in query) * step_x
    sheet_width = max(right, _MARGIN + int(font.getlength(title))) + _MARGIN
    sheet = Image.new("RGB", (sheet_width, top + n_way * step_y + _MARGIN), _COLOURS["paper"])
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 4), title, fill=_COLOURS["ink"], font=font)
    heading = top - _TEXT - 6
    # One shot of a small image is narrower than the word.
    draw.text((left, heading), "support", fill=_COLOURS["support"], font=font)
    draw.text((max(query_left, left + 64), heading), "query", fill=_COLOURS["query"], font=font)
    for way in range(n_way):
        y = top + way * step_y
        draw.text((_MARGIN, y + (height * scale - _TEXT) // 2), names[way], fill=_COLOURS["ink"], font=font)
        for x, part, colour in ((left, support[way], "support"), (query_left, query[way], "query")):
            for shot, image in enumerate(part):
                place = (x + shot * step_x, y)
                sheet.paste(_picture(image, scale), place)
                box = (place[0] - 1, y - 1, place[0] + width * scale, y + height * scale)
                draw.rectangle(box, outline=_COLOURS[colour])
    return sheet


def _picture(image: Images, scale: int) -> Image.Image:
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    return Image.fromarray(np.kron(pixels, np.ones((scale, scale, *[1] * (pixels.ndim - 2)), dtype=np.uint8)))


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
