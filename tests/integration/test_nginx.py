"""An archive behind nginx: the most common web server, with its own ideas of Range, connections and their end."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mamldata.archive.build import build
from mamldata.archive.index import read_archive
from mamldata.archive.plan import BuildRequest
from mamldata.archive.verify import verify_archive
from mamldata.fetching.http import Network
from mamldata.sources.remote import RemoteSource
from mamldata.sources.stored import ArchiveSource

pytestmark = pytest.mark.skipif(
    shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None, reason="nginx is not installed"
)
REQUEST = BuildRequest(n_way=5, k_query=15, episodes={"train": 20, "val": 4}, seed=9, episodes_per_shard=10)
PATIENT = Network(connect_timeout=5, read_timeout=5, rounds=1000, backoff=0.05, longest_pause=0.05)
# One process, which is all there is to kill. The log has what was asked for, the answer's code and its length.
SETTINGS = """
daemon off; master_process off; pid {place}/pid; error_log {place}/error.log; {user}
events {{ worker_connections 64; }}
http {{
  log_format ranges '$uri $http_range $status $body_bytes_sent $connection';
  access_log {place}/access.log ranges;
  client_body_temp_path {place}/a; proxy_temp_path {place}/b; fastcgi_temp_path {place}/c;
  uwsgi_temp_path {place}/d; scgi_temp_path {place}/e;
  server {{ listen 127.0.0.1:{port}; root {root}; {more} }}
}}
"""


class Nginx:
    """nginx on one port, started and killed as often as one likes."""

    def __init__(self, place: Path, root: Path) -> None:
        self.place, self.root = place, root
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, more: str = "") -> None:
        user = "user root;" if os.geteuid() == 0 else ""
        settings = SETTINGS.format(place=self.place, root=self.root, port=self.port, user=user, more=more)
        (self.place / "nginx.conf").write_text(settings)
        program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        arguments = ["-p", str(self.place), "-e", str(self.place / "error.log"), "-c", str(self.place / "nginx.conf")]
        self.process = subprocess.Popen([str(program), *arguments])
        wait_for(self._listens)

    def _listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.place / "error.log").read_text()
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def log(self) -> list[list[str]]:
        """Of each request: path, Range, status, bytes sent, the connection's number."""
        return [line.split() for line in (self.place / "access.log").read_text().splitlines()]


def wait_for(condition: object, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, glyphs_manifest, glyphs_bank) -> Path:
    out = tmp_path_factory.mktemp("served") / "archive"
    build(glyphs_manifest, glyphs_bank, out, REQUEST)
    return out


@pytest.fixture
def nginx(tmp_path, folder) -> Iterator[Nginx]:
    server = Nginx(tmp_path, folder)
    yield server
    server.kill()


def queries(source: ArchiveSource) -> np.ndarray:
    """The query images of all episodes, one after the other."""
    layout = source.archive.layout
    support = np.empty(source.episodes * layout.support.bytes, np.uint8)
    query = np.empty(source.episodes * layout.query.bytes, np.uint8)
    source.read(np.arange(source.episodes), support, query)
    return query


def test_an_archive_is_read(nginx, folder):
    """Whole and right, by the stream's source and by verify."""
    nginx.start()
    source = RemoteSource(nginx.url, "train", network=PATIENT)
    np.testing.assert_array_equal(queries(source), queries(ArchiveSource(folder, "train")))
    assert verify_archive(nginx.url) == []


@pytest.mark.parametrize("more", ["keepalive_timeout 0;", "keepalive_requests 1;"])
def test_connections_that_are_closed(nginx, folder, more):
    """A server that closes every connection after its answer costs connections, and nothing else."""
    nginx.start(more)
    source = RemoteSource(nginx.url, "train", network=PATIENT)
    np.testing.assert_array_equal(queries(source), queries(ArchiveSource(folder, "train")))
    log = nginx.log()
    assert len({line[-1] for line in log}) == len(log) >= 4


def test_a_server_that_dies_and_returns(nginx, folder, tmp_path):
    """Killed in the middle of a shard: when it is back, reading goes on by Range from the byte where it stopped."""
    nginx.start("limit_rate_after 64k; limit_rate 64k;")
    cache = tmp_path / "cache"

    def die_and_return() -> None:
        wait_for(lambda: any(part.stat().st_size for part in cache.glob("mamldata-shards/*.tar.part")))
        nginx.kill()
        time.sleep(0.2)
        nginx.start()

    thread = threading.Thread(target=die_and_return)
    thread.start()
    try:
        source = RemoteSource(nginx.url, "train", network=PATIENT, cache_dir=cache)
        np.testing.assert_array_equal(queries(source), queries(ArchiveSource(folder, "train")))
    finally:
        thread.join()
    went_on = [line for line in nginx.log() if line[2] == "206"]
    assert len(went_on) == 1
    first, size = int(went_on[0][1].removeprefix("bytes=").partition("-")[0]), int(went_on[0][3])
    assert first > 0
    assert first + size == read_archive(folder).split("train").shards[0].bytes
