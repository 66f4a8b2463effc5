"""SHA-256 of files and of the members of containers, and the canonical JSON that digests are taken over."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from mamldata.containers import is_zip, open_tar, reading_container, safe_member_name, tar_files, zip_files
from mamldata.errors import DamagedError
from mamldata.files import open_regular

CHUNK = 1 << 20


def canonical_json(value: Any) -> bytes:
    """``value`` as canonical JSON: sorted keys, no spaces, ASCII, one final newline."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def parse_json(data: bytes, most_values: int = 1 << 20) -> Any:
    """The value of a JSON text of at most ``most_values`` values, which are counted before any of them is made.

    An empty list is two bytes of JSON and 64 of memory. Each value stands behind a comma or a bracket; those in strings
    count too, so leave room for them.

    Raises:
        ValueError: it is no JSON, has more values, or is nested too deep.
    """
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > most_values:
        raise ValueError(f"more than {most_values:,} values")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of ``data``, in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path, advance: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file's bytes, in hex; ``advance`` is told of each chunk's length."""
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        for chunk in chunks(stream):
            digest.update(chunk)
            if advance:
                advance(len(chunk))
    return digest.hexdigest()


def md5_file(path: Path) -> str:
    """MD5 of a file's bytes, in hex: it tells accidents, not attacks. For files with no better published digest."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def chunks(stream: IO[bytes], size: int = CHUNK) -> Iterator[bytes]:
    """The rest of ``stream``, in pieces of at most ``size`` bytes."""
    while chunk := stream.read(size):
        yield chunk


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
        return digest_of_contents(_member_digests(path, limit))


def digest_of_contents(files: Iterable[tuple[str, str]]) -> str:
    """The content digest of files, in any order: each is its name, and the SHA-256 of its bytes in hex."""
    lines = sorted(name.encode() + b"\0" + digest.encode() + b"\n" for name, digest in files)
    return sha256_bytes(b"".join(lines))


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
    if is_zip(path):
        with zipfile.ZipFile(path) as container:
            for info in zip_files(container, str(path)):
                with container.open(info) as stream:
                    yield info.filename, stream
        return
    with open_tar(path) as tar:
        for member in tar_files(tar, str(path)):
            content = tar.extractfile(member)
            if content is not None:
                yield member.name, content
