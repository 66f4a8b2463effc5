"""Streams on a device: read ahead in a background thread, copied while the consumer computes.

The thread fills a small ring of pinned buffers, and copies each to the device on a CUDA stream of its own; images are
copied as uint8, a quarter of their float32 size, and scaled there. The consumer's CUDA stream waits for the copy on
the device. The CPU waits only for work that is two meta-batches old: if it ran ahead further, the memory of every
meta-batch under way would stay in use.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol

import torch

from mamldata.errors import RequestError
from mamldata.sources.source import EpisodeInfo
from mamldata.streaming.batch import BatchReader, EpisodeBatch, Stored
from mamldata.streaming.transforms import Transforms

_Item = tuple[int, EpisodeBatch, "torch.cuda.Event | None"]

_NOT_IN_A_LOADER = (
    "A DataLoader takes the stream itself, not the result of .to(device): write DataLoader(stream, batch_size=None), "
    "or use no DataLoader, because stream.to(device) reads ahead by itself."
)

_PATIENCE = 1  # seconds that the end of a loop waits for a running read


class Passes(Protocol):
    """What read-ahead needs of a stream; ``EpisodeStream`` documents each member."""

    next_batch: int

    @property
    def info(self) -> EpisodeInfo:
        """What the episodes are."""
        ...

    def class_names(self, batch: EpisodeBatch) -> list[list[str]]:
        """The names of each episode's classes."""
        ...

    def __len__(self) -> int: ...

    def reader(self, device: torch.device) -> BatchReader:
        """The reader of the meta-batches."""
        ...

    def transforms(self, device: torch.device) -> Transforms | None:
        """What the consumer's thread does with the meta-batches of the reader."""
        ...

    def start_pass(self) -> range:
        """The meta-batches of the pass that starts now."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        ...


class DeviceStream:
    """The result of ``EpisodeStream.to(device)``: the same meta-batches, read ahead and on the device.

    Its state counts the meta-batches that were yielded, not those that were read ahead.

    Args:
        stream: the stream.
        device: where its meta-batches go.
        prefetch: how many meta-batches to read ahead, at least 1.

    Raises:
        RequestError: ``device`` is a GPU that torch does not find; or ``prefetch`` is less than 1.
    """

    def __init__(self, stream: Passes, device: torch.device, prefetch: int = 2) -> None:
        if prefetch < 1:
            raise RequestError(f"prefetch must be at least 1, not {prefetch}.")
        if device.type == "cuda":
            _require_gpu(device)
        self.stream = stream
        # The current GPU is set for each thread, and another thread reads ahead.
        self.device = torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
        self.prefetch = prefetch
        self._transfer: Callable[[int], _Item] | None = None  # kept to reuse its memory
        self._left: threading.Thread | None = None  # still reading for a pass that was broken off

    @property
    def info(self) -> EpisodeInfo:
        """What the episodes are."""
        return self.stream.info

    def __repr__(self) -> str:
        return f"<DeviceStream: {self.stream!r} on {self.device}>"

    def class_names(self, batch: EpisodeBatch) -> list[list[str]]:
        """The names of each episode's classes; see ``EpisodeStream.class_names``."""
        return self.stream.class_names(batch)

    def __len__(self) -> int:
        try:
            return len(self.stream)
        except TypeError as error:  # a DataLoader asks for the length first
            raise TypeError(f"{error} {_NOT_IN_A_LOADER}") from None

    def __getitem__(self, index: object) -> NoReturn:
        """Refuse a DataLoader, which takes this for a map-style dataset.

        Raises:
            RequestError: always.
        """
        raise RequestError(_NOT_IN_A_LOADER)

    def state_dict(self) -> dict[str, Any]:
        """The consumer's position; see ``EpisodeStream.state_dict``."""
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at exactly the next meta-batch; see ``EpisodeStream.load_state_dict``."""
        self.stream.load_state_dict(state)

    def __iter__(self) -> Iterator[EpisodeBatch]:
        if self._left is not None:
            self._left.join()  # sources are for one thread at a time
        ready: queue.Queue[_Item | BaseException | None] = queue.Queue(maxsize=self.prefetch)
        transforms = self.stream.transforms(self.device)
        earlier: torch.cuda.Event | None = None
        stop = threading.Event()
        work = threading.Thread(
            target=self._read_ahead,
            args=(self.stream.start_pass(), ready, stop),
            name="mamldata-read-ahead",
            daemon=True,
        )
        work.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                t, batch, copied = item
                if copied is not None:
                    earlier = _hand_over(batch, copied, self.device, earlier)
                if transforms is not None:
                    batch = transforms(t, batch)
                self.stream.next_batch = t + 1
                # Keep no reference to a meta-batch that the consumer has dropped: its memory is reused.
                del item
                yield batch
                del batch
        finally:
            stop.set()
            # The emptied queue has room for the batch being read, but a silent server may delay that read for long.
            _empty(ready)
            work.join(_PATIENCE)
            self._left = work if work.is_alive() else None

    def _read_ahead(
        self, batches: range, ready: queue.Queue[_Item | BaseException | None], stop: threading.Event
    ) -> None:
        """The background thread: batches, an error and the end all go through the queue."""
        try:
            if self._transfer is None:
                self._transfer = self._make_transfer()
            transfer = self._transfer
            for t in batches:
                ready.put(transfer(t))
                if stop.is_set():
                    return
        except BaseException as error:  # raised again where the consumer waits
            ready.put(error)
        else:
            ready.put(None)

    def _make_transfer(self) -> Callable[[int], _Item]:
        """A function that reads meta-batch ``t`` and puts it on the device."""
        device = self.device
        reader = self.stream.reader(device)
        if device.type == "cuda":
            return _PinnedRing(reader, device, self.prefetch + 1)
        if device.type == "cpu":
            return lambda t: (t, reader.read(t), None)
        return lambda t: (t, reader.finish(reader.read_stored(t).to(device)), None)


class _PinnedRing:
    """Page-locked buffers used in turn, each copied to the device on the CUDA stream for copies."""

    def __init__(self, reader: BatchReader, device: torch.device, slots: int) -> None:
        self.reader = reader
        self.device = device
        self.copies = _copy_stream(device)
        self._one_at_a_time = threading.Lock()  # two passes may read at once
        # In memory images are [B, images, H, W, C]; as tensors they are permuted to [B, images, C, H, W].
        memory = [
            [torch.empty(shape, dtype=torch.uint8, pin_memory=True) for shape in reader.shapes] for _ in range(slots)
        ]
        self.memory = [[part.view(-1).numpy() for part in parts] for parts in memory]
        self.slots = [
            Stored(
                parts[0].permute(0, 1, 4, 2, 3),
                parts[1].permute(0, 1, 4, 2, 3),
                torch.empty(reader.batch_size, dtype=torch.int64, pin_memory=True),
            )
            for parts in memory
        ]
        self.copied: list[torch.cuda.Event | None] = [None] * slots

    def __call__(self, t: int) -> _Item:
        with self._one_at_a_time:
            return self._transfer(t)

    def _transfer(self, t: int) -> _Item:
        slot = t % len(self.slots)
        if (earlier := self.copied[slot]) is not None:
            earlier.synchronize()  # only this thread waits, until the buffer may be written to again
        index = self.reader.indices(t)
        self.reader.look_ahead(t)
        self.reader.source.read(index, *self.memory[slot])
        support, query, places, _ = self.slots[slot]
        count = len(index)
        pinned = Stored(support[:count], query[:count], places[:count], self.reader.source.query_counts(index))
        pinned.index.numpy()[:] = index
        with torch.cuda.stream(self.copies):
            stored = pinned.to(self.device, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            copied.record(self.copies)
            batch = self.reader.finish(stored)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self.copies)
        self.copied[slot] = copied
        return t, batch, done


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The CUDA stream for copies to a GPU, one for the whole process.

    torch's allocator keeps the freed memory of each CUDA stream for that stream, so each further one would hold on to
    the meta-batches of a pass.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _hand_over(
    batch: EpisodeBatch, done: torch.cuda.Event, device: torch.device, earlier: torch.cuda.Event | None
) -> torch.cuda.Event:
    """Make the consumer's CUDA stream wait for the copy, on the device, and keep the memory until it has run.

    Args:
        batch: for the consumer.
        done: the end of its copy.
        device: of the batch.
        earlier: the result of the last call. The CPU waits for it, so that it is at most two meta-batches ahead of
            the device.

    Returns:
        The end of all work that the consumer has asked for so far.
    """
    if earlier is not None:
        earlier.synchronize()
    consumer = torch.cuda.current_stream(device)
    asked = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # the CPU sleeps while it waits
    asked.record(consumer)
    consumer.wait_event(done)
    for tensor in batch:
        tensor.record_stream(consumer)
    return asked


def _require_gpu(device: torch.device) -> None:
    """Check that torch finds this GPU.

    Raises:
        RequestError: there is not; the message says why.
    """
    if not torch.cuda.is_available():
        raise RequestError(f"There is no device {device}: torch finds no GPU. Use 'cpu'.{why_no_gpu()}")
    if (device.index or 0) >= (count := torch.cuda.device_count()):
        raise RequestError(f"There is no device {device}: the last GPU that torch finds is cuda:{count - 1}.")


def why_no_gpu() -> str:
    """`` torch: <its reason>`` where it finds no GPU, such as a driver that is missing or too old."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return f" torch: {str(error).strip().splitlines()[0]}"
    return ""


def _empty(ready: queue.Queue[Any]) -> None:
    try:
        while True:
            ready.get_nowait()
    except queue.Empty:
        pass
