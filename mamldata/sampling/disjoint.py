"""Episodes of one split that share no image: as many as its images allow, a pure function of the seed."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

from mamldata.errors import RequestError
from mamldata.sampling.sampler import ClassTable, Draws, EpisodeSampler, EpisodeSpec, Indices

_COUNTER = 1 << 192  # of Philox, from where no ``EpisodeSampler`` takes numbers


class DisjointSampler(EpisodeSampler):
    """Draws episodes without replacement of images, so that an episode tells nothing about the images of another one.

    The images of each class, shuffled, are divided into portions of ``k_shot + k_query``. Each episode takes a portion
    of ``n_way`` classes, drawn in proportion to the portions that they have left; classes with a portion for each
    of the remaining episodes go first, which gives as many episodes as possible. A class and its turned
    images are one class here, because they are the same images: each time it is turned at random.

    Attributes:
        episodes: how many there are.

    Raises:
        RequestError: there are more ways than classes, a class has fewer images than ``k_shot + k_query``, or the
            numbers of queries are unequal.
    """

    def __init__(self, spec: EpisodeSpec, table: ClassTable) -> None:
        super().__init__(spec, table)
        if spec.query_alpha is not None:
            raise RequestError("Episodes that share no image have equal numbers of queries: leave out query_alpha.")
        self._images = table.images[:: spec.quarter_turns]
        if spec.n_way > len(self._images):
            raise RequestError(
                f"n_way is {spec.n_way}, but split {spec.split!r} has {len(self._images)} classes of different images. "
                "Lower n_way, or let episodes share images."
            )
        self._portions = self._images // (spec.k_shot + spec.k_query)
        least, most = 1, int(self._portions.sum()) // spec.n_way
        while least < most:  # the largest number of episodes, none of which has a class twice
            middle = (least + most + 1) // 2
            enough = np.minimum(self._portions, middle).sum() >= spec.n_way * middle
            least, most = (middle, most) if enough else (least, middle - 1)
        self.episodes = least

    def draw(self, index: Indices) -> Draws:
        """Episodes by their indices, int64 ``[B]``, in any order; after the last one they begin again."""
        classes, images = self._drawn
        return Draws(classes[index % self.episodes], images[index % self.episodes])

    @cached_property
    def _drawn(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        spec, width = self.spec, self.spec.k_shot + self.spec.k_query
        generator = np.random.Philox(key=self._key, counter=_COUNTER)
        shuffled = [generator.random_raw(int(count)).argsort(kind="stable") for count in self._images]
        classes = np.empty((self.episodes, spec.n_way), dtype=np.int32)
        images = np.empty((*classes.shape, width), dtype=np.int32)
        left = self._portions.copy()
        for episode in range(self.episodes):
            raw = generator.random_raw(3 * spec.n_way).reshape(3, -1)
            chosen = _choose(raw[0], left, self.episodes - episode)[raw[1].argsort(kind="stable")]
            turns = (raw[2] % np.uint64(spec.quarter_turns)).astype(np.int64)
            classes[episode] = chosen * spec.quarter_turns + turns
            for way, one in enumerate(chosen.tolist()):
                left[one] -= 1
                images[episode, way] = shuffled[one][left[one] * width : (left[one] + 1) * width]
        return classes, images


def _choose(raw: npt.NDArray[np.uint64], left: Indices, to_come: int) -> Indices:
    """Draw different classes in proportion to the portions that they have left.

    Args:
        raw: uniform, a number for each class to draw.
        left: portions of each class.
        to_come: episodes, this one included; classes with so many portions are drawn first.
    """
    left = left.copy()
    chosen = np.empty(len(raw), dtype=np.int64)
    for place, number in enumerate(raw):
        first = left >= to_come
        ends = np.where(first, left, 0).cumsum() if first.any() else left.cumsum()
        chosen[place] = np.searchsorted(ends, int(number) % int(ends[-1]), side="right")
        left[chosen[place]] = 0
    return chosen
