"""Where a stream's episodes come from: an archive on disk, or drawn live from a bank. One interface for all."""

from __future__ import annotations

import copy
import math
import os
import resource
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from mamldata.archive.index import INDEX, REMEDY, Archive, Bytes, Shard, check_size, open_maps, open_shard, read_archive
from mamldata.archive.plan import BuildRequest, plan_archive
from mamldata.bank.make import make_bank
from mamldata.datasets.load import load_manifest
from mamldata.datasets.paths import data_root
from mamldata.errors import DamagedError, RequestError
from mamldata.io.atomic import FileVersion
from mamldata.io.urls import is_remote
from mamldata.sampling.normalization import Normalisation
from mamldata.sampling.order import Indices
from mamldata.sampling.sampler import ClassTable, EpisodeSampler, gather

Images = npt.NDArray[np.uint8]
Classes = npt.NDArray[np.int32]

_MOST_MAPS = 1 << 15  # Linux allows a process 65,530


@dataclass(frozen=True)
class EpisodeInfo:
    """What a source's episodes are; printed beside results, saved with runs, and compared on resume.

    Attributes:
        dataset, split_scheme, split, n_way, k_shot, k_query: in the field's terms.
        rotations: ``all``, ``train`` or ``none``.
        image_shape: ``(H, W, C)``.
        bank_sha256: the digest of the images.
        episode_seed: the seed that the episodes were drawn with.
        archive_sha256: the digest of the archive, None for live episodes.
        normalisation: mean and deviation of the train split, for images in [0, 1].
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
    normalisation: Normalisation


class Source(Protocol):
    """Anything that gives episodes by their index."""

    @property
    def info(self) -> EpisodeInfo:
        """What the episodes are."""
        ...

    @property
    def episodes(self) -> int | None:
        """How many there are; None if they never end."""
        ...

    def read(self, index: Indices, support: Images, query: Images) -> None:
        """Copy episodes into the caller's memory.

        Args:
            index: int64 ``[B]``.
            support: its beginning is filled with ``[B, n_way, k_shot, H, W, C]``; uint8, of one dimension.
            query: its beginning is filled with ``[B, n_way, k_query, H, W, C]``; uint8, of one dimension.
        """
        ...

    def class_labels(self, index: int) -> list[str]:
        """The names of an episode's classes, one for each way."""
        ...

    @property
    def table(self) -> ClassTable:
        """The split's classes."""
        ...

    def classes(self, index: Indices) -> Indices:
        """Which classes of the table episodes show: int64 ``[B, n_way]``, by label."""
        ...


class StoredSource(ABC):
    """A split of an archive, read from memory maps of its shards; at most its first ``episodes``.

    A shard's headers are checked, and with ``verify`` its digest, when it is first read from. For one thread at a time.

    Each map keeps a file descriptor. Where the process has too many, the source's oldest map makes room; its shard is
    mapped again when it is read from, without further checks if the file is the same.

    Args:
        archive: what ``archive.json`` says.
        split: ``train``, ``val`` or ``test``.
        verify: hash shards when they are opened.
        episodes: the limit; None: all.

    Attributes:
        window: how many shards are fetched at a time, the one that is read from included; 0 where none need be.

    Raises:
        RequestError: the archive has no such split, or the limit is less than one.
    """

    window = 0

    def __init__(self, archive: Archive, split: str, *, verify: bool, episodes: int | None) -> None:
        self.archive = archive
        self.verify = verify
        self._split = self.archive.split(split)
        self._info = episode_info(archive, split, archive.digest)
        self._episodes = _at_most(episodes, self._split.episodes)
        self._starts = np.array([shard.first_episode for shard in self._split.shards], dtype=np.int64)
        self._open: dict[int, memoryview] = {}
        self._checked: dict[Path, FileVersion] = {}
        self._whole: StoredSource | None = None  # what a view is of, whose temporary folder must stay

    @abstractmethod
    def _open_shard(self, number: int) -> memoryview:
        """Map a shard, check it, and keep it in ``_open``."""

    def _opener(self, shard: Shard, remedy: str = REMEDY) -> Callable[[Path], Bytes]:
        """What maps a shard's file and checks it, without a reference to this source; see ``open_shard``."""
        return partial(
            open_shard,
            shard=shard,
            layout=self.archive.layout,
            verify=self.verify,
            sampler=self._sampler,
            checked=self._checked,
            remedy=remedy,
        )

    def _keep(self, number: int, mapped: Bytes) -> memoryview:
        """Keep a map; where this process has too many, this source's oldest ones make room."""
        while self._open and open_maps() > _most_maps():
            with suppress(KeyError, StopIteration, RuntimeError):  # a thread with a view of this source makes room, too
                del self._open[next(iter(self._open))]
        self._open[number] = mapped.data
        return mapped.data

    @property
    def fits(self) -> bool:
        """Whether all shards of the split can be here at once."""
        return True

    def prefetch(self, upcoming: Sequence[int]) -> None:  # noqa: B027  # not abstract: what is here is not fetched
        """Fetch shards in the background: the one that is read from now, and those after it."""

    @property
    def shard_episodes(self) -> tuple[int, ...]:
        """How many episodes of each shard are read."""
        left = [self.episodes - shard.first_episode for shard in self._split.shards]
        counts = [min(shard.episodes, some) for shard, some in zip(self._split.shards, left, strict=True)]
        return tuple(count for count in counts if count > 0)

    @property
    def info(self) -> EpisodeInfo:
        """What the episodes are."""
        return self._info

    @property
    def episodes(self) -> int:
        """How many there are."""
        return self._episodes

    def read(self, index: Indices, support: Images, query: Images) -> None:
        """Copy episodes out of the maps, one by one: fancy indexing of a strided map would copy it whole.

        Through memoryviews, whose slices cost a third of NumPy's: at Omniglot's size that is what counts.
        """
        layout = self.archive.layout
        support_at, support_bytes = layout.support.data, layout.support.bytes
        query_at, query_bytes = layout.query.data, layout.query.bytes
        shards = np.searchsorted(self._starts, index, side="right") - 1
        offsets = (index - self._starts[shards]) * layout.stride
        to_support, to_query = support.data, query.data
        s = q = 0
        for shard, offset in zip(shards.tolist(), offsets.tolist(), strict=True):
            episodes = self._open.get(shard) or self._open_shard(shard)
            start = offset + support_at
            to_support[s : s + support_bytes] = episodes[start : start + support_bytes]
            s += support_bytes
            start = offset + query_at
            to_query[q : q + query_bytes] = episodes[start : start + query_bytes]
            q += query_bytes

    def read_ways(self, ways: Indices, support: Images, query: Images) -> None:
        """Copy single ways out of the maps, as ``read`` copies episodes.

        Args:
            ways: int64 ``[B, n_way]``; way ``w`` is place ``w % n_way`` of episode ``w // n_way``.
            support, query: as for ``read``.
        """
        layout, n_way = self.archive.layout, self._info.n_way
        support_bytes, query_bytes = layout.support.bytes // n_way, layout.query.bytes // n_way
        index, places = np.divmod(ways.reshape(-1), n_way)
        shards = np.searchsorted(self._starts, index, side="right") - 1
        offsets = (index - self._starts[shards]) * layout.stride
        support_at = (offsets + layout.support.data + places * support_bytes).tolist()
        query_at = (offsets + layout.query.data + places * query_bytes).tolist()
        to_support, to_query = support.data, query.data
        s = q = 0
        for shard, from_support, from_query in zip(shards.tolist(), support_at, query_at, strict=True):
            episodes = self._open.get(shard) or self._open_shard(shard)
            to_support[s : s + support_bytes] = episodes[from_support : from_support + support_bytes]
            s += support_bytes
            to_query[q : q + query_bytes] = episodes[from_query : from_query + query_bytes]
            q += query_bytes

    def way_classes(self) -> Classes:
        """The class of each way, as an index into the class table: int32 ``[episodes, n_way]``.

        Four bytes of each way are read, from pages that the check of a shard's headers has just touched.
        """
        layout = self.archive.layout
        shards = range(self._shard_of(self._episodes - 1) + 1)  # and none that is not read from
        found = []
        for number in shards:
            self.prefetch(shards[number:])
            mapped = np.frombuffer(self._open.get(number) or self._open_shard(number), dtype=np.uint8)
            found.append(layout.view(mapped, layout.source)[..., 0].copy())  # a view would keep the map
        return np.concatenate(found)[: self._episodes]

    def class_labels(self, index: int) -> list[str]:
        """The names of an episode's classes, one for each way."""
        return [self.table.label(way) for way in self.classes(np.array([index]))[0].tolist()]

    @property
    def table(self) -> ClassTable:
        """The split's classes."""
        return self._split.classes

    def classes(self, index: Indices) -> Indices:
        """Which classes of the table episodes show: int64 ``[B, n_way]``, by label.

        Drawn again, which gives what is stored and reads no shard: whoever asks need not be the thread that reads.
        """
        return _draw(self._sampler, index)[..., 0].astype(np.int64)

    def view(self, episodes: int | None = None) -> Self:
        """The same split for another reader, such as a stream with a thread of its own.

        What was done once is not done again: ``archive.json`` is not read, no shard checked that is open.

        Args:
            episodes: the limit; None: that of this one.

        Raises:
            RequestError: it is less than one.
        """
        view = copy.copy(self)
        view._open, view._checked = self._open, self._checked  # which __getstate__ has left out
        view._whole = self
        view._episodes = _at_most(episodes, self._episodes)
        return view

    @cached_property
    def _sampler(self) -> EpisodeSampler:
        try:
            return EpisodeSampler(self.archive.spec(self._info.split), self.table)
        except RequestError as error:
            raise DamagedError(f"{INDEX} of the archive was altered: {error}") from error

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps and checks shards itself: pickling the maps would copy the archive.
        return {**self.__dict__, "_open": {}, "_checked": {}}


class ArchiveSource(StoredSource):
    """A split of an archive in a local folder; at most its first ``episodes``.

    All shards must be there and have their length when the source is made.

    Raises:
        RequestError: not an archive, or it has no such split.
        DamagedError: ``archive.json`` or a shard is not what was written; the message names shard and episode.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str = "train",
        *,
        verify: bool = False,
        episodes: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        super().__init__(read_archive(self.folder), split, verify=verify, episodes=episodes)
        for shard in self._split.shards:
            check_size(self.folder / shard.file, shard)

    def _open_shard(self, number: int) -> memoryview:
        shard = self._split.shards[number]
        return self._keep(number, self._opener(shard)(self.folder / shard.file))


def _most_maps() -> int:
    """How many maps a process keeps: half of the file descriptors or of the maps that it may have."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_MAPS if descriptors == resource.RLIM_INFINITY else min(descriptors // 2, _MOST_MAPS)


def episode_info(archive: Archive, split: str, digest: str | None) -> EpisodeInfo:
    """What the episodes of a split are, whose archive has this digest; None: live episodes."""
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
        normalisation=archive.normalisation,
    )


@dataclass(frozen=True, eq=False)  # arrays do not compare to one truth
class LiveSource:
    """Episodes drawn from a bank when they are asked for; the same as those that an archive would hold.

    Attributes:
        info: what the episodes are.
        images: the bank, uint8 ``[images, H, W, C]``.
        sampler: draws them.
        episodes: how many, or None for no end.
    """

    info: EpisodeInfo
    bank_path: Path
    images: Images = field(repr=False)
    sampler: EpisodeSampler = field(repr=False)
    episodes: int | None = None

    @property
    def table(self) -> ClassTable:
        """The split's classes."""
        return self.sampler.table

    def read(self, index: Indices, support: Images, query: Images) -> None:
        """Draw episodes and copy their images out of the bank."""
        source = _draw(self.sampler, index)
        info = self.info
        shapes = [(len(index), info.n_way, k, *info.image_shape) for k in (info.k_shot, info.k_query)]
        parts = [part[: math.prod(shape)].reshape(shape) for part, shape in zip((support, query), shapes, strict=True)]
        gather(self.images, self.table, source, info.k_shot, *parts)

    def class_labels(self, index: int) -> list[str]:
        """The names of an episode's classes, one for each way."""
        return [self.table.label(int(way[0])) for way in self.sampler.sample(index, 1)[0]]

    def classes(self, index: Indices) -> Indices:
        """Which classes of the table episodes show: int64 ``[B, n_way]``, by label."""
        return _draw(self.sampler, index)[..., 0].astype(np.int64)

    def view(self, episodes: int | None = None) -> Self:
        """The same episodes, at most the first so many, see ``ArchiveSource.view``."""
        return self if episodes is None else replace(self, episodes=_at_most(self.episodes, _some(episodes)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "images": self.images.shape}

    def __setstate__(self, state: dict[str, Any]) -> None:
        images = state.pop("images")
        self.__dict__.update(state)
        start = self.bank_path.stat().st_size - int(np.prod(images))
        self.__dict__["images"] = np.asarray(np.memmap(self.bank_path, np.uint8, "r", start, images))


def _draw(sampler: EpisodeSampler, index: Indices) -> npt.NDArray[np.int32]:
    """Episodes by their indices, see ``EpisodeSampler.sample``."""
    breaks = np.flatnonzero(np.diff(index) != 1) + 1
    runs = [run for run in np.split(index, breaks) if len(run)]  # none for no episodes
    return np.concatenate([sampler.sample(int(run[0]), len(run)) for run in runs] or [sampler.sample(0, 0)])


def _at_most(limit: int | None, episodes: int) -> int:
    """So many episodes, under a limit if there is one."""
    return episodes if limit is None else min(_some(limit), episodes)


def _some(episodes: int) -> int:
    if episodes < 1:
        raise RequestError(f"episodes must be at least 1, not {episodes}.")
    return episodes


def live(
    dataset: str,
    split: str = "train",
    *,
    n_way: int = 5,
    k_shot: int = 1,
    k_query: int = 15,
    seed: int = 0,
    episodes: int | None = None,
    split_scheme: str | None = None,
    rotations: str | None = None,
    image_size: int | None = None,
    root: str | os.PathLike[str] | None = None,
    workers: int = 1,
) -> LiveSource:
    """Episodes without an archive: drawn from a dataset's bank as they are asked for.

    The bank is made first if it is not there; nothing is downloaded.

    Args:
        dataset: a built-in name, or the path of a manifest.
        split: ``train``, ``val`` or ``test``.
        n_way, k_shot, k_query: classes; support and query images per class.
        seed: of the episodes; an archive built with it holds the very same ones.
        episodes: how many; None for no end.
        split_scheme, rotations, image_size: the manifest's own if None.
        root: the data root; see ``mamldata.datasets.paths.data_root``.
        workers: processes that decode images, if the bank must be made.

    Raises:
        RequestError: an unknown name, or episodes that cannot be made.
        DataMissingError: the raw files are not there; the message names the command.
        DamagedError: the bank is not what was made, see ``mamldata.bank.make.make_bank``.
    """
    request = BuildRequest(n_way, k_shot, k_query, {split: 1}, seed, split_scheme, rotations)
    if episodes is not None:
        _some(episodes)
    manifest = load_manifest(dataset)
    manifest.scheme(split_scheme)  # before the bank is made, which may take an hour
    bank = make_bank(manifest, data_root(root), image_size, workers=workers)
    plan = plan_archive(manifest, bank, request)
    sampler = EpisodeSampler(plan.spec(split), plan.split(split).classes)
    return LiveSource(episode_info(plan, split, None), bank.path, bank.open_images(), sampler, episodes)


def open_archive(
    place: str | os.PathLike[str],
    split: str = "train",
    *,
    verify: bool = False,
    episodes: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
) -> StoredSource:
    """A split of an archive, from its folder or its address; see ``ArchiveSource`` and ``RemoteSource``.

    Raises:
        RequestError: not an archive, or it has no such split; or a cache for a folder.
        FetchError: what is at the address could not be had.
        DamagedError: the archive is damaged.
    """
    if is_remote(place):
        from mamldata.sources.remote import RemoteSource  # which builds on this module

        options: dict[str, Any] = {"cache_dir": cache_dir, "cache_bytes": cache_bytes}
        return RemoteSource(str(place), split, verify=verify, episodes=episodes, **options)
    if cache_dir is not None or cache_bytes is not None:
        raise RequestError("cache_dir and cache_bytes are for archives at an address; a folder is read where it is.")
    return ArchiveSource(place, split, verify=verify, episodes=episodes)


def as_source(
    source: Source | str | os.PathLike[str],
    split: str | None,
    *,
    verify: bool,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
) -> Source:
    """A source, from itself or from the folder or the address of an archive.

    Raises:
        RequestError: not an archive; or the split of a source was asked for that it does not give.
        FetchError: what is at the address could not be had.
        DamagedError: the archive is damaged.
    """
    if isinstance(source, str | os.PathLike):
        return open_archive(source, split or "train", verify=verify, cache_dir=cache_dir, cache_bytes=cache_bytes)
    if split is not None and split != source.info.split:
        raise RequestError(f"The source gives the split {source.info.split!r}, not {split!r}.")
    if verify:
        raise RequestError("verify=True is for archives; live episodes have no digest to compare with.")
    if cache_dir is not None or cache_bytes is not None:
        raise RequestError("cache_dir and cache_bytes are for the address of an archive, not for a source.")
    return source
