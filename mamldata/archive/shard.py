"""Open and check the shards of an archive."""

from __future__ import annotations

import mmap
import os
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from weakref import WeakSet

import numpy as np

from mamldata.archive.index import INDEX, AnyShard, ImageShard, Shard, shard_sizes
from mamldata.archive.layout import END, Bytes, EpisodeLayout
from mamldata.bank.checked import hash_and_note
from mamldata.errors import DamagedError, enough_resources
from mamldata.io.atomic import FileVersion, file_version
from mamldata.io.digest import sha256_file
from mamldata.io.npy import npy_header
from mamldata.sampling.sampler import EpisodeSampler

REMEDY = "Copy it again, or delete it and build the archive again."
_maps: WeakSet[mmap.mmap] = WeakSet()  # of shards, in this process


def check_size(path: Path, shard: AnyShard) -> None:
    """Check that a shard exists and has the right length.

    Raises:
        DamagedError: it does not; the message names the shard, what it holds, and both lengths in bytes.
    """
    try:
        got = path.stat().st_size
    except FileNotFoundError:
        raise DamagedError(
            f"The shard {path} is missing ({_range(shard)}). Copy it again, or build the archive again."
        ) from None
    except OSError as error:
        raise DamagedError(f"The shard {path} ({_range(shard)}) cannot be read ({error.strerror}). {REMEDY}") from error
    if got != shard.bytes:
        raise DamagedError(f"The shard {path} ({_range(shard)}) has {got:,} bytes, expected {shard.bytes:,}. {REMEDY}")


def open_shard(
    path: Path,
    shard: Shard,
    layout: EpisodeLayout,
    *,
    verify: bool = False,
    sampler: EpisodeSampler | None = None,
    checked: MutableMapping[Path, FileVersion] | None = None,
    remedy: str = REMEDY,
) -> Bytes:
    """Memory-map a shard after checking its length and every header in it.

    The map keeps one file descriptor until nothing refers to it.

    Args:
        path: the shard's file.
        shard: what ``archive.json`` says of it.
        layout: the archive's.
        verify: also hash the whole file, which finds changed pixels.
        sampler: of the shard's split. The first and the last episode must be those that it draws: a shard of
            another split can have the same length and headers.
        checked: the version of each file that has passed these checks, which is mapped without them.
        remedy: the last sentence of errors.

    Returns:
        uint8 ``[bytes]``, read-only.

    Raises:
        DamagedError: the message names the shard, and the episode where possible.
    """
    mapped, version = _map(path, shard)
    if checked is not None and checked.get(path) == version:
        return mapped
    if (broken := _first_broken_episode(mapped, shard, layout)) is not None:
        raise DamagedError(f"The shard {path} is damaged: episode {broken} does not start as it should. {remedy}")
    if verify and (got := sha256_file(path)) != shard.sha256:
        raise _wrong_digest(path, shard, got, remedy)
    if sampler is not None and (other := _first_other_episode(mapped, shard, layout, sampler)) is not None:
        raise DamagedError(
            f"The shard {path} holds other episodes than {INDEX} says: its episode {other} is not the one that "
            f"those settings give. It may be the shard of another split or archive. {remedy}"
        )
    if checked is not None:
        checked[path] = version
    return mapped


def changed_in_place(path: Path, version: FileVersion) -> bool:
    """Whether a mapped shard's own file has changed since it was checked. A file renamed to its path is another one."""
    try:
        now = file_version(os.stat(path))  # noqa: PTH116  # half the time of Path.stat
    except OSError:  # removed, which leaves the map as it is
        return False
    return now.inode == version.inode and now[:3] != version[:3]


def open_images(
    path: Path, shard: ImageShard, image_shape: Sequence[int], *, verify: bool = False, remedy: str = REMEDY
) -> Bytes:
    """Memory-map a shard of images after checking its length and its header.

    The map keeps one file descriptor until nothing refers to it.

    Args:
        path: the shard's file.
        shard: what ``archive.json`` says of it.
        image_shape: ``(H, W, C)``.
        verify: also hash the whole file, and note in the user's cache that this version of it was whole.
        remedy: the last sentence of errors.

    Returns:
        uint8 ``[rows, H * W * C]``, read-only.

    Raises:
        DamagedError: the message names the shard.
    """
    mapped, _ = _map(path, shard)
    header = npy_header("|u1", (shard.rows, *image_shape))
    if mapped[: len(header)].tobytes() != header:
        raise DamagedError(f"The shard {path} ({_range(shard)}) is damaged: it does not start as it should. {remedy}")
    if verify and (got := hash_and_note(path, shard.sha256)) != shard.sha256:
        raise _wrong_digest(path, shard, got, remedy)
    return mapped[len(header) :].reshape(shard.rows, -1)


def _wrong_digest(path: Path, shard: AnyShard, got: str, remedy: str) -> DamagedError:
    return DamagedError(
        f"The shard {path} ({_range(shard)}) is damaged: sha256 {got}, expected {shard.sha256}. {remedy}"
    )


def _map(path: Path, shard: AnyShard) -> tuple[Bytes, FileVersion]:
    """A file of the right length in memory: uint8 ``[bytes]``, read-only; and which version of it."""
    check_size(path, shard)
    with enough_resources(), path.open("rb") as stream:
        version = file_version(os.fstat(stream.fileno()))
        map_ = mmap.mmap(stream.fileno(), shard.bytes, access=mmap.ACCESS_READ)
    _maps.add(map_)
    return np.frombuffer(map_, dtype=np.uint8), version


def open_maps() -> int:
    """How many shards this process has mapped; each map keeps one file descriptor."""
    return len(_maps)


def _range(shard: AnyShard) -> str:
    if isinstance(shard, ImageShard):
        return f"images {shard.first_row} to {shard.first_row + shard.rows - 1}"
    return f"episodes {shard.first_episode} to {shard.first_episode + shard.episodes - 1}"


def _first_broken_episode(mapped: Bytes, shard: Shard, layout: EpisodeLayout) -> int | None:
    """The index of the first episode whose tar or npy headers are wrong; None if all are right."""
    for start, count in shard_sizes(shard.episodes, 1024):
        first = shard.first_episode + start
        block = mapped[start * layout.stride : (start + count) * layout.stride].reshape(count, layout.stride)
        headers = layout.headers(first, count)
        good = np.ones(count, dtype=bool)
        for position, member in enumerate(layout.members):
            npy = np.frombuffer(npy_header(member.dtype, member.shape), dtype=np.uint8)
            expected = np.concatenate([headers[:, position], np.broadcast_to(npy, (count, len(npy)))], axis=1)
            good &= (block[:, member.header : member.data] == expected).all(axis=1)
        if not good.all():
            return first + int(np.argmin(good))
    if mapped[-END:].any():
        return shard.first_episode + shard.episodes - 1
    return None


def _first_other_episode(mapped: Bytes, shard: Shard, layout: EpisodeLayout, sampler: EpisodeSampler) -> int | None:
    """The index of the first or last episode of a shard if it is not the one that the sampler draws."""
    stored = layout.view(mapped, layout.source)
    for place in (0, shard.episodes - 1):
        index = shard.first_episode + place
        if not np.array_equal(stored[place], sampler.sample(index, 1)[0]):
            return index
    return None
