"""The digest of a user's own folder of images, which changes when any image in it changes."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

from mamldata.errors import DamagedError, DatasetError, Fault
from mamldata.io.atomic import MOST_NOTE, NOT_REGULAR, file_version, locked, make_folder, read_whole, write_atomic
from mamldata.io.containers import MOST_IMAGE_BYTES, list_members
from mamldata.io.content_digest import digest_of_contents
from mamldata.io.digest import canonical_json, parse_json, sha256_bytes, sha256_file
from mamldata.progress import Progress, silent
from mamldata.readers.image import is_image


def folder_sha256(folder: Path, note: Path | None, progress: Progress = silent) -> str:
    """The content digest of a folder's images (see ``mamldata.io.content_digest.content_sha256``).

    Hashing a large folder takes a while, so the digest is noted beside the bank, with the name and version of every
    file (``FileVersion``), and used while these do not change. It is not noted if a file changed within the last two
    seconds. Without a writable place for the note, it is computed each time.

    Args:
        folder: the user's own, which is only read.
        note: the file in which to note it; None to hash all files regardless of any note.
        progress: told of hashed bytes.

    Raises:
        DamagedError: a file cannot be read.
        DatasetError: files are not regular, or larger than the limit for an image; all are named.
        WriteError: the note cannot be written.
    """
    names = [member.name for member in list_members(folder) if is_image(member.name)]
    now = time.time_ns()
    listing, settled = _listing(folder, names, now)
    if note is None:
        return _hash(folder, names, progress)
    if noted := _noted(note, listing):
        return noted
    make_folder(note.parent)
    if not os.access(note.parent, os.W_OK):
        return _hash(folder, names, progress)  # an existing bank can still be read
    # If several processes open the folder for the first time, one hashes it and the others wait for its note.
    with locked(note.with_suffix(".lock")):
        if not (content := _noted(note, listing)):
            content = _hash(folder, names, progress)
            if settled:
                # With the listing from before the hashing, so that a change meanwhile is noticed the next time.
                write_atomic(note, canonical_json({"listing_sha256": listing, "content_sha256": content}))
    return content


def _hash(folder: Path, names: list[str], progress: Progress) -> str:
    digests = []
    try:
        with progress("hash", sum((folder / name).stat().st_size for name in names), "B") as advance:
            for name in names:
                digests.append((name, sha256_file(folder / name, advance)))
    except OSError as error:
        raise DamagedError(f"{error.filename} cannot be read ({error.strerror}). Repair or remove it.") from error
    return digest_of_contents(digests)


def _noted(note: Path, listing: str) -> str:
    try:
        noted = parse_json(read_whole(note, MOST_NOTE))
        return str(noted["content_sha256"]) if noted["listing_sha256"] == listing else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _listing(folder: Path, names: list[str], now: int) -> tuple[str, bool]:
    """The digest of the names and versions of files, and whether all of them are settled."""
    entries, faults, settled = [], [], True
    for name in names:
        try:
            status = (folder / name).stat()
        except OSError as error:
            raise DamagedError(f"{folder / name} cannot be read ({error.strerror}). Repair or remove it.") from error
        if not stat.S_ISREG(status.st_mode):
            faults.append(Fault("image", f"{folder / name}: {NOT_REGULAR}"))
        elif status.st_size > MOST_IMAGE_BYTES:
            size = f"{status.st_size:,} bytes; the limit for an image is {MOST_IMAGE_BYTES:,}"
            faults.append(Fault("image", f"{folder / name}: it has {size}"))
        version = file_version(status)
        settled &= version.settled(now)
        entries.append([name, *version])
    if faults:  # before hashing any of them, which may never end
        raise DatasetError(folder.name, faults, "Repair or remove these files, and run the same command again.")
    return sha256_bytes(canonical_json(entries)), settled
