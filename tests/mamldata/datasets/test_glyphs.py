"""Glyphs: the embedded dataset is the same bits on every machine, and worth learning from."""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mamldata.datasets import glyphs
from mamldata.datasets.manifest import Manifest
from mamldata.datasets.paths import DatasetFolder

DRAW = "import sys, pathlib; from mamldata.datasets import glyphs; glyphs.write_archive(pathlib.Path(sys.argv[1]))"


def test_bytes_are_those_of_the_manifest(glyphs_root: Path, glyphs_manifest: Manifest) -> None:
    """What the program draws has the length and the sha256 that the manifest promises."""
    (file,) = glyphs_manifest.files
    data = (DatasetFolder(glyphs_root, "glyphs").raw / file.name).read_bytes()
    assert len(data) == file.bytes
    assert hashlib.sha256(data).hexdigest() == file.sha256


def test_same_bytes_in_another_environment(tmp_path: Path, glyphs_manifest: Manifest) -> None:
    """Hash seed, time zone, locale, umask and the working folder change nothing."""
    environment = {**os.environ, "PYTHONHASHSEED": "4711", "TZ": "Pacific/Kiritimati", "LC_ALL": "C"}
    environment["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    path = tmp_path / "drawn.zip"
    subprocess.run([sys.executable, "-c", DRAW, str(path)], env=environment, cwd=tmp_path, umask=0o077, check=True)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == glyphs_manifest.files[0].sha256


def test_no_floating_point() -> None:
    """The program has no number with a point in it and no true division: nothing there to round differently."""
    for node in ast.walk(ast.parse(inspect.getsource(glyphs))):
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float))
        assert not isinstance(node, ast.Div)


def test_shape_and_order(glyphs_root: Path) -> None:
    """12 alphabets of 20 characters of 20 drawings, in canonical order, all of them 105x105 bits."""
    archive = DatasetFolder(glyphs_root, "glyphs").raw / "glyphs.zip"
    with zipfile.ZipFile(archive) as container:
        names = container.namelist()
        first = container.read(names[0])
    assert names == [
        f"glyphs/alphabet{a:02d}/character{c:02d}/{d:02d}.pbm"
        for a in range(1, 13)
        for c in range(1, 21)
        for d in range(1, 21)
    ]
    assert first.startswith(b"P4\n105 105\n")
    assert len(first) == len(b"P4\n105 105\n") + 105 * 14


@pytest.fixture(scope="module")
def ink() -> np.ndarray:
    """Every drawing, ``[characters, drawings, side, side]``."""
    images = np.stack([image for _, image in glyphs.drawings()])
    return images.reshape(240, 20, 105, 105)


def test_classes_and_drawings_are_distinct(ink: np.ndarray) -> None:
    """No two drawings are alike, anywhere."""
    packed = np.packbits(ink.reshape(4800, -1), axis=1)
    assert len({row.tobytes() for row in packed}) == 4800


def test_drawings_have_ink_and_paper(ink: np.ndarray) -> None:
    """Every drawing shows something, and is mostly paper."""
    share = ink.mean(axis=(2, 3))
    assert share.min() > 0.005
    assert share.max() < 0.4


def test_a_character_resembles_itself(ink: np.ndarray) -> None:
    """Drawings of one character are nearer to each other than to other characters', so there is something to learn."""
    coarse = ink[::4].reshape(60, 20, 15, 7, 15, 7).mean(axis=(3, 5), dtype=np.float32).reshape(60, 20, -1)
    prototypes = coarse[:, :10].mean(axis=1)
    distances = (prototypes**2).sum(axis=-1) - 2 * coarse[:, 10:] @ prototypes.T  # but for what all have in common
    right = distances.argmin(axis=-1) == np.arange(60)[:, None]
    assert right.mean() > 0.2  # by chance 1 in 60
