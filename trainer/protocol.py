"""What the trainer asks of data, so that archives, live episodes and made-up tensors all will do."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from mamldata.errors import RequestError
from mamldata.sampling.normalization import Normalization
from mamldata.streaming.batch import EpisodeBatch


class TrainStream(Protocol):
    """Meta-batches for training. Each ``iter()`` is one epoch (or has no end), and the next one the next epoch."""

    def __iter__(self) -> Iterator[EpisodeBatch]:
        """The next epoch; right after ``load_state_dict``, the rest of the epoch that was under way."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the consumer stands, as numbers, strings, lists and dicts; read-ahead does not count."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at exactly the next meta-batch."""
        ...


class ClassData(Protocol):
    """Which classes training episodes show; only joint training asks."""

    def class_count(self) -> int:
        """How many classes the train split has."""
        ...

    def classes(self, index: Tensor) -> Tensor:
        """The classes of training episodes: int64 ``[B, n_way]``, by label, in ``range(class_count())``.

        Args:
            index: int64 ``[B]``, see ``EpisodeBatch``.
        """
        ...


class TrainData(ClassData, Protocol):
    """Episodes to train and to evaluate on."""

    def train(
        self, batch_size: int, seed: int, device: torch.device, *, normalize: bool, rank: int, world_size: int
    ) -> TrainStream:
        """Meta-batches of the train split, floating point, on ``device``; the order is a function of ``seed``.

        Images are in [0, 1], or normalised by the mean and deviation of the train split. Of several processes each
        gets its part of every meta-batch, ``batch_size`` episodes in all.
        """
        ...

    def eval(
        self,
        split: str,
        episodes: int,
        batch_size: int,
        device: torch.device,
        *,
        normalize: bool | Normalization,
        rank: int,
        world_size: int,
    ) -> Iterable[EpisodeBatch]:
        """The first ``episodes`` episodes of a split, once, in order, none dropped and none twice.

        Images are in [0, 1], or normalised by the mean and deviation of the train split, or by those given.
        Of several processes each gets its part of every meta-batch, which can be empty at the end.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What the episodes are, fit for JSON.

        At least ``dataset``, ``split_scheme``, ``n_way``, ``k_shot``, ``k_query``, ``image_shape`` (H, W, C),
        ``digest`` and ``source``; and what ``normalize=True`` means, ``normalization``, with lists ``mean`` and ``std``
        of a number for each channel. A run goes on only with data whose description is the same, ``source`` (the
        place) and ``normalization``, which follows from the rest, aside.
        """
        ...


def endless(stream: TrainStream) -> Generator[EpisodeBatch, None, None]:
    """The meta-batches of all epochs, one epoch after the other.

    Raises:
        RequestError: an epoch without a single meta-batch.
    """
    while True:
        empty = True
        for batch in stream:
            empty = False
            yield batch
            del batch  # its memory can be used again while the next one is read
        if empty:
            raise RequestError("The train split gives no meta-batch. Lower the meta-batch size, or add episodes.")
