"""One file over HTTP: resumed where it stopped, never longer than it may be, abandoned when it only drips.

Whether what came is the right file is not decided here.
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
from mamldata.io.urls import shown_place, shown_text
from mamldata.progress import Advance, Notify
from mamldata.version import __version__

_CHUNK = 1 << 20  # smaller ones cost a fifth more time for the same bytes, and larger ones fall out of the cache
_LATER = (408, 425, 429)  # of the statuses that blame the request, those that another moment mends
_SAID = 200  # characters of a server's own words in a message
_HEAD = 1 << 10  # a page's first bytes, however much white space it begins with
_HEADWAY = 1 << 20  # bytes that make a round of tries worth its while
_HTML = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html[\s>])", re.IGNORECASE)
_MAYBE_HTML = re.compile(rb"(\xef\xbb\xbf)?\s*(<|\Z)")
_TAG = re.compile(r"[\x20-\x7e]+")  # what may be sent back to a server in a header

Result = TypeVar("Result")


@dataclass(frozen=True)
class Network:
    """How patient a download is. All times in seconds.

    Attributes:
        connect_timeout: for a connection; for a proxy's answer and for the TLS handshake, as much again each.
        read_timeout: for the head of an answer, status and headers; then for the next byte of the file.
        rounds: how often all sources are tried; a round that brought the file on by a mebibyte does not count.
        backoff: the pause after the first round; it doubles with each further one.
        longest_pause: the cap on that pause, and on what a server's Retry-After may ask for.
        min_speed: bytes a second below which a server is abandoned for the next.
        stall_seconds: how long it may stay below.
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
            raise RequestError(f"Network settings: {'; '.join(faults)}.")

    def _good(self, name: str) -> bool:
        value: float = getattr(self, name)
        return value > 0 or (value == 0 and name in {"backoff", "longest_pause", "min_speed"})

    def pause(self, failed_rounds: int, asked: float) -> float:
        """How long to wait after so many rounds in vain, when a server asked for ``asked`` seconds."""
        return min(self.longest_pause, max(asked, self.backoff * 2.0 ** min(max(failed_rounds - 1, 0), 30)))


class SourceError(Exception):
    """One source failed; another one, or the same one later, may do better.

    Args:
        text: what went wrong.
        final: asking this source again is of no use.
        retry_after: seconds that the server asked us to wait.
        status: of the HTTP answer, if that was the reason.
        wrong: what came was whole, but is not what should come.
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
        """Whether an HTTP server has said that the fault is the request's: it is not there, or not for us."""
        return self.status is not None and 400 <= self.status < 500 and self.status not in _LATER


class GaveUpError(Exception):
    """No source gave the file.

    Args:
        failures: the last failure of each source.
    """

    def __init__(self, failures: Mapping[str, SourceError]) -> None:
        super().__init__("; ".join(map(str, failures.values())))
        self.failures = failures


class UnusableRangeError(SourceError):
    """The server cannot go on from where the file stopped."""


class Writable(Protocol):
    """What bytes can be written to."""

    def write(self, data: bytes, /) -> object:
        """Write all of ``data``."""
        ...


class Part:
    """The first bytes of a file under way, in ``<name>.part``, and a note of whose they are."""

    def __init__(self, final: Path) -> None:
        self.path = temporary(final)
        # No raw file's name begins with a dot, so that this one is never another file's.
        self._note = final.with_name(f".{final.name}.origin.json")

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def validator(self, url: str) -> str | None:
        """What the server at ``url`` called the version of the file that these bytes are of, if they are from there."""
        try:
            note = parse_json(read_whole(self._note, MOST_NOTE))
            url_noted, validator = note["url"], note["validator"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        known = url_noted == shown_place(url) and isinstance(validator, str) and _TAG.fullmatch(validator)
        return validator if known else None

    def note(self, url: str, validator: str | None) -> None:
        """Remember which version of the file at ``url`` the bytes are of."""
        text = json.dumps({"url": shown_place(url), "validator": validator})
        write_atomic(self._note, text.encode(), lasting=False)  # it is checked against the server, and costs a flush

    @contextmanager
    def writer(self, offset: int) -> Iterator[Writable]:
        """Open for more bytes: anew if ``offset`` is 0, else after the ``offset`` bytes that there are.

        Raises:
            WriteError: it cannot be written; what was written stays.
        """
        with writing(self.path), self.path.open("ab" if offset else "wb") as stream:
            yield stream

    def forget(self) -> None:
        """Remove the note, half-written or whole."""
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
    """Ask sources in turn, pause, and ask those again that may do better then.

    Args:
        sources: paths and addresses, in order.
        attempt: one try of one source; raises ``SourceError``.
        part: the bytes so far.
        network: how patient to be.
        notify: told of failed tries and of pauses, a line each.

    Raises:
        GaveUpError: none gave the file.
    """
    alive, failures, vain_rounds, most = list(sources), dict[str, SourceError](), 0, part.size
    while alive:
        asked = 0.0
        for source in tuple(alive):
            try:
                return attempt(source)
            except SourceError as error:
                # Without its traceback, which would keep alive whatever the try holds.
                failures[source] = error.with_traceback(None)
                notify(f"{shown_place(source)}: {error}")
                asked = max(asked, error.retry_after)
                if error.final:
                    alive.remove(source)
        # A bad line that brings some of a large file each time will bring all of it.
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
    """A session that asks for files as they are. The caller closes it."""
    session = requests.Session()
    session.headers["User-Agent"] = f"mamldata/{__version__}"
    # Compressed on the way, a file's length and ranges would be those of other bytes.
    session.headers["Accept-Encoding"] = "identity"
    session.max_redirects = 10
    session.mount("http://", TimedAdapter())
    session.mount("https://", TimedAdapter())
    session.hooks["response"].append(_leave_body)
    # A request has a jar of its own, for the hops of a redirect; the session's would grow with every answer.
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
    return session


def _leave_body(response: requests.Response, **_: object) -> None:
    """Close a redirect: whether it follows it or not, requests reads the body of an open one whole, and unpacks it."""
    if response.is_redirect:
        response.close()


def transfer(session: requests.Session, url: str, part: Part, bound: int, network: Network, at: Advance) -> bool:
    """Get the rest of a file into its part, or all of it if the server has no ranges or another version.

    Args:
        session: from ``open_session``.
        url: one mirror's.
        part: the bytes so far; what arrives is kept there, also on failure.
        bound: the most bytes that the whole file may have.
        network: how patient to be.
        at: told of the number of bytes that there are now.

    Returns:
        Whether the first bytes are older than this call.

    Raises:
        UnusableRangeError: the server cannot go on from here; without a part it may do better.
        SourceError: any other failure of the server or the way to it.
        WriteError: the part cannot be written.
    """
    asked = part.size
    timeout = (network.connect_timeout, network.read_timeout)
    with (
        _plain_failures(network),
        session.get(url, headers=_range(asked, part.validator(url)), stream=True, timeout=timeout) as response,
    ):
        headers = response.headers
        offset = _start_of_body(response.status_code, response.reason, headers, asked)
        _refuse_page(headers)
        _refuse_length(headers, offset, bound)
        body = _body(response, bound - offset, network)
        head = _head(body) if offset == 0 else b""
        if _HTML.match(head):
            raise SourceError("it sent a web page (HTML) in place of the file")
        with part.writer(offset) as stream:
            # After the old bytes are gone and before new ones come: whenever we are killed, the note is not
            # that of other bytes.
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
    """At which byte of the file the body of an answer begins.

    Raises:
        SourceError: the answer is not the file, or not the part of it that was asked for.
    """
    if status == 200:
        return 0
    if asked and status == 206:
        given = headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/(?:[0-9]{1,18}|\*)", given)
        if match and int(match[1]) == asked:
            return asked
        raise UnusableRangeError(f"asked for the bytes from {asked:,} on, it sent {_said(given) or 'others'!r}")
    if asked and status == 416:
        raise UnusableRangeError(f"it has nothing after the first {asked:,} bytes (HTTP 416)")
    asked_for = _retry_after(headers, datetime.now(UTC))
    raise SourceError(f"HTTP {status} {_said(reason)}".strip(), retry_after=asked_for, status=status)


def _retry_after(headers: Mapping[str, str], now: datetime) -> float:
    """The seconds that ``Retry-After`` asks for, given as a number or as a date; 0 if it asks for nothing."""
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
        raise SourceError("it sent a web page (HTML) in place of the file")


def _refuse_length(headers: Mapping[str, str], offset: int, bound: int) -> None:
    length = headers.get("Content-Length")
    if length is not None and not (re.fullmatch("[0-9]{1,18}", length) and offset + int(length) <= bound):
        announced = f"{offset:,} + {_said(length)}" if offset else _said(length)
        raise SourceError(f"it announces {announced} bytes; the file has at most {bound:,}", final=True)


def _validator(headers: Mapping[str, str]) -> str | None:
    """What names this version of the file in an ``If-Range``: a strong ETag, else the date of its last change."""
    tag = headers.get("ETag", "")
    value = tag if re.fullmatch(r'"[^"]*"', tag) else headers.get("Last-Modified", "")
    return value if _TAG.fullmatch(value) else None


def _head(body: Iterator[bytes]) -> bytes:
    """Enough of the body to tell a page from data."""
    head = b""
    for chunk in body:
        head += chunk
        if len(head) >= _HEAD or not _MAYBE_HTML.match(head):
            break
    return head


def _body(response: requests.Response, allowance: int, network: Network) -> Iterator[bytes]:
    """The bytes of a body as they come, ``allowance`` at the most and as they are on the way.

    Raises:
        SourceError: the connection broke, stalled, or was too slow for too long.
    """
    # Either gives what is there, see ``TimedAdapter``; old versions of urllib3 have no read1.
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


@contextmanager
def _plain_failures(network: Network) -> Iterator[None]:
    """Turn what requests and urllib3 raise into one short line.

    Raises:
        SourceError: with that line.
    """
    try:
        yield
    except requests.ConnectTimeout as error:
        raise SourceError(f"no connection within {network.connect_timeout:g} s") from error
    except requests.TooManyRedirects as error:
        raise SourceError("it redirects in a circle, or too often") from error
    except (requests.RequestException, HTTPError, ValueError) as error:  # ValueError: a Location that is no address
        root = _root_cause(error)
        if isinstance(root, TimeoutError):
            raise SourceError(f"nothing of the file came for {network.read_timeout:g} s") from error
        why = _said(shown_text(str(root))) or type(root).__name__
        raise SourceError(f"the connection failed ({why})") from error


def _said(text: str) -> str:
    """What a server sent, fit for a message: one line, not long, without what steers a terminal."""
    return "".join(mark if mark.isprintable() else "?" for mark in text[:_SAID])


def _root_cause(error: BaseException) -> BaseException:
    while (deeper := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = deeper
    return error
