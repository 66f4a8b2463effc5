"""``archive.json``: what an archive is. ``docs/format.md`` describes it byte by byte."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mamldata.archive.layout import MOST_EPISODES, EpisodeLayout
from mamldata.errors import DamagedError, RequestError
from mamldata.io.atomic import read_whole
from mamldata.io.digest import canonical_json, parse_json, sha256_bytes
from mamldata.io.npy import npy_bytes
from mamldata.sampling.normalization import Normalization
from mamldata.sampling.sampler import ROTATIONS, ClassTable, EpisodeSpec, quarter_turns
from mamldata.sampling.splits import SPLITS, require_split
from mamldata.words import counted, quoted

FORMAT = "mamldata/1"
THIN = "mamldata-thin/1"
INDEX = "archive.json"
BUILD = ".build"  # the folder of what only an unfinished build needs
PLAN = f"{BUILD}/plan.json"
INDEX_SUM = "archive.json.sha256"
MOST_INDEX_BYTES = 1 << 28  # of archive.json: enough for 10**6 classes with names of 200 characters
MOST_SUM_BYTES = 1 << 10
_MOST_VALUES = 1 << 23  # in archive.json: 10**6 classes have 5 million; the rest is for commas in their names
_MOST_ROWS = 2**31  # source.npy is int32
# The fields of an archive that its JSON has under their own names.
_TEXTS = ("dataset", "dataset_version", "bank_sha256", "split_scheme", "rotations")
_OF_CLASS = ("quarter_turns", "first_row", "images")
_NUMBERS = ("seed", "n_way", "k_shot", "k_query")
_MOST_SHOWN = 200  # characters of a file's own words in a message


@dataclass(frozen=True)
class Shard:
    """One tar of an archive: its file name, episodes, length in bytes and digest."""

    file: str
    first_episode: int
    episodes: int
    bytes: int
    sha256: str

    @property
    def count(self) -> int:
        """How many things of its archive's ``unit`` it holds."""
        return self.episodes


@dataclass(frozen=True)
class ImageShard:
    """One ``.npy`` file of a thin archive: its name, rows of the bank, length in bytes and digest."""

    file: str
    first_row: int
    rows: int
    bytes: int
    sha256: str

    @property
    def count(self) -> int:
        """How many things of its archive's ``unit`` it holds."""
        return self.rows


AnyShard = Shard | ImageShard


@dataclass(frozen=True, eq=False)  # arrays do not compare to one truth
class ArchiveSplit:
    """One split of an archive: its class table and its shards in order; a thin archive's split has none."""

    classes: ClassTable
    episodes: int
    shards: tuple[Shard, ...] = ()


@dataclass(frozen=True, eq=False)  # arrays do not compare to one truth
class Archive:
    """What ``archive.json`` says.

    Attributes:
        dataset, dataset_version, bank_sha256: where the images come from.
        split_scheme, rotations, seed, n_way, k_shot, k_query: what the episodes are.
        image_shape: ``(H, W, C)``.
        normalization: mean and deviation of all images of the train split's classes.
        splits: by name.
        images: the shards of a thin archive, which hold the whole bank; empty for one that holds episodes.
        query_alpha: of a thin archive: None, or how unequal the numbers of queries are, see
            ``mamldata.sampling.sampler.EpisodeSpec``.
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
    normalization: Normalization
    splits: Mapping[str, ArchiveSplit]
    images: tuple[ImageShard, ...] = ()
    query_alpha: int | None = None

    def __repr__(self) -> str:
        shape = f"{self.n_way}-way {self.k_shot}-shot {self.k_query}-query"
        splits = ", ".join(f"{name} {counted(split.episodes, 'episode')}" for name, split in self.splits.items())
        return f"<Archive: {self.dataset}, {shape}, {'thin, ' * self.thin}{splits}>"

    @property
    def thin(self) -> bool:
        """Whether it holds the bank's images, and no copies of them: its episodes are drawn when they are read."""
        return bool(self.images)

    @property
    def unit(self) -> str:
        """What its shards hold: ``episodes`` or ``images``."""
        return "images" if self.thin else "episodes"

    @cached_property
    def layout(self) -> EpisodeLayout:
        """Where each part of an episode is."""
        return EpisodeLayout(self.n_way, self.k_shot, self.k_query, self.image_shape)

    @cached_property
    def digest(self) -> str:
        """The archive's digest, which papers cite: the SHA-256 of ``archive.json``."""
        return sha256_bytes(self.to_json())

    def spec(self, split: str) -> EpisodeSpec:
        """The values that determine the episodes of a split."""
        own = {name: getattr(self, name) for name in ("bank_sha256", "split_scheme", *_NUMBERS, "query_alpha")}
        return EpisodeSpec(split=split, quarter_turns=quarter_turns(self.rotations, split), **own)

    def split(self, name: str) -> ArchiveSplit:
        """One split.

        Raises:
            RequestError: the archive has no episodes of it.
        """
        if require_split(name) not in self.splits:
            raise RequestError(
                f"The archive has no episodes of split {name!r}; it has {', '.join(self.splits)}. Build one that "
                f"has {name} episodes: training validates on val, and evaluation uses test."
            )
        return self.splits[name]

    def with_digests(self, digests: Mapping[str, str]) -> Archive:
        """The archive with each shard's sha256, given by file name."""
        splits = {
            name: replace(split, shards=tuple(replace(shard, sha256=digests[shard.file]) for shard in split.shards))
            for name, split in self.splits.items()
        }
        images = tuple(replace(shard, sha256=digests[shard.file]) for shard in self.images)
        return replace(self, splits=splits, images=images)

    def shard(self, file: str) -> tuple[str, AnyShard]:
        """A shard by its file name, and its split; ``""`` if it holds images.

        Raises:
            KeyError: there is no such shard.
        """
        return self._shards[file]

    @cached_property
    def _shards(self) -> dict[str, tuple[str, AnyShard]]:
        images: dict[str, tuple[str, AnyShard]] = {shard.file: ("", shard) for shard in self.images}
        return images | {shard.file: (name, shard) for name in self.splits for shard in self.splits[name].shards}

    def without_digests(self) -> Archive:
        """The archive as planned before its shards were written: without their digests."""
        return self.with_digests(dict.fromkeys((shard.file for shard in self.shards()), ""))

    def shards(self) -> Iterator[AnyShard]:
        """All shards, in the order of work."""
        yield from self.images
        for split in self.splits.values():
            yield from split.shards

    def to_json(self) -> bytes:
        """The bytes of ``archive.json``: canonical JSON."""
        thin: dict[str, Any] = {}
        if self.thin:
            thin = {"images": [asdict(shard) for shard in self.images], "query_alpha": self.query_alpha}
        return canonical_json(
            {
                "format": THIN if self.thin else FORMAT,
                **{name: getattr(self, name) for name in (*_TEXTS, *_NUMBERS)},
                "image_shape": list(self.image_shape),
                "normalisation": self.normalization.to_json(),
                "splits": {name: _split_json(split, thin=self.thin) for name, split in self.splits.items()},
                **thin,
            }
        )


def _split_json(split: ArchiveSplit, *, thin: bool) -> dict[str, Any]:
    table = split.classes
    numbers = (getattr(table, name).tolist() for name in _OF_CLASS)
    rows = [dict(zip(("name", *_OF_CLASS), row, strict=True)) for row in zip(table.names, *numbers, strict=True)]
    if thin:  # the turns of a class are not listed, since they say nothing new
        own = [row for row in rows if not row.pop("quarter_turns")]
        return {"classes": own, "episodes": split.episodes}
    return {"classes": rows, "episodes": split.episodes, "shards": [asdict(shard) for shard in split.shards]}


def index_sum(digest: str) -> bytes:
    """The line of ``archive.json.sha256``, in the format of ``sha256sum``."""
    return f"{digest}  {INDEX}\n".encode("ascii")


def is_archive(path: Path) -> bool:
    """Whether ``path`` is a folder with a finished archive."""
    return (path / INDEX).is_file()


def read_archive(folder: Path) -> Archive:
    """Read and check ``archive.json``, without touching the shards.

    Raises:
        RequestError: the folder is not an archive, or is an unfinished one.
        DamagedError: ``archive.json`` is damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        raise RequestError(
            f"{folder} is an unfinished build. Run the same mamldata build again to finish it."
            if (folder / PLAN).is_file()
            else f"{folder} is not an archive: it has no {INDEX}. Make one with: mamldata build NAME --out DIR"
        )
    digest_file = folder / INDEX_SUM
    try:
        data = read_whole(path, MOST_INDEX_BYTES)
        declared = read_whole(digest_file, MOST_SUM_BYTES) if digest_file.is_file() else None
    except OSError as error:
        raise DamagedError(f"{error.filename} cannot be read ({error.strerror}). Copy it again.") from error
    return check_archive(data, declared, path)


def check_archive(data: bytes, declared: bytes | None, shown: Path | str) -> Archive:
    """The archive that ``archive.json`` describes, checked against ``archive.json.sha256``.

    Args:
        data: the bytes of ``archive.json``.
        declared: the bytes of ``archive.json.sha256``; None if it is missing.
        shown: the place of ``archive.json``, for the message.

    Raises:
        DamagedError: it is damaged.
    """
    try:
        archive = parse_archive(data)
    except DamagedError as error:
        raise DamagedError(f"{shown}: {error}") from error
    if declared is not None and declared != index_sum(archive.digest):
        raise DamagedError(
            f"{shown} is damaged: its sha256 is {archive.digest}, which is not what {INDEX_SUM} says. "
            "Copy both again, or delete the folder and build the archive again."
        )
    return archive


def parse_plan(data: bytes) -> Archive:
    """An archive whose shards have no digests yet, from the bytes of its ``to_json``."""
    return _from_json(parse_json(data, _MOST_VALUES))


def parse_archive(data: bytes) -> Archive:
    """The archive that ``archive.json`` describes.

    Raises:
        DamagedError: it is not canonical JSON of this format, or its numbers are inconsistent.
    """
    try:
        document = parse_json(data, _MOST_VALUES)
        declared = document["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"not the description of an archive ({error}).") from error
    if declared not in (FORMAT, THIN):
        known = f"{FORMAT!r} and {THIN!r}"
        raise DamagedError(f"its format is {quoted(declared)}; this version of mamldata reads {known}.")
    try:
        archive = _from_json(document)
        sound = archive.to_json() == data and _plain(archive) and _consistent(archive)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RequestError) as error:
        raise DamagedError(f"damaged ({ascii(str(error))[1:-1]:.{_MOST_SHOWN}}).") from error
    if not sound:
        raise DamagedError("damaged: it has changed since the archive was built.")
    return archive


def _from_json(document: dict[str, Any]) -> Archive:
    height, width, channels = document["image_shape"]
    thin = document["format"] == THIN
    return Archive(
        **{name: document[name] for name in (*_TEXTS, *_NUMBERS)},
        image_shape=(height, width, channels),
        normalization=Normalization(**{key: tuple(value) for key, value in document["normalisation"].items()}),
        # JSON sorts splits by name; SPLITS has the order of work. The caller notices a split of another name.
        splits={
            name: _split_from_json(
                document["splits"][name], turns=quarter_turns(document["rotations"], name) if thin else None
            )
            for name in SPLITS
            if name in document["splits"]
        },
        images=tuple(ImageShard(**shard) for shard in document["images"]) if thin else (),
        query_alpha=document["query_alpha"] if thin else None,
    )


def _split_from_json(document: dict[str, Any], *, turns: int | None) -> ArchiveSplit:
    """A split.

    Args:
        document: what ``archive.json`` says.
        turns: entries of the class table for each listed class; None: the list is the table.
    """
    classes = document["classes"]

    def column(key: str) -> npt.NDArray[np.int64]:
        return np.repeat(np.array([entry[key] for entry in classes], dtype=np.int64), turns or 1)

    quarter_turns = np.tile(np.arange(turns), len(classes)) if turns else column("quarter_turns")
    names = tuple(entry["name"] for entry in classes for _ in range(turns or 1))
    table = ClassTable(names, quarter_turns, column("first_row"), column("images"))
    shards = () if turns else tuple(Shard(**shard) for shard in document["shards"])
    return ArchiveSplit(table, document["episodes"], shards)


def _plain(archive: Archive) -> bool:
    """Whether every value has the type and range that a build writes: JSON's ``true`` and ``1.0`` are not 1."""
    splits = archive.splits.values()
    shards = list(archive.shards())
    first = [shard.first_row for shard in archive.images]
    first += [shard.first_episode for split in splits for shard in split.shards]
    names = [name for split in splits for name in split.classes.names]
    texts = (*(getattr(archive, name) for name in _TEXTS), *names)
    moments = (*archive.normalization.mean, *archive.normalization.std)
    digests = (archive.bank_sha256, *(shard.sha256 for shard in shards))
    counts = [archive.n_way, archive.k_shot, archive.k_query, *archive.image_shape]
    counts += [split.episodes for split in splits]
    numbers = [archive.seed, *counts, *first, *(value for shard in shards for value in (shard.count, shard.bytes))]
    numbers += [] if archive.query_alpha is None else [archive.query_alpha]
    return (
        all(type(text) is str for text in texts)
        and all(type(number) is int for number in numbers)
        and all(0 < count < MOST_EPISODES for count in counts)
        and all(shard.count > 0 for shard in shards)
        and all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in digests)
        and all(type(value) is float and 0 <= value <= 1 for value in moments)
        and all(archive.normalization.std)
        and {len(values) for values in archive.normalization} == {archive.image_shape[2]}
        and archive.rotations in ROTATIONS
        and len(archive.splits) > 0
    )


def _consistent(archive: Archive) -> bool:
    """Whether the shards cover all episodes, or the bank, without a gap, and have the lengths that they need."""
    rows = sum(shard.rows for shard in archive.images) if archive.thin else _MOST_ROWS
    if archive.thin and not _cover(archive.images, rows, archive.image_shape):
        return False
    for name, split in archive.splits.items():
        spec, table = archive.spec(name), split.classes  # raises for impossible episodes
        starts = [0, *np.cumsum([shard.episodes for shard in split.shards]).tolist()]
        expected = [
            (shard_file(name, number), first, stop - first, archive.layout.shard_bytes(stop - first))
            for number, (first, stop) in enumerate(pairwise(starts))
        ]
        found = [(shard.file, shard.first_episode, shard.episodes, shard.bytes) for shard in split.shards]
        turns = np.arange(len(table)) % spec.quarter_turns
        inside = (table.first_row >= 0) & (table.images > 0) & (table.images <= rows - table.first_row)
        if found != expected or starts[-1] != (0 if archive.thin else split.episodes):
            return False
        if not (inside.all() and np.array_equal(table.quarter_turns, turns)):
            return False
    return True


def _cover(shards: tuple[ImageShard, ...], rows: int, image_shape: Sequence[int]) -> bool:
    """Whether shards hold this many rows without a gap, all but the last one equally many."""
    per_shard = shards[0].rows
    if rows > _MOST_ROWS or math.ceil(rows / per_shard) != len(shards):
        return False
    return tuple(replace(shard, sha256="") for shard in shards) == image_shards(rows, per_shard, image_shape)


def image_shards(rows: int, per_shard: int, image_shape: Sequence[int]) -> tuple[ImageShard, ...]:
    """The shards of a bank, still without digests.

    Args:
        rows: images in the bank.
        per_shard: images in each shard but the last one.
        image_shape: ``(H, W, C)``.
    """
    return tuple(
        ImageShard(image_shard_file(number), first, count, npy_bytes("|u1", (count, *image_shape)), "")
        for number, (first, count) in enumerate(shard_sizes(rows, per_shard))
    )


def shard_file(split: str, number: int) -> str:
    """The file name of a split's shard, such as ``train-00000.tar``."""
    return f"{split}-{number:05d}.tar"


def image_shard_file(number: int) -> str:
    """The file name of a thin archive's shard, such as ``images-00000.npy``."""
    return f"images-{number:05d}.npy"


def shard_sizes(count: int, per_shard: int) -> Iterator[tuple[int, int]]:
    """First episode, or row, and number of them in each shard."""
    for first in range(0, count, per_shard):
        yield first, min(per_shard, count - first)
