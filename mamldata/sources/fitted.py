"""A source whose images are brought to the size and the channels that a network takes."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Self

import numpy as np

from mamldata.bank.prepare import prepare_image
from mamldata.datasets.manifest import ImageRecipe
from mamldata.errors import RequestError
from mamldata.sampling.normalization import Normalization
from mamldata.sampling.order import Indices
from mamldata.sampling.sampler import ClassTable
from mamldata.sources.source import AllHere, EpisodeInfo, Images, SplitSource

RESAMPLING = "lanczos"


class FittedSource(AllHere):
    """The same episodes, each image converted and then resized, as a bank's images are prepared.

    Grey images get three equal channels; colours become grey by Pillow's ``L``, 0.299 R + 0.587 G + 0.114 B; then
    Pillow resizes by its Lanczos filter. Nothing is inverted: white stays white.

    Args:
        source: the episodes.
        image_shape: of the images that are wanted: (H, W, C), with H equal to W, and 1 or 3 channels.

    Raises:
        RequestError: images cannot have this shape.
    """

    def __init__(self, source: SplitSource, image_shape: Sequence[int]) -> None:
        height, width, channels = image_shape
        if not (0 < height == width <= 4096 and channels in {1, 3}):
            raise RequestError(f"Images cannot be fitted to {shape_text(image_shape)}: only to squares, grey or RGB.")
        self.source = source
        self._recipe = ImageRecipe(height, channels, RESAMPLING, invert=False, bank_sha256={})

    @property
    def info(self) -> EpisodeInfo:
        """What the episodes are; ``fitted_from`` is the shape of the source's images."""
        info, channels = self.source.info, self._recipe.channels
        return replace(
            info,
            image_shape=(self._recipe.size, self._recipe.size, channels),
            fitted_from=info.image_shape,
            normalization=_with_channels(info.normalization, channels),
        )

    def read(self, index: Indices, support: Images, query: Images) -> None:
        """Copy episodes into the caller's memory, see ``Source.read``."""
        info, wanted = self.source.info, math.prod(self.info.image_shape)
        counts = [len(index) * info.n_way * k for k in (info.k_shot, info.k_query)]
        stored = [np.empty(count * math.prod(info.image_shape), dtype=np.uint8) for count in counts]
        self.source.read(index, *stored)
        for images, out in zip(stored, (support, query), strict=True):
            for place, image in enumerate(images.reshape(-1, *info.image_shape)):
                colours = np.repeat(image, 3 // image.shape[2], axis=2)
                out[place * wanted : (place + 1) * wanted] = prepare_image(colours, self._recipe).reshape(-1)

    def view(self, episodes: int | None = None) -> Self:
        """See ``SplitSource.view``."""
        return self._of(self.source.view(episodes))

    def narrowed(self, n_way: int | None = None, k_shot: int | None = None, k_query: int | None = None) -> Self:
        """See ``SplitSource.narrowed``."""
        return self._of(self.source.narrowed(n_way, k_shot, k_query))

    def _of(self, source: SplitSource) -> Self:
        fitted = copy.copy(self)
        fitted.source = source
        return fitted

    def query_counts(self, index: Indices) -> Indices | None:
        """See ``Source.query_counts``."""
        return self.source.query_counts(index)

    @property
    def episodes(self) -> int | None:
        """See ``Source.episodes``."""
        return self.source.episodes

    @property
    def table(self) -> ClassTable:
        """See ``Source.table``."""
        return self.source.table

    def classes(self, index: Indices) -> Indices:
        """See ``Source.classes``."""
        return self.source.classes(index)

    def class_labels(self, index: int) -> list[str]:
        """See ``Source.class_labels``."""
        return self.source.class_labels(index)

    @property
    def fetched_shards(self) -> tuple[int, ...]:
        """See ``Source.fetched_shards``."""
        return self.source.fetched_shards

    @property
    def window(self) -> int:
        """See ``Source.window``."""
        return self.source.window

    def prefetch(self, upcoming: Sequence[int]) -> None:
        """See ``Source.prefetch``."""
        self.source.prefetch(upcoming)


def fitted(source: SplitSource, image_shape: Sequence[int]) -> SplitSource:
    """The source itself if its images have this shape, else a ``FittedSource``."""
    return source if source.info.image_shape == tuple(image_shape) else FittedSource(source, image_shape)


def shape_text(image_shape: Sequence[int]) -> str:
    """Such as ``84x84 RGB``."""
    height, width, channels = image_shape
    return f"{height}x{width} {'RGB' if channels == 3 else 'grey' if channels == 1 else f'with {channels} channels'}"


def _with_channels(known: Normalization, channels: int) -> Normalization:
    """The same for another number of channels: the average of those that are known, for each."""
    if len(known.mean) == channels:
        return known
    return Normalization((fmean(known.mean),) * channels, (fmean(known.std),) * channels)
