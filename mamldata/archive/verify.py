"""Hash an archive again and check that its parts fit together. Problems are returned, not raised."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mamldata.archive.index import INDEX, INDEX_SUM, AnyShard, Archive, Shard, index_sum, read_archive, shard_sizes
from mamldata.archive.remote import ShardCache, read_remote_archive
from mamldata.archive.shard import open_images, open_shard
from mamldata.errors import DamagedError, FetchError, RequestError
from mamldata.io.npy import npy_header
from mamldata.io.scratch import scratch
from mamldata.io.urls import is_remote, join, shown_place
from mamldata.progress import Advance, Progress, silent
from mamldata.sampling.sampler import EpisodeSampler

Find = Callable[[AnyShard], Path]  # gives the place of a shard's file, once it is there


def verify_archive(folder: Path | str, progress: Progress = silent, *, digest: str | None = None) -> list[str]:
    """Hash all shards of an archive again, check their structure, and draw every episode again.

    A thin archive has no episodes to compare: its images must be those of the bank whose digest it gives.

    Args:
        folder: the archive, or its address; its shards are then fetched again, one by one, and not kept.
        progress: counts hashed bytes.
        digest: the digest that the archive should have, as cited: 64 hexadecimal digits, or the first 12 or more.

    Returns:
        One line for each problem, naming the file and the episode; empty if there are none.

    Raises:
        RequestError: the folder is not an archive, or ``digest`` is not a digest.
        FetchError: ``archive.json`` could not be fetched from the address.
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
    largest = max(shard.bytes for shard in archive.shards())
    with scratch() as place:
        cache = ShardCache(place, largest, lasting=False)
        problems = _check_digest(shown_place(url), archive, digest)
        return problems + _check_shards(
            shown_place(join(url, INDEX)), archive, progress, lambda shard: cache.get(join(url, shard.file), shard)
        )


def _check_shards(index: Path | str, archive: Archive, progress: Progress, find: Find) -> list[str]:
    """The problems of all shards, whose files ``find`` returns; ``index`` is the place of ``archive.json``."""
    problems = []
    with progress("verify", sum(shard.bytes for shard in archive.shards()), "B") as advance:
        problems += _check_images(index, archive, find, advance)
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


def _check_images(index: Path | str, archive: Archive, find: Find, advance: Advance) -> list[str]:
    """The problems of a thin archive's shards."""
    problems = []
    shape = (sum(shard.rows for shard in archive.images), *archive.image_shape)
    bank = hashlib.sha256(npy_header("|u1", shape))
    for shard in archive.images:
        try:
            bank.update(open_images(find(shard), shard, archive.image_shape, verify=True).data)
        except (DamagedError, FetchError) as error:
            problems.append(str(error))
        advance(shard.bytes)
    if archive.thin and not problems and bank.hexdigest() != archive.bank_sha256:
        problems.append(f"{index} was altered: its images are those of bank {bank.hexdigest()}, not of bank_sha256.")
    return problems


def _check_index(folder: Path, archive: Archive, digest: str | None) -> list[str]:
    problems = []
    if not (folder / INDEX_SUM).is_file():
        problems.append(
            f"{folder / INDEX_SUM} is missing. If {archive.digest} is the digest that you expect, write it with: "
            f"(cd {shlex.quote(str(folder))} && sha256sum {INDEX} > {INDEX_SUM})"
        )
    elif (folder / INDEX_SUM).read_bytes() != index_sum(archive.digest):
        problems.append(f"{folder / INDEX_SUM} does not match the sha256 of {INDEX}, which is {archive.digest}.")
    return problems + _check_digest(folder, archive, digest)


def _check_digest(place: Path | str, archive: Archive, digest: str | None) -> list[str]:
    if digest is None:
        return []
    asked = digest.removeprefix("sha256:").lower()
    if not re.fullmatch(r"[0-9a-f]{12,64}", asked):
        raise RequestError(f"{digest!r} is not a digest. Give its 64 hexadecimal digits, or at least the first 12.")
    if archive.digest.startswith(asked):
        return []
    return [f"{place} is another archive: its digest is {archive.digest}, expected {digest}."]


def _check_shard(path: Path, archive: Archive, shard: Shard, sampler: EpisodeSampler) -> list[str]:
    """The first problem of a shard; empty if there is none."""
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
                f"The shard {path} is whole, but its episode {episode} is not the one that the settings in "
                f"{INDEX} give: the archive was not made by mamldata build, or {INDEX} was altered."
            )
            return [text]
    return []


def _strangers(folder: Path, archive: Archive) -> list[str]:
    """Shards that are not the archive's: tools that read every tar of a folder would include them."""
    known = {shard.file for shard in archive.shards()}
    every = [*folder.glob("*.tar"), *folder.glob("images-*.npy")]
    found = sorted(path.name for path in every if path.name not in known)
    return [f"{folder / name} does not belong to the archive. Move it elsewhere." for name in found]
