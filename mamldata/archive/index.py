"""The archive, format ``mamldata/1``: tar shards that are strided arrays at the same time, and ``archive.json``.

Every episode takes the same number of bytes, so episode i of a shard starts at ``i * stride``: a shard can be read
as a tar by any tool, or memory-mapped and indexed. ``docs/format.md`` describes it byte by byte.
"""

from __future__ import annotations

import math
import mmap
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from mamldata.errors import DamagedError, RequestError
from mamldata.io.atomic import FileVersion, file_version, read_whole
from mamldata.io.digest import canonical_json, parse_json, sha256_bytes, sha256_file
from mamldata.io.npy import npy_header
from mamldata.sampling.normalization import Normalisation
from mamldata.sampling.sampler import ROTATIONS, ClassTable, EpisodeSampler, EpisodeSpec, quarter_turns
from mamldata.sampling.splits import SPLITS

FORMAT = "mamldata/1"
INDEX = "archive.json"
INDEX_SUM = "archive.json.sha256"
MOST_INDEX_BYTES = 1 << 28  # of archive.json: 10**6 classes with names of 200 characters
MOST_SUM_BYTES = 1 << 10
BLOCK = 512  # a tar's unit, in bytes
END = 2 * BLOCK  # two empty blocks close a tar
MOST_EPISODES = 10**8  # the member names have eight digits

_MOST_MEMBER = 8**11  # a tar header has eleven octal digits for a member's length
_MOST_VALUES = 1 << 23  # in archive.json: 10**6 classes have 5 million, and room for commas in their names
_MOST_ROWS = 2**31  # source.npy is int32
_MOST_POOL = 1 << 24  # numbers that the drawing of an episode shuffles, where shards are compared with it
REMEDY = "Copy it again, or delete it and build the archive again."

Bytes = npt.NDArray[np.uint8]

_maps: WeakSet[mmap.mmap] = WeakSet()  # of shards, in this process


@dataclass(frozen=True)
class Member:
    """One file of an episode: where its tar header, its npy header and its data stand, from the episode's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    header: int
    data: int
    bytes: int


class EpisodeLayout:
    """Where everything stands in an episode; the same for all episodes of an archive.

    Args:
        n_way, k_shot, k_query: of the episodes.
        image_shape: ``(H, W, C)``.

    Attributes:
        support, query, source: the three members.
        stride: bytes from one episode to the next.
    """

    def __init__(self, n_way: int, k_shot: int, k_query: int, image_shape: Sequence[int]) -> None:
        shapes = {
            "support": ("|u1", (n_way, k_shot, *image_shape)),
            "query": ("|u1", (n_way, k_query, *image_shape)),
            "source": ("<i4", (n_way, 1 + k_shot + k_query)),
        }
        start = 0
        members = []
        for name, (dtype, shape) in shapes.items():
            data = start + BLOCK + len(npy_header(dtype, shape))
            size = math.prod(shape) * np.dtype(dtype).itemsize
            if data - start + size >= _MOST_MEMBER:
                raise RequestError(f"An episode's {name} file would be {size:,} bytes; a tar holds none of 8 GiB.")
            members.append(Member(name, dtype, shape, start, data, size))
            start = -(-(data + size) // BLOCK) * BLOCK
        self.support, self.query, self.source = self.members = tuple(members)
        self.stride = start

    def shard_bytes(self, episodes: int) -> int:
        """The length of a shard's file."""
        return episodes * self.stride + END

    def headers(self, first: int, count: int) -> Bytes:
        """The tar headers of episodes from ``first`` on: uint8 ``[count, 3, 512]``."""
        digits = np.array([list(f"{index:08d}".encode()) for index in range(first, first + count)], dtype=np.uint8)
        headers = np.empty((count, len(self.members), BLOCK), dtype=np.uint8)
        for position, member in enumerate(self.members):
            size = member.data - member.header - BLOCK + member.bytes
            template = np.frombuffer(_tar_header(f"00000000.{member.name}.npy", size), dtype=np.uint8)
            headers[:, position] = template
            headers[:, position, :8] = digits
            # Only the digits of the name differ from the template's, and so its checksum by their sum.
            checksum = int(template[148:154].tobytes(), 8) + (digits.astype(np.int64) - ord("0")).sum(axis=1)
            headers[:, position, 148:154] = [list(f"{value:06o}".encode()) for value in checksum.tolist()]
        return headers

    def frame(self, first: int, count: int) -> Bytes:
        """Episodes with their headers and no data yet: uint8 ``[count, stride]``."""
        block = np.zeros((count, self.stride), dtype=np.uint8)
        headers = self.headers(first, count)
        for position, member in enumerate(self.members):
            block[:, member.header : member.header + BLOCK] = headers[:, position]
            npy = npy_header(member.dtype, member.shape)
            block[:, member.header + BLOCK : member.data] = np.frombuffer(npy, dtype=np.uint8)
        return block

    def view(self, block: Bytes, member: Member) -> npt.NDArray[Any]:
        """One member of every episode of a block: ``[count, *member.shape]``, a view of the same memory.

        Args:
            block: uint8, contiguous, ``count * stride`` bytes (a tar's two closing blocks may follow).
            member: one of ``members``.
        """
        count = block.size // self.stride
        strides = (self.stride, *_contiguous_strides(member))
        return np.ndarray((count, *member.shape), member.dtype, block, member.data, strides)


def _contiguous_strides(member: Member) -> tuple[int, ...]:
    strides = [np.dtype(member.dtype).itemsize]
    for size in reversed(member.shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def _tar_header(name: str, size: int) -> bytes:
    """A ustar header that says nothing of who wrote it or when: mtime 0, uid and gid 0, mode 0644, no owners."""
    header = bytearray(BLOCK)
    fields = {
        0: name.encode("ascii"),
        100: b"0000644\0",
        108: b"0000000\0",
        116: b"0000000\0",
        124: f"{size:011o}\0".encode(),
        136: b"00000000000\0",
        148: b" " * 8,
        156: b"0",
        257: b"ustar\x0000",
    }
    for offset, value in fields.items():
        header[offset : offset + len(value)] = value
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


@dataclass(frozen=True)
class Shard:
    """One tar of an archive: its file name, its episodes, its length and digest."""

    file: str
    first_episode: int
    episodes: int
    bytes: int
    sha256: str


@dataclass(frozen=True, eq=False)  # arrays do not compare to one truth
class ArchiveSplit:
    """One split of an archive: its class table and its shards in order."""

    classes: ClassTable
    episodes: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True, eq=False)  # arrays do not compare to one truth
class Archive:
    """What ``archive.json`` says.

    Attributes:
        dataset, dataset_version, bank_sha256: where the images come from.
        split_scheme, rotations, seed, n_way, k_shot, k_query: what the episodes are.
        image_shape: ``(H, W, C)``.
        normalisation: mean and deviation of all images of the train split's classes.
        splits: by name.
    """

    dataset: str
    dataset_version: str
    bank_sha256: str
    split_scheme: str
    rotations: str
    seed: int
    n_way: int
    k_shot: int
    k_query: int
    image_shape: tuple[int, int, int]
    normalisation: Normalisation
    splits: Mapping[str, ArchiveSplit]

    @cached_property
    def layout(self) -> EpisodeLayout:
        """Where everything stands in each episode."""
        return EpisodeLayout(self.n_way, self.k_shot, self.k_query, self.image_shape)

    @cached_property
    def digest(self) -> str:
        """The archive's digest, the one to cite: the SHA-256 of ``archive.json``."""
        return sha256_bytes(self.to_json())

    def spec(self, split: str) -> EpisodeSpec:
        """What the episodes of a split are a function of."""
        turns = quarter_turns(self.rotations, split)
        return EpisodeSpec(
            self.bank_sha256,
            self.split_scheme,
            split,
            self.n_way,
            self.k_shot,
            self.k_query,
            turns,
            self.seed,
        )

    def split(self, name: str) -> ArchiveSplit:
        """One split.

        Raises:
            RequestError: the archive has no episodes of it.
        """
        if name not in self.splits:
            raise RequestError(
                f"The archive has no episodes of split {name!r}; it has {', '.join(self.splits)}. Build one with "
                f"episodes of it (--{name} NUMBER): training validates on val, and eval evaluates on test."
            )
        return self.splits[name]

    def with_digests(self, digests: Mapping[str, str]) -> Archive:
        """The archive with a sha256 for each of its shards, by file name."""
        splits = {
            name: replace(split, shards=tuple(replace(shard, sha256=digests[shard.file]) for shard in split.shards))
            for name, split in self.splits.items()
        }
        return replace(self, splits=splits)

    def without_digests(self) -> Archive:
        """The archive as it was before its shards were written: without their digests."""
        return self.with_digests(dict.fromkeys((shard.file for shard in self.shards()), ""))

    def shards(self) -> Iterator[Shard]:
        """All shards, in the order of work."""
        for split in self.splits.values():
            yield from split.shards

    def to_json(self) -> bytes:
        """The bytes of ``archive.json``: canonical JSON."""
        return canonical_json(
            {
                "format": FORMAT,
                "dataset": self.dataset,
                "dataset_version": self.dataset_version,
                "bank_sha256": self.bank_sha256,
                "split_scheme": self.split_scheme,
                "rotations": self.rotations,
                "seed": self.seed,
                "n_way": self.n_way,
                "k_shot": self.k_shot,
                "k_query": self.k_query,
                "image_shape": list(self.image_shape),
                "normalisation": {key: list(value) for key, value in self.normalisation._asdict().items()},
                "splits": {name: _split_json(split) for name, split in self.splits.items()},
            }
        )


def _split_json(split: ArchiveSplit) -> dict[str, Any]:
    table = split.classes
    columns = zip(
        table.names,
        table.quarter_turns.tolist(),
        table.first_row.tolist(),
        table.images.tolist(),
        strict=True,
    )
    return {
        "classes": [
            {"name": name, "quarter_turns": turns, "first_row": row, "images": images}
            for name, turns, row, images in columns
        ],
        "episodes": split.episodes,
        "shards": [asdict(shard) for shard in split.shards],
    }


def index_sum(digest: str) -> bytes:
    """The line of ``archive.json.sha256``, in the format of ``sha256sum``."""
    return f"{digest}  {INDEX}\n".encode("ascii")


def is_archive(path: Path) -> bool:
    """Whether ``path`` is a folder with a finished archive."""
    return (path / INDEX).is_file()


def read_archive(folder: Path) -> Archive:
    """Read and check ``archive.json``; the shards are not touched.

    Raises:
        RequestError: the folder is no archive, or an unfinished one.
        DamagedError: ``archive.json`` is not what was written.
    """
    path = folder / INDEX
    if not path.is_file():
        unfinished = (folder / ".build").is_dir()
        raise RequestError(
            f"{folder} is an unfinished build. Run the same mamldata build again: it goes on."
            if unfinished
            else f"{folder} is not an archive: there is no {INDEX} in it. Make one with: mamldata build NAME --out DIR"
        )
    digest_file = folder / INDEX_SUM
    try:
        data = read_whole(path, MOST_INDEX_BYTES)
        declared = read_whole(digest_file, MOST_SUM_BYTES) if digest_file.is_file() else None
    except OSError as error:
        raise DamagedError(f"{error.filename} cannot be read ({error.strerror}). Copy it anew.") from error
    return check_archive(data, declared, path)


def check_archive(data: bytes, declared: bytes | None, shown: Path | str) -> Archive:
    """The archive that ``archive.json`` describes, checked against ``archive.json.sha256``.

    Args:
        data: of ``archive.json``.
        declared: of ``archive.json.sha256``, if it is there.
        shown: where ``archive.json`` is, for the message.

    Raises:
        DamagedError: it is not what was written.
    """
    try:
        archive = parse_archive(data)
    except DamagedError as error:
        raise DamagedError(f"{shown}: {error}") from error
    if declared is not None and declared != index_sum(archive.digest):
        raise DamagedError(
            f"{shown} is damaged: its sha256 is {archive.digest}, which is not what {INDEX_SUM} says. "
            "Copy both anew, or delete the folder and build the archive again."
        )
    return archive


def parse_plan(data: bytes) -> Archive:
    """An archive whose shards have no digests yet, from the very bytes that its ``to_json`` gave."""
    return _from_json(parse_json(data, _MOST_VALUES))


def parse_archive(data: bytes) -> Archive:
    """The archive that ``archive.json`` describes.

    Raises:
        DamagedError: not canonical JSON of this format, or its numbers do not fit together.
    """
    try:
        document = parse_json(data, _MOST_VALUES)
        declared = document["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"not the description of an archive ({error}).") from error
    if declared != FORMAT:
        raise DamagedError(f"its format is {declared!r}; this version of mamldata reads {FORMAT!r}.")
    try:
        archive = _from_json(document)
        sound = archive.to_json() == data and _plain(archive) and _consistent(archive)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RequestError) as error:
        raise DamagedError(f"damaged ({error}).") from error
    if not sound:
        raise DamagedError("damaged: it is not what was written when the archive was built.")
    return archive


def _from_json(document: dict[str, Any]) -> Archive:
    height, width, channels = document["image_shape"]
    return Archive(
        dataset=document["dataset"],
        dataset_version=document["dataset_version"],
        bank_sha256=document["bank_sha256"],
        split_scheme=document["split_scheme"],
        rotations=document["rotations"],
        seed=document["seed"],
        n_way=document["n_way"],
        k_shot=document["k_shot"],
        k_query=document["k_query"],
        image_shape=(height, width, channels),
        normalisation=Normalisation(**{key: tuple(value) for key, value in document["normalisation"].items()}),
        # JSON sorts them by name; ours is the order of work. A split of another name is noticed by the caller.
        splits={name: _split_from_json(document["splits"][name]) for name in SPLITS if name in document["splits"]},
    )


def _split_from_json(document: dict[str, Any]) -> ArchiveSplit:
    classes = document["classes"]

    def column(key: str) -> npt.NDArray[np.int64]:
        return np.array([entry[key] for entry in classes], dtype=np.int64)

    table = ClassTable(
        tuple(entry["name"] for entry in classes),
        column("quarter_turns"),
        column("first_row"),
        column("images"),
    )
    shards = tuple(Shard(**shard) for shard in document["shards"])
    return ArchiveSplit(table, document["episodes"], shards)


def _plain(archive: Archive) -> bool:
    """Whether every value has the type and the range that a build gives it: JSON's ``true`` and ``1.0`` are not 1."""
    splits = archive.splits.values()
    shards = [shard for split in splits for shard in split.shards]
    names = [name for split in splits for name in split.classes.names]
    texts = (archive.dataset, archive.dataset_version, archive.bank_sha256, archive.split_scheme, *names)
    moments = (*archive.normalisation.mean, *archive.normalisation.std)
    digests = (archive.bank_sha256, *(shard.sha256 for shard in shards))
    counts = [archive.n_way, archive.k_shot, archive.k_query, *archive.image_shape]
    counts += [split.episodes for split in splits] + [shard.episodes for shard in shards]
    numbers = [archive.seed, *counts, *(value for shard in shards for value in (shard.first_episode, shard.bytes))]
    return (
        all(type(text) is str for text in texts)
        and all(type(number) is int for number in numbers)
        and all(0 < count < MOST_EPISODES for count in counts)
        and all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in digests)
        and all(type(value) is float and 0 <= value <= 1 for value in moments)
        and all(archive.normalisation.std)
        and {len(values) for values in archive.normalisation} == {archive.image_shape[2]}
        and archive.rotations in ROTATIONS
        and len(archive.splits) > 0
    )


def _consistent(archive: Archive) -> bool:
    """Whether shards cover the episodes without a gap, and have the length that their episodes need."""
    for name, split in archive.splits.items():
        spec, table = archive.spec(name), split.classes  # refuses what no episode can be
        starts = [0, *np.cumsum([shard.episodes for shard in split.shards]).tolist()]
        expected = [
            (shard_file(name, number), first, stop - first, archive.layout.shard_bytes(stop - first))
            for number, (first, stop) in enumerate(pairwise(starts))
        ]
        found = [(shard.file, shard.first_episode, shard.episodes, shard.bytes) for shard in split.shards]
        turns = np.arange(len(table)) % spec.quarter_turns
        rows = (table.first_row >= 0) & (table.images > 0) & (table.images <= _MOST_ROWS - table.first_row)
        if found != expected or starts[-1] != split.episodes:
            return False
        if not (rows.all() and np.array_equal(table.quarter_turns, turns)):
            return False
    return True


def shard_file(split: str, number: int) -> str:
    """The file name of a split's shard, such as ``train-00000.tar``."""
    return f"{split}-{number:05d}.tar"


def shard_sizes(episodes: int, per_shard: int) -> Iterator[tuple[int, int]]:
    """First episode and number of episodes of each shard."""
    for first in range(0, episodes, per_shard):
        yield first, min(per_shard, episodes - first)


def check_size(path: Path, shard: Shard) -> None:
    """Check that a shard is there and has its length.

    Raises:
        DamagedError: naming the shard, the length expected and got, and the first episode that is cut off.
    """
    try:
        got = path.stat().st_size
    except FileNotFoundError:
        raise DamagedError(
            f"The shard {path} is missing (episodes {_range(shard)}). Copy it again, or build the archive again."
        ) from None
    if got != shard.bytes:
        raise DamagedError(
            f"The shard {path} (episodes {_range(shard)}) has {got:,} bytes, expected {shard.bytes:,}. {REMEDY}"
        )


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
        verify: hash the whole file too, so that flipped pixels are noticed.
        sampler: of the shard's split; the first and the last episode must then be those that it draws, so that a
            shard of another split, which can have the same length and headers, is noticed.
        checked: which version of each file has passed these checks; that one is mapped without them.
        remedy: the last sentence of errors.

    Returns:
        uint8 ``[bytes]``, read-only.

    Raises:
        DamagedError: naming the shard, and the episode where one can be named.
    """
    check_size(path, shard)
    with path.open("rb") as stream:
        version = file_version(os.fstat(stream.fileno()))
        map_ = mmap.mmap(stream.fileno(), shard.bytes, access=mmap.ACCESS_READ)
    _maps.add(map_)
    mapped = np.frombuffer(map_, dtype=np.uint8)
    if checked is not None and checked.get(path) == version:
        return mapped
    if (broken := _first_broken_episode(mapped, shard, layout)) is not None:
        raise DamagedError(f"The shard {path} is damaged: episode {broken} does not start as it should. {remedy}")
    if verify and (got := sha256_file(path)) != shard.sha256:
        raise DamagedError(
            f"The shard {path} (episodes {_range(shard)}) is damaged: sha256 {got}, expected {shard.sha256}. {remedy}"
        )
    if sampler is not None and (other := _first_other_episode(mapped, shard, layout, sampler)) is not None:
        raise DamagedError(
            f"The shard {path} holds other episodes than {INDEX} says: episode {other} in it is not the one that the "
            f"settings there give. It may be the shard of another split or archive. {remedy}"
        )
    if checked is not None:
        checked[path] = version
    return mapped


def open_maps() -> int:
    """How many shards this process has mapped; each map keeps a file descriptor."""
    return len(_maps)


def _range(shard: Shard) -> str:
    return f"{shard.first_episode} to {shard.first_episode + shard.episodes - 1}"


def _first_broken_episode(mapped: Bytes, shard: Shard, layout: EpisodeLayout) -> int | None:
    """The index of the first episode whose tar or npy headers are not the expected ones, if there is one."""
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
    """The index of the first or last episode of a shard if it is not the one that is drawn for its index.

    None also for classes of so many images that drawing one episode takes more than 64 MiB: a forged ``archive.json``
    can claim that.
    """
    if sampler.spec.n_way * int(sampler.table.images.max()) > _MOST_POOL:
        return None
    stored = layout.view(mapped, layout.source)
    for place in (0, shard.episodes - 1):
        index = shard.first_episode + place
        if not np.array_equal(stored[place], sampler.sample(index, 1)[0]):
            return index
    return None
