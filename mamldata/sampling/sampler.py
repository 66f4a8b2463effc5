"""Episodes: which classes and images make up episode i. A pure function of numbers, vectorised over episodes.

The algorithm is described in ``docs/format.md``, so that anyone can reimplement it, and pinned by golden digests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mamldata.errors import RequestError
from mamldata.io.digest import canonical_json, sha256_bytes
from mamldata.words import counted

ROTATIONS = ("all", "train", "none")  # splits in which the rotations of a class are classes too
QUARTER_TURNS = 4  # of a class, with rotations
LEAST = {"n_way": 2, "k_shot": 1, "k_query": 1}  # of an episode
_MOST_POOL = 1 << 21  # numbers in a shuffled pool: bounds memory, and stays near the processor's cache
_MOST_ALPHA = 1000
_COUNTERS = 1 << 256  # of Philox, after which they begin again

Source = npt.NDArray[np.int32]
Images = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]


class Draws(NamedTuple):
    """Drawn episodes.

    Attributes:
        classes: indices into the class table, int32 ``[B, n_way]``.
        images: places among the images of the class, int32 ``[B, n_way, k_shot + k_query]``, support first. With
            unequal queries there are more, of which only the first ``k_shot + queries`` of a way belong to it.
        queries: with unequal queries their numbers, int32 ``[B, n_way]``, with the sum ``n_way * k_query``; else None.
    """

    classes: npt.NDArray[np.int32]
    images: npt.NDArray[np.int32]
    queries: npt.NDArray[np.int32] | None = None


def quarter_turns(rotations: str, split: str) -> int:
    """How many classes each class of a split becomes: 4 with rotations, else 1."""
    return QUARTER_TURNS if rotations == "all" or (rotations == "train" and split == "train") else 1


@dataclass(frozen=True)
class EpisodeSpec:
    """Everything that an episode depends on except its index.

    Attributes:
        bank_sha256: the digest of the bank that rows refer to.
        split_scheme, split: which classes may appear.
        n_way, k_shot, k_query: classes; support and query images per class.
        quarter_turns: 4 if each class turned by 90, 180 and 270 degrees gives three more classes, else 1.
        seed: an integer, at least 0.
        query_alpha: None: every class has ``k_query`` query images. A whole number: the ``n_way * k_query`` query
            images are shared out among the classes by a Dirichlet distribution with all parameters equal to it, as in
            Veilleux et al. 2021, "Realistic evaluation of transductive few-shot learning", where it is 2.
    """

    bank_sha256: str
    split_scheme: str
    split: str
    n_way: int
    k_shot: int
    k_query: int
    quarter_turns: int
    seed: int
    query_alpha: int | None = None

    def __post_init__(self) -> None:
        for name, least in {**LEAST, "seed": 0}.items():
            if getattr(self, name) < least:
                raise RequestError(f"{name} must be at least {least}, not {getattr(self, name)}.")
        if self.query_alpha is not None and not 1 <= self.query_alpha <= _MOST_ALPHA:
            raise RequestError(f"query_alpha must be a whole number from 1 to {_MOST_ALPHA}, not {self.query_alpha}.")

    @property
    def key(self) -> tuple[int, int]:
        """The generator's key: the first 16 bytes of the SHA-256 of this tuple, as two little-endian numbers."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        digest = bytes.fromhex(sha256_bytes(canonical_json(values)))
        return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


@dataclass(frozen=True, eq=False)  # comparing arrays gives no single bool
class ClassTable:
    """The classes that the episodes of one split are drawn from, turned ones included.

    Attributes:
        names: the class of each entry; the four turns of a class are adjacent.
        quarter_turns: counter-clockwise quarter turns, int64 ``[classes]``.
        first_row: the first image's row in the bank, int64 ``[classes]``.
        images: the number of images, int64 ``[classes]``.
    """

    names: tuple[str, ...]
    quarter_turns: npt.NDArray[np.int64]
    first_row: npt.NDArray[np.int64]
    images: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"<ClassTable: {len(self):,} classes>"

    def label(self, index: int) -> str:
        """A readable class name, such as ``Greek/character03, turned 90``."""
        turns = int(self.quarter_turns[index])
        return self.names[index] + (f", turned {90 * turns}" if turns else "")


def class_table(
    class_names: Sequence[str], class_offsets: Sequence[int], members: Sequence[int], quarter_turns: int
) -> ClassTable:
    """The class table of a split.

    Args:
        class_names, class_offsets: of the bank.
        members: the split's classes, as positions in ``class_names``.
        quarter_turns: 1 or 4 classes for each of them.
    """
    offsets = np.asarray(class_offsets, dtype=np.int64)
    positions = np.repeat(np.asarray(members, dtype=np.int64), quarter_turns)
    return ClassTable(
        names=tuple(class_names[position] for position in positions.tolist()),
        quarter_turns=np.tile(np.arange(quarter_turns, dtype=np.int64), len(members)),
        first_row=offsets[positions],
        images=(offsets[1:] - offsets[:-1])[positions],
    )


class EpisodeSampler:
    """Draws the episodes of one split.

    Raises:
        RequestError: there are more ways than classes, or a class has fewer images than ``k_shot + k_query``.
    """

    def __init__(self, spec: EpisodeSpec, table: ClassTable) -> None:
        self.spec = spec
        self.table = table
        _refuse_the_impossible(spec, table)
        # How many numbers each part of an episode takes: for the classes, the shares of queries, and a way's images.
        self._of_shares = 0 if spec.query_alpha is None else spec.n_way * spec.query_alpha - 1
        self._of_way = spec.k_shot + spec.k_query * (1 if spec.query_alpha is None else spec.n_way)
        self.width = min(self._of_way, int(table.images.max()))  # of ``Draws.images``
        draws = spec.n_way + self._of_shares + spec.n_way * self._of_way
        self._blocks = math.ceil(draws / 4)  # Philox yields four numbers per counter value
        self._key = np.array(spec.key, dtype=np.uint64)

    def draw(self, index: Indices) -> Draws:
        """Episodes by their indices, int64 ``[B]``, in any order."""
        widest = max(len(self.table), self.spec.n_way * int(self.table.images.max()))
        step = max(1, _MOST_POOL // widest)
        n_way, of_images = self.spec.n_way, self.spec.n_way + self._of_shares
        classes = np.empty((len(index), n_way), dtype=np.int32)
        queries = None if self.spec.query_alpha is None else np.empty_like(classes)
        images = np.empty((*classes.shape, self.width), dtype=np.int32)
        for start in range(0, len(index), step):
            some = slice(start, start + step)
            raw = self._raw(index[some])
            classes[some] = _draw(raw[:, :n_way], np.full(len(raw), len(self.table)))
            sizes = self.table.images[classes[some]]
            if queries is not None:
                queries[some] = _share_out(self.spec, raw[:, n_way:of_images], sizes - self.spec.k_shot)
            image_raw = raw[:, of_images : of_images + n_way * self._of_way].reshape(-1, self._of_way)
            images[some] = _draw(image_raw[:, : self.width], sizes.reshape(-1)).reshape(len(raw), n_way, -1)
        return Draws(classes, images, queries)

    def sample(self, first: int, count: int) -> Source:
        """Episodes ``first`` to ``first + count - 1``.

        Returns:
            int32 ``[count, n_way, 1 + k_shot + k_query]``: the class (index into the table), then the images' rows
            in the bank, support first.

        Raises:
            RequestError: the episodes have unequal queries, which do not fit into this array.
        """
        if self.spec.query_alpha is not None:
            raise RequestError("Episodes with unequal numbers of queries are drawn when they are read, not stored.")
        classes, images, _ = self.draw(np.arange(first, first + count))
        rows = self.table.first_row.astype(np.int32)[classes, None] + images
        return np.concatenate([classes[..., None], rows], axis=2)

    def _raw(self, index: Indices) -> npt.NDArray[np.uint64]:
        """The random numbers of episodes: uint64 ``[B, 4 * blocks]``."""
        raw = np.empty((len(index), 4 * self._blocks), dtype=np.uint64)
        generator, position = np.random.Philox(key=self._key), 0  # one for all: it is moved faster than made
        starts = [0, *(np.flatnonzero(np.diff(index) != 1) + 1).tolist()]
        for start, stop in zip(starts, [*starts[1:], len(index)], strict=True):
            if start == stop:
                break  # no episodes at all
            counter = int(index[start]) * self._blocks
            generator.advance((counter - position) % _COUNTERS)
            raw[start:stop] = generator.random_raw(raw[start:stop].size).reshape(stop - start, -1)
            position = counter + (stop - start) * self._blocks
        return raw


def _draw(raw: npt.NDArray[np.uint64], sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Draw without replacement in each row: the first steps of a Fisher-Yates shuffle of ``range(sizes[row])``.

    Args:
        raw: uint64 ``[rows, draws]``, uniform; draw j of a row takes ``j + raw % (size - j)``, whose bias is below
            size / 2**64.
        sizes: int64 ``[rows]``, the largest at least ``draws``.

    Returns:
        int64 ``[rows, draws]``; the first ``size`` of each row are distinct, others mean nothing.
    """
    width = int(sizes.max(initial=0))
    if len(raw) * width > _MOST_POOL:
        return _draw_from_many(raw, sizes)
    pool = np.tile(np.arange(width, dtype=np.int32), len(raw))
    place = np.arange(0, len(pool), max(width, 1))  # of draw j in each row's part of the pool
    drawn = np.empty(raw.shape, dtype=np.int64)
    for j in range(raw.shape[1]):
        pick = place + (raw[:, j] % np.maximum(sizes - j, 1).astype(np.uint64)).astype(np.int64)
        drawn[:, j] = pool[pick]
        pool[pick] = pool[place]
        place += 1
    return drawn


def _draw_from_many(raw: npt.NDArray[np.uint64], sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """As ``_draw``, in memory that does not grow with the sizes, which a forged archive may claim as it likes.

    Only the places of the shuffled ranges that have changed are kept: step i put ``moved[:, i]`` into ``picks[:, i]``.
    """
    picks, moved, drawn = (np.empty(raw.shape, dtype=np.int64) for _ in range(3))

    def content(places: npt.NDArray[np.int64], steps: int) -> npt.NDArray[np.int64]:
        """What stands in a place of each row after some steps."""
        found = places.copy()
        for i in range(steps):
            np.copyto(found, moved[:, i], where=picks[:, i] == places)
        return found

    for j in range(raw.shape[1]):
        picks[:, j] = j + (raw[:, j] % np.maximum(sizes - j, 1).astype(np.uint64)).astype(np.int64)
        drawn[:, j] = content(picks[:, j], j)
        moved[:, j] = content(np.full(len(raw), j), j)
    return drawn


def _share_out(spec: EpisodeSpec, raw: npt.NDArray[np.uint64], room: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Share out the query images of episodes among their ways by a Dirichlet distribution, in whole numbers.

    The parts into which ``n * a - 1`` uniform points cut a line, each ``a`` of them taken together, have a Dirichlet
    distribution with ``n`` parameters ``a``. Whole numbers are the same on every machine.

    Args:
        spec: with ``query_alpha``, which is ``a``.
        raw: the points, uint64 ``[B, n_way * query_alpha - 1]``.
        room: images that a way's class has besides its support, int64 ``[B, n_way]``. What a way has no room for goes
            to the ways with the least room left, the first of equals first.

    Returns:
        int64 ``[B, n_way]``, with the sum ``n_way * k_query``.
    """
    total, of_way = spec.n_way * spec.k_query, spec.query_alpha or 1
    cuts = np.sort(raw >> np.uint64(32), axis=1)[:, of_way - 1 :: of_way].astype(np.int64)
    ends = np.full((len(raw), spec.n_way + 1), total)
    ends[:, 0], ends[:, 1:-1] = 0, (cuts * total + (1 << 31)) >> 32  # rounded to the nearest
    shares = np.minimum(np.diff(ends, axis=1), room)
    spare = room - shares
    fullest = np.argsort(spare, axis=1, kind="stable")
    room_left = np.take_along_axis(spare, fullest, axis=1)
    before = np.cumsum(room_left, axis=1) - room_left
    more = np.clip(total - shares.sum(axis=1, keepdims=True) - before, 0, room_left)
    np.put_along_axis(spare, fullest, more, axis=1)
    found: npt.NDArray[np.int64] = shares + spare
    return found


def _refuse_the_impossible(spec: EpisodeSpec, table: ClassTable) -> None:
    place = f"split {spec.split!r} of split scheme {spec.split_scheme!r}"
    if not len(table):
        raise RequestError(f"{place} has no classes. Request no episodes of it, or put classes into it.")
    if spec.n_way > len(table):
        raise RequestError(
            f"{place} has {counted(len(table), 'class', 'classes')}, but n_way is {spec.n_way}. "
            f"Lower n_way, or use a split scheme that gives {spec.split} more classes."
        )
    need = spec.k_shot + spec.k_query
    short = np.flatnonzero(table.images < need)
    if len(short):
        others = f" (and {len(short) - 1} more)" if len(short) > 1 else ""
        raise RequestError(
            f"{place}, class {table.names[short[0]]!r}{others}: it has {counted(table.images[short[0]], 'image')}, but "
            f"k_shot + k_query = {spec.k_shot} + {spec.k_query} = {need}. "
            "Lower k_shot or k_query; of a folder of images, min_images leaves out small classes."
        )


def gather(images: Images, table: ClassTable, source: Source, k_shot: int, support: Images, query: Images) -> None:
    """Copy the pixels of episodes from the bank, each class turned as the table says.

    Args:
        images: the bank, uint8 ``[rows, H, W, C]``.
        table: the split's classes.
        source: int32 ``[episodes, n_way, 1 + k_shot + k_query]`` from the sampler.
        k_shot: support images per class.
        support: filled, uint8 ``[episodes, n_way, k_shot, H, W, C]``.
        query: filled, uint8 ``[episodes, n_way, k_query, H, W, C]``.
    """
    rows = source[..., 1:]
    support[...] = images[rows[..., :k_shot]]
    query[...] = images[rows[..., k_shot:]]
    turns = table.quarter_turns[source[..., 0]]
    for part in (support, query):
        turn(part, turns)


def turn(images: Images, quarter_turns: Indices) -> None:
    """Turn images in place, counter-clockwise.

    Args:
        images: square, uint8 ``[..., H, W, C]``.
        quarter_turns: int64, of the shape of the first dimensions of ``images``.
    """
    for turns in range(1, QUARTER_TURNS):
        if (some := quarter_turns == turns).any():
            # Turned through a copy: the source and the target are the same memory.
            images[some] = np.rot90(images[some], turns, axes=(-3, -2))
