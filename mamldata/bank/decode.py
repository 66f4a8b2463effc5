"""Decode an image file to pixels of one size, as banks store them; see ``mamldata.bank.format.FORMAT``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from mamldata.io.images import Images, open_image

_BAND_PIXELS = 1 << 22  # converted at once


def decode_image(
    data: bytes | Images | Image.Image,
    size: int,
    channels: int,
    resampling: str,
    invert: bool,
    upright: bool = False,
    fit: str = "stretch",
) -> Images:
    """Decode an image to uint8 ``[size, size, channels]``: grey or RGB, resized, optionally inverted.

    Transparent and padded pixels become white before any inversion. 16-bit grey keeps its upper eight bits, as Pillow
    does for 16-bit colours.

    Args:
        data: encoded; or its pixels, uint8 ``[H, W, 3]``; or an image of Pillow's, which is not changed.
        size, channels, resampling, invert, upright, fit: see ``ImageRecipe``.

    Raises:
        ValueError: it is not an image, is damaged, has too many pixels, or has values without a known range.
    """
    with open_image(data) as image:
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        flat = _flat(image, "L" if channels == 1 else "RGB")
        small = _FITS[fit](flat, (size, size), Image.Resampling[resampling.upper()])
    pixels = np.asarray(small).reshape(size, size, channels)
    return 255 - pixels if invert else pixels


_FITS: dict[str, Callable[[Image.Image, tuple[int, int], Image.Resampling], Image.Image]] = {
    "stretch": lambda image, size, method: image.resize(size, method),
    "crop": ImageOps.fit,
    "pad": lambda image, size, method: ImageOps.pad(image, size, method, color="white"),
}
_TILE_WIDTH, _TILE_LENGTH = 322, 323


def _flat(image: Image.Image, mode: str) -> Image.Image:
    """An image on white, in ``mode``. Large images are converted in bands of rows, to save memory."""
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
    """Convert images with more bits to 8; Pillow would clip at 255. ``kind`` is the file's format."""
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PPM"):  # Pillow scales PPM to 16 bits
        greys = np.asarray(image)
        small = (greys >> 8).astype(np.uint8)
        return Image.fromarray(np.where(greys == image.info.get("transparency", -1), np.uint8(255), small))
    if image.mode in {"I", "F"}:
        raise ValueError("its pixels are 32-bit numbers without a known white value; save it with 8 or 16 bits")
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """Put an image on white. Drawings are often ink on transparency, whose stored colour is mostly the ink's."""
    if not image.has_transparency_data:
        return image
    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(image.convert("RGBA"))
    return paper
