"""Temporary folders that are removed even if the process that made them was killed: the next one clears them away.

A lock file in each is held by the process, and by those forked from it, for as long as the folder is in use. The
operating system frees the lock when they die, so a folder whose lock is free is used by nobody. A process number would
prove nothing, because containers that share ``TMPDIR`` have numbers of their own.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from mamldata.errors import WriteError
from mamldata.io.atomic import writing

_PREFIX = "mamldata-"
_LOCK = "lock"
_CONTENT = "content"
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine


class Scratch:
    """A temporary folder, empty at first. Stale ones of this user are removed when a process makes its first.

    Attributes:
        path: the folder.

    Raises:
        WriteError: it cannot be made.
    """

    def __init__(self) -> None:
        place = _place()
        _remove_stale(place)
        with writing(Path(place)):
            self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
            self._lock = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            # In this order: only the folder of a process that has had the lock counts as ours.
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            os.write(self._lock, _machine())
            self.path = self._folder / _CONTENT
            self.path.mkdir()

    def remove(self) -> None:
        """Remove the folder; threads that still write into it get an error."""
        with suppress(OSError):  # renamed, so that no thread makes a part of it again
            self.path.rename(self._folder / "gone")
        _remove(self._folder)
        os.close(self._lock)


def _place() -> str:
    """The folder of temporary folders.

    Raises:
        WriteError: none can be written to.
    """
    try:
        return tempfile.gettempdir()
    except OSError as error:
        raise WriteError(
            f"No temporary folder can be written to ({error.strerror}). Free space or file descriptors, or set TMPDIR."
        ) from error


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder for the time of a ``with`` block."""
    made = Scratch()
    try:
        yield made.path
    finally:
        made.remove()


def _machine() -> bytes:
    """What identifies this machine until it is started again. Others may not see its locks on a network file system."""
    try:
        return _BOOT.read_bytes()
    except OSError:  # not Linux
        return os.uname().nodename.encode()


@lru_cache(maxsize=1)  # once in a process
def _remove_stale(parent: str) -> None:
    with suppress(OSError):  # clearing up is no reason to fail: there may be too few file descriptors
        for folder in Path(parent).glob(f"{_PREFIX}*"):
            with suppress(OSError):  # of another user, gone already, or without a lock
                if folder.lstat().st_uid == os.geteuid():
                    _remove_if_free(folder)


def _remove_if_free(folder: Path) -> None:
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.read(lock, 1 << 10) == _machine():
            _remove(folder)
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a folder, its lock last, so that another process can finish this, which it does if this one cannot."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
