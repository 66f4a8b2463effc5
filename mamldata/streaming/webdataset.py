"""A stage for pipelines of the package webdataset: meta-batches from the shards of an archive.

It is for those who move their data by webdataset. Nothing is verified there: a stream of ``EpisodeStream`` is.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mamldata.errors import DamagedError, RequestError
from mamldata.sampling.normalization import Normalization
from mamldata.streaming.batch import EpisodeBatch, require_dtype, scaled

Sample = Mapping[str, Any]
Images = npt.NDArray[np.uint8]


def decode_episodes(
    batch_size: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    normalize: Normalization | None = None,
    drop_last: bool = False,
) -> EpisodeDecoder:
    """A stage that turns webdataset's samples of a full archive into meta-batches.

        shards = wds.WebDataset("https://example.org/omniglot-5w1s/train-{00000..00003}.tar", shardshuffle=False)
        loader = wds.WebLoader(shards.compose(mamldata.decode_episodes(32)), batch_size=None, num_workers=2)

    Args:
        batch_size: episodes in a meta-batch.
        dtype: of the images, see ``EpisodeStream``.
        normalize: mean and deviation to normalize by, such as ``mamldata.read_archive(place).normalization``.
        drop_last: leave out a last meta-batch with fewer episodes, of each worker.

    Raises:
        RequestError: an argument is invalid.
    """
    if batch_size < 1:
        raise RequestError(f"batch_size must be at least 1, not {batch_size}.")
    require_dtype(dtype, normalized=normalize is not None)
    return EpisodeDecoder(batch_size, dtype, normalize, drop_last)


@dataclass(frozen=True)
class EpisodeDecoder:
    """What ``decode_episodes`` returns."""

    batch_size: int
    dtype: torch.dtype
    normalize: Normalization | None
    drop_last: bool

    def __call__(self, samples: Iterable[Sample]) -> Iterator[EpisodeBatch]:
        """The meta-batches of samples that are not decoded yet, in their order, equal to those of a stream.

        Raises:
            DamagedError: a sample is no episode, or one of another shape than the others of its meta-batch.
        """
        some: list[Sample] = []
        for sample in samples:
            some.append(sample)
            if len(some) == self.batch_size:
                yield self._batch(some)
                some = []
        if some and not self.drop_last:
            yield self._batch(some)

    def _batch(self, samples: Sequence[Sample]) -> EpisodeBatch:
        support, support_y = self._half(samples, "support.npy")
        query, query_y = self._half(samples, "query.npy")
        return EpisodeBatch(support, support_y, query, query_y, torch.tensor([_index(sample) for sample in samples]))

    def _half(self, samples: Sequence[Sample], name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The support or the query images, and their labels."""
        arrays = [_images(sample, name) for sample in samples]
        for sample, images in zip(samples, arrays, strict=True):
            if images.shape != arrays[0].shape:
                raise _no_episode(sample, f"its {name} is {list(images.shape)}, not {list(arrays[0].shape)}")
        stored = torch.from_numpy(np.stack(arrays))  # [B, n_way, k, H, W, C]
        labels = torch.arange(stored.shape[1]).repeat_interleave(stored.shape[2]).repeat(len(samples), 1)
        return scaled(stored.flatten(1, 2).permute(0, 1, 4, 2, 3), self.dtype, self.normalize), labels


def _index(sample: Sample) -> int:
    key = str(sample.get("__key__"))
    if not (key.isascii() and key.isdigit()):
        raise _no_episode(sample, "its key is no number")
    return int(key)


def _images(sample: Sample, name: str) -> Images:
    """An array of images, which shares the memory of the sample: uint8 ``[n_way, k, H, W, C]``."""
    data = sample.get(name)
    if not isinstance(data, bytes):
        raise _no_episode(sample, f"it has no {name}, or not its bytes")
    stream = io.BytesIO(data)
    try:
        np.lib.format.read_magic(stream)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except ValueError as error:
        raise _no_episode(sample, f"its {name} is no array ({error})") from error
    left = len(data) - stream.tell()
    if fortran or dtype != np.uint8 or len(shape) != 5 or min(shape) < 1 or math.prod(shape) != left:
        raise _no_episode(
            sample, f"its {name} is {left:,} bytes of {dtype} {list(shape)}, not the images of an episode"
        )
    return np.frombuffer(data, np.uint8, offset=stream.tell()).reshape(shape)


def _no_episode(sample: Sample, why: str) -> DamagedError:
    return DamagedError(
        f"{sample.get('__url__', 'a shard')}, sample {sample.get('__key__')}: {why}. This stage takes the samples of a "
        "full archive's shards, before any other stage decodes them."
    )
