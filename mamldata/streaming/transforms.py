"""Transforms of images: augmentation whose random numbers depend on the episode alone.

Transforms run where meta-batches are handed to the consumer, in the consumer's thread, because most of them draw from
the global generators of torch, NumPy and Python. These are seeded for each episode, and get their state back.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mamldata.errors import RequestError
from mamldata.sampling.normalization import Normalization
from mamldata.sampling.order import Order, share
from mamldata.streaming.batch import EpisodeBatch

Transform = Callable[[torch.Tensor], torch.Tensor]
Seed = Callable[[int], None]


@dataclass(frozen=True)
class Batched:
    """A transform of several images at once, see ``batched``."""

    transform: Transform
    random: bool = True

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Transform images ``[N, C, H, W]``."""
        return self.transform(images)


def batched(transform: Transform, *, random: bool = True) -> Batched:
    """Say that a stream may call a transform with several images at once.

    Args:
        transform: takes images ``[N, C, H, W]`` and returns ``[N, C', H', W']``. The transforms of torchvision v2 draw
            one set of parameters for each call, so all N images then get the same.
        random: whether it draws random numbers. If so, it gets the support or the query images of one episode at a
            time; if not, those of a whole meta-batch, which is faster.
    """
    return Batched(transform, random)


class Transforms:
    """The transforms of a stream, and then its normalization, on one device.

    Args:
        support, query: of support and of query images; None for none.
        order: of the stream.
        rank, world_size: of the stream.
        device: of the meta-batches.
        normalize: mean and deviation to normalize transformed images by; None: they stay as they are.
    """

    def __init__(
        self,
        support: Transform | None,
        query: Transform | None,
        order: Order,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        *,
        normalize: Normalization | None = None,
    ) -> None:
        self._of = {"support": support, "query": query}
        self._order, self._rank, self._world_size = order, rank, world_size
        self._device = device
        self._normalize = normalize and tuple(torch.tensor(one, device=device)[:, None, None] for one in normalize)
        self._seeded = any(one and not _is_fixed(one) for one in self._of.values())

    def __call__(self, t: int, batch: EpisodeBatch) -> EpisodeBatch:
        """Transform meta-batch ``t``.

        Raises:
            RequestError: a transform returned something that is not images. Errors of its own are passed on.
        """
        if not len(batch.index):  # the share of a rank may be empty
            return batch
        # The indices from the order, because reading those of the batch would make the CPU wait for a GPU.
        episodes = share(self._order.indices(t), self._rank, self._world_size).tolist()
        epoch = self._order.epoch(t)
        seeds = {
            part: [_seed(self._order.seed, epoch, episode, part) for episode in episodes] if self._seeded else []
            for part in self._of
        }
        with _restored_generators(self._device, if_seeded=self._seeded) as seed:
            support, query = (
                self._normalized(_transformed(transform, images, seeds[part], seed))
                for (part, transform), images in zip(self._of.items(), (batch.support_x, batch.query_x), strict=True)
            )
        return batch._replace(support_x=support, query_x=query)

    def _normalized(self, images: torch.Tensor) -> torch.Tensor:
        if self._normalize is None:
            return images
        mean, std = self._normalize
        if images.shape[-3] != len(mean) or not images.is_floating_point():
            raise RequestError(
                f"The transform returned images [{images.shape[-3]}, H, W] of {images.dtype}, which cannot be "
                f"normalized: that needs {len(mean)} channels of floating-point numbers. Leave out normalize."
            )
        return ((images.float() - mean) / std).to(images.dtype)


def _is_fixed(transform: Transform) -> bool:
    return isinstance(transform, Batched) and not transform.random


def _transformed(transform: Transform | None, images: torch.Tensor, seeds: Sequence[int], seed: Seed) -> torch.Tensor:
    """Images ``[B, N, C, H, W]`` after a transform; ``seeds`` has a number for each of the B episodes."""
    if transform is None:
        return images
    if _is_fixed(transform):
        together = images.flatten(0, 1)
        done = _checked(transform(together), together)
    else:
        done = _seeded(transform, images, seeds, seed)
    return done.contiguous(memory_format=torch.channels_last).reshape(*images.shape[:2], *done.shape[1:])


def _seeded(transform: Transform, images: torch.Tensor, seeds: Sequence[int], seed: Seed) -> torch.Tensor:
    """The same as ``[B * N, C', H', W']``, of a transform that draws random numbers."""
    parts = []
    for episode, number in zip(images, seeds, strict=True):
        seed(number)
        if isinstance(transform, Batched):
            parts.append(_checked(transform(episode), episode))
        else:
            parts += [_checked(transform(image), image) for image in episode]
    if len({(part.shape, part.dtype) for part in parts}) > 1:
        kinds = sorted({f"{list(part.shape)} of {part.dtype}" for part in parts})
        raise RequestError(
            f"The transform returned images of different shapes or dtypes ({', '.join(kinds[:3])}), but all images of "
            "a meta-batch must agree: crop or resize them to one size."
        )
    return torch.cat(parts) if isinstance(transform, Batched) else torch.stack(parts)


def _checked(returned: Any, given: torch.Tensor) -> torch.Tensor:
    """What a transform returned, if it is as many images as it was given, on the same device."""
    if not isinstance(returned, torch.Tensor):
        problem = f"it returned a {type(returned).__name__}"
    elif returned.dim() != given.dim() or returned.shape[: given.dim() - 3] != given.shape[:-3]:
        problem = f"it returned a tensor {list(returned.shape)}"
    elif returned.device != given.device:
        problem = f"it returned a tensor on {returned.device}, not on {given.device}"
    else:
        return returned
    kind = "[C, H, W]" if given.dim() == 3 else f"[{len(given)}, C, H, W]"
    raise RequestError(
        f"A transform gets images {list(given.shape)} as a tensor and must return a tensor {kind}, but {problem}."
    )


def _seed(*parts: int | str) -> int:
    """A seed in ``range(2**32)``, which all three generators take."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest())


@contextmanager
def _restored_generators(device: torch.device, *, if_seeded: bool) -> Iterator[Seed]:
    """A function that seeds the global generators; their states are restored afterwards.

    These are torch's on the CPU and on the device, NumPy's and Python's. ``torch.manual_seed`` would also seed those
    of all other devices, and ``torch.random.fork_rng`` knows neither NumPy nor Python.
    """
    if not if_seeded:
        yield lambda _: None
        return
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    elif device.type == "mps":
        generators.append(torch.mps._get_default_mps_generator())
    states = [generator.get_state() for generator in generators]
    of_numpy, of_python = np.random.get_state(legacy=False), random.getstate()

    def seed(number: int) -> None:
        for generator in generators:
            generator.manual_seed(number)
        np.random.seed(number)
        random.seed(number)

    try:
        yield seed
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        np.random.set_state(of_numpy)
        random.setstate(of_python)
