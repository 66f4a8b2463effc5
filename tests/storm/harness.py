"""Campaigns of tries, and the processes that carry them out: seeded, timed, each try in a process that may die.

A try gets a source of chance that depends only on the seed, the campaign and its number, so that it can be run again by
itself. Every finished try is a line of the campaign's journal, and the same command later goes on after the last line.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal

from mamldata.errors import MamldataError

PROJECT = Path(__file__).parents[2]
Outcome = Literal["same", "refused"]


class Broken(Exception):  # noqa: N818  # a promise that was not kept, rather than an error of ours
    """A promise was broken; the text says which, and how."""


class Skipped(Exception):  # noqa: N818
    """A try that this machine cannot make; the text says why."""


def refused(act: Callable[[], object], said: list[str] | None = None) -> bool:
    """Whether a call is refused with an error that a user can understand; its message is added to ``said``.

    Raises:
        Broken: the error says nothing.
    """
    try:
        act()
    except MamldataError as error:
        if not str(error).strip():
            raise Broken(f"an error without a message: {error!r}") from error
        if said is not None:
            said.append(str(error))
        return True
    return False


@dataclass(frozen=True)
class Campaign:
    """Many tries of one kind.

    Attributes:
        name: as given on the command line.
        what: what is done to the library, for the table.
        tries: how many at scale 1.
        attempt: makes one try in an empty folder, which is removed afterwards. It returns ``same`` if everything ended
            as if nothing had happened and ``refused`` if a clear error came; it raises ``Broken`` for anything else.
        limit: seconds after which a try hangs.
    """

    name: str
    what: str
    tries: int
    attempt: Callable[[random.Random, Path], Outcome]
    limit: float = 60.0


@dataclass(frozen=True)
class Try:
    """How a try ended: ``same``, ``refused``, ``skipped`` or ``failed``, with the reason of the last two."""

    number: int
    outcome: str
    seconds: float
    reason: str = ""


def chance_of(seed: int, campaign: str, number: int) -> random.Random:
    """The source of chance of one try."""
    return random.Random(f"{seed} {campaign} {number}")


def make_try(campaign: Campaign, seed: int, number: int) -> Try:
    """Make one try in this process."""
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="try-", dir=workplace()))
    outcome, reason = "failed", ""
    try:
        outcome = campaign.attempt(chance_of(seed, campaign.name, number), folder)
    except Skipped as why:
        outcome, reason = "skipped", str(why)
    except Broken as why:
        reason = str(why)
    except Exception:
        reason = traceback.format_exc(limit=-6)
    finally:
        remove(folder)
    return Try(number, outcome, round(time.monotonic() - start, 3), reason)


def remove(folder: Path) -> None:
    """Remove a folder in which any permission may be missing."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        for place, folders, _ in os.walk(folder):
            for name in folders:
                (Path(place) / name).chmod(0o700)
        shutil.rmtree(folder)


@cache
def workplace() -> Path:
    """A folder for the tries of this process, which ends with it; homes, caches and temporary files are in it, too."""
    place = Path(os.environ["STORM_PLACE"]) / f"worker-{os.getpid()}"
    for name in ("tmp", "home", "cache", "material"):
        (place / name).mkdir(parents=True)
    os.environ.update(
        TMPDIR=str(place / "tmp"),
        HOME=str(place / "home"),
        MAMLDATA_CACHE=str(place / "cache"),
        MAMLDATA_ROOT=str(place / "home" / "root"),
    )
    tempfile.tempdir = None  # read again from the environment
    return place


def _serve(campaign: Campaign, seed: int, pipe: Connection) -> None:
    """In a worker: make the tries whose numbers arrive, until there are no more."""
    logging.disable()  # what the library warns of is its business
    os.setsid()  # what a try starts ends with this process's group
    workplace()
    pipe.send(None)  # ready: what was imported until now does not count
    with suppress(EOFError):  # whoever asked has been killed
        while (number := pipe.recv()) is not None:
            pipe.send(make_try(campaign, seed, number))


class _Worker:
    """A process that makes one try at a time."""

    def __init__(self, campaign: Campaign, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(campaign, seed, theirs))
        self.process.start()
        theirs.close()
        self.campaign, self.number, self.start = campaign, -1, time.monotonic()

    def give(self, number: int | None) -> None:
        """Send the next number, or None for the end."""
        self.number, self.start = -1 if number is None else number, time.monotonic()
        with suppress(OSError):  # it has died; the next look at it says so
            self.pipe.send(number)

    @property
    def late(self) -> bool:
        """Whether its try takes too long."""
        return time.monotonic() - self.start > self.campaign.limit

    def failed(self, reason: str) -> Try:
        """The try under way, as a failed one."""
        return Try(self.number, "failed", round(time.monotonic() - self.start, 3), reason)

    def end(self) -> None:
        """End the process and everything that its tries started, unless it has ended well."""
        if self.process.exitcode != 0:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid or 0, signal.SIGKILL)
            self.process.kill()
            self.process.join()
        self.pipe.close()
        remove(Path(os.environ["STORM_PLACE"]) / f"worker-{self.process.pid}")


_MOST_TRIES = 2000  # of one worker: what a library leaves in memory goes with its process


def tries_of(campaign: Campaign, seed: int, numbers: Iterable[int], processes: int) -> Iterator[Try]:
    """Make tries in several processes, or in this one if ``processes`` is 0; yields each as it ends.

    One that hangs or dies in its process has failed.
    """
    if not processes:
        yield from (make_try(campaign, seed, number) for number in numbers)
        return
    todo = deque(numbers)
    workers: list[_Worker] = []
    given: dict[_Worker, int] = {}
    try:
        while todo or any(worker.number >= 0 for worker in workers):
            while len(workers) < min(processes, len(todo) + len(workers)):
                workers.append(worker := _Worker(campaign, seed))
                given[worker] = 0
            ready = wait([worker.pipe for worker in workers], timeout=0.5)
            for worker in list(workers):
                answer: Try | None = None
                if worker.pipe in ready:
                    try:
                        answer = worker.pipe.recv()
                    except EOFError:
                        worker.process.join(5)
                        if worker.number < 0:
                            raise RuntimeError(f"A worker of {campaign.name} ended before its first try.") from None
                        answer = worker.failed(f"the process died (exit code {worker.process.exitcode})")
                        worker.end()
                        workers.remove(worker)
                elif worker.number >= 0 and worker.late:
                    answer = worker.failed(f"it did not end within {campaign.limit:g} s")
                    worker.end()
                    workers.remove(worker)
                else:
                    continue
                if answer is not None:
                    yield answer
                if worker in workers:
                    worker.number = -1
                    if todo and given[worker] < _MOST_TRIES:
                        given[worker] += 1
                        worker.give(todo.popleft())
                    else:
                        worker.give(None)
                        worker.process.join(5)
                        worker.end()
                        workers.remove(worker)
    finally:
        for worker in workers:
            worker.end()


@cache
def code_digest() -> str:
    """A digest of the code that the tries run: those of other code do not count."""
    digest = hashlib.sha256()
    for folder in ("mamldata", "trainer", "cli", "manifests", "tests/storm"):
        for path in sorted((PROJECT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(PROJECT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


class Journal:
    """The finished tries of a campaign, a line of JSON each, below a line that says of which code and seed."""

    def __init__(self, folder: Path, campaign: Campaign, seed: int) -> None:
        self.path = folder / f"{campaign.name}.jsonl"
        head = json.dumps({"campaign": campaign.name, "seed": seed, "code": code_digest()})
        self.tries: dict[int, Try] = {}
        lines = self.path.read_text().split("\n") if self.path.exists() else []
        if lines[:1] == [head]:
            for line in lines[1:-1]:  # the last one is empty, or cut off by a kill
                one = Try(**json.loads(line))
                self.tries[one.number] = one
        whole = "\n".join([head, *(json.dumps(asdict(one)) for one in self.tries.values())]) + "\n"
        part = self.path.with_suffix(".part")
        part.write_text(whole)
        part.replace(self.path)

    def add(self, one: Try) -> None:
        """Note a finished try."""
        self.tries[one.number] = one
        with self.path.open("a") as stream:
            stream.write(json.dumps(asdict(one)) + "\n")


def carry_out(
    campaign: Campaign, seed: int, tries: int, processes: int, folder: Path, tell: Callable[[Try], object]
) -> Mapping[int, Try]:
    """Make the tries of a campaign that its journal lacks; returns all of them by number."""
    journal = Journal(folder, campaign, seed)
    left = [number for number in range(tries) if number not in journal.tries]
    for one in tries_of(campaign, seed, left, processes):
        journal.add(one)
        tell(one)
    return {number: one for number, one in journal.tries.items() if number < tries}
