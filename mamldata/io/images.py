"""Open an image: by the formats of the docs, within bounds, and with no other program."""

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
def open_image(data: bytes | Images) -> Iterator[Image.Image]:
    """An image of one of ``IMAGE_FORMATS``, not decoded yet. Whatever Pillow raises on it is one kind of error.

    Args:
        data: encoded, or its pixels, uint8 ``[H, W, 3]``.

    Raises:
        ValueError: not an image of these formats, a damaged one, or one of too many pixels.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of bombs before it refuses them; our bound is lower than its, and an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # And of odd metadata, in words that name no file.
            warnings.simplefilter("ignore", UserWarning)
            opened = (
                Image.open(io.BytesIO(data), formats=_FORMATS) if isinstance(data, bytes) else Image.fromarray(data)
            )
            with opened as image:
                _check_size(image)
                yield image
    except UnidentifiedImageError as error:  # Pillow's words name an address in memory
        raise ValueError(f"no image in a format that can be read ({', '.join(_FORMATS)})") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error
    except _DAMAGE as error:
        raise ValueError(f"a damaged image ({error or type(error).__name__})") from error


_FORMATS = tuple(IMAGE_FORMATS)
# What else Pillow's readers raise on damaged bytes: they take numbers and tables from a file as they are there.
_DAMAGE = (TypeError, LookupError, AttributeError, ArithmeticError, EOFError, RuntimeError, struct.error, zlib.error)


def _check_size(image: Image.Image) -> None:
    """Refuse what would take much memory, by what its header says; nothing is decoded yet.

    Raises:
        ValueError: it is too large.
    """
    sizes = [image.size]
    if image.format == "TIFF":  # which is decoded tile by tile, and a tile may be larger than the image
        tags: Any = getattr(image, "tag_v2", {})
        sizes.append((tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)))
    for width, height in sizes:
        if width * height > _MOST_PIXELS:
            raise ValueError(f"{width}x{height} pixels are too many, more than {_MOST_PIXELS:,}; make it smaller")
