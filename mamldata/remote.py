"""Archives at an address: ``https://``, ``s3://``, or whatever fsspec names. Nothing is used before it is verified.

A shard is brought whole into a folder on this machine, hashed, and only then given its name there; from then on it
is memory-mapped like a local one. It is not parsed as a tar on the way: the first episode of a shard can be trusted
only when its last byte is hashed, and by then the file is here.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mamldata.archive import INDEX, INDEX_SUM, Archive, Shard, index_sum, open_shard, parse_archive
from mamldata.digest import chunks, sha256_bytes, sha256_file
from mamldata.download import Network, Part, SourceError, UnusableRangeError, open_session, transfer, without_password
from mamldata.errors import DamagedError, FetchError, RequestError
from mamldata.files import commit, locked, make_folder, writing
from mamldata.places import is_http, join, require_address
from mamldata.sources import ArchiveSource

_MOST_INDEX = 1 << 28  # bytes of archive.json: 10**6 classes
_HEADWAY = 1 << 20  # bytes that make a try worth its while
_WINDOW = 3  # shards that are kept without a cache: the one in use, the one before, and the next


def read_remote_archive(url: str, network: Network | None = None) -> Archive:
    """Read ``archive.json`` at an address and check it against ``archive.json.sha256``.

    Raises:
        RequestError: the address is of a kind that cannot be read.
        FetchError: one of the two files could not be had.
        DamagedError: ``archive.json`` is not what was written.
    """
    require_address(url)
    shown = without_password(join(url, INDEX))
    with tempfile.TemporaryDirectory(prefix="mamldata-") as place:
        found = []
        for name, bound in ((INDEX, _MOST_INDEX), (INDEX_SUM, 1 << 10)):
            path = Path(place) / name
            _obtain(join(url, name), path, bound, lambda _: None, network or Network())
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
        bytes: the most that they may take together, but for those that other processes fetch at this moment; the
            least recently used ones make room. None: no bound.
        network: how patient to be.
    """

    folder: Path
    bytes: int | None = None
    network: Network = field(default_factory=Network)

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
                self._make_room(shard.bytes)
                _obtain(url, path, shard.bytes, lambda part: _require_digest(part, shard), self.network)
        return path

    def _make_room(self, need: int) -> None:
        if self.bytes is None:
            return
        with locked(self.folder / ".room.lock"):
            files = [(path.stat(), path) for path in self.folder.glob("*.tar")]
            total = sum(stat.st_size for stat, _ in files)
            for stat, path in sorted(files, key=lambda pair: pair[0].st_mtime_ns):
                if total + need <= self.bytes:
                    return
                path.unlink(missing_ok=True)  # who has it mapped keeps it until the map is closed
                total -= stat.st_size


class RemoteSource(ArchiveSource):
    """A split of an archive at an address; at most its first ``episodes``.

    While a shard is read from, a thread fetches the next one.

    Args:
        url: of the archive's folder.
        split: ``train``, ``val`` or ``test``.
        verify: hash a shard again when it is opened, though it was hashed when it came.
        episodes: the limit.
        cache_dir: where shards are kept; None: a temporary folder, which holds three of them and goes with the source.
        cache_bytes: the most that ``cache_dir`` may hold; None: no bound.
        network: how patient to be.

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
        self._set_up(read_remote_archive(url, network), split, verify, episodes)
        self._ahead: list[threading.Thread] = []  # at most one
        self._asked = -1
        largest = max(shard.bytes for shard in self._split.shards)
        if cache_bytes is not None and (cache_dir is None or cache_bytes < 2 * largest):
            raise RequestError(
                f"cache_bytes={cache_bytes:,} needs a cache_dir, and room for two of the archive's shards "
                f"({2 * largest:,} bytes)."
            )
        if cache_dir is None:
            folder = tempfile.mkdtemp(prefix="mamldata-")
            weakref.finalize(self, _remove, folder, os.getpid(), self._ahead)
            self.cache = ShardCache(Path(folder), _WINDOW * largest, network)
        else:
            make_folder(Path(cache_dir))
            self.cache = ShardCache(Path(cache_dir), cache_bytes, network)

    @property
    def shard_episodes(self) -> tuple[int, ...]:
        """How many episodes of each shard are read."""
        left = [self.episodes - shard.first_episode for shard in self._split.shards]
        counts = [min(shard.episodes, some) for shard, some in zip(self._split.shards, left, strict=True)]
        return tuple(count for count in counts if count > 0)

    @property
    def fits(self) -> bool:
        """Whether all shards of the split can be here at once."""
        return self.cache.bytes is None or sum(shard.bytes for shard in self._split.shards) <= self.cache.bytes

    def prefetch(self, index: int) -> None:
        """Fetch the shard of an episode that will be read soon, in the background, one shard at a time.

        A failure is not reported here: whoever needs the shard meets it again.
        """
        number = self._shard_of(index)
        if number in self._open or number == self._asked or any(thread.is_alive() for thread in self._ahead):
            return
        self._asked = number
        shard = self._split.shards[number]
        arguments = (self.cache, join(self.url, shard.file), shard)
        self._ahead[:] = [threading.Thread(target=_try_to_get, args=arguments, name="mamldata-fetch", daemon=True)]
        self._ahead[0].start()

    def _open_shard(self, number: int) -> memoryview:
        shard = self._split.shards[number]
        url = join(self.url, shard.file)
        path = self.cache.get(url, shard)
        try:
            mapped = open_shard(path, shard, self.archive.layout, verify=self.verify)
        except DamagedError:  # damaged since it came, or removed to make room for another
            with writing(path):
                path.unlink(missing_ok=True)
            mapped = open_shard(self.cache.get(url, shard), shard, self.archive.layout, verify=self.verify)
        # A removed file takes its room for as long as it is mapped.
        while self.cache.bytes is not None and self._mapped_bytes() + shard.bytes > self.cache.bytes:
            del self._open[next(iter(self._open))]
        self._open[number] = mapped.data
        self._asked = -1
        return self._open[number]

    def _mapped_bytes(self) -> int:
        return sum(self._split.shards[number].bytes for number in self._open)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_ahead": []}


def _try_to_get(cache: ShardCache, url: str, shard: Shard) -> None:
    with suppress(Exception):
        cache.get(url, shard)


def _remove(folder: str, owner: int, ahead: list[threading.Thread]) -> None:
    if os.getpid() == owner:  # and not a worker that was forked from it
        for thread in ahead:
            thread.join(1)  # one that has just begun would make the folder again, for its lock
        shutil.rmtree(folder, ignore_errors=True)


def _obtain(url: str, final: Path, bound: int, check: Callable[[Path], object], network: Network) -> None:
    """Fetch a file, going on where a try broke off; check it, and give it its name.

    Args:
        url: its address.
        final: its path; a lock must keep others away.
        bound: the most bytes that it may have.
        check: raises ``SourceError`` if the whole file is not the one; it is then fetched anew.
        network: how patient to be.

    Raises:
        FetchError: it could not be had.
        WriteError: the place cannot be written to.
    """
    part = Part(final)
    vain, most = 0, part.size
    while True:
        try:
            _attempt(url, part, bound, network)
            check(part.path)
            break
        except SourceError as error:
            vain = 0 if part.size >= most + _HEADWAY else vain + 1
            most = max(most, part.size)
            if error.final or vain >= network.rounds:
                raise FetchError(
                    f"{without_password(url)} could not be had: {error}. Check the address and the network, and "
                    "try again."
                ) from error
            time.sleep(network.pause(vain, error.retry_after))
    with writing(final):
        commit(final)
    part.forget()


def _attempt(url: str, part: Part, bound: int, network: Network) -> None:
    """One try, from the bytes that there are.

    Raises:
        SourceError: it failed.
    """
    if is_http(url):
        try:
            with open_session() as session:
                transfer(session, url, part, bound, network, lambda _: None)
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


def _require_digest(path: Path, shard: Shard) -> None:
    """Check that a shard came whole and right; what is not right is removed.

    Raises:
        SourceError: it did not.
    """
    size = path.stat().st_size
    if size < shard.bytes:
        raise SourceError(f"it ended after {size:,} of {shard.bytes:,} bytes")
    if (got := sha256_file(path)) != shard.sha256:
        with writing(path):
            path.unlink()
        raise SourceError(f"another file came: sha256 {got}, expected {shard.sha256}")
