"""Open an image: only in the documented formats, within size limits, and without starting another program."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from mamldata.io.containers import IMAGE_FORMATS

Images = npt.NDArray[np.uint8]
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_MOST_PIXELS = 1 << 26  # of one image: photographs of 64 megapixels pass


@contextmanager
def open_image(data: bytes | Images | Image.Image) -> Iterator[Image.Image]:
    """Open an image of one of ``IMAGE_FORMATS``, not decoded yet. All of Pillow's errors become one kind.

    Args:
        data: encoded; or its pixels, uint8 ``[H, W, 3]``; or an image of Pillow's, which is copied.

    Raises:
        ValueError: it is not an image of these formats, is damaged, or has too many pixels.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of decompression bombs before it refuses them; our limit is lower, and an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # It also warns of odd metadata, without naming the file.
            warnings.simplefilter("ignore", UserWarning)
            with _opened(data) as image:
                _check_size(image)
                yield image
    except UnidentifiedImageError as error:  # Pillow's message has a memory address
        raise ValueError(f"not an image in a supported format ({', '.join(_FORMATS)})") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error
    except _DAMAGE as error:
        raise ValueError(f"a damaged image ({error or type(error).__name__})") from error


def _opened(data: bytes | Images | Image.Image) -> Image.Image:
    if isinstance(data, Image.Image):
        _check_size(data)  # before it is copied
        own = data.copy()
        own.format = data.format  # which copy forgets
        return own
    return Image.open(io.BytesIO(data), formats=_FORMATS) if isinstance(data, bytes) else Image.fromarray(data)


_FORMATS = tuple(IMAGE_FORMATS)
# What else Pillow's readers raise on damaged bytes: they trust the numbers and tables in a file.
_DAMAGE = (TypeError, LookupError, AttributeError, ArithmeticError, EOFError, RuntimeError, struct.error, zlib.error)


def _check_size(image: Image.Image) -> None:
    """Refuse an image whose header announces too many pixels; nothing is decoded yet.

    Raises:
        ValueError: it is too large.
    """
    sizes = [image.size]
    if image.format == "TIFF":  # which is decoded tile by tile, and a tile may be larger than the image
        tags: Any = getattr(image, "tag_v2", {})
        sizes.append((tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)))
    for width, height in sizes:
        if width * height > _MOST_PIXELS:
            raise ValueError(f"{width}x{height} pixels are more than the limit of {_MOST_PIXELS:,}; make it smaller")
