"""One transfer over HTTP: what the server says is believed only as far as it can be checked.

A transfer appends to a partial file. Whatever goes wrong is one of three things: worth another try, a reason to
start the file anew, or final for this address.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import requests
import urllib3

import mamldata
from mamldata.files import writing

_CHUNK = 1 << 16


@dataclass(frozen=True)
class Network:
    """How patient a fetch is. Times in seconds.

    Attributes:
        connect_timeout, read_timeout: how long to wait for a connection, and for the next bytes.
        rounds: how often all sources are tried in turn.
        backoff: the pause after the first round; it doubles with each.
        longest_pause: no pause is longer, whatever a server asks for with Retry-After.
        stall_seconds, min_speed: a server that stays below so many bytes a second for so long is left.
    """

    connect_timeout: float = 10.0
    read_timeout: float = 30.0
    rounds: int = 4
    backoff: float = 1.0
    longest_pause: float = 60.0
    stall_seconds: float = 30.0
    min_speed: float = 1024.0


class TransferError(Exception):
    """A transfer that failed and may succeed when it is tried again.

    Args:
        reason: for people.
        retry_after: seconds that the server asks to wait.
    """

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class StartAnewError(TransferError):
    """What is there of the file is of no use: it must be dropped before the next try."""


class WrongContentError(TransferError):
    """The address gives something else: no more tries there."""


def download(
    session: requests.Session,
    url: str,
    part: Path,
    *,
    expected: int,
    limit: int,
    network: Network,
    advance: Callable[[int], object],
) -> None:
    """Append the rest of a file to its partial file, which has its whole length afterwards.

    Args:
        session: of requests.
        url: http(s).
        part: the partial file; if it is there, the transfer goes on behind it.
        expected: the length that the manifest gives.
        limit: the longest that the file may be.
        network: the patience.
        advance: told of the bytes written; negative when bytes that were there are of no use.

    Raises:
        TransferError: and its kinds.
        WriteError: the disk is full, or the place cannot be written to.
    """
    have = part.stat().st_size if part.is_file() else 0
    headers = {"Accept-Encoding": "identity", "User-Agent": f"mamldata/{mamldata.__version__}"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if validator := _validator(part, url):
            headers["If-Range"] = validator
    try:
        with session.get(
            url, headers=headers, stream=True, timeout=(network.connect_timeout, network.read_timeout)
        ) as response:
            if response.status_code == 416 and response.headers.get("Content-Range") == f"bytes */{have}":
                return  # the partial file is the whole one; an earlier process died before it could see that
            start = _start(response, have)
            total = _announced(response, start, limit)
            _remember(part, url, response)
            if start < have:
                advance(start - have)
            _receive(response, part, start, limit, network, advance)
    except (requests.RequestException, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
        raise TransferError(_reason(error)) from error
    got = part.stat().st_size
    if total is not None and got < total:
        raise TransferError(f"the connection ended after {got:,} of {total:,} bytes")
    if got < expected and total is None:
        raise TransferError(f"the connection ended after {got:,} of {expected:,} bytes")


def _start(response: requests.Response, have: int) -> int:
    """Where in the file the body of this response begins."""
    status = response.status_code
    if status == 206:
        start, _ = _content_range(response)
        if start != have:
            raise StartAnewError(f"the server sent bytes from {start} when those from {have} were asked for")
        return have
    if status == 200:
        _refuse_html(response)
        return 0
    if status == 416:
        raise StartAnewError(f"the server has no bytes behind {have:,} (HTTP 416)")
    raise TransferError(f"HTTP {status} {response.reason}".rstrip(), _retry_after(response))


def _content_range(response: requests.Response) -> tuple[int, int | None]:
    """First byte and total length of ``Content-Range: bytes 5-9/10``."""
    text = response.headers.get("Content-Range", "")
    unit, _, rest = text.partition(" ")
    span, _, total = rest.partition("/")
    first, _, last = span.partition("-")
    if unit != "bytes" or not first.isdigit() or not last.isdigit():
        raise StartAnewError(f"the server sent a part of the file without saying which ({text!r})")
    return int(first), int(total) if total.isdigit() else None


def _announced(response: requests.Response, start: int, limit: int) -> int | None:
    """The file's length by the server's word, None if it says nothing."""
    if response.status_code == 206:
        total = _content_range(response)[1]
    else:
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdigit() else None
    if total is not None and total > limit:
        raise WrongContentError(f"the server announces {total:,} bytes, more than the {limit:,} that it can be")
    if total is not None and total < start:
        raise StartAnewError(f"the file has only {total:,} bytes now")
    return total


def _refuse_html(response: requests.Response) -> None:
    if response.headers.get("Content-Type", "").lower().startswith("text/html"):
        raise WrongContentError("the server sent a web page, not the file")


def _receive(
    response: requests.Response,
    part: Path,
    start: int,
    limit: int,
    network: Network,
    advance: Callable[[int], object],
) -> None:
    with writing(part), part.open("r+b" if start else "wb") as stream:
        stream.seek(start)
        written = start
        for chunk in _watched(response, network):
            if written == 0 and _looks_like_html(chunk):
                raise WrongContentError("the server sent a web page, not the file")
            written += len(chunk)
            if written > limit:
                stream.truncate(0)
                raise WrongContentError(f"the server sent more than the {limit:,} bytes that the file can be")
            stream.write(chunk)
            advance(len(chunk))


def _watched(response: requests.Response, network: Network) -> Iterator[bytes]:
    """The body in pieces as they come, leaving a server that only drips."""
    since, count = time.monotonic(), 0
    # read1, because read would wait until a whole piece is there, however slowly it comes.
    while chunk := response.raw.read1(_CHUNK):
        yield chunk
        count += len(chunk)
        elapsed = time.monotonic() - since
        if elapsed >= network.stall_seconds:
            if count < network.min_speed * elapsed:
                raise TransferError(f"the server is too slow: {count / elapsed:,.0f} bytes a second")
            since, count = time.monotonic(), 0


def _looks_like_html(chunk: bytes) -> bool:
    return chunk.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html"))


def _retry_after(response: requests.Response) -> float:
    text = response.headers.get("Retry-After", "")
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


def _reason(error: Exception) -> str:
    if isinstance(error, requests.TooManyRedirects):
        return "the server redirects in a circle"
    if isinstance(error, requests.ConnectTimeout):
        return "no connection in time"
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError | TimeoutError):
        return "the server sent nothing for too long"
    return f"the connection failed ({type(error).__name__}: {error})"


def notes(part: Path) -> Path:
    """Beside a partial file: where it comes from and what the server called that version of it."""
    return part.with_name(part.name + ".json")


def _remember(part: Path, url: str, response: requests.Response) -> None:
    validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
    if validator and not validator.startswith("W/"):  # a weak tag promises meaning, not bytes
        with writing(part):
            notes(part).write_text(json.dumps({"url": url, "validator": validator}))


def _validator(part: Path, url: str) -> str | None:
    """The tag of the version that the partial file was begun with, if it came from this very address."""
    try:
        noted: dict[str, Any] = json.loads(notes(part).read_text())
        return str(noted["validator"]) if noted["url"] == url else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
