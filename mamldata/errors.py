"""Every error that a user can cause or meet, each with the exit code that the command line gives it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the nearest of the known words, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


class MamldataError(Exception):
    """Something failed that a user can understand and mend. The message says what, where and how."""

    exit_code = 1


class RequestError(MamldataError):
    """The request itself cannot be met as written (unknown name, impossible episode, not an archive)."""

    exit_code = 2


class ManifestError(RequestError):
    """A manifest with faults, all of them reported at once.

    Args:
        source: the manifest's file, as the user knows it.
        faults: one line each, ``place: what is wrong``.
    """

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        self.source = source
        self.faults = tuple(faults)
        noun = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(f"{source} has {noun}:\n" + "\n".join(f"  {fault}" for fault in self.faults))


class DataMissingError(MamldataError):
    """Data that must be fetched or built first; the message names the command."""


class FetchError(MamldataError):
    """A file could not be had from any of its sources, or what came was not the file."""


class DamagedError(MamldataError):
    """Bytes on disk that are not what they were when they were written."""


class WriteError(MamldataError):
    """A place that cannot be written to (permissions, a full disk, something else in the way)."""


class DivergedError(MamldataError):
    """Training whose loss or gradient is not finite any more."""


class StoppedError(MamldataError):
    """A signal asked a run to stop: what it has is saved, and it can go on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: not done, try again


class PeerError(MamldataError):
    """Another process of the same job failed, and says itself what happened.

    Args:
        rank: of that process.
        message: what it says.
        exit_code: that it ends with.
    """

    def __init__(self, rank: int, message: str, exit_code: int = 1) -> None:
        self.exit_code = exit_code
        super().__init__(f"The process of rank {rank} failed: {message}")


class LostPeerError(MamldataError):
    """Another process of the same job is gone without a word."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a dataset's raw files.

    Attributes:
        kind: ``table`` (a split file), ``class`` (in two splits), ``layout``, ``missing`` or ``image``.
        text: file and place, and what is wrong.
    """

    kind: str
    text: str

    @property
    def of_one_image(self) -> bool:
        """Whether it concerns a single image, which a manifest may say to leave out."""
        return self.kind in {"missing", "image"}


Report = Callable[[Fault], object]


class DatasetError(DamagedError):
    """Raw files that do not fit together, or images that cannot be read: all faults at once.

    Args:
        dataset: its name.
        faults: in the order in which they are shown; of each kind the first ones are.
        advice: how to mend them.
    """

    def __init__(self, dataset: str, faults: Sequence[Fault], advice: str) -> None:
        self.faults = tuple(faults)
        noun = "1 fault" if len(self.faults) == 1 else f"{len(self.faults):,} faults"
        super().__init__("\n".join([f"{dataset} has {noun}:", *_shown(self.faults), advice]))


_MOST_SHOWN = 20  # of one kind


def _shown(faults: Sequence[Fault]) -> Iterator[str]:
    for kind in dict.fromkeys(fault.kind for fault in faults):
        alike = [fault for fault in faults if fault.kind == kind]
        yield from (f"  {fault.text}" for fault in alike[:_MOST_SHOWN])
        if len(alike) > _MOST_SHOWN:
            yield f"  … and {len(alike) - _MOST_SHOWN:,} more like these"
