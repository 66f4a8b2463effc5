"""The order of a stream: which episodes are in meta-batch t. A pure function of numbers, so any t can be resumed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, update_wrapper
from typing import Any

import numpy as np
import numpy.typing as npt

from mamldata.errors import RequestError
from mamldata.io.digest import canonical_json, sha256_bytes

Indices = npt.NDArray[np.int64]

_KEPT = 2  # epochs: prefetching and a second pass use neighbouring ones
_ORDERS = 8  # orders whose epochs are kept: those of a mixture's sources


@dataclass(frozen=True)
class Order:
    """Meta-batches counted through all epochs, from t = 0.

    A shuffled order takes a new permutation for each epoch and drops the episodes that do not fill a meta-batch, so
    that all have the same shape; which ones are dropped differs from epoch to epoch. A plain order has every episode
    once in each epoch; the last meta-batch may be smaller.

    Remixed episodes are already random and new in each epoch: their order is plain, but their indices run through all
    epochs, and those that do not fill a meta-batch are dropped as in a shuffled order.

    Attributes:
        episodes: number of episodes in an epoch; None if they never end, and then their order is plain.
        batch_size: episodes in a meta-batch.
        shuffle: whether to permute.
        seed: of the permutations.
        remix: whether the episodes are those of a ``RemixedSource`` with the same seed.
        shards: number of episodes in each shard, if a shuffled epoch goes through one shard after the other: the
            shards in a new order, and the episodes of each in a new order.
    """

    episodes: int | None
    batch_size: int
    shuffle: bool
    seed: int
    remix: bool = False
    shards: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise RequestError(f"batch_size must be at least 1, not {self.batch_size}.")
        if self.seed < 0:
            raise RequestError(f"seed must be at least 0, not {self.seed}.")
        if self.episodes is not None and self._drops_the_rest and self.batch_size > self.episodes:
            raise RequestError(
                f"batch_size is {self.batch_size}, but there are only {self.episodes} episodes. Lower it, or build "
                "an archive with more episodes."
            )

    @property
    def _drops_the_rest(self) -> bool:
        return self.shuffle or self.remix

    @property
    def batches_per_epoch(self) -> int | None:
        """Meta-batches in an epoch; None if it never ends."""
        if self.episodes is None:
            return None
        if self._drops_the_rest:
            return self.episodes // self.batch_size
        return math.ceil(self.episodes / self.batch_size)

    def place(self, t: int) -> tuple[int, int]:
        """The number of the source of meta-batch ``t``, always 0 but in a mixture, and the meta-batches before it."""
        return 0, t

    def epoch(self, t: int) -> int:
        """The epoch of meta-batch ``t``; 0 if the first one never ends."""
        return 0 if self.batches_per_epoch is None else t // self.batches_per_epoch

    def identity(self) -> dict[str, Any]:
        """What distinguishes the order, as plain values: those of JSON."""
        return {**asdict(self), "shards": list(self.shards or ())}

    def indices(self, t: int) -> Indices:
        """The episodes of meta-batch ``t``: int64 ``[batch_size]``, fewer only at the end of a plain epoch."""
        if self.episodes is None or self.batches_per_epoch is None:
            return np.arange(t * self.batch_size, (t + 1) * self.batch_size, dtype=np.int64)
        epoch, step = divmod(t, self.batches_per_epoch)
        start, stop = step * self.batch_size, min((step + 1) * self.batch_size, self.episodes)
        if self.shuffle and self.shards is not None:
            return shard_permutation(self.seed, epoch, self.shards)[start:stop]
        if self.shuffle:
            return permutation(self.seed, epoch, self.episodes)[start:stop]
        first = epoch * self.episodes if self.remix else 0
        return np.arange(first + start, first + stop, dtype=np.int64)


class _Kept:
    """A function of (seed, epoch, …) that keeps the last ``_KEPT`` epochs of each of the last ``_ORDERS`` orders."""

    def __init__(self, compute: Callable[..., Indices]) -> None:
        update_wrapper(self, compute)

        @lru_cache(maxsize=_ORDERS)
        def epochs(seed: int, *rest: object) -> Callable[[int], Indices]:
            return lru_cache(maxsize=_KEPT)(lambda epoch: compute(seed, epoch, *rest))

        self._epochs = epochs
        self.cache_clear = epochs.cache_clear

    def __call__(self, seed: int, epoch: int, *rest: object) -> Indices:
        return self._epochs(seed, *rest)(epoch)


@lru_cache(maxsize=_KEPT * _ORDERS)
def shard_runs(order: Order, epoch: int, shards: tuple[int, ...]) -> tuple[Indices, Indices]:
    """How an epoch goes through shards: their numbers in turn, and the position in the epoch at which each ends.

    Args:
        order: one that takes shard after shard: plain, or with ``shards``.
        epoch: its number.
        shards: number of episodes in each.

    Returns:
        int64 ``[shards]``, twice; read-only.
    """
    count = len(shards)
    numbers = np.arange(count) if order.shards is None else permutation(order.seed, epoch, count, "shards")
    ends = np.cumsum(np.array(shards, dtype=np.int64)[numbers])
    numbers.flags.writeable = ends.flags.writeable = False
    return numbers, ends


def share(indices: Indices, rank: int = 0, world_size: int = 1) -> Indices:
    """One rank's near-equal contiguous slice of a meta-batch.

    The slices of all ranks, concatenated in order, are the whole meta-batch.
    """
    return indices[len(indices) * rank // world_size : len(indices) * (rank + 1) // world_size]


def permute(seed: int, epoch: int, count: int, order: str) -> Indices:
    """A permutation: the positions of sorted random keys. int64 ``[count]``.

    The keys are the raw output of Philox, keyed by the first 16 bytes of the SHA-256 of (seed, epoch, order), where
    ``order`` is ``shuffle`` for episodes, ``remix`` for ways, ``shards`` for shards and ``shard 7`` for the episodes
    of the eighth of them.
    """
    digest = bytes.fromhex(sha256_bytes(canonical_json({"epoch": epoch, "order": order, "seed": seed})))
    key = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
    raw = np.random.Philox(key=key).random_raw(count)
    return np.argsort(raw, kind="stable").astype(np.int64, copy=False)


@_Kept
def permutation(seed: int, epoch: int, count: int, order: str = "shuffle") -> Indices:
    """The order of an epoch, see ``permute``; cached and read-only."""
    positions = permute(seed, epoch, count, order)
    positions.flags.writeable = False
    return positions


@_Kept
def shard_permutation(seed: int, epoch: int, shards: tuple[int, ...]) -> Indices:
    """The order of an epoch that goes through shards one after the other: int64 ``[episodes]``, read-only.

    Args:
        seed, epoch: of the permutations.
        shards: number of episodes in each.
    """
    starts = np.cumsum([0, *shards])
    order = permutation(seed, epoch, len(shards), "shards").tolist()
    positions = np.concatenate([starts[s] + permute(seed, epoch, shards[s], f"shard {s}") for s in order])
    positions.flags.writeable = False
    return positions
