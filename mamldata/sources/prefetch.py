"""Work done ahead of time: jobs in background threads, whose results are waited for when they are needed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Container, Hashable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


class Prefetch(Generic[Key, Result]):
    """Running and finished jobs. For one thread at a time.

    The threads are daemons, unlike those of an executor, so that a job that waits for a silent server does not keep
    the program from ending.
    """

    def __init__(self) -> None:
        self._mine: dict[Key, Future[Result]] = {}
        self._threads: list[threading.Thread] = []
        self._process = os.getpid()

    @property
    def _jobs(self) -> dict[Key, Future[Result]]:
        if self._process != os.getpid():  # a fork has the jobs, but not their threads
            self._mine, self._threads, self._process = {}, [], os.getpid()
        return self._mine

    def __contains__(self, key: Key) -> bool:
        return key in self._jobs

    @property
    def running(self) -> int:
        """How many jobs are running, forgotten ones included."""
        return sum(thread.is_alive() for thread in self._threads)

    def start(self, key: Key, job: Callable[[], Result]) -> None:
        """Start a job under a key that is not in use; do it at once if this process may not have another thread."""
        future: Future[Result] = Future()
        thread = threading.Thread(target=_run, args=(future, job), name="mamldata-ahead", daemon=True)
        self._threads = [*filter(threading.Thread.is_alive, self._threads), thread]
        self._jobs[key] = future
        try:
            thread.start()
        except RuntimeError:
            self._threads.remove(thread)
            _run(future, job)

    def take(self, key: Key) -> Result:
        """Wait for a job, forget it, and give its result.

        If it failed, all jobs are forgotten, so that a new try does not meet an old failure.

        Raises:
            BaseException: whatever the job raised.
        """
        future = self._jobs[key]
        try:
            result = future.result()
        except BaseException:
            if future.done():  # else only the waiting was interrupted
                self._jobs.clear()
            raise
        del self._jobs[key]
        return result

    def keep_only(self, keys: Container[Key]) -> None:
        """Forget all other jobs; those that are running finish, and their results are dropped."""
        for key in [key for key in self._jobs if key not in keys]:
            del self._jobs[key]

    @property
    def is_here(self) -> bool:
        """Whether the current thread runs one of the jobs: garbage collection may call anything in it."""
        return threading.current_thread() in self._threads

    def join(self, seconds: float) -> None:
        """Wait for each thread, up to ``seconds``; not for the current one."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(seconds)

    def __getstate__(self) -> dict[str, Any]:
        # Threads cannot be pickled: another process starts without jobs.
        return {"_mine": {}, "_threads": [], "_process": self._process}


def _run(future: Future[Result], job: Callable[[], Result]) -> None:
    try:
        future.set_result(job())
    except BaseException as error:  # raised again where the result is waited for
        future.set_exception(error)
