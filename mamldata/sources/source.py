"""The protocol of a source of episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from mamldata.archive.index import INDEX, Archive
from mamldata.errors import DamagedError, RequestError
from mamldata.sampling.normalization import Normalization
from mamldata.sampling.order import Indices
from mamldata.sampling.remix import Classes
from mamldata.sampling.sampler import LEAST, ClassTable, EpisodeSampler
from mamldata.words import counted

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
        query_alpha: None: each class has ``k_query`` query images; else see
            ``mamldata.sampling.sampler.EpisodeSpec``.
        disjoint: whether no two of them share an image, see ``mamldata.sampling.disjoint``.
        sources: of a mixture, the same for each of its sources, see ``mamldata.sources.mixed``; empty otherwise.
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
    query_alpha: int | None = None
    disjoint: bool = False
    sources: tuple[EpisodeInfo, ...] = ()

    def identity(self) -> dict[str, Any]:
        """What distinguishes the episodes, as plain values: those of JSON."""
        values = asdict(self)
        del values["normalization"]  # it follows from the bank and the split scheme
        if self.query_alpha is None:  # as in files of earlier versions
            del values["query_alpha"]
        if not self.disjoint:
            del values["disjoint"]
        del values["sources"]
        if self.sources:
            values["sources"] = [source.identity() for source in self.sources]
        return values | {"image_shape": list(self.image_shape)}


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

    def query_counts(self, index: Indices) -> Indices | None:
        """How many query images each way has, int64 ``[B, n_way]``; None if all have ``k_query``."""
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


class SplitSource(Source, Protocol):
    """The episodes of a split, as an archive or ``live`` gives them."""

    def view(self, episodes: int | None = None) -> Self:
        """The same episodes for another reader, such as a stream with a thread of its own; at most the first ones.

        Raises:
            RequestError: ``episodes`` is less than one.
        """
        ...

    def narrowed(self, n_way: int | None = None, k_shot: int | None = None, k_query: int | None = None) -> Self:
        """The same episodes with fewer ways or images: the first ones of each; None: as many as there are.

        Raises:
            RequestError: there are not so many.
        """
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


def require_narrower(info: EpisodeInfo, n_way: int | None, k_shot: int | None, k_query: int | None) -> EpisodeInfo:
    """What episodes are with fewer ways or images.

    Raises:
        RequestError: a number is above that of ``info``, or too small.
    """
    asked = {"n_way": n_way, "k_shot": k_shot, "k_query": k_query}
    if info.query_alpha is not None and (n_way or k_query):
        raise RequestError("n_way, k_query: these episodes have unequal numbers of queries. Leave them out.")
    given: dict[str, Any] = {name: number for name, number in asked.items() if number is not None}
    for name, number in given.items():
        least, most = LEAST[name], getattr(info, name)
        if not least <= number <= most:
            raise RequestError(f"{name} must be from {least} to {most}, which is what the episodes have, not {number}.")
    return replace(info, **given)


def in_words(source: Source) -> str:
    """What a source gives, such as ``omniglot train, 5-way 1-shot 15-query, 2,000 episodes``."""
    info = source.info
    count = "episodes without end" if source.episodes is None else counted(source.episodes, "episode")
    return f"{info.dataset} {info.split}, {info.n_way}-way {info.k_shot}-shot {info.k_query}-query, {count}"


class AllHere:
    """The part of a source that fetches nothing, and whose episodes cannot be taken apart and have equal queries."""

    def __repr__(self: Any) -> str:
        return f"<{type(self).__name__}: {in_words(self)}>"

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

    def query_counts(self, index: Indices) -> Indices | None:  # noqa: ARG002
        """See ``Source.query_counts``."""
        return None

    @property
    def way_source(self) -> WaySource | None:
        """None: its episodes are not stored, or are remixed already."""
        return None

    def class_labels(self: Any, index: int) -> list[str]:
        """The names of an episode's classes, one for each way."""
        return [self.table.label(way) for way in self.classes(np.array([index]))[0].tolist()]


def archive_sampler(archive: Archive, split: str) -> EpisodeSampler:
    """What draws the episodes of an archive's split.

    Raises:
        RequestError: the archive has no such split.
        DamagedError: its settings give no episodes, so that ``archive.json`` was altered.
    """
    classes = archive.split(split).classes
    try:
        return EpisodeSampler(archive.spec(split), classes)
    except RequestError as error:
        raise DamagedError(f"{INDEX} of the archive was altered: {error}") from error


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
        query_alpha=archive.query_alpha,
    )


def at_most(limit: int | None, episodes: int | None) -> int:
    """``episodes``, or ``limit`` if that is less; one of them must be a number."""
    numbers = [number for number in (episodes, None if limit is None else require_some(limit)) if number is not None]
    return min(numbers)


def require_some(episodes: int) -> int:
    """``episodes``, if that is at least 1.

    Raises:
        RequestError: it is not.
    """
    if episodes < 1:
        raise RequestError(f"episodes must be at least 1, not {episodes}.")
    return episodes
