"""Commands of mamldata in forked processes: killed at some moment, or with few descriptors, little memory or room.

A fork has all modules loaded already, so that a command takes milliseconds, in which it still is a process of its own
that runs the whole command line.
"""

from __future__ import annotations

import os
import random
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path

from tqdm import tqdm

from tests.storm.harness import Broken

# What a process does to files, as Python's audit hooks tell it. https://docs.python.org/3/library/audit_events.html
FILE_EVENTS = frozenset(
    {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.chmod", "os.utime"}
)
_CODES = {0, 1, 2, 75}  # exit codes that the command line promises


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code; negative for the signal that ended it.
        out, err: what it printed.
        seconds: how long it took.
        events: how many of ``FILE_EVENTS`` there were; 0 if nobody asked, or it was killed.
    """

    code: int
    out: str
    err: str
    seconds: float
    events: int = 0

    @property
    def done(self) -> bool:
        """Whether it did its work."""
        return self.code == 0


@dataclass(frozen=True)
class Trouble:
    """What a command meets.

    Attributes:
        kill_after: seconds after which it gets SIGKILL.
        kill_at: the number of the operation on a file at which it kills itself.
        limits: resource limits by their number, as ``resource.setrlimit`` takes them.
        umask: as ``os.umask`` takes it.
        environment: variables that are set, or removed where they are None.
        folder: where it works.
    """

    kill_after: float | None = None
    kill_at: int | None = None
    limits: Mapping[int, int] = field(default_factory=dict)
    umask: int | None = None
    environment: Mapping[str, str | None] = field(default_factory=dict)
    folder: Path | None = None


@cache
def _load_commands(verbs: tuple[str, ...]) -> None:
    """Import what commands need, before the forks."""
    import cli.main

    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process leaves there
    for verb in verbs:
        import_module(f"cli.commands.{verb}")
    if "train" in verbs:
        sys.modules["matplotlib"] = None  # type: ignore[assignment]  # drawing takes longer than these runs
        for name in ("trainer.loop", "trainer.reports.plots", "trainer.system.distributed", "torch._dynamo"):
            import_module(name)
        import torch

        torch.set_num_threads(1)
    assert cli.main


def mamldata(*words: object, trouble: Trouble | None = None, count: bool = False, limit: float = 50.0) -> Ended:
    """Run ``mamldata`` with some words in a fork of this process.

    Args:
        words: the verb and its arguments.
        trouble: what it meets.
        count: count its operations on files.
        limit: seconds after which it hangs.

    Raises:
        Broken: it hung.
    """
    _load_commands((str(words[0]),))

    def act() -> None:
        from cli.main import main

        main([str(word) for word in words], prog_name="mamldata")

    return forked(act, trouble or Trouble(), count=count, limit=limit)


def forked(act: Callable[[], object], trouble: Trouble, *, count: bool = False, limit: float = 50.0) -> Ended:
    """Run a function in a fork of this process, in a process group of its own.

    Raises:
        Broken: it hung.
    """
    start = time.monotonic()
    pipes = [os.pipe() for _ in range(3)]  # and no files, whose length may be limited
    child = os.fork()
    if child == 0:
        _become(act, trouble, [writes for _, writes in pipes], count)
    for _, writes in pipes:
        os.close(writes)
    texts = {reads: b"" for reads, _ in pipes}
    watched = os.pidfd_open(child)
    patience = limit if trouble.kill_after is None else min(limit, trouble.kill_after)
    try:
        ended = _listen(texts, watched, start + patience)
        with suppress(ProcessLookupError):  # it may not have made its group yet
            os.killpg(child, signal.SIGKILL)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    finally:
        os.close(watched)
        for reads in texts:
            os.close(reads)
    out, err, events = texts.values()
    if not ended and trouble.kill_after is None:
        raise Broken(f"it hung for {limit:g} s; it had printed {err!r}")
    return Ended(
        os.waitstatus_to_exitcode(status),
        out.decode(errors="replace"),
        err.decode(errors="replace"),
        time.monotonic() - start,
        len(events),
    )


def _listen(texts: dict[int, bytes], watched: int, until: float) -> bool:
    """Read what a process says until it ends, or until some time; returns whether it ended."""
    silent: set[int] = set()
    while True:
        ready, _, _ = select.select([watched, *texts.keys() - silent], [], [], max(0.0, until - time.monotonic()))
        for reads in texts.keys() & set(ready):
            more = os.read(reads, 1 << 16)
            texts[reads] += more
            if not more:
                silent.add(reads)
        if not ready or ready == [watched]:  # nothing is left to read
            return bool(ready)


def _become(act: Callable[[], object], trouble: Trouble, pipes: Sequence[int], count: bool) -> None:
    """In the fork: run the function, and end."""
    code = 70  # of a traceback
    try:
        os.setpgid(0, 0)
        out, err, told = pipes
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (open(number, "w", errors="replace", closefd=False) for number in (1, 2))  # noqa: SIM115
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for name, value in trouble.environment.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        if trouble.folder is not None:
            os.chdir(trouble.folder)
        if trouble.umask is not None:
            os.umask(trouble.umask)
        if count or trouble.kill_at is not None:
            _count_events(told, trouble.kill_at, count)
        for which, value in trouble.limits.items():
            resource.setrlimit(which, (value, resource.getrlimit(which)[1]))
        try:
            act()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    except BaseException:
        import traceback

        with suppress(BaseException):
            traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _count_events(told: int, kill_at: int | None, count: bool) -> None:
    """Count operations on files, write a byte to a descriptor for each, and die at one of them."""
    seen = 0

    def hook(event: str, _: object) -> None:
        nonlocal seen
        if event in FILE_EVENTS:
            seen += 1
            if count:
                os.write(told, b".")
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def some_moment(chance: random.Random, whole: Ended) -> Trouble:
    """A moment to kill a command at, of which ``whole`` says how long it takes undisturbed: a time or an operation."""
    if chance.random() < 0.5:
        return Trouble(kill_after=chance.uniform(0, whole.seconds))
    return Trouble(kill_at=chance.randint(1, max(1, whole.events)))


def require_clear(ended: Ended) -> None:
    """Check that a command ended well, or with an error that people can read.

    Raises:
        Broken: it ended in a traceback or by a signal.
    """
    if ended.code not in _CODES or "Traceback (most recent call last)" in ended.err:
        raise Broken(f"exit code {ended.code}: {ended.err[-3000:]}")
    if not ended.done and not ended.err.strip():
        raise Broken(f"exit code {ended.code} without a word")


def require_done(ended: Ended) -> None:
    """Check that a command did its work.

    Raises:
        Broken: it failed.
    """
    if not ended.done:
        raise Broken(f"exit code {ended.code}, although nothing disturbed it: {ended.err[-3000:]}")
