"""Archives at an address: what real servers on this machine do to them, and that nothing unverified gets through."""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mamldata import EpisodeStream
from mamldata.archive.build import build
from mamldata.archive.index import INDEX, INDEX_SUM, index_sum, read_archive
from mamldata.archive.plan import BuildRequest
from mamldata.archive.remote import ShardCache, read_remote_archive
from mamldata.archive.verify import verify_archive
from mamldata.errors import DamagedError, FetchError, RequestError, WriteError
from mamldata.fetching.http import Network
from mamldata.io.atomic import locked
from mamldata.io.digest import canonical_json, sha256_bytes, sha256_file
from mamldata.sampling.order import Order
from mamldata.sources.remote import RemoteSource
from mamldata.sources.stored import ArchiveSource

REQUEST = BuildRequest(n_way=3, k_shot=2, k_query=4, episodes={"train": 23, "val": 7}, seed=9, episodes_per_shard=5)
BATCH = 4
OWN = "mamldata-shards"  # the folder in a cache_dir that is the cache's own
QUICK = Network(connect_timeout=5, read_timeout=5, rounds=3, backoff=0, longest_pause=0)


class Server(ThreadingHTTPServer):
    """Serves a folder with Range. ``faults`` are taken one for each request of a tar, until there are none left.

    Attributes:
        faults: each gets the handler, the bytes and the offset, and answers in place of the server.
        asked: the name and the Range of each request.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.folder = folder
        self.faults: list[Callable[[Handler, bytes, int], None]] = []
        self.asked: list[tuple[str, str | None]] = []
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """A client that hung up is nobody's error."""

    def close(self) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format, *args) -> None:  # noqa: A002
        """Silent."""

    def do_GET(self) -> None:
        name = self.path.lstrip("/").partition("?")[0]
        asked = self.headers["Range"]
        self.server.asked.append((name, asked))
        path = self.server.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        data = path.read_bytes()
        if name.endswith(".tar") and self.server.faults:
            self.server.faults.pop(0)(self, data, start)
            return
        self.head(data, start)
        self.wfile.write(data[start:])

    def head(self, data: bytes, start: int, length: int | None = None) -> None:
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start if length is None else length))
        self.send_header("ETag", f'"{sha256_bytes(data)[:16]}"')
        self.end_headers()


def dies(handler: Handler, data: bytes, start: int) -> None:
    """Breaks the connection in the middle."""
    handler.head(data, start)
    handler.wfile.write(data[start : start + (len(data) - start) // 2])
    handler.close_connection = True


def busy(handler: Handler, data: bytes, start: int) -> None:
    handler.send_response(503)
    handler.send_header("Retry-After", "3")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def late(handler: Handler, data: bytes, start: int) -> None:
    time.sleep(0.05)
    handler.head(data, start)
    handler.wfile.write(data[start:])


def slow(handler: Handler, data: bytes, start: int) -> None:
    """Comes in drops, but comes."""
    handler.head(data, start)
    for at in range(start, len(data), 8192):
        handler.wfile.write(data[at : at + 8192])
        time.sleep(0.01)


def flips(handler: Handler, data: bytes, start: int) -> None:
    """One byte is another one."""
    wrong = bytearray(data)
    wrong[-5000] ^= 1
    handler.head(data, start)
    handler.wfile.write(wrong[start:])


def longer(handler: Handler, data: bytes, start: int) -> None:
    handler.head(data, start, len(data) + 512)
    handler.wfile.write(data + bytes(512))


def shorter(handler: Handler, data: bytes, start: int) -> None:
    """Claims that there is less than there is."""
    handler.head(data, start, (len(data) - start) // 2)
    handler.wfile.write(data[start : start + (len(data) - start) // 2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, glyphs_manifest, glyphs_bank) -> Path:
    """A small archive; not to be written to."""
    out = tmp_path_factory.mktemp("remote") / "archive"
    build(glyphs_manifest, glyphs_bank, out, REQUEST)
    return out


@pytest.fixture
def server(folder) -> Iterator[Server]:
    running = Server(folder)
    yield running
    running.close()


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path, monkeypatch):
    """No thread of ours and no temporary folder outlives a test."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    yield
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("mamldata"):
            thread.join(10)
    gc.collect()
    assert not list(place.glob("mamldata-*"))


def remote(server: Server, split: str = "train", **options) -> RemoteSource:
    return RemoteSource(server.url, split, **{"network": QUICK, **options})


def kept(batches) -> list[tuple[list[int], bytes]]:
    return [(batch.index.tolist(), b"".join(tensor.cpu().numpy().tobytes() for tensor in batch)) for batch in batches]


def by_index(batches) -> dict[int, bytes]:
    """Each episode's images by its index."""
    return {
        index: batch.support_x[place].numpy().tobytes() + batch.query_x[place].numpy().tobytes()
        for batch in batches
        for place, index in enumerate(batch.index.tolist())
    }


def shards_asked(server: Server) -> list[str]:
    return [name for name, _ in server.asked if name.endswith(".tar")]


class TestReading:
    @pytest.mark.parametrize("device", [None, "cpu"])
    @pytest.mark.parametrize("cached", [False, True])
    def test_a_plain_pass_is_that_of_the_folder(self, folder, server, tmp_path, device, cached):
        """In order, an archive at an address gives what its folder gives, on every road."""
        for split in ("train", "val"):
            source = remote(server, split, cache_dir=tmp_path / "cache" if cached else None)
            stream = EpisodeStream(source, batch_size=BATCH, shuffle=False)
            expected = kept(EpisodeStream(folder, split, BATCH, shuffle=False))
            assert kept(stream.to(device) if device else stream) == expected
            assert source.class_labels(6) == ArchiveSource(folder, split).class_labels(6)

    def test_by_its_address_alone(self, folder, server, tmp_path):
        """EpisodeStream takes the address, with a query for access and a closing slash if need be."""
        expected = kept(EpisodeStream(folder, "val", BATCH))
        for address in (server.url, server.url + "/", server.url + "/?key=secret"):
            assert kept(EpisodeStream(address, "val", BATCH, cache_dir=tmp_path / "cache")) == expected
        assert sorted(shards_asked(server)) == ["val-00000.tar", "val-00001.tar"]

    def test_shuffled(self, folder, server):
        """Every episode once but the rest, its own images, shard after shard, another order in each epoch."""
        stored = by_index(EpisodeStream(folder, shuffle=False, dtype=torch.uint8))
        stream = EpisodeStream(remote(server), batch_size=BATCH, seed=1, dtype=torch.uint8)
        orders = []
        for _ in range(3):
            found = by_index(stream)
            assert len(found) == 20
            assert all(stored[index] == images for index, images in found.items())
            orders.append(list(found))
            runs = [shard for shard, _ in itertools.groupby(index // 5 for index in found)]
            assert len(runs) == len(set(runs)) >= 4
        assert orders[0] != orders[1] != orders[2]

    @pytest.mark.parametrize("world_size", [1, 2, 3, 4])
    def test_elastic(self, server, tmp_path, world_size):
        """All ranks together see the same meta-batches, and any of them resumes anywhere."""
        cache = tmp_path / "cache"
        whole = [index for index, _ in kept(EpisodeStream(remote(server, cache_dir=cache), batch_size=BATCH, seed=2))]
        parts = []
        for rank in range(world_size):
            part = EpisodeStream(remote(server, cache_dir=cache), None, BATCH, 2, rank=rank, world_size=world_size)
            state = json.loads(json.dumps(part.state_dict() | {"next_batch": 1}))
            part.load_state_dict(state)
            parts.append([index for index, _ in kept(part)])
        assert [list(itertools.chain(*rows)) for rows in zip(*parts, strict=True)] == whole[1:]

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
    def test_in_a_data_loader(self, server, tmp_path):
        """Workers share the cache and keep the order."""
        alone, inside = (
            EpisodeStream(remote(server, cache_dir=tmp_path / name), None, BATCH, 2) for name in ("one", "two")
        )
        loader = DataLoader(inside, batch_size=None, num_workers=2, multiprocessing_context="spawn")
        assert kept(loader) == kept(alone)
        assert sorted(shards_asked(server)[5:]) == sorted(set(shards_asked(server)))

    def test_remix(self, folder, server, tmp_path):
        """With room for all shards, remixed episodes are those of the folder; without it they are refused."""
        stream = EpisodeStream(remote(server, cache_dir=tmp_path / "cache"), None, BATCH, 3, remix=True)
        expected = EpisodeStream(folder, None, BATCH, 3, remix=True)
        assert [kept(stream) for _ in range(2)] == [kept(expected) for _ in range(2)]
        with pytest.raises(RequestError, match="Give a cache_dir, with room for all shards"):
            EpisodeStream(remote(server), remix=True)

    def test_what_fsspec_reads(self, folder):
        """Any file system of fsspec will do, and breaks are gone on from."""
        memory = fsspec.filesystem("memory")
        for path in folder.glob("*[!s]"):
            if path.is_file():
                memory.pipe(f"/bucket/archive/{path.name}", path.read_bytes())
        try:
            stream = EpisodeStream("memory://bucket/archive", "val", BATCH)
            assert kept(stream) == kept(EpisodeStream(folder, "val", BATCH))
            memory.rm("/bucket/archive/val-00001.tar")
            with pytest.raises(FetchError, match=r"memory://bucket/archive/val-00001\.tar could not be fetched"):
                kept(EpisodeStream("memory://bucket/archive", "val", BATCH))
        finally:
            memory.rm("/bucket", recursive=True)


class TestOrder:
    @given(
        shards=st.lists(st.integers(1, 40), min_size=1, max_size=12).map(tuple),
        batch=st.integers(1, 30),
        seed=st.integers(0, 2**70),
        epoch=st.integers(0, 50),
    )
    def test_shard_after_shard(self, shards, batch, seed, epoch):
        """An epoch is a permutation that never comes back to a shard."""
        episodes = sum(shards)
        order = Order(episodes, min(batch, episodes), True, seed, shards=shards)
        per_epoch = order.batches_per_epoch
        found = np.concatenate([order.indices(t) for t in range(epoch * per_epoch, (epoch + 1) * per_epoch)])
        assert len(set(found.tolist())) == len(found) == per_epoch * order.batch_size
        of = np.searchsorted(np.cumsum(shards), found, side="right")
        runs = [shard for shard, _ in itertools.groupby(of.tolist())]
        assert len(runs) == len(set(runs))


class TestFaults:
    @pytest.mark.parametrize("fault", [dies, busy, slow, flips, shorter], ids=lambda fault: fault.__name__)
    def test_what_passes_is_got_over(self, folder, server, fault):
        """A server that fails now and then gives the same episodes in the end."""
        server.faults = [fault] * 2
        stream = EpisodeStream(remote(server), batch_size=BATCH, shuffle=False)
        assert kept(stream) == kept(EpisodeStream(folder, None, BATCH, shuffle=False))
        assert not server.faults

    def test_what_is_tried_again_is_told(self, server, caplog):
        """Whoever waits learns what for."""
        server.faults = [busy]
        kept(EpisodeStream(remote(server), shuffle=False))
        told, pause = [record.getMessage() for record in caplog.records if record.name == "mamldata.archive.remote"]
        address = rf"{re.escape(server.url)}/train-0000\d\.tar"  # of those under way, the one that met it
        assert re.fullmatch(rf"{address}: HTTP 503 Service Unavailable", told)
        assert pause == "trying again in 0 s"

    def test_a_broken_transfer_goes_on_where_it_stopped(self, folder, server):
        """What came is not asked for again."""
        server.faults = [dies]
        next(iter(EpisodeStream(remote(server, episodes=5), shuffle=False)))
        size = (folder / "train-00000.tar").stat().st_size
        ranges = [asked for name, asked in server.asked if name == "train-00000.tar"]
        assert ranges == [None, f"bytes={size // 2}-"]

    def test_a_server_that_cannot_go_on(self, folder, server):
        """One that sends the whole file again, whatever was asked for, is taken at its word."""

        def whole(handler: Handler, data: bytes, start: int) -> None:
            assert start
            handler.head(data, 0)
            handler.wfile.write(data)

        server.faults = [dies, whole]
        source = remote(server, episodes=5)
        assert bytes(source._open_shard(0)) == (folder / "train-00000.tar").read_bytes()
        assert not server.faults

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            (dies, "could not be fetched: "),
            (busy, "HTTP 503"),
            (flips, "another file came: sha256"),
            (longer, "it announces"),
            (shorter, "it ended after"),
        ],
        ids=lambda value: getattr(value, "__name__", ""),
    )
    @pytest.mark.parametrize("device", [None, "cpu"])
    def test_what_does_not_pass_is_an_error(self, server, tmp_path, fault, message, device):
        """The shard is named in bounded time, nothing of it is handed out, and none of it is kept as a shard."""
        server.faults = [fault] * 40
        stream = EpisodeStream(remote(server, cache_dir=tmp_path / "cache"), shuffle=False)
        with pytest.raises(
            FetchError, match=rf"/train-00000\.tar could not be fetched: .*{message.partition('d: ')[2]}"
        ):
            next(iter(stream.to(device) if device else stream))
        assert not list((tmp_path / "cache" / OWN).glob("*.tar"))

    @pytest.mark.parametrize("device", [None, "cpu"])
    def test_one_that_always_lies_about_a_later_shard(self, folder, tmp_path, device):
        """What comes before it is given out, and then an error names it."""
        own = Path(shutil.copytree(folder, tmp_path / "own"))
        data = bytearray((own / "train-00002.tar").read_bytes())
        data[7000] ^= 1
        (own / "train-00002.tar").write_bytes(data)
        server = Server(own)
        try:
            stream = EpisodeStream(remote(server), batch_size=BATCH, shuffle=False)
            passing = iter(stream.to(device) if device else stream)
            assert [index for index, _ in kept(itertools.islice(passing, 2))] == [[0, 1, 2, 3], [4, 5, 6, 7]]
            message = r"/train-00002\.tar could not be fetched: another file came: sha256 .* tell its maintainer"
            with pytest.raises(FetchError, match=message):
                next(passing)
        finally:
            server.close()

    def test_a_silent_server(self, server):
        """One that says nothing for good is given up, and the error says how long it was silent."""
        end = threading.Event()

        def silent(handler: Handler, data: bytes, start: int) -> None:
            handler.head(data, start)
            end.wait(30)

        server.faults = [silent] * 40
        impatient = Network(connect_timeout=5, read_timeout=0.2, rounds=2, backoff=0, longest_pause=0)
        stream = EpisodeStream(remote(server, network=impatient), shuffle=False)
        try:
            message = r"/train-00000\.tar could not be fetched: nothing of the file came for 0\.2 s"
            with pytest.raises(FetchError, match=message):
                next(iter(stream))
        finally:
            end.set()

    def test_a_dripping_server(self, server):
        """One that sends a byte now and then is not waited for."""
        end = threading.Event()

        def drips(handler: Handler, data: bytes, start: int) -> None:
            handler.head(data, start)
            while start < len(data) and not end.wait(0.02):
                handler.wfile.write(data[start : start + 1])
                start += 1
            handler.close_connection = True

        server.faults = [drips] * 40
        impatient = Network(read_timeout=5, rounds=2, backoff=0, longest_pause=0, min_speed=1e6, stall_seconds=0.1)
        stream = EpisodeStream(remote(server, network=impatient), shuffle=False)
        try:
            with pytest.raises(FetchError, match=r"/train-00000\.tar could not be fetched: too slow: "):
                next(iter(stream))
        finally:
            end.set()

    @pytest.mark.parametrize("status", [401, 403, 404, 410])
    def test_what_is_not_there_is_reported_at_once(self, server, status):
        """An answer that no waiting changes is not asked for twice: not of archive.json, and not of a shard."""

        def refuses(handler: Handler, data: bytes, start: int) -> None:
            handler.send_error(status)

        with pytest.raises(
            FetchError, match=r"/nothing/archive\.json could not be fetched: HTTP 404 .* Check the address"
        ):
            RemoteSource(server.url + "/nothing")  # with the patience that users have
        assert [name for name, _ in server.asked] == ["nothing/archive.json"]
        stream = EpisodeStream(remote(server), shuffle=False)
        server.faults = [refuses] * 40
        with pytest.raises(FetchError, match=rf"/train-00000\.tar could not be fetched: HTTP {status}"):
            next(iter(stream))
        assert shards_asked(server).count("train-00000.tar") == 1

    @pytest.mark.parametrize("status", [408, 425, 429])
    def test_what_passes_by_waiting_is_waited_for(self, folder, server, status):
        """The statuses that ask for another try get one."""

        def later(handler: Handler, data: bytes, start: int) -> None:
            handler.send_error(status)

        server.faults = [later] * 2
        stream = EpisodeStream(remote(server), batch_size=BATCH, shuffle=False)
        assert kept(stream) == kept(EpisodeStream(folder, None, BATCH, shuffle=False))

    def test_a_server_that_dies_and_returns(self, folder):
        """While nobody answers it is tried again; when someone does, it goes on."""
        server = Server(folder)
        port = server.server_address[1]
        patient = Network(connect_timeout=1, read_timeout=5, rounds=40, backoff=0.2, longest_pause=0.2)
        stream = EpisodeStream(remote(server, network=patient), batch_size=BATCH, shuffle=False)
        server.close()
        again: list[Server] = []
        timer = threading.Timer(1, lambda: again.append(Server(folder, port)))
        timer.start()
        try:
            assert kept(stream) == kept(EpisodeStream(folder, None, BATCH, shuffle=False))
        finally:
            timer.join()
            again[0].close()

    @pytest.mark.parametrize("name", [INDEX, INDEX_SUM])
    @pytest.mark.parametrize("change", ["flipped", "missing"])
    def test_a_wrong_description(self, folder, tmp_path, name, change):
        """Damage to archive.json or its sum, or their absence, is an error before any shard is asked for."""
        own = Path(shutil.copytree(folder, tmp_path / "own"))
        data = bytearray((own / name).read_bytes())
        data[len(data) // 2] ^= 1
        (own / name).unlink()
        if change == "flipped":
            (own / name).write_bytes(data)
        server = Server(own)
        try:
            with pytest.raises((DamagedError, FetchError), match=r"archive\.json.*(damaged|could not be fetched)"):
                remote(server)
            assert not shards_asked(server)
        finally:
            server.close()

    def test_an_archive_of_other_episodes(self, folder, tmp_path):
        """Whole shards that hold another split's episodes are refused; the error names the address."""
        own = Path(shutil.copytree(folder, tmp_path / "own"))
        document = json.loads((own / INDEX).read_bytes())
        train, val = (document["splits"][split]["shards"][0] for split in ("train", "val"))
        train["sha256"], val["sha256"] = val["sha256"], train["sha256"]
        shutil.copyfile(folder / "val-00000.tar", own / "train-00000.tar")
        data = canonical_json(document)
        (own / INDEX).write_bytes(data)
        (own / INDEX_SUM).write_bytes(index_sum(sha256_bytes(data)))
        server = Server(own)
        try:
            text = rf"holds other episodes .* It came from {server.url}/train-00000\.tar\. .*tell its maintainer"
            with pytest.raises(DamagedError, match=text):
                next(iter(EpisodeStream(remote(server), shuffle=False)))
        finally:
            server.close()

    @pytest.mark.parametrize("name", ["pipe:cat x", "../train-00000.tar", "/etc/passwd", "http://x/train-00000.tar"])
    def test_a_forged_shard_name(self, folder, tmp_path, name):
        """Shards are plain names, each the one that it must be; anything else is refused before it is used."""
        own = Path(shutil.copytree(folder, tmp_path / "own"))
        document = json.loads((own / INDEX).read_bytes())
        document["splits"]["train"]["shards"][0]["file"] = name
        data = canonical_json(document)
        (own / INDEX).write_bytes(data)
        (own / INDEX_SUM).write_bytes(index_sum(sha256_bytes(data)))
        server = Server(own)
        try:
            with pytest.raises(DamagedError, match="it has changed"):
                remote(server)
        finally:
            server.close()

    @pytest.mark.parametrize(
        ("address", "message"),
        [
            ("pipe:cat /etc/passwd", "is not an archive"),
            ("pipe://cat /etc/passwd", "not an address"),
            ("simplecache::http://127.0.0.1/a", "not an address"),
            ("nosuch://bucket/a", "nosuch:// is not known"),
        ],
    )
    def test_addresses_that_are_refused(self, address, message):
        """No shell, no chains, no unknown kinds."""
        with pytest.raises(RequestError, match=re.escape(message)):
            EpisodeStream(address)


def occupied(folder, *patterns):
    """The bytes of the files in a cache in which other threads remove and rename some at any moment."""
    total = 0
    for path in {path for pattern in patterns for path in folder.glob(pattern)}:
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


class TestAhead:
    def test_a_source_that_ends_in_its_own_thread(self, server):
        """Garbage collection may find a source in the middle of one of its jobs; its folder is removed all the same."""
        sources = [remote(server)]
        place, ahead = sources[0].cache.folder, sources[0]._prefetched
        ahead.start(0, sources.clear)
        ahead.join(30)
        deadline = time.monotonic() + 30
        while place.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not place.exists()

    def test_shards_come_several_at_a_time(self, server):
        """The first and the next two are under way together; none is asked for twice."""
        meeting = threading.Barrier(3, timeout=30)

        def meets(handler: Handler, data: bytes, start: int) -> None:
            meeting.wait()
            handler.head(data, start)
            handler.wfile.write(data[start:])

        server.faults = [meets] * 3
        stream = EpisodeStream(remote(server), batch_size=BATCH, shuffle=False)
        assert len(kept(stream)) == 6
        assert sorted(shards_asked(server)) == [f"train-{number:05d}.tar" for number in range(5)]

    @pytest.mark.parametrize("device", [None, "cpu"])
    def test_an_epoch_begins_with_shards_that_are_here(self, glyphs_manifest, glyphs_bank, server, tmp_path, device):
        """Those that the next shuffled epoch begins with are fetched while the last ones of this are read from."""
        server.folder = tmp_path / "archive"
        build(glyphs_manifest, glyphs_bank, server.folder, replace(REQUEST, episodes_per_shard=2))
        server.faults = [late] * 100  # so that the file system's coarse clock tells which came first
        known = EpisodeStream(remote(server, cache_dir=tmp_path / "cache"), batch_size=1, seed=4)
        (first, _), *_ = [kept(known) for _ in range(2)][1]
        stream = EpisodeStream(remote(server), batch_size=1, seed=4)
        chosen = stream.to(device) if device else stream
        assert len(kept(chosen)) == len(stream)
        for thread in threading.enumerate():
            if thread.name == "mamldata-ahead":
                thread.join(30)
        server.asked.clear()
        batch = next(iter(chosen))
        assert batch.index.tolist() == first
        assert f"train-{first[0] // 2:05d}.tar" not in shards_asked(server)

    def test_remix_fetches_several_at_a_time(self, server, tmp_path):
        """Also where all shards are needed before the first meta-batch."""
        meeting = threading.Barrier(3, timeout=30)

        def meets(handler: Handler, data: bytes, start: int) -> None:
            meeting.wait()
            handler.head(data, start)
            handler.wfile.write(data[start:])

        server.faults = [meets] * 3
        next(iter(EpisodeStream(remote(server, cache_dir=tmp_path), batch_size=BATCH, remix=True)))
        assert sorted(shards_asked(server)) == [f"train-{number:05d}.tar" for number in range(5)]

    def test_nothing_is_fetched_that_the_epoch_does_not_need(self, server):
        """An epoch over some episodes asks for their shards alone, in the order of the epoch."""
        stream = EpisodeStream(remote(server, episodes=12), batch_size=BATCH, seed=4)
        found = [index // 5 for index in itertools.chain(*(indices for indices, _ in kept(stream)))]
        assert len(found) == 12
        assert set(shards_asked(server)) == {f"train-{number:05d}.tar" for number in set(found)}

    def test_connections_are_kept(self, server):
        """Shards come over connections that are there already: as many as are under way at a time, and no more."""
        connections = []
        accept = server.process_request

        def counted(request, client_address) -> None:
            connections.append(client_address)
            accept(request, client_address)

        server.process_request = counted  # type: ignore[method-assign]
        stream = EpisodeStream(remote(server), batch_size=1, shuffle=False)
        for _ in range(3):
            kept(stream)
        assert len(shards_asked(server)) >= 9
        assert len(connections) <= 3

    def test_its_bound_holds_for_shards_under_way(self, folder, server, tmp_path):
        """Those that are being fetched are counted as if they were here."""
        size = (folder / "train-00000.tar").stat().st_size
        most = []

        def looks(handler: Handler, data: bytes, start: int) -> None:
            handler.head(data, start)
            for at in range(start, len(data), 1 << 13):
                handler.wfile.write(data[at : at + (1 << 13)])
                most.append(occupied(tmp_path / OWN, "*.tar", "*.tar.part"))

        server.faults = [looks] * 100
        for room in (2, 3):
            source = remote(server, cache_dir=tmp_path, cache_bytes=room * size)
            for _ in range(2):
                kept(EpisodeStream(source, batch_size=1, shuffle=False))
            assert max(most) <= room * size
            most.clear()


class TestCache:
    def test_it_is_used_again(self, server, tmp_path):
        """A second stream asks for no shard, and a damaged one in the cache is fetched anew."""
        first = kept(EpisodeStream(remote(server, cache_dir=tmp_path), shuffle=False))
        asked = len(shards_asked(server))
        assert asked == 5
        assert kept(EpisodeStream(remote(server, cache_dir=tmp_path), shuffle=False)) == first
        assert len(shards_asked(server)) == asked
        broken = sorted((tmp_path / OWN).glob("*.tar"))[0]
        broken.write_bytes(broken.read_bytes()[:-1])
        assert kept(EpisodeStream(remote(server, cache_dir=tmp_path), shuffle=False)) == first
        assert len(shards_asked(server)) == asked + 1

    def test_its_bound(self, folder, server, tmp_path):
        """It never holds more than it may, and the episodes are the same."""
        size = (folder / "train-00000.tar").stat().st_size
        bound = 2 * size
        stream = EpisodeStream(remote(server, cache_dir=tmp_path, cache_bytes=bound), batch_size=1, shuffle=False)
        expected = kept(EpisodeStream(folder, batch_size=1, shuffle=False))
        for batch, reference in zip(stream, expected, strict=True):
            assert kept([batch]) == [reference]
            assert occupied(tmp_path / OWN, "*.tar") <= bound
            assert stream.source._mapped_bytes() <= bound
        with pytest.raises(RequestError, match="room for two of the archive's shards"):
            remote(server, cache_dir=tmp_path, cache_bytes=bound - 1)
        with pytest.raises(RequestError, match="needs a cache_dir"):
            remote(server, cache_bytes=bound)
        with pytest.raises(RequestError, match="a folder needs no cache"):
            EpisodeStream(folder, cache_dir=tmp_path)

    def test_what_killed_downloads_left_makes_room(self, folder, server, tmp_path):
        """It counts, and goes when the room is needed; what another process is fetching stays."""
        shards = read_archive(folder).split("train").shards
        size = shards[0].bytes
        cache = ShardCache(tmp_path, 3 * size)
        for number in range(4):
            (cache.own / f"{number:064d}.tar.part").write_bytes(bytes(size))
            time.sleep(0.02)  # the file system's clock is coarse
        with locked(cache.own / f"{2:064d}.lock"):
            for shard in shards[:2]:
                cache.get(f"{server.url}/{shard.file}", shard)
        assert sorted(path.name[:64] for path in cache.own.glob("*.tar.part")) == [f"{2:064d}", f"{3:064d}"]
        assert len(list(cache.own.glob("*.tar"))) == 2

    def test_a_folder_with_the_name_of_a_shard(self, folder, server, tmp_path):
        """It is never removed; whoever needs the shard of that name gets an error that names the folder."""
        shards = read_archive(folder).split("train").shards
        cache = ShardCache(tmp_path, 2 * shards[0].bytes, QUICK)
        theirs = [cache.own / f"{'0' * 64}.tar", cache.own / f"{shards[3].sha256}.tar"]
        for path in theirs:
            path.mkdir()
        for shard in shards[:3]:
            cache.get(f"{server.url}/{shard.file}", shard)
        with pytest.raises(WriteError, match=rf"{shards[3].sha256}\.tar .*Is a directory"):
            cache.get(f"{server.url}/{shards[3].file}", shards[3])
        assert all(path.is_dir() for path in theirs)

    def test_the_least_recently_used_goes_first(self, folder, server, tmp_path):
        """What was used just now is kept."""
        shards = read_archive(folder).split("train").shards
        cache = ShardCache(tmp_path, 3 * shards[0].bytes, QUICK)
        for number in (0, 1, 2, 0, 3):
            cache.get(f"{server.url}/{shards[number].file}", shards[number])
            time.sleep(0.02)  # the file system's clock is coarse
        assert {path.stem for path in cache.own.glob("*.tar")} == {shards[number].sha256 for number in (0, 2, 3)}

    def test_other_files_stay(self, folder, server, tmp_path):
        """Whatever lies in cache_dir and is not the cache's own stays as it is, a tar named by its sha256 included."""
        shards = read_archive(folder).split("train").shards
        mine = (folder / shards[1].file).read_bytes()
        names = ["imagenet.tar", "backup.tar.part", "backup.lock", "train-00000.tar", f"{'a' * 64}.tar.part"]
        names += [f"{shards[1].sha256}.{kind}" for kind in ("tar", "lock", "json")]
        names += [f"{OWN}/{name}" for name in ("notes.tar", "notes.tar.part", f"{'A' * 64}.tar")]
        (tmp_path / OWN).mkdir()
        for name in names:
            (tmp_path / name).write_bytes(mine)
        before = {name: (tmp_path / name).stat() for name in names}
        stream = EpisodeStream(remote(server, cache_dir=tmp_path, cache_bytes=2 * shards[0].bytes), shuffle=False)
        assert kept(stream) == kept(EpisodeStream(folder, shuffle=False))
        assert kept(stream) == kept(EpisodeStream(folder, shuffle=False))
        for name, status in before.items():
            assert (tmp_path / name).read_bytes() == mine, name
            assert (tmp_path / name).stat().st_mtime_ns == status.st_mtime_ns, name
        made = {path.name for path in tmp_path.iterdir()} - {name.partition("/")[0] for name in [*names, "temporary"]}
        assert not made, "everything of the cache lies in its own folder"
        assert (tmp_path / OWN / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")

    def test_what_is_not_a_file_is_passed_over(self, folder, server, tmp_path):
        """A link in a circle under a shard's name has no length, and a pipe in place of a record is not waited for."""
        first, second, *_ = read_archive(folder).split("train").shards
        cache = ShardCache(tmp_path, 2 * first.bytes, QUICK)
        circle = cache.own / f"{0:064d}.tar"
        circle.symlink_to(circle.name)
        path = cache.get(f"{server.url}/{first.file}", first)
        path.with_suffix(".json").unlink()
        os.mkfifo(path.with_suffix(".json"))
        assert cache.get(f"{server.url}/{first.file}", first) == path
        assert cache.get(f"{server.url}/{second.file}", second).is_file()
        assert len(server.asked) == 2

    def test_what_is_being_opened_stays(self, folder, server, tmp_path):
        """Another process that needs room removes no shard before it is open, nor waits until it is."""
        shards = read_archive(folder).split("train").shards
        cache, other = (ShardCache(tmp_path, 2 * shards[0].bytes, QUICK) for _ in range(2))

        def opener(path: Path) -> bytes:
            for shard in shards[1:4]:
                other.get(f"{server.url}/{shard.file}", shard)
            assert len(list(cache.own.glob("*.tar"))) == 2
            return path.read_bytes()

        url = f"{server.url}/{shards[0].file}"
        assert cache.open(url, shards[0], opener) == (folder / shards[0].file).read_bytes()

    def test_what_was_fetched_ahead_is_kept(self, folder, server, tmp_path):
        """Others may remove a shard between its coming and its turn: it is open by then, and not fetched twice."""
        size = read_archive(folder).split("train").shards[0].bytes
        source = remote(server, cache_dir=tmp_path, cache_bytes=2 * size)
        source.prefetch([0])
        source._prefetched.join(30)
        for path in (tmp_path / OWN).glob("*.tar"):
            path.unlink()
        assert bytes(source._open_shard(0)) == (folder / "train-00000.tar").read_bytes()
        assert shards_asked(server) == ["train-00000.tar"]

    def test_readers_that_share_little_room(self, folder, server, tmp_path):
        """Three readers in different orders, with room for two shards, all get all episodes."""
        size = read_archive(folder).split("train").shards[0].bytes
        expected = by_index(EpisodeStream(folder, shuffle=False, dtype=torch.uint8))
        found: list[dict[int, bytes]] = []

        def reads(seed: int) -> None:
            source = remote(server, cache_dir=tmp_path, cache_bytes=2 * size)
            found.append(by_index(EpisodeStream(source, seed=seed, dtype=torch.uint8)))

        threads = [threading.Thread(target=reads, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [expected] * 3

    def test_maps_that_nobody_reads_from_go(self, server, tmp_path):
        """What was fetched ahead for a pass that was broken off is not kept open for ever."""
        source = remote(server, cache_dir=tmp_path)
        source.prefetch([0, 1, 2])
        source._prefetched.join(30)
        source.prefetch([3, 4])
        source._prefetched.join(30)
        assert [number for number in range(5) if number in source._prefetched] == [3, 4]

    @pytest.mark.parametrize("record", ["old", "none", "forged"])
    def test_a_shard_is_not_believed_by_its_name(self, folder, server, tmp_path, caplog, record):
        """One that was changed under its name and its date is fetched again, whatever record stands beside it."""
        stream = EpisodeStream(remote(server, cache_dir=tmp_path), shuffle=False)
        first = kept(stream)
        path = tmp_path / OWN / f"{read_archive(folder).split('train').shards[2].sha256}.tar"
        status = path.stat()
        time.sleep(0.02)  # the file system's clock is coarse
        with path.open("r+b") as file:
            file.seek(status.st_size // 2)
            file.write(b"\x55" * 512)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        if record == "none":
            path.with_suffix(".json").unlink()
        if record == "forged":
            path.with_suffix(".json").write_bytes(bytes(1 << 20))
        asked = len(shards_asked(server))
        assert kept(EpisodeStream(remote(server, cache_dir=tmp_path), shuffle=False)) == first
        assert shards_asked(server)[asked:] == ["train-00002.tar"]
        assert f"{path} is damaged; it is fetched again" in caplog.text

    def test_a_shard_is_hashed_once(self, server, tmp_path, monkeypatch):
        """It is hashed as it comes, and again only where no record of this user says that this file was hashed."""
        hashed = []
        monkeypatch.setattr(
            "mamldata.archive.remote.sha256_file", lambda path: hashed.append(path) or sha256_file(path)
        )

        def hashes() -> int:
            hashed.clear()
            assert len(kept(EpisodeStream(remote(server, cache_dir=tmp_path), shuffle=False))) == 23
            return len(hashed)

        assert [hashes(), hashes()] == [0, 0]
        for record in (tmp_path / OWN).glob("*.json"):
            record.unlink()
        assert [hashes(), hashes()] == [5, 0]
        monkeypatch.setattr("os.geteuid", lambda: 12345)
        assert hashes() == 5
        assert len(shards_asked(server)) == 5

    def test_no_room_on_the_disk(self, server, tmp_path):
        """A full disk is an error that names the place."""
        code = (
            "import resource, signal, sys; from mamldata.sources.remote import RemoteSource\n"
            "source = RemoteSource(sys.argv[1], cache_dir=sys.argv[2])\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
            "source._open_shard(0)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, server.url, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert f"WriteError: No space left to write {tmp_path}" in done.stderr

    def test_a_disk_that_fills_up(self, folder, server, small_disk):
        """Once there is room on it, the same stream goes on, and with the bytes that had come."""
        size = (folder / "train-00000.tar").stat().st_size
        cache = small_disk.path / "cache"
        small_disk.grow(size // 4096 * 4096 + size // 2 // 4096 * 4096)  # for one shard and half of another
        stream = EpisodeStream(remote(server, cache_dir=cache), batch_size=1, shuffle=False)
        with pytest.raises(WriteError, match=f"No space left to write {cache}"):
            kept(stream)
        small_disk.grow(10 * size)
        assert kept(stream) == kept(EpisodeStream(folder, batch_size=1, shuffle=False))
        assert any(begin for _, begin in server.asked)

    @pytest.mark.slow
    def test_two_processes_share_it(self, server, tmp_path):
        """Each shard is fetched once, however many processes want it at the same moment."""
        code = (
            "import sys; from mamldata import EpisodeStream\n"
            "stream = EpisodeStream(sys.argv[1], batch_size=4, shuffle=False, cache_dir=sys.argv[2])\n"
            "print([batch.index.tolist() for batch in stream])\n"
        )
        server.faults = [slow] * 5
        running = [
            subprocess.Popen([sys.executable, "-c", code, server.url, str(tmp_path)], stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        outputs = {process.communicate(timeout=120)[0] for process in running}
        assert outputs == {f"{[list(range(at, min(at + 4, 23))) for at in range(0, 23, 4)]}\n"}
        assert sorted(shards_asked(server)) == [f"train-{number:05d}.tar" for number in range(5)]

    @pytest.mark.slow
    def test_killed_in_mid_download(self, folder, server, tmp_path):
        """After kill -9 the next process goes on from what came, and nobody waits for the dead one's lock."""

        def hangs(handler: Handler, data: bytes, start: int) -> None:
            handler.head(data, start)
            handler.wfile.write(data[: len(data) // 2])
            handler.wfile.flush()
            time.sleep(3)

        server.faults = [hangs]
        code = (
            "import sys; from mamldata.sources.remote import RemoteSource\n"
            "RemoteSource(sys.argv[1], cache_dir=sys.argv[2])._open_shard(0)\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code, server.url, str(tmp_path)])
        half = (folder / "train-00000.tar").stat().st_size // 2
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size >= half for path in (tmp_path / OWN).glob("*.part")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        source = remote(server, cache_dir=tmp_path)
        assert bytes(source._open_shard(0)) == (folder / "train-00000.tar").read_bytes()
        assert [asked for name, asked in server.asked if name.endswith(".tar")] == [None, f"bytes={half}-"]
        assert not list((tmp_path / OWN).glob("*.part"))


class TestVerify:
    def test_whole(self, folder, server):
        """An archive at an address is fetched and checked like one in a folder, its digest included."""
        digest = read_archive(folder).digest
        assert read_remote_archive(server.url, QUICK).digest == digest
        assert verify_archive(server.url, digest=digest) == []
        (problem,) = verify_archive(server.url, digest="0" * 64)
        assert f"its digest is {digest}" in problem

    def test_damage(self, folder, tmp_path):
        """A flipped byte on the server is found, and the shard named."""
        own = Path(shutil.copytree(folder, tmp_path / "own"))
        data = bytearray((own / "train-00002.tar").read_bytes())
        data[7000] ^= 1
        (own / "train-00002.tar").write_bytes(data)
        server = Server(own)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("time.sleep", lambda _: None)
                (problem,) = verify_archive(server.url)
        finally:
            server.close()
        assert "train-00002.tar could not be fetched: another file came: sha256" in problem
