"""Where datasets live on this machine: ``<root>/<dataset>/raw/…`` and ``<root>/<dataset>/<dataset>-<size>.npy``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from mamldata.io.urls import local_folder

ENVIRONMENT = "MAMLDATA_ROOT"
CACHE_ENVIRONMENT = "MAMLDATA_CACHE"


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """The root folder: ``root``, else ``MAMLDATA_ROOT``, else the platform's user cache folder.

    Raises:
        RequestError: it is an address.
    """
    chosen = root or os.environ.get(ENVIRONMENT) or platformdirs.user_cache_dir("mamldata")
    return local_folder(chosen).expanduser().absolute()


def cache_folder() -> Path:
    """The folder of one user's caches, safe to delete: ``MAMLDATA_CACHE``, else the platform's user cache folder.

    Raises:
        RuntimeError: this user has no home folder.
    """
    chosen = os.environ.get(CACHE_ENVIRONMENT) or platformdirs.user_cache_dir("mamldata")
    return Path(chosen).expanduser().absolute()


@dataclass(frozen=True)
class DatasetFolder:
    """The folder of one dataset under a root. Nothing here touches the disk."""

    root: Path
    name: str

    @property
    def path(self) -> Path:
        """``<root>/<dataset>``."""
        return self.root / self.name

    @property
    def raw(self) -> Path:
        """The folder of fetched files, unchanged and read-only."""
        return self.path / "raw"

    @property
    def lock(self) -> Path:
        """Held while files are fetched or a bank is made; the operating system frees it when its holder dies."""
        return self.path / ".lock"

    def receipt(self, file: str) -> Path:
        """The receipt written after verifying ``raw/<file>``, in ``sha256sum`` format; see ``receipts.Receipt``."""
        return self.raw / f"{file}.sha256"

    def bank(self, size: int) -> Path:
        """The bank's array at image size ``size``."""
        return self.path / f"{self.name}-{size}.npy"

    def bank_json(self, size: int) -> Path:
        """The bank's description, written last."""
        return self.path / f"{self.name}-{size}.json"
