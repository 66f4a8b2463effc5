"""Fetch: get a dataset's raw files from wherever they are to be had, verify each, and keep them read-only."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never

import requests
from filelock import FileLock, Timeout

from mamldata.digest import chunks
from mamldata.download import (
    Network,
    Part,
    SourceError,
    UnusableRangeError,
    open_session,
    transfer,
    without_password,
)
from mamldata.errors import FetchError, WriteError
from mamldata.files import commit, make_folder, writing
from mamldata.manifest import Manifest, SourceFile
from mamldata.places import find, is_http, is_local, needs_network, open_source
from mamldata.progress import Progress, silent
from mamldata.raw import CheckedBy, Verdict, fetch_command, judge, most_bytes, read_receipt, write_receipt
from mamldata.root import DatasetFolder

__all__ = ["Action", "Fetched", "Network", "fetch", "plan"]

_PATIENT = Network()
_HEADWAY = 1 << 20  # bytes that make a round of tries worth its while

Kind = Literal["have", "check", "resume", "download", "generate", "missing"]
How = Literal["had", "copied", "downloaded", "resumed", "generated"]
Notify = Callable[[str], object]


@dataclass(frozen=True)
class Action:
    """What must be done for one file.

    Attributes:
        file: what is wanted.
        kind: ``have`` (it is there and was verified), ``check`` (it is there, put by hand or just before we were
            killed), ``resume``, ``download`` (or copy), ``generate``, or ``missing`` (there is no source).
        path: its final place.
        sources: paths and URLs in the order in which they will be tried.
        have_bytes: how many bytes of it a broken-off download left, if it goes on from there.
    """

    file: SourceFile
    kind: Kind
    path: Path
    sources: tuple[str, ...]
    have_bytes: int


@dataclass(frozen=True)
class Fetched:
    """One file that is there now.

    Attributes:
        name: its file name.
        how: how it got there, in this run.
        source: where from; empty if it was there.
        bytes: its length.
        sha256: its digest, which a repacked container has of its own.
        checked_by: which of the manifest's digests is right.
        seconds: how long it took.
    """

    name: str
    how: How
    source: str
    bytes: int
    sha256: str
    checked_by: CheckedBy
    seconds: float


def plan(
    manifest: Manifest, root: Path, sources: Sequence[str] = (), *, offline: bool = False
) -> list[Action]:
    """Say what must be done for each file of a dataset. Looks at names, lengths and receipts; changes nothing.

    Args:
        manifest: the dataset.
        root: the data root.
        sources: places to look in before the manifest's own: folders, http(s) addresses, fsspec URLs.
        offline: leave out every source that needs a network.

    Raises:
        RequestError: a place that is neither an existing folder nor a URL that can be read.
    """
    folder = DatasetFolder(root, manifest.name)
    with writing(folder.raw):
        return [_action(folder, file, sources, offline) for file in manifest.files]


def fetch(
    manifest: Manifest,
    root: Path,
    sources: Sequence[str] = (),
    *,
    offline: bool = False,
    progress: Progress = silent,
    network: Network = _PATIENT,
    notify: Notify | None = None,
) -> list[Fetched]:
    """Get every raw file of a dataset. What is there is left alone; what was broken off goes on.

    A file has its final name only when it is whole and verified. Killed at any moment, the same call goes on.

    Args:
        manifest: the dataset.
        root: the data root.
        sources: places to look in before the manifest's own: folders, http(s) addresses, fsspec URLs.
        offline: touch no network.
        progress: one bar of bytes per file; what a download that starts anew throws away is counted back.
        network: how patient to be.
        notify: told of waiting and of failed tries, a line each.

    Raises:
        RequestError: a place that is neither an existing folder nor a URL that can be read.
        FetchError: files that could not be had, or are not the right ones; all are named, with every source tried.
        WriteError: the root cannot be written to, or the disk is full.
    """
    say = notify or (lambda _: None)
    actions = plan(manifest, root, sources, offline=offline)
    if any(action.kind != "have" for action in actions):
        _require_sources(manifest, root, actions, sources)
        folder = DatasetFolder(root, manifest.name)
        make_folder(folder.raw)
        with _locked(folder, say), closing(open_session()) as session:
            # Again, because whoever held the lock may have done it all.
            actions = plan(manifest, root, sources, offline=offline)
            work = _Work(folder, fetch_command(manifest, root), session, network, progress, say)
            return work.all(actions)
    return [_had(DatasetFolder(root, manifest.name), action.file) for action in actions]


def _action(folder: DatasetFolder, file: SourceFile, places: Sequence[str], offline: bool) -> Action:
    path = folder.raw / file.name
    found = [source for place in places if (source := find(place, file.name)) is not None]
    if path.is_file():
        return Action(file, "have" if _is_verified(folder, file) else "check", path, (), 0)
    if file.generator:
        return Action(file, "generate", path, (), 0)
    usable = [
        source for source in dict.fromkeys([*found, *file.urls]) if not (offline and needs_network(source))
    ]
    part = Part(path).size if usable and is_http(usable[0]) else 0
    kind: Kind = "missing" if not usable else "resume" if part else "download"
    return Action(file, kind, path, tuple(usable), part)


def _is_verified(folder: DatasetFolder, file: SourceFile) -> bool:
    """Whether the receipt is one for what the manifest wants; a file of an older manifest is looked at again."""
    digest = read_receipt(folder, file.name)
    if digest == file.sha256:
        return (folder.raw / file.name).stat().st_size == file.bytes
    return digest is not None and file.content_sha256 is not None


def _had(folder: DatasetFolder, file: SourceFile) -> Fetched:
    digest = read_receipt(folder, file.name) or ""
    size = (folder.raw / file.name).stat().st_size
    return Fetched(file.name, "had", "", size, digest, _checked_by(file, digest), 0.0)


def _checked_by(file: SourceFile, digest: str) -> CheckedBy:
    return "sha256" if digest == file.sha256 else "content_sha256"


def _require_sources(
    manifest: Manifest, root: Path, actions: Sequence[Action], places: Sequence[str]
) -> None:
    """Files that nothing can be done for end the run before anything is done for the others.

    Raises:
        FetchError: there are some; each is named, with where it was looked for and where it is to be had by hand.
    """
    lines = []
    for action in actions:
        if action.kind == "missing":
            looked = ", ".join([str(action.path), *map(without_password, places)])
            lines.append(f"  {action.file.name}: looked for in {looked}")
            lines += [f"    to be had from {url}" for url in action.file.urls]
    if lines:
        raise FetchError(
            f"Files of {manifest.name} are missing, and without a network there is no source for them:\n"
            + "\n".join(lines)
            + "\nRun it without --offline, or get them by hand, put them into a folder, and run: "
            + f"{fetch_command(manifest, root)} --from FOLDER"
        )


@contextmanager
def _locked(folder: DatasetFolder, say: Notify) -> Iterator[None]:
    """Hold the dataset's lock.

    Raises:
        WriteError: the lock's file cannot be made.
    """
    lock = FileLock(folder.lock)
    with writing(folder.lock):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"Another process is at work on {folder.path}; waiting until it is done.")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _Meter:
    """A bar that is told where a file stands, which may be less than before."""

    def __init__(self, advance: Callable[[int], object]) -> None:
        self._advance = advance
        self._position = 0

    def at(self, position: int) -> None:
        self._advance(position - self._position)
        self._position = position


@dataclass(frozen=True)
class _Work:
    """What all files of one run share. Its methods do what a plan says."""

    folder: DatasetFolder
    command: str
    session: requests.Session
    network: Network
    progress: Progress
    say: Notify

    def all(self, actions: Sequence[Action]) -> list[Fetched]:
        """Every file that can be had.

        Raises:
            FetchError: some could not; the others are there.
        """
        done, failed = [], []
        for action in actions:
            try:
                done.append(self.one(action))
            except FetchError as error:
                failed.append(str(error))
        if failed:
            raise FetchError("\n".join(failed))
        return done

    def one(self, action: Action) -> Fetched:
        """One file.

        Raises:
            FetchError: it could not be had.
            WriteError: it could not be written.
        """
        file, start = action.file, time.monotonic()
        if action.kind == "have":
            return _had(self.folder, file)
        if action.path.is_dir():
            raise WriteError(f"{action.path} is a folder, where a file should be. Move it elsewhere.")
        with self.progress(file.name, file.bytes, "B") as advance:
            how, source, verdict = self.get(action, _Meter(advance))
        if verdict.checked_by is None:
            raise AssertionError(f"{file.name} was taken though it is wrong")
        if how != "had":
            with writing(action.path):
                commit(action.path)
        self.seal(action, verdict.sha256)
        size, seconds = action.path.stat().st_size, time.monotonic() - start
        return Fetched(file.name, how, source, size, verdict.sha256, verdict.checked_by, seconds)

    def get(self, action: Action, meter: _Meter) -> tuple[How, str, Verdict]:
        """A verified file under its temporary name, or under its final one if it was there."""
        kind = action.kind
        if kind == "have" or kind == "check":
            return "had", "", self.check(action, meter)
        if kind == "generate":
            return "generated", "", self.generate(action, meter)
        if kind == "resume" or kind == "download":
            return self.download(action, meter)
        if kind == "missing":
            raise FetchError(f"There is no source for {action.file.name}.")
        assert_never(kind)

    def check(self, action: Action, meter: _Meter) -> Verdict:
        """A file that is there without a receipt. It may be the user's own, so that nothing is done to a wrong one.

        Raises:
            FetchError: it is another file.
        """
        seen = 0

        def advance(count: int) -> None:
            nonlocal seen
            seen += count
            meter.at(seen)

        verdict = judge(action.path, action.file, advance)
        if verdict.checked_by is None:
            raise FetchError(
                f"{action.path} is not the right file: {verdict.problem}. Delete it or move it elsewhere, and run: "
                f"{self.command}"
            )
        return verdict

    def generate(self, action: Action, meter: _Meter) -> Verdict:
        """Draw an embedded dataset.

        Raises:
            FetchError: the program drew something else than it should.
        """
        from mamldata.glyphs import write_archive

        part = Part(action.path)
        self.require_space(action, 0)
        with writing(part.path):
            write_archive(part.path)
        verdict = judge(part.path, action.file)
        if verdict.checked_by is None:
            part.drop()
            raise FetchError(
                f"{action.file.name}, drawn on this machine, came out different: {verdict.problem}. "
                "This is a bug: please report it with the output of: mamldata doctor"
            )
        meter.at(action.file.bytes)
        return verdict

    def download(self, action: Action, meter: _Meter) -> tuple[How, str, Verdict]:
        """Try all sources in turn, and again, until one gives the file.

        Raises:
            FetchError: none did; every one is named with its last failure.
        """
        file, part = action.file, Part(action.path)
        if verdict := _finished(part, file):
            meter.at(part.size)
            return "resumed", "", verdict
        meter.at(action.have_bytes)
        self.require_space(action, part.size)
        alive, failures = list(action.sources), dict.fromkeys(action.sources, "not tried")
        vain_rounds, most = 0, part.size
        while True:
            asked = 0.0
            for source in tuple(alive):
                try:
                    how, verdict = self.attempt(source, file, part, meter)
                    return how, without_password(source), verdict
                except SourceError as error:
                    failures[source] = str(error)
                    asked = max(asked, error.retry_after)
                    self.say(f"{file.name}: {without_password(source)}: {error}")
                    if error.final:
                        alive.remove(source)
            # A bad line that brings some of the file each time is still a line.
            vain_rounds = 0 if part.size >= most + _HEADWAY else vain_rounds + 1
            most = max(most, part.size)
            if not alive or vain_rounds >= self.network.rounds:
                raise FetchError(_nothing_helped(file, failures, part.size, self.command))
            pause = self.network.pause(vain_rounds, asked)
            self.say(f"{file.name}: trying again in {pause:.0f} s")
            time.sleep(pause)

    def attempt(self, source: str, file: SourceFile, part: Part, meter: _Meter) -> tuple[How, Verdict]:
        """One source, once; twice if what was there before turns out to be of another file.

        Raises:
            SourceError: it did not give the right file.
        """
        if not is_http(source):
            _copy(source, part, most_bytes(file), meter)
            return "copied" if is_local(source) else "downloaded", _accept(part, file)
        began = part.size
        try:
            resumed = transfer(self.session, source, part, most_bytes(file), self.network, meter.at)
            return "resumed" if resumed else "downloaded", _accept(part, file, keep=resumed)
        except UnusableRangeError:
            resumed = True
            if verdict := _right(part, file):
                return "resumed", verdict
        except _WrongContentError:
            if not resumed:
                raise
        self.say(
            f"{file.name}: its first {began:,} bytes, from before, are of another version; starting anew"
        )
        part.drop()
        meter.at(0)
        transfer(self.session, source, part, most_bytes(file), self.network, meter.at)
        return "downloaded", _accept(part, file)

    def seal(self, action: Action, digest: str) -> None:
        """Make a verified file read-only and write its receipt.

        Raises:
            WriteError: the receipt cannot be written.
        """
        # Whoever put it there by hand may own it, or may only have linked to it.
        if not action.path.is_symlink():
            with suppress(PermissionError):
                action.path.chmod(0o444)
        write_receipt(self.folder, action.file.name, digest)
        Part(action.path).forget()

    def require_space(self, action: Action, have: int) -> None:
        """Say at once that a file does not fit, not after an hour.

        Raises:
            WriteError: the disk has less free space than the rest of the file takes.
        """
        need, free = action.file.bytes - have, shutil.disk_usage(action.path.parent).free
        if need > free:
            raise WriteError(
                f"{action.file.name} needs {need:,} more bytes in {action.path.parent}, where {free:,} are free. "
                "Free some space, or choose another folder with --root."
            )


class _WrongContentError(SourceError):
    """A whole file came, and it is another one."""


def _right(part: Part, file: SourceFile) -> Verdict | None:
    verdict = judge(part.path, file)
    return verdict if verdict.checked_by else None


def _finished(part: Part, file: SourceFile) -> Verdict | None:
    """The verdict on a part that was whole when we were killed; one that can become nothing any more is dropped."""
    if part.size < file.bytes:
        return None
    verdict = _right(part, file)
    # A repacked copy may be longer than the file that the manifest describes.
    if verdict is None and (file.content_sha256 is None or part.size > most_bytes(file)):
        part.drop()
    return verdict


def _accept(part: Part, file: SourceFile, *, keep: bool = False) -> Verdict:
    """The verdict on what came, if it is the file.

    Args:
        part: what came.
        file: what it should be.
        keep: leave wrong bytes where they are.

    Raises:
        _WrongContentError: it is another file.
        SourceError: it ended too early; what came is kept, since the rest may follow.
    """
    verdict = judge(part.path, file)
    if verdict.checked_by:
        return verdict
    # A container that can be read to its end is whole, whatever its length.
    if part.size < file.bytes and verdict.content_sha256 is None:
        raise SourceError(f"it ended after {part.size:,} of {file.bytes:,} bytes")
    if not keep:
        part.drop()
    raise _WrongContentError(f"another file came: {verdict.problem}", final=True)


def _copy(source: str, part: Part, bound: int, meter: _Meter) -> None:
    """Copy a whole file from a folder, or from what fsspec reads.

    Raises:
        SourceError: it cannot be read, or is too large.
    """
    part.forget()
    size = 0
    with part.writer(0) as target:
        for chunk in _source_chunks(source):
            size += len(chunk)
            if size > bound:
                raise SourceError(f"it has more than the {bound:,} bytes that the file may have", final=True)
            target.write(chunk)
            meter.at(size)


def _source_chunks(source: str) -> Iterator[bytes]:
    try:
        with open_source(source) as stream:
            yield from chunks(stream)
    except Exception as error:  # each of fsspec's file systems has exceptions of its own
        raise SourceError(
            f"cannot be read ({error or type(error).__name__})", final=is_local(source)
        ) from error


def _nothing_helped(file: SourceFile, failures: dict[str, str], kept: int, command: str) -> str:
    """The message for a file that no source gave."""
    tried = "".join(f"\n  {without_password(source)}: {failure}" for source, failure in failures.items())
    rest = (
        f"\n{kept:,} of {file.bytes:,} bytes are kept; the same command goes on from there." if kept else ""
    )
    by_hand = (
        f"\nOr get it by hand, from {file.urls[0]}, say, put it" if file.urls else "\nGet it by hand, put it"
    )
    return (
        f"{file.name} could not be had. Tried:{tried}{rest}{by_hand} into a folder as {file.name}, and run: "
        f"{command} --from FOLDER"
    )
