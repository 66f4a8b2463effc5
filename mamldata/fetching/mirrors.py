"""Try the sources of one file in turn, repeatedly, until one provides the right file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import requests

from mamldata.datasets.manifest import SourceFile
from mamldata.errors import FetchError
from mamldata.fetching.http import (
    GaveUpError,
    Network,
    Part,
    SourceError,
    UnusableRangeError,
    keep_trying,
    transfer,
)
from mamldata.fetching.receipts import Verdict, most_bytes, verify_file
from mamldata.io.digest import chunks
from mamldata.io.urls import is_http, is_local, open_source, shown_cause, shown_error, shown_place
from mamldata.progress import Advance, Notify


class WrongContentError(SourceError):
    """A complete file arrived, but it is the wrong one."""


@dataclass(frozen=True)
class Obtained:
    """A correct file, still under its temporary name: how it was obtained, and from which source, if any."""

    how: Literal["copied", "downloaded", "resumed"]
    source: str
    verdict: Verdict


@dataclass(frozen=True)
class Mirrors:
    """Everything needed to get one file.

    Attributes:
        file: the wanted file.
        sources: paths and URLs, in order.
        part: the bytes so far.
        session: for the http(s) sources.
        network: timeouts and retries.
        at: called with the number of bytes so far.
        notify: called with one line for each failed attempt.
        command: the command that fetches the dataset, for messages.
    """

    file: SourceFile
    sources: tuple[str, ...]
    part: Part
    session: requests.Session
    network: Network
    at: Advance
    notify: Notify
    command: str

    def obtain(self) -> Obtained:
        """Try all sources in turn, pause, and try those again that may succeed then.

        Raises:
            FetchError: no source provided the file; each is named with its last failure.
            WriteError: the part cannot be written.
        """
        if (finished := self._finished()) is not None:
            return finished
        try:
            return keep_trying(self.sources, self._attempt, self.part, self.network, self._tell)
        except GaveUpError as error:
            raise FetchError(self._nothing_helped(error.failures)) from error

    def _tell(self, line: str) -> None:
        self.notify(f"{self.file.name}: {line}")

    def _finished(self) -> Obtained | None:
        """The part of an earlier run, if it is already the whole file; it is dropped if it can never become it."""
        if not self.part.size or self.part.size < self.file.bytes:
            return None
        verdict = verify_file(self.part.path, self.file)
        if verdict.checked_by:
            return Obtained("resumed", "", verdict)
        # A repacked copy may be longer than the manifest's file, and a file of unknown length may continue.
        fixed = self.file.bytes and self.file.content_sha256 is None
        if fixed or self.part.size > most_bytes(self.file):
            self.part.drop()
        return None

    def _attempt(self, source: str) -> Obtained:
        """Try one source once.

        Raises:
            SourceError: it did not provide the right file.
        """
        shown = shown_place(source)
        if not is_http(source):
            how: Literal["copied", "downloaded"] = "copied" if is_local(source) else "downloaded"
            return Obtained(how, shown, self._copy(source))
        if had := self.part.size:
            if (obtained := self._go_on(source)) is not None:
                return obtained
            self._tell(f"the first {had:,} bytes, from before, are not of this file; starting again")
            self.part.drop()
        self._transfer(source)
        return Obtained("downloaded", shown, self._accept())

    def _go_on(self, url: str) -> Obtained | None:
        """Download the missing bytes; None if the existing ones turn out to be of another file.

        Raises:
            SourceError: the server failed, or sent a complete but wrong file.
        """
        resumed = True
        try:
            resumed = self._transfer(url)
            verdict = self._accept()
        except UnusableRangeError:
            # The server has no more bytes if the file was already complete.
            verdict = verify_file(self.part.path, self.file)
            if verdict.checked_by is None:
                return None
        except WrongContentError:
            if resumed:
                return None
            raise
        return Obtained("resumed" if resumed else "downloaded", shown_place(url), verdict)

    def _transfer(self, url: str) -> bool:
        return transfer(self.session, url, self.part, most_bytes(self.file), self.network, self.at)

    def _accept(self, *, ended: bool = False) -> Verdict:
        """Verify the part and return the verdict if it is the right file.

        Args:
            ended: no more bytes can follow.

        Raises:
            WrongContentError: it is another file; the part is dropped.
            SourceError: it ended too early; the part is kept, since the rest may follow.
        """
        verdict = verify_file(self.part.path, self.file)
        if verdict.checked_by:
            return verdict
        # A container that can be read to its end is complete, whatever its length.
        if not ended and self.part.size < self.file.bytes and verdict.content_sha256 is None:
            raise SourceError(f"it ended after {self.part.size:,} of {self.file.bytes:,} bytes")
        self.part.drop()
        raise WrongContentError(f"another file came: {verdict.problem}", final=True)

    def _copy(self, source: str) -> Verdict:
        """Copy a whole file from a folder or an fsspec URL.

        Raises:
            SourceError: it cannot be read, is too large, or is another file.
        """
        bound = most_bytes(self.file)
        self.part.forget()
        size = 0
        with self.part.writer(0) as target:
            for chunk in _source_chunks(source):
                size += len(chunk)
                if size > bound:
                    raise SourceError(f"it has more than {bound:,} bytes, the limit for this file", final=True)
                target.write(chunk)
                self.at(size)
        return self._accept(ended=True)

    def _nothing_helped(self, failures: Mapping[str, SourceError]) -> str:
        name, size = self.file.name, self.part.size
        lines = [f"{name} could not be fetched. Tried:"]
        lines += [f"  {shown_place(source)}: {failure}" for source, failure in failures.items()]
        if size:
            lines.append(f"{size:,} of {self.file.bytes:,} bytes are kept; the same command resumes there.")
        web = [source for source in self.sources if is_http(source)]
        origin = f" from {shown_place(web[-1])}" if web else ""
        lines.append(f"Or get it by hand{origin}, put it into a folder, and run: {self.command} --from FOLDER")
        return "\n".join(lines)


def _source_chunks(source: str) -> Iterator[bytes]:
    try:
        with open_source(source) as stream:
            yield from chunks(stream)
    except Exception as error:  # each of fsspec's file systems has its own exceptions
        final = is_local(source) or isinstance(error, FileNotFoundError)
        raise SourceError(f"it cannot be read ({shown_error(error, source)})", final=final) from shown_cause(
            error, source
        )
