"""Episodes of one's own, of images or of any other arrays, in the form in which the trainer takes data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from mamldata.errors import RequestError
from mamldata.io.digest import canonical_json, sha256_bytes
from mamldata.sampling.normalization import Normalization
from mamldata.sampling.order import share
from mamldata.streaming.batch import EpisodeBatch
from mamldata.streaming.transforms import Transform
from trainer.maml.parameters import Episode

Draw = Callable[[str, int, np.random.Generator], Sequence[Any]]


class OwnData:
    """Data to train and to evaluate on, from a function; see ``TrainData``.

    ``draw(split, index, rng)`` gives an episode ``(support_x, support_y, query_x, query_y)`` of ``train``, ``val`` or
    ``test``: floating-point arrays or tensors of examples, ``[n, ...]``, such as images ``[n, C, H, W]`` or features
    ``[n, F]``, which become float32; and labels in ``range(n_way)``, ``[n]``, in any order. All episodes have the ways,
    shots, queries and shape of the first one. ``rng`` is a function of the setting seed (0 in evaluation), the split
    and the index, so that a resumed run is the same bit for bit if ``draw`` depends on nothing but its arguments.

    Args:
        draw: the function.
        name: of the dataset. A run resumes only on data with the same name, ways, shots, queries and shape.

    Raises:
        RequestError: an episode does not have this form, also while they are read.
    """

    def __init__(self, draw: Draw, *, name: str = "own") -> None:
        self._draw = draw
        self._first = _sorted(draw("train", 0, _rng("train", 0, 0)))
        self._form = _form_of(self._first)
        numbers = self._form._asdict()
        *before, last = numbers.pop("shape")
        shape = [*before[1:], last, before[0]] if len(before) == 2 else [*before, last]
        about = {"dataset": name, "split_scheme": "own", **numbers, "image_shape": shape}
        self._about = {**about, "digest": sha256_bytes(canonical_json(about)), "source": name}

    def describe(self) -> dict[str, Any]:
        """See ``TrainData``. The ``image_shape`` of other examples is their shape; the digest is of the description."""
        return dict(self._about)

    def train(
        self,
        batch_size: int,
        seed: int,
        device: torch.device,
        *,
        normalize: bool = False,
        transform: Transform | None = None,
        **ranks: int,
    ) -> OwnStream:
        """Meta-batches of the train split, without end."""
        if transform is not None:
            raise RequestError("augment is not for episodes of your own. Change their examples where they are drawn.")
        _refuse_to_normalize(normalize)
        return OwnStream(lambda t: self._batch("train", seed, t * batch_size, batch_size, **ranks).to(device))

    def eval(
        self,
        split: str,
        episodes: int,
        batch_size: int,
        device: torch.device,
        *,
        normalize: bool | Normalization = False,
        **ranks: int,
    ) -> Iterator[EpisodeBatch]:
        """The first ``episodes`` episodes of a split."""
        _refuse_to_normalize(normalize)
        for first in range(0, episodes, batch_size):
            yield self._batch(split, 0, first, min(batch_size, episodes - first), **ranks).to(device)

    def _batch(self, split: str, seed: int, first: int, size: int, **ranks: int) -> EpisodeBatch:
        index = share(np.arange(first, first + size), **ranks)
        episodes = [_sorted(self._draw(split, one, _rng(split, seed, one))) for one in index.tolist()]
        for place, episode in zip(index, episodes, strict=True):
            if (form := _form_of(episode)) != self._form:
                raise RequestError(f"The {split} episode {place} has {form}, but the first one has {self._form}.")
        # With the first episode, so that an empty part has its shapes.
        columns = (torch.stack(part)[:-1] for part in zip(*episodes, self._first, strict=True))
        return EpisodeBatch(*Episode(*columns), torch.from_numpy(index))

    def class_count(self) -> NoReturn:
        """Not known.

        Raises:
            RequestError: always.
        """
        raise RequestError(
            "Joint training needs the classes of the train split, which episodes of your own do not tell."
        )

    def classes(self, index: Tensor) -> NoReturn:  # noqa: ARG002
        """Not known, see ``class_count``."""
        self.class_count()


class OwnStream:
    """Meta-batches without end; the state is the number of those read."""

    def __init__(self, batch: Callable[[int], EpisodeBatch]) -> None:
        self._batch, self._next = batch, 0

    def __iter__(self) -> Iterator[EpisodeBatch]:
        for t in count(self._next):
            self._next = t + 1
            yield self._batch(t)

    def state_dict(self) -> dict[str, Any]:
        """The consumer's position."""
        return {"next_batch": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at exactly the next meta-batch."""
        self._next = int(state["next_batch"])


class _Form(NamedTuple):
    n_way: int
    k_shot: int
    k_query: int
    shape: tuple[int, ...]


def _rng(split: str, seed: int, index: int) -> np.random.Generator:
    digest = sha256_bytes(canonical_json({"episode": index, "seed": seed, "split": split}))
    return np.random.Generator(np.random.Philox(key=int(digest[:32], 16)))


def _sorted(arrays: Sequence[Any]) -> Episode:
    """Float32 examples, with those of a class together."""
    try:
        support_x, support_y, query_x, query_y = (_tensor(part) for part in arrays)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(
            f"An episode must be (support_x, support_y, query_x, query_y), all arrays: {error}"
        ) from error
    parts = []
    for examples, labels in ((support_x, support_y), (query_x, query_y)):
        if not examples.is_floating_point() or labels.is_floating_point():
            raise RequestError(
                f"Examples must be floating point, such as images in [0, 1], and labels whole numbers, not "
                f"{examples.dtype} and {labels.dtype}."
            )
        labels = labels.long()
        if (
            labels.ndim != 1
            or not len(labels)
            or labels.shape != examples.shape[:1]
            or not 0 <= labels.max() < len(labels)
        ):
            raise RequestError(
                "An episode needs a label for each example, and an example for each label from 0, not examples "
                f"{list(examples.shape)} with labels {list(labels.shape)}: {labels.tolist()!s:.60}."
            )
        order = labels.argsort(stable=True)
        parts += [examples.float()[order], labels[order]]
    return Episode(*parts)


def _tensor(values: Any) -> Tensor:
    """On the CPU, without a graph; of arrays a copy, because torch does not take all strides and byte orders."""
    if isinstance(values, np.ndarray):
        values = values.astype(values.dtype.newbyteorder("="), order="C")
    return torch.as_tensor(values).detach().to("cpu").to_dense()


def _form_of(episode: Episode) -> _Form:
    n_way, shape = int(episode.support_y.max()) + 1, tuple(episode.support_x.shape[1:])
    shots, queries = ([int((y == way).sum()) for way in range(n_way)] for y in (episode.support_y, episode.query_y))
    form = _Form(n_way, shots[0], queries[0], shape)
    whole = [(n_way * k, *shape) for k in (form.k_shot, form.k_query)]
    equal = {*shots} == {form.k_shot} and {*queries} == {form.k_query} and form.k_shot and form.k_query
    if not equal or not shape or [episode.support_x.shape, episode.query_x.shape] != whole:
        raise RequestError(
            f"An episode needs equal numbers of examples, all of one shape, for each label from 0 to {n_way - 1}; this "
            f"one has {shots} support examples {list(episode.support_x.shape)} and {queries} query examples "
            f"{list(episode.query_x.shape)}."
        )
    return form


def _refuse_to_normalize(normalize: bool | Normalization) -> None:
    if normalize:
        raise RequestError("normalize is not for episodes of your own. Normalize them where they are drawn.")
