"""Episodes of several data sets to train on, by weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mamldata.datasets.manifest import UNKNOWN
from mamldata.sampling.mixture import require_weights, shares
from mamldata.sampling.normalization import Normalization
from mamldata.sources.mixed import mixed_info
from mamldata.sources.source import EpisodeInfo, Source
from mamldata.streaming.batch import EpisodeBatch
from mamldata.streaming.device import DeviceStream
from mamldata.streaming.stream import EpisodeStream
from trainer.data import EpisodeData

_SHAPE = ("n_way", "k_shot", "k_query", "image_shape")  # the same in all sources
_INCIDENTAL = ("source", "normalisation", "image")  # which may differ in a resumed run


class MixedData:
    """Several data sets as one: each meta-batch comes from one of them, by weight, see ``EpisodeStream``.

    Args:
        parts: such as ``archive_data`` and ``live_data`` give.
        weights: a number for each; None: all equal.

    Raises:
        RequestError: the weights are invalid; or, from ``describe``, the shapes of the episodes differ.
    """

    def __init__(self, parts: Sequence[EpisodeData], weights: Sequence[float] | None = None) -> None:
        self.parts = tuple(parts)
        self.weights = require_weights(weights, len(parts))
        self._trained_on: Source | None = None

    def train(self, batch_size: int, seed: int, device: torch.device, **options: Any) -> DeviceStream:
        """See ``TrainData.train``: each source is remixed or shuffled as it would be alone, and they never end."""
        streams = [part.stream(batch_size, seed) for part in self.parts]
        stream = EpisodeStream(streams, batch_size=batch_size, seed=seed, weights=self.weights, **options)
        self._trained_on = stream.source
        return stream.to(device)

    def eval(
        self,
        split: str,
        episodes: int,
        batch_size: int,
        device: torch.device,
        *,
        normalize: bool | Normalization = False,
        **ranks: int,
    ) -> Iterable[EpisodeBatch]:
        """The first episodes of each source, one source after the other: of ``episodes`` its share by weight.

        Raises:
            RequestError: a source has fewer.
        """
        if normalize is True:
            normalize = self._info().normalization
        counts = zip(self.parts, shares(self.weights, episodes), strict=True)
        passes = [part.eval(split, n, batch_size, device, normalize=normalize, **ranks) for part, n in counts if n]
        return chain.from_iterable(passes)

    def describe(self) -> dict[str, Any]:
        """See ``TrainData.describe``; ``sources`` describes each source, with its weight and digest."""
        info, described = self._info(), [part.describe() for part in self.parts]
        images = [one["image"] for one in described]
        return {
            **{key: described[0][key] for key in _SHAPE},
            **{key: getattr(info, key) for key in ("dataset", "split_scheme", "rotations")},
            "digest": info.bank_sha256,
            "normalisation": info.normalization.to_json(),
            "image": images[0] if images.count(images[0]) == len(images) else UNKNOWN,
            "source": " + ".join(one["source"] for one in described),
            "sources": [
                {**{key: value for key, value in one.items() if key not in _SHAPE + _INCIDENTAL}, "weight": weight}
                for one, weight in zip(described, self.weights, strict=True)
            ],
        }

    def available(self, split: str) -> int | None:
        """How many episodes ``eval`` can give; None if no source ends.

        Raises:
            RequestError: a source has no episodes in this split.
        """
        known = [part.available(split) for part in self.parts]
        ends = [(number, count) for number, count in enumerate(known) if count is not None and self.weights[number]]
        if not ends:
            return None
        whole = sum(map(Fraction, self.weights))
        most = min(math.floor(count * whole / Fraction(self.weights[number])) for number, count in ends) + len(known)
        while any(shares(self.weights, most)[number] > count for number, count in ends):
            most -= 1
        return most

    def class_count(self) -> int:
        """The number of classes in the train splits of all sources, rotated ones included."""
        return sum(part.class_count() for part in self.parts)

    def classes(self, index: Tensor) -> Tensor:
        """The classes of the episodes that ``train`` gives: int64 ``[B, n_way]``, by label."""
        assert self._trained_on is not None, "call train first: it decides which episodes an index stands for"
        return torch.from_numpy(self._trained_on.classes(index.cpu().numpy()))

    def _info(self) -> EpisodeInfo:
        return mixed_info([part.info for part in self.parts], self.weights)
