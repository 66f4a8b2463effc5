"""Raw files: whether one is the file that its manifest means, and the receipt that says what it was."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mamldata.digest import content_sha256, md5_file, sha256_file
from mamldata.errors import DamagedError
from mamldata.files import write_atomic
from mamldata.manifest import COLLECTED, Manifest, SourceFile
from mamldata.progress import Progress, silent
from mamldata.root import DatasetFolder

CheckedBy = Literal["sha256", "md5", "content_sha256"]


@dataclass(frozen=True)
class Verdict:
    """What a look at all bytes of a file said.

    Attributes:
        sha256: of the file as it is.
        checked_by: the digest of the manifest that is right, or None if the file is wrong.
        content_sha256: the content digest found, if it was needed and could be taken.
        problem: what was got and what was expected; empty if the file is right.
    """

    sha256: str
    checked_by: CheckedBy | None
    content_sha256: str | None = None
    problem: str = ""


def most_bytes(file: SourceFile) -> int:
    """The most bytes that a container of this file may have: repacked ones may be larger than the original."""
    if not file.bytes:
        return 1 << 50  # its length is not known
    return 2 * file.bytes + (1 << 20) if file.content_sha256 else file.bytes


def judge(path: Path, file: SourceFile, advance: Callable[[int], object] | None = None) -> Verdict:
    """Whether ``path`` holds the file that the manifest means: by its sha256 or md5, or its members' content digest.

    Args:
        path: the file, which is not changed.
        file: what it should be.
        advance: told of hashed bytes.
    """
    size = path.stat().st_size
    digest = sha256_file(path, advance)
    if digest == file.sha256:
        return Verdict(digest, "sha256")
    expected = f" ({file.bytes:,} bytes)" if file.bytes else ""
    if file.md5 is not None:
        md5 = md5_file(path)
        if md5 == file.md5:
            return Verdict(digest, "md5")
        problem = f"md5 {md5} ({size:,} bytes), expected {file.md5}{expected}"
    else:
        problem = f"sha256 {digest} ({size:,} bytes), expected {file.sha256}{expected}"
    if file.content_sha256 is None or file.content_bytes is None:
        return Verdict(digest, None, None, problem)
    if size > most_bytes(file):
        return Verdict(digest, None, None, f"{problem}; too large to be a repacked copy")
    try:
        content = content_sha256(path, file.content_bytes)
    except DamagedError as error:
        return Verdict(digest, None, None, f"{problem}; its content is not right either: {error}")
    if content == file.content_sha256:
        return Verdict(digest, "content_sha256", content)
    return Verdict(digest, None, content, f"{problem}; content digest {content}, expected {file.content_sha256}")


def receipt_text(name: str, digest: str) -> str:
    """A receipt, in the format of ``sha256sum``, so that ``sha256sum --check`` reads it too."""
    return f"{digest}  {name}\n"


def write_receipt(folder: DatasetFolder, name: str, digest: str) -> None:
    """Note that ``raw/<name>`` was verified, and what its sha256 is.

    Raises:
        WriteError: the folder cannot be written to.
    """
    write_atomic(folder.receipt(name), receipt_text(name, digest).encode("ascii"))


def read_receipt(folder: DatasetFolder, name: str) -> str | None:
    """The sha256 that the receipt of ``raw/<name>`` gives; None where there is none, or one that nobody wrote so."""
    try:
        text = folder.receipt(name).read_bytes().decode("ascii")
    except (OSError, UnicodeDecodeError):
        return None
    digest = text[:64]
    return digest if re.fullmatch("[0-9a-f]{64}", digest) and text == receipt_text(name, digest) else None


def fetch_command(manifest: Manifest, root: Path) -> str:
    """The command that gets the dataset into this root."""
    return f"mamldata fetch {shlex.quote(manifest.reference)} --root {shlex.quote(str(root))}"


def check_raw(manifest: Manifest, root: Path, progress: Progress = silent) -> list[str]:
    """Hash all raw files again and compare them with the manifest and with their receipts.

    The receipt guards what a content digest does not cover: the bytes of a repacked container between its members.

    Args:
        manifest: the dataset.
        root: the data root.
        progress: told of hashed bytes, one bar per file.

    Returns:
        One line for each file that is missing or not what it was, with the remedy. Empty if all is well.
    """
    folder = manifest.home(root)
    command = fetch_command(manifest, root)
    problems = [_check_file(folder, file, command, progress) for file in manifest.files]
    if manifest.images is not None:
        problems.append(_check_collected(folder, command, progress))
    return [problem for problem in problems if problem]


def _check_collected(folder: DatasetFolder, command: str, progress: Progress) -> str:
    """The tar of collected images has no digest but its receipt's."""
    path, noted = folder.raw / COLLECTED, read_receipt(folder, COLLECTED)
    if not path.is_file():
        return f"{path} is missing. Run: {command} --from FOLDER"
    if noted is None:
        return f"{path} has no receipt that can be read. Run: {command}"
    with progress(path.name, path.stat().st_size, "B") as advance:
        digest = sha256_file(path, advance)
    if digest == noted:
        return ""
    return (
        f"{path} is damaged: sha256 {digest}, expected {noted}. Delete it and {folder.receipt(COLLECTED).name} beside "
        f"it, and run: {command} --from FOLDER"
    )


def _check_file(folder: DatasetFolder, file: SourceFile, command: str, progress: Progress) -> str:
    path, receipt = folder.raw / file.name, folder.receipt(file.name)
    if not path.is_file():
        return f"{path} is missing. Run: {command}"
    try:
        with progress(file.name, path.stat().st_size, "B") as advance:
            verdict = judge(path, file, advance)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}). Mend its permissions or its disk, or fetch it elsewhere."
    noted = read_receipt(folder, file.name)
    again = f"Delete {path} and {receipt.name} beside it, and run: {command}"
    if verdict.checked_by is None:
        return f"{path} is damaged: {verdict.problem}. {again}"
    if noted == verdict.sha256:
        return ""
    if noted is None:
        state = "is damaged" if receipt.exists() else "is missing"
        return (
            f"{receipt} {state}; {path.name} beside it is right (sha256 {verdict.sha256}). "
            f"Delete the receipt if it is there, and run: {command}"
        )
    return (
        f"{path} has sha256 {verdict.sha256}, but its receipt {receipt.name} says {noted}: one of the two was "
        f"altered. {again}"
    )
