"""Draw an episode: rows are classes, support images left, query images right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Images = npt.NDArray[np.uint8]

_CELL = 64  # pixels that smaller images are enlarged to
_MARGIN = 10
_GAP = 2
_BETWEEN = 18  # between support and query
_TEXT = 14
_COLOURS = {"paper": "white", "ink": "black", "support": "#1f5fa8", "query": "#a8501f"}


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
