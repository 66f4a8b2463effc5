"""Notes on which files this user has found intact, so that a bank is hashed once, not at every start.

A note holds the file's path, length, inode, mtime, ctime and SHA-256, and is valid only while none of them changes. It
is in the user's own cache folder, because a data root may be shared and read-only.
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

from mamldata.datasets.paths import cache_folder
from mamldata.errors import WriteError
from mamldata.io.atomic import FileVersion, file_version, make_folder, write_atomic
from mamldata.io.digest import canonical_json, sha256_file
from mamldata.progress import Advance


def is_noted(path: Path, sha256: str) -> bool:
    """Whether this user has verified the file's digest, and its length, inode and times have not changed since."""
    try:
        wanted = _note(path, file_version(path.stat()), sha256)
        with _place(path).open("rb") as stream:
            return stream.read(len(wanted) + 1) == wanted
    except (OSError, RuntimeError):
        return False


def hash_and_note(path: Path, sha256: str, advance: Advance | None = None) -> str:
    """Hash a file regardless of its note. If the digest is the expected one, note it; if not, remove the note.

    A file that changed within the last two seconds is not noted, see ``FileVersion.settled``. Without a note, or if it
    cannot be written, the file is hashed again the next time.

    Args:
        path: the file.
        sha256: the expected digest, in hex.
        advance: called with the numbers of hashed bytes.

    Returns:
        The file's SHA-256, in hex.

    Raises:
        OSError: the file cannot be read.
    """
    now, version = time.time_ns(), file_version(path.stat())
    got = sha256_file(path, advance)
    with suppress(OSError, RuntimeError, WriteError):
        place = _place(path)
        if got != sha256:
            place.unlink(missing_ok=True)
        elif version.settled(now):
            make_folder(place.parent)
            # Without a lock: a note garbled by two processes writing at once is ignored.
            write_atomic(place, _note(path, version, sha256), lasting=False)
    return got


def _note(path: Path, version: FileVersion, sha256: str) -> bytes:
    return canonical_json({"path": str(path.absolute()), **version._asdict(), "sha256": sha256})


def _place(path: Path) -> Path:
    """The path of a file's note.

    Raises:
        RuntimeError: this user has no home folder.
    """
    return cache_folder() / "hashed_banks" / f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()}.json"
