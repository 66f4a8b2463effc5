"""The source of a split, from a folder, an address, or a source."""

from __future__ import annotations

import os
from typing import Any

from mamldata.errors import RequestError
from mamldata.io.urls import is_remote
from mamldata.sources.source import Source
from mamldata.sources.stored import ArchiveSource, StoredSource


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
        RequestError: it is not an archive, it has no such split, or a cache was given for a folder.
        FetchError: a file at the address could not be fetched.
        DamagedError: the archive is damaged.
    """
    if is_remote(place):
        from mamldata.sources.remote import RemoteSource  # which builds on this module

        options: dict[str, Any] = {"cache_dir": cache_dir, "cache_bytes": cache_bytes}
        return RemoteSource(str(place), split, verify=verify, episodes=episodes, **options)
    if cache_dir is not None or cache_bytes is not None:
        raise RequestError("cache_dir and cache_bytes are for archives at an address; a folder needs no cache.")
    return ArchiveSource(place, split, verify=verify, episodes=episodes)


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
