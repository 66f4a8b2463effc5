"""Fetching, against a real HTTP server on loopback that misbehaves as told."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import resource
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from mamldata.datasets.load import load_manifest
from mamldata.datasets.manifest import Manifest, SourceFile
from mamldata.datasets.paths import DatasetFolder
from mamldata.errors import FetchError, RequestError, WriteError
from mamldata.fetching.act import Fetched, fetch
from mamldata.fetching.http import Network
from mamldata.fetching.plan import plan
from mamldata.fetching.receipts import Receipt, write_receipt
from mamldata.fetching.verify import check_raw
from mamldata.io.atomic import temporary
from mamldata.io.content_digest import content_sha256

DATA = hashlib.shake_256(b"the file").digest(300_000)
QUICK = Network(
    connect_timeout=2, read_timeout=0.3, rounds=3, backoff=0.01, longest_pause=0.05, stall_seconds=0.3, min_speed=5000
)


@dataclass
class Reply:
    """How the server answers one request.

    Attributes:
        status: other than 200 and 206 has no file in it.
        data: the file as the server has it.
        ranges: whether a Range is honoured.
        cut: close the connection after so many bytes of the body.
        length: what Content-Length says, if not the truth.
        headers: more of them.
        drip: seconds between pieces of 100 bytes.
        silence: seconds of nothing before the body.
        content_range: what Content-Range says, if not the truth.
    """

    status: int = 200
    data: bytes = DATA
    ranges: bool = True
    cut: int | None = None
    length: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drip: float = 0.0
    silence: float = 0.0
    content_range: str | None = None


class FaultServer(http.server.ThreadingHTTPServer):
    """Serves replies in turn, path by path; the last one for ever. Notes each request's path and Range."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies: dict[str, list[Reply]] = {}
        self.log: list[tuple[str, str | None]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def serve(self, path: str, *replies: Reply) -> str:
        self.replies[path] = list(replies)
        return self.address + path

    def ranges(self, path: str) -> list[str | None]:
        return [asked for requested, asked in self.log if requested == path]

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the game."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultServer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.log.append((self.path, asked))
        replies = self.server.replies.get(self.path, [Reply(status=404)])
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        self.close_connection = True
        if reply.status != 200:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            self.end_headers()
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and reply.ranges else 0
        unchanged = self.headers.get("If-Range") in {None, reply.headers.get("ETag")}
        if start and not unchanged:
            start = 0
        if start >= len(reply.data) and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(reply.data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = reply.data[start:]
        self.send_response(206 if start else 200)
        if start:
            truth = f"bytes {start}-{len(reply.data) - 1}/{len(reply.data)}"
            self.send_header("Content-Range", reply.content_range or truth)
        self.send_header("Content-Length", str(len(body) if reply.length is None else reply.length))
        self.send_header("Connection", "close")
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        time.sleep(reply.silence)
        body = body if reply.cut is None else body[: reply.cut]
        step = 100 if reply.drip else max(len(body), 1)
        for position in range(0, len(body), step):
            self.wfile.write(body[position : position + step])
            time.sleep(reply.drip)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    """A server; nothing of it is left afterwards."""
    with FaultServer() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def source(*urls: str, data: bytes = DATA, name: str = "file.bin", **more: object) -> SourceFile:
    """An entry of a manifest."""
    digest = hashlib.sha256(data).hexdigest()
    return SourceFile(name, len(data), digest, urls=urls or ("http://127.0.0.1:9/nowhere",), **more)  # type: ignore[arg-type]


def manifest_of(*files: SourceFile) -> Manifest:
    """A manifest with these files."""
    return replace(load_manifest("glyphs"), name="thing", reference="thing", files=files)


def get(root: Path, *files: SourceFile, **more: object) -> list[Fetched]:
    """Fetch them quickly."""
    return fetch(manifest_of(*files), root, network=QUICK, **more)  # type: ignore[arg-type]


def arrived(root: Path, data: bytes = DATA, name: str = "file.bin", match: str = "") -> bool:
    """Whether the file is whole under its final name, with its receipt, read-only, and nothing else is there."""
    folder = DatasetFolder(root, "thing")
    path = folder.raw / name
    assert path.read_bytes() == data
    assert folder.receipt(name).read_text() == f"{hashlib.sha256(data).hexdigest()}  {name}\n{match}"
    assert path.stat().st_mode & 0o777 == 0o444
    assert sorted(entry.name for entry in folder.raw.iterdir()) == [name, f"{name}.sha256"]
    return True


def absent(root: Path, name: str = "file.bin") -> bool:
    """Whether nothing stands under the final name."""
    folder = DatasetFolder(root, "thing")
    return not (folder.raw / name).exists() and not folder.receipt(name).exists()


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """No thread and no file descriptor outlives a fetch."""
    before = threading.active_count(), len(list(Path("/dev/fd").iterdir()))
    yield
    deadline = time.monotonic() + 2
    while (threading.active_count(), len(list(Path("/dev/fd").iterdir()))) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (threading.active_count(), len(list(Path("/dev/fd").iterdir()))) <= before


class TestTransfers:
    """What servers do."""

    def test_a_plain_download(self, server: FaultServer, tmp_path: Path):
        """The file comes whole, and the report says from where and how it was checked."""
        url = server.serve("/f", Reply())
        (result,) = get(tmp_path, source(url))
        assert arrived(tmp_path)
        assert (result.how, result.source, result.bytes, result.checked_by) == ("downloaded", url, len(DATA), "sha256")
        assert result.sha256 == hashlib.sha256(DATA).hexdigest()

    def test_a_second_fetch_makes_no_request(self, server: FaultServer, tmp_path: Path):
        """What is there is left alone."""
        file = source(server.serve("/f", Reply()))
        get(tmp_path, file)
        asked = len(server.log)
        (result,) = get(tmp_path, file)
        assert result.how == "had"
        assert len(server.log) == asked

    def test_a_cut_connection_goes_on_by_range(self, server: FaultServer, tmp_path: Path):
        """A connection cut in the middle is continued behind the bytes that came."""
        url = server.serve("/f", Reply(cut=100_000, headers={"ETag": '"1"'}), Reply(headers={"ETag": '"1"'}))
        get(tmp_path, source(url))
        assert arrived(tmp_path)
        assert server.ranges("/f") == [None, "bytes=100000-"]

    def test_a_server_without_range(self, server: FaultServer, tmp_path: Path):
        """A 200 in answer to a Range starts anew instead of appending."""
        url = server.serve("/f", Reply(cut=100_000), Reply(ranges=False))
        get(tmp_path, source(url))
        assert arrived(tmp_path)

    def test_a_file_that_changed_between_two_halves(self, server: FaultServer, tmp_path: Path):
        """With an ETag the server starts anew; the halves of two versions are never joined."""
        old = Reply(data=bytes(len(DATA)), cut=100_000, headers={"ETag": '"old"'})
        get(tmp_path, source(server.serve("/f", old, Reply(headers={"ETag": '"new"'}))))
        assert arrived(tmp_path)
        assert len(server.log) == 2

    def test_a_change_that_nothing_tells(self, server: FaultServer, tmp_path: Path):
        """Without an ETag the digest finds out, and the file is fetched anew from the same address."""
        get(tmp_path, source(server.serve("/f", Reply(data=bytes(len(DATA)), cut=100_000), Reply())))
        assert arrived(tmp_path)
        assert server.ranges("/f") == [None, "bytes=100000-", None]

    @pytest.mark.parametrize("status", [404, 500, 503])
    def test_an_error_and_then_success(self, status: int, server: FaultServer, tmp_path: Path):
        """A passing error is tried again."""
        get(tmp_path, source(server.serve("/f", Reply(status=status), Reply())))
        assert arrived(tmp_path)

    def test_retry_after_is_honoured(self, server: FaultServer, tmp_path: Path):
        """A 429 is given the time that it asks for, up to a bound."""
        url = server.serve("/f", Reply(status=429, headers={"Retry-After": "60"}), Reply())
        start = time.monotonic()
        fetch(manifest_of(source(url)), tmp_path, network=replace(QUICK, longest_pause=0.4))
        assert 0.4 <= time.monotonic() - start < 30
        assert arrived(tmp_path)

    def test_a_mirror_that_fails_before_one_that_works(self, server: FaultServer, tmp_path: Path):
        """Mirrors are tried in turn."""
        bad, good = server.serve("/bad", Reply(status=404)), server.serve("/good", Reply())
        (result,) = get(tmp_path, source(bad, good))
        assert result.source == good
        assert arrived(tmp_path)

    def test_a_mirror_goes_on_where_another_stopped(self, server: FaultServer, tmp_path: Path):
        """The bytes of one mirror are continued by another: the digest is the same for all."""
        one, two = server.serve("/one", Reply(cut=100_000)), server.serve("/two", Reply())
        get(tmp_path, source(one, two))
        assert arrived(tmp_path)
        assert server.ranges("/two") == ["bytes=100000-"]

    def test_wrong_content(self, server: FaultServer, tmp_path: Path):
        """Another file is refused, with both digests, and its address is not asked again."""
        other = bytes(len(DATA))
        url = server.serve("/f", Reply(data=other))
        with pytest.raises(FetchError, match="could not be fetched") as raised:
            get(tmp_path, source(url))
        assert hashlib.sha256(other).hexdigest() in str(raised.value)
        assert hashlib.sha256(DATA).hexdigest() in str(raised.value)
        assert "--from FOLDER" in str(raised.value)
        assert absent(tmp_path)
        assert len(server.log) == 1

    @pytest.mark.parametrize("headers", [{"Content-Type": "text/html; charset=utf-8"}, {}])
    def test_a_web_page_instead_of_the_file(self, headers: dict[str, str], server: FaultServer, tmp_path: Path):
        """A page is recognised by its type and by its look, and the next mirror is taken."""
        page = server.serve("/page", Reply(data=b"\n <!DOCTYPE html><p>Log in", headers=headers))
        with pytest.raises(FetchError, match="it sent a web page"):
            get(tmp_path, source(page))
        get(tmp_path, source(page, server.serve("/f", Reply())))
        assert arrived(tmp_path)

    def test_a_web_page_does_not_cost_what_came(self, server: FaultServer, tmp_path: Path):
        """A mirror's page leaves the bytes of another mirror where they are."""
        page = server.serve("/page", Reply(data=b"<html>", ranges=False, headers={"Content-Type": "text/html"}))
        get(tmp_path, source(server.serve("/f", Reply(cut=100_000), Reply()), page))
        assert arrived(tmp_path)
        assert server.ranges("/f") == [None, "bytes=100000-"]

    def test_416_for_a_part_that_is_too_long(self, server: FaultServer, tmp_path: Path):
        """A part that is longer than the file is dropped, and the file fetched anew."""
        part = temporary(DatasetFolder(tmp_path, "thing").raw / "file.bin")
        part.parent.mkdir(parents=True)
        part.write_bytes(bytes(len(DATA) + 1000))
        get(tmp_path, source(server.serve("/f", Reply())))
        assert arrived(tmp_path)

    def test_416_for_a_part_that_is_whole(self, server: FaultServer, tmp_path: Path):
        """A part that is whole already is verified, without a transfer."""
        part = temporary(DatasetFolder(tmp_path, "thing").raw / "file.bin")
        part.parent.mkdir(parents=True)
        part.write_bytes(DATA)
        get(tmp_path, source(server.serve("/f", Reply())))
        assert arrived(tmp_path)
        assert not server.log

    def test_416_again_and_again(self, server: FaultServer, tmp_path: Path):
        """A server that answers 416 to everything ends in an error, not in a circle."""
        part = temporary(DatasetFolder(tmp_path, "thing").raw / "file.bin")
        part.parent.mkdir(parents=True)
        part.write_bytes(DATA[:1000])
        with pytest.raises(FetchError, match="416"):
            get(tmp_path, source(server.serve("/f", Reply(status=416))))
        assert len(server.log) <= 2 * QUICK.rounds

    def test_a_length_that_is_too_small(self, server: FaultServer, tmp_path: Path):
        """A body that ends early by its own Content-Length is continued."""
        get(tmp_path, source(server.serve("/f", Reply(length=1000, cut=1000), Reply())))
        assert arrived(tmp_path)
        assert server.ranges("/f") == [None, "bytes=1000-"]

    def test_a_length_that_is_too_large(self, server: FaultServer, tmp_path: Path):
        """A file of more bytes than the manifest allows is refused before it is read."""
        with pytest.raises(FetchError, match="announces 300001 bytes; the file has at most 300,000"):
            get(tmp_path, source(server.serve("/f", Reply(data=DATA + b"x"))))
        assert absent(tmp_path)
        get(tmp_path, source(server.serve("/f", Reply(length=10**15), Reply()), server.serve("/g", Reply())))
        assert arrived(tmp_path)

    def test_a_wrong_content_range(self, server: FaultServer, tmp_path: Path):
        """Bytes from elsewhere than asked for are not appended."""
        wrong = Reply(content_range=f"bytes 5-{len(DATA) - 1}/{len(DATA)}")
        get(tmp_path, source(server.serve("/f", Reply(cut=100_000), wrong, Reply())))
        assert arrived(tmp_path)

    def test_a_slow_server_is_left_for_the_next(self, server: FaultServer, tmp_path: Path):
        """A server that drips is left; what it gave is kept."""
        slow, good = server.serve("/slow", Reply(drip=0.05)), server.serve("/good", Reply())
        start = time.monotonic()
        get(tmp_path, source(slow, good))
        assert arrived(tmp_path)
        assert time.monotonic() - start < 3
        assert server.ranges("/good")[0] is not None

    def test_a_silent_server(self, server: FaultServer, tmp_path: Path):
        """A server that sends nothing is left after the read timeout."""
        silent, good = server.serve("/silent", Reply(silence=1.0)), server.serve("/good", Reply())
        get(tmp_path, source(silent, good))
        assert arrived(tmp_path)

    def test_a_circle_of_redirects(self, server: FaultServer, tmp_path: Path):
        """A circle is one mirror's failure."""
        circle = server.serve("/circle", Reply(status=302, headers={"Location": "/circle"}))
        with pytest.raises(FetchError, match="redirects in a circle"):
            fetch(manifest_of(source(circle)), tmp_path, network=replace(QUICK, rounds=1))
        get(tmp_path, source(circle, server.serve("/f", Reply())))
        assert arrived(tmp_path)

    def test_nobody_listens(self, tmp_path: Path):
        """Every source and its failure are named, and how to go on."""
        with pytest.raises(FetchError, match=r"http://127\.0\.0\.1:9/nowhere: the connection failed"):
            get(tmp_path, source())

    def test_progress_counts_every_byte_once(self, server: FaultServer, tmp_path: Path):
        """The bar of a transfer that was cut ends at the file's length."""
        bars: list[list[int]] = []

        class Bar:
            def __init__(self) -> None:
                self.counts: list[int] = []
                bars.append(self.counts)

            def __enter__(self) -> Callable[[int], None]:
                return self.counts.append

            def __exit__(self, *_: object) -> None:
                pass

        get(
            tmp_path,
            source(server.serve("/f", Reply(cut=100_000), Reply(ranges=False))),
            progress=lambda *_: Bar(),
        )
        assert [sum(counts) for counts in bars] == [len(DATA)]


class TestPlaces:
    """Folders, mirrors, no network."""

    def test_from_a_folder(self, tmp_path: Path):
        """A folder is looked in first, and its file is copied."""
        (tmp_path / "here").mkdir()
        (tmp_path / "here" / "file.bin").write_bytes(DATA)
        (result,) = get(tmp_path / "root", source(), sources=(str(tmp_path / "here"),))
        assert result.how == "copied"
        assert arrived(tmp_path / "root")
        assert (tmp_path / "here" / "file.bin").read_bytes() == DATA

    def test_from_a_file_address(self, tmp_path: Path):
        """``file://`` is a folder too."""
        (tmp_path / "file.bin").write_bytes(DATA)
        get(tmp_path / "root", source(), sources=(f"file://{tmp_path}",), offline=True)
        assert arrived(tmp_path / "root")

    def test_from_a_mirror(self, server: FaultServer, tmp_path: Path):
        """The file's name is added to an address."""
        server.serve("/mirror/file.bin", Reply())
        get(tmp_path, source(), sources=(f"{server.address}/mirror/",))
        assert arrived(tmp_path)

    def test_from_what_fsspec_opens(self, tmp_path: Path):
        """Any address that fsspec knows will do."""
        import fsspec

        with fsspec.open("memory://bucket/file.bin", "wb") as stream:
            stream.write(DATA)
        get(tmp_path, source(), sources=("memory://bucket",))
        assert arrived(tmp_path)

    def test_from_an_address_without_its_package(self, tmp_path: Path):
        """A protocol that nobody knows is wrong usage."""
        with pytest.raises(RequestError, match="nonsense:// is not known"):
            get(tmp_path, source(), sources=("nonsense://x",))

    def test_a_damaged_local_file(self, tmp_path: Path):
        """A wrong file in a folder is refused and left where it is."""
        (tmp_path / "file.bin").write_bytes(DATA[:-1] + b"x")
        with pytest.raises(FetchError, match="another file came"):
            get(tmp_path / "root", source(), sources=(str(tmp_path),), offline=True)
        assert absent(tmp_path / "root")

    def test_a_place_that_is_none(self, tmp_path: Path):
        """A misspelt folder is wrong usage, and nothing is made."""
        with pytest.raises(RequestError, match="is neither a folder, a file nor a URL"):
            get(tmp_path / "root", source(), sources=(str(tmp_path / "nope"),))
        assert not (tmp_path / "root").exists()

    def test_offline_touches_no_network(self, server: FaultServer, tmp_path: Path):
        """Without a network the missing files are named, with what to do."""
        url = server.serve("/f", Reply())
        with pytest.raises(FetchError, match=r"file\.bin: looked for in") as raised:
            get(tmp_path, source(url), sources=(server.address,), offline=True)
        assert f"available from {url}" in str(raised.value)
        assert "--from FOLDER" in str(raised.value)
        assert not server.log

    def test_the_plan_says_what_must_be_done(self, tmp_path: Path):
        """The plan is a decision: it makes nothing, and knows all kinds."""
        folder = DatasetFolder(tmp_path, "thing")
        files = [source(name=name) for name in ("have", "check", "resume", "download")]
        generated = replace(load_manifest("glyphs").files[0], name="generate")
        thing = manifest_of(*files, generated)
        assert not folder.path.exists()
        assert [action.kind for action in plan(thing, tmp_path)] == ["download"] * 4 + ["generate"]
        assert [action.kind for action in plan(thing, tmp_path, offline=True)] == ["missing"] * 4 + ["generate"]
        assert not folder.path.exists()
        folder.raw.mkdir(parents=True)
        for name in ("have", "check"):
            (folder.raw / name).write_bytes(DATA)
        (folder.raw / "resume.part").write_bytes(b"12345")
        write_receipt(folder, "have", Receipt(files[0].sha256))
        actions = plan(thing, tmp_path)
        assert [action.kind for action in actions] == ["have", "check", "resume", "download", "generate"]
        assert [action.have_bytes for action in actions] == [0, 0, 5, 0, 0]

    def test_a_file_put_there_by_hand(self, tmp_path: Path):
        """A file without a receipt is verified where it is; a wrong one is named and never deleted."""
        folder = DatasetFolder(tmp_path, "thing")
        folder.raw.mkdir(parents=True)
        (folder.raw / "file.bin").write_bytes(b"mine")
        with pytest.raises(FetchError, match=r"file\.bin is not the right file: sha256 .* expected"):
            get(tmp_path, source())
        assert (folder.raw / "file.bin").read_bytes() == b"mine"
        (folder.raw / "file.bin").write_bytes(DATA)
        assert get(tmp_path, source())[0].how == "checked"
        assert arrived(tmp_path)

    def test_the_embedded_dataset(self, tmp_path: Path):
        """Glyphs are drawn, verified like any other file, and need no network."""
        (result,) = fetch(load_manifest("glyphs"), tmp_path, offline=True)
        assert (result.how, result.checked_by) == ("generated", "sha256")
        assert check_raw(load_manifest("glyphs"), tmp_path) == []


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of these members."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as container:
        for name, content in members.items():
            container.writestr(zipfile.ZipInfo(name), content)
    return data.getvalue()


class TestContainers:
    """Repacked containers are accepted for what is in them."""

    MEMBERS = {"a/1.png": b"one" * 100, "a/2.png": b"two" * 100}  # noqa: RUF012

    def entry(self, tmp_path: Path, members: dict[str, bytes] | None = None) -> SourceFile:
        """A manifest's entry for the genuine container."""
        genuine = tmp_path / "genuine.zip"
        genuine.write_bytes(zipped(members or self.MEMBERS))
        size = sum(map(len, (members or self.MEMBERS).values()))
        return source(
            data=genuine.read_bytes(),
            name="file.zip",
            content_sha256=content_sha256(genuine, size),
            content_bytes=size,
        )

    def offered(self, tmp_path: Path, data: bytes) -> tuple[str, ...]:
        """A place that offers this as the file."""
        (tmp_path / "offer").mkdir()
        (tmp_path / "offer" / "file.zip").write_bytes(data)
        return (str(tmp_path / "offer"),)

    def test_a_repacked_zip(self, tmp_path: Path):
        """Other order, other compression, same members: accepted, and said so."""
        data = zipped(dict(reversed(self.MEMBERS.items())), zipfile.ZIP_DEFLATED)
        entry, root = self.entry(tmp_path), tmp_path / "root"
        (result,) = get(root, entry, sources=self.offered(tmp_path, data), offline=True)
        assert result.checked_by == "content_sha256"
        assert arrived(root, data, "file.zip", f"# content_sha256 {entry.content_sha256}, {len(data)} bytes\n")
        assert check_raw(manifest_of(entry), root) == []
        assert get(root, entry) == [replace(result, how="had", source="", seconds=0.0)]

    def test_a_manifest_that_wants_other_members(self, tmp_path: Path):
        """The dataset's next version: what was right for the last one is looked at again, and refused."""
        data = zipped(dict(reversed(self.MEMBERS.items())), zipfile.ZIP_DEFLATED)
        entry, root = self.entry(tmp_path), tmp_path / "root"
        get(root, entry, sources=self.offered(tmp_path, data), offline=True)
        newer = self.entry(tmp_path, self.MEMBERS | {"a/3.png": b"three"})
        assert [plan(manifest_of(file), root)[0].kind for file in (entry, newer)] == ["have", "check"]
        with pytest.raises(FetchError, match=r"file\.zip is not the right file: .*content digest"):
            get(root, newer, offline=True)

    def test_a_tar_with_the_same_members(self, tmp_path: Path):
        """A tar will do as well."""
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:gz") as tar:
            for name, content in self.MEMBERS.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        offer = self.offered(tmp_path, data.getvalue())
        assert get(tmp_path / "root", self.entry(tmp_path), sources=offer, offline=True)[0].bytes > 0

    @pytest.mark.parametrize(
        "members",
        [
            {"a/1.png": b"one" * 100},
            {"a/1.png": b"one" * 100, "a/2.png": b"TWO" * 100},
            {"a/1.png": b"one" * 100, "a/3.png": b"two" * 100},
            {"a/1.png": b"one" * 100, "a/2.png": b"two" * 100, "b": b""},
        ],
    )
    def test_other_members(self, members: dict[str, bytes], tmp_path: Path):
        """A member more, less, renamed or changed is another file."""
        with pytest.raises(FetchError, match="content digest"):
            get(tmp_path / "r", self.entry(tmp_path), sources=self.offered(tmp_path, zipped(members)), offline=True)

    def test_a_bomb(self, tmp_path: Path):
        """Members that unpack to more than the manifest says are not read to their end."""
        bomb = zipped({"a/1.png": bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
        with pytest.raises(FetchError, match="unpack to more than 600 bytes"):
            get(tmp_path / "root", self.entry(tmp_path), sources=self.offered(tmp_path, bomb), offline=True)

    @pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png"])
    def test_a_member_that_points_outside(self, name: str, tmp_path: Path):
        """A container with such a member is not used, whatever its digest."""
        data = zipped({name: b"x" * 600})
        with pytest.raises(FetchError, match="points outside the container"):
            get(tmp_path / "root", self.entry(tmp_path), sources=self.offered(tmp_path, data), offline=True)


class TestDisk:
    """Full disks, unwritable places."""

    def test_a_full_disk(self, server: FaultServer, tmp_path: Path):
        """The error names the place; what came is kept, and the same command goes on when there is space."""
        file = source(server.serve("/f", Reply()))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(WriteError, match=r"No space left to write .*file\.bin"):
                get(tmp_path, file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert absent(tmp_path)
        get(tmp_path, file)
        assert arrived(tmp_path)
        assert server.ranges("/f")[-1] is not None

    def test_too_little_space_is_said_at_once(self, server: FaultServer, tmp_path: Path):
        """A file that cannot fit is not begun."""
        file = replace(source(server.serve("/f", Reply())), bytes=10**18)
        with pytest.raises(WriteError, match="needs 1,000,000,000,000,000,000 more"):
            get(tmp_path, file)
        assert not server.log

    def test_an_unwritable_place(self, tmp_path: Path):
        """A file where the root should be."""
        (tmp_path / "file").write_text("")
        with pytest.raises(WriteError, match="Make the folder writable"):
            get(tmp_path / "file" / "root", source())


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_fetch import QUICK, manifest_of, source
from mamldata.fetching.act import fetch
print("ready", flush=True)
for result in fetch(manifest_of(source({url!r})), Path({root!r}), network=QUICK, notify=lambda text: print(text)):
    print(result.how, flush=True)
"""


def program(url: str, root: Path) -> list[str]:
    """A fetch in a process of its own."""
    code = PROGRAM.format(url=url, root=str(root), tests=str(Path(__file__).parent))
    return [sys.executable, "-c", code]


class TestProcesses:
    """Killed and concurrent processes."""

    def test_kill_9_in_the_middle(self, server: FaultServer, tmp_path: Path):
        """After kill -9 the same command goes on where the dead process stopped, and ends with the same file."""
        url = server.serve("/f", Reply(cut=200_000, silence=0, length=len(DATA), drip=0.0001), Reply())
        part = temporary(DatasetFolder(tmp_path, "thing").raw / "file.bin")
        with subprocess.Popen(program(url, tmp_path), stdout=subprocess.PIPE) as process:
            while not (part.is_file() and part.stat().st_size > 20_000):
                assert process.poll() is None
                time.sleep(0.001)
            process.kill()
        assert absent(tmp_path)
        begun = part.stat().st_size
        assert 0 < begun < len(DATA)
        assert get(tmp_path, source(url))[0].how == "resumed"
        assert arrived(tmp_path)
        assert server.ranges("/f") == [None, f"bytes={begun}-"]

    def test_killed_between_the_name_and_the_receipt(self, tmp_path: Path):
        """A whole file without its receipt is verified again, and is there."""
        (tmp_path / "file.bin").write_bytes(DATA)
        get(tmp_path / "root", source(), sources=(str(tmp_path),))
        DatasetFolder(tmp_path / "root", "thing").receipt("file.bin").unlink()
        assert get(tmp_path / "root", source())[0].how == "checked"
        assert arrived(tmp_path / "root")

    def test_a_file_that_lost_its_end(self, server: FaultServer, tmp_path: Path):
        """A file cut short behind fetch's back is looked at again, and named."""
        file = source(server.serve("/f", Reply()))
        get(tmp_path, file)
        path = DatasetFolder(tmp_path, "thing").raw / "file.bin"
        path.chmod(0o644)
        os.truncate(path, len(DATA) - 1)
        assert plan(manifest_of(file), tmp_path)[0].kind == "check"
        with pytest.raises(FetchError, match=r"file\.bin is not the right file: sha256 .*\(299,999 bytes\), expected"):
            get(tmp_path, file)

    @pytest.mark.slow
    def test_two_processes_at_once(self, server: FaultServer, tmp_path: Path):
        """Two processes fetch the file once; the second one waits, and says so."""
        url = server.serve("/f", Reply(drip=0.0001))
        processes = [
            subprocess.Popen(program(url, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for _ in range(2)
        ]
        outputs = sorted(process.communicate(timeout=60)[0].split()[-1] for process in processes)
        assert outputs == ["downloaded", "had"]
        assert arrived(tmp_path)
        assert len(server.log) == 1


class TestVerification:
    """``check_raw`` finds whatever changed."""

    @pytest.mark.slow
    def test_any_flipped_byte_is_found_and_named(self, tmp_path: Path):
        """Every byte of a repacked container and of its receipt is covered."""
        containers = TestContainers()
        entry, root = containers.entry(tmp_path), tmp_path / "root"
        repacked = zipped(dict(reversed(containers.MEMBERS.items())))
        get(root, entry, sources=containers.offered(tmp_path, repacked), offline=True)
        folder = DatasetFolder(root, "thing")
        for path in (folder.raw / "file.zip", folder.receipt("file.zip")):
            path.chmod(0o644)
            data = path.read_bytes()
            for position in range(len(data)):
                path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
                problems = check_raw(manifest_of(entry), root)
                assert len(problems) == 1, position
                assert str(path) in problems[0] or path.name in problems[0]
            path.write_bytes(data)
        assert check_raw(manifest_of(entry), root) == []

    def test_missing_truncated_and_unreceipted_files(self, tmp_path: Path):
        """Each is a problem with its remedy."""
        (tmp_path / "file.bin").write_bytes(DATA)
        get(tmp_path / "root", source(), sources=(str(tmp_path),))
        folder = DatasetFolder(tmp_path / "root", "thing")
        thing = manifest_of(source())
        folder.receipt("file.bin").unlink()
        assert "file.bin.sha256 is missing; file.bin beside it is correct" in check_raw(thing, tmp_path / "root")[0]
        (folder.raw / "file.bin").chmod(0o644)
        (folder.raw / "file.bin").write_bytes(DATA[:-1])
        assert "is damaged: sha256" in check_raw(thing, tmp_path / "root")[0]
        (folder.raw / "file.bin").unlink()
        assert "file.bin is missing. Run: mamldata fetch thing" in check_raw(thing, tmp_path / "root")[0]


@pytest.mark.real_data
def test_the_real_omniglot_without_a_network(real_data: Path, tmp_path: Path):
    """Repacked containers with genuine members, and the genuine small files, are taken from a folder."""
    place = (str(real_data / "omniglot"),)
    large = fetch(load_manifest("omniglot"), tmp_path, place, offline=True)
    assert [result.checked_by for result in large] == ["content_sha256"] * 2
    small = fetch(load_manifest("omniglot-small"), tmp_path, place, offline=True)
    assert [result.checked_by for result in small] == ["sha256"] * 2
    assert check_raw(load_manifest("omniglot"), tmp_path) == []
    assert check_raw(load_manifest("omniglot-small"), tmp_path) == []
