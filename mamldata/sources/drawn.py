"""Episodes that are drawn when they are read, from the images of a bank: live ones, and those of thin archives."""

from __future__ import annotations

import copy
from typing import Self

import numpy as np

from mamldata.sampling.draws import DrawnEpisodes
from mamldata.sampling.order import Indices
from mamldata.sampling.remix import Classes
from mamldata.sampling.sampler import ClassTable, EpisodeSampler
from mamldata.sources.pixels import Integers, Pixels, Rows
from mamldata.sources.source import AllHere, EpisodeInfo, Images, at_most, require_narrower


class DrawnSource(AllHere):
    """A split whose episodes are drawn when they are read. Reading is for one thread at a time.

    Args:
        info: what the episodes are.
        sampler: draws them.
        rows: the bank's images.
        episodes: how many; None: they never end.
    """

    def __init__(self, info: EpisodeInfo, sampler: EpisodeSampler, rows: Rows, episodes: int | None) -> None:
        self.info = info
        self.sampler = sampler
        self.episodes = episodes
        self._draws = DrawnEpisodes(sampler, episodes)
        self._pixels = Pixels(rows, sampler.table, info.image_shape)

    @property
    def table(self) -> ClassTable:
        """The split's classes."""
        return self.sampler.table

    def read(self, index: Indices, support: Images, query: Images) -> None:
        """Draw episodes and copy their images out of the bank; see ``Source.read``."""
        classes, images, queries = self._draws.get(index)
        if queries is None:
            n_way = self.info.n_way
            self._copy(classes[:, :n_way], images[:, :n_way], support, query)
            return
        first = self.sampler.spec.k_shot
        self._pixels.copy(classes, images[..., : self.info.k_shot], support)
        taken = np.arange(images.shape[2] - first) < queries[..., None]
        self._pixels.copy(np.repeat(classes, queries.reshape(-1)), images[..., first:][taken][:, None], query)

    def query_counts(self, index: Indices) -> Indices | None:
        """See ``Source.query_counts``."""
        queries = self._draws.get(index).queries
        return None if queries is None else queries.astype(np.int64)

    def _copy(self, classes: Integers, images: Integers, support: Images, query: Images) -> None:
        first = self.sampler.spec.k_shot  # the first query image; not info's, which may be fewer
        self._pixels.copy(classes, images[..., : self.info.k_shot], support)
        self._pixels.copy(classes, images[..., first : first + self.info.k_query], query)

    def classes(self, index: Indices) -> Indices:
        """The classes of episodes, as indices into the table: int64 ``[B, n_way]``, by label.

        They are drawn again, which leaves what ``read`` remembers alone, so any thread may ask.
        """
        return self.sampler.draw(index).classes[:, : self.info.n_way].astype(np.int64)

    def view(self, episodes: int | None = None) -> Self:
        """The same episodes for another reader; see ``StoredSource.view``."""
        view = copy.copy(self)
        view.episodes = self.episodes if episodes is None else at_most(episodes, self.episodes)
        return view

    def narrowed(self, n_way: int | None = None, k_shot: int | None = None, k_query: int | None = None) -> Self:
        """The same episodes with fewer ways or images; see ``SplitSource.narrowed``."""
        view = copy.copy(self)
        view.info = require_narrower(self.info, n_way, k_shot, k_query)
        return view


class ThinSource(DrawnSource):
    """A split of a thin archive, whose episodes can be taken apart for remix, as stored ones can."""

    episodes: int
    fits = True

    @property
    def way_source(self) -> Self | None:
        """Itself; None if its ways have unequal numbers of queries."""
        return self if self.info.query_alpha is None else None

    def way_classes(self) -> Classes:
        """The class of each way, as an index into the class table: int32 ``[episodes, n_way]``."""
        return self._draws.get(np.arange(self.episodes)).classes.astype(np.int32)

    def read_ways(self, ways: Indices, support: Images, query: Images) -> None:
        """Copy ways, int64 ``[B, n_way]``, into the caller's memory, which is as for ``Source.read``."""
        classes, images, _ = self._draws.ways(ways)
        self._copy(classes, images, support, query)

    def read_class(self, number: int, image: Images) -> None:
        """Copy the first image of a class, by its index in the table, into ``image``, uint8 ``[H, W, C]``."""
        self._pixels.copy(np.array([[number]]), np.zeros((1, 1, 1), dtype=np.int64), image.reshape(-1))
