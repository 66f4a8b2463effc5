"""Archives at an address: ``https://``, ``s3://``, or any that fsspec reads. Nothing is used before it is verified.

A shard is downloaded whole into a folder on this machine, hashed, and only then renamed to its final name; from then
on it is memory-mapped like a local one. It is not parsed as a tar while it arrives: its first episode can be trusted
only when its last byte is hashed, and by then the whole file is here.
Shards are hashed as they arrive, several at once, each in a thread: receiving, hashing and writing release the GIL.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import requests

from mamldata.archive.index import (
    INDEX,
    INDEX_SUM,
    MOST_INDEX_BYTES,
    MOST_SUM_BYTES,
    AnyShard,
    Archive,
    index_sum,
    parse_archive,
)
from mamldata.errors import DamagedError, FetchError, WriteError
from mamldata.fetching.http import (
    GaveUpError,
    Network,
    Part,
    SourceError,
    UnusableRangeError,
    Writable,
    keep_trying,
    open_session,
    transfer,
)
from mamldata.io.atomic import (
    commit,
    file_version,
    locked,
    locked_if_free,
    make_folder,
    open_regular,
    write_atomic,
    writing,
)
from mamldata.io.digest import canonical_json, chunks, sha256_bytes, sha256_file
from mamldata.io.scratch import scratch
from mamldata.io.urls import is_http, join, require_address, shown_cause, shown_error, shown_place

_log = logging.getLogger(__name__)  # by default Python shows its warnings on stderr
Opened = TypeVar("Opened")

_REMEDY = "Check the address and the network, and try again."
WRONG_COPY = "The copy at that address is damaged, or of another archive: tell its maintainer."
_OWN = re.compile(r"[0-9a-f]{64}\.tar(\.part)?")  # names of a cache's files: shards, whole and partial
_TAG = b"""\
Signature: 8a477f597d28d172789f06886806bc55
# Shards of episode archives, fetched by mamldata, which removes the oldest ones where it is given a bound.
# Everything here can be fetched again. See https://bford.info/cachedir/
"""


def read_remote_archive(url: str, network: Network | None = None) -> Archive:
    """Read ``archive.json`` at an address and check it against ``archive.json.sha256``.

    Raises:
        RequestError: the address is of a kind that cannot be read.
        FetchError: one of the two files could not be fetched.
        DamagedError: ``archive.json`` is damaged.
    """
    require_address(url)
    shown = shown_place(join(url, INDEX))
    with scratch() as place:
        found = []
        for name, bound in ((INDEX, MOST_INDEX_BYTES), (INDEX_SUM, MOST_SUM_BYTES)):
            path = place / name
            _obtain(join(url, name), Part(path), path, bound, lambda: None, network or Network(), lasting=False)
            found.append(path.read_bytes())
    data, digest = found
    if digest != index_sum(sha256_bytes(data)):
        raise DamagedError(f"{shown} is damaged: its sha256 is {sha256_bytes(data)}, unlike in {INDEX_SUM}.")
    try:
        return parse_archive(data)
    except DamagedError as error:
        raise DamagedError(f"{shown}: {error}") from error


@dataclass(frozen=True)
class ShardCache:
    """Shards in a folder, each named by its SHA-256, so that processes and archives can share it.

    They are in a subfolder of their own (``own``). The folder may hold other files too, which are never removed.

    A shard is hashed as it arrives. A record beside it says which version of the file had the right digest; a shard
    without a record, or of another version, is hashed when it is next opened.

    Attributes:
        folder: the parent of that subfolder.
        bytes: upper bound in bytes on cached shards and abandoned partial downloads, except those that other processes
            are fetching or opening; the least recently used go first. None: no bound.
        network: timeouts and retries.
        lasting: whether the folder outlives the process: shards are then flushed to disk before they are renamed.

    Raises:
        WriteError: the folder cannot be created.
    """

    folder: Path
    bytes: int | None = None
    network: Network = field(default_factory=Network)
    lasting: bool = True
    _coming: dict[tuple[int, Path], int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        make_folder(self.own)
        tag = self.own / "CACHEDIR.TAG"
        if self.lasting and not tag.exists():
            with writing(tag):
                tag.write_bytes(_TAG)

    @property
    def own(self) -> Path:
        """The subfolder that only the cache uses."""
        return self.folder / "mamldata-shards"

    def path(self, shard: AnyShard) -> Path:
        """Where a shard is, once it has been fetched."""
        return self.own / f"{shard.sha256}.tar"

    def get(self, url: str, shard: AnyShard) -> Path:
        """A shard's file, if no other process uses the cache; see ``open``."""
        return self.open(url, shard, Path)

    def open(self, url: str, shard: AnyShard, opener: Callable[[Path], Opened]) -> Opened:
        """Open a shard's file; if it is missing, one process at a time fetches and verifies it first.

        Args:
            url: the shard's address.
            shard: what ``archive.json`` says of it.
            opener: maps the file at a path. No process removes the file until it returns; a map stays valid after that.

        Raises:
            FetchError: it could not be fetched; the next try continues from the bytes received so far.
            WriteError: the folder cannot be written to.
            DamagedError: ``opener`` refused the shard, even after it was fetched again.
        """
        path = self.path(shard)
        with locked(path.with_suffix(".lock")):
            if path.is_file():
                if _is_sound(path, shard):
                    with suppress(OSError):  # without a record, shards are evicted in the order in which they arrived
                        os.utime(_record(path))
                    with suppress(DamagedError):  # a disk can corrupt bytes and keep the dates; verify=True notices
                        return opener(path)
                _log.warning("%s is damaged; it is fetched again", path)
                with writing(path):
                    path.unlink(missing_ok=True)
            part = _HashedPart(path)
            with self._room(path, shard.bytes):
                check = partial(_require_digest, part, shard)
                _obtain(url, part, path, shard.bytes, check, self.network, lasting=self.lasting)
            _note_sound(path)
            return opener(path)

    @contextmanager
    def _room(self, path: Path, need: int) -> Iterator[None]:
        """Make room for a shard, and for those that other threads of this process are fetching."""
        if self.bytes is None:
            yield
            return
        ours = os.getpid()  # a forked process has a copy of its parent's entries
        with locked(self.own / ".room.lock"):
            self._coming[ours, path] = need
            self._evict_oldest(ours)
        try:
            yield
        finally:
            with locked(self.own / ".room.lock"):  # again: other processes have fetched shards meanwhile
                del self._coming[ours, path]
                self._evict_oldest(ours)

    def _evict_oldest(self, process: int) -> None:
        """Remove the least recently used shards until those here, and those that a process fetches, fit."""
        assert self.bytes is not None
        coming = {part: size for (pid, part), size in list(self._coming.items()) if pid == process}
        files = sorted(_evictable(self.own, coming))
        here = {found for _, _, found in files}
        total = sum(size for _, size, _ in files)
        total += sum(size for part, size in coming.items() if part not in here)
        for _, size, found in files:
            if total <= self.bytes:
                break
            if _evict(found):
                total -= size


def _evictable(own: Path, coming: Container[Path]) -> Iterator[tuple[int, int, Path]]:
    """Last use (in ns), size in bytes and path of each shard, and of each partial one that no process is fetching."""
    for found in own.iterdir():
        if not _OWN.fullmatch(found.name):
            continue
        final = own / found.name.removesuffix(".part")
        with suppress(FileNotFoundError):  # another process has just renamed or removed it
            if not found.is_file():
                continue  # such as a folder of that name, or a link in a circle
            if found == final:
                known = _record(final) if _record(final).exists() else final
                yield known.stat().st_mtime_ns, final.stat().st_size, final
            elif final not in coming:
                with locked_if_free(final.with_suffix(".lock")) as free:
                    status = found.stat()
                if free:
                    yield status.st_mtime_ns, status.st_size, found


def _evict(found: Path) -> bool:
    """Remove a shard or a partial one, unless a process is fetching or opening it; returns whether it is gone."""
    final = found.with_name(found.name.removesuffix(".part"))
    with locked_if_free(final.with_suffix(".lock")) as free:
        if free:
            with writing(final):
                for path in (final, _record(final)):
                    path.unlink(missing_ok=True)
            Part(final).drop()
        return free


def _record(path: Path) -> Path:
    """The file that says which version of a cached shard was hashed; its mtime is the shard's last use."""
    return path.with_suffix(".json")


def _version(path: Path) -> bytes:
    return canonical_json(file_version(path.stat())._asdict())


def _is_sound(path: Path, shard: AnyShard) -> bool:
    """Whether a cached shard has the right digest, by this user's record or by hashing it."""
    version = _version(path)
    with suppress(OSError), open_regular(_record(path)) as stream:
        if os.fstat(stream.fileno()).st_uid == os.geteuid() and stream.read(len(version) + 1) == version:
            return True
    if path.stat().st_size != shard.bytes or sha256_file(path) != shard.sha256:
        return False
    _note_sound(path, version)
    return True


def _note_sound(path: Path, version: bytes | None = None) -> None:
    """Record that a version of a shard (None: the current one) has the right digest."""
    with suppress(WriteError):  # without a record it is hashed again
        write_atomic(_record(path), version or _version(path), lasting=False)


class _HashedPart(Part):
    """A partial file that is hashed as its bytes arrive."""

    def __init__(self, final: Path) -> None:
        super().__init__(final)
        self._digest, self._hashed = hashlib.sha256(), 0

    @contextmanager
    def writer(self, offset: int) -> Iterator[Writable]:
        """As ``Part.writer``."""
        if offset != self._hashed:
            self._digest, self._hashed = hashlib.sha256(), 0
            if offset:
                self._hash_what_there_is()
        with super().writer(offset) as stream:
            yield _Hashing(stream, self._add)

    def sha256(self) -> str:
        """The SHA-256 of the bytes so far, in hex."""
        if self._hashed != self.size:  # fetched by another process, or cut short by a full disk
            self._digest, self._hashed = hashlib.sha256(), 0
            self._hash_what_there_is()
        return self._digest.hexdigest()

    def _hash_what_there_is(self) -> None:
        with self.path.open("rb") as stream:
            for chunk in chunks(stream):
                self._add(chunk)

    def _add(self, data: bytes) -> None:
        self._digest.update(data)
        self._hashed += len(data)


@dataclass(frozen=True)
class _Hashing:
    """A stream that passes on the bytes that it has written."""

    stream: Writable
    wrote: Callable[[bytes], object]

    def write(self, data: bytes, /) -> None:
        self.stream.write(data)
        self.wrote(data)


def _obtain(
    url: str, part: Part, final: Path, bound: int, check: Callable[[], object], network: Network, *, lasting: bool
) -> None:
    """Fetch a file, continuing after a broken connection; check it, and rename it.

    Args:
        url: its address.
        part: the bytes so far.
        final: its path, which the caller must have locked.
        bound: upper bound on its length, in bytes.
        check: raises ``SourceError`` if the whole file is the wrong one; it is then fetched again.
        network: timeouts and retries.
        lasting: whether to flush it to disk.

    Raises:
        FetchError: it could not be fetched.
        WriteError: the place cannot be written to.
    """

    def attempt(source: str) -> None:
        try:
            _attempt(source, part, bound, network)
            check()
        except SourceError as error:
            error.final |= error.refused  # there is no other source
            raise

    try:
        keep_trying([url], attempt, part, network, _log.warning)
    except GaveUpError as error:
        reason = error.failures[url]
        remedy = WRONG_COPY if reason.wrong else _REMEDY
        raise FetchError(f"{shown_place(url)} could not be fetched: {reason}. {remedy}") from reason
    with writing(final):
        commit(final, lasting=lasting)
    part.forget()


@lru_cache(maxsize=1)
def _session(process: int) -> requests.Session:  # noqa: ARG001  # a child must not use its parent's connections
    """The session of this process, whose connections are reused from shard to shard."""
    return open_session()


def _attempt(url: str, part: Part, bound: int, network: Network) -> None:
    """Try once, starting after the bytes so far.

    Raises:
        SourceError: it failed.
    """
    if is_http(url):
        try:
            transfer(_session(os.getpid()), url, part, bound, network, lambda _: None)
        except UnusableRangeError:
            if part.size < bound:
                part.drop()
                raise
            # The file is whole already, so the server has no more bytes.
        return
    import fsspec

    had = min(part.size, bound)
    try:
        stream = fsspec.open(url, "rb").open()
    except Exception as error:  # each of fsspec's file systems has its own exceptions
        final = isinstance(error, FileNotFoundError | PermissionError)
        raise SourceError(f"it cannot be read ({shown_error(error, url)})", final=final) from shown_cause(error, url)
    with stream, part.writer(had) as target:
        for chunk in _remaining(stream, url, had):
            had += len(chunk)
            if had > bound:
                raise SourceError(f"it is longer than the allowed {bound:,} bytes", final=True)
            target.write(chunk)


def _remaining(stream: Any, url: str, start: int) -> Any:
    try:
        stream.seek(start)
        yield from chunks(stream)
    except Exception as error:  # as above
        raise SourceError(f"reading it failed ({shown_error(error, url)})") from shown_cause(error, url)


def _require_digest(part: _HashedPart, shard: AnyShard) -> None:
    """Check that a shard is whole and has the right digest; if the digest is wrong, it is removed.

    Raises:
        SourceError: it is cut off, or has another digest.
    """
    if part.size < shard.bytes:
        raise SourceError(f"it ended after {part.size:,} of {shard.bytes:,} bytes")
    if (got := part.sha256()) != shard.sha256:
        part.drop()
        raise SourceError(f"another file came: sha256 {got}, expected {shard.sha256}", wrong=True)
