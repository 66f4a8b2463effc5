"""Remix: recombine the ways of stored episodes into other episodes for an epoch. A pure function of numbers.

A way is a class with its support and query images, as stored in an episode. Way ``w`` is place ``w % n_way`` of episode
``w // n_way``. Remixing makes training on a small archive more like training on endless fresh episodes.
"""

from __future__ import annotations

from bisect import bisect, bisect_left

import numpy as np
import numpy.typing as npt

from mamldata.errors import DamagedError
from mamldata.sampling.order import Indices, permute

Classes = npt.NDArray[np.int32]

_STEPS = 32  # episodes that are searched before a list is built


def remix(classes: Classes, seed: int, epoch: int) -> Indices:
    """The episodes of an epoch: a permutation of all ways, cut into episodes, none with a class twice.

    A pure function of its arguments. The permutation alone would put a class twice into some episodes; ``_part_twins``
    repairs these by exchanging ways. Every way is in exactly one episode.

    Args:
        classes: int32 ``[episodes, n_way]``, as stored; no class twice in an episode.
        seed, epoch: of the permutation.

    Returns:
        Ways: int64 ``[episodes, n_way]``, read-only.

    Raises:
        DamagedError: a stored episode has a class twice, which can make remixing impossible.
    """
    if len(twins := _twins(classes)):
        raise DamagedError(
            f"Episode {twins[0] // classes.shape[1]} of the train split holds a class twice: the archive was "
            "not made by mamldata build. Check it with: mamldata verify ARCHIVE"
        )
    ways = permute(seed, epoch, classes.size, "remix").reshape(classes.shape)
    _part_twins(ways, classes.reshape(-1)[ways])
    ways.flags.writeable = False
    return ways


def _part_twins(ways: Indices, classes: Classes) -> None:
    """Exchange ways until no episode has a class twice. Works in place on both arrays, ``[episodes, n_way]``.

    A twin is a way whose class occurs before it in its episode. The twins are taken in order of their positions. A twin
    at position p, of class a, is exchanged with the first way after it, wrapping around at the end, that is in an
    episode without a and is either a twin itself or of a class that p's episode lacks. Each exchange reduces the number
    of twins by at least one.

    The first episode without a after p's always has such a way: if it has no twin, it has n_way classes other than a,
    of which p's episode has at most n_way - 2. And an episode without a always exists: no stored episode had a class
    twice, so a is in at most as many ways as there are episodes, and p's episode has two of them. The work is to find
    that episode: a step or two if there are many more classes than ways; otherwise a list of the episodes without a
    class is kept. In all there are at most ``episodes * n_way`` exchanges, each with a search in a sorted list.
    """
    lacking = _Lacking(classes)
    # Repeat, because an exchange with a twin may create one in the other episode.
    while len(twins := _twins(classes)):
        for episode, place in zip(*(part.tolist() for part in np.divmod(twins, classes.shape[1])), strict=True):
            own = lacking.row(episode)
            twin = own[place]
            if twin not in own[:place]:
                continue  # no longer a twin after an earlier exchange
            found = lacking.after(episode, twin)
            other = lacking.row(found)
            there = next(q for q, class_ in enumerate(other) if class_ not in own or class_ in other[:q])
            for array in (ways, classes):
                array[episode, place], array[found, there] = array[found, there], array[episode, place]
            own[place], other[there] = other[there], twin
            lacking.exchanged(episode, found, own[place], twin)


class _Lacking:
    """Finds episodes that lack a class; keeps lists of them for classes that few episodes lack.

    Args:
        classes: int32 ``[episodes, n_way]``; the caller keeps it and the lists from ``row`` up to date.
    """

    def __init__(self, classes: Classes) -> None:
        self.classes = classes
        self._rows: dict[int, list[int]] = {}
        self._lists: dict[int, list[int]] = {}

    def row(self, episode: int) -> list[int]:
        """The classes of an episode."""
        if (found := self._rows.get(episode)) is None:
            found = self._rows[episode] = self.classes[episode].tolist()
        return found

    def after(self, episode: int, class_: int) -> int:
        """The first episode after this one, wrapping around at the end, that lacks a class; one must exist."""
        if class_ not in self._lists:
            for number in range(episode + 1, episode + min(_STEPS, len(self.classes))):
                if class_ not in self.row(number % len(self.classes)):
                    return number % len(self.classes)
            self._lists[class_] = np.flatnonzero((self.classes != class_).all(axis=1)).tolist()
        listed = self._lists[class_]
        return listed[bisect(listed, episode) % len(listed)]

    def exchanged(self, one: int, other: int, *classes: int) -> None:
        """Update the lists after two episodes have exchanged ways of these classes."""
        for class_ in self._lists.keys() & set(classes):
            listed = self._lists[class_]
            for episode in (one, other):
                at = bisect_left(listed, episode)
                known, lacks = listed[at : at + 1] == [episode], class_ not in self.row(episode)
                if known and not lacks:
                    del listed[at]
                elif lacks and not known:
                    listed.insert(at, episode)


def _twins(classes: Classes) -> Indices:
    """The positions, in flattened ``classes``, of all ways whose class occurs before them in their episode."""
    ranked = np.sort(classes, axis=1)
    suspects = np.flatnonzero((ranked[:, 1:] == ranked[:, :-1]).any(axis=1))
    order = np.argsort(classes[suspects], axis=1, kind="stable")  # the first of equals stays the first
    ranked = ranked[suspects]
    found, later = np.nonzero(ranked[:, 1:] == ranked[:, :-1])
    positions: Indices = np.sort(suspects[found] * classes.shape[1] + order[found, later + 1])
    return positions
