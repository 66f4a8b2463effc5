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

_PACKAGES = ("torch", "numpy", "pillow", "requests", "fsspec", "filelock", "platformdirs", "click", "tqdm")
OPTIONAL = {  # package: what it is for
    "distributed": "build --dask",
    "higher": "train --engine higher",
    "matplotlib": "curves and pictures of runs",
    "s3fs": "archives at s3://",
    "tensorboard": "train --tensorboard",
    "torchvision": "ResNets, and images of a bank for torchvision's transforms",
    "webdataset": "reading archives in webdataset's pipelines",
}


def examine(root: Path) -> dict[str, Any]:
    """Versions, also of optional packages, devices, and the data root with its free space in bytes. Imports torch."""
    there = next(place for place in (root, *root.parents) if place.exists())
    return {
        "mamldata": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "optional": {f"{name} ({use})": _version(name) for name, use in OPTIONAL.items()},
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
