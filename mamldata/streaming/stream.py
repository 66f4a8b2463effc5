"""Stream meta-batches of episodes: ``for batch in EpisodeStream("omniglot-5w1s", batch_size=32).to("cuda")``."""

from __future__ import annotations

import mmap
import operator
import os
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.data import IterableDataset, get_worker_info

from mamldata.errors import RequestError
from mamldata.sampling.mixture import MixedOrder, require_weights
from mamldata.sampling.normalization import Normalization
from mamldata.sampling.order import Order
from mamldata.sources.mixed import MixedSource
from mamldata.sources.open import as_source
from mamldata.sources.remixed import RemixedSource
from mamldata.sources.source import EpisodeInfo, Source, in_words
from mamldata.streaming.batch import BatchReader, EpisodeBatch, require_dtype
from mamldata.streaming.device import DeviceStream
from mamldata.streaming.transforms import Transform, Transforms

_STATE_VERSION = 1
_WARNED = -1  # in place of a process id


class EpisodeStream(IterableDataset[EpisodeBatch]):
    """Meta-batches of episodes from an archive, or live from a bank.

    Each ``iter()`` is one epoch, starting with the first; live episodes never end. After ``load_state_dict`` the next
    ``iter()`` continues at exactly the next meta-batch instead.

    Args:
        source: the folder of an archive, its address (``https://…``, ``s3://…``), or a source such as
            ``mamldata.live("omniglot")``. Or a list of these: a mixture, which takes each meta-batch from one of them
            and never ends, see ``mamldata.sampling.mixture``. A list may also have streams, which give their source
            and order alone, so that each can have its own ``remix`` or ``cache_dir``.
        split: ``train`` (the default), ``val`` or ``test``.
        batch_size: episodes in a meta-batch.
        seed: of the order; equal seeds give equal orders on every machine.
        shuffle: a new permutation in each epoch, without the last ones if they fill no meta-batch. False: each episode
            once, in order. None: shuffled for the train split of an archive, in order otherwise.
        remix: form the episodes of each epoch again from the ways of all stored ones, for training on an archive;
            see ``mamldata.sources.remixed``.
        rank, world_size: this process and the number of processes, which share each meta-batch; its episodes do not
            depend on ``world_size``.
        dtype: ``torch.float32`` (or another floating type) for images in [0, 1], or ``torch.uint8`` as stored.
        normalize: subtract the train split's mean (``info.normalization``) from images in [0, 1] and divide by its
            deviation, channel by channel. Or a mean and deviation of your own, such as those that a network was
            trained with.
        normalise: the former spelling of ``normalize``.
        transform: augments support images, and query images unless ``query_transform`` says otherwise: a callable that
            takes an image ``[C, H, W]`` as ``dtype`` has it, on the stream's device and before it is normalized, and
            returns a tensor ``[C', H', W']``, such as those of torchvision v2; or ``mamldata.batched``, for a callable
            that takes several. Its random numbers are a function of ``seed``, the epoch and the episode.
        query_transform: the same of query images; None for none.
        weights: of a mixture, a number for each source, of which only the ratios count; None: all equal.
        n_way, k_shot, k_query: take only the first so many ways, support images and query images of each episode;
            None: all.
        verify: hash each shard when it is opened, which finds even one changed pixel.
        cache_dir: where the shards of an archive at an address are kept; None: four of them in a temporary folder.
        cache_bytes: upper bound on the bytes there, see ``mamldata.archive.remote.ShardCache``; None: no bound.

    Raises:
        RequestError: the source or an argument is invalid.
        FetchError: a file at an address could not be fetched.
        DamagedError: the archive is damaged; the message names the shard and the episode.
    """

    def __init__(
        self,
        source: Source | str | os.PathLike[str] | list[Any] | tuple[Any, ...],
        split: str | None = None,
        batch_size: int = 1,
        seed: int = 0,
        *,
        weights: Sequence[float] | None = None,
        shuffle: bool | None = None,
        remix: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype = torch.float32,
        normalize: bool | Normalization = False,
        normalise: bool | Normalization = False,
        transform: Transform | None = None,
        query_transform: Transform | Literal["same"] | None = "same",
        n_way: int | None = None,
        k_shot: int | None = None,
        k_query: int | None = None,
        verify: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        super().__init__()
        normalize = normalize or normalise
        require_dtype(dtype, normalized=bool(normalize))
        try:
            batch_size = operator.index(batch_size)  # NumPy's integers are accepted too
        except TypeError as error:
            raise RequestError(f"batch_size must be a whole number, not {batch_size!r}.") from error
        if not 0 <= rank < world_size <= max(batch_size, 1):
            raise RequestError(
                f"rank {rank} of {world_size} cannot share a meta-batch of {batch_size}: ranks count from 0, and "
                "each needs at least one episode."
            )
        take: dict[str, Any] = {"n_way": n_way, "k_shot": k_shot, "k_query": k_query}
        place: dict[str, Any] = {"verify": verify, "cache_dir": cache_dir, "cache_bytes": cache_bytes}
        self.source: Source
        self.order: Order
        if isinstance(source, list | tuple):
            weights = require_weights(weights, len(source))
            part = partial(EpisodeStream, split=split, batch_size=batch_size, seed=seed, shuffle=shuffle, remix=remix)
            parts = [one if isinstance(one, EpisodeStream) else part(one, **take, **place) for one in source]
            self.source = MixedSource([part.source for part in parts], weights)
            orders = tuple(part.order for part in parts)
            self.order = MixedOrder(None, batch_size, False, seed, parts=orders, weights=weights)
        elif weights is not None:
            raise RequestError("weights are for a mixture: give a list of sources.")
        else:
            self.source = as_source(source, split, **place)
            if any(number is not None for number in take.values()):
                self.source = _narrowed(self.source, **take)
            if remix:
                self.source = _remixed(self.source, seed, shuffle)
            if shuffle and self.source.episodes is None:
                raise RequestError("Episodes that never end are random already. Leave out shuffle.")
            if shuffle is None:
                shuffle = self.source.info.split == "train" and self.source.episodes is not None and not remix
            shards = (self.source.fetched_shards or None) if shuffle else None
            self.order = Order(self.source.episodes, batch_size, shuffle, seed, remix, shards)
        self.rank, self.world_size = rank, world_size
        self.dtype = dtype
        self.normalize = _normalisation(normalize, self.source.info)
        self._transform = _require_callable(transform, "transform")
        self._query_transform = transform if query_transform == "same" else query_transform
        _require_callable(self._query_transform, "query_transform")
        self.next_batch = 0
        self._resumed = False
        self._told: torch.Tensor | None = None  # the epoch that set_epoch set, in memory shared with workers
        self._heard = 0
        # The worker 0 that last began a pass: the process ids of its parent and of itself. Forked workers share an
        # anonymous mapping; when the tensor is sent to spawned ones, torch moves it to memory that they share.
        self._begun = torch.frombuffer(mmap.mmap(-1, 16), dtype=torch.int64)
        self._reader: BatchReader | None = None  # kept to reuse its memory

    def __repr__(self) -> str:
        return f"<EpisodeStream: {in_words(self.source)}, in meta-batches of {self.order.batch_size}>"

    @property
    def info(self) -> EpisodeInfo:
        """What the episodes are."""
        return self.source.info

    def class_names(self, batch: EpisodeBatch) -> list[list[str]]:
        """The names of each episode's classes, by label: ``class_names(batch)[b][label]``."""
        table = self.source.table
        return [[table.label(one) for one in row] for row in self.source.classes(batch.index.cpu().numpy()).tolist()]

    def __len__(self) -> int:
        """Meta-batches in an epoch.

        Raises:
            TypeError: live episodes never end.
        """
        if self.order.batches_per_epoch is None:
            raise TypeError("This stream never ends, so it has no length.")
        return self.order.batches_per_epoch

    def __iter__(self) -> Iterator[EpisodeBatch]:
        return _Pass(self)

    def reader(self, device: torch.device) -> BatchReader:
        """A reader of this rank's part of the meta-batches, for a device; they are still to be transformed."""
        normalize = self.normalize if self.transforms(device) is None else None
        return BatchReader(self.source, self.order, self.dtype, device, self.rank, self.world_size, normalize=normalize)

    def transforms(self, device: torch.device) -> Transforms | None:
        """The transforms of what the reader gives, for the consumer's thread; None if there are none."""
        if self._transform is None and self._query_transform is None:
            return None
        return Transforms(
            self._transform,
            self._query_transform,
            self.order,
            device,
            self.rank,
            self.world_size,
            normalize=self.normalize,
        )

    def start_pass(self) -> range:
        """The meta-batches of the pass that starts now, counted through all epochs."""
        per_epoch = self.order.batches_per_epoch
        if per_epoch is None:
            return range(self.next_batch, 2**62)
        if self._told is not None and (told := self._told.tolist())[0] != self._heard:
            # A persistent worker has a copy of the stream from before set_epoch was called.
            (self._heard, self.next_batch), self._resumed = told, False
        if not self._resumed:
            # An epoch that was broken off is not resumed: the next one is whole.
            self.next_batch = -(-self.next_batch // per_epoch) * per_epoch
        self._resumed = False
        return range(self.next_batch, (self.next_batch // per_epoch + 1) * per_epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass, as in torch's distributed samplers.

        A ``DataLoader`` with workers needs this before each epoch, including the first, because its workers iterate
        over copies, which ``persistent_workers`` keeps. If it is never called, workers that repeat an epoch warn.

        Raises:
            RequestError: the stream never ends, so it has no epochs.
        """
        if self.order.batches_per_epoch is None:
            raise RequestError("This stream never ends, so it has no epochs to set.")
        self.next_batch = epoch * self.order.batches_per_epoch
        self._resumed = False
        if self._told is None:
            self._told = torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._heard += 1
        self._told.copy_(torch.tensor([self._heard, self.next_batch]))

    def to(self, device: torch.device | str, *, prefetch: int = 2) -> DeviceStream:
        """The same stream, read ahead by a background thread and put on a device.

        Args:
            device: such as ``"cuda"``; ``"cpu"`` works the same way, without pinned memory.
            prefetch: how many meta-batches to read ahead, at least 1.

        Raises:
            RequestError: there is no such device, or ``prefetch`` is less than 1.
        """
        try:
            place = torch.device(device)
        except RuntimeError as error:
            raise RequestError(f"There is no device {device!r}. Use 'cuda', 'cuda:1', 'mps' or 'cpu'.") from error
        return DeviceStream(self, place, prefetch)

    def state_dict(self) -> dict[str, Any]:
        """The stream's position: plain numbers and strings, valid for any number of workers and ranks.

        It counts the meta-batches that this object yielded, not those that a ``DataLoader`` with workers takes from
        copies of it. With workers, set ``next_batch`` in the returned dict to the number of meta-batches so far, or
        save the state of torchdata's ``StatefulDataLoader``, which asks the copies.
        """
        return {"version": _STATE_VERSION, "next_batch": self.next_batch, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at exactly the next meta-batch.

        Raises:
            RequestError: the state is of a stream with another source or order; the message lists every difference.
        """
        expected = {"version": _STATE_VERSION, **self._identity()}
        different = [
            f"{key}: {state.get(key)!r} saved, {value!r} here"
            for key, value in expected.items()
            if state.get(key) != value
        ]
        position = state.get("next_batch")
        if not isinstance(position, int) or position < 0:
            different.append(f"next_batch: {position!r} is not a whole number from 0")
        if different:
            raise RequestError("The saved state is of another stream:\n  " + "\n  ".join(different))
        self.next_batch = state["next_batch"]
        self._resumed = True
        if get_worker_info() is None:  # workers that start from here do not repeat an epoch
            self._begun.zero_()

    def _identity(self) -> dict[str, Any]:
        return {**self.order.identity(), **self.info.identity()}


class _Pass(Iterator[EpisodeBatch]):
    """One pass over a stream: all of it, or, in a worker process of a ``DataLoader``, this worker's share.

    torchdata's ``StatefulDataLoader`` saves and loads, in each worker, the stream's state and then that of the pass.
    """

    def __init__(self, stream: EpisodeStream) -> None:
        self._stream = stream
        stream._reader = self._reader = stream._reader or stream.reader(torch.device("cpu"))
        self._transforms = stream.transforms(torch.device("cpu"))
        self._in_worker = (worker := get_worker_info()) is not None
        # A DataLoader takes from its workers in turn, so striding keeps the order.
        self._worker, self._workers = (worker.id, worker.num_workers) if worker else (0, 1)
        self._left: range | None = None  # None: the pass has not begun
        self._failed = False

    def __next__(self) -> EpisodeBatch:
        left = self._begin()
        if self._failed or not left:
            raise StopIteration
        self._failed = True  # an error ends the pass, as it ends a generator
        batch = self._reader.read(left.start)
        if self._transforms is not None:
            batch = self._transforms(left.start, batch)
        self._failed = False
        self._stand_at(left.start + self._workers, left.stop)
        # A worker's tensors are sent through shared memory, which must not be written to again.
        return EpisodeBatch(*(tensor.clone() for tensor in batch)) if self._in_worker else batch

    def state_dict(self) -> dict[str, int]:
        """The position in the pass; the end of a pass differs from the beginning of the next one."""
        left = self._begin()
        return {"next_batch": left.start, "stop": left.stop, "worker": self._worker, "workers": self._workers}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at exactly this worker's next meta-batch. The stream's own state must be loaded first.

        Raises:
            RequestError: the state is of another worker, or of another number of workers.
        """
        worker, workers = state.get("worker"), state.get("workers")
        if (worker, workers) != (self._worker, self._workers):
            raise RequestError(
                f"The saved state is of worker {worker} of {workers}, and this is worker {self._worker} of "
                f"{self._workers}. Give the DataLoader num_workers={workers}, as when the state was saved."
            )
        self._stream.start_pass()  # the pass that the loaded one replaces
        self._stand_at(state["next_batch"], state["stop"])
        self._note_worker(loaded=True)

    def _begin(self) -> range:
        """The meta-batches that are left of this share, which is fixed from now on."""
        if self._left is None:
            whole = self._stream.start_pass()
            left = self._stand_at(whole.start + self._worker, whole.stop)
            self._note_worker()
            return left
        return self._left

    def _stand_at(self, t: int, stop: int) -> range:
        """Make ``t`` the next meta-batch of this share."""
        left = self._left = range(t, stop, self._workers)
        # Where all workers would begin a pass in which this one continues at t, but not beyond the end of its own.
        self._stream.next_batch = min(t - self._worker, stop)
        return left

    def _note_worker(self, *, loaded: bool = False) -> None:
        """Warn once if workers repeat what earlier ones read, because ``set_epoch`` was not called.

        Persistent workers know their epoch, and a loaded state says where to continue.
        """
        order, begun = self._stream.order, self._stream._begun
        same_each_time = order.episodes is not None and not order.shuffle and not order.remix
        if not self._in_worker or self._worker != 0 or same_each_time:
            return
        parent, earlier = begun.tolist()
        others = parent == os.getppid() and earlier != os.getpid()  # a copy in another parent is another stream
        if others and earlier == _WARNED:
            return
        repeats = others and not loaded and self._stream._told is None
        begun.copy_(torch.tensor([os.getppid(), _WARNED if repeats else os.getpid()]))
        if repeats:
            warnings.warn(_repetition(self._stream), stacklevel=2)


def _repetition(stream: EpisodeStream) -> str:
    place, when = f"meta-batch {stream.next_batch}", "each pass, with the number n of meta-batches before it"
    line = 'stream.load_state_dict(stream.state_dict() | {"next_batch": n})'
    if stream.order.batches_per_epoch is not None:
        place, when = f"epoch {stream.next_batch // stream.order.batches_per_epoch}", "each epoch"
        line = "stream.set_epoch(epoch)"
    return (
        f"The workers of this DataLoader begin at {place}, as the previous ones did: they iterate over copies of the "
        f"stream, which do not know what has been read. Write {line} before {when}."
    )


def _normalisation(asked: bool | Normalization, info: EpisodeInfo) -> Normalization | None:
    """The mean and deviation to normalize by.

    Raises:
        RequestError: they have another number of channels than the images, or a deviation is not above 0.
    """
    if not isinstance(asked, Normalization):
        return info.normalization if asked else None
    channels = info.image_shape[2]
    if {len(values) for values in asked} != {channels} or not all(value > 0 for value in asked.std):
        raise RequestError(
            f"normalize={asked} is invalid: it needs a mean and a deviation above 0 for each of the images' {channels} "
            "channels."
        )
    return asked


def _require_callable(transform: Transform | None, name: str) -> Transform | None:
    if transform is not None and not callable(transform):
        raise RequestError(f"{name} must be a callable that takes and returns images, not {transform!r}.")
    return transform


def _narrowed(source: Source, **numbers: int | None) -> Source:
    """The source's episodes with fewer ways or images.

    Raises:
        RequestError: the source cannot be narrowed, or has not so many.
    """
    if not hasattr(source, "narrowed"):
        raise RequestError(f"{', '.join(numbers)}: this source has episodes of one shape only.")
    narrowed: Source = source.narrowed(**numbers)
    return narrowed


def _remixed(source: Source, seed: int, shuffle: bool | None) -> RemixedSource:
    """The source's ways, mixed.

    Raises:
        RequestError: the source cannot be remixed, or not together with ``shuffle``.
    """
    pool = source.way_source
    if pool is None:
        if source.info.archive_sha256 is not None:
            raise RequestError("remix=True: the ways of these episodes have unequal numbers of queries.")
        raise RequestError("remix=True is for archives: live episodes never repeat, so there is nothing to remix.")
    if source.info.split != "train":
        raise RequestError(
            f"remix=True is for training; {source.info.split} is evaluated on the archive's own episodes."
        )
    if not pool.fits:
        raise RequestError(
            "remix=True takes ways from all shards at once. Give a cache_dir, with room for all shards of the split."
        )
    if shuffle is not None:
        raise RequestError("remix=True has its own order. Leave out shuffle.")
    return RemixedSource(pool, seed)
