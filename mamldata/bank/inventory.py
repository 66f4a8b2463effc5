"""List the datasets, and which parts of them are on this machine."""

from __future__ import annotations

import stat
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from mamldata.bank.format import noted_left_out, read_description
from mamldata.datasets.load import load_manifest
from mamldata.datasets.paths import DatasetFolder
from mamldata.datasets.toml import builtin_names
from mamldata.errors import MamldataError
from mamldata.fetching.receipts import verified_digests
from mamldata.readers.left_out import LeftOut

_LARGE = 1 << 20  # bytes of what ``disk_use`` counts apart


def list_datasets(root: Path) -> list[dict[str, Any]]:
    """Every built-in dataset as plain values; looks at which files exist and reads their receipts."""
    return [_entry(name, root) for name in builtin_names()]


def _entry(name: str, root: Path) -> dict[str, Any]:
    manifest, folder = load_manifest(name), DatasetFolder(root, name)
    banks = [path.stem.removeprefix(f"{name}-") for path in folder.path.glob(f"{name}-*.json")]
    return {
        "name": name,
        "title": manifest.title,
        "version": manifest.version,
        "licence": manifest.licence,
        "homepage": manifest.homepage,
        "files": len(manifest.raw_names),
        "files_here": len(verified_digests(manifest, folder)),
        "bytes": sum(file.bytes for file in manifest.files),
        "banks": sorted(int(size) for size in banks if size.isdigit()),
        "split_schemes": [
            {"name": scheme.name, "description": scheme.description, "default": scheme.name == manifest.split_scheme}
            for scheme in manifest.schemes.values()
        ],
    }


def disk_use(*folders: Path) -> dict[Path, int]:
    """The bytes of each entry of the folders, with the entries in it of a MiB or more apart from the rest.

    Links are counted as themselves and not followed. What cannot be read counts as nothing.
    """
    found: Counter[Path] = Counter()
    for folder in dict.fromkeys(folders):
        for path in _entries(folder):
            for one in _entries(path) if path.is_dir() and not path.is_symlink() else [path]:
                size = _bytes(one)
                found[one if size >= _LARGE else path] += size
    return dict(sorted(found.items()))


def _bytes(path: Path) -> int:
    todo, total = [path], 0
    while todo:
        path = todo.pop()
        with suppress(OSError):
            status = path.lstat()
            total += status.st_size * (not stat.S_ISDIR(status.st_mode))
            todo += _entries(path) if stat.S_ISDIR(status.st_mode) else []
    return total


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def files_left_out_of(dataset: str, size: int, bank_sha256: str, root: Path) -> tuple[LeftOut, ...] | None:
    """What was left out when a bank was made; None if no bank under the root records it.

    Several datasets may have equal banks, such as a folder and the files collected from it: then the bank that left out
    most files counts.
    """
    noted = []
    for path in sorted(root.glob(f"*/*-{size}.json")):
        try:
            description = read_description(path)
        except (MamldataError, OSError):
            continue  # commands that need this bank report it
        if (description["name"], description["sha256"]) == (dataset, bank_sha256):
            noted.append(noted_left_out(description))
    known = [groups for groups in noted if groups is not None]
    return max(known, key=lambda groups: sum(group.count for group in groups), default=None)
