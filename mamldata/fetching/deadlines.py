"""HTTP connections that time out even if the server sends a byte now and then.

A socket's timeout restarts with every byte, and not every byte is part of the file: it may belong to a header, to one
of many ``100 Continue`` responses, or to an extension or trailer of a chunked body. Here the timeout bounds the whole
head of a response, and then the wait for each next byte of its body.
"""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Callable
from http.client import HTTPResponse
from typing import Any

from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, PoolManager
from urllib3.exceptions import ConnectTimeoutError


class _Incoming(io.RawIOBase):
    """The bytes that a socket receives until its timeout has passed since the last ``restart``.

    Args:
        stream: the socket's own, unbuffered; closed with this one.
        sock: the socket.
    """

    def __init__(self, stream: io.RawIOBase, sock: socket.socket) -> None:
        seconds = sock.gettimeout()
        if seconds is None:
            raise ValueError("A request needs a timeout.")
        self._stream, self._sock, self._seconds = stream, sock, seconds
        self.restart()

    def restart(self) -> None:
        """Restart the timeout."""
        self._end = time.monotonic() + self._seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        try:
            return self._stream.readinto(buffer)
        finally:
            self._sock.settimeout(self._seconds)  # for later uses, such as a handshake through a proxy

    def close(self) -> None:
        try:
            self._stream.close()
        finally:
            super().close()


class _TimedResponse(HTTPResponse):
    """A response in which the socket's timeout bounds the whole head, and the wait for each part of the body.

    ``read(amt)``, like ``read1``, returns the bytes available, so that old versions of urllib3, which only call
    ``read``, do not wait for ``amt`` bytes.
    """

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._incoming = _Incoming(self.fp.detach(), sock)
        self.fp = io.BufferedReader(self._incoming)

    def read(self, amt: int | None = None) -> bytes:
        if amt is not None:
            return self.read1(amt)
        self._incoming.restart()
        return super().read()

    def read1(self, n: int = -1) -> bytes:
        self._incoming.restart()
        data = super().read1(n)
        if self.length == 0:  # Python 3.12 and older leave it open, and urllib3 would drop the connection
            self.close()
        return data


class TimedAdapter(HTTPAdapter):
    """Sends requests, which must have a timeout; the module says what it bounds."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Create the pools of direct connections."""
        super().init_poolmanager(*args, **kwargs)
        _time_answers(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> PoolManager:
        """The pools of connections through a proxy."""
        new = proxy not in self.proxy_manager
        manager: PoolManager = super().proxy_manager_for(proxy, **kwargs)
        if new:
            _time_answers(manager)
        return manager


def _time_answers(manager: PoolManager) -> None:
    pools = manager.pool_classes_by_scheme
    manager.pool_classes_by_scheme = {scheme: _timed(pool) for scheme, pool in pools.items()}


def _timed(pool: type[HTTPConnectionPool]) -> type[HTTPConnectionPool]:
    """A kind of pool whose connections read ``_TimedResponse``."""
    kind = pool.ConnectionCls
    members = {"response_class": _TimedResponse, "connect": _connecting(kind.connect)}
    return type(pool.__name__, (pool,), {"ConnectionCls": type(kind.__name__, (kind,), members)})


def _connecting(connect: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap ``connect`` so that every timeout in it, also of a proxy or the handshake, is a ``ConnectTimeoutError``."""

    def connect_in_time(connection: Any) -> None:
        try:
            connect(connection)
        except TimeoutError as error:
            raise ConnectTimeoutError(connection, "timed out") from error

    return connect_in_time
