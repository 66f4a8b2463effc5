"""What a user's own folder of images holds: a digest that changes when anything in it does."""

from __future__ import annotations

import json
from pathlib import Path

from mamldata.containers import list_members
from mamldata.digest import canonical_json, digest_of_contents, sha256_bytes, sha256_file
from mamldata.errors import DamagedError
from mamldata.files import write_atomic
from mamldata.progress import Progress, silent
from mamldata.readers import is_image


def folder_sha256(folder: Path, note: Path | None, progress: Progress = silent) -> str:
    """The content digest of a folder's images (see ``mamldata.digest.content_sha256``).

    Hashing a large folder takes a while, so the digest is noted beside the bank, with the name, length and time of
    change of every file: while those stay, so does the digest.

    Args:
        folder: the user's own, which is only read.
        note: the file to note it in; None to hash all files whatever was noted.
        progress: told of hashed bytes.

    Raises:
        DamagedError: a file that cannot be read.
        WriteError: the note cannot be written.
    """
    names = [member.name for member in list_members(folder) if is_image(member.name)]
    listing = _listing(folder, names)
    if note and (noted := _noted(note, listing)):
        return noted
    digests = []
    try:
        with progress("hash", sum((folder / name).stat().st_size for name in names), "B") as advance:
            for name in names:
                digests.append((name, sha256_file(folder / name, advance)))
    except OSError as error:
        raise DamagedError(f"{error.filename} cannot be read ({error.strerror}). Mend or remove it.") from error
    content = digest_of_contents(digests)
    if note:
        # Of what was there before the hashing: what changes meanwhile is noticed the next time.
        write_atomic(note, canonical_json({"listing_sha256": listing, "content_sha256": content}))
    return content


def _noted(note: Path, listing: str) -> str:
    try:
        noted = json.loads(note.read_bytes())
        return str(noted["content_sha256"]) if noted["listing_sha256"] == listing else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _listing(folder: Path, names: list[str]) -> str:
    entries = []
    for name in names:
        try:
            status = (folder / name).stat()
        except OSError as error:
            raise DamagedError(f"{folder / name} cannot be read ({error.strerror}). Mend or remove it.") from error
        entries.append([name, status.st_size, status.st_mtime_ns])
    return sha256_bytes(canonical_json(entries))
