"""What the trainer needs from data; archives, live episodes and synthetic tensors can all provide it."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mamldata.errors import RequestError
from mamldata.sampling.normalization import Normalization
from mamldata.sampling.order import Indices
from mamldata.streaming.batch import EpisodeBatch
from mamldata.streaming.transforms import Transform


class TrainStream(Protocol):
    """Meta-batches for training. Each ``iter()`` gives the next epoch, or meta-batches without end."""

    def __iter__(self) -> Iterator[EpisodeBatch]:
        """The next epoch; right after ``load_state_dict``, the rest of the interrupted epoch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The consumer's position, as numbers, strings, lists and dicts; read-ahead does not count."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at exactly the next meta-batch."""
        ...


class ClassData(Protocol):
    """The classes in training episodes, for joint training only."""

    def class_count(self) -> int:
        """The number of classes in the train split."""
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
        self,
        batch_size: int,
        seed: int,
        device: torch.device,
        *,
        normalize: bool,
        transform: Transform | None,
        rank: int,
        world_size: int,
    ) -> TrainStream:
        """Meta-batches of the train split, floating point, on ``device``; the order is a function of ``seed``.

        Images are in [0, 1], or normalized by the mean and deviation of the train split; ``transform`` is applied to
        them before, see ``EpisodeStream``. Each of several processes gets its part of every meta-batch of
        ``batch_size`` episodes.
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
        """The first ``episodes`` episodes of a split, each once and in order.

        Images are in [0, 1], or normalized by the mean and deviation of the train split, or by those given.
        Each of several processes gets its part of every meta-batch; the last part can be empty.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """A description of the episodes, as values for JSON.

        At least ``dataset``, ``split_scheme``, ``n_way``, ``k_shot``, ``k_query``, ``image_shape`` (H, W, C),
        ``digest`` and ``source``, where the ``image_shape`` of examples that are no images is their shape; and
        ``normalisation``, which ``normalize=True`` applies: lists ``mean`` and ``std`` with a number for each
        channel; and ``image``, how images were prepared, by ``ImageRecipe.to_json``, or ``unknown``. A run
        resumes only on data with the same description, apart from ``source`` (the place) and ``normalisation``
        and ``image``, which follow from the rest.
        """
        ...


@runtime_checkable
class NamesClasses(Protocol):
    """Data that can also name the classes of the episodes that ``eval`` gives."""

    def class_names(self, split: str, index: Indices) -> list[list[str]]:
        """The names of each episode's classes, by label.

        Args:
            split: of the episodes.
            index: their indices in it, int64 ``[E]``.
        """
        ...


def endless(stream: TrainStream) -> Generator[EpisodeBatch, None, None]:
    """The meta-batches of all epochs, one epoch after the other.

    Raises:
        RequestError: an epoch has no meta-batch.
    """
    while True:
        empty = True
        for batch in stream:
            empty = False
            yield batch
            del batch  # frees its memory while the next one is read
        if empty:
            raise RequestError("The train split gives no meta-batch. Lower the meta-batch size, or add episodes.")
