"""Where an archive is written: a folder, or an address such as ``s3://bucket/folder``.

A file appears under its name whole or not at all. Several writers, even on several machines, do not disturb each
other, because each first writes under a name of its own. So correctness does not depend on locks.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mamldata.archive.index import BUILD, MOST_INDEX_BYTES
from mamldata.errors import MamldataError, RequestError, WriteError
from mamldata.io.atomic import locked, make_folder, publish, read_whole, writing
from mamldata.io.digest import chunks, sha256_file
from mamldata.io.scratch import scratch
from mamldata.io.urls import is_http, is_remote, local_address, require_address, shown_cause, shown_error, shown_place

_LOCK = ".lock"
OURS = frozenset({BUILD, _LOCK})  # names that only an unfinished build has
# Names in .build. A user may have a folder of that name, whose files are never removed.
_IN_BUILD = re.compile(r"plan\.json|[a-z]+-\d+\.(tar|npy)\.sha256|.+\.[0-9a-f]{32}\.part")

# These file systems show an object only when it is whole; on any other, a file grows under its name.
_WHOLE_OBJECTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "obs", "hf"}

# By default s3fs holds ten pieces of 50 MB in memory, which is too much for each of many workers.
_OPTIONS = {protocol: {"max_concurrency": 1} for protocol in ("s3", "s3a")}

Pieces = Iterable[bytes | memoryview]


class Store(Protocol):
    """A place for an archive; it pickles small, so that it can be sent to workers. Names are relative to it.

    Every method raises ``WriteError`` if the place cannot be used.
    """

    def __hash__(self) -> int: ...

    def entries(self, folder: str = "") -> dict[str, int]:
        """Names at the top, or in a folder, with lengths in bytes (0 for folders); empty if it does not exist."""

    def size(self, name: str) -> int | None:
        """A file's length in bytes, None if it is missing."""

    def read(self, name: str) -> bytes | None:
        """A file's bytes, None if it is missing."""

    def sha256(self, name: str) -> str:
        """A file's SHA-256, in hex."""

    def prepare(self) -> None:
        """Create ``.build``, where folders exist."""

    def write(self, name: str, pieces: Pieces) -> None:
        """Write a file, replacing an existing one.

        Raises:
            FileNotFoundError: ``.build`` has been removed meanwhile.
        """

    def write_new(self, name: str, data: bytes) -> None:
        """Write a file unless it exists. In a folder, exactly one of several writers succeeds."""

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""

    def clear(self) -> None:
        """Remove what only an unfinished build needs: files of our names, and folders that are empty then."""

    def alone(self) -> AbstractContextManager[None]:
        """Wait for other builds of the whole archive, to avoid doing the work twice. Correctness does not need it."""


def store_at(place: Path | str) -> Store:
    """The store at a path, or at an address that fsspec can write to.

    Raises:
        RequestError: the address cannot be written to.
    """
    if not is_remote(place):
        return FolderStore(Path(place).absolute())
    url = str(place)
    if is_http(url):
        raise RequestError(
            f"{shown_place(url)}: archives are read over http(s), but a web server takes no files. Build into a "
            "folder and copy it there, or give a writable address such as s3://bucket/folder."
        )
    require_address(url)
    local = local_address(url)
    return AddressStore(url) if local is None else FolderStore(local.absolute())


def foreign_in_build(store: Store) -> bool:
    """Whether ``.build`` there has files that no build of ours has made."""
    return any(not _IN_BUILD.fullmatch(name) for name in store.entries(BUILD))


@dataclass(frozen=True)
class FolderStore:
    """A folder, on this machine or on a file system that machines share."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def entries(self, folder: str = "") -> dict[str, int]:
        place = self.path / folder
        try:
            with _looking(), os.scandir(place) as entries:
                return {entry.name: entry.stat().st_size if entry.is_file() else 0 for entry in entries}
        except NotADirectoryError:
            if place.exists():
                raise WriteError(f"{place} is a file. Choose a folder for the archive.") from None
            return {}  # a parent is a file, which making the folder reports
        except FileNotFoundError:
            return {}

    def size(self, name: str) -> int | None:
        try:
            with _looking():
                return (self.path / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, name: str) -> bytes | None:
        try:
            with _looking():
                return read_whole(self.path / name, MOST_INDEX_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def sha256(self, name: str) -> str:
        with _looking():
            return sha256_file(self.path / name)

    def prepare(self) -> None:
        make_folder(self.path / BUILD)

    def write(self, name: str, pieces: Pieces) -> None:
        final = self.path / name
        with writing(final), self._part(final.name) as part:
            with part.open("wb") as stream:
                stream.writelines(pieces)
            publish(part, final)

    def write_new(self, name: str, data: bytes) -> None:
        final = self.path / name
        with writing(final), self._part(final.name) as part:
            with part.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            try:
                os.link(part, final)
            except FileExistsError:
                return
            except FileNotFoundError:
                raise
            except OSError:  # the file system has no hard links
                if not final.exists():
                    publish(part, final)

    @contextmanager
    def _part(self, name: str) -> Iterator[Path]:
        """A temporary name that no other writer uses; its file is removed afterwards."""
        part = self.path / BUILD / f"{name}.{uuid.uuid4().hex}.part"
        try:
            yield part
        finally:
            part.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def clear(self) -> None:
        # In this order: if this process dies in between, the next build sees .build and clears up.
        (self.path / _LOCK).unlink(missing_ok=True)
        with suppress(OSError):
            for name in filter(_IN_BUILD.fullmatch, self.entries(BUILD)):
                self.remove(f"{BUILD}/{name}")
            (self.path / BUILD).rmdir()

    def alone(self) -> AbstractContextManager[None]:
        return locked(self.path / _LOCK)


@contextmanager
def _looking() -> Iterator[None]:
    """Name what is in the way of reading a folder: no permission, a folder or a pipe for a file, a link in a circle.

    Raises:
        WriteError: with that, and what to do.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
            raise  # nothing is in the way there
        raise WriteError(
            f"{error.filename} cannot be read ({error.strerror}). Move it elsewhere, or choose another folder."
        ) from error


@dataclass(frozen=True)
class AddressStore:
    """An address that fsspec can write to. A file is written on this machine first, and then uploaded."""

    url: str = field(repr=False)  # it may have a password, and workers log their tasks

    def __str__(self) -> str:
        return shown_place(self.url)

    def _open(self) -> tuple[Any, str]:
        """The file system, without its cached listings (other processes write there too), and the path in it."""
        import fsspec

        system, root = fsspec.core.url_to_fs(self.url, **_OPTIONS.get(self.url.partition("://")[0].lower(), {}))
        system.invalidate_cache()
        return system, root.rstrip("/")

    def entries(self, folder: str = "") -> dict[str, int]:
        with self._talking():
            system, root = self._open()
            root = f"{root}/{folder}" if folder else root
            try:
                entries: list[dict[str, Any]] = system.ls(root, detail=True)
            except FileNotFoundError:
                return {}
            # A file is listed as itself, or even as its own child. Some programs create empty files as folders.
            if len(entries) == 1 and system.isfile(root) and system.size(root):
                raise WriteError(f"{self} is a file. Choose another address for the archive.")
        found = {}
        for entry in entries:
            name = str(entry["name"]).strip("/")
            if name != root.strip("/"):
                found[name.rpartition("/")[2]] = int(entry["size"]) if entry["type"] == "file" else 0
        return found

    def size(self, name: str) -> int | None:
        with self._talking():
            system, root = self._open()
            try:
                return int(system.info(f"{root}/{name}")["size"])
            except FileNotFoundError:
                return None

    def read(self, name: str) -> bytes | None:
        with self._talking():
            system, root = self._open()
            try:
                return bytes(system.cat_file(f"{root}/{name}"))
            except FileNotFoundError:
                return None

    def sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with self._talking():
            system, root = self._open()
            with system.open(f"{root}/{name}", "rb") as stream:
                for chunk in chunks(stream):
                    digest.update(chunk)
        return digest.hexdigest()

    def prepare(self) -> None:
        with self._talking():
            system, root = self._open()
            if not _shows_whole_objects(system):
                system.makedirs(f"{root}/{BUILD}", exist_ok=True)

    def write(self, name: str, pieces: Pieces) -> None:
        with scratch() as place:
            part = place / "part"
            with writing(part), part.open("wb") as stream:
                stream.writelines(pieces)
            with self._talking():
                system, root = self._open()
                self._put(system, str(part), root, name)

    def _put(self, system: Any, part: str, root: str, name: str) -> None:
        final = f"{root}/{name}"
        if _shows_whole_objects(system):
            system.put_file(part, final)
            return
        growing = f"{root}/{BUILD}/{Path(name).name}.{uuid.uuid4().hex}.part"
        try:
            system.put_file(part, growing)
            if system.exists(final):  # some of these file systems do not move a file over another
                system.rm_file(final)
            system.mv(growing, final)
        except BaseException:
            with suppress(Exception):
                system.rm_file(growing)
            raise

    def write_new(self, name: str, data: bytes) -> None:
        if self.size(name) is None:
            self.write(name, [data])

    def remove(self, name: str) -> None:
        with self._talking():
            system, root = self._open()
            if system.exists(f"{root}/{name}"):
                system.rm_file(f"{root}/{name}")

    def clear(self) -> None:
        with self._talking():
            system, root = self._open()
            names = list(filter(_IN_BUILD.fullmatch, found := self.entries(BUILD)))
            paths = [f"{root}/{BUILD}/{name}" for name in names]
            if paths and _shows_whole_objects(system):
                system.rm(paths)  # a thousand with each request
            else:
                for path in paths:
                    system.rm_file(path)
            if len(names) == len(found) and system.isdir(f"{root}/{BUILD}"):
                system.rmdir(f"{root}/{BUILD}")

    def alone(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Turn a file system's exceptions into an error that says what to check.

        Raises:
            WriteError: for every exception, because each of fsspec's file systems has its own.
        """
        try:
            yield
        except MamldataError:
            raise
        except Exception as error:
            raise WriteError(
                f"{self} cannot be used ({shown_error(error, self.url)}). Check the address, your credentials "
                "and the network, and run the same command again: it continues from the finished shards."
            ) from shown_cause(error, self.url)


def _shows_whole_objects(system: Any) -> bool:
    protocols = (system.protocol,) if isinstance(system.protocol, str) else system.protocol
    return not _WHOLE_OBJECTS.isdisjoint(protocols)
