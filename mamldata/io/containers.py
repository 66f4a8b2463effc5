"""Containers of images: a folder, a zip or a tar, compressed or not; read in place, never unpacked."""

from __future__ import annotations

import errno
import io
import lzma
import os
import posixpath
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Self

from mamldata.errors import DamagedError
from mamldata.io.atomic import open_regular, read_whole

MOST_IMAGE_BYTES = 64 << 20  # no photograph is larger; a crafted member might be
# The formats that are decoded, by Pillow's names, with file endings. No others are: some of Pillow's formats start
# programs, such as Ghostscript, and some exist on one machine only.
IMAGE_FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "PPM": (".pbm", ".pgm", ".ppm"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
}
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


@dataclass(frozen=True)
class Member:
    """One file in a container.

    Attributes:
        name: its path below the container's root, with forward slashes.
        size: its length in bytes.
        crc: its CRC-32, if the container stores one.
        offset: where its bytes begin in the container, if they are stored uncompressed: then any process can read them
            directly.
        entry: the entry of a zip or tar with its bytes: offset of a zip's header, or position in the unpacked tar.
            A link has the entry of its target; two entries of the same name have different ones.
        problem: why it cannot be read, if that is known without reading it.
    """

    name: str
    size: int
    crc: int | None = None
    offset: int | None = None
    entry: int | None = None
    problem: str = ""


@dataclass(frozen=True)
class Link:
    """An entry of a zip or tar that is another name of a file.

    Attributes:
        name: as of a member.
        target: a path relative to the container's root if ``hard``, else relative to the folder of the link.
    """

    name: str
    target: str
    hard: bool = False


def list_members(container: Path) -> list[Member]:
    """Every file in a container, in the container's own order (in a folder: sorted, unreadable files last).

    A link to a file is listed as a file with its target's bytes. A link that leads to no file of the container, and a
    folder that cannot be listed, become members with a ``problem``.

    Raises:
        DamagedError: it is not a folder, zip or tar; it is damaged; or a member points outside it.
    """
    if container.is_dir():
        return list(_folder_members(container))
    with reading_container(container):
        if is_zip(container):
            return follow_links(list(_zip_entries(container)))
        with open_tar(container) as tar:
            return tar_members(tar, str(container), compressed=not _has_tar_mark(container))


def _zip_entries(container: Path) -> Iterator[Member | Link]:
    """Note offsets: images are mostly stored uncompressed, and are then read without the slow-to-parse directory."""
    with zipfile.ZipFile(container) as archive, container.open("rb") as stream:
        for info in archive.infolist():
            entry = zip_entry(archive, info, str(container))
            plain = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & _ENCRYPTED
            if isinstance(entry, Member) and plain:
                entry = replace(entry, offset=_stored_at(stream, info))
            if entry:
                yield entry


def zip_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo, container: str) -> Member | Link | None:
    """An entry of an open zip; None for a folder. A link's target is its content.

    Raises:
        DamagedError: it has no name, or is neither stored nor deflated: Python unpacks the other methods without a
            limit.
    """
    if not info.filename:
        raise DamagedError(f"{container}: a damaged container (a member has no name).")
    if info.is_dir():
        return None
    if info.compress_type not in _METHODS:
        method = _UNBOUNDED.get(info.compress_type, "unknown")
        raise DamagedError(
            f"{container}: the member {info.filename!r} is compressed by the method {method} "
            f"({info.compress_type}); only stored and deflated members are read. Pack the files again with deflate."
        )
    name = safe_member_name(info.filename, container)
    if not stat.S_ISLNK(info.external_attr >> 16):
        return Member(name, info.file_size, info.CRC, entry=info.header_offset)
    with archive.open(info) as stream:
        return Link(name, os.fsdecode(stream.read(_MOST_PATH)))


_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_UNBOUNDED = {zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "lzma"}


def _stored_at(stream: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: after a local header with its own lengths (APPNOTE 4.3.7)."""
    stream.seek(info.header_offset)
    header = stream.read(_LOCAL_HEADER)
    name, extra = struct.unpack("<HH", header[26:30])
    return info.header_offset + _LOCAL_HEADER + int(name) + int(extra)


_ENCRYPTED = 1
_LOCAL_HEADER = 30  # bytes


def tar_members(tar: tarfile.TarFile, container: str, *, compressed: bool = False) -> list[Member]:
    """The files of an open tar; offsets count from the start of the file that it is read from."""
    entries: list[Member | Link] = []
    for info in tar_headers(tar, container):
        entry = tar_entry(info, container)
        if isinstance(entry, Member) and not compressed:
            entry = replace(entry, offset=info.offset_data)
        if entry:
            entries.append(entry)
    return follow_links(entries)


def tar_headers(tar: tarfile.TarFile, container: str) -> Iterator[tarfile.TarInfo]:
    """The headers of an open tar, one at a time.

    Raises:
        DamagedError: more headers than any dataset has images, or global headers that grow without end; compressed,
            both take almost no space.
    """
    for number, info in enumerate(tar):
        tar.members = []  # type: ignore[attr-defined]  # a tar may have a million, and tarfile would keep them all
        if number == _MOST_MEMBERS or sum(map(len, tar.pax_headers.values())) > _MOST_EXTENSION:
            raise DamagedError(
                f"{container}: more than {_MOST_MEMBERS:,} members, or more than {_MOST_EXTENSION:,} bytes in the "
                "headers that apply to all of them; the file is not used."
            )
        yield info


_MOST_MEMBERS = 1 << 22  # three times those of ImageNet


def tar_entry(info: tarfile.TarInfo, container: str) -> Member | Link | None:
    """An entry of a tar; None for folders, devices and the like."""
    if info.isreg():
        return Member(safe_member_name(info.name, container), info.size, entry=info.offset_data)
    if info.islnk() or info.issym():
        return Link(safe_member_name(info.name, container), info.linkname[:_MOST_PATH], hard=info.islnk())
    return None


def follow_links(entries: Sequence[Member | Link]) -> list[Member]:
    """Replace each link by its target, under the link's name.

    Args:
        entries: of one container, in its order. If several have the same name, a hard link means the last one before
            the link, and a symbolic link the last one of all, as when the container is unpacked.
    """
    if not any(isinstance(entry, Link) for entry in entries):
        return list(entries)  # type: ignore[arg-type]
    known: list[Member | Link] = []
    by_path: dict[str, Member | Link] = {}
    for entry in entries:
        if isinstance(entry, Link) and entry.hard:
            target = by_path.get(posixpath.normpath(entry.target))
            if target and target.name == entry.name:
                continue  # tar writes this for a file that it was given twice
            entry = replace(target, name=entry.name) if target else entry
        by_path[posixpath.normpath(entry.name)] = entry
        known.append(entry)
    return [entry if isinstance(entry, Member) else _target(entry, by_path) for entry in known]


def _target(link: Link, by_path: Mapping[str, Member | Link]) -> Member:
    here, path = link, ""
    for _ in range(_MOST_LINKS):
        folder = "" if here.hard else posixpath.dirname(here.name)
        path = posixpath.normpath(posixpath.join(folder, here.target))
        found = by_path.get(path)
        if isinstance(found, Member):
            return replace(found, name=link.name)
        if found is None:
            break
        here = found
    else:
        return Member(link.name, 0, problem=f"it is a link to {link.target!r}, which leads from link to link")
    why = "is not a file in the container" if is_inside(path) else "points outside the container"
    return Member(link.name, 0, problem=f"it is a link to {link.target!r}, which {why}")


_MOST_LINKS = 40  # in a chain, as in Linux
_MOST_PATH = 4096  # bytes


def read_members(container: Path, wanted: Iterable[Member], most_bytes: int) -> Iterator[tuple[Member, bytes | str]]:
    """The bytes of members, in the order that reads fastest; for a member that cannot be read, the reason as text.

    Args:
        container: a folder, a zip or a tar.
        wanted: members that ``list_members`` returned.
        most_bytes: upper bound on the size of a member.

    Raises:
        DamagedError: the container as a whole cannot be read.
    """
    todo = []
    for member in wanted:
        if member.problem:
            yield member, member.problem
        elif member.size > most_bytes:
            yield member, f"it has {member.size:,} bytes; the limit for an image is {most_bytes:,}"
        else:
            todo.append(member)
    if container.is_dir():
        yield from _read_folder(container, todo, most_bytes)
    elif all(member.offset is not None for member in todo):
        yield from _read_offsets(container, todo)
    elif is_zip(container):
        yield from _read_zip(container, todo)
    else:
        yield from _read_stream(container, todo)


def _folder_members(folder: Path) -> Iterator[Member]:
    above: dict[Path, frozenset[tuple[int, int]]] = {}  # for each folder all those that it lies in
    closed: list[OSError] = []
    for place, folders, files in os.walk(folder, onerror=closed.append, followlinks=True):  # as ImageFolder does
        here = Path(place)
        lineage = above.pop(here, frozenset()) | _identity(here)
        folders.sort()
        for path in [here / name for name in folders]:
            if _identity(path) & lineage:
                raise DamagedError(
                    f"{path} is a link to a folder that it lies in: its images would be found again and again. "
                    "Remove the link."
                )
            above[path] = lineage
        for path in [here / name for name in sorted(files)]:
            try:
                yield Member(path.relative_to(folder).as_posix(), path.stat().st_size)
            except OSError as nowhere:
                closed.append(nowhere)
    for error in closed:
        name = Path(error.filename).relative_to(folder).as_posix()
        yield Member(name, 0, problem=f"it cannot be read ({error.strerror})")


def _identity(folder: Path) -> frozenset[tuple[int, int]]:
    """(device, inode) of a folder; empty if it cannot be stat'ed."""
    try:
        status = folder.stat()
    except OSError:
        return frozenset()
    return frozenset({(status.st_dev, status.st_ino)})


def _read_folder(folder: Path, wanted: list[Member], most_bytes: int) -> Iterator[tuple[Member, bytes | str]]:
    for member in wanted:
        try:
            yield member, read_whole(folder / member.name, most_bytes)
        except OSError as error:
            yield member, f"it cannot be read ({error.strerror})"


def _read_offsets(container: Path, wanted: list[Member]) -> Iterator[tuple[Member, bytes | str]]:
    with container.open("rb") as stream:
        for member in sorted(wanted, key=lambda member: member.offset or 0):
            stream.seek(member.offset or 0)
            data = stream.read(member.size)
            if len(data) != member.size:
                yield member, f"it is cut off after {len(data):,} bytes"
            elif member.crc is not None and zlib.crc32(data) != member.crc:
                yield member, f"Bad CRC-32 for file {member.name!r}"
            else:
                yield member, data


def _read_zip(container: Path, wanted: list[Member]) -> Iterator[tuple[Member, bytes | str]]:
    with reading_container(container):
        archive = zipfile.ZipFile(container)
    with archive:
        entries = {info.header_offset: info for info in archive.infolist()}
        for member in wanted:
            if (info := entries.get(-1 if member.entry is None else member.entry)) is None:
                yield member, _GONE
                continue
            try:
                with reading_container(container), archive.open(info) as stream:
                    # One byte more, to reach the end, where the CRC is checked; but never the whole stream: the length
                    # in the directory may be false.
                    data: bytes | str = stream.read(member.size + 1)
                if len(data) != member.size:
                    data = f"it has {len(data):,} bytes, and the directory says {member.size:,}"
            except DamagedError as error:
                data = str(error.__cause__ or error)
            yield member, data


def _read_stream(container: Path, wanted: list[Member]) -> Iterator[tuple[Member, bytes | str]]:
    """Read a compressed tar once, from its beginning to the last wanted member."""
    left: dict[int | None, list[Member]] = {}  # links share an entry
    for member in wanted:
        left.setdefault(member.entry, []).append(member)
    with reading_container(container), open_tar(container) as tar:
        for info in tar_headers(tar, str(container)):
            members = left.get(info.offset_data, []) if info.isreg() else []
            if members and members[0].size == info.size and (content := tar.extractfile(info)):
                data = content.read()
                yield from ((member, data) for member in left.pop(info.offset_data))
            if not left:
                return
    for members in left.values():
        yield from ((member, _GONE) for member in members)


_GONE = "it is no longer in the container"


class Window(io.RawIOBase):
    """A part of a file as a read-only file of its own, for reading a member in place.

    Args:
        whole: open for reading; this object moves its position.
        start, size: of the part, in bytes.
    """

    def __init__(self, whole: IO[bytes], start: int, size: int) -> None:
        super().__init__()
        self.whole, self.start, self.size = whole, start, size
        self.position = 0

    def seekable(self) -> bool:
        """True."""
        return True

    def readable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to an offset within the part or beyond it; return the new position."""
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def tell(self) -> int:
        """The position, in bytes from the start of the part."""
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` as far as the part has bytes left; return their number."""
        view = memoryview(buffer)
        self.whole.seek(self.start + self.position)
        data = self.whole.read(max(0, min(len(view), self.size - self.position)))
        view[: len(data)] = data
        self.position += len(data)
        return len(data)


def safe_member_name(name: str, container: str) -> str:
    """``name`` if it is a plain relative path.

    Raises:
        DamagedError: it is absolute, or has ``..`` components, backslashes or NUL characters.
    """
    if not is_inside(name):
        raise DamagedError(f"{container}: the member {name!r} points outside the container; the file is not used.")
    return name


def is_inside(name: str) -> bool:
    """Whether ``name`` is a plain relative path that stays below the folder it is joined to."""
    return not (name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name)


@contextmanager
def reading_container(path: Path) -> Iterator[None]:
    """Turn everything that zipfile, tarfile and the decompressors raise on damaged bytes into one clear error.

    Raises:
        DamagedError: the container, or a member of it, cannot be read.
    """
    try:
        yield
    except _RefusedError as error:
        raise DamagedError(f"{path}: {error}") from error
    except _CONTAINER_ERRORS as error:
        raise DamagedError(f"{path}: a damaged container ({error}).") from error
    except OSError as error:
        # bz2 and gzip raise it without an errno; a seek to a damaged offset gives EINVAL.
        if error.errno not in {None, errno.EINVAL}:
            raise
        raise DamagedError(f"{path}: a damaged container ({error}).") from error


# zipfile raises NotImplementedError and RuntimeError for flipped method and encryption bits, ValueError for negative
# offsets and names that are not text, and KeyError for members that are gone.
_CONTAINER_ERRORS = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    KeyError,
    OverflowError,
    struct.error,
)


def open_tar(path: Path, fileobj: IO[bytes] | None = None) -> tarfile.TarFile:
    """Open a tar, compressed or not; refuse headers that could take unlimited memory.

    Args:
        path: of its file; for messages only, if ``fileobj`` is given.
        fileobj: where a tar that is not compressed begins.

    Raises:
        DamagedError: it is not a tar.
    """
    try:
        if fileobj is not None:
            return tarfile.open(path, "r:", fileobj, tarinfo=_SmallHeader)
        with open_regular(path) as stream:
            magic = stream.read(3)
        for mode, start in _COMPRESSED.items():
            if magic.startswith(start):
                return tarfile.open(path, mode, tarinfo=_SmallHeader)  # type: ignore[call-overload,no-any-return]
        with suppress(tarfile.ReadError):
            return tarfile.open(path, "r:", tarinfo=_SmallHeader)
        return _open_xz(path)
    except tarfile.ReadError as error:
        raise DamagedError(f"{path}: neither a zip nor a tar file.") from error


_COMPRESSED = {"r:gz": b"\x1f\x8b", "r:bz2": b"BZh"}


def _open_xz(path: Path) -> tarfile.TarFile:
    reader = io.BufferedReader(_XzReader(path))
    try:
        tar = tarfile.open(path, "r:", reader, tarinfo=_SmallHeader)  # noqa: SIM115  # returned open
    except (lzma.LZMAError, EOFError, tarfile.ReadError) as error:
        reader.close()
        if "limit" in str(error).lower():
            raise
        raise tarfile.ReadError("not a tar") from error
    tar._extfileobj = False  # type: ignore[attr-defined]  # closes the reader with the tar, as tarfile does with its own
    return tar


class _XzReader(io.RawIOBase):
    """The bytes of an xz file. tarfile's own reader allocates whatever dictionary the file asks for, up to 4 GiB."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = open_regular(path)
        self._begin()

    def _begin(self) -> None:
        self._file.seek(0)
        self._decompressor, self._position = lzma.LZMADecompressor(memlimit=_MOST_XZ_MEMORY), 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is: forward by reading, back by beginning again."""
        return True

    def tell(self) -> int:
        """The position, from the beginning of the decompressed bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position from the beginning, or from here."""
        target = offset + (self._position if whence == os.SEEK_CUR else 0)
        if target < self._position:
            self._begin()
        while self._position < target and self.read(min(_XZ_CHUNK, target - self._position)):
            pass
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Decompress at most as much as the buffer holds."""
        data = b""
        while not data:
            more = b""
            if self._decompressor.eof:  # another stream may follow, after padding
                more = (self._decompressor.unused_data or self._file.read(_XZ_CHUNK)).lstrip(b"\0")
                if not more:
                    return 0
                self._decompressor = lzma.LZMADecompressor(memlimit=_MOST_XZ_MEMORY)
            elif self._decompressor.needs_input and not (more := self._file.read(_XZ_CHUNK)):
                raise EOFError("the compressed file ends too early")
            data = self._decompressor.decompress(more, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


_MOST_XZ_MEMORY = 256 << 20  # bytes; xz -9 takes 65 MiB
_XZ_CHUNK = 1 << 16


def is_zip(path: Path) -> bool:
    """Whether a file is a zip. Tars are excluded first: a zip is recognized by its end, which may be a tar's member."""
    return not _has_tar_mark(path) and zipfile.is_zipfile(path)


def _has_tar_mark(path: Path) -> bool:
    """Whether a file is an uncompressed POSIX or GNU tar.

    Files without their magic are read as a stream, which works for every tar but is slower.
    """
    with open_regular(path) as stream:
        return stream.read(262)[257:262] == b"ustar"


class _RefusedError(tarfile.TarError):
    """A tar with a member that is refused, though it may be intact."""


class _SmallHeader(tarfile.TarInfo):
    """A member's header, refused where tarfile would read any number of bytes of it into memory.

    Sparse files are refused: a tar leaves their holes out, so their bytes are not stored as they are, and the list of
    holes may have any length.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTENSIONS and header.size > _MOST_EXTENSION:
            size = f"{header.size:,} bytes"
            raise _RefusedError(f"a tar header of type {header.type!r} and {size}; the file is not used.")
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise _sparse(header.name)
        return header

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        header = super().fromtarfile(tarfile)
        if any(key.startswith(_SPARSE_KEYS) for key in header.pax_headers):
            raise _sparse(header.name)
        return header

    def _proc_gnusparse_10(self, member: Self, pax_headers: Mapping[str, str], _: object) -> None:
        """Override tarfile's method, which reads the list of holes however long it is."""
        raise _sparse(pax_headers.get("GNU.sparse.name", member.name))


def _sparse(name: str) -> _RefusedError:
    return _RefusedError(f"{name!r} is a sparse file, not supported. Pack the tar again without --sparse (-S).")


_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_MOST_EXTENSION = 1 << 20  # they hold names and times
_SPARSE_KEYS = ("GNU.sparse.", "SCHILY.realsize")  # of GNU tar and bsdtar, and of star
