"""Decoding images: the right pixels whatever the file's kind and mode, and one kind of error for what is none."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mamldata.bank import decode
from mamldata.bank.decode import decode_image

GREYS = np.arange(256, dtype=np.uint8).reshape(16, 16)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decoded(data: bytes, channels: int = 1, *, invert: bool = False, upright: bool = False) -> np.ndarray:
    """An image of 16x16 as it is."""
    return decode_image(data, 16, channels, "lanczos", invert, upright)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("invert", [False, True])
def test_images_of_every_mode(mode: str, channels: int, invert: bool) -> None:
    """Grey among colour and colour among grey become what the recipe says, with the values that they had."""
    image = Image.fromarray(GREYS).convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    expected = np.asarray(image.convert("RGB"))[..., :channels]
    assert np.array_equal(decoded(data, channels, invert=invert), 255 - expected if invert else expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF of other byte order", "PGM", "PGM of 12 bits"])
def test_16_bit_greys_keep_their_range(kind: str, channels: int) -> None:
    """Black stays black, white stays white, and 256 greys between them are told apart."""
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    if kind.startswith("PGM"):
        most = 4095 if "12" in kind else 65535
        data = b"P5 16 16 %d\n" % most + (values // (65536 // (most + 1))).astype(">u2").tobytes()
    else:
        data = encoded(Image.fromarray(values.astype(">u2" if "other" in kind else "<u2")), kind.split()[0])
    assert np.array_equal(decoded(data, channels), np.repeat(GREYS[..., None], channels, 2))


def test_16_bit_greys_are_turned_upright() -> None:
    """As the camera noted, like every other image."""
    notes = Image.Exif()
    notes[274] = 6
    data = encoded(Image.fromarray(GREYS.astype(np.uint16) * 257), exif=notes)
    assert np.array_equal(decoded(data, upright=True)[..., 0], np.rot90(GREYS, 3))


@pytest.mark.parametrize("values", [np.arange(256, dtype=np.int32), np.linspace(0, 1, 256, dtype=np.float32)])
def test_numbers_without_a_known_range_are_refused(values: np.ndarray) -> None:
    """Nobody knows which of them is white."""
    with pytest.raises(ValueError, match="32-bit numbers without a known white value; save it with 8 or 16"):
        decoded(encoded(Image.fromarray(values.reshape(16, 16)), "TIFF"))


INK = (GREYS > 99) & (GREYS < 150)
NOTHING = {
    "RGBA": Image.fromarray(np.dstack([np.zeros((16, 16, 3), np.uint8), np.where(INK, 255, 0).astype(np.uint8)])),
    "LA": Image.merge("LA", [Image.new("L", (16, 16)), Image.fromarray(np.where(INK, 255, 0).astype(np.uint8))]),
    "P": Image.fromarray(np.where(INK, 0, 1).astype(np.uint8)).convert("P"),
    "L": Image.fromarray(np.where(INK, 0, 9).astype(np.uint8)),
    "RGB": Image.fromarray(np.where(INK, 0, 9).astype(np.uint8)).convert("RGB"),
    "I;16": Image.fromarray(np.where(INK, 0, 9).astype(np.uint16)),
}
TRANSPARENT = {"P": {"transparency": 1}, "L": {"transparency": 9}, "RGB": {"transparency": (9, 9, 9)}}
TRANSPARENT["I;16"] = TRANSPARENT["L"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", NOTHING)
def test_black_ink_on_nothing(mode: str, channels: int) -> None:
    """What is transparent is paper: white, whatever colour is stored there; inverted, ink is 255 and paper 0."""
    data = encoded(NOTHING[mode], **TRANSPARENT.get(mode, {}))
    expected = np.repeat(np.where(INK, 0, 255)[..., None], channels, 2)
    assert np.array_equal(decoded(data, channels), expected)
    assert np.array_equal(decoded(data, channels, invert=True), 255 - expected)


def test_half_transparent_ink_is_half_as_dark() -> None:
    """The smooth edges of an icon."""
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 51))
    assert np.all(decoded(encoded(image)) == 204)


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"not an image", b"P4\n999999999 9\n", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image(data: bytes) -> None:
    """ValueError, which the bank turns into an error with a place, and nothing else."""
    with pytest.raises(ValueError, match=r"."):
        decode_image(data, 8, 1, "lanczos", invert=True)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "PPM", "BMP", "GIF", "WEBP", "TIFF"])
@pytest.mark.filterwarnings("ignore:Image size.*could be decompression bomb")
def test_flipped_bytes_in_images_never_crash_it(kind: str) -> None:
    """A damaged image is an image or a ValueError."""
    whole = encoded(Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)), kind)
    chance = np.random.default_rng(0)
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= int(chance.integers(1, 256))
        try:
            assert decode_image(bytes(data), 8, 3, "lanczos", invert=True).shape == (8, 8, 3)
        except ValueError:
            continue


def test_a_tiff_whose_numbers_are_text() -> None:
    """Pillow takes the place of the pixels for a string then, and raises what no reader of images should."""
    data = encoded(Image.fromarray(GREYS), "TIFF")
    strips = b"\x11\x01\x04\x00"  # tag 273, type 4: a whole number
    assert data.count(strips) == 1
    with pytest.raises(ValueError, match=r"a damaged image .*'str' object"):
        decoded(data.replace(strips, b"\x11\x01\x02\x00"))


@pytest.mark.parametrize("kind", ["PCX", "TGA", "ICO", "JPEG2000", "EPS", "a plugin's"])
def test_other_formats(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Pillow, its plugins or programs such as Ghostscript could read as well is no image here, nor anywhere."""
    if kind == "a plugin's":
        monkeypatch.setitem(Image.OPEN, "PLUGIN", (lambda *_: Image.new("L", (16, 16)), None))
        monkeypatch.setattr(Image, "ID", ["PLUGIN", *Image.ID])
        data = b"anything"
    else:
        data = encoded(Image.fromarray(GREYS), kind)
    with pytest.raises(
        ValueError, match=r"not an image in a supported format \(PNG, JPEG, PPM, BMP, GIF, WEBP, TIFF\)"
    ):
        decoded(data)


BANDED = {
    **NOTHING,
    "1": Image.fromarray(GREYS).convert("1"),
    "grey": Image.fromarray(GREYS),
    "16 bits": Image.fromarray(GREYS.astype(np.uint16) * 257),
    "colours": Image.fromarray(np.dstack([GREYS, GREYS.T, 255 - GREYS])),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("rows", [1, 3, 15])
@pytest.mark.parametrize("mode", BANDED)
def test_bands_make_no_difference(mode: str, rows: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large image is converted in bands of rows, to the same pixels as at once."""
    data = encoded(BANDED[mode], **TRANSPARENT.get(mode, {}))
    whole = decoded(data, channels)
    monkeypatch.setattr(decode, "_BAND_PIXELS", 16 * rows)
    assert np.array_equal(decoded(data, channels), whole)


_PEAK = """
import sys
from mamldata.bank.decode import decode_image
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) << 10
data = open(sys.argv[1], "rb").read()
decode_image(b"P6 1 1 255 xyz", 84, 3, "lanczos", False)
before = peak()
decode_image(data, 84, 3, "lanczos", False, True)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process's memory is in Linux's /proc")
def test_the_memory_of_a_large_image(tmp_path: Path) -> None:
    """Transparent colours, which take the most: two copies of the image, of 4 bytes a pixel, and little else."""
    side = 3000
    (tmp_path / "large.png").write_bytes(encoded(Image.new("RGBA", (side, side)), compress_level=1))
    command = [sys.executable, "-c", _PEAK, str(tmp_path / "large.png")]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert int(told.stdout) < 4 * 4 * side * side


def test_a_tile_that_is_larger_than_its_image() -> None:
    """A TIFF of 16x16 pixels whose one tile would be decoded to a gigabyte is refused by its header."""
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 32768, 323: 32768, 324: 8, 325: 8}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(12)
    with pytest.raises(ValueError, match="32768x32768 pixels are more than the limit of 67,108,864; make it smaller"):
        decoded(data)


def test_too_many_pixels() -> None:
    """A small file that decodes to a gigabyte is refused before it is decoded."""
    with pytest.raises(ValueError, match="8200x8200 pixels are more than"):
        decode_image(encoded(Image.new("1", (8200, 8200))), 8, 1, "lanczos", invert=True)
    with pytest.raises(ValueError, match="decompression bomb"):
        decode_image(b"P4\n60000 60000\n", 8, 1, "lanczos", invert=True)
