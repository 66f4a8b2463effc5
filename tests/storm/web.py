"""Servers that break every rule of HTTP: only the right bytes get through, and a good server mends it all."""

from __future__ import annotations

import gc
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from email.message import Message
from functools import cache
from pathlib import Path

from mamldata.archive.remote import read_remote_archive
from mamldata.archive.verify import verify_archive
from mamldata.datasets.load import load_manifest
from mamldata.fetching.act import fetch
from mamldata.fetching.http import Network
from mamldata.sources.remote import RemoteSource
from tests.storm import material
from tests.storm.damage import damaged
from tests.storm.harness import Broken, Campaign, Outcome, refused
from tests.storm.servers import Answer, Stormy, good, head

NETWORK = Network(
    connect_timeout=1, read_timeout=0.5, rounds=3, backoff=0, longest_pause=0.02, stall_seconds=0.6, min_speed=1000
)


_STATUS = (
    "204 No Content", "206 Partial Content", "301 Moved", "304 Not Modified", "400 Bad", "401 Who", "403 Forbidden",
    "404 Not Found", "408 Timeout", "410 Gone", "416 Range", "418 Teapot", "425 Early", "429 Slow down", "451 No",
    "500 Oh", "502 Bad gateway", "503 Busy", "504 Late", "599 \x1b[2J", "999 ?", "000", "-1", "abc", "200",
    "100 Continue",
)  # fmt: skip
_RETRY_AFTER = (
    "0",
    "1",
    "-1",
    "1e9",
    "soon",
    "9" * 9,
    "9" * 20,
    "9" * 400,
    "Fri, 31 Dec 9999 23:59:59 GMT",
    "Fri, 01 May 2026 10:00:30",
    "\u0661",
)
_LOCATIONS = (
    "/nowhere", "//", "", "?", "#", "http://", "http://[::1", "http://127.0.0.1:1/x", "file:///etc/passwd", "ftp://x/y",
    "javascript:1", "http://a..b/", "\\\\x", "http://127.0.0.1:99999999/", "http://127.0.0.1:99999/", "http://:80",
    "http://\u2028/", "data:,x",
)  # fmt: skip
_HEADERS = (
    ("Content_Encoding", "gzip"), ("Content_Encoding", "br"), ("Transfer_Encoding", "chunked"),
    ("Transfer_Encoding", "gzip, chunked"), ("Content_Type", "text/html"), ("Set_Cookie", "a=" + "b" * 5000),
    ("ETag", '"another"'), ("ETag", "W/"), ("ETag", '"\u00e9"'), ("Last_Modified", "now"), ("X", "y" * 70_000),
    ("Content_Range", "bytes 0-0/1"), ("Content_Range", "bytes */*"), ("Content_Length", "5, 5"),
    ("Connection", "keep-alive"),
)  # fmt: skip


def _status(data: bytes, start: int, chance: random.Random) -> Answer:
    more = {"Retry_After": chance.choice(_RETRY_AFTER)} if chance.random() < 0.5 else {}
    body = chance.choice((b"", b"<html>sorry", data))
    return [head(chance.choice(_STATUS), Content_Length=len(body), **more), body]


def _redirect(data: bytes, start: int, chance: random.Random) -> Answer:
    status = chance.choice(("301 M", "302 F", "303 S", "307 T", "308 P"))
    return [head(status, Location=chance.choice((*_LOCATIONS, "/file.bin", "/again")), Content_Length=0)]


def _cut(data: bytes, start: int, chance: random.Random) -> Answer:
    whole, body = good(data, start)[0], data[start:]
    assert isinstance(whole, bytes)
    return [whole, body[: chance.randrange(len(body) + 1)], *([-1.0] if chance.random() < 0.5 else [])]


def _cut_head(data: bytes, start: int, chance: random.Random) -> Answer:
    whole = good(data, start)[0]
    assert isinstance(whole, bytes)
    return [whole[: chance.randrange(len(whole))], *([-1.0] if chance.random() < 0.5 else [])]


def _length(data: bytes, start: int, chance: random.Random) -> Answer:
    left = len(data) - start
    lie = chance.choice((0, left - 1, left + 1, left // 2, 2 * left, 10**12, -1, "", "x", "9" * 5000, "+5", " 7 "))
    ranges = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
    return [head("206 Partial" if start else "200 OK", Content_Length=lie, **ranges), data[start:]]


def _range(data: bytes, start: int, chance: random.Random) -> Answer:
    other = max(0, start + chance.choice((-1, 1, 100, -100)))
    given = chance.choice(
        (f"bytes {other}-{len(data) - 1}/{len(data)}", f"bytes {start}-", "", "bytes 0-0/0", f"bytes {start}-5/5")
    )
    return [head("206 Partial Content", Content_Range=given, Content_Length=len(data) - other), data[other:]]


def _wrong(data: bytes, start: int, chance: random.Random) -> Answer:
    """Other bytes, of any length."""
    return [*good(damaged(data, chance) or b"x", start)]


def _all_again(data: bytes, start: int, chance: random.Random) -> Answer:
    """The whole file, although a part was asked for; sometimes as if it were the part."""
    if chance.random() < 0.5:
        return good(data, 0)
    return [head("206 Partial", Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}"), data]


def _odd_header(data: bytes, start: int, chance: random.Random) -> Answer:
    ranges = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
    headers = {
        "Content_Length": len(data) - start,
        **ranges,
        **dict(chance.choices(_HEADERS, k=chance.choice((1, 1, 2)))),
    }
    return [head("206 Partial Content" if start else "200 OK", **headers), data[start:]]


def _chunks(data: bytes, start: int, chance: random.Random) -> Answer:
    """In chunks, with lengths that are right, or not."""
    pieces: Answer = [head(Transfer_Encoding="chunked")]
    for at in range(0, len(data), 7000):
        piece = data[at : at + 7000]
        size = chance.choice((*[b"%x" % len(piece)] * 20, b"%x" % (len(piece) + 1), b"-1", b"", b"zz", b"f" * 20))
        pieces.append(size + b"\r\n" + piece + b"\r\n")
    return [*pieces, chance.choice((b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"", b"0"))]


def _drip(data: bytes, start: int, chance: random.Random) -> Answer:
    """In drops; sometimes one that never ends."""
    body = data[start:]
    step = max(1, len(body) // 5)
    answer: Answer = [good(data, start)[0]]
    for at in range(0, len(body), step):
        answer += [body[at : at + step], chance.choice((0.001, 0.002, 0.01))]
    return answer


def _silence(data: bytes, start: int, chance: random.Random) -> Answer:
    whole = good(data, start)
    return [*whole[: chance.randrange(2)], 0.55]


def _no_http(data: bytes, start: int, chance: random.Random) -> Answer:
    junk = chance.choice(
        (b"220 ftp\r\n", b"\0" * 100, b"HTTP/1.1", b"HTTP/9.9 200 OK\r\n\r\n", chance.randbytes(300), b"\r\n\r\n", data)
    )
    return [junk, *([-1.0] if chance.random() < 0.5 else [])]


def _many_headers(data: bytes, start: int, chance: random.Random) -> Answer:
    return [head(**{f"X{number}": number for number in range(chance.choice((99, 101, 5000)))}), data]


_FAULTS = (
    *(good,) * 2, _status, _redirect, *(_cut,) * 3, _cut_head, _length, _range, *(_wrong,) * 2, _all_again,
    _odd_header, _chunks,
    _drip, _no_http, _many_headers,
)  # fmt: skip


def some_faults(chance: random.Random) -> Callable[[bytes, int, Message], Answer]:
    """Misbehaviour of a kind, or of all kinds in turn."""
    kinds = chance.choices(_FAULTS, k=chance.choice((1, 2, 6)))
    if chance.random() < 0.02:
        kinds.append(_silence)

    def misbehave(data: bytes, start: int, request: Message) -> Answer:
        kind = chance.choice(kinds)
        return good(data, start, request) if kind is good else kind(data, start, chance)

    return misbehave


_PASSWORD, _KEY = "opensesame", "0123456789abcdef"


def _require_decent(said: list[str]) -> None:
    """Check that messages have no secrets of an address, and nothing that steers a terminal.

    Raises:
        Broken: one has.
    """
    for line in "\n".join(said).split("\n"):
        if _PASSWORD in line or _KEY in line:
            raise Broken(f"a message has a secret: {line!r}")
        if not line.isprintable():
            raise Broken(f"a message steers the terminal: {line!r}")


@cache
def _manifest_text() -> str:
    return material.tiny().manifest_path.read_text()


def stormy_fetch(chance: random.Random, place: Path) -> Outcome:
    """A fetch gets the right file or nothing; from a good server, the same call then always gets it."""
    name, data = material.tiny().archive.name, material.tiny().archive.read_bytes()
    said: list[str] = []
    with closing(Stormy({f"/{name}": data, "/again": data}, some_faults(chance))) as server:
        path = place / "tiny.toml"
        path.write_text(_manifest_text().replace("https://example.org", server.address))
        manifest, raw = load_manifest(str(path)), place / "root" / "tiny" / "raw"
        secret = server.address.replace("http://", f"http://me:{_PASSWORD}@")
        places = [f"{secret}/?key={_KEY}"] if chance.random() < 0.3 else []
        failed = refused(lambda: fetch(manifest, place / "root", places, network=NETWORK, notify=said.append), said)
        _require_decent(said)
        if failed and (raw / name).exists():
            raise Broken("the fetch failed, and the file has its name")
        server.misbehave = None
        fetch(manifest, place / "root", network=NETWORK)
        if (raw / name).read_bytes() != data:
            raise Broken("another file has the name")
        if {entry.name for entry in raw.iterdir()} != {name, f"{name}.sha256"}:
            raise Broken(f"left over: {[entry.name for entry in raw.iterdir()]}")
    return "refused" if failed else "same"


def _temporary() -> set[Path]:
    """The temporary folders of the library."""
    return set(Path(tempfile.gettempdir()).glob("mamldata-*"))


def _require_gone(before: set[Path]) -> None:
    """Check that temporary folders go with their sources, once the threads of those have had their second.

    Raises:
        Broken: some stay.
    """
    gc.collect()  # what an error refers to
    deadline = time.monotonic() + 10
    while left := _temporary() - before:
        if time.monotonic() > deadline:
            raise Broken(f"left over among the temporary files: {left}")
        time.sleep(0.01)


def stormy_archive(chance: random.Random, place: Path) -> Outcome:
    """A stream from a bad server gives the true episodes or a clear error; then a good one mends its cache."""
    files = {f"/archive/{name}": data for name, data in material.archive_files().items()}
    misbehave = some_faults(chance)
    only = chance.choice(("tar", "tar", ""))  # an archive.json that does not come ends the try early

    def sometimes(data: bytes, start: int, request: Message) -> Answer:
        spared = only == "tar" and len(data) < 10_000 and not data.startswith(b"0")
        return good(data, start, request) if spared or chance.random() < 0.3 else misbehave(data, start, request)

    split = chance.choice(sorted(material.EPISODES))
    cache_dir, before = chance.choice((place, place, None)), _temporary()
    said: list[str] = []
    with closing(Stormy(files, sometimes)) as server:
        url = f"{server.address}/archive"
        found: list[bytes] = []

        def read() -> None:
            found.append(material.episodes_of(RemoteSource(url, split, cache_dir=cache_dir, network=NETWORK)))

        failed = refused(read, said)
        _require_decent(said)
        server.misbehave = None
        read()
        if chance.random() < 0.02 and (problems := verify_archive(url)):
            raise Broken(f"verify: {problems}")
        if read_remote_archive(url, NETWORK).digest != material.archive_of().digest:
            raise Broken("another archive")
    if any(data != material.true_episodes(split) for data in found):
        raise Broken("other episodes")
    if cache_dir is None:
        _require_gone(before)
    return "refused" if failed else "same"


CAMPAIGNS = (
    Campaign(
        "http-fetch",
        "a server of raw files that resets, lies, drips, redirects or sends other bytes",
        10_000,
        stormy_fetch,
        30,
    ),
    Campaign("http-archive", "the same from a server of archives", 3000, stormy_archive, 30),
)
