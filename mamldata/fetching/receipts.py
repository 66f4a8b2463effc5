"""Verify that a raw file is the one its manifest describes, and keep a receipt of it."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from mamldata.datasets.manifest import COLLECTED, PIN, ImageCollection, Manifest, SourceFile
from mamldata.datasets.paths import DatasetFolder
from mamldata.errors import DamagedError
from mamldata.io.atomic import MOST_NOTE, read_whole, write_atomic
from mamldata.io.content_digest import content_sha256
from mamldata.io.digest import canonical_json, md5_file, parse_json, sha256_file
from mamldata.progress import Advance
from mamldata.words import mamldata_command

CheckedBy = Literal["sha256", "md5", "content_sha256"]


@dataclass(frozen=True)
class Verdict:
    """The result of hashing a file.

    Attributes:
        sha256: of the file as it is.
        checked_by: the digest of the manifest that matches, or None if the file is wrong.
        content_sha256: the content digest, if it was needed and could be computed.
        problem: the actual and the expected digest; empty if the file is correct.
    """

    sha256: str
    checked_by: CheckedBy | None
    content_sha256: str | None = None
    problem: str = ""


def most_bytes(file: SourceFile) -> int:
    """Upper bound in bytes on a copy of this file: repacked containers may be larger than the original."""
    if not file.bytes:
        return 1 << 50  # its length is not known
    return 2 * file.bytes + (1 << 20) if file.content_sha256 else file.bytes


def verify_file(path: Path, file: SourceFile, advance: Advance | None = None) -> Verdict:
    """Check ``path`` against the manifest: by its SHA-256 or MD5, or the content digest of its members.

    Args:
        path: the file, which is not changed.
        file: what it should be.
        advance: called with the numbers of hashed bytes.
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
        return Verdict(digest, None, None, f"{problem}; its content is also wrong: {error}")
    if content == file.content_sha256:
        return Verdict(digest, "content_sha256", content)
    return Verdict(digest, None, content, f"{problem}; content digest {content}, expected {file.content_sha256}")


@dataclass(frozen=True)
class Match:
    """Why a file was correct, if not by the manifest's SHA-256 and length.

    Attributes:
        checked_by: which digest of the manifest it matched; for collected images, that of the pin.
        digest: that digest. If the manifest's digest changes, another file is wanted.
        bytes: the length of the file.
    """

    checked_by: CheckedBy
    digest: str
    bytes: int


@dataclass(frozen=True)
class Receipt:
    """What was recorded about a file when it was verified.

    Attributes:
        sha256: of the file as it is.
        match: why it was correct; None if SHA-256 and length were the manifest's.
    """

    sha256: str
    match: Match | None = None


def receipt_of(verdict: Verdict, file: SourceFile, size: int) -> Receipt:
    """The receipt of a file of ``size`` bytes that was found correct."""
    assert verdict.checked_by is not None
    if verdict.checked_by == "sha256" and size == file.bytes:
        return Receipt(verdict.sha256)
    return Receipt(verdict.sha256, Match(verdict.checked_by, _wanted(file, verdict.checked_by) or "", size))


def _wanted(file: SourceFile, kind: CheckedBy) -> str | None:
    return {"sha256": file.sha256, "md5": file.md5, "content_sha256": file.content_sha256}[kind]


def receipt_text(name: str, receipt: Receipt) -> str:
    """A receipt in the format of ``sha256sum``, so that ``sha256sum --check`` reads it too: the match is a comment."""
    match = receipt.match
    note = f"# {match.checked_by} {match.digest}, {match.bytes} bytes\n" if match else ""
    return f"{receipt.sha256}  {name}\n{note}"


def write_receipt(folder: DatasetFolder, name: str, receipt: Receipt) -> None:
    """Record that ``raw/<name>`` was verified, with its digest.

    Raises:
        WriteError: the folder cannot be written to.
    """
    write_atomic(folder.receipt(name), receipt_text(name, receipt).encode("ascii"))


_RECEIPT = re.compile(
    rf"(?P<sha256>[0-9a-f]{{64}})  [^\n]+\n"
    rf"(# (?P<kind>{'|'.join(get_args(CheckedBy))}) (?P<digest>[0-9a-f]+), (?P<bytes>[0-9]{{1,18}}) bytes\n)?"
)


def read_receipt(folder: DatasetFolder, name: str) -> Receipt | None:
    """The receipt of ``raw/<name>``; None if there is none, or if it is not in the format that is written."""
    try:
        text = read_whole(folder.receipt(name), MOST_NOTE).decode("ascii")
    except (OSError, UnicodeDecodeError):
        return None
    if (found := _RECEIPT.fullmatch(text)) is None:
        return None
    match = Match(found["kind"], found["digest"], int(found["bytes"])) if found["kind"] else None  # type: ignore[arg-type]
    receipt = Receipt(found["sha256"], match)
    return receipt if text == receipt_text(name, receipt) else None


@dataclass(frozen=True)
class Collected:
    """What was collected.

    Attributes:
        images: how many.
        content_sha256: their content digest (see ``mamldata.io.content_digest.content_sha256``), whatever their order.
    """

    images: int
    content_sha256: str


def pin_file(raw: Path) -> Path:
    """The file that records what was collected first."""
    return raw / PIN


def read_pin(raw: Path) -> Collected | None:
    """What was collected first; None if nothing was, or the record cannot be read."""
    try:
        note = parse_json(read_whole(pin_file(raw), MOST_NOTE))
        return Collected(int(note["images"]), str(note["content_sha256"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_pin(raw: Path, collected: Collected) -> None:
    """Record what was collected.

    Raises:
        WriteError: the folder cannot be written to.
    """
    write_atomic(pin_file(raw), canonical_json(asdict(collected)))


def is_verified(folder: DatasetFolder, file: SourceFile) -> bool:
    """Whether a file exists that was verified for the current manifest. Only looks at its length and receipt.

    A file verified for an older manifest does not count, nor does a truncated one.
    """
    path, receipt = folder.raw / file.name, read_receipt(folder, file.name)
    if receipt is None or not path.is_file():
        return False
    size, match = path.stat().st_size, receipt.match
    if match is None:
        return (receipt.sha256, size) == (file.sha256, file.bytes)
    return (match.digest, match.bytes) == (_wanted(file, match.checked_by), size)


def is_pinned(folder: DatasetFolder, images: ImageCollection) -> bool:
    """Whether the collected images exist and were verified against the pin, and the manifest's digest if it has one."""
    path, receipt, pin = folder.raw / COLLECTED, read_receipt(folder, COLLECTED), read_pin(folder.raw)
    if receipt is None or pin is None or not path.is_file():
        return False
    found = Match("content_sha256", pin.content_sha256, path.stat().st_size)
    return receipt.match == found and images.content_sha256 in {None, pin.content_sha256}


def verified_digests(manifest: Manifest, folder: DatasetFolder) -> dict[str, str]:
    """The SHA-256 of each raw file that was verified for this manifest, in the reader's order."""
    names = [file.name for file in manifest.files if is_verified(folder, file)]
    if manifest.images is not None and is_pinned(folder, manifest.images):
        names.append(COLLECTED)
    return {name: receipt.sha256 for name in names if (receipt := read_receipt(folder, name))}


def fetch_command(manifest: Manifest, root: Path) -> str:
    """The command that fetches the dataset into this root."""
    return dataset_command("fetch", manifest, root)


def dataset_command(verb: str, manifest: Manifest, root: Path) -> str:
    """The command that does something with the dataset under this root."""
    return mamldata_command(verb, manifest.reference, "--root", root)
