"""An image file as pixels of one size. What comes out here is what banks hold: see ``mamldata.bank.FORMAT``."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

Images = npt.NDArray[np.uint8]

_MOST_PIXELS = 1 << 26  # of one image; more is a decompression bomb, not a photograph


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
    try:
        with warnings.catch_warnings():
            # Pillow warns of bombs before it refuses them; our bound is lower than its, and an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # And of odd metadata, in words that name no file.
            warnings.simplefilter("ignore", UserWarning)
            opened = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else Image.fromarray(data)
            with opened as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} pixels are too many")
                turned = ImageOps.exif_transpose(image) if upright else image
                flat = _on_white(_with_8_bits(turned, image.format))
                small = flat.convert("L" if channels == 1 else "RGB").resize(
                    (size, size), Image.Resampling[resampling.upper()]
                )
    except UnidentifiedImageError as error:
        raise ValueError("no image in a format that can be read") from error  # Pillow's words name an address in memory
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error
    except _DAMAGE as error:
        raise ValueError(f"a damaged image ({error or type(error).__name__})") from error
    pixels = np.asarray(small).reshape(size, size, channels)
    return 255 - pixels if invert else pixels


# What else Pillow's readers raise on damaged bytes: they take numbers and tables from a file as they are there.
_DAMAGE = (TypeError, LookupError, AttributeError, ArithmeticError, EOFError, RuntimeError, struct.error, zlib.error)


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
