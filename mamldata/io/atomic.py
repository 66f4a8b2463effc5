"""Atomic writes: a file appears under its final name whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from filelock import FileLock, Timeout

from mamldata.errors import WriteError, enough_resources, system_problem

# Two changes within one tick of a file system's clock leave the same time; FAT's ticks are the longest.
_TICK_NS = 2_000_000_000


class FileVersion(NamedTuple):
    """What changes with a file's content, even if its mtime is set back: notes about a file hold while this is equal.

    Without the device, whose number changes with every mount of a network file system.
    """

    bytes: int
    inode: int
    mtime_ns: int
    ctime_ns: int

    def settled(self, now: int) -> bool:
        """Whether any change after ``now`` (ns) gives it another time (Git's "racy" rule)."""
        return max(self.mtime_ns, self.ctime_ns) + _TICK_NS < now


def file_version(status: os.stat_result) -> FileVersion:
    """The version of a file."""
    return FileVersion(status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file for reading. Never wait for the writer of a pipe or read a device, which may not end.

    Raises:
        OSError: ``open`` raised it, or the file is not a regular file.
        MamldataError: this process has too many files open.
    """
    with enough_resources():
        stream = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, NOT_REGULAR, str(path))
    return stream


def read_whole(path: Path, most_bytes: int) -> bytes:
    """The bytes of a regular file of at most ``most_bytes``.

    Raises:
        OSError: it cannot be read, is not a regular file, or is longer.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most_bytes:
            raise OSError(errno.EINVAL, f"{size:,} bytes, more than the limit of {most_bytes:,}", str(path))
        return stream.read(size)


NOT_REGULAR = "not a regular file"
MOST_NOTE = 1 << 24  # bytes of a receipt, a pin, a note, or a TOML file
MOST_TEXT = 1 << 26  # bytes of a list of classes or images: ImageNet's 1.28 million images take 40 MB


def temporary(path: Path) -> Path:
    """The name under which ``path`` is written before it is renamed. Hold a lock: only one process may write it."""
    return path.with_name(path.name + ".part")


def commit(path: Path, *, lasting: bool = True) -> None:
    """Rename the temporary file of ``path`` to ``path``; flush it to disk first if ``lasting``."""
    if lasting:
        publish(temporary(path), path)
    else:
        temporary(path).replace(path)


def publish(part: Path, path: Path) -> None:
    """Flush the file ``part`` to disk and rename it to ``path``, on the same file system."""
    with part.open("rb+") as stream:
        os.fsync(stream.fileno())
    part.replace(path)
    # Flush the rename too, so that an index never survives a power loss without the files that it names.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomic(path: Path, data: bytes, *, lasting: bool = True) -> None:
    """Write ``data`` to ``path`` through a temporary file and a rename; of several processes, one after the other.

    Args:
        path: the file.
        data: its new content.
        lasting: flush it to disk, so that it survives a power loss.

    Raises:
        WriteError: the file cannot be written.
    """
    with writing(path), _alone(temporary(path)) as stream:
        stream.write(data)
        stream.flush()
        commit(path, lasting=lasting)


@contextmanager
def _alone(part: Path) -> Iterator[IO[bytes]]:
    """Empty and open a temporary file, after other processes that write it have renamed it."""
    while True:
        with part.open("ab") as stream:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(stream, fcntl.LOCK_EX)
            try:
                renamed = not os.path.samestat(os.fstat(stream.fileno()), part.stat())
            except FileNotFoundError:
                renamed = True
            if not renamed:
                stream.truncate(0)
                yield stream
                return


_REFUSED = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.EIO,
}


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn errors of the operating system into one that names the file and the remedy.

    Raises:
        WriteError: no permission, a read-only or full disk, or a file or folder in the way.
    """
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise WriteError(
                f"No space left to write {place} ({error.strerror}). Free some space, or choose another "
                "folder, and run the same command again: finished work is kept."
            ) from error
        if error.errno in _REFUSED:
            raise WriteError(
                f"Cannot write {place} ({error.strerror}). Make the folder writable, or choose another one."
            ) from error
        if error.errno not in {None, errno.ENOENT}:  # callers notice themselves that a folder is gone
            raise WriteError(f"Cannot write {place}: {system_problem(error)}") from error
        raise


def require_space(path: Path, need: int) -> None:
    """Fail at once if a file does not fit on its disk, instead of after an hour.

    Args:
        path: the file.
        need: the bytes that are still to be written.

    Raises:
        WriteError: its disk has less free space.
    """
    free = shutil.disk_usage(path.parent).free
    if need > free:
        raise WriteError(
            f"{path.name} needs {need:,} more bytes in {path.parent}, where {free:,} are free. Free some space, or "
            "choose another data root."
        )


@contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """Hold a lock unless another process holds it; yields whether it was acquired.

    Raises:
        WriteError: the lock's file cannot be created.
    """
    lock = FileLock(path)
    with writing(path):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def locked(path: Path, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold a lock among processes; the operating system frees it when its holder dies.

    Args:
        path: the lock's file.
        waiting: called once if another process holds the lock.

    Raises:
        WriteError: the file cannot be created.
    """
    with ExitStack() as held:
        if not held.enter_context(locked_if_free(path)):
            waiting()
            with writing(path):
                held.enter_context(FileLock(path))
        yield


def make_folder(path: Path) -> None:
    """Create the folder ``path`` and its parents.

    Raises:
        WriteError: it cannot be created, or is a file.
    """
    with writing(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # such as below /proc, where no folder can be created
            raise PermissionError(errno.EPERM, error.strerror) from error
