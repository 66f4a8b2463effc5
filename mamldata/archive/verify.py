"""Hash an archive again and check that it fits together. All problems are returned, not raised."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mamldata.archive.index import INDEX, INDEX_SUM, Archive, Shard, index_sum, read_archive, shard_sizes
from mamldata.archive.remote import ShardCache, read_remote_archive
from mamldata.archive.shard import open_shard
from mamldata.errors import DamagedError, FetchError, RequestError
from mamldata.io.urls import is_remote, join, shown_place
from mamldata.progress import Progress, silent
from mamldata.sampling.sampler import EpisodeSampler


def verify_archive(folder: Path | str, progress: Progress = silent, *, digest: str | None = None) -> list[str]:
    """Hash all shards of an archive again, check their structure, and draw every episode again.

    Args:
        folder: the archive, or its address; its shards are then fetched anew, one after the other, and not kept.
        progress: told of hashed bytes.
        digest: the digest that the archive should have, as cited: 64 hexadecimal digits, or the first 12 or more.

    Returns:
        One line for each problem, naming file and episode. Empty if all is well.

    Raises:
        RequestError: the folder is no archive, or ``digest`` no digest.
        FetchError: ``archive.json`` could not be had from the address.
    """
    if is_remote(folder):
        return _verify_remote(str(folder), progress, digest)
    folder = Path(folder)
    try:
        archive = read_archive(folder)
    except DamagedError as error:
        return [str(error)]
    problems = _check_index(folder, archive, digest)
    problems += _check_shards(folder / INDEX, archive, progress, lambda shard: folder / shard.file)
    return problems + _strangers(folder, archive)


def _verify_remote(url: str, progress: Progress, digest: str | None) -> list[str]:
    try:
        archive = read_remote_archive(url)
    except DamagedError as error:
        return [str(error)]
    largest = max(shard.bytes for split in archive.splits.values() for shard in split.shards)
    with TemporaryDirectory(prefix="mamldata-") as place:
        cache = ShardCache(Path(place), largest, lasting=False)
        problems = _check_digest(shown_place(url), archive, digest)
        return problems + _check_shards(
            shown_place(join(url, INDEX)), archive, progress, lambda shard: cache.get(join(url, shard.file), shard)
        )


def _check_shards(index: Path | str, archive: Archive, progress: Progress, find: Callable[[Shard], Path]) -> list[str]:
    """The problems of all shards, each brought by ``find``; ``index`` is where ``archive.json`` is."""
    problems = []
    total = sum(shard.bytes for split in archive.splits.values() for shard in split.shards)
    with progress("verify", total, "B") as advance:
        for name, split in archive.splits.items():
            try:
                sampler = EpisodeSampler(archive.spec(name), split.classes)
            except RequestError as error:
                problems.append(f"{index} was altered: {error}")
                continue
            for shard in split.shards:
                try:
                    problems += _check_shard(find(shard), archive, shard, sampler)
                except FetchError as error:
                    problems.append(str(error))
                advance(shard.bytes)
    return problems


def _check_index(folder: Path, archive: Archive, digest: str | None) -> list[str]:
    problems = []
    if not (folder / INDEX_SUM).is_file():
        problems.append(
            f"{folder / INDEX_SUM} is missing. If {archive.digest} is the digest that you expect, mend it with: "
            f"(cd {shlex.quote(str(folder))} && sha256sum {INDEX} > {INDEX_SUM})"
        )
    elif (folder / INDEX_SUM).read_bytes() != index_sum(archive.digest):
        problems.append(f"{folder / INDEX_SUM} does not say the sha256 of {INDEX}, which is {archive.digest}.")
    return problems + _check_digest(folder, archive, digest)


def _check_digest(place: Path | str, archive: Archive, digest: str | None) -> list[str]:
    if digest is None:
        return []
    asked = digest.removeprefix("sha256:").lower()
    if not re.fullmatch(r"[0-9a-f]{12,64}", asked):
        raise RequestError(f"{digest!r} is no digest: that is 64 hexadecimal digits, or the first 12 of them or more.")
    if archive.digest.startswith(asked):
        return []
    return [f"{place} is another archive: its digest is {archive.digest}, expected {digest}."]


def _check_shard(path: Path, archive: Archive, shard: Shard, sampler: EpisodeSampler) -> list[str]:
    """A shard's problems: at most one, since the first makes the others moot."""
    try:
        mapped = open_shard(path, shard, archive.layout, verify=True)
    except DamagedError as error:
        return [str(error)]
    stored = archive.layout.view(mapped, archive.layout.source)
    for start, count in shard_sizes(shard.episodes, 1024):
        expected = sampler.sample(shard.first_episode + start, count)
        wrong = (stored[start : start + count] != expected).any(axis=(1, 2))
        if wrong.any():
            episode = shard.first_episode + start + int(np.argmax(wrong))
            text = (
                f"The shard {path} is whole, but episode {episode} in it is not the one that the settings in "
                f"{INDEX} give: the archive was not made by mamldata build, or {INDEX} was altered."
            )
            return [text]
    return []


def _strangers(folder: Path, archive: Archive) -> list[str]:
    """Tar files that the archive does not know would be read by tools that take every tar of a folder."""
    known = {shard.file for split in archive.splits.values() for shard in split.shards}
    found = sorted(path.name for path in folder.glob("*.tar") if path.name not in known)
    return [f"{folder / name} does not belong to the archive. Move it elsewhere." for name in found]
