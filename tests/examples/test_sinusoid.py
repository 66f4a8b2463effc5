"""The sinusoid example shows what MAML learns, in numbers and in a picture."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.slow


def test_maml_learns_to_adapt_and_joint_training_does_not(run_example: Callable[..., str], tmp_path: Path) -> None:
    """After a few hundred steps MAML's error falls with adaptation, and to well below the other's."""
    pytest.importorskip("matplotlib")
    printed = run_example("sinusoid.py", "--steps", 500, "--tasks", 100, "--out", tmp_path / "sinusoid.png")
    lines = re.findall(
        r"^(.+), (\d+) points, rate .+: before (.+) ± .+, 1 step (.+) ± .+, 10 steps (.+) ± ", printed, re.M
    )
    found = {(name, int(points)): [float(value) for value in values] for name, points, *values in lines}
    assert len(found) == 8
    before, one, ten = found["MAML", 10]
    assert ten < one < before
    assert one < 0.8 * found["joint training", 10][1]
    assert ten < found["MAML", 5][2]
    assert found["FOMAML", 10][2] < found["joint training", 10][2] < found["random", 10][2]
    with Image.open(tmp_path / "sinusoid.png") as picture:
        assert picture.size == (1200, 780)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100  # more than a blank page
