"""The order of a mixture: which source meta-batch t comes from. A pure function of numbers, so any t can be resumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from mamldata.errors import RequestError
from mamldata.sampling.order import Indices, Order, permute
from mamldata.words import counted

_MOST_WEIGHT = 10**300  # so that the sum is finite, too
_BLOCK = 1000  # meta-batches among which each source has its share


@dataclass(frozen=True)
class MixedOrder(Order):
    """Meta-batches of several sources without end, each of them whole from one source.

    Of the meta-batches 1000 b to 1000 b + 999, each source has its share by weight, rounded; a permutation that
    depends on (seed, b) alone says which. A source goes through its own order one meta-batch after the other, epoch
    after epoch, each time that it is its turn.

    The index of an episode is ``index in its source * number of sources + number of its source``.

    Attributes:
        parts: the orders of the sources, whose meta-batches have ``batch_size`` episodes.
        weights: of the sources, see ``require_weights``.
    """

    parts: tuple[Order, ...] = ()
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in self.parts:
            if part.batch_size != self.batch_size:
                raise RequestError(
                    f"The sources of a mixture must agree: batch_size is {part.batch_size} in one of them, not "
                    f"{self.batch_size}."
                )

    def place(self, t: int) -> tuple[int, int]:
        """The number of the source of meta-batch ``t``, and how many of its meta-batches come before."""
        block, step = divmod(t, _BLOCK)
        sources = _sources(self.seed, block, self.weights)
        number = int(sources[step])
        before = shares(self.weights, block * _BLOCK)[number]
        return number, before + int((sources[:step] == number).sum())

    def epoch(self, t: int) -> int:
        """The epoch of meta-batch ``t`` in its source."""
        number, own = self.place(t)
        return self.parts[number].epoch(own)

    def indices(self, t: int) -> Indices:
        """The episodes of meta-batch ``t``: int64 ``[batch_size]``, or fewer, as in the source's own order."""
        number, own = self.place(t)
        return self.parts[number].indices(own) * len(self.parts) + number

    def identity(self) -> dict[str, Any]:
        """See ``Order.identity``."""
        return {
            **super().identity(),
            "parts": [part.identity() for part in self.parts],
            "weights": list(self.weights),
        }


def require_weights(weights: Sequence[float] | None, sources: int) -> tuple[float, ...]:
    """A weight for each source of a mixture; None: all equal. Only their ratios count; a source may have 0.

    Raises:
        RequestError: there are not as many as sources, or they are not finite numbers from 0 with a sum above 0.
    """
    if not sources:
        raise RequestError("A mixture needs at least one source.")
    if weights is None:
        return (1.0,) * sources
    if len(weights) != sources:
        raise RequestError(
            f"weights has {counted(len(weights), 'number')}, but there are {counted(sources, 'source')}: give one for "
            "each."
        )
    for weight in weights:
        if not (isinstance(weight, int | float) and 0 <= weight < math.inf):
            raise RequestError(f"weights must be finite numbers from 0, not {weight!r}.")
    if not any(weights):
        raise RequestError("weights must not all be 0.")
    if max(weights) > _MOST_WEIGHT:
        raise RequestError("weights must be at most 1e+300: only their ratios count.")
    return tuple(float(weight) for weight in weights)


def shares(weights: Sequence[float], count: int) -> list[int]:
    """How many of the first ``count`` things each source has.

    The first source gets its share of ``count``, rounded to the nearest; each next one its share of what is left. So no
    source has fewer of a larger ``count``, and the numbers add up to it.
    """
    exact = [Fraction(weight) for weight in weights]
    numbers, left = [], sum(exact)
    for weight in exact:
        numbers.append(math.floor(weight / left * count + Fraction(1, 2)) if left else 0)
        count, left = count - numbers[-1], left - weight
    return numbers


@lru_cache(maxsize=16)
def _sources(seed: int, block: int, weights: tuple[float, ...]) -> Indices:
    """The numbers of the sources of a block of meta-batches: int64 ``[_BLOCK]``, read-only."""
    ends = np.array([shares(weights, number * _BLOCK) for number in (block, block + 1)])
    sources = np.repeat(np.arange(len(weights)), ends[1] - ends[0])[permute(seed, block, _BLOCK, "mixture")]
    sources.flags.writeable = False
    return sources
