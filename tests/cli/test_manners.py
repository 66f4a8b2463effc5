"""How the command line behaves beside its results: progress, -q and -v, disk use, completion, optional packages."""

from __future__ import annotations

import io
import json
import re
import time
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from cli import output
from cli.main import VERBS, main
from mamldata import doctor
from mamldata.archive.benchmarks import benchmarks
from mamldata.bank.inventory import disk_use
from mamldata.datasets.toml import builtin_names

PROJECT = Path(__file__).parents[2]


def run(*arguments: object) -> Result:
    """A command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def archive(glyphs_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small archive. Shared: do not write to it."""
    out = tmp_path_factory.mktemp("manners") / "glyphs-5w1s"
    counts = ("--train", 4, "--val", 2, "--test", 3, "--k-query", 2, "--workers", 1)
    assert run("build", "glyphs", "--out", out, *counts, "--root", glyphs_root).exit_code == 0
    return out


class Terminal(io.StringIO):
    """A terminal that remembers what was drawn."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def pass_seconds(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the clock of ``bars``."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its label, and no lines."""
    monkeypatch.setattr("sys.stderr", stderr := Terminal())
    with output.bars("verify", 10, "images") as advance:
        advance(3)
    assert "verify:   0%" in stderr.getvalue()
    assert "\n" not in stderr.getvalue()


def test_a_file_gets_lines(pass_seconds: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one in half a minute, without a bar; none of what takes less."""
    monkeypatch.setattr("sys.stderr", stderr := io.StringIO())
    with output.bars("verify", 10, "images") as advance:
        advance(3)
        assert stderr.getvalue() == ""
        pass_seconds(31)
        advance(2)
        advance(2)
    with output.bars("hash", 3 * 2**20, "B") as advance:
        pass_seconds(31)
        advance(2**20)
    with output.bars("look", None, "files") as advance:
        pass_seconds(31)
        advance(1234)
    assert stderr.getvalue().splitlines() == [
        "verify: 5 images of 10 images",
        "hash: 1.0 MiB of 3.0 MiB",
        "look: 1,234 files",
    ]


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_quiet_has_no_progress(
    kind: type[io.StringIO], pass_seconds: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither bar nor line."""
    monkeypatch.setattr("sys.stderr", stderr := kind())
    monkeypatch.setattr(output.Manner, "quiet", True)
    with output.bars("verify", 10, "images") as advance:
        pass_seconds(31)
        advance(3)
    assert stderr.getvalue() == ""


def test_quiet_prints_results_and_errors(archive: Path, tmp_path: Path) -> None:
    """And nothing else; the next command is as usual again."""
    usual = run("verify", archive)
    quiet = run("-q", "verify", archive)
    assert (quiet.stdout, quiet.stderr) == (usual.stdout, "")
    assert usual.stderr
    assert not output.Manner.quiet, "it would last for what else this process does"
    wrong = run("--quiet", "verify", tmp_path / "nothing")
    assert wrong.exit_code == 2
    assert "is neither the folder of an archive nor a dataset" in wrong.stderr
    assert run("verify", archive).stderr == usual.stderr


def test_verbose_says_how_long_and_where(archive: Path, tmp_path: Path) -> None:
    """A line for each part; of an error also where it arose."""
    assert re.search(r"^verify: \d+\.\d KiB in \d+\.\d s$", run("-v", "verify", archive).stderr, re.MULTILINE)
    wrong = run("--verbose", "verify", tmp_path / "nothing")
    assert wrong.exit_code == 2
    assert "Traceback" in wrong.stderr
    assert "Traceback" not in run("verify", tmp_path / "nothing").stderr


@pytest.mark.slow
def test_verbose_tells_no_password() -> None:
    """A traceback has addresses as they may be shown."""
    failed = run("-v", "inspect", "http://user:s3cret@127.0.0.1:1/archive?key=s3cret")
    assert failed.exit_code == 1
    assert "Traceback" in failed.stderr
    assert "s3cret" not in failed.output


def test_quiet_and_verbose() -> None:
    """Only one of them."""
    assert run("-q", "-v", "datasets").exit_code == 2


@pytest.mark.slow
def test_validation_and_eval_show_progress(archive: Path, glyphs_root: Path, tmp_path: Path) -> None:
    """They count their episodes."""
    quick = ["--steps", 1, "--meta-batch-size", 2, "--filters", 4, "--device", "cpu"]
    trained = run("-v", "train", archive, "--out", tmp_path / "run", *quick, "--eval-episodes", 2)
    assert "evaluate on val: 2 episodes in" in trained.stderr
    assert "evaluate on test: 3 episodes in" in run("-v", "eval", tmp_path / "run", archive).stderr


def test_live_episodes_show_how_their_bank_is_read(
    glyphs_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bank that was not hashed before counts its bytes, without an archive too."""
    monkeypatch.setenv("MAMLDATA_CACHE", str(tmp_path / "cache"))
    shown = run("-v", "preview", "glyphs", "--out", tmp_path / "p.png", "--root", glyphs_root)
    assert re.search(r"^.*: 3\.6 MiB in \d+\.\d s$", shown.stderr, re.MULTILINE), shown.stderr


def test_disk_use_counts_everything_once(tmp_path: Path) -> None:
    """Large entries apart, small ones together; links are not followed, and what cannot be read is no error."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "a/raw/deep", root / "b", outside):
        folder.mkdir(parents=True)
    (root / "a/raw/deep/x.zip").write_bytes(bytes(2**20))
    (root / "a/raw/y").write_bytes(bytes(5))
    (root / "a/note").write_bytes(bytes(7))
    (root / "b/z").write_bytes(bytes(11))
    (root / "loose").write_bytes(bytes(13))
    (outside / "huge").write_bytes(bytes(2**21))
    (root / "b/out").symlink_to(outside)
    (root / "round").symlink_to(root)
    links = (root / "b/out").lstat().st_size, (root / "round").lstat().st_size
    found = disk_use(root, root, tmp_path / "missing")
    expected = {"a": 7, "a/raw": 2**20 + 5, "b": 11 + links[0], "loose": 13, "round": links[1]}
    assert {path.relative_to(root).as_posix(): size for path, size in found.items()} == expected


def test_datasets_lists_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data root and the cache, each entry with its size, and the sum; as JSON in bytes."""
    monkeypatch.setenv("MAMLDATA_CACHE", str(tmp_path / "cache"))
    for place in (tmp_path / "root/letters/raw/a.zip", tmp_path / "cache/hashed_banks/b.json"):
        place.parent.mkdir(parents=True)
        place.write_bytes(bytes(2048))
    lines = run("datasets", "--disk", "--root", tmp_path / "root").stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["2.0", "KiB", str(tmp_path / "cache/hashed_banks")],
        ["2.0", "KiB", str(tmp_path / "root/letters")],
        ["4.0", "KiB", "together"],
    ]
    listed = json.loads(run("datasets", "--disk", "--json", "--root", tmp_path / "root").stdout)
    assert listed == {str(tmp_path / "cache/hashed_banks"): 2048, str(tmp_path / "root/letters"): 2048}


def completed(*words: str) -> list[str]:
    """What a shell offers for the last word."""
    *before, last = words
    found = ShellComplete(main, {}, "mamldata", "_MAMLDATA_COMPLETE").get_completions(before, last)
    return [item.value for item in found if item.type == "plain"]


def test_shells_complete_verbs_and_names() -> None:
    """Every verb; datasets wherever one is a target, beside files; benchmarks."""
    assert sorted(completed("")) == sorted(VERBS)
    assert completed("ver") == ["verify"]
    for verb in ("fetch", "verify", "build", "preview", "train", "compare"):
        assert completed(verb, "") == builtin_names(), verb
    assert completed("eval", "run", "omniglot") == ["omniglot", "omniglot-small"]
    items = ShellComplete(main, {}, "mamldata", "_MAMLDATA_COMPLETE").get_completions(["train"], "my")
    assert [(item.type, item.value) for item in items] == [("file", "my")]
    assert completed("eval", "--benchmark", "") == list(benchmarks())


def test_the_documented_completion_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable that the documentation names makes the command print the shell's script."""
    monkeypatch.setenv("_MAMLDATA_COMPLETE", "zsh_source")
    done = CliRunner().invoke(main, [], prog_name="mamldata")
    assert "#compdef mamldata" in done.stdout
    assert "_MAMLDATA_COMPLETE=zsh_source mamldata" in "".join(
        page.read_text() for page in (PROJECT / "docs").glob("*.md")
    )


def test_doctor_lists_optional_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of every extra, each with its purpose, and its version or that it is not installed."""
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {package.partition(">")[0] for (package,) in extras.values()}
    assert packages <= doctor.OPTIONAL.keys()

    def version(name: str) -> str:
        if name == "s3fs":
            raise PackageNotFoundError
        return "1.2"

    monkeypatch.setattr(doctor, "version", version)
    lines = run("doctor", "--root", tmp_path).stdout.splitlines()
    assert "  s3fs (archives at s3://): not installed" in lines
    assert "  higher (train --engine higher): 1.2" in lines
    assert "name conflicts: none" in lines
