"""Plan what to do for each raw file of a dataset. Only looks at names, lengths and receipts; changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mamldata.datasets.manifest import COLLECTED, Manifest, SourceFile
from mamldata.datasets.paths import DatasetFolder
from mamldata.fetching.http import Part
from mamldata.fetching.layouts import Found, find_images
from mamldata.fetching.receipts import (
    is_pinned,
    is_verified,
)
from mamldata.io.atomic import writing
from mamldata.io.urls import find, is_http, local_path, needs_network

Kind = Literal["have", "check", "resume", "download", "generate", "collect", "missing"]


@dataclass(frozen=True)
class Action:
    """What to do for one file.

    Attributes:
        file: the wanted file.
        kind: ``have`` (it exists and was verified), ``check`` (it exists: put there by hand, truncated, correct for
            another manifest, or left when the process was killed), ``resume``, ``download`` (or copy), ``generate``,
            ``collect`` (images without a hash, from the user's copy), or ``missing`` (there is no source).
        path: its final path.
        sources: paths and URLs in the order in which they will be tried.
        have_bytes: number of bytes left by an interrupted download, if it will be resumed.
        found: where the images to collect are.
    """

    file: SourceFile
    kind: Kind
    path: Path
    sources: tuple[str, ...]
    have_bytes: int
    found: Found | None = None


def plan(manifest: Manifest, root: Path, sources: Sequence[str] = (), *, offline: bool = False) -> list[Action]:
    """Plan what to do for each file of a dataset. Only looks at names, lengths and receipts; changes nothing.

    Args:
        manifest: the dataset.
        root: the data root.
        sources: places to look in before the manifest's own: folders, http(s) addresses, fsspec URLs.
        offline: leave out every source that needs a network.

    Raises:
        RequestError: a place is neither an existing folder nor a URL that can be read.
    """
    folder = manifest.home(root)
    with writing(folder.raw):
        actions = [_action(folder, file, sources, offline) for file in manifest.files]
        return actions + ([_collection(manifest, folder, sources)] if manifest.images else [])


def _action(folder: DatasetFolder, file: SourceFile, places: Sequence[str], offline: bool) -> Action:
    path = folder.raw / file.name
    found = [source for place in places if (source := find(place, file.name)) is not None]
    if path.is_file():
        return Action(file, "have" if is_verified(folder, file) else "check", path, (), 0)
    if file.generator:
        return Action(file, "generate", path, (), 0)
    usable = [source for source in dict.fromkeys([*found, *file.urls]) if not (offline and needs_network(source))]
    part = Part(path).size if usable and is_http(usable[0]) else 0
    kind: Kind = "missing" if not usable else "resume" if part else "download"
    return Action(file, kind, path, tuple(usable), part)


def _collection(manifest: Manifest, folder: DatasetFolder, places: Sequence[str]) -> Action:
    """What to do for images without a hash of their own. They are only searched for on this machine."""
    assert manifest.images is not None
    path = folder.raw / COLLECTED
    file = SourceFile(COLLECTED, 0, None, how=manifest.images.how)
    if path.is_file():
        return Action(file, "have" if is_pinned(folder, manifest.images) else "check", path, (), 0)
    for place in places:
        if (local := local_path(place)) is not None and (found := find_images(manifest.images.forms, local)):
            return Action(file, "collect", path, (str(found.path),), 0, found)
    return Action(file, "missing", path, (), 0)
