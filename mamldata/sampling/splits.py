"""Split schemes: which classes belong to train, val and test."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mamldata.errors import RequestError, did_you_mean
from mamldata.words import counted

SPLITS = ("train", "val", "test")

Division = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class SplitScheme:
    """One way of dividing a dataset's classes into train, val and test.

    Attributes:
        name, description: shown beside every result, because accuracies of different schemes do not compare.
        lists: for each split its class names, or ``prefix/*`` for all classes below a prefix; empty if seeded. A split
            may have none.
        counts: for each split its number of classes, which may be 0, if seeded.
        seed: of the division, if seeded.
        by_files: whether the raw files give the splits, as split files or as a folder for each split.
    """

    name: str
    description: str
    lists: Mapping[str, tuple[str, ...]]
    counts: Mapping[str, int]
    seed: int = 0
    by_files: bool = False


def require_split(name: str) -> str:
    """``name``, if it is that of a split.

    Raises:
        RequestError: it is not.
    """
    if name not in SPLITS:
        known = ", ".join(SPLITS)
        raise RequestError(f"There is no split {name!r}; the splits are {known}.{did_you_mean(str(name), SPLITS)}")
    return name


def divide(scheme: SplitScheme, class_names: Sequence[str], dataset: str, class_splits: Sequence[str] = ()) -> Division:
    """The classes of each split, as positions in ``class_names``, in canonical order.

    Args:
        scheme: lists of classes, or counts and a seed.
        class_names: all classes of the bank, in canonical order.
        dataset: for messages.
        class_splits: the split of each class, if the raw files give it.

    Returns:
        For each of train, val and test a sorted tuple; no class is in two of them.

    Raises:
        RequestError: a listed class does not exist, a class is in two splits, or the counts exceed the classes.
    """
    if scheme.by_files:
        return {split: tuple(c for c, home in enumerate(class_splits) if home == split) for split in SPLITS}
    if scheme.counts:
        return _seeded(scheme, class_names, dataset)
    return _listed(scheme, class_names, dataset)


def _seeded(scheme: SplitScheme, class_names: Sequence[str], dataset: str) -> Division:
    """Order the classes by sha256 of ``seed NUL name`` and cut: train first, then val, then test.

    The order depends only on the seed and the names, so any language can reproduce it in one line.
    """
    wanted = sum(scheme.counts.values())
    if wanted > len(class_names):
        raise RequestError(
            f"{dataset}, split scheme {scheme.name!r} needs {counted(wanted, 'class', 'classes')}; the bank has "
            f"{len(class_names)}. Lower the counts in the manifest."
        )
    shuffled = sorted(range(len(class_names)), key=lambda c: division_key(scheme.seed, class_names[c]))
    division, start = {}, 0
    for split in SPLITS:
        stop = start + scheme.counts[split]
        division[split] = tuple(sorted(shuffled[start:stop]))
        start = stop
    return division


def division_key(seed: int, class_name: str) -> bytes:
    """The sort key of a seeded division: SHA-256 of the seed in decimal, a NUL, and the class name in UTF-8."""
    return hashlib.sha256(f"{seed}\0{class_name}".encode()).digest()


def _listed(scheme: SplitScheme, class_names: Sequence[str], dataset: str) -> Division:
    place = f"{dataset}, split scheme {scheme.name!r}"
    division = {
        split: tuple(sorted(_resolve(scheme.lists[split], class_names, f"{place}, split {split!r}")))
        for split in SPLITS
    }
    owner: dict[int, str] = {}
    for split, classes in division.items():
        for position in classes:
            if position in owner:
                raise RequestError(
                    f"{place}: the class {class_names[position]!r} is in both {owner[position]!r} and {split!r}. "
                    "Take it out of one of them."
                )
            owner[position] = split
    return division


def _resolve(entries: Sequence[str], class_names: Sequence[str], place: str) -> set[int]:
    exact = {name: position for position, name in enumerate(class_names)}
    found: set[int] = set()
    for entry in entries:
        if entry.endswith("/*"):
            prefix = entry[:-1]
            matches = {position for name, position in exact.items() if name.startswith(prefix)}
        else:
            matches = {exact[entry]} if entry in exact else set()
        if not matches:
            raise RequestError(f"{place}: there is no class {entry!r}.{did_you_mean(entry, class_names)}")
        found |= matches
    return found
