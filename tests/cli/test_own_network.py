"""A network of one's own on the command line: named by the user each time, and never loaded by a run's record alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from cli.main import main

MODULE = """
from pathlib import Path

from torch import nn

Path("imported").touch()


def tiny(*, channels, image_size, n_way):
    return nn.Sequential(nn.MaxPool2d(4), nn.Flatten(), nn.Linear(channels * (image_size // 4) ** 2, n_way))


def nothing(**_):
    return None


def failing(**_):
    raise ValueError("no such size")
"""
SMALL = ["--steps", "2", "--eval-every", "2", "--eval-episodes", "2", "--meta-batch-size", "2", "--device", "cpu"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder but for a module of networks, which nothing has imported yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "owned_nets", raising=False)
    (tmp_path / "owned_nets.py").write_text(MODULE)
    return tmp_path


def run(root: Path, *words: str) -> Result:
    return CliRunner().invoke(main, list(words), env={"MAMLDATA_ROOT": str(root), "COLUMNS": "500"})


@pytest.mark.slow
def test_it_trains_and_is_named_again_to_evaluate(here: Path, glyphs_root: Path) -> None:
    """By a function of a module in the current folder; without its name nothing is imported, and the hint has it."""
    done = run(glyphs_root, "train", "glyphs", "--network", "owned_nets:tiny", *SMALL, "--out", "run")
    assert done.exit_code == 0, done.output
    assert "eval run/maml_step2" in done.output
    assert "--network owned_nets:tiny" in done.output
    del sys.modules["owned_nets"]
    (here / "imported").unlink()
    for words in ((), ("--network", "owned_nets:other"), ("--network", "conv4")):
        refused = run(glyphs_root, "eval", "run", "glyphs", "--episodes", "2", "--device", "cpu", *words)
        assert refused.exit_code == 2
        assert "was trained with the network owned_nets:tiny. Add --network owned_nets:tiny, if you" in refused.output
    resumed = run(glyphs_root, "train", "glyphs", *SMALL, "--out", "run", "--resume")
    assert "owned_nets:tiny, is code of the user's, which is never loaded by its name" in resumed.output
    assert "on the command line --network MODULE:FUNCTION" in resumed.output
    assert not (here / "imported").exists()
    again = ("train", "glyphs", "--network", "owned_nets:tiny", *SMALL, "--out", "run", "--resume")
    assert run(glyphs_root, *again).exit_code == 0
    named = ("--network", "owned_nets:tiny", "--episodes", "2", "--device", "cpu")
    assert "95 % interval" in run(glyphs_root, "eval", "run", "glyphs", *named).output
    for image in ("a/1", "a/2", "b/1", "new"):
        (here / "images" / image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28), len(image) * 50).save(here / "images" / f"{image}.png")
    (here / "images" / "new.png").rename(here / "new.png")
    predict = ("predict", "run", "--support", "images", "new.png")
    assert "Add --network owned_nets:tiny" in run(glyphs_root, *predict).output
    assert run(glyphs_root, *predict, "--network", "owned_nets:tiny").stdout.startswith("new.png  ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owned_nets:nix", "owned_nets:nix cannot be imported: module 'owned_nets' has no attribute 'nix'."),
        ("no_such_module:nix", "no_such_module:nix cannot be imported: No module named 'no_such_module'."),
        ("owned_nets:nothing", "must return a torch.nn.Module, not NoneType"),
        ("owned_nets:failing", "The function for the network fails: ValueError('no such size')"),
        ("conv5", "'conv5' is not one of 'conv4', 'conv3-pool', 'conv4-pool', 'resnet18', 'MODULE:FUNCTION'."),
    ],
)
def test_what_is_no_network_is_refused(here: Path, glyphs_root: Path, name: str, message: str) -> None:
    """With the reason, before anything is written."""
    done = run(glyphs_root, "train", "glyphs", "--network", name, *SMALL, "--out", "run")
    assert (done.exit_code, message in done.output) == (2, True), done.output
    assert not (here / "run").exists()
