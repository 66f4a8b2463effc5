"""Download one file over HTTP: resume it where it stopped, bound its length, and abandon servers that are too slow.

Whether the result is the right file is not decided here.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from itertools import chain
from pathlib import Path
from typing import Protocol, TypeVar

import requests
from urllib3.exceptions import HTTPError

from mamldata.errors import RequestError
from mamldata.fetching.deadlines import TimedAdapter
from mamldata.io.atomic import MOST_NOTE, read_whole, temporary, write_atomic, writing
from mamldata.io.digest import parse_json
from mamldata.io.urls import shown_cause, shown_error, shown_place, shown_text
from mamldata.progress import Advance, Notify
from mamldata.version import __version__

_CHUNK = 1 << 20  # smaller ones cost a fifth more time for the same bytes, and larger ones fall out of the cache
_LATER = (408, 425, 429)  # client errors that may succeed later
_SAID = 200  # characters of a server's own words in a message
_HEAD = 1 << 10  # bytes of a body that are checked for a web page
_HEADWAY = 1 << 20  # bytes of progress after which a failed round does not count
_HTML = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html[\s>])", re.IGNORECASE)
_MAYBE_HTML = re.compile(rb"(\xef\xbb\xbf)?\s*(<|\Z)")
_TAG = re.compile(r"[\x21-\x7e][\x20-\x7e]*")  # what may be sent back to a server in a header

Result = TypeVar("Result")


@dataclass(frozen=True)
class Network:
    """Timeouts and retries of a download. All times in seconds.

    Attributes:
        connect_timeout: for a connection, and again each for a proxy's response and the TLS handshake.
        read_timeout: for the status and headers of a response; then for each next byte of the file.
        rounds: how often all sources are tried; a round that gains at least 1 MiB of the file does not count.
        backoff: the pause after the first round; it doubles with each further one.
        longest_pause: the cap on that pause, and on a server's Retry-After.
        min_speed: bytes per second below which a server is abandoned for the next.
        stall_seconds: how long the speed may stay below ``min_speed``.
    """

    connect_timeout: float = 10.0
    read_timeout: float = 30.0
    rounds: int = 4
    backoff: float = 1.0
    longest_pause: float = 60.0
    min_speed: float = 1024.0
    stall_seconds: float = 30.0

    def __post_init__(self) -> None:
        faults = [
            f"{name} must be more than 0, not {value}" for name, value in vars(self).items() if not self._good(name)
        ]
        if faults:
            raise RequestError(f"Invalid network settings: {'; '.join(faults)}.")

    def _good(self, name: str) -> bool:
        value: float = getattr(self, name)
        return value > 0 or (value == 0 and name in {"backoff", "longest_pause", "min_speed"})

    def pause(self, failed_rounds: int, asked: float) -> float:
        """Seconds to wait after ``failed_rounds`` rounds if a server asked for ``asked`` seconds."""
        return min(self.longest_pause, max(asked, self.backoff * 2.0 ** min(max(failed_rounds - 1, 0), 30)))


class SourceError(Exception):
    """One source failed; another one, or the same one later, may succeed.

    Args:
        text: what went wrong.
        final: trying this source again cannot help.
        retry_after: seconds that the server asked us to wait.
        status: of the HTTP response, if that was the reason.
        wrong: the file arrived completely, but is the wrong one.
    """

    def __init__(
        self,
        text: str,
        *,
        final: bool = False,
        retry_after: float = 0.0,
        status: int | None = None,
        wrong: bool = False,
    ) -> None:
        super().__init__(text)
        self.wrong = wrong
        self.final = final
        self.retry_after = retry_after
        self.status = status

    @property
    def refused(self) -> bool:
        """Whether an HTTP server rejected the request for good, as not found or forbidden."""
        return self.status is not None and 400 <= self.status < 500 and self.status not in _LATER


class GaveUpError(Exception):
    """No source provided the file.

    Args:
        failures: the last failure of each source.
    """

    def __init__(self, failures: Mapping[str, SourceError]) -> None:
        super().__init__("; ".join(map(str, failures.values())))
        self.failures = failures


class UnusableRangeError(SourceError):
    """The server cannot resume the file where it stopped."""


class Writable(Protocol):
    """An object with a ``write`` method for bytes."""

    def write(self, data: bytes, /) -> object:
        """Write all of ``data``."""
        ...


class Part:
    """The first bytes of an unfinished file, in ``<name>.part``, and a note of their source."""

    def __init__(self, final: Path) -> None:
        self.path = temporary(final)
        # Names of raw files never begin with a dot, so this name is free.
        self._note = final.with_name(f".{final.name}.origin.json")

    @property
    def size(self) -> int:
        """Number of bytes so far."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def validator(self, url: str) -> str | None:
        """The ETag or date that the server at ``url`` gave with these bytes; None if they are from elsewhere."""
        try:
            note = parse_json(read_whole(self._note, MOST_NOTE))
            url_noted, validator = note["url"], note["validator"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        known = url_noted == shown_place(url) and isinstance(validator, str) and _TAG.fullmatch(validator)
        return validator if known else None

    def note(self, url: str, validator: str | None) -> None:
        """Record from which version of the file at ``url`` the bytes are."""
        text = json.dumps({"url": shown_place(url), "validator": validator})
        write_atomic(self._note, text.encode(), lasting=False)  # no flush: the server checks it

    @contextmanager
    def writer(self, offset: int) -> Iterator[Writable]:
        """Open for writing: from the start if ``offset`` is 0, else after the first ``offset`` bytes.

        Raises:
            WriteError: it cannot be written; the bytes written before stay.
        """
        with writing(self.path), self.path.open("ab" if offset else "wb") as stream:
            yield stream

    def forget(self) -> None:
        """Remove the note, also a half-written one."""
        with writing(self._note):
            temporary(self._note).unlink(missing_ok=True)
            self._note.unlink(missing_ok=True)

    def drop(self) -> None:
        """Remove the bytes and the note."""
        with writing(self.path):
            self.path.unlink(missing_ok=True)
        self.forget()


def keep_trying(
    sources: Iterable[str], attempt: Callable[[str], Result], part: Part, network: Network, notify: Notify
) -> Result:
    """Try the sources in turn, pause, and try those again that may succeed then.

    Args:
        sources: paths and addresses, in order.
        attempt: tries one source once; raises ``SourceError``.
        part: the bytes so far.
        network: timeouts and retries.
        notify: called with one line for each failed attempt and each pause.

    Raises:
        GaveUpError: no source provided the file.
    """
    alive, failures, vain_rounds, most = list(sources), dict[str, SourceError](), 0, part.size
    while alive:
        asked = 0.0
        for source in tuple(alive):
            try:
                return attempt(source)
            except SourceError as error:
                # Without its traceback, which would keep the attempt's objects alive.
                failures[source] = error.with_traceback(None)
                notify(f"{shown_place(source)}: {error}")
                asked = max(asked, error.retry_after)
                if error.final:
                    alive.remove(source)
        # A bad connection that gains some of a large file in each round will finish it.
        vain_rounds = 0 if part.size >= most + _HEADWAY else vain_rounds + 1
        most = max(most, part.size)
        if vain_rounds >= network.rounds:
            break
        if alive:
            pause = network.pause(vain_rounds, asked)
            notify(f"trying again in {pause:.0f} s")
            time.sleep(pause)
    raise GaveUpError(failures)


def open_session() -> requests.Session:
    """A session that requests files without compression. The caller closes it."""
    session = requests.Session()
    session.headers["User-Agent"] = f"mamldata/{__version__}"
    # With compression, length and ranges would count compressed bytes.
    session.headers["Accept-Encoding"] = "identity"
    session.max_redirects = 10
    session.mount("http://", TimedAdapter())
    session.mount("https://", TimedAdapter())
    session.hooks["response"].append(_leave_body)
    # Each request has its own cookie jar, for the hops of a redirect; the session's would grow with every response.
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
    return session


def _leave_body(response: requests.Response, **_: object) -> None:
    """Close a redirect, because requests would read and unpack its whole body, whether it follows it or not."""
    if response.is_redirect:
        response.close()


def transfer(session: requests.Session, url: str, part: Part, bound: int, network: Network, at: Advance) -> bool:
    """Download the rest of a file into its part, or all of it if the server has no ranges or another version.

    Args:
        session: from ``open_session``.
        url: of one mirror.
        part: the bytes so far; what arrives is kept there, also on failure.
        bound: upper bound in bytes on the whole file.
        network: timeouts and retries.
        at: called with the number of bytes so far.

    Returns:
        Whether the first bytes are from an earlier call.

    Raises:
        UnusableRangeError: the server cannot resume here; it may succeed from the start.
        SourceError: any other failure of the server or the connection.
        WriteError: the part cannot be written.
    """
    asked = part.size
    timeout = (network.connect_timeout, network.read_timeout)
    with (
        _plain_failures(network, url),
        session.get(url, headers=_range(asked, part.validator(url)), stream=True, timeout=timeout) as response,
    ):
        headers = response.headers
        offset = _start_of_body(response.status_code, response.reason, headers, asked)
        _refuse_page(headers)
        _refuse_length(headers, offset, bound)
        body = _body(response, bound - offset, network)
        head = _head(body) if offset == 0 else b""
        if _HTML.match(head):
            raise SourceError("it sent a web page (HTML) instead of the file")
        with part.writer(offset) as stream:
            # After the old bytes are gone and before new ones arrive, so that the note never describes other bytes,
            # whenever the process is killed.
            part.note(url, _validator(headers))
            at(offset)
            for chunk in chain([head], body):
                stream.write(chunk)
                offset += len(chunk)
                at(offset)
        return asked > 0 and response.status_code == 206


def _range(asked: int, validator: str | None) -> dict[str, str]:
    if not asked:
        return {}
    return {"Range": f"bytes={asked}-"} | ({"If-Range": validator} if validator else {})


def _start_of_body(status: int, reason: str, headers: Mapping[str, str], asked: int) -> int:
    """The offset in the file at which the body of a response begins.

    Raises:
        SourceError: the response is not the file, or not the requested part of it.
    """
    if status == 200:
        return 0
    if asked and status == 206:
        given = headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/(?:[0-9]{1,18}|\*)", given)
        if match and int(match[1]) == asked:
            return asked
        raise UnusableRangeError(f"asked for the bytes from {asked:,} on, it sent {_said(given) or 'other bytes'!r}")
    if asked and status == 416:
        raise UnusableRangeError(f"it has nothing after the first {asked:,} bytes (HTTP 416)")
    asked_for = _retry_after(headers, datetime.now(UTC))
    raise SourceError(f"HTTP {status} {_said(reason)}".strip(), retry_after=asked_for, status=status)


def _retry_after(headers: Mapping[str, str], now: datetime) -> float:
    """The seconds that ``Retry-After`` asks for, as a number or a date; 0 without a valid one."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch("[0-9]{1,9}", value):
        return float(value)
    try:
        until = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return 0.0
    aware = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (aware - now).total_seconds())


def _refuse_page(headers: Mapping[str, str]) -> None:
    if headers.get("Content-Type", "").partition(";")[0].strip().lower() == "text/html":
        raise SourceError("it sent a web page (HTML) instead of the file")


def _refuse_length(headers: Mapping[str, str], offset: int, bound: int) -> None:
    length = headers.get("Content-Length")
    if length is not None and not (re.fullmatch("[0-9]{1,18}", length) and offset + int(length) <= bound):
        announced = f"{offset:,} + {_said(length)}" if offset else _said(length)
        raise SourceError(f"it announces {announced} bytes; the file has at most {bound:,}", final=True)


def _validator(headers: Mapping[str, str]) -> str | None:
    """The value for ``If-Range`` that identifies this version of the file: a strong ETag, else Last-Modified."""
    tag = headers.get("ETag", "")
    value = tag if re.fullmatch(r'"[^"]*"', tag) else headers.get("Last-Modified", "")
    return value if _TAG.fullmatch(value) else None


def _head(body: Iterator[bytes]) -> bytes:
    """Enough of the body to tell a web page from data."""
    head = b""
    for chunk in body:
        head += chunk
        if len(head) >= _HEAD or not _MAYBE_HTML.match(head):
            break
    return head


def _body(response: requests.Response, allowance: int, network: Network) -> Iterator[bytes]:
    """The bytes of a body as they arrive, undecoded, ``allowance`` bytes at most.

    Raises:
        SourceError: the connection broke, stalled, or was too slow for too long.
    """
    # Both return the bytes available, see ``TimedAdapter``; old versions of urllib3 have no read1.
    read = getattr(response.raw, "read1", response.raw.read)
    waited, got = 0.0, 0
    while allowance > 0:
        before = time.monotonic()
        chunk = read(min(_CHUNK, allowance), decode_content=False)
        waited, got = waited + time.monotonic() - before, got + len(chunk)
        if not chunk:
            return
        yield chunk
        allowance -= len(chunk)
        if waited >= network.stall_seconds:
            if got < network.min_speed * waited:
                raise SourceError(f"too slow: {got:,} bytes in {waited:.0f} s")
            waited, got = 0.0, 0


# What requests raises if a server redirects to an address with an impossible host or port.
_ODD_ADDRESS = (requests.exceptions.InvalidURL, ValueError, OverflowError, AttributeError, TypeError)


@contextmanager
def _plain_failures(network: Network, url: str) -> Iterator[None]:
    """Turn the errors of requests and urllib3 into one short line.

    Raises:
        SourceError: with that line.
    """
    try:
        yield
    except requests.ConnectTimeout as error:
        why, cause = f"no connection within {network.connect_timeout:g} s", shown_cause(error, url)
    except requests.TooManyRedirects as error:
        why, cause = "it redirects in a circle, or too often", shown_cause(error, url)
    except _ODD_ADDRESS:
        # Their messages quote parts of it.
        why, cause = "the connection failed (the address, or one that it redirects to, is invalid)", None
    except (requests.RequestException, HTTPError) as error:
        root, cause = _root_cause(error), shown_cause(error, url)
        if isinstance(root, TimeoutError):
            why = f"nothing of the file came for {network.read_timeout:g} s"
        else:
            why = f"the connection failed ({_said(shown_error(root, url)) or type(root).__name__})"
    else:
        return
    raise SourceError(why) from cause


def _said(text: str) -> str:
    """A server's text made safe for a message: one short line without control characters, and without keys.

    A library names an address to which it was redirected, or parts of one, such as ``/path?key``.
    """
    keyless = re.sub(r"[^\s'\"]+@", "…@", re.sub(r"[?#][^\s'\"]+", "?…", shown_text(text)))
    return "".join(mark if mark.isprintable() else "?" for mark in keyless[:_SAID])


def _root_cause(error: BaseException) -> BaseException:
    while (deeper := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = deeper
    return error
