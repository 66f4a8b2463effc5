"""Archives written to addresses, on real servers: the bytes of a folder's build, whatever happens on the way."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from mamldata.archive import write as shards
from mamldata.archive.build import Portion, build, build_portion
from mamldata.archive.index import INDEX, INDEX_SUM, read_archive
from mamldata.archive.plan import BuildRequest
from mamldata.archive.remote import read_remote_archive
from mamldata.archive.store import BUILD, AddressStore, FolderStore, Store, store_at
from mamldata.archive.verify import verify_archive
from mamldata.errors import DamagedError, MamldataError, RequestError, WriteError
from mamldata.streaming.stream import EpisodeStream

pytestmark = pytest.mark.slow  # real servers

REQUEST = BuildRequest(
    n_way=3, k_shot=1, k_query=2, episodes={"train": 7, "val": 2, "test": 3}, seed=3, episodes_per_shard=3
)
COMMAND = [sys.executable, "-m", "mamldata", "build", "glyphs", "--n-way", "3", "--k-query", "2", "--seed", "3"]
SMALL = ["--train", "7", "--val", "2", "--test", "3", "--episodes-per-shard", "3"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, glyphs_manifest, glyphs_bank) -> Path:
    """The archive of REQUEST in a folder; not to be written to."""
    out = tmp_path_factory.mktemp("reference") / "archive"
    build(glyphs_manifest, glyphs_bank, out, REQUEST)
    return out


@pytest.fixture(params=["folder", "s3", "ftp", "memory"])
def store(request, tmp_path) -> Store:
    """An empty place of each kind."""
    if request.param == "folder":
        return store_at(tmp_path / "store")
    if request.param == "memory":
        return store_at(f"memory://{tmp_path.name}/store")
    return store_at(request.getfixturevalue(request.param).url + "/a/store")


class TestPromises:
    def test_of_every_store(self, store):
        """What is not there is nothing; what is written is read; what is removed or cleared is gone."""
        assert (store.entries(), store.size("a"), store.read("a")) == ({}, None, None)
        store.clear()
        store.remove("a")
        store.prepare()
        store.write_new(f"{BUILD}/plan.json", b"first")
        store.write_new(f"{BUILD}/plan.json", b"second")
        store.write("a", [b"12", memoryview(b"345")])
        assert store.read(f"{BUILD}/plan.json") == b"first"
        assert (store.size("a"), store.read("a"), store.entries()["a"]) == (5, b"12345", 5)
        assert store.sha256("a") == "5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5"
        store.write("a", [b"6"])
        assert store.read("a") == b"6"
        store.clear()
        assert store.entries() == {"a": 1}
        store.remove("a")
        assert store.entries() == {}

    def test_a_writer_that_fails_leaves_nothing(self, store):
        """An error in the middle of a file: neither it nor a part of it is there, and what was there stays."""

        def pieces():
            yield b"half"
            raise KeyboardInterrupt

        store.prepare()
        store.write("a", [b"before"])
        for name in ("a", "b", f"{BUILD}/c"):
            with pytest.raises(KeyboardInterrupt):
                store.write(name, pieces())
        assert (store.read("a"), store.read("b"), store.read(f"{BUILD}/c")) == (b"before", None, None)
        store.clear()
        assert store.entries() == {"a": 6}

    def test_a_file_in_the_way(self, store):
        """A file where the archive should be is an error that says so."""
        store.prepare()
        store.write("a", [b"thesis"])
        below = f"{store.url}/a" if isinstance(store, AddressStore) else store.path / "a"
        with pytest.raises(WriteError, match=r"a is a file. Choose (a folder|another address) for the archive"):
            store_at(below).entries()
        assert store.read("a") == b"thesis"

    @pytest.mark.parametrize("kind", ["folder", "pipe", "circle"])
    def test_what_is_not_a_file(self, kind, tmp_path):
        """A folder, a pipe or a link in a circle in place of a file is an error that says so, and is not waited for."""
        store = FolderStore(tmp_path)
        path = tmp_path / "a"
        make = {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "circle": lambda: path.symlink_to("a")}
        make[kind]()
        for look in (store.read, store.sha256):
            with pytest.raises(WriteError, match=rf"{path} cannot be read \(.*\)\. Move it elsewhere"):
                look("a")
        if kind == "circle":
            for look in (lambda: store.size("a"), store.entries):
                with pytest.raises(WriteError, match="Too many levels of symbolic links"):
                    look()

    def test_a_folder_that_was_cleared_meanwhile(self, tmp_path):
        """Who writes after another process cleared up is told so, and makes no new unfinished build."""
        store = FolderStore(tmp_path)
        with pytest.raises(FileNotFoundError):
            store.write("a", [b"1"])
        with pytest.raises(FileNotFoundError):
            store.write_new(f"{BUILD}/plan.json", b"1")
        assert store.entries() == {}

    def test_one_of_many_writers_is_first(self, tmp_path):
        """Of processes that begin at once exactly one writes the plan."""
        code = (
            "import sys, time; from pathlib import Path; from mamldata.archive.store import store_at\n"
            "store = store_at(Path(sys.argv[1])); store.prepare()\n"
            "while time.time() < float(sys.argv[2]): pass\n"
            "store.write_new('.build/plan.json', sys.argv[3].encode() * 100_000)\n"
        )
        start = str(time.time() + 2)
        writers = [subprocess.Popen([sys.executable, "-c", code, tmp_path, start, word]) for word in "abc"]
        assert [writer.wait() for writer in writers] == [0, 0, 0]
        plan = (tmp_path / BUILD / "plan.json").read_bytes()
        assert plan in {word.encode() * 100_000 for word in "abc"}
        assert [path.name for path in (tmp_path / BUILD).iterdir()] == ["plan.json"]


class TestPlaces:
    @pytest.mark.parametrize(
        ("place", "message"),
        [
            ("http://example.org/a", "a web server takes no files. Build into a folder and copy it there"),
            ("HTTPS://me:secret@example.org/a", r"https://example.org/a: archives are read over http"),
            ("pipe://cat", "not an address"),
            ("simplecache::s3://bucket/a", "not an address"),
            ("nonsense://a", "nonsense:// is not known"),
        ],
    )
    def test_that_cannot_be_written_to(self, place, message):
        """Web servers, shells, chains and unknown kinds are refused, each with the reason."""
        with pytest.raises(RequestError, match=message):
            store_at(place)

    def test_a_files_address_is_a_folder(self, tmp_path):
        """file:// is written to as the folder that it names, spaces and all."""
        assert store_at(f"file://{tmp_path}/a%20b") == FolderStore(tmp_path / "a b")

    def test_a_password_is_not_shown(self):
        """A store's name in messages has no password."""
        assert str(store_at("ftp://me:secret@example.org/a")) == "ftp://example.org/a"


class TestAddress:
    @pytest.mark.parametrize("kind", ["s3", "ftp"])
    def test_the_bytes_of_a_folder(self, request, kind, reference, glyphs_manifest, glyphs_bank):
        """An archive built at an address is that of a folder, to the last byte, and nothing else is left there."""
        bucket = request.getfixturevalue(kind)
        archive = build(glyphs_manifest, glyphs_bank, f"{bucket.url}/a/b", REQUEST, workers=2)
        assert archive.digest == read_archive(reference).digest
        assert contents(bucket.folder) == {f"a/b/{name}": data for name, data in contents(reference).items()}
        assert verify_archive(f"{bucket.url}/a/b") == []
        stamps = {path: path.stat().st_mtime_ns for path in (bucket.folder / "a" / "b").iterdir()}
        assert build(glyphs_manifest, glyphs_bank, f"{bucket.url}/a/b", REQUEST).digest == archive.digest
        assert {path: path.stat().st_mtime_ns for path in (bucket.folder / "a" / "b").iterdir()} == stamps

    def test_it_streams(self, s3, reference, glyphs_manifest, glyphs_bank):
        """What was built at an address is read from there as from a folder."""
        build(glyphs_manifest, glyphs_bank, f"{s3.url}/a", REQUEST)
        streams = [EpisodeStream(place, "val", batch_size=2) for place in (reference, f"{s3.url}/a")]
        one, other = (next(iter(stream)) for stream in streams)
        np.testing.assert_array_equal(one.query_x, other.query_x)

    def test_a_flipped_byte_is_found(self, s3, glyphs_manifest, glyphs_bank):
        """A shard that changed in the bucket is named."""
        build(glyphs_manifest, glyphs_bank, f"{s3.url}/a", REQUEST)
        flip(s3.folder / "a" / "train-00001.tar")
        problems = verify_archive(f"{s3.url}/a")
        assert len(problems) == 1
        assert "train-00001.tar" in problems[0]

    def test_killed_in_the_middle(self, s3, tmp_path, glyphs_root, glyphs_manifest, glyphs_bank):
        """After kill -9 the next build keeps what is whole, makes anew what is not, and ends with the same bytes."""
        request = dataclasses.replace(REQUEST, episodes={"train": 120})
        folder = s3.folder / "a"
        options = ["--train", "120", "--val", "0", "--test", "0", "--episodes-per-shard", "3", "--workers", "1"]
        command = [*COMMAND, "--out", f"{s3.url}/a", *options, "--root", str(glyphs_root)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            wait_for(lambda: len(list(folder.glob(f"{BUILD}/*.tar.sha256"))) >= 5 or process.poll() is not None)
            process.send_signal(signal.SIGKILL)
        assert not (folder / INDEX).exists(), "it was faster than the test"
        whole = sorted(path.name.removesuffix(".sha256") for path in folder.glob(f"{BUILD}/*.tar.sha256"))
        flip(folder / whole[1])
        (folder / BUILD / f"{whole[2]}.sha256").write_bytes(b"\xff" * 64)
        stamps = {name: (folder / name).stat().st_mtime_ns for name in whole}
        archive = build(glyphs_manifest, glyphs_bank, f"{s3.url}/a", request)
        anew = {name for name in whole if (folder / name).stat().st_mtime_ns != stamps[name]}
        assert anew == {whole[1], whole[2]}
        build(glyphs_manifest, glyphs_bank, tmp_path / "undisturbed", request)
        assert contents(folder) == contents(tmp_path / "undisturbed")
        assert read_remote_archive(f"{s3.url}/a").digest == archive.digest

    def test_in_portions(self, s3, reference, glyphs_manifest, glyphs_bank):
        """Portions written to an address, one of them twice, and closed by a last call: the same bytes."""
        for number in (2, 1, 2):
            build_portion(glyphs_manifest, glyphs_bank, f"{s3.url}/a", Portion(number, 2), REQUEST)
        assert INDEX not in contents(s3.folder / "a")
        build(glyphs_manifest, glyphs_bank, f"{s3.url}/a", REQUEST)
        assert contents(s3.folder / "a") == contents(reference)

    @pytest.mark.parametrize("kind", ["s3", "ftp"])
    def test_overtaken_by_a_whole_build(self, request, kind, reference, glyphs_manifest, glyphs_bank, monkeypatch):
        """A portion that is slower than a build of everything finds its shards there, and leaves nothing behind."""
        bucket, real = request.getfixturevalue(kind), shards.shard_pieces

        def slow_pieces(*arguments):
            yield from real(*arguments)
            monkeypatch.setattr(shards, "shard_pieces", real)
            build(glyphs_manifest, glyphs_bank, f"{bucket.url}/a", REQUEST)

        monkeypatch.setattr(shards, "shard_pieces", slow_pieces)
        built = build_portion(glyphs_manifest, glyphs_bank, f"{bucket.url}/a", Portion(1, 1), REQUEST)
        assert built.written == 0
        assert contents(bucket.folder / "a") == contents(reference)

    def test_a_lost_shard_is_made_again(self, s3, reference, glyphs_manifest, glyphs_bank):
        """Building again is the remedy for a shard that went missing in the bucket; the others are kept."""
        build(glyphs_manifest, glyphs_bank, f"{s3.url}/a", REQUEST)
        fsspec.filesystem("s3").rm(f"{s3.url}/a/train-00001.tar")
        kept = (s3.folder / "a" / "train-00000.tar").stat().st_mtime_ns
        build(glyphs_manifest, glyphs_bank, f"{s3.url}/a", REQUEST)
        assert contents(s3.folder / "a") == contents(reference)
        assert (s3.folder / "a" / "train-00000.tar").stat().st_mtime_ns == kept

    def test_other_things_there(self, s3, glyphs_manifest, glyphs_bank):
        """Another archive, another unfinished build and files of the user's are never written over or among."""
        other = dataclasses.replace(REQUEST, seed=4)
        build(glyphs_manifest, glyphs_bank, f"{s3.url}/a", other)
        build_portion(glyphs_manifest, glyphs_bank, f"{s3.url}/b", Portion(1, 5), other)
        fsspec.filesystem("s3").pipe_file(f"{s3.url}/c/thesis.txt", b"do not touch")
        build(glyphs_manifest, glyphs_bank, f"{s3.url}/d", REQUEST)
        flip(s3.folder / "d" / INDEX)
        before = contents(s3.folder)
        for name, kind, message in [
            ("a", RequestError, r"a already holds another archive \(seed 4 there, 3 asked for\)"),
            ("b", RequestError, r"b holds an unfinished build of another archive \(seed 4 there, 3 asked for\)"),
            ("c", RequestError, r"c is not empty and not an archive"),
            ("d", DamagedError, r"d/archive\.json"),
        ]:
            with pytest.raises(kind, match=message):
                build(glyphs_manifest, glyphs_bank, f"{s3.url}/{name}", REQUEST)
        assert contents(s3.folder) == before

    def test_a_place_that_the_workers_do_not_share(self, tmp_path, glyphs_manifest, glyphs_bank):
        """Where the workers' files are not ours, nothing is closed: memory:// is another one in each process."""
        with pytest.raises(
            MamldataError, match=r"worker on .* sees no unfinished build in memory://.*same file system"
        ):
            build(glyphs_manifest, glyphs_bank, f"memory://{tmp_path.name}/a", REQUEST, workers=2)
        assert not fsspec.filesystem("memory").exists(f"/{tmp_path.name}/a/{INDEX}")


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def wait_for(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("bucket", "change", "said"),
    [
        ("", {"AWS_SECRET_ACCESS_KEY": "guessed"}, ["signature", "your credentials"]),
        ("no-such-bucket", {}, ["s3://no-such-bucket/a cannot be used", "bucket does not exist"]),
        ("", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, ["Could not connect", "the network"]),
    ],
)
def test_what_is_wrong_with_a_bucket(s3, glyphs_root, bucket, change, said):
    """Wrong credentials, a missing bucket, a server that is not there: one sentence each, and no traceback."""
    place = f"s3://{bucket}" if bucket else s3.url
    command = [*COMMAND, *SMALL, "--out", f"{place}/a", "--root", str(glyphs_root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **change})
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert all(text in done.stderr for text in said), done.stderr
    assert not list(s3.folder.iterdir())


def test_the_sum_is_written_before_the_index(tmp_path, glyphs_manifest, glyphs_bank, monkeypatch):
    """The index is the last file of all: what comes after it can only clear up."""
    written = []
    real = FolderStore.write

    def write(self, name, pieces):
        written.append(name)
        real(self, name, pieces)

    monkeypatch.setattr(FolderStore, "write", write)
    build(glyphs_manifest, glyphs_bank, tmp_path / "a", REQUEST)
    assert written[-2:] == [INDEX_SUM, INDEX]
