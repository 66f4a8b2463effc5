"""``archive.json``, format ``mamldata/1``: what an archive is. ``docs/format.md`` describes it byte by byte."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
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
from mamldata.sampling.normalization import Normalization
from mamldata.sampling.sampler import ROTATIONS, ClassTable, EpisodeSpec, quarter_turns
from mamldata.sampling.splits import SPLITS, require_split
from mamldata.words import quoted

FORMAT = "mamldata/1"
INDEX = "archive.json"
BUILD = ".build"  # the folder of what only an unfinished build needs
PLAN = f"{BUILD}/plan.json"
INDEX_SUM = "archive.json.sha256"
MOST_INDEX_BYTES = 1 << 28  # of archive.json: enough for 10**6 classes with names of 200 characters
MOST_SUM_BYTES = 1 << 10
_MOST_VALUES = 1 << 23  # in archive.json: 10**6 classes have 5 million; the rest is for commas in their names
_MOST_ROWS = 2**31  # source.npy is int32
_MOST_SHOWN = 200  # characters of a file's own words in a message


@dataclass(frozen=True)
class Shard:
    """One tar of an archive: its file name, episodes, length in bytes and digest."""

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
        normalization: mean and deviation of all images of the train split's classes.
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
    normalization: Normalization
    splits: Mapping[str, ArchiveSplit]

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
        return replace(self, splits=splits)

    def without_digests(self) -> Archive:
        """The archive as planned before its shards were written: without their digests."""
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
                "normalisation": {key: list(value) for key, value in self.normalization._asdict().items()},
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
    if declared != FORMAT:
        raise DamagedError(f"its format is {quoted(declared)}; this version of mamldata reads {FORMAT!r}.")
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
        normalization=Normalization(**{key: tuple(value) for key, value in document["normalisation"].items()}),
        # JSON sorts splits by name; SPLITS has the order of work. The caller notices a split of another name.
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
    """Whether every value has the type and range that a build writes: JSON's ``true`` and ``1.0`` are not 1."""
    splits = archive.splits.values()
    shards = [shard for split in splits for shard in split.shards]
    names = [name for split in splits for name in split.classes.names]
    texts = (archive.dataset, archive.dataset_version, archive.bank_sha256, archive.split_scheme, *names)
    moments = (*archive.normalization.mean, *archive.normalization.std)
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
        and all(archive.normalization.std)
        and {len(values) for values in archive.normalization} == {archive.image_shape[2]}
        and archive.rotations in ROTATIONS
        and len(archive.splits) > 0
    )


def _consistent(archive: Archive) -> bool:
    """Whether the shards cover all episodes without a gap, and have the lengths that their episodes need."""
    for name, split in archive.splits.items():
        spec, table = archive.spec(name), split.classes  # raises for impossible episodes
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
