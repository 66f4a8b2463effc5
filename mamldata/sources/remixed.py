"""A source whose episodes are formed again in each epoch from the ways of stored ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from mamldata.sampling.order import Indices
from mamldata.sampling.remix import Classes, remix
from mamldata.sampling.sampler import ClassTable
from mamldata.sources.source import AllHere, EpisodeInfo, Images, WaySource

_KEPT = 2  # epochs, because read-ahead and a second pass need neighbouring ones


class RemixedSource(AllHere):
    """Episodes formed again in each epoch from the ways of stored ones; ``index`` counts them through all epochs.

    Args:
        source: the stored episodes.
        seed: of the remix.
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
        """Episodes in an epoch: as many as are stored."""
        return self.source.episodes

    def ways(self, index: Indices) -> Indices:
        """The stored ways that episodes consist of: int64 ``[B, n_way]`` for indices int64 ``[B]``."""
        epochs, places = np.divmod(index, self.episodes)
        n_way = self.info.n_way  # fewer than are stored, if the source is narrowed
        if len(index) and (epochs == epochs[0]).all():  # as in every meta-batch of a stream
            return self._epoch(int(epochs[0]))[places, :n_way]
        found = np.empty((len(index), n_way), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            found[here] = self._epoch(epoch)[places[here], :n_way]
        return found

    def read(self, index: Indices, support: Images, query: Images) -> None:
        """Copy episodes into the caller's memory, see ``Source.read``."""
        self.source.read_ways(self.ways(index), support, query)

    @property
    def table(self) -> ClassTable:
        """The split's classes."""
        return self.source.table

    def classes(self, index: Indices) -> Indices:
        """The classes of episodes, as indices into the table: int64 ``[B, n_way]``, by label."""
        return self._stored_classes().reshape(-1)[self.ways(index)].astype(np.int64)

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
        # Computed from the stored episodes: another process computes them again.
        return {**self.__dict__, "_classes": None, "_epochs": {}}
