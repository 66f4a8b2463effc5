"""A Dask cluster of real processes: it builds the same bytes, also when one is killed, and says what it lacks."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("distributed", reason="the package distributed is not installed; the test group has it")

from mamldata.archive.build import build
from mamldata.archive.dask import dask_executor
from mamldata.archive.index import INDEX
from mamldata.archive.plan import BuildRequest
from mamldata.archive.store import BUILD
from mamldata.errors import DataMissingError, MamldataError, RequestError

pytestmark = pytest.mark.slow
REQUEST = BuildRequest(n_way=3, k_query=2, episodes={"train": 360, "val": 2}, seed=3, episodes_per_shard=3)


class Cluster:
    """A scheduler and two workers, each a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        told = folder / "scheduler.json"
        wait_for(lambda: told.exists() and told.read_text().endswith("}"))  # it is written in place
        self.address = json.loads(told.read_text())["address"]
        options = ("--no-nanny", "--nthreads", "1", "--no-dashboard")
        self.workers = [self._start("worker", *options, "--name", name) for name in ("one", "two")]

    def _start(self, kind: str, *options: str) -> subprocess.Popen[bytes]:
        file = ("--scheduler-file", str(self.folder / "scheduler.json"))
        log = (self.folder / f"{kind}.log").open("ab")
        with log:
            return subprocess.Popen([sys.executable, "-m", "dask", kind, *file, *options], stdout=log, stderr=log)

    def stop(self) -> None:
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    started = Cluster(tmp_path)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def digest(tmp_path_factory, glyphs_manifest, glyphs_bank) -> str:
    """Of the archive of REQUEST, built without a cluster."""
    return build(glyphs_manifest, glyphs_bank, tmp_path_factory.mktemp("here") / "archive", REQUEST).digest


def wait_for(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def when_some_are_finished(out: Path, act: object) -> threading.Thread:
    """Do something in the middle of a build; fails the build's thread if it was faster."""

    def watch() -> None:
        wait_for(lambda: len(list(out.glob(f"{BUILD}/*.tar.sha256"))) >= 5)
        assert not (out / INDEX).exists(), "it was faster than the test"
        act()  # type: ignore[operator]

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_worker_is_killed(cluster, tmp_path, digest, glyphs_manifest, glyphs_bank):
    """Two workers, of which one is killed with SIGKILL in the middle: the digest of a build on one machine."""
    out = tmp_path / "out"
    killer = when_some_are_finished(out, cluster.workers[0].kill)
    with dask_executor(cluster.address) as (executor, _):
        assert build(glyphs_manifest, glyphs_bank, out, REQUEST, executor=executor).digest == digest
        killer.join()
        cluster.workers[0].wait()
        assert cluster.workers[1].poll() is None
        lost = dataclasses.replace(glyphs_bank, path=tmp_path / "nowhere.npy")
        with pytest.raises(DataMissingError, match=r"The worker on .*nowhere\.npy cannot be read"):
            build(glyphs_manifest, lost, tmp_path / "other", REQUEST, executor=executor)
    assert sorted({path.suffix for path in out.iterdir()}) == [".json", ".sha256", ".tar"]


def test_the_scheduler_is_killed(cluster, tmp_path, digest, glyphs_manifest, glyphs_bank):
    """Without its scheduler a build ends with a clear error, and goes on later from what is finished."""
    out = tmp_path / "out"
    killer = when_some_are_finished(out, cluster.scheduler.kill)
    with (
        pytest.raises(MamldataError, match=r"Run the same command again|run the same command again"),
        dask_executor(cluster.address, seconds=1) as (executor, _),
    ):
        build(glyphs_manifest, glyphs_bank, out, REQUEST, executor=executor)
    killer.join()
    assert not (out / INDEX).exists()
    assert build(glyphs_manifest, glyphs_bank, out, REQUEST).digest == digest


def test_packages_that_the_cluster_lacks(cluster):
    """Of a cluster that lacks a module it is said what to install."""
    with (
        pytest.raises(MamldataError, match=r"cannot run this build \(No module named 'no_such'\). Install mamldata"),
        dask_executor(cluster.address) as (executor, _),
    ):
        executor.submit(import_module, "no_such").result()


@pytest.mark.parametrize(
    ("address", "kind", "message"),
    [
        ("tcp://127.0.0.1:9", MamldataError, "No Dask scheduler answers at tcp://127.0.0.1:9 .*Check that it runs"),
        ("nonsense://a:1", RequestError, "'nonsense://a:1' is not a Dask scheduler's address"),
        ("127.0.0.1", RequestError, r"'127\.0\.0\.1' is not a Dask scheduler's address"),
    ],
)
def test_no_scheduler(address, kind, message):
    """An address where nothing answers, or that is none, is a clear error in bounded time."""
    with pytest.raises(kind, match=message), dask_executor(address, seconds=0.5):
        raise AssertionError("there is no cluster")


def test_without_the_package(monkeypatch):
    """Who has not installed Dask is told the command."""
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(RequestError, match=r"pip install"), dask_executor("tcp://127.0.0.1:9"):
        raise AssertionError("there is no cluster")
