"""Getting one file from several sources, over several runs: what is tried again, what is kept, what is said."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from mamldata.datasets.load import load_manifest
from mamldata.datasets.manifest import Manifest, SourceFile
from mamldata.datasets.paths import DatasetFolder
from mamldata.errors import FetchError, RequestError, WriteError
from mamldata.fetching.act import Fetched, fetch
from mamldata.fetching.http import Network, Part
from mamldata.fetching.plan import plan
from mamldata.fetching.receipts import Receipt, write_receipt
from mamldata.fetching.verify import check_raw
from mamldata.io.atomic import temporary
from mamldata.io.content_digest import content_sha256

Wire = Any  # the class in conftest.py
Answer = Callable[..., bytes]

DATA = hashlib.shake_256(b"mirrors").digest(60_000)
QUICK = Network(connect_timeout=5, read_timeout=5, rounds=2, backoff=0, longest_pause=0)
NOWHERE = "http://127.0.0.1:9/file.bin"


def entry(*urls: str, data: bytes = DATA, name: str = "file.bin") -> SourceFile:
    return SourceFile(name, len(data), hashlib.sha256(data).hexdigest(), urls=urls or (NOWHERE,))


def manifest_of(*files: SourceFile) -> Manifest:
    return replace(load_manifest("glyphs"), name="thing", reference="thing", files=files)


def get(root: Path, *files: SourceFile, **more: Any) -> list[Fetched]:
    return fetch(manifest_of(*files), root, **{"network": QUICK, **more})


def begun(root: Path, data: bytes, name: str = "file.bin") -> Part:
    """A part that an earlier run left."""
    final = DatasetFolder(root, "thing").raw / name
    final.parent.mkdir(parents=True)
    temporary(final).write_bytes(data)
    return Part(final)


def names(root: Path) -> list[str]:
    """What is in the raw folder."""
    return sorted(path.name for path in DatasetFolder(root, "thing").raw.iterdir())


def rest(answer: Answer, data: bytes, start: int, stop: int | None = None) -> bytes:
    """An honest 206, cut off at ``stop``."""
    given = f"bytes {start}-{len(data) - 1}/{len(data)}"
    return answer(data[start:stop], "206 Partial Content", Content_Range=given, Content_Length=len(data) - start)


class TestRounds:
    """What is tried again, and how often."""

    def test_a_bad_line_that_brings_something_is_worth_more_rounds(self, wire: Wire, answer: Answer, tmp_path: Path):
        """A round that brought a mebibyte does not count, so that a large file comes over any line."""
        data = hashlib.shake_256(b"large").digest(3_600_000)
        step = 1_200_000
        wire.answers = [
            answer(data[:step], Content_Length=len(data)),
            rest(answer, data, step, 2 * step),
            rest(answer, data, 2 * step),
        ]
        (result,) = get(tmp_path, entry(wire.url, data=data), network=replace(QUICK, rounds=1))
        assert (result.how, result.source) == ("resumed", wire.url)
        assert [request["Range"] for request in wire.requests] == [None, "bytes=1200000-", "bytes=2400000-"]

    def test_a_trickle_is_not(self, wire: Wire, answer: Answer, tmp_path: Path):
        """Tries are bounded: a server that gives a few bytes each time is not asked for ever. What came is kept."""
        wire.answers = [
            answer(DATA[:10], Content_Length=len(DATA)),
            rest(answer, DATA, 10, 20),
            rest(answer, DATA, 20, 30),
        ]
        with pytest.raises(FetchError, match="20 of 60,000 bytes are kept; the same command resumes there"):
            get(tmp_path, entry(wire.url))
        assert len(wire.requests) == QUICK.rounds
        assert names(tmp_path) == [".file.bin.origin.json", "file.bin.part"]

    def test_a_whole_wrong_file_in_answer_to_a_range_is_final(self, wire: Wire, answer: Answer, tmp_path: Path):
        """A 200 is a fresh file: if it is wrong, the same address has no better one."""
        begun(tmp_path, DATA[:10])
        wire.answers = [answer(bytes(len(DATA)), Content_Length=len(DATA))]
        with pytest.raises(FetchError, match="another file came"):
            get(tmp_path, entry(wire.url))
        assert len(wire.requests) == 1
        assert names(tmp_path) == []

    def test_every_failure_is_told_and_listed(self, wire: Wire, answer: Answer, tmp_path: Path):
        """While it goes on, each failed try; at the end, each source's last one, without passwords and keys."""
        wire.answers = [answer(b"", "404 Not Found"), answer(b"", "403 Forbidden")]
        told: list[str] = []
        secret = wire.url.replace("//", "//me:secret@") + "?key=secret"
        with pytest.raises(FetchError) as raised:
            get(tmp_path, entry(NOWHERE, secret), notify=told.append)
        assert str(raised.value) == (
            "file.bin could not be fetched. Tried:\n"
            f"  {NOWHERE}: the connection failed ([Errno 111] Connection refused)\n"
            f"  {wire.url}?…: HTTP 403 Forbidden\n"
            f"Or get it by hand from {wire.url}?…, put it into a folder, and run: "
            f"mamldata fetch thing --root {tmp_path} --from FOLDER"
        )
        assert f"file.bin: {wire.url}?…: HTTP 404 Not Found" in told
        assert "file.bin: trying again in 0 s" in told
        assert "secret" not in "".join(told)

    def test_what_a_library_says_has_no_password(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Some repeat in their own errors the address that they were given, as fsspec does with one over HTTP."""

        def refuse(source: str) -> None:
            raise FileNotFoundError(source)

        monkeypatch.setattr("mamldata.fetching.mirrors.open_source", refuse)
        told: list[str] = []
        places = ["simplecache::http://me:secret@host/a", "simplecache::http://host/a"]
        with pytest.raises(FetchError) as raised:
            get(tmp_path, entry(), sources=places, notify=told.append)
        seen = "simplecache::http://host/a/file.bin"
        assert f"  {seen}: it cannot be read (FileNotFoundError)" in str(raised.value)
        assert f"  {seen}: it cannot be read ({seen})" in str(raised.value)
        assert "secret" not in f"{raised.value} {told}"

    @pytest.mark.parametrize(
        "place",
        ["http://me:secret@", "nosuch://me:secret@host/a", "http://me:secret@/a?secret", "http://me:secret@h:port"],
    )
    def test_a_place_that_is_refused_keeps_its_password(self, place: str, tmp_path: Path):
        """Nor is it in the message that says what is wrong with a place, or where a file is not."""
        with pytest.raises(RequestError, match=r"Source (http|nosuch)://") as raised:
            get(tmp_path, entry(), sources=[place])
        assert "secret" not in str(raised.value)
        with pytest.raises(FetchError, match=r"available from http://host/a\?…") as missing:
            get(tmp_path, entry("http://me:secret@host/a?secret"), offline=True)
        assert "secret" not in str(missing.value)

    def test_one_bad_file_does_not_keep_the_others_away(self, wire: Wire, answer: Answer, tmp_path: Path):
        """All files are tried, and all that failed are named at once."""
        wire.answers = [answer(DATA, Content_Length=len(DATA))]
        files = [entry(name="a"), entry(wire.url, name="b"), entry(name="c")]
        with pytest.raises(FetchError, match=r"(?s)a could not be fetched.*c could not be fetched"):
            get(tmp_path, *files)
        assert names(tmp_path) == ["b", "b.sha256"]


class TestParts:
    """What earlier runs left."""

    def test_a_repacked_copy_that_is_longer_goes_on(self, wire: Wire, answer: Answer, tmp_path: Path):
        """A part as long as the original may still be the beginning of a longer copy."""
        genuine = tmp_path / "genuine.zip"
        with zipfile.ZipFile(genuine, "w") as container:
            container.writestr(zipfile.ZipInfo("a/1.png"), b"one" * 100)
        data = bytes(1000) + genuine.read_bytes()  # as self-extracting ones are
        file = replace(
            entry(wire.url, data=genuine.read_bytes()), content_sha256=content_sha256(genuine, 300), content_bytes=300
        )
        begun(tmp_path, data[: file.bytes + 5])
        wire.answers = [rest(answer, data, file.bytes + 5)]
        (result,) = get(tmp_path, file)
        assert (result.how, result.checked_by, result.bytes) == ("resumed", "content_sha256", len(data))
        assert check_raw(manifest_of(file), tmp_path) == []

    def test_a_repacked_copy_that_is_shorter_and_whole(self, wire: Wire, answer: Answer, tmp_path: Path):
        """Killed before it was verified: the server has nothing more to give, and nothing more is needed."""
        members = {"a/1.png": b"one" * 1000}
        for name, method in (("genuine.zip", zipfile.ZIP_STORED), ("repacked.zip", zipfile.ZIP_DEFLATED)):
            with zipfile.ZipFile(tmp_path / name, "w", method) as container:
                for member, content in members.items():
                    container.writestr(member, content)
        content = content_sha256(tmp_path / "genuine.zip", 3000)
        genuine = entry(wire.url, data=(tmp_path / "genuine.zip").read_bytes())
        begun(tmp_path, (tmp_path / "repacked.zip").read_bytes())
        wire.answers = [answer(b"", "416 Range Not Satisfiable", Content_Length=0)]
        (result,) = get(tmp_path, replace(genuine, content_sha256=content, content_bytes=3000))
        assert (result.how, result.checked_by) == ("resumed", "content_sha256")
        assert len(wire.requests) == 1

    def test_416_for_a_part_that_can_still_grow(self, wire: Wire, answer: Answer, tmp_path: Path):
        """A server that has less than what is there has another file: the part is dropped, no Range is sent again."""
        begun(tmp_path, bytes(10))
        wire.answers = [answer(b"", "416 Range Not Satisfiable"), answer(DATA, Content_Length=len(DATA))]
        assert get(tmp_path, entry(wire.url))[0].how == "downloaded"
        assert [request["Range"] for request in wire.requests] == ["bytes=10-", None]

    def test_a_copy_that_breaks_off_is_nobodys_version(
        self, wire: Wire, answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """What a share gave before it failed is gone on with, but not as a version that a server once named."""

        class Breaking(io.BytesIO):
            def read(self, _size: int | None = -1) -> bytes:
                if self.tell():
                    raise RuntimeError("the share went away")
                return super().read(1000)

        monkeypatch.setattr("mamldata.fetching.mirrors.open_source", lambda _: Breaking(DATA))
        begun(tmp_path, DATA[:10]).note(wire.url, '"1"')
        wire.answers = [rest(answer, DATA, 1000)]
        told: list[str] = []
        (result,) = get(tmp_path, entry(wire.url), sources=["memory://share"], notify=told.append)
        assert told == ["file.bin: memory://share/file.bin: it cannot be read (the share went away)"]
        assert (result.how, result.source) == ("resumed", wire.url)
        assert (wire.requests[0]["Range"], wire.requests[0]["If-Range"]) == ("bytes=1000-", None)

    def test_a_part_that_is_whole_is_counted(self, tmp_path: Path):
        """The bar of a file that only had to be verified is full."""
        begun(tmp_path, DATA)
        counts: list[int] = []

        @contextmanager
        def progress(label: str, total: int | None, unit: str) -> Iterator[Callable[[int], object]]:
            assert (label, total, unit) == ("file.bin", len(DATA), "B")
            yield counts.append

        (result,) = get(tmp_path, entry(), progress=progress)
        assert (result.how, result.source) == ("resumed", "")
        assert sum(counts) == len(DATA)

    def test_a_part_as_long_as_a_file_and_wrong_is_dropped(self, wire: Wire, answer: Answer, tmp_path: Path):
        """It can become nothing: the file is fetched anew, without a Range."""
        begun(tmp_path, bytes(len(DATA)))
        wire.answers = [answer(DATA, Content_Length=len(DATA))]
        assert get(tmp_path, entry(wire.url))[0].how == "downloaded"
        assert wire.requests[0]["Range"] is None

    def test_a_file_put_by_hand_makes_its_part_needless(self, tmp_path: Path):
        """Nothing of a broken-off download is left once the file is there."""
        begun(tmp_path, DATA[:10]).note(NOWHERE, '"v1"')
        (DatasetFolder(tmp_path, "thing").raw / "file.bin").write_bytes(DATA)
        (result,) = get(tmp_path, entry())
        assert (result.how, result.sha256) == ("checked", entry().sha256)
        assert names(tmp_path) == ["file.bin", "file.bin.sha256"]

    def test_a_source_of_unknown_honesty_ends_after_a_fresh_start(self, wire: Wire, answer: Answer, tmp_path: Path):
        """Wrong after going on, wrong after starting anew: two requests, and no third."""
        begun(tmp_path, bytes(10))
        wire.answers = [rest(answer, DATA, 10), answer(bytes(len(DATA)), Content_Length=len(DATA))]
        told: list[str] = []
        with pytest.raises(FetchError, match="another file came"):
            get(tmp_path, entry(wire.url), notify=told.append)
        assert len(wire.requests) == 2
        assert "file.bin: the first 10 bytes, from before, are not of this file; starting again" in told


class TestCopies:
    """Files from folders and shares."""

    def test_a_copy_that_is_too_large_is_not_read_to_its_end(self, tmp_path: Path):
        """What is longer than the file may be is given up there and then, and not asked for again."""
        (tmp_path / "file.bin").write_bytes(DATA * 100)
        told: list[str] = []
        with pytest.raises(FetchError, match="it has more than 60,000 bytes, the limit for this file"):
            get(tmp_path / "root", entry(), sources=[str(tmp_path)], offline=True, notify=told.append)
        assert len(told) == 1

    def test_a_share_without_the_file_is_asked_once(self, tmp_path: Path):
        """It will not have it a moment later."""
        told: list[str] = []
        with pytest.raises(FetchError, match=r"memory://empty/file\.bin: it cannot be read"):
            get(tmp_path, entry(), sources=["memory://empty"], offline=True, notify=told.append)
        assert len(told) == 1


class TestHad:
    """Files that are there."""

    def test_nothing_is_locked_or_written(self, tmp_path: Path):
        """When all is there, a folder that cannot be written to will do."""
        (tmp_path / "file.bin").write_bytes(DATA)
        root = tmp_path / "root"
        get(root, entry(), sources=[str(tmp_path)])
        DatasetFolder(root, "thing").lock.unlink()
        (result,) = get(root, entry())
        assert (result.how, result.source, result.bytes, result.checked_by) == ("had", "", len(DATA), "sha256")
        assert not DatasetFolder(root, "thing").lock.exists()

    def test_a_receipt_for_another_manifest(self, tmp_path: Path):
        """A file that was right for an older manifest is looked at again, and not taken for the new one's."""
        folder = DatasetFolder(tmp_path, "thing")
        folder.raw.mkdir(parents=True)
        (folder.raw / "file.bin").write_bytes(b"old")
        write_receipt(folder, "file.bin", Receipt(hashlib.sha256(b"old").hexdigest()))
        assert plan(manifest_of(entry()), tmp_path)[0].kind == "check"
        with pytest.raises(FetchError, match=f"expected {entry().sha256} .* Delete it or move it elsewhere, and run"):
            get(tmp_path, entry())
        assert (folder.raw / "file.bin").read_bytes() == b"old"

    def test_a_file_that_lost_its_end(self, tmp_path: Path):
        """A length that is not the receipt's is noticed without hashing."""
        folder = DatasetFolder(tmp_path, "thing")
        folder.raw.mkdir(parents=True)
        (folder.raw / "file.bin").write_bytes(DATA[:-1])
        write_receipt(folder, "file.bin", Receipt(entry().sha256))
        assert plan(manifest_of(entry()), tmp_path)[0].kind == "check"

    def test_a_link_is_left_as_it_is(self, tmp_path: Path):
        """Whoever links a large file into the folder keeps the permissions of the original."""
        original = tmp_path / "original"
        original.write_bytes(DATA)
        original.chmod(0o640)
        folder = DatasetFolder(tmp_path, "thing")
        folder.raw.mkdir(parents=True)
        (folder.raw / "file.bin").symlink_to(original)
        get(tmp_path, entry())
        assert original.stat().st_mode & 0o777 == 0o640
        assert check_raw(manifest_of(entry()), tmp_path) == []

    def test_a_folder_in_its_place(self, wire: Wire, tmp_path: Path):
        """It is said before anything is downloaded."""
        (DatasetFolder(tmp_path, "thing").raw / "file.bin").mkdir(parents=True)
        with pytest.raises(WriteError, match="is a folder, but should be a file"):
            get(tmp_path, entry(wire.url))
        assert wire.requests == []


def test_places_come_first_and_each_source_once(tmp_path: Path):
    """The plan's order is the order of tries: places as given, then the manifest's addresses."""
    (tmp_path / "file.bin").write_bytes(DATA)
    places = ["http://b.example", str(tmp_path), "http://a.example"]
    file = entry("http://a.example/file.bin", "http://c.example/file.bin")
    (action,) = plan(manifest_of(file), tmp_path / "root", places)
    assert action.sources == (
        "http://b.example/file.bin",
        str(tmp_path / "file.bin"),
        "http://a.example/file.bin",
        "http://c.example/file.bin",
    )
    (action,) = plan(manifest_of(file), tmp_path / "root", places, offline=True)
    assert action.sources == (str(tmp_path / "file.bin"),)


def test_who_waits_for_the_lock_says_so_and_takes_what_the_other_got(tmp_path: Path):
    """After the wait everything is planned again: nothing is downloaded twice."""
    folder = DatasetFolder(tmp_path, "thing")
    folder.raw.mkdir(parents=True)
    waiting, told, results = threading.Event(), [], []

    def notify(text: str) -> None:
        told.append(text)
        waiting.set()

    thread = threading.Thread(target=lambda: results.extend(get(tmp_path, entry(), notify=notify)))
    with FileLock(folder.lock):
        thread.start()
        assert waiting.wait(10)
        (folder.raw / "file.bin").write_bytes(DATA)
        write_receipt(folder, "file.bin", Receipt(entry().sha256))
    thread.join()
    assert told == [f"Another process is working on {folder.path}; waiting until it is done."]
    assert [result.how for result in results] == ["had"]


class Killed(BaseException):
    """Stands for kill -9."""


class Killer:
    """Lets the process die at one of its changes to the disk, and do nothing from then on."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int) -> None:
        self.left = at
        for owner, name in (
            (os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "chmod"), (Path, "write_bytes"), (Path, "open"),
        ):  # fmt: skip
            patch.setattr(owner, name, self.deadly(getattr(owner, name)))

    def deadly(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise Killed
            return act(*args, **more)

        return wrapped


@pytest.mark.parametrize("way", ["download", "resume", "copy", "generate"])
def test_killed_at_any_moment(way: str, wire: Wire, answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whichever change to the disk is the last one, no unverified file has its name, and the same call goes on."""
    wire.answers = [answer(DATA, Content_Length=len(DATA), ETag='"1"')]
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "file.bin").write_bytes(DATA)
    monkeypatch.setattr("mamldata.datasets.glyphs.write_archive", lambda path: path.write_bytes(DATA))
    file = replace(entry(wire.url), generator="glyphs" if way == "generate" else None)
    sources = [str(tmp_path / "place")] if way == "copy" else []
    for moment in range(100):
        root = tmp_path / str(moment)
        raw = DatasetFolder(root, "thing").raw
        if way == "resume":
            begun(root, DATA[:100]).note(wire.url, '"1"')
        with monkeypatch.context() as patch:
            killer = Killer(patch, moment)
            try:
                get(root, file, sources=sources)
            except Killed:
                assert killer.left < 0
        if (raw / "file.bin").exists():
            assert (raw / "file.bin").read_bytes() == DATA
        else:
            assert not (raw / "file.bin.sha256").exists()
        (result,) = get(root, file, sources=sources)
        assert result.sha256 == file.sha256
        assert names(root) == ["file.bin", "file.bin.sha256"]
        assert (raw / "file.bin").read_bytes() == DATA
        assert (raw / "file.bin").stat().st_mode & 0o777 == 0o444
        assert check_raw(manifest_of(file), root) == []
        if killer.left >= 0:
            break
    else:
        pytest.fail("it never came to an end")
    assert moment >= 8
