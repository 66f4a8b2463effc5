"""A dataset that is only tested on: everything but training works without train and val classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import mamldata
from cli.main import main
from trainer.data import EpisodeData

FIXTURES = Path(__file__).parents[1] / "fixtures" / "first"
RUN = FIXTURES / "runs" / "meta-sgd-midway"  # it trained on normalized images
SCHEME = """
[splits.tested]
description = "twelve classes to test on"
seed = 1
train = 0
val = 0
test = 12
"""
EPISODES = ("--n-way", "3", "--k-query", "2", "--split-scheme", "tested")


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a manifest whose scheme ``tested`` has test classes alone, its data root, and an archive of it."""
    shutil.copytree(FIXTURES / "root", tmp_path / "root")
    (tmp_path / "tiny.toml").write_text((FIXTURES / "tiny.toml").read_text() + SCHEME)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAMLDATA_ROOT", "root")
    built = run("build", "tiny.toml", *EPISODES, "--train", "0", "--val", "0", "--test", "6", "--out", "A")
    assert built.exit_code == 0, built.output
    return tmp_path


def run(*words: str) -> Result:
    """A command in this process."""
    return CliRunner().invoke(main, words)


def test_the_archive_is_shown_verified_and_drawn(there: Path) -> None:
    """Inspect, verify and preview work; normalization is by mean 0 and deviation 1, as no image is trained on."""
    for words in (["inspect", "A"], ["verify", "A"], ["preview", "A", "--out", "A.png"]):
        assert run(*words).exit_code == 0
    archive = mamldata.read_archive("A")
    assert list(archive.splits) == ["test"]
    assert archive.normalization == ((0.0,), (1.0,))


@pytest.mark.parametrize("words", [["A"], ["A", "--episodes", "5"], ["tiny.toml", *EPISODES, "--episodes", "4"]])
def test_a_run_is_evaluated_on_it(there: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the archive, on some of its episodes and on live ones; images are normalized as in training."""
    asked: list[object] = []

    def spy(data: EpisodeData, *arguments: Any, normalize: object, **options: Any) -> Any:
        asked.append(normalize)
        return plain(data, *arguments, normalize=normalize, **options)

    plain = EpisodeData.eval
    monkeypatch.setattr(EpisodeData, "eval", spy)
    result = run("eval", str(RUN), *words, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["episodes"] == int(words[-1] if len(words) > 1 else 6)
    assert asked == [((0.402808,), (0.414081,))]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["A"], "The archive has no episodes of split 'val'; it has test."),
        (["tiny.toml", *EPISODES], "tiny, split scheme 'tested', has no classes in val; it has classes in test."),
    ],
)
def test_training_on_it_is_refused(there: Path, words: list[str], text: str) -> None:
    """Before a run folder is made, naming the splits that have classes."""
    result = run("train", *words, "--out", "run")
    assert result.exit_code == 2
    assert text in result.stderr
    assert not Path("run").exists()


def test_a_build_names_every_empty_split(there: Path) -> None:
    """One error for train and val."""
    result = run("build", "tiny.toml", *EPISODES, "--out", "B")
    assert result.exit_code == 2
    assert "has no classes in train and val; it has classes in test. Request no episodes of train" in result.stderr
    assert not Path("B").exists()
