"""An archive at an address as a source: while one shard is read, the next ones are fetched."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from mamldata.archive.index import Archive
from mamldata.archive.layout import Bytes
from mamldata.archive.remote import WRONG_COPY, ShardCache, read_remote_archive
from mamldata.errors import RequestError
from mamldata.fetching.http import Network
from mamldata.io.scratch import Scratch
from mamldata.io.urls import join, local_folder, shown_place
from mamldata.sources.prefetch import Prefetch
from mamldata.sources.stored import StoredSource

_AHEAD = 2  # shards that are fetched while one is read
_WINDOW = 2 + _AHEAD  # shards that are kept without a cache folder: the previous, the current and the next ones


class RemoteSource(StoredSource):
    """A split of an archive at an address; at most its first ``episodes``.

    While a shard is read, threads fetch the next ones.

    Args:
        url: the address of the archive's folder.
        split: ``train``, ``val`` or ``test``.
        verify: hash a shard again when it is opened, although it was hashed as it arrived.
        episodes: the limit; None: all.
        cache_dir: where the cache makes its own subfolder for shards; None: a temporary folder, which holds four
            shards and is removed with the source.
        cache_bytes: upper bound in bytes on the shards there, see ``ShardCache``; None: no bound.
        network: timeouts and retries.
        archive: what ``archive.json`` says, if it has been read.

    Attributes:
        window: how many shards are fetched at a time, including the one that is read.

    Raises:
        RequestError: the address or an argument is invalid, or the archive has no such split.
        FetchError: ``archive.json`` could not be fetched.
        DamagedError: ``archive.json`` is damaged.
        WriteError: ``cache_dir`` cannot be created.
    """

    def __init__(
        self,
        url: str,
        split: str = "train",
        *,
        verify: bool = False,
        episodes: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
        network: Network | None = None,
        archive: Archive | None = None,
    ) -> None:
        network = network or Network()
        self.url = url
        super().__init__(archive or read_remote_archive(url, network), split, verify=verify, episodes=episodes)
        self._prefetched: Prefetch[int, Bytes] = Prefetch()
        largest = max(shard.bytes for shard in self._split.shards)
        if cache_bytes is not None and (cache_dir is None or cache_bytes < 2 * largest):
            raise RequestError(
                f"cache_bytes={cache_bytes:,} needs a cache_dir, and room for two of the archive's shards "
                f"({2 * largest:,} bytes)."
            )
        if cache_dir is None:
            self.cache = ShardCache(temporary_folder(self, self._prefetched), _WINDOW * largest, network, lasting=False)
        else:
            self.cache = ShardCache(local_folder(cache_dir), cache_bytes, network)
        self.window = 1 + (_AHEAD if cache_bytes is None else min(_AHEAD, cache_bytes // largest - 1))

    @property
    def fits(self) -> bool:
        """Whether the cache has room for all shards of the split at once."""
        return self.cache.bytes is None or sum(shard.bytes for shard in self._split.shards) <= self.cache.bytes

    def view(self, episodes: int | None = None) -> Self:
        """See ``StoredSource.view``; both share the cache, so no cached shard is fetched again."""
        view = super().view(episodes)
        view._open, view._prefetched = {}, Prefetch()  # these are for one thread at a time
        if not self.cache.lasting:
            weakref.finalize(view, view._prefetched.join, 1)  # before the folder that its threads write to is removed
        return view

    def prefetch(self, upcoming: Sequence[int]) -> None:
        """Fetch shards in the background, at most ``window`` at a time.

        A failure is raised when the shard is read, not here.

        Args:
            upcoming: the current shard and those after it; all but the first ``window`` are ignored.
        """
        upcoming = upcoming[: self.window]
        self._prefetched.keep_only(upcoming)  # an unused shard must not stay mapped
        for number in upcoming:
            if number not in self._open and number not in self._prefetched and self._prefetched.running < self.window:
                self._prefetched.start(number, self._job(number))

    def _job(self, number: int) -> Callable[[], Bytes]:
        """A function that fetches and maps a shard; it does not keep this source alive while it waits for a server."""
        shard = self._split.shards[number]
        url = join(self.url, shard.file)
        remedy = f"It came from {shown_place(url)}. {WRONG_COPY}"
        return partial(self.cache.open, url, shard, self._opener(shard, remedy=remedy))

    def _open_shard(self, number: int) -> memoryview:
        mapped = self._prefetched.take(number) if number in self._prefetched else self._job(number)()
        # A removed file occupies the disk for as long as it is mapped.
        while self.cache.bytes is not None and self._mapped_bytes() + len(mapped) > self.cache.bytes:
            del self._open[next(iter(self._open))]
        return self._keep(number, mapped)

    def _path(self, number: int) -> Path:
        return self.cache.path(self._split.shards[number])

    def _mapped_bytes(self) -> int:
        return sum(self._split.shards[number].bytes for number in self._open)


def temporary_folder(owner: object, ahead: Prefetch[Any, Any]) -> Path:
    """A folder for shards that is removed with its owner, after the threads that write to it have had a second."""
    scratch = Scratch()
    weakref.finalize(owner, _remove, scratch, os.getpid(), ahead)
    return scratch.path


def _remove(scratch: Scratch, owner: int, ahead: Prefetch[Any, Any]) -> None:
    if os.getpid() == owner:  # not in a worker that was forked from it
        if ahead.is_here:  # collected in the middle of a job, which goes on
            threading.Thread(target=_remove, args=(scratch, owner, ahead)).start()
            return
        ahead.join(1)  # a job that has just started would create the folder again, for its lock
        scratch.remove()
