"""Raw files: whether one is the right one, and the receipt that says what it was when it was verified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mamldata.digest import content_sha256, sha256_file
from mamldata.errors import DamagedError
from mamldata.files import write_atomic
from mamldata.manifest import Manifest, SourceFile
from mamldata.progress import Progress, silent
from mamldata.root import DatasetFolder

CheckedBy = Literal["sha256", "content_sha256"]


@dataclass(frozen=True)
class Check:
    """What a look at a file showed.

    Attributes:
        sha256: of its bytes.
        checked_by: which of the manifest's digests it has; None if it is not the file.
        problem: expected and got, if it is not the file.
    """

    sha256: str
    checked_by: CheckedBy | None
    problem: str = ""


def most_bytes(file: SourceFile) -> int:
    """The longest that a file may be: as the manifest says, or twice that for a container packed by somebody else."""
    return file.bytes if file.content_sha256 is None else 2 * file.bytes + (1 << 20)


def check_file(path: Path, file: SourceFile, advance: Callable[[int], object] | None = None) -> Check:
    """Compare a file with the manifest: its SHA-256, or else the digest of its members.

    Args:
        path: the file, under whatever name.
        file: what it should be.
        advance: told of the bytes as they are hashed.
    """
    size = path.stat().st_size
    if size > most_bytes(file):
        return Check("", None, f"it has {size:,} bytes, expected {file.bytes:,}")
    digest = sha256_file(path, advance)
    if digest == file.sha256:
        return Check(digest, "sha256")
    problem = f"sha256 {digest}, expected {file.sha256}"
    if file.content_sha256 is None or file.content_bytes is None:
        return Check(digest, None, problem)
    try:
        content = content_sha256(path, file.content_bytes)
    except DamagedError as error:
        return Check(digest, None, f"{problem}; and as a container: {error}")
    if content == file.content_sha256:
        return Check(digest, "content_sha256")
    return Check(digest, None, f"{problem}; content digest {content}, expected {file.content_sha256}")


def write_receipt(folder: DatasetFolder, name: str, digest: str) -> None:
    """Note the digest of a verified raw file, in the format of ``sha256sum``."""
    write_atomic(folder.receipt(name), f"{digest}  {name}\n".encode())


def check_raw(manifest: Manifest, root: Path, progress: Progress = silent) -> list[str]:
    """Hash a dataset's raw files again, and compare them with their receipts and with the manifest.

    Returns:
        One line for each problem: the file, expected and got, the remedy.
    """
    folder = DatasetFolder(root, manifest.name)
    problems = []
    for file in manifest.files:
        path, receipt = folder.raw / file.name, folder.receipt(file.name)
        again = f"Delete it and run: mamldata fetch {manifest.reference} --root {root}"
        if not path.is_file():
            problems.append(f"{path} is missing. Run: mamldata fetch {manifest.reference} --root {root}")
            continue
        with progress(file.name, path.stat().st_size, "B") as advance:
            check = check_file(path, file, advance)
        if check.checked_by is None:
            problems.append(f"{path} is damaged: {check.problem}. {again}")
        elif not receipt.is_file():
            problems.append(f"{receipt} is missing. Run: mamldata fetch {manifest.reference} --root {root}")
        elif receipt.read_bytes() != f"{check.sha256}  {file.name}\n".encode():
            # A repacked container may differ where its content digest does not look: the receipt knows.
            problems.append(
                f"{path} or its receipt {receipt.name} is damaged: the receipt does not say sha256 {check.sha256}. "
                f"Delete both and run: mamldata fetch {manifest.reference} --root {root}"
            )
    return problems
