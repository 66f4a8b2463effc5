"""SHA-256 of files and of the members of containers, and the canonical JSON that digests are taken over."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mamldata.io.atomic import open_regular
from mamldata.progress import Advance

CHUNK = 1 << 20


def canonical_json(value: Any) -> bytes:
    """``value`` as canonical JSON: sorted keys, no spaces, ASCII, one final newline.

    Raises:
        ValueError: it has a number that is not finite, or is nested too deeply.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    return text.encode("ascii") + b"\n"


def parse_json(data: bytes, most_values: int = 1 << 20) -> Any:
    """Parse a JSON text of at most ``most_values`` values, which are counted before any of them is created.

    An empty list is two bytes of JSON and 64 of memory. Values are counted by commas and opening brackets, also those
    inside strings, so leave some margin.

    Raises:
        ValueError: it is not JSON, has more values, or is nested too deeply.
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


def sha256_file(path: Path, advance: Advance | None = None) -> str:
    """SHA-256 of a file's bytes, in hex; ``advance`` is called with each chunk's length in bytes."""
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        for chunk in chunks(stream):
            digest.update(chunk)
            if advance:
                advance(len(chunk))
    return digest.hexdigest()


def md5_file(path: Path) -> str:
    """MD5 of a file's bytes, in hex. It detects accidents, not attacks: for files with no better published digest."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def chunks(stream: IO[bytes], size: int = CHUNK) -> Iterator[bytes]:
    """The rest of ``stream``, in pieces of at most ``size`` bytes."""
    while chunk := stream.read(size):
        yield chunk
