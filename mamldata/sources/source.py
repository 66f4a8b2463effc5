"""The protocol of a source of episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mamldata.archive.index import Archive
from mamldata.errors import RequestError
from mamldata.sampling.normalization import Normalization
from mamldata.sampling.order import Indices
from mamldata.sampling.remix import Classes
from mamldata.sampling.sampler import ClassTable, EpisodeSampler

Images = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class EpisodeInfo:
    """What a source's episodes are: printed with results, saved with runs, and compared when a run is resumed.

    Attributes:
        dataset, split_scheme, split: where the classes come from.
        n_way, k_shot, k_query: classes; support and query images per class.
        rotations: ``all``, ``train`` or ``none``.
        image_shape: ``(H, W, C)``.
        bank_sha256: the digest of the images.
        episode_seed: the seed of the episodes.
        archive_sha256: the digest of the archive, None for live episodes.
        normalization: mean and deviation of the train split, for images in [0, 1].
    """

    dataset: str
    split_scheme: str
    split: str
    n_way: int
    k_shot: int
    k_query: int
    rotations: str
    image_shape: tuple[int, int, int]
    bank_sha256: str
    episode_seed: int
    archive_sha256: str | None
    normalization: Normalization


class Source(Protocol):
    """Anything that gives episodes by their index."""

    @property
    def info(self) -> EpisodeInfo:
        """What the episodes are."""
        ...

    @property
    def episodes(self) -> int | None:
        """How many episodes there are; None if they never end."""
        ...

    def read(self, index: Indices, support: Images, query: Images) -> None:
        """Copy episodes into the caller's memory.

        Args:
            index: int64 ``[B]``.
            support: uint8, one dimension; its beginning is filled with ``[B, n_way, k_shot, H, W, C]``.
            query: uint8, one dimension; its beginning is filled with ``[B, n_way, k_query, H, W, C]``.
        """
        ...

    def class_labels(self, index: int) -> list[str]:
        """The names of an episode's classes, one for each way."""
        ...

    @property
    def table(self) -> ClassTable:
        """The split's classes."""
        ...

    @property
    def fetched_shards(self) -> tuple[int, ...]:
        """Number of episodes in each shard, if shards are fetched before they are read; empty if nothing is fetched."""
        ...

    @property
    def window(self) -> int:
        """How many shards are fetched at a time, including the one that is read; 0 if nothing is fetched."""
        ...

    def prefetch(self, upcoming: Sequence[int]) -> None:
        """Fetch shards in the background: the current one and those after it."""
        ...

    @property
    def way_source(self) -> WaySource | None:
        """The same source if its episodes can be taken apart for remix, else None."""
        ...

    def classes(self, index: Indices) -> Indices:
        """The classes of episodes, as indices into the table: int64 ``[B, n_way]``, by label."""
        ...


class WaySource(Source, Protocol):
    """A source whose episodes can be taken apart."""

    @property
    def fits(self) -> bool:
        """Whether all its shards fit on this machine at once."""
        ...

    @property
    def episodes(self) -> int:
        """How many episodes there are."""
        ...

    def way_classes(self) -> Classes:
        """The class of each way, as an index into the class table: int32 ``[episodes, n_way]``."""
        ...

    def read_ways(self, ways: Indices, support: Images, query: Images) -> None:
        """Copy ways, int64 ``[B, n_way]``, into the caller's memory, which is as for ``Source.read``."""
        ...


class AllHere:
    """The part of a source that fetches nothing, and whose episodes cannot be taken apart."""

    @property
    def fetched_shards(self) -> tuple[int, ...]:
        """None, see ``Source.fetched_shards``."""
        return ()

    @property
    def window(self) -> int:
        """See ``Source.window``."""
        return 0

    def prefetch(self, upcoming: Sequence[int]) -> None:
        """Do nothing."""

    @property
    def way_source(self) -> None:
        """None: its episodes are not stored, or are remixed already."""
        return None


def episode_info(archive: Archive, split: str, digest: str | None) -> EpisodeInfo:
    """What the episodes of a split are; ``digest`` is the archive's, None for live episodes."""
    return EpisodeInfo(
        dataset=archive.dataset,
        split_scheme=archive.split_scheme,
        split=split,
        n_way=archive.n_way,
        k_shot=archive.k_shot,
        k_query=archive.k_query,
        rotations=archive.rotations,
        image_shape=archive.image_shape,
        bank_sha256=archive.bank_sha256,
        episode_seed=archive.seed,
        archive_sha256=digest,
        normalization=archive.normalization,
    )


def draw(sampler: EpisodeSampler, index: Indices) -> npt.NDArray[np.int32]:
    """Episodes by their indices, see ``EpisodeSampler.sample``."""
    breaks = np.flatnonzero(np.diff(index) != 1) + 1
    runs = [run for run in np.split(index, breaks) if len(run)]  # no run if there are no episodes
    return np.concatenate([sampler.sample(int(run[0]), len(run)) for run in runs] or [sampler.sample(0, 0)])


def at_most(limit: int | None, episodes: int) -> int:
    """``episodes``, or ``limit`` if that is less."""
    return episodes if limit is None else min(require_some(limit), episodes)


def require_some(episodes: int) -> int:
    """``episodes``, if that is at least 1.

    Raises:
        RequestError: it is not.
    """
    if episodes < 1:
        raise RequestError(f"episodes must be at least 1, not {episodes}.")
    return episodes
