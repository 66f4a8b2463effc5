"""Load a dataset's manifest by the user's reference: a name, a TOML file, or a folder of images."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Unpack

from mamldata.datasets.image_folder import FolderOptions, folder_manifest
from mamldata.datasets.manifest import Manifest
from mamldata.datasets.toml import builtin_names, parse_manifest
from mamldata.errors import ManifestError, RequestError, did_you_mean
from mamldata.io.atomic import MOST_NOTE, read_whole
from mamldata.io.urls import shown_place


def load_manifest(name_or_path: str, **folder: Unpack[FolderOptions]) -> Manifest:
    """The manifest of a built-in dataset, of a user's own TOML file, or of a folder of images.

    Args:
        name_or_path: a name such as ``omniglot``, a path that ends in ``.toml``, or a folder of images.
        folder: how a folder of images is read; see ``FolderOptions``.

    Raises:
        RequestError: there is no dataset of that name, or no such file; or ``folder`` is given with another dataset.
        ManifestError: the file has faults; all of them are listed.
    """
    names = builtin_names()
    if folder and (name_or_path.endswith(".toml") or name_or_path in names):
        raise RequestError(
            f"{', '.join(folder)}: only for a folder of images; the manifest of {name_or_path} says how."
        )
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if not path.is_file():
            raise RequestError(f"There is no manifest file {shown_place(name_or_path)}.")
        try:
            data = read_whole(path, MOST_NOTE)
        except OSError as error:
            raise ManifestError(str(path), [f"it cannot be read ({error.strerror})"]) from error
        return parse_manifest(data, str(path), path.parent, name_or_path)
    if name_or_path not in names:
        if Path(name_or_path).is_dir():
            return folder_manifest(Path(name_or_path), **folder)
        raise RequestError(
            f"There is no dataset {shown_place(name_or_path)!r}.{did_you_mean(name_or_path, names)} The built-in "
            f"datasets are {', '.join(names)}; for your own, give the path of its .toml file or its folder of images."
        )
    place = resources.files("manifests")
    file = f"{name_or_path}.toml"
    return parse_manifest((place / file).read_bytes(), file, place, name_or_path)
