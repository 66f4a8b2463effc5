"""Open a thin archive: its images are mapped from a folder, or fetched once from an address."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mamldata.archive.index import Archive
from mamldata.archive.remote import WRONG_COPY, ShardCache
from mamldata.archive.shard import REMEDY, check_size, open_images
from mamldata.bank.checked import is_noted
from mamldata.errors import RequestError
from mamldata.fetching.http import Network
from mamldata.io.urls import join, local_folder, shown_place
from mamldata.sampling.sampler import ClassTable
from mamldata.sources.drawn import ThinSource
from mamldata.sources.pixels import Rows
from mamldata.sources.prefetch import Prefetch
from mamldata.sources.remote import temporary_folder
from mamldata.sources.source import Images, archive_sampler, at_most, episode_info

_AT_ONCE = 4  # shards that are fetched at the same time


def thin_from_folder(
    folder: Path, archive: Archive, split: str, *, verify: bool = False, episodes: int | None = None
) -> ThinSource:
    """A split of a thin archive in a folder; at most its first ``episodes``.

    A shard is checked when it is first read: its length, its header, and its digest, unless this user's cache notes
    that this version of the file was whole.

    Args:
        folder: of the archive.
        archive: what its ``archive.json`` says.
        split: ``train``, ``val`` or ``test``.
        verify: hash the shards in any case.
        episodes: the limit; None: all.

    Raises:
        RequestError: the archive has no such split, or the limit is less than one.
        DamagedError: ``archive.json`` is damaged, or a shard is missing or has the wrong length.
    """
    source = _source(archive, split, partial(_open_here, folder, archive, verify), episodes)
    for number in _needed(archive, source.table):
        check_size(folder / archive.images[number].file, archive.images[number])
    return source


def _open_here(folder: Path, archive: Archive, verify: bool, number: int) -> Images:
    shard = archive.images[number]
    path = folder / shard.file
    verify = verify or not is_noted(path, shard.sha256)
    return open_images(path, shard, archive.image_shape, verify=verify, remedy=REMEDY)


def thin_from_address(
    url: str,
    archive: Archive,
    split: str,
    *,
    verify: bool = False,
    episodes: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
    network: Network | None = None,
) -> ThinSource:
    """A split of a thin archive at an address; at most its first ``episodes``.

    The shards with images of the split are fetched when the first of them is read, and nothing afterwards.

    Args:
        url: the address of the archive's folder.
        archive, split, episodes: see ``thin_from_folder``.
        verify: hash the shards again when they are opened, although they were hashed as they arrived.
        cache_dir, cache_bytes, network: see ``mamldata.sources.remote.RemoteSource``; without ``cache_dir`` the
            shards are in a temporary folder until the program ends.

    Raises:
        RequestError: the archive has no such split, an argument is invalid, or the cache has too little room.
        WriteError: ``cache_dir`` cannot be created.
    """
    fetched = _Fetched(url, archive, verify, cache_dir, cache_bytes, network or Network())
    source = _source(archive, split, fetched, episodes)
    fetched.needed = _needed(archive, source.table)
    needed_bytes = sum(archive.images[number].bytes for number in fetched.needed)
    if cache_bytes is not None and (cache_dir is None or cache_bytes < needed_bytes):
        raise RequestError(
            f"cache_bytes={cache_bytes:,} needs a cache_dir, and room for all images of the {split} split "
            f"({needed_bytes:,} bytes): the episodes of a thin archive take images from all its shards."
        )
    return source


class _Fetched:
    """Opens shards at an address; the first call fetches all that are needed, several at a time.

    Threads may call it at the same time.
    """

    def __init__(
        self,
        url: str,
        archive: Archive,
        verify: bool,
        cache_dir: str | os.PathLike[str] | None,
        cache_bytes: int | None,
        network: Network,
    ) -> None:
        self.needed: list[int] = []
        self._url, self._archive, self._verify = url, archive, verify
        self._ahead: Prefetch[int, Images] = Prefetch()
        folder = temporary_folder(self, self._ahead) if cache_dir is None else local_folder(cache_dir)
        self._cache = ShardCache(folder, cache_bytes, network, lasting=cache_dir is not None)
        self._opened: dict[int, Images] = {}
        self._lock = threading.Lock()

    def __call__(self, number: int) -> Images:
        with self._lock:
            waiting = [one for one in dict.fromkeys([number, *self.needed]) if one not in self._opened]
            for position, one in enumerate(waiting):
                for soon in waiting[position : position + _AT_ONCE]:
                    if soon not in self._ahead:
                        self._ahead.start(soon, self._job(soon))
                self._opened[one] = self._ahead.take(one)
            return self._opened[number]

    def _job(self, number: int) -> Callable[[], Images]:
        shard = self._archive.images[number]
        url = join(self._url, shard.file)
        remedy = f"It came from {shown_place(url)}. {WRONG_COPY}"
        shape, verify = self._archive.image_shape, self._verify

        def opened(path: Path) -> Images:
            return open_images(path, shard, shape, verify=verify, remedy=remedy)

        return partial(self._cache.open, url, shard, opened)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in {"_opened", "_lock"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_opened": {}, "_lock": threading.Lock()}  # it maps the cached shards itself


def _source(archive: Archive, split: str, opened: Callable[[int], Images], episodes: int | None) -> ThinSource:
    sampler = archive_sampler(archive, split)
    rows = Rows([shard.first_row for shard in archive.images], opened)
    info = episode_info(archive, split, archive.digest)
    return ThinSource(info, sampler, rows, at_most(episodes, archive.split(split).episodes))


def _needed(archive: Archive, table: ClassTable) -> list[int]:
    """The numbers of the shards that hold images of these classes."""
    starts = np.array([shard.first_row for shard in archive.images])
    first, last = (
        np.searchsorted(starts, rows, side="right") - 1
        for rows in (table.first_row, table.first_row + table.images - 1)
    )
    spans = set(zip(first.tolist(), last.tolist(), strict=True))
    return sorted({number for start, end in spans for number in range(start, end + 1)})
