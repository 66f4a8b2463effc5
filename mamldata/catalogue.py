"""What datasets there are, and what of them is on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mamldata.load import load_manifest
from mamldata.manifest_toml import builtin_names
from mamldata.receipts import verified_digests
from mamldata.root import DatasetFolder


def list_datasets(root: Path) -> list[dict[str, Any]]:
    """Every built-in dataset as plain values; looks at which files exist and at their receipts."""
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
