"""The facts about a machine that a bug report needs."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mamldata.parallel import default_workers
from mamldata.siblings import foreign_siblings
from mamldata.version import __version__

_PACKAGES = ("torch", "numpy", "pillow", "webdataset", "requests", "fsspec", "filelock", "click", "tqdm")


def examine(root: Path) -> dict[str, Any]:
    """Versions, devices, and the data root with its free space in bytes. Imports torch."""
    there = next(place for place in (root, *root.parents) if place.exists())
    return {
        "mamldata": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "processors": default_workers(),
        "devices": _devices(),
        "name_conflicts": list(foreign_siblings()),
        "root": str(root),
        "root_writable": os.access(there, os.W_OK),
        "root_free": shutil.disk_usage(there).free,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        gpus.append("mps")
    return ", ".join(["cpu", *gpus])
