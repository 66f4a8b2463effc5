"""The episodes of an archive, copied out of memory maps of its shards."""

from __future__ import annotations

import copy
import math
import os
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from mamldata.archive.index import Archive, Shard, read_archive
from mamldata.archive.layout import Bytes
from mamldata.archive.shard import REMEDY, changed_in_place, check_size, open_maps, open_shard
from mamldata.errors import RequestError
from mamldata.io.atomic import FileVersion
from mamldata.sampling.order import Indices
from mamldata.sampling.remix import Classes
from mamldata.sampling.sampler import ClassTable, EpisodeSampler
from mamldata.sources.source import (
    EpisodeInfo,
    Images,
    archive_sampler,
    at_most,
    episode_info,
    in_words,
    require_narrower,
)

_MOST_MAPS = 1 << 15  # Linux allows a process 65,530
_LOOK_EVERY = 5.0  # seconds; a look costs a few microseconds for each shard, which is much for every meta-batch


class StoredSource(ABC):
    """A split of an archive, read from memory maps of its shards; at most its first ``episodes``.

    A shard's headers, and with ``verify`` its digest, are checked when it is first read. For one thread at a time.

    Each map keeps a file descriptor. If the process has too many, the source's oldest map is closed; its shard is
    mapped again when it is next read, without further checks if the file is the same.

    Args:
        archive: what ``archive.json`` says.
        split: ``train``, ``val`` or ``test``.
        verify: hash shards when they are opened.
        episodes: the limit; None: all.

    Attributes:
        window: how many shards are fetched at a time, including the one that is read; 0 if nothing is fetched.

    Raises:
        RequestError: the archive is a thin one, it has no such split, or the limit is less than one.
    """

    window = 0
    _narrow = False  # whether ``info`` is of narrower episodes than are stored

    def __init__(self, archive: Archive, split: str, *, verify: bool, episodes: int | None) -> None:
        if archive.thin:
            raise RequestError("A thin archive holds no episodes. Open it with mamldata.sources.open.open_archive.")
        self.archive = archive
        self.verify = verify
        self._split = self.archive.split(split)
        self._info = episode_info(archive, split, archive.digest)
        self._episodes = at_most(episodes, self._split.episodes)
        self._starts = np.array([shard.first_episode for shard in self._split.shards], dtype=np.int64)
        self._open: dict[int, memoryview] = {}
        self._unchanged: set[int] = set()  # shards whose files were looked at since a few seconds ago
        self._look_again = 0.0
        self._checked: dict[Path, FileVersion] = {}
        self._whole: StoredSource | None = None  # the source of a view, whose temporary folder must stay

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {in_words(self)}>"

    @abstractmethod
    def _open_shard(self, number: int) -> memoryview:
        """Map a shard, check it, and keep it in ``_open``."""

    @abstractmethod
    def _path(self, number: int) -> Path:
        """The file of a shard on this machine."""

    def _close_changed(self, shards: Iterable[int]) -> None:
        """Close the maps of shards whose files have changed in place: they are checked again before they are read.

        Each file is looked at every few seconds. A shard that is cut in between, or while it is being read, still ends
        the process (SIGBUS): only a signal handler in C could prevent that.
        """
        if (now := time.monotonic()) >= self._look_again:
            self._unchanged, self._look_again = set(), now + _LOOK_EVERY
        for number in set(shards) - self._unchanged:
            self._unchanged.add(number)
            if number in self._open and changed_in_place(path := self._path(number), self._checked[path]):
                with suppress(KeyError):  # a thread with a view may close it too
                    del self._open[number]

    def _opener(self, shard: Shard, remedy: str = REMEDY) -> Callable[[Path], Bytes]:
        """A function that maps and checks a shard's file, and does not keep this source alive; see ``open_shard``."""
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
        """Keep a map; if this process has too many, close this source's oldest ones."""
        while self._open and open_maps() > _most_maps():
            with suppress(KeyError, StopIteration, RuntimeError):  # a thread with a view may close maps too
                del self._open[next(iter(self._open))]
        self._open[number] = mapped.data
        return mapped.data

    @property
    def fits(self) -> bool:
        """Whether all shards of the split fit on this machine at once."""
        return True

    def prefetch(self, upcoming: Sequence[int]) -> None:  # noqa: B027  # not abstract: local shards are not fetched
        """Fetch shards in the background: the current one and those after it."""

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
        """How many episodes there are."""
        return self._episodes

    def read(self, index: Indices, support: Images, query: Images) -> None:
        """Copy episodes out of the maps, one by one: fancy indexing of a strided map would copy all of it.

        It uses memoryviews, whose slices cost a third of NumPy's: for episodes as small as Omniglot's, slices dominate.
        """
        if self._narrow:
            ways = index[:, None] * self.archive.n_way + np.arange(self._info.n_way)
            self.read_ways(ways, support, query)
            return
        layout = self.archive.layout
        support_at, support_bytes = layout.support.data, layout.support.bytes
        query_at, query_bytes = layout.query.data, layout.query.bytes
        shards = np.searchsorted(self._starts, index, side="right") - 1
        offsets = (index - self._starts[shards]) * layout.stride
        to_support, to_query = support.data, query.data
        s = q = 0
        self._close_changed(numbers := shards.tolist())
        for shard, offset in zip(numbers, offsets.tolist(), strict=True):
            episodes = self._open.get(shard) or self._open_shard(shard)
            start = offset + support_at
            to_support[s : s + support_bytes] = episodes[start : start + support_bytes]
            s += support_bytes
            start = offset + query_at
            to_query[q : q + query_bytes] = episodes[start : start + query_bytes]
            q += query_bytes

    @property
    def fetched_shards(self) -> tuple[int, ...]:
        """See ``Source.fetched_shards``."""
        return self.shard_episodes if self.window else ()

    def query_counts(self, index: Indices) -> None:  # noqa: ARG002
        """None: stored episodes have equal numbers of queries."""
        return

    @property
    def way_source(self) -> Self:
        """Itself: stored episodes can be taken apart."""
        return self

    def read_ways(self, ways: Indices, support: Images, query: Images) -> None:
        """Copy single ways out of the maps, as ``read`` copies episodes.

        Args:
            ways: int64 ``[B, n_way]``; way ``w`` is number ``w % n`` of episode ``w // n``, where ``n`` is the
                archive's ``n_way``.
            support, query: as for ``read``.
        """
        layout, n_way = self.archive.layout, self.archive.n_way
        image_bytes = math.prod(self.archive.image_shape)
        support_step, query_step = layout.support.bytes // n_way, layout.query.bytes // n_way
        support_bytes, query_bytes = self._info.k_shot * image_bytes, self._info.k_query * image_bytes
        index, places = np.divmod(ways.reshape(-1), n_way)
        shards = np.searchsorted(self._starts, index, side="right") - 1
        offsets = (index - self._starts[shards]) * layout.stride
        support_at = (offsets + layout.support.data + places * support_step).tolist()
        query_at = (offsets + layout.query.data + places * query_step).tolist()
        to_support, to_query = support.data, query.data
        s = q = 0
        self._close_changed(numbers := shards.tolist())
        for shard, from_support, from_query in zip(numbers, support_at, query_at, strict=True):
            episodes = self._open.get(shard) or self._open_shard(shard)
            to_support[s : s + support_bytes] = episodes[from_support : from_support + support_bytes]
            s += support_bytes
            to_query[q : q + query_bytes] = episodes[from_query : from_query + query_bytes]
            q += query_bytes

    def way_classes(self) -> Classes:
        """The class of each way, as an index into the class table: int32 ``[episodes, n_way]``.

        It reads four bytes of each way, from pages that the check of the shard's headers has just touched.
        """
        layout = self.archive.layout
        shards = range(self._shard_of(self._episodes - 1) + 1)  # only those that are read
        found = []
        self._close_changed(shards)
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
        """The classes of episodes, as indices into the table: int64 ``[B, n_way]``, by label.

        They are drawn again, which reads no shard, so any thread may ask.
        """
        return self._sampler.draw(index).classes[:, : self._info.n_way].astype(np.int64)

    def view(self, episodes: int | None = None) -> Self:
        """The same split for another reader, such as a stream with a thread of its own.

        ``archive.json`` is not read again, and open shards are not checked again.

        Args:
            episodes: the limit; None: the same as here.

        Raises:
            RequestError: it is less than one.
        """
        view = copy.copy(self)
        view._open, view._checked = self._open, self._checked  # left out by __getstate__
        view._whole = self
        view._episodes = at_most(episodes, self._episodes)
        return view

    def narrowed(self, n_way: int | None = None, k_shot: int | None = None, k_query: int | None = None) -> Self:
        """The same episodes with fewer ways or images; see ``SplitSource.narrowed``."""
        view = self.view()
        view._info = require_narrower(self._info, n_way, k_shot, k_query)
        view._narrow = True
        return view

    @cached_property
    def _sampler(self) -> EpisodeSampler:
        return archive_sampler(self.archive, self._info.split)

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps and checks shards itself: pickling the maps would copy the archive.
        return {**self.__dict__, "_open": {}, "_checked": {}, "_look_again": 0.0}


class ArchiveSource(StoredSource):
    """A split of an archive in a local folder; at most its first ``episodes``; see ``StoredSource``.

    All shards must exist and have the right lengths when the source is made.

    Raises:
        RequestError: it is not an archive, or it has no such split.
        DamagedError: ``archive.json`` or a shard is damaged; the message names the shard and the episode.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str = "train",
        *,
        verify: bool = False,
        episodes: int | None = None,
        archive: Archive | None = None,
    ) -> None:
        self.folder = Path(folder)
        super().__init__(archive or read_archive(self.folder), split, verify=verify, episodes=episodes)
        for shard in self._split.shards:
            check_size(self.folder / shard.file, shard)

    def _open_shard(self, number: int) -> memoryview:
        return self._keep(number, self._opener(self._split.shards[number])(self._path(number)))

    def _path(self, number: int) -> Path:
        return self.folder / self._split.shards[number].file


def _most_maps() -> int:
    """How many maps a process keeps: half of the file descriptors, or of the maps, that it is allowed."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_MAPS if descriptors == resource.RLIM_INFINITY else min(descriptors // 2, _MOST_MAPS)
