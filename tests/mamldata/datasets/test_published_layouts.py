"""Photographs in folders of classes, in made-up miniatures of the published files: CUB-200, DTD and EuroSAT."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mamldata.bank.make import make_bank
from mamldata.datasets.load import load_manifest
from mamldata.fetching.act import fetch
from mamldata.sampling.splits import divide

OTHERS = {  # beside the images, as in the published files
    "cub-200": ("attributes.txt", "CUB_200_2011/README", "CUB_200_2011/images.txt"),
    "dtd": ("dtd/imdb/imdb.mat", "dtd/labels/train1.txt", "dtd/images/waffled/.directory"),
    "eurosat": (),
}
FOLDER = {"cub-200": "CUB_200_2011/images", "dtd": "dtd/images", "eurosat": "2750"}


def photograph(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (64, 48), (shade, 255 - shade, 128)).save(stream, "JPEG")
    return stream.getvalue()


def write(path: Path, files: Mapping[str, bytes]) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as container:
            for name, data in files.items():
                container.writestr(name, data)
        return
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    ("dataset", "scheme", "counts"),
    [
        ("cub-200", "chen", (100, 50, 50)),
        ("cub-200", "meta-dataset", (140, 30, 30)),
        ("dtd", "meta-dataset", (33, 7, 7)),
        ("eurosat", "bscd-fsl", (0, 0, 10)),
    ],
)
def test_the_published_layout_and_division(dataset: str, scheme: str, counts: tuple[int, ...], tmp_path: Path) -> None:
    """Fetched by its digest, with an image of every listed class, and each class in its published split."""
    manifest = load_manifest(dataset)
    (file,) = manifest.files
    names = sorted(name for names in manifest.scheme(scheme).lists.values() for name in names)
    shades = {name: 20 + place for place, name in enumerate(names)}
    files = {f"{FOLDER[dataset]}/{name}/{name}_0001.jpg": photograph(shade) for name, shade in shades.items()}
    path = tmp_path / file.name
    write(path, files | dict.fromkeys(OTHERS[dataset], b"text"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = replace(manifest, files=(replace(file, urls=(), bytes=path.stat().st_size, sha256=digest),))

    (fetched,) = fetch(manifest, tmp_path / "root", [str(tmp_path)], offline=True)
    assert fetched.checked_by == "sha256"
    bank = make_bank(manifest, tmp_path / "root")
    assert bank.shape == (len(names), 84, 84, 3)
    assert list(bank.class_names) == names
    assert np.allclose(bank.open_images()[:, 40, 40, 0], list(shades.values()), atol=3)
    division = divide(manifest.scheme(scheme), bank.class_names, dataset)
    assert tuple(map(len, division.values())) == counts
    assert sorted(chain(*division.values())) == list(range(len(names)))
