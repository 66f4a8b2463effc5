"""A source that holds several others, for a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mamldata.errors import RequestError
from mamldata.io.digest import canonical_json, sha256_bytes
from mamldata.sampling.normalization import mixed_normalization
from mamldata.sampling.order import Indices
from mamldata.sampling.sampler import LEAST, ClassTable
from mamldata.sources.source import AllHere, EpisodeInfo, Images, Source

_ALIKE = ("split", "n_way", "k_shot", "k_query", "query_alpha", "image_shape")


class MixedSource(AllHere):
    """Episodes of several sources, without end; the order of a mixture says which, see ``MixedOrder``.

    An index is ``index in its source * number of sources + number of its source``. All indices of a call are of one
    source, as in a meta-batch.

    Args:
        parts: the sources.
        weights: of the sources, see ``mamldata.sampling.mixture.require_weights``; they only matter for the mean and
            deviation.

    Raises:
        RequestError: the shapes of the episodes or their splits differ.
    """

    episodes = None  # see ``Source.episodes``

    def __init__(self, parts: Sequence[Source], weights: Sequence[float]) -> None:
        self.parts = tuple(parts)
        self.info = mixed_info([part.info for part in parts], weights)
        tables = [part.table for part in parts]
        self._first_class = np.cumsum([0, *map(len, tables)])
        self.table = ClassTable(
            names=sum((table.names for table in tables), ()),
            quarter_turns=np.concatenate([table.quarter_turns for table in tables]),
            first_row=np.concatenate([table.first_row for table in tables]),
            images=np.concatenate([table.images for table in tables]),
        )

    def read(self, index: Indices, support: Images, query: Images) -> None:
        """Copy episodes into the caller's memory, see ``Source.read``."""
        number, own = self.place(index)
        self.parts[number].read(own, support, query)

    def query_counts(self, index: Indices) -> Indices | None:
        """See ``Source.query_counts``."""
        number, own = self.place(index)
        return self.parts[number].query_counts(own)

    def classes(self, index: Indices) -> Indices:
        """The classes of episodes, as indices into the table: int64 ``[B, n_way]``, by label."""
        number, own = self.place(index)
        return self.parts[number].classes(own) + int(self._first_class[number])

    def place(self, index: Indices) -> tuple[int, Indices]:
        """The number of the source of episodes, and their indices in it; 0 if there are no episodes."""
        own, numbers = np.divmod(index, len(self.parts))
        return int(numbers[0]) if len(index) else 0, own


def mixed_info(infos: Sequence[EpisodeInfo], weights: Sequence[float]) -> EpisodeInfo:
    """What the episodes of a mixture are: ``sources`` says it of each.

    ``bank_sha256`` is a digest of all that, ``episode_seed`` is 0, and ``normalization`` is that of all images in the
    proportions of the weights.

    Raises:
        RequestError: the shapes of the episodes or their splits differ.
    """
    first = infos[0]
    for number, info in enumerate(infos):
        for key in _ALIKE:
            if (mine := getattr(info, key)) != (its := getattr(first, key)):
                advice = " Take fewer of the larger ones, by n_way, k_shot and k_query." if key in LEAST else ""
                raise RequestError(
                    f"The sources of a mixture must agree: {key} is {its} in the first ({first.dataset}), and {mine} "
                    f"in number {number + 1} ({info.dataset}).{advice}"
                )
    names: dict[str, Any] = {
        key: " + ".join(dict.fromkeys(getattr(info, key) for info in infos))  # such as omniglot + glyphs
        for key in ("dataset", "split_scheme", "rotations")
    }
    return replace(
        first,
        **names,
        bank_sha256=sha256_bytes(canonical_json([info.identity() for info in infos])),
        episode_seed=0,
        archive_sha256=None,
        normalization=mixed_normalization([info.normalization for info in infos], weights),
        disjoint=False,
        sources=tuple(infos),
    )
