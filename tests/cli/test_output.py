"""What the command line prints: nothing that changes a terminal, commands that work, and a clear end on a full disk."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tomllib
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.main import main
from cli.output import print_json, show, use_command
from mamldata import errors, words
from mamldata.datasets.load import load_manifest
from mamldata.errors import ManifestError

PROJECT = Path(__file__).parents[2]
full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


def test_control_characters_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    """In results and in errors: names come from files."""
    show("class \x1b[2J\u202e\udcff\nnext")
    assert capsys.readouterr().out == "class \\x1b[2J\\u202e\\udcff\\nnext\n"
    assert str(errors.DamagedError("a \x1b[2J\x9b1m\nb")) == "a \\x1b[2J\\x9b1m\nb"


def test_programs_get_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where a loss is not finite; all other numbers stay the same."""
    print_json({"loss": float("nan"), "accuracies": (0.1, -float("inf")), "index": 2**63})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "loss": None,
        "accuracies": [0.1, None],
        "index": 2**63,
    }


def test_a_misspelt_verb() -> None:
    """The likely one is suggested."""
    result = CliRunner().invoke(main, ["bulid"])
    assert result.exit_code == 2
    assert "No such command 'bulid'. Did you mean 'build'?" in result.stderr


def test_the_next_command_works() -> None:
    """An archive without train or val episodes is looked at, not trained on."""
    assert use_command("a", ["train", "val", "test"])[:2] == ["train", "a"]
    assert use_command("a", ["train", "test"]) == ["preview", "a", "--split", "train", "--out", "a.png"]
    assert use_command("a", ["test"]) == ["preview", "a", "--split", "test", "--out", "a.png"]


def test_every_extra_can_be_installed() -> None:
    """The hint names the packages of the extra, because the project is on no index."""
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, (package,) in extras.items():
        name = re.split("[>=]", package)[0]
        keep = f" torch=={version('torch')}" if name == "torchvision" else ""  # which pip would exchange
        assert words.install_command(extra) == f"pip install {name}{keep}"


def test_one_is_not_many() -> None:
    """One class, two classes."""
    assert [words.counted(n, "class", "classes") for n in (0, 1, 2000)] == ["0 classes", "1 class", "2,000 classes"]


@pytest.mark.parametrize("line", ['format = "{}"', "format = 0x{}", "title = 0x{}", '"{}" = 1', 'title = ["{}"]'])
def test_what_a_manifest_says_is_not_repeated_at_length(line: str, tmp_path: Path) -> None:
    """A message stays short, whatever the file holds."""
    (tmp_path / "long.toml").write_text(line.replace("{}", "1" * 100_000))
    with pytest.raises(ManifestError) as caught:
        load_manifest(str(tmp_path / "long.toml"))
    assert len(str(caught.value)) < 5000


@full_disk
@pytest.mark.slow
@pytest.mark.parametrize("line", ["--help", "datasets", "datasets --json", "recipes", "build --help"])
def test_output_to_a_full_disk(line: str) -> None:
    """One line that says so, and exit code 1."""
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "mamldata", *line.split()]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=PROJECT, env=os.environ, check=False
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1


def test_too_few_descriptors(glyphs_root: Path) -> None:
    """The message says how many files may be open, and how to raise that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    import mamldata  # before the limit, with all that it imports on first use

    mamldata.live("glyphs", root=glyphs_root)
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/dev/fd").iterdir())) + 8, hard))
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(errors.MamldataError, match=r"Too many open files.* may open \d+; raise that"):
            load_manifest(str(PROJECT / "manifests" / "glyphs.toml"))
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
