"""Parallel tasks: the results of any number of workers, a clear word when one dies, and none left behind."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from operator import call
from pathlib import Path
from typing import Any

import pytest

from mamldata import parallel
from mamldata.errors import MamldataError
from mamldata.parallel import default_workers, run_tasks

# Prints its workers' process ids, each once its task runs, and then hangs in them.
PARENT = """\
import sys
from mamldata.parallel import run_tasks
sys.path.insert(0, sys.argv[1])
import hanging
if __name__ == "__main__":
    list(run_tasks(hanging.hang, ["1", "2"], workers=2))
"""
HANGING = """\
import os, pathlib, time
def hang(name):
    place = pathlib.Path(__file__).parent
    (place / (name + ".new")).write_text(str(os.getpid()))
    (place / (name + ".new")).rename(place / (name + ".pid"))
    time.sleep(600)
"""


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_results_do_not_depend_on_workers(workers: int) -> None:
    """Each task comes back once, with its result."""
    tasks = [-3, 1, -4, 1, -5]
    assert sorted(run_tasks(abs, tasks, workers)) == sorted((task, abs(task)) for task in tasks)


@pytest.mark.parametrize("workers", [1, 2])
def test_no_tasks(workers: int) -> None:
    """Nothing to do is done at once."""
    assert list(run_tasks(abs, [], workers)) == []


def test_one_worker_is_this_process() -> None:
    """With one worker, or one task, no process is started; with two they are others."""
    assert dict(run_tasks(call, [os.getpid, os.getppid], 1)) == {os.getpid: os.getpid(), os.getppid: os.getppid()}
    assert dict(run_tasks(call, [os.getpid], 4)) == {os.getpid: os.getpid()}
    assert dict(run_tasks(call, [os.getpid, os.getppid], 2))[os.getppid] == os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_task_that_fails(workers: int) -> None:
    """Its own error comes out, and no process is left."""
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        list(run_tasks(math.sqrt, [4.0, -1.0, 9.0], workers))
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed() -> None:
    """A worker killed in the middle of its task is a clear error in bounded time, not a hang."""
    started = time.monotonic()
    tasks = [partial(signal.raise_signal, signal.SIGKILL), *(partial(abs, -number) for number in range(20_000))]
    with pytest.raises(MamldataError, match=r"A worker process died .*Run the same command again: it continues"):
        list(run_tasks(call, tasks, 2))
    assert time.monotonic() - started < 30
    assert not multiprocessing.active_children()


def test_a_caller_that_stops_early() -> None:
    """Whoever takes only the first result leaves no process behind."""
    results = run_tasks(abs, range(50), 2)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


class Counting(ThreadPoolExecutor):
    """Knows how many tasks were in its hands at once."""

    def __init__(self) -> None:
        super().__init__(2)
        self.taken = self.most = 0

    def submit(self, *arguments: Any) -> Future[Any]:  # type: ignore[override]
        self.taken += 1
        self.most = max(self.most, self.taken)
        future = super().submit(*arguments)
        future.add_done_callback(lambda _: setattr(self, "taken", self.taken - 1))
        return future


def test_an_executor_has_a_bounded_number_in_its_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks are taken from their source as they are needed, and all come back once."""
    monkeypatch.setattr(parallel, "_MOST_IN_FLIGHT", 5)
    with Counting() as executor:
        results = run_tasks(abs, iter(range(-300, 0)), executor)
        assert sorted(result for _, result in results) == list(range(1, 301))
        assert 2 <= executor.most <= 5
        assert executor.submit(abs, -1).result() == 1, "it was left open"


def test_an_executor_that_is_shut_down() -> None:
    """Tasks that an executor throws away are a clear error, not a hang."""
    gate = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        results = run_tasks(call, [partial(gate.wait, 60), *[partial(abs, -1)] * 3], executor)
        threading.Timer(0.2, lambda: (executor.shutdown(wait=False, cancel_futures=True), gate.set())).start()
        with pytest.raises(MamldataError, match=r"The executor gave up a task: .*Run the same command again"):
            list(results)


def test_an_executor_whose_worker_dies() -> None:
    """A pool of the caller's that breaks is the same clear error as ours."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        tasks = [partial(signal.raise_signal, signal.SIGKILL), partial(abs, -1)]
        with pytest.raises(MamldataError, match="A worker process died"):
            list(run_tasks(call, tasks, executor))


def test_a_failure_takes_the_other_tasks_back() -> None:
    """After an error an executor is not left with work that nobody waits for."""
    done: list[int] = []
    with ThreadPoolExecutor(1) as executor:
        tasks = [partial(math.sqrt, -1.0), *(partial(done.append, number) for number in range(10_000))]
        with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
            list(run_tasks(call, tasks, executor))
    assert len(done) < 10_000


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    """When the parent is killed with SIGKILL, its busy workers end too."""
    (tmp_path / "hanging.py").write_text(HANGING)
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment)
    try:
        files = [tmp_path / "1.pid", tmp_path / "2.pid"]
        wait_for(lambda: all(file.exists() for file in files) or parent.poll() is not None)
        workers = [int(file.read_text()) for file in files]
        assert all(alive(worker) for worker in workers)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not any(alive(worker) for worker in workers))


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return False
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        return True
    return state not in "ZX"


def wait_for(condition: object, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def test_default_workers() -> None:
    """At least one, and no more than there are processors."""
    assert 1 <= default_workers() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        ("0::/", {"cpu.max": "150000 100000\n"}, [1.5]),
        ("0::/", {"cpu.max": "max 100000\n"}, []),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000", "cpu.max": "max 100000"}, [2.0]),
        ("0::/a/b", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "50000 100000"}, [3.0, 0.5]),
        ("0::/hidden/in/the/container", {"cpu.max": "400000 100000"}, [4.0]),
        ("3:cpuset:/\n2:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, [2.5]),
        ("1:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "25000"}, [2.0]),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, []),
        ("1:name=systemd:/\n0::/", {}, []),
    ],
)
def test_limits_of_control_groups(tmp_path: Path, groups: str, files: dict[str, str], limits: list[float]) -> None:
    """Versions 1 and 2, of the process's own group and all above it, and where a container hides those."""
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{name}": files[name] for name in files}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(parallel._cgroup_limits(tmp_path)) == limits


@pytest.mark.parametrize(("limits", "workers"), [([], 8), ([1.5], 2), ([3.0, 0.5], 1), ([64.0], 8)])
def test_a_limited_container_gets_fewer_workers(
    monkeypatch: pytest.MonkeyPatch, limits: list[float], workers: int
) -> None:
    """As many as the least limit says, rounded up; elsewhere as many as there are processors to run on."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(parallel, "_cgroup_limits", lambda _: iter(limits))
    assert default_workers() == workers


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    """Sets no limit."""
    assert list(parallel._cgroup_limits(tmp_path)) == []
