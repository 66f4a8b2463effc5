"""The mean and standard deviation that normalise images: those of the train split, computed from exact sums."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel over all pixels of some classes, in units of the range [0, 1].

    These are the arguments of torchvision's ``Normalize``. They are rounded to six decimals, the same on every machine.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_json(self) -> dict[str, list[float]]:
        """As ``archive.json`` and descriptions of data have it."""
        return {"mean": list(self.mean), "std": list(self.std)}


def normalization(sums: Iterable[tuple[int, int]], pixels: int) -> Normalization:
    """The normalization from each channel's sum of values and sum of squares; values are 0 to 255.

    Args:
        sums: (sum, sum of squares) for each channel.
        pixels: number of pixels that the sums are over; 0 gives mean 0 and deviation 1.
    """
    pairs = [_mean_and_std(total, squares, pixels) if pixels else (0.0, 1.0) for total, squares in sums]
    return Normalization(tuple(mean for mean, _ in pairs), tuple(std for _, std in pairs))


def mixed_normalization(parts: Sequence[Normalization], weights: Sequence[float]) -> Normalization:
    """The normalization of a mixture: of the pixels of all parts together, in the proportions of ``weights``.

    Args:
        parts: with the same number of channels each.
        weights: from 0, not all 0.
    """
    shares = [weight / math.fsum(weights) for weight in weights]
    means, stds = [], []
    for pairs in zip(*(zip(part.mean, part.std, strict=True) for part in parts), strict=True):
        mean = math.fsum(share * own for share, (own, _) in zip(shares, pairs, strict=True))
        squares = math.fsum(share * (own**2 + std**2) for share, (own, std) in zip(shares, pairs, strict=True))
        means.append(round(mean, 6))
        stds.append(round(math.sqrt(max(squares - mean**2, 0.0)), 6) or 1.0)
    return Normalization(tuple(means), tuple(stds))


def _mean_and_std(total: int, squares: int, pixels: int) -> tuple[float, float]:
    mean = Fraction(total, pixels)
    variance = Fraction(squares, pixels) - mean * mean
    # A constant channel has deviation 0: divide by 1.
    return round(float(mean / 255), 6), round(math.sqrt(variance) / 255, 6) or 1.0
