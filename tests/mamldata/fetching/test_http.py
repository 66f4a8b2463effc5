"""One transfer: what is asked for, what is believed, what is kept. See ``test_fetch`` for whole fetches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import requests

import mamldata
from mamldata.errors import RequestError
from mamldata.fetching.http import Network, Part, SourceError, UnusableRangeError, _retry_after, open_session, transfer

Wire = Any  # the class in conftest.py

DATA = hashlib.shake_256(b"wire").digest(50_000)
QUICK = Network(connect_timeout=5, read_timeout=5, rounds=2, backoff=0, longest_pause=0)
BOUND = len(DATA)


@pytest.fixture
def session() -> Iterator[requests.Session]:
    with open_session() as running:
        yield running


@pytest.fixture
def part(tmp_path: Path) -> Part:
    return Part(tmp_path / "file.bin")


def ask(session: requests.Session, url: str, part: Part, bound: int = BOUND) -> bool:
    return transfer(session, url, part, bound, QUICK, lambda _: None)


class TestRequests:
    """What is asked for."""

    def test_the_first_request(self, wire: Wire, answer: Callable[..., bytes], session: requests.Session, part: Part):
        """It asks for the bytes as they are, says who asks, and asks for no range."""
        wire.answers = [answer(DATA, Content_Length=len(DATA))]
        assert ask(session, wire.url, part) is False
        (request,) = wire.requests
        assert request["User-Agent"] == f"mamldata/{mamldata.__version__}"
        assert request["Accept-Encoding"] == "identity"
        assert request["Range"] is None
        assert part.path.read_bytes() == DATA

    @pytest.mark.parametrize(
        ("headers", "expected"),
        [
            ({"ETag": '"v1"'}, '"v1"'),
            ({"ETag": '"v1"', "Last_Modified": "Mon, 06 May 2019 10:00:00 GMT"}, '"v1"'),
            ({"ETag": 'W/"v1"', "Last_Modified": "Mon, 06 May 2019 10:00:00 GMT"}, "Mon, 06 May 2019 10:00:00 GMT"),
            ({"ETag": 'W/"v1"'}, None),
            ({"ETag": '"caf\xe9"'}, None),
            ({}, None),
        ],
    )
    def test_what_names_a_version(
        self,
        headers: dict[str, str],
        expected: str | None,
        wire: Wire,
        answer: Callable[..., bytes],
        session: requests.Session,
        part: Part,
    ):
        """A strong ETag, else the date of the last change, goes back as If-Range; a weak tag promises no bytes."""
        rest = {"Content_Range": f"bytes 10000-{BOUND - 1}/{BOUND}", "Content_Length": BOUND - 10_000}
        wire.answers = [
            answer(DATA[:10_000], Content_Length=BOUND, **headers),
            answer(DATA[10_000:], "206 Partial Content", **rest),
        ]
        with pytest.raises(SourceError, match="the connection failed"):
            ask(session, wire.url, part)
        assert ask(session, wire.url, part) is True
        assert wire.requests[1]["Range"] == "bytes=10000-"
        assert wire.requests[1]["If-Range"] == expected
        assert part.path.read_bytes() == DATA

    def test_another_address_gets_no_if_range(
        self, wire: Wire, answer: Callable[..., bytes], session: requests.Session, part: Part
    ):
        """One mirror's name for a version says nothing to another mirror."""
        part.path.write_bytes(DATA[:10])
        part.note("http://other.example/file.bin", '"v1"')
        wire.answers = [answer(DATA[10:], "206 Partial Content", Content_Range=f"bytes 10-{BOUND - 1}/*")]
        assert ask(session, wire.url, part) is True
        assert wire.requests[0]["If-Range"] is None
        assert part.path.read_bytes() == DATA

    @pytest.mark.parametrize(
        "note",
        [
            b"",
            b"{",
            b"[]",
            b'{"url": 1}',
            b'{"url": "U", "validator": "a\\r\\nX: y"}',
            b'{"url": "U", "validator": " "}',
            b'{"url": "U", "validator": " a"}',
            b"\xff",
        ],
    )
    def test_a_damaged_note_is_no_note(
        self, note: bytes, wire: Wire, answer: Callable[..., bytes], session: requests.Session, part: Part
    ):
        """Whatever became of the note, the transfer goes on, and nothing of it gets into a header unseen."""
        part.path.write_bytes(DATA[:10])
        part.path.with_name(".file.bin.origin.json").write_bytes(note.replace(b"U", wire.url.encode()))
        wire.answers = [answer(DATA[10:], "206 Partial Content", Content_Range=f"bytes 10-{BOUND - 1}/{BOUND}")]
        assert ask(session, wire.url, part) is True
        assert wire.requests[0]["If-Range"] is None

    def test_passwords_are_neither_shown_nor_stored(self, part: Part):
        """Addresses lose their password and the key in their query before they are written anywhere."""
        url = "http://me:secret@example.org:8000/a?key=secret"
        part.note(url, '"v1"')
        assert b"secret" not in part.path.with_name(".file.bin.origin.json").read_bytes()
        assert part.validator(url) == '"v1"'
        assert part.validator(url.replace("secret", "newer")) == '"v1"', "signed anew, it is the same file"


class TestAnswers:
    """What is believed."""

    def test_what_comes_is_taken_as_it_is(
        self, wire: Wire, answer: Callable[..., bytes], session: requests.Session, part: Part
    ):
        """A file that a server calls compressed on the way is not unpacked: its digest is that of the bytes sent."""
        wire.answers = [answer(DATA, Content_Length=BOUND, Content_Encoding="gzip")]
        ask(session, wire.url, part)
        assert part.path.read_bytes() == DATA

    def test_chunks_without_a_length(
        self, wire: Wire, answer: Callable[..., bytes], session: requests.Session, part: Part
    ):
        """A body in chunks is put together."""
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (DATA[:7], DATA[7:40_000], DATA[40_000:]))
        wire.answers = [answer(body + b"0\r\n\r\n", Transfer_Encoding="chunked")]
        ask(session, wire.url, part)
        assert part.path.read_bytes() == DATA

    def test_a_chunk_that_is_cut(self, wire: Wire, answer: Callable[..., bytes], session: requests.Session, part: Part):
        """What came of a body in chunks is kept when the rest does not."""
        wire.answers = [answer(b"c350\r\n" + DATA[:20_000], Transfer_Encoding="chunked")]
        with pytest.raises(SourceError, match="the connection failed"):
            ask(session, wire.url, part)
        assert part.path.read_bytes() == DATA[:20_000]

    def test_a_body_without_end_is_read_to_the_bound(
        self, wire: Wire, answer: Callable[..., bytes], session: requests.Session, part: Part
    ):
        """Not a byte more than the file may have is taken from a server that does not stop."""
        wire.answers = [answer(DATA * 100)]
        ask(session, wire.url, part)
        assert part.size == BOUND

    @pytest.mark.parametrize("length", ["50001", "9" * 18, "9" * 30, "-1", "1e3", "5, 5"])
    def test_lengths_that_cannot_be(
        self, length: str, wire: Wire, answer: Callable[..., bytes], session: requests.Session, part: Part
    ):
        """An absurd or overlong Content-Length ends the transfer before a byte is written."""
        wire.answers = [answer(DATA, Content_Length=length)]
        with pytest.raises(SourceError, match=r"announces|the connection failed") as raised:
            ask(session, wire.url, part)
        assert part.size == 0
        if "announces" in str(raised.value):
            assert raised.value.final
            assert f"announces {length} bytes; the file has at most 50,000" in str(raised.value)

    @pytest.mark.parametrize(
        "given",
        [None, "", "bytes 9-49999/50000", "bytes 11-49999/50000", "bytes */50000", "items 10-49999/50000",
         "bytes 10-", "bytes 1\u00b20-49999/50000", "bytes " + "9" * 5000 + "-1/1"],
    )  # fmt: skip
    def test_ranges_that_were_not_asked_for(
        self, given: str | None, wire: Wire, answer: Callable[..., bytes], session: requests.Session, part: Part
    ):
        """Bytes from elsewhere are not appended; what was there stays."""
        part.path.write_bytes(DATA[:10])
        headers = {} if given is None else {"Content_Range": given}
        wire.answers = [answer(DATA[10:], "206 Partial Content", **headers)]
        with pytest.raises(UnusableRangeError, match="asked for the bytes from 10 on, it sent"):
            ask(session, wire.url, part)
        assert part.path.read_bytes() == DATA[:10]

    @pytest.mark.parametrize("status", ["204 Empty", "206 Partial Content", "304 Same", "416 No", "500 Oh"])
    def test_answers_that_are_no_file(
        self, status: str, wire: Wire, answer: Callable[..., bytes], session: requests.Session, part: Part
    ):
        """Nobody asked for a part: only a 200 is a file."""
        wire.answers = [answer(b"", status)]
        with pytest.raises(SourceError, match=f"HTTP {status}"):
            ask(session, wire.url, part)
        assert part.size == 0

    @pytest.mark.parametrize(
        "page", [b"<html>", b"\xef\xbb\xbf<!DOCTYPE\nHTML>", b" \r\n\t<HTML lang=en>", b"\n" * 900 + b"<html >"]
    )
    def test_pages(self, page: bytes, wire: Wire, answer: Callable[..., bytes], session: requests.Session, part: Part):
        """A page is one whatever stands before it, and does not cost the bytes that were there."""
        part.path.write_bytes(DATA[:10])
        wire.answers = [answer(page + b"<p>Quota exceeded")]
        with pytest.raises(SourceError, match="web page"):
            ask(session, wire.url, part)
        assert part.path.read_bytes() == DATA[:10]

    @pytest.mark.parametrize("kind", ["text/html", "Text/HTML; charset=utf-8"])
    def test_a_page_by_its_type(
        self, kind: str, wire: Wire, answer: Callable[..., bytes], session: requests.Session, part: Part
    ):
        """What a server calls a page is one, whatever it looks like."""
        wire.answers = [answer(b"Quota exceeded", Content_Type=kind)]
        with pytest.raises(SourceError, match="web page"):
            ask(session, wire.url, part)
        assert part.size == 0

    @pytest.mark.parametrize("data", [b"<htmlish>", b"PK\3\4<html>", b"<", b" "])
    def test_files_that_are_no_pages(
        self, data: bytes, wire: Wire, answer: Callable[..., bytes], session: requests.Session, part: Part
    ):
        """Data that only begins somewhat like a page is data."""
        wire.answers = [answer(data, Content_Length=len(data))]
        ask(session, wire.url, part)
        assert part.path.read_bytes() == data

    def test_no_http_at_all(self, wire: Wire, session: requests.Session, part: Part):
        """A server that talks something else is a failed source, not a crash."""
        wire.answers = [b"220 ftp ready\r\n"]
        with pytest.raises(SourceError, match="the connection failed"):
            ask(session, wire.url, part)

    def test_a_reset(self, wire: Wire, answer: Callable[..., bytes], session: requests.Session, part: Part):
        """A connection that is reset is a failed source."""
        wire.reset = True
        wire.answers = [answer(b"", Content_Length=BOUND)]
        with pytest.raises(SourceError, match="the connection failed"):
            ask(session, wire.url, part)

    def test_a_redirect_to_elsewhere_than_the_web(
        self, wire: Wire, answer: Callable[..., bytes], session: requests.Session, part: Part
    ):
        """No server can make us read a local file."""
        wire.answers = [answer(b"", "302 Found", Location="file:///etc/passwd", Content_Length=0)]
        with pytest.raises(SourceError, match="redirects to, is invalid"):
            ask(session, wire.url, part)
        assert part.size == 0

    @pytest.mark.parametrize("location", ["http://[::1", "http://127.0.0.1:99999999/", "http://a..b/"])
    def test_a_redirect_to_no_address(
        self, location: str, wire: Wire, answer: Callable[..., bytes], session: requests.Session, part: Part
    ):
        """A Location that is no address is a failed source, not a crash."""
        wire.answers = [answer(b"", "302 Found", Location=location)]
        with pytest.raises(SourceError, match="the connection failed"):
            ask(session, wire.url.replace("http://", "http://me:secret@"), part)

    @pytest.mark.parametrize(("host", "kept"), [("127.0.0.1", True), ("localhost", False)])
    def test_a_redirect_takes_no_password_elsewhere(
        self, host: str, kept: bool, wire: Wire, answer: Callable[..., bytes], session: requests.Session, part: Part
    ):
        """User and password of an address are for its host alone."""
        wire.answers = [answer(b"", "302 Found", Location=wire.url.replace("127.0.0.1", host)), answer(DATA)]
        ask(session, wire.url.replace("http://", "http://me:secret@"), part)
        assert part.path.read_bytes() == DATA
        assert wire.requests[0]["Authorization"] == "Basic bWU6c2VjcmV0"
        assert (wire.requests[1]["Authorization"] is not None) == kept

    def test_cookies_last_as_long_as_a_redirect(
        self, wire: Wire, answer: Callable[..., bytes], session: requests.Session, part: Part
    ):
        """The hops of a redirect can use them; a session, which outlives many answers, keeps none."""
        wire.answers = [
            answer(b"", "302 Found", Location="/next", Set_Cookie="a=b"),
            answer(DATA[:10], Set_Cookie="c=d"),
            answer(DATA),
        ]
        ask(session, wire.url, part, 10)
        part.drop()
        ask(session, wire.url, part)
        assert [request["Cookie"] for request in wire.requests] == [None, "a=b", None]
        assert not session.cookies

    def test_what_a_server_says_is_shown_briefly(
        self, wire: Wire, answer: Callable[..., bytes], session: requests.Session, part: Part
    ):
        """A reason reaches the terminal without what would steer it, and cut where it is no longer one."""
        wire.answers = [answer(b"", "500 \x1b[2J" + "y" * 10_000)]
        with pytest.raises(SourceError, match=r"^HTTP 500 \?\[2Jy{196}$"):
            ask(session, wire.url, part)


class TestPatience:
    """Pauses and settings."""

    def test_pauses_double_up_to_a_cap(self):
        """1, 2, 4, … seconds, what the server asks for if that is more, and never more than the longest."""
        network = Network(backoff=1, longest_pause=10)
        assert [network.pause(rounds, 0) for rounds in (0, 1, 2, 3, 4, 5, 10_000)] == [1, 1, 2, 4, 8, 10, 10]
        assert network.pause(1, 5) == 5
        assert network.pause(1, 1e9) == 10

    @pytest.mark.parametrize(
        ("value", "expected"),
        [("120", 120), ("0", 0), ("Fri, 01 May 2026 10:00:30 GMT", 30), ("Fri, 01 May 2026 09:00:00 GMT", 0),
         ("soon", 0), ("", 0), ("-5", 0), ("9" * 50, 0), (f"Fri, 01 May {'9' * 50} 10:00:30 GMT", 0)],
    )  # fmt: skip
    def test_retry_after(self, value: str, expected: float):
        """A number of seconds, or a date; anything else asks for nothing."""
        assert _retry_after({"Retry-After": value}, datetime(2026, 5, 1, 10, tzinfo=UTC)) == expected

    def test_settings_that_cannot_be(self):
        """Every fault is named at once."""
        with pytest.raises(RequestError, match=r"read_timeout must be more than 0, not 0; rounds must .* not -1"):
            replace(QUICK, read_timeout=0, rounds=-1)
