"""SHA-256 of files and of the members of containers, and the canonical JSON that digests are taken over."""

from __future__ import annotations

import errno
import hashlib
import json
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self

from mamldata.errors import DamagedError

CHUNK = 1 << 20


def canonical_json(value: Any) -> bytes:
    """``value`` as canonical JSON: sorted keys, no spaces, ASCII, one final newline."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of ``data``, in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path, advance: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file's bytes, in hex; ``advance`` is told of each chunk's length."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for chunk in chunks(stream):
            digest.update(chunk)
            if advance:
                advance(len(chunk))
    return digest.hexdigest()


def chunks(stream: IO[bytes], size: int = CHUNK) -> Iterator[bytes]:
    """The rest of ``stream``, in pieces of at most ``size`` bytes."""
    while chunk := stream.read(size):
        yield chunk


def safe_member_name(name: str, container: str) -> str:
    """``name`` if it is a plain relative path; members that point elsewhere make a container unfit.

    Raises:
        DamagedError: for absolute paths, ``..`` components, backslashes or NUL characters.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise DamagedError(f"{container}: the member {name!r} points outside the container; the file is not used.")
    return name


def content_sha256(path: Path, limit: int) -> str:
    """The content digest of a zip or tar: what its members say, whatever container holds them.

    One line ``path NUL sha256hex NEWLINE`` per file, the lines sorted as bytes, sha256 of the whole.

    Args:
        path: the container.
        limit: the most bytes that all members may unpack to, so that a crafted container cannot
            keep us busy for ever.

    Raises:
        DamagedError: neither a zip nor a tar, a damaged member, an unsafe name, or more than ``limit`` bytes.
    """
    with reading_container(path):
        lines = sorted(name.encode() + b"\0" + digest.encode() + b"\n" for name, digest in _member_digests(path, limit))
    return hashlib.sha256(b"".join(lines)).hexdigest()


@contextmanager
def reading_container(path: Path) -> Iterator[None]:
    """Turn whatever zipfile, tarfile and the decompressors raise on damaged bytes into one clear error.

    Raises:
        DamagedError: the container, or a member of it, cannot be read.
    """
    try:
        yield
    except _CONTAINER_ERRORS as error:
        raise DamagedError(f"{path}: a damaged container ({error}).") from error
    except OSError as error:
        # bz2 and gzip raise it without a number, and a seek to where a damaged offset points is invalid.
        if error.errno not in {None, errno.EINVAL}:
            raise
        raise DamagedError(f"{path}: a damaged container ({error}).") from error


# NotImplementedError and RuntimeError are zipfile's answers to flipped method and encryption bits, ValueError is
# for negative offsets and for names that are no text.
_CONTAINER_ERRORS = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
    struct.error,
)


def _member_digests(path: Path, limit: int) -> Iterator[tuple[str, str]]:
    spent = 0
    for name, stream in _members(path):
        digest = hashlib.sha256()
        for chunk in chunks(stream):
            spent += len(chunk)
            if spent > limit:
                raise DamagedError(f"{path}: its members unpack to more than {limit:,} bytes; the file is not used.")
            digest.update(chunk)
        yield safe_member_name(name, str(path)), digest.hexdigest()


def _members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as container:
            for info in container.infolist():
                if not info.is_dir():
                    with container.open(info) as stream:
                        yield info.filename, stream
        return
    with _open_tar(path) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name, content


def _open_tar(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, tarinfo=_SmallHeader)
    except tarfile.ReadError as error:
        raise DamagedError(f"{path}: neither a zip nor a tar file, so it has no content digest.") from error


class _SmallHeader(tarfile.TarInfo):
    """A member's header, refused where tarfile would take any number of bytes of it into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        long = header.type in _EXTENSIONS and header.size > _MOST_EXTENSION
        if long or header.type == tarfile.GNUTYPE_SPARSE:
            raise DamagedError(f"a tar header of type {header.type!r} and {header.size:,} bytes; the file is not used.")
        return header


_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_MOST_EXTENSION = 1 << 20  # they hold names and times
