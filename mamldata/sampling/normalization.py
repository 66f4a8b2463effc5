"""The mean and deviation by which images are normalised: those of the train split, as exact sums make them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel over all pixels of some classes, in units of the range [0, 1].

    What torchvision's ``Normalize`` takes. Rounded to six decimals, so that they are the same on every machine.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


def normalization(sums: Iterable[tuple[int, int]], pixels: int) -> Normalization:
    """From each channel's sum of values and sum of squares, values being 0 to 255.

    Args:
        sums: for each channel.
        pixels: that the sums are over; of none, mean 0 and deviation 1.
    """
    pairs = [_mean_and_std(total, squares, pixels) if pixels else (0.0, 1.0) for total, squares in sums]
    return Normalization(tuple(mean for mean, _ in pairs), tuple(std for _, std in pairs))


def _mean_and_std(total: int, squares: int, pixels: int) -> tuple[float, float]:
    mean = Fraction(total, pixels)
    variance = Fraction(squares, pixels) - mean * mean
    # A channel that never changes has nothing to be divided by.
    return round(float(mean / 255), 6), round(math.sqrt(variance) / 255, 6) or 1.0
