"""Run a pure function on many tasks: in this process, in several, or in an executor."""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor
from itertools import islice
from pathlib import Path, PurePosixPath
from queue import SimpleQueue
from typing import TypeVar

from mamldata.errors import MamldataError, enough_resources

Task = TypeVar("Task")
Result = TypeVar("Result")

_MOST_IN_FLIGHT = 4096  # enough to keep a large cluster busy, and few enough to keep memory small


def default_workers() -> int:
    """How many processors this process may use: those it is bound to, or fewer if its container is limited.

    A fraction of a processor counts as a whole one.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(count, math.ceil(min(_cgroup_limits(Path("/")), default=count))))


def _cgroup_limits(root: Path) -> Iterator[float]:
    """The processor time that each control group of this process is limited to, in processors; Linux only.

    https://docs.kernel.org/admin-guide/cgroup-v2.html and .../scheduler/sched-bwc.html (version 1).

    Args:
        root: of the file system.
    """
    for line in _words(root / "proc/self/cgroup", "\n"):
        _, controllers, name = line.split(":", 2)
        group = PurePosixPath(name.lstrip("/"))
        for level in (group, *group.parents):  # in a container that sees itself as the root, only the last one exists
            if not controllers:
                limit = _words(root / "sys/fs/cgroup" / level / "cpu.max")
            elif "cpu" in controllers.split(","):
                there = root / "sys/fs/cgroup/cpu" / level
                limit = _words(there / "cpu.cfs_quota_us") + _words(there / "cpu.cfs_period_us")
            else:
                break
            if len(limit) == 2 and limit[0] not in {"max", "-1"}:
                yield int(limit[0]) / int(limit[1])


def _words(path: Path, separator: str | None = None) -> list[str]:
    try:
        return path.read_text().strip().split(separator)
    except OSError:
        return []


def run_tasks(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int | Executor = 1
) -> Iterator[tuple[Task, Result]]:
    """Yield each task with ``function(task)`` as it finishes, in no particular order.

    Args:
        function: a function that other processes can import by name.
        tasks: values that can be pickled.
        workers: the number of processes; 1 runs everything in this one. Or an executor, which is left open.

    Raises:
        MamldataError: a worker process died, or the executor gave up; finished tasks stay finished.
    """
    if isinstance(workers, Executor):
        yield from _collect(workers, function, tasks, _MOST_IN_FLIGHT)
        return
    todo = list(tasks)
    if min(workers, len(todo)) <= 1:
        for task in todo:
            yield task, function(task)
        return
    # Spawned, not forked: a fork copies the locks of threads that do not exist in the child.
    context = multiprocessing.get_context("spawn")
    with enough_resources():
        pool = ProcessPoolExecutor(min(workers, len(todo)), context, initializer=end_with_parent)
    try:
        # Few at a time: a pool that breaks while tasks are submitted may leave a process behind (Python 3.11).
        with enough_resources():
            yield from _collect(pool, function, todo, 4 * workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _collect(
    executor: Executor, function: Callable[[Task], Result], tasks: Iterable[Task], most: int
) -> Iterator[tuple[Task, Result]]:
    left = iter(tasks)
    pending: dict[Future[Result], Task] = {}
    finished: SimpleQueue[Future[Result]] = SimpleQueue()
    try:
        while True:
            # Inside the try, because a worker may die while tasks are being submitted.
            for task in islice(left, most - len(pending)):
                future = executor.submit(function, task)
                pending[future] = task
                future.add_done_callback(finished.put)
            if not pending:
                return
            future = finished.get()
            yield pending.pop(future), future.result()
    except BrokenExecutor as error:
        # A broken pool fails its tasks itself; cancelling one of them first would crash it.
        pending.clear()
        raise MamldataError(
            "A worker process died (killed, or out of memory). Run the same command again: it continues "
            "from the finished tasks. Fewer workers need less memory."
        ) from error
    except CancelledError as error:
        raise MamldataError(
            "The executor gave up a task: it was shut down, or lost its workers. Run the same command again: it "
            "continues from the finished tasks."
        ) from error
    finally:
        for future in pending:
            future.cancel()


def end_with_parent() -> None:
    """In a worker: end when the parent has ended, which the worker would not notice otherwise."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
