"""Archives at an address: ``https://``, ``s3://``, or whatever fsspec names. Nothing is used before it is verified.

A shard is brought whole into a folder on this machine, hashed, and only then given its name there; from then on it
is memory-mapped like a local one. It is not parsed as a tar on the way: the first episode of a shard can be trusted
only when its last byte is hashed, and by then the file is here.
Shards are hashed as they come, several at once, each in a thread: receiving, hashing and writing let others run.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Self

import requests

from mamldata.ahead import Ahead
from mamldata.archive import (
    INDEX,
    INDEX_SUM,
    MOST_INDEX_BYTES,
    MOST_SUM_BYTES,
    Archive,
    Shard,
    index_sum,
    open_shard,
    parse_archive,
)
from mamldata.digest import chunks, sha256_bytes
from mamldata.download import (
    Network,
    Part,
    SourceError,
    UnusableRangeError,
    Writable,
    open_session,
    transfer,
)
from mamldata.errors import DamagedError, FetchError, RequestError
from mamldata.files import commit, locked, locked_if_free, make_folder, writing
from mamldata.places import is_http, join, require_address, shown_place
from mamldata.sources import Classes, StoredSource

_log = logging.getLogger(__name__)  # Python shows its warnings on stderr, unless the program has other wishes

_REMEDY = "Check the address and the network, and try again."
_REMEDY_WRONG = "The copy at that address is damaged, or of another archive: tell who keeps it."
_HEADWAY = 1 << 20  # bytes that make a try worth its while
_AHEAD = 2  # shards that are fetched while one is read from
_WINDOW = 2 + _AHEAD  # shards that are kept without a cache: the one in use, the one before, and the next ones


def read_remote_archive(url: str, network: Network | None = None) -> Archive:
    """Read ``archive.json`` at an address and check it against ``archive.json.sha256``.

    Raises:
        RequestError: the address is of a kind that cannot be read.
        FetchError: one of the two files could not be had.
        DamagedError: ``archive.json`` is not what was written.
    """
    require_address(url)
    shown = shown_place(join(url, INDEX))
    with tempfile.TemporaryDirectory(prefix="mamldata-") as place:
        found = []
        for name, bound in ((INDEX, MOST_INDEX_BYTES), (INDEX_SUM, MOST_SUM_BYTES)):
            path = Path(place) / name
            _obtain(join(url, name), Part(path), path, bound, lambda: None, network or Network(), lasting=False)
            found.append(path.read_bytes())
    data, digest = found
    if digest != index_sum(sha256_bytes(data)):
        raise DamagedError(f"{shown} is damaged: its sha256 is {sha256_bytes(data)}, which {INDEX_SUM} does not say.")
    try:
        return parse_archive(data)
    except DamagedError as error:
        raise DamagedError(f"{shown}: {error}") from error


@dataclass(frozen=True)
class ShardCache:
    """Shards in a folder, each named by its SHA-256, so that processes and archives can share it.

    Attributes:
        folder: where they are kept; it must be there.
        bytes: the most that they may take together, with what killed processes left of others, but for those that
            other processes fetch at this moment; the least recently used ones make room. None: no bound.
        network: how patient to be.
        lasting: whether the folder outlives the process: shards are then on the disk before they have their names.
    """

    folder: Path
    bytes: int | None = None
    network: Network = field(default_factory=Network)
    lasting: bool = True
    _coming: dict[tuple[int, Path], int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def get(self, url: str, shard: Shard) -> Path:
        """A shard's file; fetched and verified first if it is not there, by one process at a time.

        Raises:
            FetchError: it could not be had; what came is kept, and the next try goes on from there.
            WriteError: the folder cannot be written to.
        """
        path = self.folder / f"{shard.sha256}.tar"
        with locked(path.with_suffix(".lock")):
            if path.is_file():
                with suppress(OSError):  # its date is when it was used last; another process may have removed it
                    os.utime(path)
            else:
                part = _HashedPart(path)
                with self._room(path, shard.bytes):
                    check = partial(_require_digest, part, shard)
                    _obtain(url, part, path, shard.bytes, check, self.network, lasting=self.lasting)
        return path

    @contextmanager
    def _room(self, path: Path, need: int) -> Iterator[None]:
        """Room for a shard, also beside those that other threads of this process are fetching."""
        if self.bytes is None:
            yield
            return
        ours = os.getpid()  # a forked process has a copy of what its parent fetches
        with locked(self.folder / ".room.lock"):
            self._coming[ours, path] = need
            coming = {part: size for (pid, part), size in list(self._coming.items()) if pid == ours}
            parts = [part for part in self.folder.glob("*.tar.part") if part.with_suffix("") not in coming]
            files = [(found.stat(), found) for found in [*self.folder.glob("*.tar"), *filter(_is_left, parts)]]
            here = {found for _, found in files}
            total = sum(stat.st_size for stat, _ in files)
            total += sum(size for part, size in coming.items() if part not in here)
            for stat, found in sorted(files, key=lambda pair: pair[0].st_mtime_ns):
                if total <= self.bytes:
                    break
                _remove_cached(found)
                total -= stat.st_size
        try:
            yield
        finally:
            del self._coming[ours, path]


def _is_left(part: Path) -> bool:
    """Whether nobody is fetching this part of a shard."""
    with locked_if_free(part.with_suffix("").with_suffix(".lock")) as free:
        return free and part.exists()


def _remove_cached(found: Path) -> None:
    """Remove a shard, which who has it mapped keeps until the map is closed; or what is left of a broken download."""
    if found.suffix == ".tar":
        found.unlink(missing_ok=True)
        return
    final = found.with_suffix("")
    with locked_if_free(final.with_suffix(".lock")) as free:
        if free:
            Part(final).drop()


class RemoteSource(StoredSource):
    """A split of an archive at an address; at most its first ``episodes``.

    While a shard is read from, threads fetch the next ones.

    Args:
        url: of the archive's folder.
        split: ``train``, ``val`` or ``test``.
        verify: hash a shard again when it is opened, though it was hashed when it came.
        episodes: the limit.
        cache_dir: where shards are kept; None: a temporary folder, which holds four of them and goes with the source.
        cache_bytes: the most that ``cache_dir`` may hold; None: no bound.
        network: how patient to be.

    Attributes:
        window: the shard that is read from, and those that are fetched meanwhile.

    Raises:
        RequestError: the address or an argument cannot be, or the archive has no such split.
        FetchError: ``archive.json`` could not be had.
        DamagedError: ``archive.json`` is not what was written.
        WriteError: ``cache_dir`` cannot be made.
    """

    def __init__(
        self,
        url: str,
        split: str = "train",
        *,
        verify: bool = False,
        episodes: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
        network: Network | None = None,
    ) -> None:
        network = network or Network()
        self.url = url
        super().__init__(read_remote_archive(url, network), split, verify=verify, episodes=episodes)
        self._ahead: Ahead[int, Path] = Ahead()
        largest = max(shard.bytes for shard in self._split.shards)
        if cache_bytes is not None and (cache_dir is None or cache_bytes < 2 * largest):
            raise RequestError(
                f"cache_bytes={cache_bytes:,} needs a cache_dir, and room for two of the archive's shards "
                f"({2 * largest:,} bytes)."
            )
        if cache_dir is None:
            folder = tempfile.mkdtemp(prefix="mamldata-")
            weakref.finalize(self, _remove, folder, os.getpid(), self._ahead)
            self.cache = ShardCache(Path(folder), _WINDOW * largest, network, lasting=False)
        else:
            make_folder(Path(cache_dir))
            self.cache = ShardCache(Path(cache_dir), cache_bytes, network)
        self.window = 1 + (_AHEAD if cache_bytes is None else min(_AHEAD, cache_bytes // largest - 1))

    @property
    def fits(self) -> bool:
        """Whether all shards of the split can be here at once."""
        return self.cache.bytes is None or sum(shard.bytes for shard in self._split.shards) <= self.cache.bytes

    def view(self, episodes: int | None = None) -> Self:
        """See ``StoredSource.view``; they have the cache in common, and no shard that is here is fetched again."""
        view = super().view(episodes)
        view._open, view._ahead = {}, Ahead()  # which are for one thread at a time
        if not self.cache.lasting:
            weakref.finalize(view, view._ahead.join, 1)  # before the folder that its threads write to goes
        return view

    def prefetch(self, upcoming: Sequence[int]) -> None:
        """Fetch shards in the background, ``window`` at a time at the most.

        A failure is not reported here: whoever needs the shard meets it.

        Args:
            upcoming: the shard that is read from now, and those after it; only the first ``window`` are looked at.
        """
        for number in upcoming[: self.window]:
            if number not in self._open and number not in self._ahead and self._ahead.running < self.window:
                shard = self._split.shards[number]
                self._ahead.start(number, partial(self.cache.get, join(self.url, shard.file), shard))

    def way_classes(self) -> Classes:
        """The class of each way, see ``StoredSource.way_classes``; all shards are fetched for it."""
        for number in range(len(self.shard_episodes)):
            self.prefetch(range(number, len(self.shard_episodes)))
            self._map(number)
        return super().way_classes()

    def _open_shard(self, number: int) -> memoryview:
        shard = self._split.shards[number]
        url = join(self.url, shard.file)
        path = self._ahead.take(number) if number in self._ahead else self.cache.get(url, shard)
        try:
            mapped = open_shard(path, shard, self.archive.layout, verify=self.verify)
        except (DamagedError, FileNotFoundError):  # damaged since it came, or removed to make room for another
            with writing(path):
                path.unlink(missing_ok=True)
            mapped = open_shard(self.cache.get(url, shard), shard, self.archive.layout, verify=self.verify)
        # A removed file takes its room for as long as it is mapped.
        while self.cache.bytes is not None and self._mapped_bytes() + shard.bytes > self.cache.bytes:
            del self._open[next(iter(self._open))]
        self._open[number] = mapped.data
        return self._open[number]

    def _mapped_bytes(self) -> int:
        return sum(self._split.shards[number].bytes for number in self._open)


def _remove(folder: str, owner: int, ahead: Ahead[int, Path]) -> None:
    if os.getpid() == owner:  # and not a worker that was forked from it
        ahead.join(1)  # one that has just begun would make the folder again, for its lock
        with suppress(OSError):  # under another name no thread that still waits for a server puts a file into it
            shutil.rmtree(Path(folder).rename(f"{folder}.gone"))


class _HashedPart(Part):
    """A part whose SHA-256 is taken as its bytes come."""

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
        """Of what there is, in hex."""
        if self._hashed != self.size:  # brought by another process, or cut short by a full disk
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
    """Writes bytes, and then tells of them."""

    stream: Writable
    wrote: Callable[[bytes], object]

    def write(self, data: bytes, /) -> None:
        self.stream.write(data)
        self.wrote(data)


def _obtain(
    url: str, part: Part, final: Path, bound: int, check: Callable[[], object], network: Network, *, lasting: bool
) -> None:
    """Fetch a file, going on where a try broke off; check it, and give it its name.

    Args:
        url: its address.
        part: its bytes so far.
        final: its path; a lock must keep others away.
        bound: the most bytes that it may have.
        check: raises ``SourceError`` if the whole file is not the one; it is then fetched anew.
        network: how patient to be.
        lasting: whether to flush it to disk.

    Raises:
        FetchError: it could not be had.
        WriteError: the place cannot be written to.
    """
    vain, most = 0, part.size
    while True:
        try:
            _attempt(url, part, bound, network)
            check()
            break
        except SourceError as error:
            vain = 0 if part.size >= most + _HEADWAY else vain + 1
            most = max(most, part.size)
            if error.final or error.refused or vain >= network.rounds:
                remedy = _REMEDY_WRONG if error.wrong else _REMEDY
                raise FetchError(f"{shown_place(url)} could not be had: {error}. {remedy}") from error
            pause = network.pause(vain, error.retry_after)
            # Its text: a handler that keeps records would keep alive whatever the error's traceback holds.
            _log.warning("%s: %s; trying again in %.0f s", shown_place(url), str(error), pause)
            time.sleep(pause)
    with writing(final):
        commit(final, lasting=lasting)
    part.forget()


@lru_cache(maxsize=1)
def _session(process: int) -> requests.Session:  # noqa: ARG001  # what a process has open is not for its children
    """The one session of a process: connections are kept from shard to shard."""
    return open_session()


def _attempt(url: str, part: Part, bound: int, network: Network) -> None:
    """One try, from the bytes that there are.

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
            # A server has nothing more to give where the file is whole already.
        return
    import fsspec

    had = min(part.size, bound)
    try:
        stream = fsspec.open(url, "rb").open()
    except Exception as error:  # each of fsspec's file systems has exceptions of its own
        final = isinstance(error, FileNotFoundError | PermissionError)
        raise SourceError(f"it cannot be read ({error or type(error).__name__})", final=final) from error
    with stream, part.writer(had) as target:
        for chunk in _remaining(stream, had):
            had += len(chunk)
            if had > bound:
                raise SourceError(f"it has more than the {bound:,} bytes that it may have", final=True)
            target.write(chunk)


def _remaining(stream: Any, start: int) -> Any:
    try:
        stream.seek(start)
        yield from chunks(stream)
    except Exception as error:  # as above
        raise SourceError(f"reading it broke off ({error or type(error).__name__})") from error


def _require_digest(part: _HashedPart, shard: Shard) -> None:
    """Check that a shard came whole and right; what is not right is removed.

    Raises:
        SourceError: it did not.
    """
    if part.size < shard.bytes:
        raise SourceError(f"it ended after {part.size:,} of {shard.bytes:,} bytes")
    if (got := part.sha256()) != shard.sha256:
        part.drop()
        raise SourceError(f"another file came: sha256 {got}, expected {shard.sha256}", wrong=True)
