"""Every error that a user can cause or meet, each with its exit code on the command line."""

from __future__ import annotations

import difflib
import errno
import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from mamldata.words import counted, printable, shortened


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the nearest known word, else an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


class MamldataError(Exception):
    """A failure that a user can understand and fix. The message says what is wrong, where, and how to fix it.

    Names in it may come from files and servers, so control characters are escaped, except the ends of lines.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message, keep="\n"))


class RequestError(MamldataError):
    """The request is invalid (unknown name, impossible episode, not an archive)."""

    exit_code = 2


class ImageShapeError(RequestError):
    """A network takes images of another size or number of channels; they can be fitted to it."""


class RunExistsError(RequestError):
    """The run folder holds a run already, and the request was not to resume it."""


class ManifestError(RequestError):
    """A manifest with faults, all reported at once.

    Args:
        source: the manifest's file, as shown to the user.
        faults: one line each, ``place: what is wrong``; the message has the first 20.
    """

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        self.source = source
        self.faults = tuple(faults)
        super().__init__("\n".join([f"{source} has {counted(len(self.faults), 'fault')}:", *_first(self.faults)]))


class DataMissingError(MamldataError):
    """Data must be fetched or built first; the message names the command."""


class FetchError(MamldataError):
    """A file could not be fetched from any of its sources, or the wrong file was received."""


class DamagedError(MamldataError):
    """Bytes on disk are not those that were written."""


class WriteError(MamldataError):
    """A place cannot be written to (permissions, a full disk, another file in the way)."""


class DivergedError(MamldataError):
    """The loss or gradient of a training run is no longer finite."""


class StoppedError(MamldataError):
    """A signal stopped a run, which has saved its state and can be resumed."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: not done, try again


class PeerError(MamldataError):
    """Another process of the same job failed, and reports the error itself.

    Args:
        rank: the rank of that process.
        message: its error message.
        exit_code: its exit code.
    """

    def __init__(self, rank: int, message: str, exit_code: int = 1) -> None:
        self.exit_code = exit_code
        super().__init__(f"The process of rank {rank} failed: {message}")


class LostPeerError(MamldataError):
    """Another process of the same job ended without reporting an error."""


def system_problem(error: OSError) -> str:
    """What the operating system refused, and how to mend it where that is known."""
    said = error.strerror or str(error) or type(error).__name__
    place = f" ({error.filename})" if error.filename is not None else ""
    if error.errno in _TOO_MANY:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"{said}{place}. This process may open {limit}; raise that, such as with: ulimit -n 4096"
    return f"{said}{place}."


_TOO_MANY = {errno.EMFILE, errno.ENFILE}


@contextmanager
def enough_resources() -> Iterator[None]:
    """Raise a ``MamldataError`` if the process may not open another file; other errors pass.

    Raises:
        MemoryError: it may map no more memory, which the system calls an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _TOO_MANY:
            raise MamldataError(system_problem(error)) from error
        if error.errno == errno.ENOMEM:
            raise MemoryError(str(error)) from error
        raise


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a dataset's raw files.

    Attributes:
        kind: ``table`` (a split file), ``class`` (in two splits), ``layout``, ``missing`` or ``image``.
        text: the file, the place in it, and what is wrong.
    """

    kind: str
    text: str

    @property
    def of_one_image(self) -> bool:
        """Whether it concerns a single image, which a manifest may leave out."""
        return self.kind in {"missing", "image"}


Report = Callable[[Fault], object]


class DatasetError(DamagedError):
    """Raw files do not fit together, or images cannot be read: all faults at once.

    Args:
        dataset: its name.
        faults: in the order shown; the message has the first 20 of each kind.
        advice: how to fix them.
    """

    def __init__(self, dataset: str, faults: Sequence[Fault], advice: str) -> None:
        self.faults = tuple(faults)
        shown = [
            line
            for kind in dict.fromkeys(fault.kind for fault in faults)
            for line in _first([fault.text for fault in faults if fault.kind == kind])
        ]
        super().__init__("\n".join([f"{dataset} has {counted(len(self.faults), 'fault')}:", *shown, advice]))


_MOST_SHOWN = 20  # of one kind


def _first(faults: Sequence[str]) -> Iterator[str]:
    """The lines of faults in a message. Each may quote a file, which may have words of any length."""
    yield from (f"  {shortened(fault)}" for fault in faults[:_MOST_SHOWN])
    if len(faults) > _MOST_SHOWN:
        yield f"  … and {len(faults) - _MOST_SHOWN:,} more like these"
