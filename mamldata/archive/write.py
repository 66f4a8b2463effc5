"""Write one shard, of episodes or of images: the task that a worker gets, and how it carries it out."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mamldata.archive.index import (
    BUILD,
    INDEX,
    PLAN,
    AnyShard,
    Archive,
    ImageShard,
    Shard,
    parse_archive,
    parse_plan,
    shard_sizes,
)
from mamldata.archive.layout import END, EpisodeLayout
from mamldata.archive.store import Store
from mamldata.bank.format import Images, open_images
from mamldata.errors import DataMissingError, MamldataError, WriteError
from mamldata.io.digest import sha256_bytes
from mamldata.io.npy import npy_header
from mamldata.sampling.sampler import EpisodeSampler, gather
from mamldata.version import __version__

_CHUNK_BYTES = 8 << 20  # generated at a time, in memory


@dataclass(frozen=True)
class ShardTask:
    """A shard to write. It pickles to a few hundred bytes for any class table, because the worker reads the plan.

    Attributes:
        store: where the archive is built; holds its plan.
        plan_sha256: the digest of that plan.
        bank: the bank's file.
        file: which shard, by its name.
        version: the version of mamldata.
    """

    store: Store
    plan_sha256: str
    bank: Path
    file: str
    version: str = __version__


@dataclass(frozen=True)
class ShardMade:
    """A finished shard: its sha256, and whether this call wrote it."""

    sha256: str
    written: bool


def make_shard(task: ShardTask) -> ShardMade:
    """Write one shard and its receipt, unless it exists already and matches its receipt.

    Raises:
        MamldataError: this worker has another version of mamldata, or does not see the same files.
        WriteError: the store cannot be written to.
    """
    if task.version != __version__:
        raise MamldataError(
            f"{_worker()} has mamldata {__version__}, and the build {task.version}. Install the same "
            "version on all workers."
        )
    plan = _read_plan(task.store, task.plan_sha256)
    _, shard = plan.shard(task.file)
    if (made := _closed(task) or _finished(task.store, shard)) is not None:
        return made
    try:
        images = open_images(task.bank, plan.bank_sha256)
    except DataMissingError as error:
        raise DataMissingError(f"{_worker()}: {error} Every worker needs the bank at the same path.") from error
    digest = hashlib.sha256()

    def pieces() -> Iterator[memoryview]:
        for piece in shard_pieces(plan, task.file, images):
            digest.update(piece)
            yield piece

    try:
        task.store.write(shard.file, pieces())
        if (made := _closed(task)) is None:
            task.store.write(receipt(shard), [digest.hexdigest().encode()])
    except (FileNotFoundError, WriteError) as error:
        # Perhaps another writer of the same shard was faster, closed the archive and cleared up.
        if (made := _closed(task)) is None:
            if isinstance(error, WriteError):
                raise
            raise WriteError(
                f"{task.store}/{BUILD} was removed while {shard.file} was written. Run the same command again."
            ) from error
    return made or ShardMade(digest.hexdigest(), written=True)


def shard_pieces(plan: Archive, file: str, images: Images) -> Iterator[memoryview]:
    """The bytes of a shard, a few megabytes at a time.

    Args:
        plan: the archive to build.
        file: the name of the shard.
        images: the bank, uint8 ``[rows, H, W, C]``.
    """
    split, shard = plan.shard(file)
    if isinstance(shard, ImageShard):
        return _image_pieces(shard, images)
    return _episode_pieces(plan, split, shard, images)


def _image_pieces(shard: ImageShard, images: Images) -> Iterator[memoryview]:
    rows = images[shard.first_row : shard.first_row + shard.rows]
    yield memoryview(npy_header("|u1", rows.shape))
    for start, count in shard_sizes(len(rows), max(1, _CHUNK_BYTES // rows[0].size)):
        yield rows[start : start + count].reshape(-1).data


def _episode_pieces(plan: Archive, split: str, shard: Shard, images: Images) -> Iterator[memoryview]:
    spec, table = plan.spec(split), plan.splits[split].classes
    layout = EpisodeLayout(spec.n_way, spec.k_shot, spec.k_query, plan.image_shape)
    sampler = EpisodeSampler(spec, table)
    for start, count in shard_sizes(shard.episodes, max(1, _CHUNK_BYTES // layout.stride)):
        first = shard.first_episode + start
        block = layout.frame(first, count)
        source = sampler.sample(first, count)
        layout.view(block, layout.source)[...] = source
        gather(
            images,
            table,
            source,
            spec.k_shot,
            layout.view(block, layout.support),
            layout.view(block, layout.query),
        )
        yield block.reshape(-1).data
    yield memoryview(bytes(END))


def receipt(shard: AnyShard) -> str:
    """The name of the file that records a finished shard's sha256."""
    return f"{BUILD}/{shard.file}.sha256"


def _finished(store: Store, shard: AnyShard) -> ShardMade | None:
    """A shard that exists and still matches its receipt."""
    found = store.read(receipt(shard))
    if found is None or store.size(shard.file) != shard.bytes:
        return None
    digest = found.decode(errors="replace")
    return ShardMade(digest, written=False) if store.sha256(shard.file) == digest else None


def _closed(task: ShardTask) -> ShardMade | None:
    """The shard, if another process has closed the archive meanwhile."""
    if task.store.size(INDEX) is None or (data := task.store.read(INDEX)) is None:
        return None
    _, shard = parse_archive(data).shard(task.file)
    return ShardMade(shard.sha256, written=False)


@lru_cache(maxsize=2)  # a worker writes many shards of one plan
def _read_plan(store: Store, sha256: str) -> Archive:
    data = store.read(PLAN)
    if data is None and (index := store.read(INDEX)) is not None:
        data = parse_archive(index).without_digests().to_json()
    if data is None or sha256_bytes(data) != sha256:
        what = "no unfinished build" if data is None else "another build"
        raise MamldataError(
            f"{_worker()} sees {what} in {store}. All workers need the same file system, at the same path; or give an "
            "address that all of them reach, such as s3://bucket/folder."
        )
    return parse_plan(data)


def _worker() -> str:
    return f"The worker on {socket.gethostname()} (process {os.getpid()})"
