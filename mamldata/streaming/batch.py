"""Meta-batches: what a stream yields, and how one is made from stored images."""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mamldata.errors import RequestError
from mamldata.pictures import contact_sheet
from mamldata.sampling.mixture import MixedOrder
from mamldata.sampling.normalization import Normalization
from mamldata.sampling.order import Indices, Order, shard_runs, share
from mamldata.sources.mixed import MixedSource
from mamldata.sources.source import Source
from mamldata.streaming.buffers import BufferPool
from mamldata.words import counted


class EpisodeBatch(NamedTuple):
    """A meta-batch of B episodes.

    Attributes:
        support_x: images ``[B, n_way * k_shot, C, H, W]``, channels-last in memory; floating point in [0, 1],
            normalized, or uint8, as set for the stream. Images of one class are adjacent.
        support_y: labels in ``range(n_way)``, int64 ``[B, n_way * k_shot]``.
        query_x: images ``[B, n_way * k_query, C, H, W]``, as ``support_x``.
        query_y: labels, int64 ``[B, n_way * k_query]``.
        index: each episode's index in its split, int64 ``[B]``; for remixed episodes, counted through all epochs,
            ``epoch * episodes + place``.

    The labels of all meta-batches share their memory: do not write into them.
    """

    support_x: torch.Tensor
    support_y: torch.Tensor
    query_x: torch.Tensor
    query_y: torch.Tensor
    index: torch.Tensor  # type: ignore[assignment]  # the field's word; tuple.index is not needed here

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> EpisodeBatch:
        """The same on a device; see ``torch.Tensor.to``. ``EpisodeStream.to`` copies while the consumer computes."""
        return EpisodeBatch(*(part.to(device, non_blocking=non_blocking) for part in self))

    def __repr__(self) -> str:
        parts = (f"{name}={_in_short(part)}" for name, part in zip(self._fields, self, strict=True))
        return f"EpisodeBatch({', '.join(parts)})"

    def _repr_png_(self) -> bytes | None:
        """The first episode as a picture, which notebooks show; None if it has no images that could be shown."""
        if self.support_x.dim() != 5 or self.support_x.shape[2] not in {1, 3} or not len(self.index):
            return None
        support, query = _visible(self.support_x[0], self.query_x[0])
        labels = range(int(self.support_y[0].max()) + 1)
        of_support, of_query = (
            [part[0].cpu().numpy() == way for way in labels] for part in (self.support_y, self.query_y)
        )
        sheet = contact_sheet(
            np.stack([support[mine] for mine in of_support]),
            [query[mine] for mine in of_query],
            [f"label {way}" for way in labels],
            f"episode {int(self.index[0])}, the first of {counted(len(self.index), 'episode')}",
        )
        stream = io.BytesIO()
        sheet.save(stream, format="PNG")
        return stream.getvalue()


def _in_short(part: object) -> str:
    """A tensor as ``float32[32, 5, 1, 28, 28]``; others as they are, because torch.func puts numbers into fields."""
    if not isinstance(part, torch.Tensor):
        return repr(part)
    where = "" if part.device.type == "cpu" else f" on {part.device}"
    return f"{str(part.dtype).removeprefix('torch.')}{list(part.shape)}{where}"


def _visible(*parts: torch.Tensor) -> list[npt.NDArray[np.uint8]]:
    """Images ``[images, C, H, W]`` as uint8 ``[images, H, W, C]``; of those not in [0, 1] the range is stretched."""
    arrays = [part.cpu().permute(0, 2, 3, 1) for part in parts]
    if arrays[0].dtype != torch.uint8:
        arrays = [array.float() for array in arrays]
        low, high = min(float(one.min()) for one in arrays), max(float(one.max()) for one in arrays)
        low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
        arrays = [((array - low) * (255 / ((high - low) or 1))).round().to(torch.uint8) for array in arrays]
    return [array.numpy() for array in arrays]


def _refuse_to_collate(*_: Any, **__: Any) -> None:
    raise RequestError(
        "A stream yields whole meta-batches, which a DataLoader must not batch again. Write "
        "DataLoader(stream, batch_size=None)."
    )


# A DataLoader does not tell its dataset the batch_size, so a forgotten batch_size=None shows only when a batch is
# collated. torch looks in this table before it treats the type as a named tuple. Without the table, only this message
# is missing.
with contextlib.suppress(ImportError):
    from torch.utils.data._utils.collate import default_collate_fn_map

    default_collate_fn_map[EpisodeBatch] = _refuse_to_collate


class Stored(NamedTuple):
    """Support and query images ``[B, n_way * k, C, H, W]``, channels-last in memory; and indices int64 ``[B]``.

    ``queries`` has the number of query images of each way, int64 ``[B, n_way]``, unless all are equal.
    """

    support: torch.Tensor
    query: torch.Tensor
    index: torch.Tensor  # type: ignore[assignment]
    queries: Indices | None = None

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Stored:
        """The same with its tensors on a device."""
        support, query, index = (part.to(device, non_blocking=non_blocking) for part in self[:3])
        return Stored(support, query, index, self.queries)


class BatchReader:
    """Reads meta-batches. For one thread at a time.

    Args:
        source: of the episodes.
        order: which episodes a meta-batch holds.
        dtype: of the images.
        device: where finished meta-batches go.
        rank, world_size: the part of each meta-batch to read, see ``mamldata.sampling.order.share``.
        normalize: mean and deviation to normalize by; None: images stay in [0, 1].
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        dtype: torch.dtype,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        *,
        normalize: Normalization | None = None,
    ) -> None:
        self.source = source
        self.order = order
        self.dtype = dtype
        self.rank, self.world_size = rank, world_size
        sources = source.parts if isinstance(source, MixedSource) else (source,)
        orders = order.parts if isinstance(order, MixedOrder) else (order,)
        # Shards are listed once for each reader: an archive may have many thousands.
        self._fetched = [(*part, part[0].fetched_shards) for part in zip(sources, orders, strict=True)]
        self.batch_size = len(share(np.arange(order.batch_size), rank, world_size))
        info = source.info
        counts = (info.k_shot, info.k_query)
        self.shapes = tuple((self.batch_size, info.n_way * k, *info.image_shape) for k in counts)
        self._labels = tuple(
            torch.arange(info.n_way).repeat_interleave(k).repeat(self.batch_size, 1).to(device) for k in counts
        )
        self._affine = _affine(normalize) if normalize else None
        # Moved once: a copy from ordinary memory makes the thread wait for all copies before it. [C, 1, 1] broadcasts
        # over [B, images, C, H, W].
        self._affine_there = self._affine and tuple(values.to(device)[:, None, None] for values in self._affine)
        self._stored = [BufferPool(shape, torch.uint8) for shape in self.shapes]
        self._scaled = [BufferPool(shape, dtype) for shape in self.shapes]

    def indices(self, t: int) -> Indices:
        """The episodes of meta-batch ``t`` that this rank reads: int64, one dimension."""
        return share(self.order.indices(t), self.rank, self.world_size)

    def look_ahead(self, t: int) -> None:
        """Tell a source that fetches shards which ones meta-batch ``t`` and the next ones need.

        At the end of a shuffled epoch these include the first shards of the next epoch.
        """
        number, t = self.order.place(t)
        source, order, shards = self._fetched[number]
        per_epoch = order.batches_per_epoch
        if not shards or per_epoch is None:
            return
        epoch, step = divmod(t, per_epoch)
        numbers, ends = shard_runs(order, epoch, shards)
        first = int(np.searchsorted(ends, step * order.batch_size, side="right"))
        last = int(np.searchsorted(ends, per_epoch * order.batch_size))  # an incomplete last batch is not read
        upcoming = numbers[first : min(last + 1, first + source.window)].tolist()
        if order.shuffle and len(upcoming) < source.window:
            following, _ = shard_runs(order, epoch + 1, shards)
            upcoming += [number for number in following.tolist() if number not in upcoming]
        source.prefetch(upcoming)

    def read(self, t: int) -> EpisodeBatch:
        """Meta-batch ``t`` on the CPU, in pooled memory."""
        stored = self.read_stored(t)
        if self.dtype == torch.uint8:
            return self.label(*stored)
        scaled = [pool.take()[0][: len(stored.index)] for pool in self._scaled]
        for images, out in zip((stored.support, stored.query), scaled, strict=True):
            _scale(images, out, self._affine)
        return self.label(scaled[0], scaled[1], stored.index, stored.queries)

    def read_stored(self, t: int) -> Stored:
        """The images of meta-batch ``t`` as stored, uint8, in pooled memory."""
        index = self.indices(t)
        (support, support_memory), (query, query_memory) = (pool.take() for pool in self._stored)
        self.look_ahead(t)
        self.source.read(index, support_memory, query_memory)
        if len(index) < self.batch_size:
            support, query = support[: len(index)], query[: len(index)]
        return Stored(support, query, torch.from_numpy(index.copy()), self.source.query_counts(index))

    def finish(self, stored: Stored) -> EpisodeBatch:
        """Scale and label a stored meta-batch on its device."""
        if self.dtype == torch.uint8:
            return self.label(*stored)
        if self._affine_there is None:
            support, query = ((images * _SCALE).to(self.dtype) for images in (stored.support, stored.query))
        else:
            scale, shift = self._affine_there
            support, query = ((images * scale + shift).to(self.dtype) for images in (stored.support, stored.query))
        return self.label(support, query, stored.index, stored.queries)

    def label(
        self, support: torch.Tensor, query: torch.Tensor, index: torch.Tensor, queries: Indices | None = None
    ) -> EpisodeBatch:
        """A meta-batch of images that have their final dtype; copies nothing but unequal numbers of queries."""
        support_y, query_y = self._labels
        if queries is not None:
            ways = np.tile(np.arange(queries.shape[1]), len(queries)).repeat(queries.reshape(-1))
            query_y = torch.from_numpy(ways.reshape(-1, query.shape[1])).to(query_y.device)
        if len(index) < self.batch_size:
            support_y, query_y = support_y[: len(index)], query_y[: len(index)]
        return EpisodeBatch(support, support_y, query, query_y, index)


def require_dtype(dtype: torch.dtype, *, normalized: bool) -> None:
    """Check the dtype of images.

    Raises:
        RequestError: images cannot have it, or not if they are normalized.
    """
    if not isinstance(dtype, torch.dtype) or (dtype != torch.uint8 and not dtype.is_floating_point):
        raise RequestError(f"dtype must be torch.uint8 or a floating torch.dtype, not {dtype!r}.")
    if normalized and dtype == torch.uint8:
        raise RequestError("Normalized images cannot be uint8. Leave out normalize or dtype=torch.uint8.")


def scaled(images: torch.Tensor, dtype: torch.dtype, normalize: Normalization | None) -> torch.Tensor:
    """Stored images, uint8 ``[B, images, C, H, W]``, channels-last in memory, as ``BatchReader.read`` gives them."""
    if dtype == torch.uint8:
        return images
    out = torch.empty_like(images, dtype=dtype)
    _scale(images, out, _affine(normalize) if normalize else None)
    return out


def _affine(normalization: Normalization) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and then the shift of stored images: float32 ``[C]`` each."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in normalization)
    return (1 / (255 * std)).float(), (-mean / std).float()


def _scale(images: torch.Tensor, out: torch.Tensor, affine: tuple[torch.Tensor, torch.Tensor] | None) -> None:
    """Scale stored images to [0, 1], or normalize them, with one thread.

    A second thread that makes torch work in parallel starts a second team of OpenMP threads; with more threads than
    processors, the teams sleep between operations, and a concurrent training step took 1.7 times as long.
    """
    if out.dtype == torch.float32:
        _scale_float32(images, out, affine)
        return
    channels = images.shape[2]
    rows = (part.permute(0, 1, 3, 4, 2).reshape(-1, channels) for part in (images, out))
    for source, target in zip(*(torch.split(part, _PIECE // channels) for part in rows), strict=True):
        if affine is None:
            torch.mul(source, _SCALE, out=target)
        else:
            # In float32, and rounded once, as on every other device.
            torch.add(source * affine[0], affine[1], out=target)


def _scale_float32(images: torch.Tensor, out: torch.Tensor, affine: tuple[torch.Tensor, torch.Tensor] | None) -> None:
    """The same by NumPy, with the same rounding in half the time: converted first, then scaled in place."""
    count, channels, pixels = images.shape[0] * images.shape[1], images.shape[2], math.prod(images.shape[2:])
    source, target = (part.permute(0, 1, 3, 4, 2).reshape(count, pixels).numpy() for part in (images, out))
    scale, shift = _SCALE.numpy(), None
    if affine is not None:  # for colours a whole image of factors, because NumPy is slow on rows of three
        scale, shift = (np.tile(values.numpy(), pixels // channels if channels > 1 else 1) for values in affine)
    step = max(1, _BLOCK // pixels)
    for first in range(0, count, step):
        some = target[first : first + step]
        np.copyto(some, source[first : first + step])
        np.multiply(some, scale, out=some)
        if shift is not None:
            np.add(some, shift, out=some)


_PIECE = (1 << 15) - 1  # elements; torch uses several threads from 2**15 on
_BLOCK = 1 << 17  # elements that stay in a processor's cache while they are scaled

# Images are multiplied in float32 and then rounded to the dtype, because devices divide differently but multiply alike.
# This is a tensor because a plain number would have torch's default dtype, which users can set.
_SCALE = torch.tensor(1 / 255, dtype=torch.float32)
