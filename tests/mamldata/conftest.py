"""A server that answers byte for byte what a test tells it, for what no well-behaved server library would send."""

from __future__ import annotations

import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from email.message import Message
from email.parser import BytesHeaderParser

import pytest


class Wire:
    """Answers one connection after the other with the next of ``answers``; the last one for ever.

    Attributes:
        answers: whole responses, status line and all; the connection is closed after each.
        requests: the headers of each request that came.
        paths: their paths.
        reset: close with a reset (RST) in place of a plain end.
    """

    def __init__(self) -> None:
        self.answers: list[bytes] = []
        self.requests: list[Message] = []
        self.paths: list[str] = []
        self.reset = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}/file.bin"

    def close(self) -> None:
        # Closing alone does not wake a thread that waits in accept.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            got = connection.recv(1 << 16)
            if not got:
                return
            head += got
        line, _, headers = head.partition(b"\r\n")
        self.paths.append(line.split()[1].decode())
        self.requests.append(BytesHeaderParser().parsebytes(headers))
        try:
            self.send(connection)
            if self.reset:
                # What was sent must have been read before, or the reset would discard it.
                connection.settimeout(5)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass  # whoever asked hung up: it may

    def send(self, connection: socket.socket) -> None:
        """Answer the request that was noted last."""
        connection.sendall(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])


@pytest.fixture
def wire() -> Iterator[Wire]:
    """A ``Wire``; nothing of it is left afterwards."""
    server = Wire()
    yield server
    server.close()


@pytest.fixture
def answer() -> Callable[..., bytes]:
    """Makes a response: ``answer(body, status, name=value, ...)``; underscores in names stand for hyphens."""

    def make(body: bytes = b"", status: str = "200 OK", **headers: object) -> bytes:
        lines = [f"HTTP/1.1 {status}", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body

    return make


@pytest.fixture
def impatient() -> Iterator[None]:
    """A test that waits for ever is broken off."""

    def give_up(*_: object) -> None:
        raise TimeoutError("it waits for ever")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
