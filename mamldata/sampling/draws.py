"""Drawn episodes that are remembered, so that each is drawn once."""

from __future__ import annotations

from typing import Any

import numpy as np

from mamldata.sampling.order import Indices
from mamldata.sampling.sampler import Draws, EpisodeSampler

_BLOCK = 256  # episodes that are drawn together: three times as fast as one by one in a random order
_AHEAD = 1024  # the same, of episodes that are not remembered
_MOST_BYTES = 128 << 20  # upper bound on what is remembered: 1.4 million 5-way 1-shot episodes with 15 queries


class DrawnEpisodes:
    """The episodes that a sampler draws, without their images.

    All of them are remembered if their number is known and they fit into 128 MiB; they are drawn in blocks, when an
    episode of the block is first needed. Otherwise only the next ones are, for those who read one after the other.

    Args:
        sampler: draws them.
        episodes: how many there are; None: they never end.
    """

    def __init__(self, sampler: EpisodeSampler, episodes: int | None) -> None:
        self.sampler, self.episodes = sampler, episodes
        spec, table = sampler.spec, sampler.table
        dtypes = (np.min_scalar_type(len(table)), np.min_scalar_type(int(table.images.max())))
        per_way = dtypes[0].itemsize + dtypes[1].itemsize * sampler.width + 4 * (spec.query_alpha is not None)
        self._known: Any = None
        self._next: tuple[int, Draws] | None = None
        if episodes is not None and episodes * spec.n_way * per_way <= _MOST_BYTES:
            blocks = -(-episodes // _BLOCK)
            self._known = np.zeros(blocks, dtype=np.bool_)
            # Only the blocks that are drawn take memory.
            self._classes = np.empty((blocks * _BLOCK, spec.n_way), dtype=dtypes[0])
            self._images = np.empty((*self._classes.shape, sampler.width), dtype=dtypes[1])
            self._queries = None if spec.query_alpha is None else np.empty_like(self._classes, dtype=np.int32)

    def get(self, index: Indices) -> Draws:
        """Episodes by their indices, int64 ``[B]``; see ``EpisodeSampler.draw``, but of any integer types."""
        if self._known is None:
            return self._follow(index)
        self._draw_blocks(index // _BLOCK)
        return Draws(self._classes[index], self._images[index], None if self._queries is None else self._queries[index])

    def ways(self, ways: Indices) -> Draws:
        """Single ways as episodes; way ``w`` is number ``w % n_way`` of episode ``w // n_way``.

        Args:
            ways: int64 ``[B, n_way]``.
        """
        n_way = self.sampler.spec.n_way
        index, places = np.divmod(ways, n_way)
        if self._known is None:
            whole, found = np.unique(index, return_inverse=True)
            drawn = self.sampler.draw(whole)
            found = found.reshape(index.shape)
            return Draws(drawn.classes[found, places], drawn.images[found, places])
        self._draw_blocks(index // _BLOCK)
        classes, images = self._classes.reshape(-1), self._images.reshape(-1, self._images.shape[-1])
        return Draws(classes[ways], images[ways])

    def _draw_blocks(self, blocks: Indices) -> None:
        """Draw the blocks that have not been drawn; two threads that do so at once write the same."""
        known = self._known[blocks]
        if known.all():
            return
        for block in np.unique(blocks[~known]).tolist():
            start = block * _BLOCK
            some = slice(start, start + _BLOCK)
            self._classes[some], self._images[some], queries = self.sampler.draw(np.arange(start, start + _BLOCK))
            if self._queries is not None and queries is not None:
                self._queries[some] = queries
            self._known[block] = True

    def _follow(self, index: Indices) -> Draws:
        """Draw episodes; if they follow one another, draw the ones after them too."""
        count = len(index)
        if not count or index[-1] - index[0] != count - 1 or (np.diff(index) != 1).any():
            return self.sampler.draw(index)
        first = int(index[0])
        start, drawn = self._next or (0, None)
        if drawn is None or first < start or first + count > start + len(drawn.classes):
            start, drawn = first, self.sampler.draw(np.arange(first, first + max(count, _AHEAD)))
            self._next = start, drawn
        some = slice(first - start, first - start + count)
        queries = None if drawn.queries is None else drawn.queries[some]
        return Draws(drawn.classes[some], drawn.images[some], queries)

    def __reduce__(self) -> Any:  # another process draws them itself
        return DrawnEpisodes, (self.sampler, self.episodes)
