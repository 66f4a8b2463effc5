"""The content digest of a container: the same for equal members, in whatever zip or tar they are packed."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from mamldata.errors import DamagedError
from mamldata.io.containers import (
    Link,
    Member,
    follow_links,
    is_zip,
    open_tar,
    reading_container,
    tar_entry,
    tar_headers,
    zip_entry,
)
from mamldata.io.digest import chunks, sha256_bytes


def content_sha256(path: Path, limit: int) -> str:
    """The content digest of a zip or tar, which depends on its members only, not on how they are packed.

    The SHA-256 of one line ``path NUL sha256hex NEWLINE`` per file, the lines sorted as bytes. Links count as their
    targets, so that it does not matter which name of a file is the link; links that lead to no file do not count.

    Args:
        path: the container.
        limit: upper bound in bytes on all unpacked members, so that a crafted container cannot
            unpack without end.

    Raises:
        DamagedError: not a zip or tar, a damaged member, an unsafe name, or more than ``limit`` bytes.
    """
    with reading_container(path):
        return digest_of_contents(_member_digests(path, limit))


def digest_of_contents(files: Iterable[tuple[str, str]]) -> str:
    """The content digest of files, in any order, each given as its name and the SHA-256 of its bytes in hex."""
    lines = sorted(name.encode() + b"\0" + digest.encode() + b"\n" for name, digest in files)
    return sha256_bytes(b"".join(lines))


def _member_digests(path: Path, limit: int) -> Iterator[tuple[str, str]]:
    spent = 0
    entries: list[Member | Link] = []
    digests: dict[int | None, str] = {}
    for entry, stream in _entries(path):
        digest = hashlib.sha256()
        for chunk in chunks(stream):
            spent += len(chunk)
            if spent > limit:
                raise DamagedError(f"{path}: its members unpack to more than {limit:,} bytes; the file is not used.")
            digest.update(chunk)
        entries.append(entry)
        if isinstance(entry, Member):
            digests[entry.entry] = digest.hexdigest()
    for member in follow_links(entries):
        if not member.problem:
            yield member.name, digests[member.entry]


def _entries(path: Path) -> Iterator[tuple[Member | Link, IO[bytes]]]:
    """The files of a container, each with an open stream, and its links, each with an empty one."""
    if is_zip(path):
        with zipfile.ZipFile(path) as container:
            for info in container.infolist():
                if entry := zip_entry(container, info, str(path)):
                    with container.open(info) if isinstance(entry, Member) else io.BytesIO() as stream:
                        yield entry, stream
        return
    with open_tar(path) as tar:
        for header in tar_headers(tar, str(path)):
            if entry := tar_entry(header, str(path)):
                yield entry, (tar.extractfile(header) if isinstance(entry, Member) else None) or io.BytesIO()
