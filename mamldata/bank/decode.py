"""An image file as pixels of one size. What comes out here is what banks hold: see ``mamldata.bank.format.FORMAT``."""

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
from PIL import Image, ImageOps, UnidentifiedImageError

from mamldata.io.containers import IMAGE_FORMATS

Images = npt.NDArray[np.uint8]

_MOST_PIXELS = 1 << 26  # of one image: photographs of 64 megapixels pass
_BAND_PIXELS = 1 << 22  # that are converted at once


def decode_image(
    data: bytes | Images, size: int, channels: int, resampling: str, invert: bool, upright: bool = False
) -> Images:
    """An image as uint8 ``[size, size, channels]``: to grey or RGB, resized, inverted if asked for.

    What is transparent becomes white, as paper is, before anything is inverted. Of 16-bit grey the upper eight bits
    are taken, as Pillow takes them of 16-bit colours.

    Args:
        data: encoded, or its pixels, uint8 ``[H, W, 3]``.
        size, channels, resampling, invert, upright: see ``ImageRecipe``.

    Raises:
        ValueError: not an image, a damaged one, one of too many pixels, or one of numbers without a known range.
    """
    with open_image(data) as image:
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        flat = _flat(image, "L" if channels == 1 else "RGB")
        small = flat.resize((size, size), Image.Resampling[resampling.upper()])
    pixels = np.asarray(small).reshape(size, size, channels)
    return 255 - pixels if invert else pixels


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


_TILE_WIDTH, _TILE_LENGTH = 322, 323


def _flat(image: Image.Image, mode: str) -> Image.Image:
    """An image on white, in ``mode``. A large one in bands of rows, so that few copies of it are in memory at once."""
    if image.mode == mode and not image.has_transparency_data:
        image.load()
        return image
    kind = image.format
    rows = max(1, _BAND_PIXELS // max(1, image.width))
    if rows >= image.height:
        return _on_white(_with_8_bits(image, kind)).convert(mode)
    flat = Image.new(mode, image.size)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        flat.paste(_on_white(_with_8_bits(band, kind)).convert(mode), (0, top))
    return flat


def _with_8_bits(image: Image.Image, kind: str | None) -> Image.Image:
    """Images of more bits with 8; Pillow would cut off at 255. ``kind`` is the file's format."""
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PPM"):  # which stretches all to 16 bits
        greys = np.asarray(image)
        small = (greys >> 8).astype(np.uint8)
        return Image.fromarray(np.where(greys == image.info.get("transparency", -1), np.uint8(255), small))
    if image.mode in {"I", "F"}:
        raise ValueError(
            "its pixels are 32-bit numbers, of which nothing says which is white; save it with 8 or 16 bits"
        )
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """Drawings often are ink on nothing, and what is stored where nothing is may be any colour: mostly ink's."""
    if not image.has_transparency_data:
        return image
    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(image.convert("RGBA"))
    return paper
