"""A server of files that answers each request as a try tells it."""

from __future__ import annotations

import re
import socket
import struct
import time
from collections.abc import Callable
from email.message import Message

from tests.mamldata.conftest import Wire

Answer = list[bytes | float]  # bytes to send, seconds to wait, and a negative number for a reset at the end


class Stormy(Wire):
    """A server of files by their paths that answers each request in its own way.

    Attributes:
        files: by path.
        misbehave: makes a response that breaks a rule; None once the server is good.
    """

    def __init__(self, files: dict[str, bytes], misbehave: Callable[[bytes, int, Message], Answer] | None) -> None:
        self.files, self.misbehave = files, misbehave
        super().__init__()

    @property
    def address(self) -> str:
        """Without a path."""
        return self.url.removesuffix("/file.bin")

    def send(self, connection: socket.socket) -> None:
        """Answer as the try says."""
        data = self.files.get(self.paths[-1])
        if data is None:
            connection.sendall(head("404 Not Found", Content_Length=0))
            return
        request = self.requests[-1]
        asked = re.fullmatch(r"bytes=(\d+)-", request["Range"] or "")
        start = int(asked[1]) if asked else 0
        for piece in (self.misbehave or good)(data, start, request):
            if isinstance(piece, bytes):
                connection.sendall(piece)
            elif piece < 0:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                time.sleep(piece)


def head(status: str = "200 OK", **headers: object) -> bytes:
    """The head of a response; underscores in names stand for hyphens."""
    lines = [f"HTTP/1.1 {status}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode("utf-8", "replace") + b"\r\n\r\n"


def good(data: bytes, start: int, request: Message | None = None) -> Answer:
    """What a good server sends."""
    tag = f'"{len(data)}"'
    if start and request is not None and request["If-Range"] not in {None, tag}:
        start = 0
    if start >= len(data) and start:
        return [head("416 Range Not Satisfiable", Content_Range=f"bytes */{len(data)}", Content_Length=0)]
    ranges = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
    first = head("206 Partial Content" if start else "200 OK", Content_Length=len(data) - start, ETag=tag, **ranges)
    return [first, data[start:]]
