"""Train here, test there: several targets of ``eval``, fitted images, and several sources of ``train``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from cli.main import main
from mamldata.archive.index import read_archive
from trainer.results import read_result

SHAPE = ("--n-way", "3", "--k-query", "2")


def run(*words: object) -> Result:
    """A command in this process."""
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory, glyphs_root: Path) -> Path:
    """Two archives of glyphs, photographs of 12x12 in colour to test on, and a run; 3-way 1-shot."""
    place = tmp_path_factory.mktemp("targets")
    for name in "abcd":
        (place / "photos" / "test" / name).mkdir(parents=True)
        for number in range(3):
            colour = (60 * number, 40 * "abcd".index(name), 200)
            Image.new("RGB", (12, 12), colour).save(place / "photos" / "test" / name / f"{number}.png")
    for name, seed in (("A", 0), ("B", 1)):
        counts = ("--train", 6, "--val", 4, "--test", 5, "--workers", 1)
        built = run("build", "glyphs", *SHAPE, "--seed", seed, *counts, "--out", place / name, "--root", glyphs_root)
        assert built.exit_code == 0, built.output
    quick = ("--steps", 1, "--filters", 4, "--meta-batch-size", 2, "--device", "cpu", "--normalize")
    trained = run("train", place / "A", *quick, "--out", place / "run")
    assert trained.exit_code == 0, trained.output
    return place


@pytest.fixture(autouse=True)
def _there(there: Path, glyphs_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(there)
    monkeypatch.setenv("MAMLDATA_ROOT", str(glyphs_root))


def kept() -> dict[str, object]:
    """The table that was written last."""
    newest = max(Path("run/results/targets").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    table: dict[str, object] = json.loads(newest.read_text())
    return table


def test_one_table_of_several_targets() -> None:
    """A line for each, with what evaluating it alone gives; the same in a file, which names those of the answers."""
    alone = [json.loads(run("eval", "run", name, "--json", "--device", "cpu").stdout) for name in "AB"]
    shown = run("eval", "run", "A", "B", "--device", "cpu")
    assert shown.exit_code == 0, shown.output
    head, *lines = shown.stdout.splitlines()
    assert head.split() == ["target", "split", "scheme", "split", "accuracy", "digest"]
    for name, line, single in zip("AB", lines, alone, strict=True):
        digest = read_archive(Path(name)).digest
        accuracy = f"{100 * single['accuracy']:.2f} % ± {100 * single['interval']:.2f}"
        assert line.split("  ")[0] == name
        assert accuracy in line
        assert f"seeded        test   {accuracy}" in line
        assert line.endswith(f"sha256:{digest[:12]}…")
    table = kept()
    assert table["format"] == "mamldata-targets/1"
    for row, single in zip(table["targets"], alone, strict=True):  # type: ignore[call-overload]
        answers = read_result(Path("run/results") / row["file"])
        assert (row["digest"], row["accuracy"]) == (single["digest"], single["accuracy"])
        assert answers.evaluation["accuracy"] == row["accuracy"]
    as_json = json.loads(run("eval", "run", "A", "B", "--device", "cpu", "--json").stdout)
    assert as_json["targets"] == table["targets"]


def test_a_target_that_fails_takes_none_with_it() -> None:
    """The others are shown and kept, before and after it; the failures are named, and the exit code is 1."""
    done = run("eval", "run", "A", "nothing", "photos", "B", *SHAPE, "--device", "cpu")
    assert done.exit_code == 1
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["target", "A", "nothing", "photos", "B"]
    assert "Error: 2 targets of 4 failed:" in done.stderr
    assert "nothing: 'nothing' is neither the folder of an archive nor a dataset" in done.stderr
    assert "photos: " in done.stderr.partition("Error: ")[2]
    assert "--fit-images" in done.stderr
    rows = kept()["targets"]
    assert ["error" in row for row in rows] == [False, True, True, False]  # type: ignore[attr-defined]


def test_fitted_images_are_said() -> None:
    """Colours of 84x84 become grey of 28x28; result, file and table say so; images that fit stay as they are."""
    alone = run("eval", "run", "photos", *SHAPE, "--episodes", 4, "--fit-images", "--device", "cpu")
    assert alone.exit_code == 0, alone.output
    assert alone.stdout.strip().endswith("images fitted from 84x84x3")
    both = run("eval", "run", "A", "photos", *SHAPE, "--episodes", 4, "--fit-images", "--device", "cpu", "--json")
    plain, fitted = json.loads(both.stdout)["targets"]
    assert "fitted_from" not in plain
    assert fitted["fitted_from"] == [84, 84, 3]
    assert read_result(Path("run/results") / fitted["file"]).target["fitted_from"] == [84, 84, 3]
    assert plain["file"] in {path.name for path in Path("run/results").iterdir()}


def test_what_does_not_fit_is_refused() -> None:
    """Other images name --fit-images; other ways are refused even so; a benchmark is known by its name."""
    images = run("eval", "run", "photos", *SHAPE, "--device", "cpu")
    assert images.exit_code == 2
    assert "image_shape [28, 28, 1], but these episodes have [84, 84, 3]" in images.stderr
    assert "with --fit-images" in images.stderr
    for words in (("glyphs", "--n-way", 4), ("photos", "--n-way", 4, "--k-query", 2), ("glyphs-5w1s",)):
        ways = run("eval", "run", *words, "--fit-images", "--device", "cpu")
        assert ways.exit_code == 2, ways.output
        assert "was trained with n_way 3, but these episodes have" in ways.stderr
    assert run("eval", "run", "A", "B", "--benchmark", "glyphs-5w1s").exit_code == 2
    missing = run("eval", "elsewhere", "A", "B")
    assert missing.exit_code == 2


def test_training_on_two_sources(tmp_path: Path) -> None:
    """The run names both with their weights, is evaluated on each, and goes on with the same weights alone."""
    words = ("--filters", 4, "--meta-batch-size", 2, "--device", "cpu", "--out", tmp_path / "run", *SHAPE)
    done = run("train", "A", "glyphs", "--weights", "3,1", "--steps", 2, *words)
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert [(one["weight"], one["remix"]) for one in data["sources"]] == [(3.0, True), (1.0, False)]
    assert data["sources"][0]["digest"] == read_archive(Path("A")).digest
    assert " A glyphs --n-way 3" in done.stderr.partition("Next: mamldata eval")[2]
    assert run("eval", tmp_path / "run", "A", "--device", "cpu").exit_code == 0
    other = run("train", "A", "glyphs", "--weights", "1,1", "--steps", 3, "--resume", *words)
    assert other.exit_code == 2
    assert "holds another run" in other.stderr


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("0.7;0.3", "not numbers with commas between"),
        ("1,2,3", "weights has 3 numbers, but there are 2 sources"),
        ("-1,2", "finite numbers from 0, not -1.0"),
        ("nan,1", "not nan"),
        ("0,0", "must not all be 0"),
    ],
)
def test_weights_that_are_none(weights: str, message: str, tmp_path: Path) -> None:
    """Refused at once, and nothing is written."""
    done = run("train", "A", "B", "--weights", weights, "--out", tmp_path / "run")
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "run").exists()
