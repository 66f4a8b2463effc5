"""The order of a stream: which episodes meta-batch t holds. A pure function of numbers, and so resumable anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mamldata.digest import canonical_json, sha256_bytes
from mamldata.errors import RequestError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """Meta-batches counted through all epochs, from t = 0.

    A shuffled order takes a new permutation for each epoch and leaves out what does not fill a meta-batch, so that
    all have one shape; which episodes those are differs from epoch to epoch. A plain order gives every episode once
    in each epoch, the last meta-batch being smaller if need be.

    Attributes:
        episodes: how many there are; None if they never end, and then their order is plain.
        batch_size: episodes in a meta-batch.
        shuffle: whether to permute.
        seed: of the permutations.
    """

    episodes: int | None
    batch_size: int
    shuffle: bool
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise RequestError(f"batch_size must be at least 1, not {self.batch_size}.")
        if self.seed < 0:
            raise RequestError(f"seed must be at least 0, not {self.seed}.")
        if self.episodes is not None and self.shuffle and self.batch_size > self.episodes:
            raise RequestError(
                f"batch_size is {self.batch_size}, but there are only {self.episodes} episodes. Lower it, or build "
                "an archive with more episodes."
            )

    @property
    def batches_per_epoch(self) -> int | None:
        """Meta-batches in an epoch; None if it never ends."""
        if self.episodes is None:
            return None
        if self.shuffle:
            return self.episodes // self.batch_size
        return math.ceil(self.episodes / self.batch_size)

    def indices(self, t: int) -> Indices:
        """The episodes of meta-batch ``t``: int64 ``[batch_size]``, fewer only at the end of a plain epoch."""
        if self.episodes is None or self.batches_per_epoch is None:
            return np.arange(t * self.batch_size, (t + 1) * self.batch_size, dtype=np.int64)
        epoch, step = divmod(t, self.batches_per_epoch)
        start, stop = step * self.batch_size, min((step + 1) * self.batch_size, self.episodes)
        if self.shuffle:
            return permutation(self.seed, epoch, self.episodes)[start:stop]
        return np.arange(start, stop, dtype=np.int64)


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, episodes: int) -> Indices:
    """The order of an epoch: the positions of sorted random keys. int64 ``[episodes]``, read-only.

    The keys are the raw output of Philox, keyed by the first 16 bytes of the SHA-256 of (seed, epoch).
    """
    digest = bytes.fromhex(sha256_bytes(canonical_json({"epoch": epoch, "order": "shuffle", "seed": seed})))
    key = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
    raw = np.random.Philox(key=key).random_raw(episodes)
    order = np.argsort(raw, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order
