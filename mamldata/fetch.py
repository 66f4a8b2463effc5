"""Fetch: get the raw files of a dataset, verify each, keep them read-only.

``plan`` decides and ``fetch`` does it. A file gets its final name when it is whole and verified, never before; a
process that dies at any moment leaves a partial file that the next one goes on with.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Literal
from urllib.parse import urlsplit

import fsspec
import requests
from filelock import FileLock, Timeout

from mamldata.digest import chunks
from mamldata.download import Network, StartAnewError, TransferError, WrongContentError, download, notes
from mamldata.errors import FetchError, RequestError, WriteError
from mamldata.files import commit, make_folder, temporary, writing
from mamldata.manifest import Manifest, SourceFile
from mamldata.progress import Progress, silent
from mamldata.raw import Check, CheckedBy, check_file, most_bytes, write_receipt
from mamldata.root import DatasetFolder

Kind = Literal["have", "check", "generate", "resume", "download", "missing"]
_WEB = ("http", "https")
_LOCAL = ("", "file", "local")


@dataclass(frozen=True)
class Action:
    """What must be done for one file; only a decision.

    Attributes:
        file: the file.
        kind: ``have``: nothing. ``check``: it is there, but was never verified. ``generate``: a program draws it.
            ``download``, or ``resume`` behind ``have_bytes``: from one of the sources. ``missing``: there is none.
        path: its final place.
        sources: paths and addresses in the order in which they are tried.
        have_bytes: of the partial file.
    """

    file: SourceFile
    kind: Kind
    path: Path
    sources: tuple[str, ...]
    have_bytes: int


@dataclass(frozen=True)
class Fetched:
    """What was done for one file.

    Attributes:
        name: of the file.
        how: ``had``, ``checked``, ``generated``, ``copied``, ``downloaded`` or ``resumed``.
        source: where it came from; empty if it was there, or generated.
        bytes, sha256: of what is there now.
        checked_by: which of the manifest's digests it has; None if it was there and its receipt was taken for it.
        seconds: that it took.
    """

    name: str
    how: str
    source: str
    bytes: int
    sha256: str
    checked_by: CheckedBy | None
    seconds: float


def plan(manifest: Manifest, root: Path, sources: Sequence[str] = (), *, offline: bool = False) -> list[Action]:
    """Decide what must be done. Looks at the disk, and touches neither it nor the network.

    Args:
        manifest: the dataset.
        root: the data root.
        sources: places put in front of the manifest's addresses: folders, or addresses that ``/<name>`` is added to.
        offline: leave out everything that needs a network.

    Raises:
        RequestError: a place that is neither a folder nor an address.
    """
    folder = DatasetFolder(root, manifest.name)
    places = [_place(source) for source in sources]
    return [_action(file, folder, places, offline) for file in manifest.files]


def _place(source: str) -> str:
    scheme = urlsplit(source).scheme if "://" in source else ""
    if scheme not in _LOCAL:
        return source.rstrip("/")
    path = Path(urlsplit(source).path if scheme else source).expanduser()
    if not path.is_dir():
        raise RequestError(f"--from {source}: there is no such folder, and it is no address such as https://…")
    return str(path)


def _action(file: SourceFile, folder: DatasetFolder, places: Sequence[str], offline: bool) -> Action:
    path, part = folder.raw / file.name, temporary(folder.raw / file.name)
    have = part.stat().st_size if part.is_file() else 0
    sources = tuple(_sources(file, places, offline))
    if path.is_file():
        kind: Kind = "have" if folder.receipt(file.name).is_file() else "check"
    elif file.generator:
        kind = "generate"
    elif not sources:
        kind = "missing"
    else:
        kind = "resume" if have else "download"
    return Action(file, kind, path, sources, have)


def _sources(file: SourceFile, places: Sequence[str], offline: bool) -> list[str]:
    found = []
    for place in places:
        if "://" in place:
            found += [] if offline else [f"{place}/{file.name}"]
        elif (Path(place) / file.name).is_file():
            found.append(str(Path(place) / file.name))
    return found if offline else [*found, *file.urls]


def fetch(
    manifest: Manifest,
    root: Path,
    sources: Sequence[str] = (),
    *,
    offline: bool = False,
    progress: Progress = silent,
    network: Network | None = None,
    notify: Callable[[str], object] = lambda _: None,
) -> list[Fetched]:
    """Get all raw files of a dataset and verify them. What is there already is left alone.

    Args:
        manifest, root, sources, offline: see ``plan``.
        progress: told of bytes, a bar for each file.
        network: the patience with servers.
        notify: told what is worth saying meanwhile.

    Raises:
        RequestError: a place that is neither a folder nor an address.
        FetchError: a file could not be had from any source, or is not the right one; all sources are named.
        WriteError: the place cannot be written to.
    """
    plan(manifest, root, sources, offline=offline)  # refuses a wrong place before anything is made
    folder = DatasetFolder(root, manifest.name)
    make_folder(folder.raw)
    lock = FileLock(folder.lock)
    with writing(folder.lock):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            notify(f"Another process is at work on {folder.path}; waiting for it.")
            lock.acquire()
    try:
        # Planned again: the other process may have done it all.
        actions = plan(manifest, root, sources, offline=offline)
        _require_sources(manifest, actions)
        with requests.Session() as session:
            fetcher = _Fetcher(manifest, folder, session, network or Network(), progress, notify)
            return [fetcher.run(action) for action in actions]
    finally:
        lock.release()


def _require_sources(manifest: Manifest, actions: Sequence[Action]) -> None:
    missing = [action for action in actions if action.kind == "missing"]
    if missing:
        lines = [f"  {action.file.name}: from {', '.join(action.file.urls)}" for action in missing]
        raise FetchError(
            "These files are not here, and without a network there is no source for them. Get them in any way, put "
            f"them in a folder, and run: mamldata fetch {manifest.reference} --from FOLDER\n" + "\n".join(lines)
        )


class _Fetcher:
    """Carries out actions; what one run of ``fetch`` shares."""

    def __init__(
        self,
        manifest: Manifest,
        folder: DatasetFolder,
        session: requests.Session,
        network: Network,
        progress: Progress,
        notify: Callable[[str], object],
    ) -> None:
        self.manifest = manifest
        self.folder = folder
        self.session = session
        self.network = network
        self.progress = progress
        self.notify = notify

    def run(self, action: Action) -> Fetched:
        start = time.monotonic()
        how, source, check = self._carry_out(action)
        size = action.path.stat().st_size
        return Fetched(action.file.name, how, source, size, check.sha256, check.checked_by, time.monotonic() - start)

    def _carry_out(self, action: Action) -> tuple[str, str, Check]:
        file, path = action.file, action.path
        if action.kind == "have":
            return "had", "", Check(self.folder.receipt(file.name).read_text().split(" ", 1)[0], None)
        if action.kind == "check":
            return "checked", "", self._take(path, file)
        if action.kind == "generate":
            with writing(path):
                # The manifest's own vocabulary: each generator is a module of that name.
                import_module(f"mamldata.{file.generator}").write_archive(temporary(path))
            return "generated", "", self._accept(file, path, self._checked(temporary(path), file))
        return self._from_sources(action)

    def _take(self, path: Path, file: SourceFile) -> Check:
        """Verify a file that somebody put in its place; it is never deleted."""
        check = self._checked(path, file)
        if check.checked_by is None:
            raise FetchError(
                f"{path} is not the right file: {check.problem}. Move it elsewhere and run the same command again."
            )
        with writing(path):
            path.chmod(0o444)
        write_receipt(self.folder, file.name, check.sha256)
        return check

    def _from_sources(self, action: Action) -> tuple[str, str, Check]:
        """Try all sources in turn, several rounds of them."""
        file, part = action.file, temporary(action.path)
        failures: dict[str, str] = {}
        live = list(action.sources)
        for turn in range(self.network.rounds):
            pause = 0.0
            for source in list(live):
                begun = part.stat().st_size if part.is_file() else 0
                try:
                    check = self._attempt(source, file, part)
                except WrongContentError as error:
                    live.remove(source)
                    failures[source] = str(error)
                except TransferError as error:
                    failures[source] = str(error)
                    pause = max(pause, error.retry_after)
                else:
                    how = "downloaded" if _scheme(source) in _WEB else "copied"
                    return "resumed" if begun else how, source, self._accept(file, action.path, check)
                self.notify(f"{file.name}: {source}: {failures[source]}")
            if not live:
                break
            if turn + 1 < self.network.rounds:
                time.sleep(min(self.network.longest_pause, max(pause, self.network.backoff * 2**turn)))
        raise self._failed(file, failures)

    def _attempt(self, source: str, file: SourceFile, part: Path) -> Check:
        """One source: the rest of the file, then its digest; from the beginning if what was there does not fit."""
        begun = part.stat().st_size if part.is_file() else 0
        try:
            self._transfer(source, file, part)
            check = self._checked(part, file)
        except StartAnewError:
            if not begun:
                raise
            check = None
        if check is None or (check.checked_by is None and begun):
            # The beginning came from another source, or the file changed meanwhile.
            _drop(part)
            self._transfer(source, file, part)
            check = self._checked(part, file)
        if check.checked_by is None:
            _drop(part)
            raise WrongContentError(f"what came is not the file: {check.problem}")
        return check

    def _transfer(self, source: str, file: SourceFile, part: Path) -> None:
        have = part.stat().st_size if part.is_file() else 0
        if have > most_bytes(file):
            raise StartAnewError("the partial file is longer than the file")
        _require_space(part, file.bytes - have)
        with self.progress(file.name, file.bytes, "B") as advance:
            advance(have)
            if _scheme(source) in _WEB:
                if have < file.bytes:
                    download(
                        self.session,
                        source,
                        part,
                        expected=file.bytes,
                        limit=most_bytes(file),
                        network=self.network,
                        advance=advance,
                    )
            else:
                _copy(source, part, most_bytes(file), advance)

    def _checked(self, path: Path, file: SourceFile) -> Check:
        with self.progress(f"verify {file.name}", path.stat().st_size, "B") as advance:
            return check_file(path, file, advance)

    def _accept(self, file: SourceFile, path: Path, check: Check) -> Check:
        """Give a verified file its final name, and write its receipt."""
        if check.checked_by is None:
            _drop(temporary(path))
            raise FetchError(f"{file.name} came out wrong on this machine: {check.problem}. Please report it.")
        with writing(path):
            commit(path)
            path.chmod(0o444)
        notes(temporary(path)).unlink(missing_ok=True)
        write_receipt(self.folder, file.name, check.sha256)
        return check

    def _failed(self, file: SourceFile, failures: dict[str, str]) -> FetchError:
        lines = "\n".join(f"  {source}: {reason}" for source, reason in failures.items())
        return FetchError(
            f"{file.name} could not be fetched:\n{lines}\nRun the same command again later: it goes on from what is "
            f"there. Or get the file in any way (sha256 {file.sha256}), put it in a folder, and run: "
            f"mamldata fetch {self.manifest.reference} --from FOLDER"
        )


def _scheme(source: str) -> str:
    return urlsplit(source).scheme if "://" in source else ""


def _drop(part: Path) -> None:
    with writing(part):
        part.unlink(missing_ok=True)
        notes(part).unlink(missing_ok=True)


def _require_space(part: Path, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise WriteError(
            f"{part.parent} has {free:,} bytes free, and {part.name.removesuffix('.part')} needs {needed:,} more. Free "
            "some space, or choose another --root, and run the same command again."
        )


def _copy(source: str, part: Path, limit: int, advance: Callable[[int], object]) -> None:
    """Copy a file from a folder, or from whatever fsspec opens, behind what is there of it."""
    try:
        with _opened(source) as origin, writing(part), part.open("ab") as target:
            origin.seek(target.tell())
            for chunk in chunks(origin):
                if target.tell() + len(chunk) > limit:
                    target.truncate(0)
                    raise WrongContentError(f"it has more than the {limit:,} bytes that the file can be")
                target.write(chunk)
                advance(len(chunk))
    except ImportError as error:
        raise WrongContentError(f"a package is missing to read it: {error}") from error
    except (OSError, ValueError) as error:
        raise TransferError(f"it cannot be read ({error})") from error


def _opened(source: str) -> IO[bytes]:
    if _scheme(source):
        stream: IO[bytes] = fsspec.open(source, "rb").open()
        return stream
    return Path(os.fspath(source)).open("rb")
