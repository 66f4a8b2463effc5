"""Remix: an epoch of training may join the ways of stored episodes to other episodes. A pure function of numbers.

A way is a class with its support and its query images, as it stands in a stored episode. Way ``w`` is place
``w % n_way`` of episode ``w // n_way``. A small archive trains more like endless fresh episodes in this manner.
"""

from __future__ import annotations

from bisect import bisect, bisect_left

import numpy as np
import numpy.typing as npt

from mamldata.errors import DamagedError
from mamldata.sampling.order import Indices, permute

Classes = npt.NDArray[np.int32]

_STEPS = 32  # episodes that are looked at before a list is made


def remix(classes: Classes, seed: int, epoch: int) -> Indices:
    """The episodes of an epoch: a permutation of all ways, cut into episodes, with no class twice in any.

    A pure function of its arguments. The permutation alone would put a class twice into some episodes; those are
    mended by ``_part_twins``, which exchanges ways and loses none. Every way is in exactly one episode.

    Args:
        classes: int32 ``[episodes, n_way]``, as stored; no class twice in an episode.
        seed, epoch: of the permutation.

    Returns:
        Ways: int64 ``[episodes, n_way]``, read-only.

    Raises:
        DamagedError: a stored episode has a class twice, which can leave no way to mix them.
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

    A twin is a way whose class stands before it in its episode. The twins are taken in order of their positions; a
    twin at position p, of class a, changes places with the first way after it, going round at the end, that is in an
    episode without a, and that is a twin itself, or of a class which p's episode lacks. Each exchange makes the number
    of twins smaller by at least one.

    The first episode after p's without a always has such a way: if it has no twin, it has n_way classes other than a,
    and p's episode has at most n_way - 2 such. And there always is an episode without a: no stored episode had a class
    twice, so a is in at most as many ways as there are episodes, and p's has two of them. So the work is to find that
    episode: a step or two where there are many more classes than ways; where there are not, a list of the episodes
    without a class is kept. All in all at most ``episodes * n_way`` exchanges, each a search in a sorted list.
    """
    lacking = _Lacking(classes)
    # Once more, because an exchange with a twin may leave one where there was none.
    while len(twins := _twins(classes)):
        for episode, place in zip(*(part.tolist() for part in np.divmod(twins, classes.shape[1])), strict=True):
            own = lacking.row(episode)
            twin = own[place]
            if twin not in own[:place]:
                continue  # an earlier exchange has parted it
            found = lacking.after(episode, twin)
            other = lacking.row(found)
            there = next(q for q, class_ in enumerate(other) if class_ not in own or class_ in other[:q])
            for array in (ways, classes):
                array[episode, place], array[found, there] = array[found, there], array[episode, place]
            own[place], other[there] = other[there], twin
            lacking.exchanged(episode, found, own[place], twin)


class _Lacking:
    """Finds episodes that lack a class; of the classes that few episodes lack, it keeps lists of them.

    Args:
        classes: int32 ``[episodes, n_way]``, which the caller keeps up to date, as well as what ``row`` gives.
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
        """The first episode after this one, going round at the end, that lacks a class; there must be one."""
        if class_ not in self._lists:
            for number in range(episode + 1, episode + min(_STEPS, len(self.classes))):
                if class_ not in self.row(number % len(self.classes)):
                    return number % len(self.classes)
            self._lists[class_] = np.flatnonzero((self.classes != class_).all(axis=1)).tolist()
        listed = self._lists[class_]
        return listed[bisect(listed, episode) % len(listed)]

    def exchanged(self, one: int, other: int, *classes: int) -> None:
        """Mend the lists after two episodes have exchanged ways of these classes."""
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
    """The positions, in ``classes`` laid flat, of all ways whose class stands before them in their episode."""
    ranked = np.sort(classes, axis=1)
    suspects = np.flatnonzero((ranked[:, 1:] == ranked[:, :-1]).any(axis=1))
    order = np.argsort(classes[suspects], axis=1, kind="stable")  # the first of equals stays the first
    ranked = ranked[suspects]
    found, later = np.nonzero(ranked[:, 1:] == ranked[:, :-1])
    positions: Indices = np.sort(suspects[found] * classes.shape[1] + order[found, later + 1])
    return positions
