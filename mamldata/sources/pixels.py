"""The images of a bank, copied by class and place; turned as the class table says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mamldata.sampling.order import Indices
from mamldata.sampling.sampler import ClassTable, turn
from mamldata.sources.source import Images

Integers = npt.NDArray[np.integer[Any]]

_MOST_TURNED = 256 << 20  # bytes of turned images that are kept in memory
_PIECE = 1 << 20  # bytes that stay in a processor's cache while they are copied twice


class Rows:
    """The rows of a bank, which are in one shard or several.

    Args:
        first_rows: the first row of each shard, from 0, in order.
        opened: gives a shard's rows by its number: uint8 ``[rows, image_bytes]``. It is asked once for each.
    """

    def __init__(self, first_rows: Sequence[int], opened: Callable[[int], Images]) -> None:
        self._first = np.array(first_rows, dtype=np.int64)
        self._opened = opened
        self._shards: dict[int, Images] = {}

    def take(self, rows: Indices, out: Images) -> None:
        """Copy rows, int64 ``[n]``, into ``out``, uint8 ``[n, image_bytes]``."""
        if len(self._first) == 1:
            np.take(self._shard(0), rows, axis=0, out=out, mode="clip")  # other modes copy through a buffer
            return
        where = self._shard_of(rows)
        order = np.argsort(where, kind="stable")
        step = max(1, _PIECE // out.shape[1])
        numbers, starts = np.unique(where[order], return_index=True)
        image = np.dtype((np.void, out.shape[1]))  # one element in place of many: copied faster
        target = out.view(image)[:, 0]
        for number, some in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
            shard, first = self._shard(number).view(image)[:, 0], self._first[number]
            for start in range(0, len(some), step):
                here = some[start : start + step]
                target[here] = shard[rows[here] - first]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # another process opens them itself

    def _shard_of(self, rows: Indices) -> Indices:
        return np.searchsorted(self._first, rows, side="right") - 1

    def _shard(self, number: int) -> Images:
        if number not in self._shards:
            self._shards[number] = self._opened(number)
        return self._shards[number]


class Pixels:
    """The images of a split's classes.

    Turned images are made once, and kept in memory, if all of the split's take at most 256 MiB; else each is turned
    when it is copied.

    Args:
        rows: the bank's.
        table: the split's classes.
        image_shape: ``(H, W, C)``.
    """

    def __init__(self, rows: Rows, table: ClassTable, image_shape: tuple[int, int, int]) -> None:
        self._rows, self._table, self._shape = rows, table, image_shape
        self._turned = bool(table.quarter_turns.any())
        self._fits = int(table.images.sum()) * math.prod(image_shape) <= _MOST_TURNED
        self._from: tuple[Rows, Indices] | None = None

    def copy(self, classes: Integers, images: Integers, out: Images) -> None:
        """Copy images.

        Args:
            classes: indices into the class table, integers ``[B, n_way]``.
            images: places among a class's images, integers ``[B, n_way, k]``.
            out: uint8, one dimension; its beginning is filled with ``[B, n_way, k, H, W, C]``.
        """
        rows, first = self._from or self._source()
        wanted = (first[classes][..., None] + images).reshape(-1)
        image_bytes = math.prod(self._shape)
        target = out[: len(wanted) * image_bytes].reshape(-1, image_bytes)
        rows.take(wanted, target)
        if self._turned and not self._fits:
            turn(target.reshape(*images.shape, *self._shape), self._table.quarter_turns[classes])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_from": None}  # another process turns them itself

    def _source(self) -> tuple[Rows, Indices]:
        """Where to take images from, and the first row there of each class."""
        table = self._table
        if not (self._turned and self._fits):
            self._from = self._rows, table.first_row
            return self._from
        starts = np.cumsum(table.images) - table.images
        places = np.arange(int(table.images.sum())) - np.repeat(starts, table.images)
        memory = np.empty((len(places), math.prod(self._shape)), dtype=np.uint8)
        self._rows.take(np.repeat(table.first_row, table.images) + places, memory)
        turn(memory.reshape(-1, *self._shape), np.repeat(table.quarter_turns, table.images))
        self._from = Rows([0], lambda _: memory), starts
        return self._from
