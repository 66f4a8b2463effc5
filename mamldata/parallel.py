"""Run the same pure task many times, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from mamldata.errors import MamldataError

Task = TypeVar("Task")
Result = TypeVar("Result")


def default_workers() -> int:
    """The processors that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def run_tasks(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int = 1
) -> Iterator[tuple[Task, Result]]:
    """``function(task)`` for every task, as they finish, in no particular order.

    Args:
        function: importable by name, because other processes import it.
        tasks: values that can be pickled.
        workers: processes; with 1 everything happens in this one.

    Raises:
        MamldataError: a worker process died; what is finished stays finished.
    """
    todo = list(tasks)
    if min(workers, len(todo)) <= 1:
        for task in todo:
            yield task, function(task)
        return
    # Spawned, not forked: a fork copies the locks of threads that do not exist in the child.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(todo)), context, initializer=_end_with_parent) as pool:
        yield from _collect(pool, function, todo)


def _collect(pool: Executor, function: Callable[[Task], Result], tasks: list[Task]) -> Iterator[tuple[Task, Result]]:
    try:
        # Within the try: a worker may die while tasks are still being handed in.
        futures = {pool.submit(function, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise MamldataError(
            "A worker process died (killed, or out of memory). Run the same command again: it goes on from "
            "what is finished; fewer --workers need less memory."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker: end when the parent is gone, which nothing else would tell an idle worker."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
