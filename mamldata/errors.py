"""Every error that a user can cause or meet, each with the exit code that the command line gives it."""

from __future__ import annotations

from collections.abc import Sequence


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
