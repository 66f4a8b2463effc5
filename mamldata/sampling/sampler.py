"""Episodes: which classes and images make up episode i. A pure function of numbers, vectorised over episodes.

The algorithm is described in ``docs/format.md``, so that anyone can reimplement it, and pinned by golden digests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from mamldata.errors import RequestError
from mamldata.io.digest import canonical_json, sha256_bytes
from mamldata.words import counted

ROTATIONS = ("all", "train", "none")  # splits in which the rotations of a class are classes too
QUARTER_TURNS = 4  # of a class, with rotations
_MOST_POOL = 1 << 21  # numbers in a shuffled pool: bounds memory, and stays near the processor's cache

Source = npt.NDArray[np.int32]
Images = npt.NDArray[np.uint8]


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
    """

    bank_sha256: str
    split_scheme: str
    split: str
    n_way: int
    k_shot: int
    k_query: int
    quarter_turns: int
    seed: int

    def __post_init__(self) -> None:
        for name, least in (("n_way", 2), ("k_shot", 1), ("k_query", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} must be at least {least}, not {getattr(self, name)}.")

    @property
    def key(self) -> tuple[int, int]:
        """The generator's key: the first 16 bytes of the SHA-256 of this tuple, as two little-endian numbers."""
        digest = bytes.fromhex(sha256_bytes(canonical_json(asdict(self))))
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
        self._per_class = spec.k_shot + spec.k_query
        _refuse_the_impossible(spec, table)
        draws = spec.n_way * (1 + self._per_class)
        self._blocks = math.ceil(draws / 4)  # Philox yields four numbers per counter value
        self._key = np.array(spec.key, dtype=np.uint64)

    def sample(self, first: int, count: int) -> Source:
        """Episodes ``first`` to ``first + count - 1``.

        Returns:
            int32 ``[count, n_way, 1 + k_shot + k_query]``: the class (index into the table), then the images' rows
            in the bank, support first.
        """
        widest = max(len(self.table), self.spec.n_way * int(self.table.images.max()))
        step = max(1, _MOST_POOL // widest)
        source = np.empty((count, self.spec.n_way, 1 + self._per_class), dtype=np.int32)
        for start in range(0, count, step):
            stop = min(start + step, count)
            source[start:stop] = self._sample(first + start, stop - start)
        return source

    def _sample(self, first: int, count: int) -> npt.NDArray[np.int64]:
        n_way, per_class = self.spec.n_way, self._per_class
        generator = np.random.Philox(key=self._key, counter=first * self._blocks)
        raw = generator.random_raw(count * self._blocks * 4).reshape(count, -1)
        everyone = np.full(count, len(self.table))
        classes = _draw(raw[:, :n_way], everyone)
        image_raw = raw[:, n_way : n_way * (1 + per_class)].reshape(count * n_way, per_class)
        flat = classes.reshape(-1)
        rows = self.table.first_row[flat, None] + _draw(image_raw, self.table.images[flat])
        return np.concatenate([classes[..., None], rows.reshape(count, n_way, per_class)], axis=2)


def _draw(raw: npt.NDArray[np.uint64], sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Draw without replacement in each row: the first steps of a Fisher-Yates shuffle of ``range(sizes[row])``.

    Args:
        raw: uint64 ``[rows, draws]``, uniform; draw j of a row takes ``j + raw % (size - j)``, whose bias is below
            size / 2**64.
        sizes: int64 ``[rows]``, each at least ``draws``.

    Returns:
        int64 ``[rows, draws]``, distinct in each row.
    """
    rows = np.arange(len(raw))
    pool = np.tile(np.arange(int(sizes.max()), dtype=np.int32), (len(raw), 1))
    drawn = np.empty(raw.shape, dtype=np.int64)
    for j in range(raw.shape[1]):
        pick = j + (raw[:, j] % (sizes - j).astype(np.uint64)).astype(np.int64)
        drawn[:, j] = pool[rows, pick]
        pool[rows, pick] = pool[:, j]
    return drawn


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
            f"k_shot + k_query = {spec.k_shot} + {spec.k_query} = {need}. Lower k_shot or k_query."
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
    for turn in range(1, QUARTER_TURNS):
        turned = turns == turn
        if turned.any():
            for part in (support, query):
                # Turned through a copy: the source and the target are the same memory.
                part[turned] = np.rot90(part[turned], turn, axes=(2, 3))
