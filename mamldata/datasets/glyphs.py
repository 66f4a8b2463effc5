"""The embedded dataset: characters of invented alphabets, drawn by this program with integers only.

It has Omniglot's shape (alphabets of characters, each drawn twenty times, 105x105 pixels, black on white), needs no
network, and goes through every step of a real dataset. It uses no floating point and no library's random functions, so
every machine draws the same bits. Any change here changes the digests in ``manifests/glyphs.toml`` and makes it another
dataset: give it a new version.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

ALPHABETS = 12
CHARACTERS = 20
DRAWINGS = 20
SIZE = 105

_SEED = 0x676C79706873  # "glyphs"
_STROKES = 4  # at most, in a character
_UNIT = 16  # coordinates are in sixteenths of a pixel
_STEPS = 96  # points along a stroke
_PEN = [(x, y) for y in range(-2, 3) for x in range(-2, 3) if x * x + y * y <= 5]  # a disc, in pixels

Ints = npt.NDArray[np.int64]


def write_archive(path: Path) -> None:
    """Draw the whole dataset into a zip of 1-bit PBM images, the same bytes on every machine."""
    # Stored, not deflated: the output of compressors differs between machines.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as container:
        for name, image in drawings():
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3
            info.external_attr = 0o644 << 16
            container.writestr(info, pbm(image))


def drawings() -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    """Every image in canonical order: its member name, and its pixels, bool ``[SIZE, SIZE]``, True for ink."""
    for alphabet in range(ALPHABETS):
        style = _Draws(alphabet, 0)
        most_strokes, curvature = style.between(2, _STROKES), style.between(4, 30)
        for character in range(CHARACTERS):
            strokes = _character(_Draws(alphabet, 1 + character), most_strokes, curvature)
            images = _draw(strokes, _Draws(alphabet, 1001 + character))
            for drawing, image in enumerate(images):
                yield (
                    f"glyphs/alphabet{alphabet + 1:02d}/character{character + 1:02d}/{drawing + 1:02d}.pbm",
                    image,
                )


def pbm(image: npt.NDArray[np.bool_]) -> bytes:
    """A 1-bit image as a binary portable bitmap, where 1 is black."""
    height, width = image.shape
    return f"P4\n{width} {height}\n".encode() + np.packbits(image, axis=1).tobytes()


class _Draws:
    """Random integers from Philox's raw output, keyed by (alphabet, purpose)."""

    def __init__(self, alphabet: int, purpose: int) -> None:
        self.source = np.random.Philox(key=[_SEED, alphabet << 32 | purpose])

    def numbers(self, low: int, high: int, *shape: int) -> Ints:
        """Numbers from ``low`` to ``high``, both included."""
        raw = self.source.random_raw(int(np.prod(shape)))
        return (raw % np.uint64(high - low + 1)).astype(np.int64).reshape(shape) + low

    def between(self, low: int, high: int) -> int:
        return int(self.numbers(low, high, 1)[0])


def _character(draws: _Draws, most_strokes: int, curvature: int) -> Ints:
    """Control points ``[strokes, 3, 2]`` (x, y) of a character's strokes: quadratic curves on a coarse grid."""
    count = draws.between(2, most_strokes)
    grid = draws.numbers(0, 4, count, 2, 2)
    # A stroke of length zero would be a dot: move its end to another grid point.
    still = (grid[:, 0] == grid[:, 1]).all(axis=1)
    grid[still, 1] = (grid[still, 0] + 2) % 5
    ends = (16 + grid * 18) * _UNIT
    bend = draws.numbers(-curvature, curvature, count, 2) * _UNIT
    middle = (ends[:, 0] + ends[:, 1]) // 2 + bend
    return np.stack([ends[:, 0], middle, ends[:, 1]], axis=1)


def _draw(strokes: Ints, draws: _Draws) -> npt.NDArray[np.bool_]:
    """Twenty drawings ``[DRAWINGS, SIZE, SIZE]`` of one character, each in a different unsteady hand."""
    points = strokes[None] + draws.numbers(-4 * _UNIT, 4 * _UNIT, DRAWINGS, *strokes.shape)
    centre = SIZE * _UNIT // 2
    # Scale, shear and lean of each hand: a matrix in units of 1/256, close to the identity.
    hand = draws.numbers(-30, 30, DRAWINGS, 2, 2) + np.array([[250, 0], [0, 250]])
    points = np.einsum("dspc,dec->dspe", points - centre, hand) // 256 + centre
    points += draws.numbers(-5 * _UNIT, 5 * _UNIT, DRAWINGS, 1, 1, 2)
    path = _curve(points) // _UNIT  # [drawings, strokes, steps, 2] in pixels
    dots = (path[..., None, :] + np.array(_PEN)).clip(0, SIZE - 1)
    image = np.zeros((DRAWINGS, SIZE, SIZE), dtype=np.bool_)
    drawing = np.arange(DRAWINGS)[:, None, None, None]
    image[drawing, dots[..., 1], dots[..., 0]] = True
    return image


def _curve(points: Ints) -> Ints:
    """Points along quadratic Bezier curves: ``[..., 3, 2]`` to ``[..., _STEPS + 1, 2]``, rounded down."""
    t = np.arange(_STEPS + 1)[:, None]
    start, middle, end = (points[..., None, index, :] for index in range(3))
    away = _STEPS - t
    curve: Ints = (away * away * start + 2 * away * t * middle + t * t * end) // (_STEPS * _STEPS)
    return curve
