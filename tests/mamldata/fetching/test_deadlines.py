"""What a server can keep us waiting for, byte by byte; see ``test_download`` for what is believed of its answers."""

from __future__ import annotations

import hashlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests

from mamldata.fetching.http import Network, Part, SourceError, open_session, transfer

DATA = hashlib.shake_256(b"deadlines").digest(5000)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
GAP = 0.02  # between the bytes of a drip: far below the timeouts
GIVE_UP = 4.0  # after which a drip ends, for a client that would wait for ever
HASTY = Network(connect_timeout=5, read_timeout=0.2, min_speed=0)

Wire = Any  # the class in conftest.py
Wrap = Callable[[socket.socket], socket.socket]


class Dripping:
    """A server that sends a beginning at once, and then something again and again.

    Attributes:
        first: what comes at once.
        again: what follows over and over, every ``gap`` seconds.
        gap: seconds.
        last: what comes at the end, if there is one.
        times: how many.
        wrap: makes the connection a TLS one.
        heard: what clients sent.
    """

    def __init__(self) -> None:
        self.first, self.again, self.gap, self.last, self.times = b"", b"", GAP, b"", int(GIVE_UP / GAP)
        self.wrap: Wrap = lambda connection: connection
        self.waits = True
        self.heard = b""
        self._over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):  # clients hang up
                self._answer(connection)

    def _answer(self, plain: socket.socket) -> None:
        with self.wrap(plain) as connection:
            while self.waits and b"\r\n\r\n" not in self.heard and (got := connection.recv(1 << 16)):
                self.heard += got
            connection.sendall(self.first)
            for _ in range(self.times):
                if self._over.wait(self.gap):
                    return
                connection.sendall(self.again)
            connection.sendall(self.last)


@pytest.fixture
def server() -> Iterator[Dripping]:
    """A ``Dripping``; nothing of it is left afterwards."""
    running = Dripping()
    yield running
    running.close()


@pytest.fixture
def session() -> Iterator[requests.Session]:
    with open_session() as running:
        yield running


@pytest.fixture
def part(tmp_path: Path) -> Part:
    return Part(tmp_path / "file.bin")


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wrap:
    """Makes a server's connection a TLS one, with a certificate that clients trust."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = f"{openssl} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=test"
    command += " -addext subjectAltName=IP:127.0.0.1 -addext keyUsage=digitalSignature,keyCertSign"
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return lambda connection: context.wrap_socket(connection, server_side=True)


def ask(session: requests.Session, url: str, part: Part, network: Network = HASTY) -> None:
    transfer(session, url, part, len(DATA), network, lambda _: None)


class TestDrips:
    """Servers that send something now and then, and never what was asked for."""

    @pytest.mark.parametrize(
        ("first", "again"),
        [
            (b"HTTP/1.1 200 O", b"K"),
            (b"HTTP/1.1 200 OK\r\nX-Long: ", b"a"),
            (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
            (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
            (b"HTTP/1.1 302 Found\r\nLocation: /", b"a"),
            (CHUNKED + b"5;", b"a"),
            (CHUNKED + b"3\r\nabc\r\n0\r\n", b"X: y\r\n"),
        ],
        ids=["status", "header", "headers", "continue", "redirect", "extension", "trailer"],
    )
    @pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
    def test_what_is_no_byte_of_the_file(
        self,
        first: bytes,
        again: bytes,
        secure: bool,
        server: Dripping,
        session: requests.Session,
        part: Part,
        request: pytest.FixtureRequest,
    ):
        """Bytes in a head, between chunks or after them do not count as an answer: the read timeout ends the wait."""
        server.first, server.again = first, again
        if secure:
            server.wrap = request.getfixturevalue("tls")
        with pytest.raises(SourceError, match=r"nothing of the file came for 0\.2 s"):
            ask(session, f"http{'s' * secure}://{server.place}/file.bin", part)

    @pytest.mark.parametrize(
        ("first", "again"),
        [(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000), (CHUNKED + b"3\r\nabc\r\n0\r\n", b"X: y\r\n" * 1000)],
        ids=["continue", "trailer"],
    )
    def test_floods(self, first: bytes, again: bytes, server: Dripping, session: requests.Session, part: Part):
        """However fast it comes, what never becomes a byte of the file is not read for ever."""
        server.first, server.again, server.gap, server.times = first, again, 0, 1 << 40
        with pytest.raises(SourceError, match=r"nothing of the file came for 0\.2 s"):
            ask(session, f"http://{server.place}/file.bin", part)

    def test_a_handshake(self, server: Dripping, session: requests.Session, part: Part):
        """A TLS record that never ends is no connection."""
        server.first, server.again, server.waits = b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc\x03\x03", b"\0", False
        with pytest.raises(SourceError, match=r"no connection within 0\.2 s"):
            ask(session, f"https://{server.place}/file.bin", part, replace(HASTY, connect_timeout=0.2))

    def test_a_proxy(self, server: Dripping, session: requests.Session, part: Part, monkeypatch: pytest.MonkeyPatch):
        """A proxy that never ends its answer to CONNECT is no connection."""
        monkeypatch.setenv("https_proxy", f"http://{server.place}")
        server.first, server.again = b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"
        with pytest.raises(SourceError, match=r"no connection within 0\.2 s"):
            ask(session, "https://example.invalid/file.bin", part, replace(HASTY, connect_timeout=0.2))
        assert server.heard.startswith(b"CONNECT example.invalid:443 ")


class TestRedirects:
    """Only where they lead to is of use."""

    @pytest.mark.parametrize(
        "body",
        [b"Content-Length: 10\r\n\r\n", b"Content-Encoding: gzip\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n5\r\n"],
        ids=["length", "gzip", "chunked"],
    )
    def test_their_bodies(
        self,
        body: bytes,
        server: Dripping,
        wire: Wire,
        answer: Callable[..., bytes],
        session: requests.Session,
        part: Part,
    ):
        """The body of a redirect is not waited for, read or unpacked; the next request asks for the same range."""
        part.path.write_bytes(DATA[:10])
        server.first = b"HTTP/1.1 302 Found\r\nLocation: " + wire.url.encode() + b"\r\n" + body
        wire.answers = [answer(DATA[10:], "206 Partial Content", Content_Range="bytes 10-4999/5000")]
        ask(session, f"http://{server.place}/file.bin", part)
        assert part.path.read_bytes() == DATA
        assert wire.requests[0]["Range"] == "bytes=10-"

    def test_a_body_without_a_redirect(self, server: Dripping, session: requests.Session, part: Part):
        """Nor is the body of an answer that is neither the file nor leads to it."""
        server.first = b"HTTP/1.1 302 Found\r\nContent-Length: 10\r\n\r\n"
        with pytest.raises(SourceError, match="HTTP 302 Found"):
            ask(session, f"http://{server.place}/file.bin", part)


class TestHonestServers:
    """Slow is not silent."""

    @pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
    def test_a_slow_one(
        self, secure: bool, server: Dripping, session: requests.Session, part: Part, request: pytest.FixtureRequest
    ):
        """A file may take many times the read timeout, as long as some of it comes within each."""
        server.first, server.again, server.times, server.gap = HEAD, b"a", 4, 0.15
        server.last = b"a" * 4996
        if secure:
            server.wrap = request.getfixturevalue("tls")
        ask(session, f"http{'s' * secure}://{server.place}/file.bin", part, replace(HASTY, read_timeout=0.5))
        assert part.path.read_bytes() == b"a" * 5000

    def test_one_above_the_floor(self, server: Dripping, session: requests.Session, part: Part):
        """What is a little faster than the slowest speed is waited for, though it is measured many times."""
        server.first, server.again, server.times, server.last = HEAD, b"a" * 250, 19, b"a" * 250
        network = Network(read_timeout=5, min_speed=500, stall_seconds=0.1)
        ask(session, f"http://{server.place}/file.bin", part, network)
        assert part.size == 5000

    def test_through_a_proxy(
        self, server: Dripping, session: requests.Session, part: Part, monkeypatch: pytest.MonkeyPatch
    ):
        """An answer that a proxy forwards comes as any other."""
        monkeypatch.setenv("http_proxy", f"http://{server.place}")
        server.first, server.times = HEAD + DATA, 0
        ask(session, "http://example.invalid/file.bin", part)
        assert part.path.read_bytes() == DATA


class TestSizes:
    """A head is as large as it needs to be."""

    @pytest.mark.parametrize(
        ("first", "why"),
        [
            (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 101, "got more than 100 headers"),
            (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 65537, "got more than 65536 bytes when reading header line"),
            (b"HTTP/1.1 200 " + b"K" * 65537, "got more than 65536 bytes when reading status line"),
            (CHUNKED + b"5;" + b"e" * 65537, "got more than 65536 bytes when reading chunk size"),
        ],
        ids=["headers", "header", "status", "chunk"],
    )
    def test_what_is_too_long(self, first: bytes, why: str, server: Dripping, session: requests.Session, part: Part):
        """No line of an answer, nor their number, is read without a bound."""
        server.first, server.times = first, 0
        with pytest.raises(SourceError, match=why):
            ask(session, f"http://{server.place}/file.bin", part, replace(HASTY, read_timeout=5))
