"""Carry out the plan: fetch a dataset's raw files, verify each, and keep them read-only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import requests

from mamldata.datasets.manifest import COLLECTED, Manifest, SourceFile
from mamldata.datasets.paths import DatasetFolder
from mamldata.errors import DamagedError, FetchError, MamldataError, WriteError
from mamldata.fetching.collect import check_collected, collect
from mamldata.fetching.http import Network, Part, open_session
from mamldata.fetching.mirrors import Mirrors
from mamldata.fetching.plan import Action, plan
from mamldata.fetching.receipts import (
    CheckedBy,
    Collected,
    Match,
    Receipt,
    Verdict,
    fetch_command,
    pin_file,
    read_pin,
    read_receipt,
    receipt_of,
    verify_file,
    write_pin,
    write_receipt,
)
from mamldata.io.atomic import commit, locked, make_folder, require_space, temporary, writing
from mamldata.io.digest import sha256_file
from mamldata.io.urls import shown_place
from mamldata.progress import Advance, Notify, Progress, silence, silent

__all__ = ["Action", "Fetched", "Network", "fetch", "plan"]
_PATIENT = Network()
How = Literal["had", "checked", "copied", "downloaded", "resumed", "generated", "collected"]


@dataclass(frozen=True)
class Fetched:
    """One file that now exists.

    Attributes:
        name: its file name.
        how: what this run did to obtain it.
        source: where it came from; empty if it existed before.
        bytes: its length.
        sha256: its digest; a repacked container has its own.
        checked_by: which of the manifest's digests matches; for collected images, the pinned one.
        seconds: how long it took.
        images: number of images collected or checked.
        content_sha256: their content digest, which is pinned.
    """

    name: str
    how: How
    source: str
    bytes: int
    sha256: str
    checked_by: CheckedBy
    seconds: float
    images: int | None = None
    content_sha256: str | None = None


def fetch(
    manifest: Manifest,
    root: Path,
    sources: Sequence[str] = (),
    *,
    offline: bool = False,
    progress: Progress = silent,
    network: Network = _PATIENT,
    notify: Notify = silence,
) -> list[Fetched]:
    """Fetch every raw file of a dataset. Existing files are left alone; interrupted downloads are resumed.

    A file gets its final name only when it is complete and verified. If the process is killed, the same call resumes.

    Args:
        manifest: the dataset.
        root: the data root.
        sources: places to look in before the manifest's own: folders, http(s) addresses, fsspec URLs.
        offline: do not use the network.
        progress: one bar of bytes per file; if a download restarts, the discarded bytes are subtracted.
        network: timeouts and retries.
        notify: called with one line for each wait and each failed attempt.

    Raises:
        RequestError: a place is neither an existing folder nor a URL that can be read.
        FetchError: files could not be fetched or are the wrong ones; all are named, with every source tried.
        WriteError: the root cannot be written to, or the disk is full.
    """
    actions = plan(manifest, root, sources, offline=offline)
    if any(action.kind != "have" for action in actions):
        _require_sources(manifest, root, actions, sources, offline)
        folder = manifest.home(root)
        make_folder(folder.raw)

        def waiting() -> None:
            notify(f"Another process is working on {folder.path}; waiting until it is done.")

        with locked(folder.lock, waiting), closing(open_session()) as session:
            # Again, because the process that held the lock may have fetched everything.
            actions = plan(manifest, root, sources, offline=offline)
            work = _Work(manifest, folder, fetch_command(manifest, root), session, network, progress, notify)
            return work.all(actions)
    return [_had(manifest.home(root), action.file) for action in actions]


def _had(folder: DatasetFolder, file: SourceFile) -> Fetched:
    receipt, size = read_receipt(folder, file.name), (folder.raw / file.name).stat().st_size
    assert receipt is not None  # the plan read it
    checked_by = receipt.match.checked_by if receipt.match else "sha256"
    pin = read_pin(folder.raw) if file.name == COLLECTED else None
    of_images = (pin.images, pin.content_sha256) if pin else ()
    return Fetched(file.name, "had", "", size, receipt.sha256, checked_by, 0.0, *of_images)


def _require_sources(
    manifest: Manifest, root: Path, actions: Sequence[Action], places: Sequence[str], offline: bool
) -> None:
    """Stop the run before it starts if files have no source.

    Raises:
        FetchError: some have none; each is named, with the places searched and where to get it by hand.
    """
    lines = []
    for action in actions:
        if action.kind == "missing":
            looked = ", ".join([str(action.path), *map(shown_place, places)])
            lines.append(f"  {action.file.name}: looked for in {looked}")
            lines += [f"    available from {shown_place(url)}" for url in action.file.urls]
            lines += [f"    {line}" for line in action.file.how.splitlines()]
    if lines:
        why = "and downloads are turned off (offline)" if offline else "and there is no source for them"
        raise FetchError(
            f"Files of {manifest.name} are missing, {why}:\n"
            + "\n".join(lines)
            + f"\nGet them by hand, put them into a folder, and run: {fetch_command(manifest, root)} --from FOLDER"
        )


class _Meter:
    """A progress bar set to absolute positions, which may also go back."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._position = 0

    def at(self, position: int) -> None:
        self._advance(position - self._position)
        self._position = position

    def advance(self, count: int) -> None:
        self.at(self._position + count)


@dataclass(frozen=True)
class _Work:
    """What all files of one run share. Its methods carry out a plan."""

    manifest: Manifest
    folder: DatasetFolder
    command: str
    session: requests.Session
    network: Network
    progress: Progress
    notify: Notify

    def all(self, actions: Sequence[Action]) -> list[Fetched]:
        """Fetch every file that is available.

        Raises:
            FetchError: some could not be fetched; the others were.
        """
        done: list[Fetched] = []
        failed: list[str] = []
        for action in actions:
            if failed and action.file.name == COLLECTED:
                break  # the files say which images are wanted
            try:
                done.append(self.one(action))
            except (FetchError, DamagedError) as error:
                failed.append(str(error))
        if failed:
            raise FetchError("\n".join(failed))
        return done

    def one(self, action: Action) -> Fetched:
        """Fetch one file.

        Raises:
            FetchError: it could not be fetched.
            WriteError: it could not be written.
        """
        file, path, start = action.file, action.path, time.monotonic()
        if action.kind == "have":
            return _had(self.folder, file)
        if path.is_dir():
            raise WriteError(f"{path} is a folder, but should be a file. Move it elsewhere.")
        if file.name == COLLECTED:
            return self._images(action, start)
        with self.progress(file.name, file.bytes or None, "B") as advance:
            how, source, verdict = self._get(action, _Meter(advance))
        if how != "checked":
            with writing(path):
                commit(path)
        size = path.stat().st_size
        self._seal(action, receipt_of(verdict, file, size))
        assert verdict.checked_by is not None
        return Fetched(file.name, how, source, size, verdict.sha256, verdict.checked_by, time.monotonic() - start)

    def _get(self, action: Action, meter: _Meter) -> tuple[How, str, Verdict]:
        """How and from where a correct file came, and its verdict; it has its final name only if it existed before."""
        match action.kind:
            case "check":
                return "checked", "", self._check(action, meter)
            case "generate":
                return "generated", "", self._generate(action, meter)
            case "resume" | "download":
                return self._download(action, meter)
            case _:
                raise FetchError(f"There is no source for {action.file.name}. Run again: {self.command}")

    def _images(self, action: Action, start: float) -> Fetched:
        """Collect the images, or check those collected before, and pin them.

        Raises:
            FetchError: there are none, or they differ from the pinned ones.
            DatasetError: some are missing or cannot be read.
        """
        raw, path = self.folder.raw, action.path
        if action.found is not None:
            try:
                collected = collect(self.manifest, action.found, raw, path, self.progress)
                self._pin(action, collected)
            except MamldataError:
                temporary(path).unlink(missing_ok=True)
                raise
            with writing(path):
                commit(path)
        elif path.is_file():
            collected = check_collected(self.manifest, raw, path, self.progress)
            self._pin(action, collected)
        else:
            raise FetchError(f"No source has the images of {self.manifest.name}. Run again: {self.command}")
        digest, size = sha256_file(path), path.stat().st_size
        self._seal(action, Receipt(digest, Match("content_sha256", collected.content_sha256, size)))
        how: How = "collected" if action.found else "checked"
        return Fetched(
            path.name,
            how,
            "".join(action.sources),
            size,
            digest,
            "content_sha256",
            time.monotonic() - start,
            collected.images,
            collected.content_sha256,
        )

    def _pin(self, action: Action, collected: Collected) -> None:
        """Pin the first good images, which every later fetch must bring again.

        Raises:
            FetchError: these differ from the pinned ones.
        """
        assert self.manifest.images is not None
        pin, wanted = read_pin(self.folder.raw), self.manifest.images.content_sha256
        known = wanted or (pin.content_sha256 if pin else collected.content_sha256)
        if collected.content_sha256 != known:
            why = "the manifest" if wanted else f"pinned in {pin_file(self.folder.raw)} at the first fetch"
            raise FetchError(
                f"{action.path.name}: these are other images: content digest {collected.content_sha256}, expected "
                f"{known} ({why}). {'' if wanted else 'If these are the images that you want, delete that file. '}"
                f"Then run: {self.command} --from FOLDER"
            )
        write_pin(self.folder.raw, collected)

    def _check(self, action: Action, meter: _Meter) -> Verdict:
        """Verify a file that has no receipt. It may be the user's own, so a wrong one is left alone.

        Raises:
            FetchError: it is another file.
        """
        verdict = verify_file(action.path, action.file, meter.advance)
        if verdict.checked_by is None:
            raise FetchError(
                f"{action.path} is not the right file: {verdict.problem}. Delete it or move it elsewhere, and run: "
                f"{self.command}"
            )
        return verdict

    def _generate(self, action: Action, meter: _Meter) -> Verdict:
        """Draw an embedded dataset.

        Raises:
            FetchError: the drawn file has the wrong digest.
        """
        from mamldata.datasets.glyphs import write_archive

        part = Part(action.path)
        require_space(action.path, action.file.bytes)
        with writing(part.path):
            write_archive(part.path)
        verdict = verify_file(part.path, action.file)
        if verdict.checked_by is None:
            part.drop()
            raise FetchError(
                f"{action.file.name} was drawn differently on this machine: {verdict.problem}. "
                "This is a bug: please report it with the output of: mamldata doctor"
            )
        meter.at(action.file.bytes)
        return verdict

    def _download(self, action: Action, meter: _Meter) -> tuple[How, str, Verdict]:
        """Get a file from its sources, continuing the download that an earlier run left."""
        file, part = action.file, Part(action.path)
        meter.at(part.size)
        require_space(action.path, action.file.bytes - part.size)
        got = Mirrors(
            file, action.sources, part, self.session, self.network, meter.at, self.notify, self.command
        ).obtain()
        return got.how, got.source, got.verdict

    def _seal(self, action: Action, receipt: Receipt) -> None:
        """Make a verified file read-only and write its receipt.

        Raises:
            WriteError: the receipt cannot be written.
        """
        # A file put there by hand may belong to another user, or be a link.
        if not action.path.is_symlink():
            with suppress(PermissionError):
                action.path.chmod(0o444)
        # The receipt is last: until it exists, the next run repeats these steps.
        Part(action.path).drop()
        write_receipt(self.folder, action.file.name, receipt)
