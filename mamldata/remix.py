"""Remix: an archive is also a pool of ways, and an epoch of training may join them to other episodes than the stored.

A way is a class with its support and its query images, as it stands in a stored episode. Way ``w`` is place
``w % n_way`` of episode ``w // n_way``. A small archive trains more like endless fresh episodes in this manner.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from mamldata.episodes import ClassTable
from mamldata.errors import DamagedError
from mamldata.order import Indices, permutation
from mamldata.sources import Classes, EpisodeInfo, Images, Source

_KEPT = 4  # epochs; read-ahead and a second pass look at neighbours


class WaySource(Source, Protocol):
    """A source whose episodes can be taken apart."""

    @property
    def episodes(self) -> int:
        """How many there are."""
        ...

    def way_classes(self) -> Classes:
        """The class of each way, as an index into the class table: int32 ``[episodes, n_way]``."""
        ...

    def read_ways(self, ways: Indices, support: Images, query: Images) -> None:
        """Copy ways, int64 ``[B, n_way]``, into the caller's memory, which is as for ``Source.read``."""
        ...


class RemixedSource:
    """Episodes formed anew in each epoch from the ways of stored ones; ``index`` counts them through all epochs.

    Args:
        source: of the stored episodes.
        seed: of the mixing.
    """

    def __init__(self, source: WaySource, seed: int) -> None:
        self.source = source
        self.seed = seed
        self._classes: Classes | None = None
        self._epochs: dict[int, Indices] = {}

    @property
    def info(self) -> EpisodeInfo:
        """What the episodes are."""
        return self.source.info

    @property
    def episodes(self) -> int:
        """How many there are in an epoch: as many as are stored."""
        return self.source.episodes

    def ways(self, index: Indices) -> Indices:
        """The stored ways that episodes consist of: int64 ``[B, n_way]`` for indices int64 ``[B]``."""
        epochs, places = np.divmod(index, self.episodes)
        found = np.empty((len(index), self.info.n_way), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            found[here] = self._epoch(epoch)[places[here]]
        return found

    def read(self, index: Indices, support: Images, query: Images) -> None:
        """Copy episodes into the caller's memory, see ``Source.read``."""
        self.source.read_ways(self.ways(index), support, query)

    @property
    def table(self) -> ClassTable:
        """The split's classes."""
        return self.source.table

    def classes(self, index: Indices) -> Indices:
        """Which classes of the table episodes show: int64 ``[B, n_way]``, by label."""
        return self._stored_classes().reshape(-1)[self.ways(index)].astype(np.int64)

    def class_labels(self, index: int) -> list[str]:
        """The names of an episode's classes, one for each way."""
        return [self.table.label(way) for way in self.classes(np.array([index]))[0].tolist()]

    def _stored_classes(self) -> Classes:
        if self._classes is None:
            self._classes = self.source.way_classes()
        return self._classes

    def _epoch(self, epoch: int) -> Indices:
        if (known := self._epochs.get(epoch)) is not None:
            return known
        mixed = remix(self._stored_classes(), self.seed, epoch)
        while len(self._epochs) >= _KEPT:
            self._epochs.pop(next(iter(self._epochs)), None)
        self._epochs[epoch] = mixed
        return mixed

    def __getstate__(self) -> dict[str, Any]:
        # A function of what is stored: another process finds it again.
        return {**self.__dict__, "_classes": None, "_epochs": {}}


def remix(classes: Classes, seed: int, epoch: int) -> Indices:
    """The episodes of an epoch: a permutation of all ways, cut into episodes, with no class twice in any.

    A pure function of its arguments. The permutation alone would put a class twice into some episodes; those are
    mended by ``_part_twins``, which exchanges ways and loses none. Every way is in exactly one episode.

    Args:
        classes: int32 ``[episodes, n_way]``, as stored; no class twice in an episode.
        seed, epoch: of the permutation.

    Returns:
        Ways: int64 ``[episodes, n_way]``, read-only.

    Raises:
        DamagedError: a stored episode has a class twice, which can leave no way to mix them.
    """
    if len(twins := _twins(classes)):
        raise DamagedError(
            f"Episode {twins[0] // classes.shape[1]} of the train split holds a class twice: the archive was "
            "not made by mamldata build. Check it with: mamldata verify ARCHIVE"
        )
    ways = permutation(seed, epoch, classes.size, "remix").reshape(classes.shape).copy()
    _part_twins(ways, classes.reshape(-1)[ways])
    ways.flags.writeable = False
    return ways


def _part_twins(ways: Indices, classes: Classes) -> None:
    """Exchange ways until no episode has a class twice. Works in place on both arrays, ``[episodes, n_way]``.

    A twin is a way whose class stands before it in its episode. The twins are taken in order of their positions; a
    twin at position p, of class a, changes places with the first way after it, going round at the end, that is in an
    episode without a, and that is a twin itself, or of a class which p's episode lacks. Each exchange makes the number
    of twins smaller by at least one. There always is such a way: no stored episode had a class twice, so a is in at
    most as many ways as there are episodes, and some episode lacks it; that episode has a twin, or else n_way classes
    without a, while p's has at most n_way - 2 besides a.
    """
    n_way, size = classes.shape[1], classes.size
    flat_ways, flat = ways.reshape(-1), classes.reshape(-1)

    def episode(position: int) -> list[int]:
        start = position - position % n_way
        found: list[int] = flat[start : start + n_way].tolist()
        return found

    # Once more, because an exchange with a twin may leave one where there was none.
    while len(twins := _twins(classes)):
        for p in twins.tolist():
            own, place = episode(p), p % n_way
            if own[place] not in own[:place]:
                continue  # an earlier exchange has parted it
            for q in (position % size for position in range(p + 1, p + size)):
                other, there = episode(q), q % n_way
                if own[place] not in other and (other[there] not in own or other[there] in other[:there]):
                    for array in (flat_ways, flat):
                        array[p], array[q] = array[q], array[p]
                    break


def _twins(classes: Classes) -> Indices:
    """The positions, in ``classes`` laid flat, of all ways whose class stands before them in their episode."""
    order = np.argsort(classes, axis=1, kind="stable")  # the first of equals stays the first
    ranked = np.take_along_axis(classes, order, axis=1)
    episodes, later = np.nonzero(ranked[:, 1:] == ranked[:, :-1])
    positions: Indices = np.sort(episodes * classes.shape[1] + order[episodes, later + 1])
    return positions
