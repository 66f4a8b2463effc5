"""The source of a split, from a folder, an address, or a source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mamldata.archive.index import read_archive
from mamldata.archive.remote import read_remote_archive
from mamldata.errors import RequestError
from mamldata.io.urls import is_remote
from mamldata.sources.drawn import ThinSource
from mamldata.sources.remote import RemoteSource
from mamldata.sources.source import Source
from mamldata.sources.stored import ArchiveSource, StoredSource
from mamldata.sources.thin import thin_from_address, thin_from_folder


def open_archive(
    place: str | os.PathLike[str],
    split: str = "train",
    *,
    verify: bool = False,
    episodes: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
) -> StoredSource | ThinSource:
    """A split of an archive, from its folder or its address; see ``ArchiveSource``, ``RemoteSource`` and ``thin``.

    Raises:
        RequestError: it is not an archive, it has no such split, or a cache was given for a folder.
        FetchError: a file at the address could not be fetched.
        DamagedError: the archive is damaged.
    """
    options: dict[str, Any] = {"verify": verify, "episodes": episodes}
    if is_remote(place):
        url, archive = str(place), read_remote_archive(str(place))
        options |= {"cache_dir": cache_dir, "cache_bytes": cache_bytes}
        if archive.thin:
            return thin_from_address(url, archive, split, **options)
        return RemoteSource(url, split, archive=archive, **options)
    if cache_dir is not None or cache_bytes is not None:
        raise RequestError("cache_dir and cache_bytes are for archives at an address; a folder needs no cache.")
    archive = read_archive(Path(place))
    if archive.thin:
        return thin_from_folder(Path(place), archive, split, **options)
    return ArchiveSource(place, split, archive=archive, **options)


def as_source(
    source: Source | str | os.PathLike[str],
    split: str | None,
    *,
    verify: bool,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
) -> Source:
    """The given source, or one made from the folder or the address of an archive.

    Raises:
        RequestError: it is not an archive, or an argument does not fit the source.
        FetchError: a file at the address could not be fetched.
        DamagedError: the archive is damaged.
    """
    if isinstance(source, str | os.PathLike):
        return open_archive(source, split or "train", verify=verify, cache_dir=cache_dir, cache_bytes=cache_bytes)
    if split is not None and split != source.info.split:
        raise RequestError(f"The source has the split {source.info.split!r}, not {split!r}.")
    if verify:
        raise RequestError("verify=True is for archives; live episodes have no digest to check.")
    if cache_dir is not None or cache_bytes is not None:
        raise RequestError("cache_dir and cache_bytes are for the address of an archive, not for a source.")
    return source
