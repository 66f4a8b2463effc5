"""An archive at an address as a source: its shards are fetched ahead while one is read from."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Self

from mamldata.archive.layout import Bytes
from mamldata.archive.remote import WRONG_COPY, ShardCache, read_remote_archive
from mamldata.errors import RequestError
from mamldata.fetching.http import Network
from mamldata.io.urls import join, shown_place
from mamldata.sources.prefetch import Ahead
from mamldata.sources.stored import StoredSource

_AHEAD = 2  # shards that are fetched while one is read from
_WINDOW = 2 + _AHEAD  # shards that are kept without a cache: the one in use, the one before, and the next ones


class RemoteSource(StoredSource):
    """A split of an archive at an address; at most its first ``episodes``.

    While a shard is read from, threads fetch the next ones.

    Args:
        url: of the archive's folder.
        split: ``train``, ``val`` or ``test``.
        verify: hash a shard again when it is opened, though it was hashed when it came.
        episodes: the limit.
        cache_dir: where the cache makes a folder of its own for shards; None: a temporary folder, which holds four of
            them and goes with the source.
        cache_bytes: upper bound on the shards there, see ``ShardCache``; None: no bound.
        network: how patient to be.

    Attributes:
        window: the shard that is read from, and those that are fetched meanwhile.

    Raises:
        RequestError: the address or an argument cannot be, or the archive has no such split.
        FetchError: ``archive.json`` could not be had.
        DamagedError: ``archive.json`` is not what was written.
        WriteError: ``cache_dir`` cannot be made.
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
    ) -> None:
        network = network or Network()
        self.url = url
        super().__init__(read_remote_archive(url, network), split, verify=verify, episodes=episodes)
        self._ahead: Ahead[int, Bytes] = Ahead()
        largest = max(shard.bytes for shard in self._split.shards)
        if cache_bytes is not None and (cache_dir is None or cache_bytes < 2 * largest):
            raise RequestError(
                f"cache_bytes={cache_bytes:,} needs a cache_dir, and room for two of the archive's shards "
                f"({2 * largest:,} bytes)."
            )
        if cache_dir is None:
            folder = tempfile.mkdtemp(prefix="mamldata-")
            weakref.finalize(self, _remove, folder, os.getpid(), self._ahead)
            self.cache = ShardCache(Path(folder), _WINDOW * largest, network, lasting=False)
        else:
            self.cache = ShardCache(Path(cache_dir), cache_bytes, network)
        self.window = 1 + (_AHEAD if cache_bytes is None else min(_AHEAD, cache_bytes // largest - 1))

    @property
    def fits(self) -> bool:
        """Whether all shards of the split can be here at once."""
        return self.cache.bytes is None or sum(shard.bytes for shard in self._split.shards) <= self.cache.bytes

    def view(self, episodes: int | None = None) -> Self:
        """See ``StoredSource.view``; they have the cache in common, and no shard that is here is fetched again."""
        view = super().view(episodes)
        view._open, view._ahead = {}, Ahead()  # which are for one thread at a time
        if not self.cache.lasting:
            weakref.finalize(view, view._ahead.join, 1)  # before the folder that its threads write to goes
        return view

    def prefetch(self, upcoming: Sequence[int]) -> None:
        """Fetch shards in the background, ``window`` at a time at the most.

        A failure is not reported here: whoever needs the shard meets it.

        Args:
            upcoming: the shard that is read from now, and those after it; only the first ``window`` are looked at.
        """
        upcoming = upcoming[: self.window]
        self._ahead.keep_only(upcoming)  # a shard that was fetched for nobody must not keep its map
        for number in upcoming:
            if number not in self._open and number not in self._ahead and self._ahead.running < self.window:
                self._ahead.start(number, self._job(number))

    def _job(self, number: int) -> Callable[[], Bytes]:
        """What fetches and maps a shard; it has no reference to this source, which can go while a server is silent."""
        shard = self._split.shards[number]
        url = join(self.url, shard.file)
        remedy = f"It came from {shown_place(url)}. {WRONG_COPY}"
        return partial(self.cache.open, url, shard, self._opener(shard, remedy=remedy))

    def _open_shard(self, number: int) -> memoryview:
        mapped = self._ahead.take(number) if number in self._ahead else self._job(number)()
        # A removed file takes its room for as long as it is mapped.
        while self.cache.bytes is not None and self._mapped_bytes() + len(mapped) > self.cache.bytes:
            del self._open[next(iter(self._open))]
        return self._keep(number, mapped)

    def _mapped_bytes(self) -> int:
        return sum(self._split.shards[number].bytes for number in self._open)


def _remove(folder: str, owner: int, ahead: Ahead[int, Bytes]) -> None:
    if os.getpid() == owner:  # and not a worker that was forked from it
        ahead.join(1)  # one that has just begun would make the folder again, for its lock
        with suppress(OSError):  # under another name no thread that still waits for a server puts a file into it
            shutil.rmtree(Path(folder).rename(f"{folder}.gone"))
