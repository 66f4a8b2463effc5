"""Benchmarks on the command line: build, recognize and evaluate on them by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli.main import main
from mamldata.archive.benchmarks import benchmark, benchmarks

NAME = "glyphs-5w1s"
THREE_WAY = Path(__file__).parents[1] / "fixtures" / "first" / "runs" / "maml-finished"


def run(*words: object, root: Path) -> Result:
    """A command in this process."""
    return CliRunner().invoke(main, list(map(str, words)), env={"MAMLDATA_ROOT": str(root)})


@pytest.fixture(scope="module")
def root(glyphs_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with glyphs and the archive of ``glyphs-5w1s``."""
    root = tmp_path_factory.mktemp("benchmarks") / "root"
    shutil.copytree(glyphs_root, root)
    result = run("build", "--benchmark", NAME, "--workers", 1, root=root)
    assert result.exit_code == 0, result.output
    assert f"{root}/benchmarks/{NAME}: glyphs" in result.stdout
    assert f"benchmark {NAME}\n" in result.stdout
    return root


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a very short run on live episodes of glyphs."""
    out = tmp_path_factory.mktemp("runs") / "run"
    quick = [
        "--k-query",
        "1",
        "--steps",
        "1",
        "--meta-batch-size",
        "1",
        "--eval-episodes",
        "2",
        "--filters",
        "2",
        "--device",
        "cpu",
    ]
    result = run("train", "glyphs", "--out", out, *quick, root=root)
    assert result.exit_code == 0, result.output
    return out


def test_the_list(root: Path) -> None:
    """Every benchmark with its definition and digest, and whether it is built here; also as JSON."""
    text = run("benchmarks", root=root).stdout
    assert f"digest sha256:{benchmark(NAME).sha256}, built in {root}/benchmarks/{NAME}\n" in text
    assert "mini-imagenet-5w1s: 5-way 1-shot, 15 queries per class; 1,000 test episodes of mini-imagenet" in text
    assert "    digest not pinned yet\n" in text
    entries = {entry["name"]: entry for entry in json.loads(run("benchmarks", "--json", root=root).stdout)}
    assert list(entries) == list(benchmarks())
    assert [name for name, entry in entries.items() if entry["here"]] == [NAME]
    assert entries["omniglot-20w5s"]["n_way"] == 20


def test_the_archive_is_recognized(root: Path, tmp_path: Path) -> None:
    """Inspect and verify print the name of an archive at any place, and propose no training on it."""
    copy = shutil.copytree(root / "benchmarks" / NAME, tmp_path / "copy")
    assert f"\n  benchmark {NAME}\n" in run("inspect", copy, root=root).stdout
    assert json.loads(run("inspect", copy, "--json", root=root).stdout)["benchmark"] == NAME
    verified = run("verify", copy, root=root)
    assert verified.stdout.endswith(f"digest {benchmark(NAME).sha256}, benchmark {NAME}\n")
    drawn = run("preview", copy, "--out", tmp_path / "p.png", root=root)
    assert "train" not in verified.stderr + drawn.stderr


def test_another_archive_is_no_benchmark(root: Path, tmp_path: Path) -> None:
    """It is shown without a name."""
    counts = ("--train", 2, "--val", 2, "--test", 2, "--workers", 1)
    built = run("build", "glyphs", "--out", tmp_path / "a", *counts, root=root)
    assert built.exit_code == 0, built.output
    assert "benchmark" not in built.stdout
    assert json.loads(run("inspect", tmp_path / "a", "--json", root=root).stdout)["benchmark"] is None


@pytest.mark.slow
def test_eval_builds_what_is_missing(trained: Path, glyphs_root: Path, root: Path, tmp_path: Path) -> None:
    """The archive is built under the root, and then used: the second time neither images nor raw files are needed."""
    shutil.copytree(glyphs_root / "glyphs", tmp_path / "glyphs")
    words = ("eval", trained, "--benchmark", NAME, "--device", "cpu")
    first = run(*words, root=tmp_path)
    assert first.exit_code == 0, first.output
    assert f"\nbenchmark {NAME}, digest sha256:{benchmark(NAME).sha256}\n" in first.stdout
    shutil.rmtree(tmp_path / "glyphs")
    again = json.loads(run(*words, "--json", root=tmp_path).stdout)
    assert (again["benchmark"], again["digest"], again["episodes"]) == (NAME, benchmark(NAME).sha256, 100)
    assert f"{100 * again['accuracy']:.2f} %" in first.stdout


@pytest.mark.slow
def test_some_of_the_episodes_are_not_the_benchmark(trained: Path, root: Path) -> None:
    """Eval on the archive itself says so when all its episodes were used, and when only some were."""
    words = ("eval", trained, root / "benchmarks" / NAME, "--device", "cpu")
    some = run(*words, "--episodes", 4, root=root)
    assert f"\nthe first 4 of 100 episodes of benchmark {NAME}, digest sha256:" in some.stdout
    assert json.loads(run(*words, "--episodes", 4, "--json", root=root).stdout)["benchmark"] is None
    assert json.loads(run(*words, "--json", root=root).stdout)["benchmark"] == NAME


def test_a_network_that_does_not_fit(tmp_path: Path) -> None:
    """It is refused before anything is built or fetched."""
    result = run("eval", THREE_WAY, "--benchmark", NAME, root=tmp_path)
    assert result.exit_code == 2
    assert "was trained with n_way 3, but these episodes have 5" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["build", "glyphs", "--benchmark", NAME], f"Give either 'glyphs' or --benchmark {NAME}, not both."),
        (
            ["build", "--benchmark", NAME, "--n-way", "3", "--train", "0", "--episodes-per-shard", "9"],
            f"--n-way, --train, --episodes-per-shard: the benchmark {NAME} defines its episodes.",
        ),
        (["build", "--benchmark", NAME, "--shards", "1/2"], "--shards: the benchmark"),
        (["build", "--benchmark", "glyphs-5w2s"], "There is no benchmark 'glyphs-5w2s'. Did you mean 'glyphs-5w1s'?"),
        (["build", "--out", "a"], "Missing the dataset: give NAME, FILE.toml or FOLDER, or --benchmark."),
        (["build", "glyphs"], "Missing option '--out'"),
        (["eval", THREE_WAY], "Missing the episodes: give NAME, FOLDER or ARCHIVE, or --benchmark."),
        (["eval", THREE_WAY, "glyphs", "--benchmark", NAME], f"Give either 'glyphs' or --benchmark {NAME}, not both."),
        (
            ["eval", THREE_WAY, "--benchmark", NAME, "--episodes", "9", "--split", "val", "--k-query", "2"],
            f"--split, --episodes, --k-query: the benchmark {NAME} defines its episodes.",
        ),
    ],
)
def test_what_contradicts_a_benchmark_is_refused(words: list[object], text: str, tmp_path: Path) -> None:
    """Wrong usage, exit code 2, and nothing is made."""
    result = run(*words, root=tmp_path)
    assert result.exit_code == 2, result.output
    assert text in result.stderr
    assert not list(tmp_path.iterdir())
