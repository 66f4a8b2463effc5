"""The command line, used as a user would: what is printed where, and with which exit code."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import mamldata
from cli.main import VERBS, main
from cli.output import train_command
from mamldata.datasets.toml import builtin_names
from mamldata.errors import MamldataError
from trainer.settings import OLD_NAMES, SETTINGS, TrainSettings

MANIFEST = """
format = "mamldata-manifest/1"
name = "Bad Name"
title = "t"
version = "1"
licence = "l"
homepage = "h"
citation = "c"
split_scheme = "s"
[[files]]
name = "a.zip"
urls = ["ftp://example.org/a.zip"]
bytes = 3
[reader]
type = "class-folders"
[image]
size = 8
channels = 1
resampling = "box"
[splits.s]
description = "d"
seed = 0
train = 2
val = 2
test = 2
"""


def run(*arguments: object, root: Path | None = None) -> Result:
    """A command in this process."""
    environment = {"MAMLDATA_ROOT": str(root) if root else ""}
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env=environment)


def refused(result: Result, code: int, *texts: str) -> None:
    """Check a failure: its code, its words on stderr, nothing on stdout, no traceback."""
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    for text in texts:
        assert text in result.stderr
    assert result.stdout == ""


@pytest.fixture(scope="session")
def archive(glyphs_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small archive of glyphs, built by the command."""
    out = tmp_path_factory.mktemp("cli") / "glyphs-5w1s"
    counts = ("--train", 20, "--val", 4, "--test", 6, "--k-query", 3, "--workers", 1)
    result = run("build", "glyphs", "--out", out, *counts, root=glyphs_root)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="session")
def trained(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a very short run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    result = run("train", archive, "--out", out, "--steps", 2, "--meta-batch-size", 2, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return out


def test_help_names_every_verb_and_imports_no_torch():
    """The overview shows all verbs, and answers without importing torch, webdataset or pillow."""
    code = "import sys; from cli.main import main; main(['--help'], standalone_mode=False); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(re.search(rf"^  {verb} ", done.stdout, re.M) for verb in VERBS)
    assert not {"'torch'", "'webdataset'", "'PIL'"} & set(re.findall(r"'\w+'", done.stdout))


@pytest.mark.parametrize(
    "verb",
    [
        *("datasets", "benchmarks", "fetch", "verify", "build", "inspect", "preview", "recipes", "train", "eval"),
        *("compare", "export", "models", "predict", "report"),
    ],
)
def test_a_verbs_help_imports_no_torch(verb: str):
    """Help and the data verbs start without torch."""
    code = (
        f"import sys; from cli.main import main; main(['{verb}', '--help'], standalone_mode=False); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def photographs(folder: Path) -> None:
    """Twenty classes of four pictures."""
    chance = np.random.default_rng(0)
    for number in range(20):
        (folder / f"kind {number}").mkdir(parents=True)
        for image in range(4):
            pixels = chance.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"kind {number}" / f"{image}.png")


@pytest.mark.slow
def test_every_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every help ends with examples; run in the order of work, all of them succeed."""
    monkeypatch.setattr("trainer.reports.costs._peak", lambda *_: 1.0)  # test_compare measures it
    examples = [line.strip() for line in run("--help").stdout.splitlines() if line.startswith("    mamldata ")]
    for verb in VERBS:
        found = re.findall(r"^ +(mamldata .*)$", run(verb, "--help").stdout.split("Example")[-1], re.M)
        assert found, f"{verb} --help has no example"
        examples += found
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "my-photos")
    shutil.copytree(tmp_path / "my-photos" / "kind 0", tmp_path / "unsorted")
    for number in range(5):
        shutil.copytree(tmp_path / "my-photos" / f"kind {number}", tmp_path / "my-classes" / f"kind {number}")
    done = set()
    for example in examples:
        if example not in done:
            done.add(example)
            verb, *rest = example.split()[1:]
            arguments = [verb, *rest]
            if verb == "train":  # later options win over those of the example
                arguments += ["--steps", "2", "--meta-batch-size", "2", "--eval-episodes", "4"]
            if rest[:1] == ["glyphs"] and verb == "train":
                arguments += ["--out", "live-run"]
            if verb == "compare":
                arguments += ["--steps", "2", "--meta-batch-size", "2", "--eval-episodes", "4"]
            if verb in {"eval", "compare"} and "--benchmark" not in arguments:
                arguments += ["--episodes", "4"]
            result = run(*arguments, root=tmp_path / "root")
            assert result.exit_code == 0, f"{example}: {result.output}"
    assert len(done) >= len(VERBS)


def next_commands(result: Result) -> list[list[str]]:
    """What the closing line says to do, in words as a shell would take them; none if there is none."""
    found = [line.removeprefix("Next: ") for line in result.stderr.splitlines() if line.startswith("Next: ")]
    assert len(found) <= 1
    words = [shlex.split(command) for line in found for command in line.split(" && ")]
    assert all(command[0] == "mamldata" for command in words)
    return [command[1:] for command in words]


QUICK = {
    "build": "--train 20 --val 4 --test 6 --n-way 3 --k-query 2 --workers 1",
    "train": "--steps 2 --meta-batch-size 2 --eval-episodes 4 --filters 4 --device cpu",
    "eval": "--episodes 4 --device cpu",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "datasets --root 'the root'",
        f"build glyphs --out 'an archive' {QUICK['build']} --root 'the root'",
        "inspect 'an archive'",
        "preview 'an archive' --out p.png",
        "preview 'my photos' --out p.png --n-way 3 --k-query 2 --image-size 8 --seed 3 --root 'the root'",
        "recipes",
        "recipes 'my recipe.toml'",
        "manifest 'my photos' --out 'my photos.toml'",
        f"compare glyphs --out c --algorithms fomaml,random --episodes 4 --n-way 3 {QUICK['train']} --root 'the root'",
    ],
)
def test_the_next_command_runs_as_printed(
    first: str, archive: Path, glyphs_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each closing line, wherever the user stands and keeps data, and then the closing line of that command."""
    monkeypatch.setattr("trainer.reports.costs._peak", lambda *_: 1.0)  # test_compare measures it
    here = tmp_path / "my work"
    here.mkdir()
    monkeypatch.chdir(here)
    shutil.copytree(glyphs_root, here / "the root")
    if not first.startswith("build"):
        shutil.copytree(archive, here / "an archive")
    photographs(here / "my photos")
    recipe = (resources.files("trainer") / "recipes" / "maml-omniglot-20w1s.toml").read_text()
    (here / "my recipe.toml").write_text(recipe.replace('"omniglot"', '"glyphs"').replace("n_way = 20", "n_way = 3"))
    todo, quick, said = [shlex.split(first)], {}, 0
    while todo:
        verb, *words = todo.pop(0)
        if "omniglot" in words:
            continue  # whose files are not here
        done = run(verb, *words, *shlex.split(quick.get(verb, "")), root=tmp_path / "another root")
        assert done.exit_code == 0, f"mamldata {shlex.join([verb, *words])}: {done.output}"
        printed = next_commands(done)
        assert all(words[-2:] == ["--root", "the root"] for words in printed if "the root" in first)
        todo += printed
        said += len(printed)
        quick = QUICK
    assert said


def test_a_recipe_for_other_data_has_no_next_command(tmp_path: Path):
    """Where a dataset lies that is not built in, nobody knows."""
    recipe = (resources.files("trainer") / "recipes" / "maml-omniglot-5w1s.toml").read_text()
    (tmp_path / "mine.toml").write_text(recipe.replace('"omniglot"', '"my-photos"'))
    done = run("recipes", tmp_path / "mine.toml")
    assert done.exit_code == 0, done.output
    assert next_commands(done) == []


@pytest.mark.parametrize(
    ("target", "out"),
    [
        ("s3://bucket/deep/glyphs-5w1s/", "glyphs-5w1s-maml"),
        ("https://example.org/a?key=b/c", "a-maml"),
        ("some folder/photos.toml", "photos-maml"),
        ("taken", "taken-maml-3"),
    ],
)
def test_a_run_is_called_after_its_data(target: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder that the closing line proposes stands beside what is here, and is a new one."""
    monkeypatch.chdir(tmp_path)
    for name in ("taken-maml", "taken-maml-2"):
        (tmp_path / name).mkdir()
    assert train_command(target) == ["train", target, "--out", out]


def test_datasets_says_what_is_here(glyphs_root: Path):
    """``datasets`` lists every dataset with its split schemes and state, also as JSON."""
    text = run("datasets", root=glyphs_root)
    assert "glyphs" in text.stdout
    assert "1 of 1 raw files" in text.stdout
    entries = {entry["name"]: entry for entry in json.loads(run("datasets", "--json", root=glyphs_root).stdout)}
    assert list(entries) == builtin_names()
    assert entries["glyphs"]["files_here"] == 1
    assert [scheme["name"] for scheme in entries["omniglot"]["split_schemes"]] == ["maml", "vinyals", "lake"]


def test_build_in_portions(archive: Path, glyphs_root: Path, tmp_path: Path):
    """A job array's two portions, and the call that closes the archive: what each says, and the same digest."""
    counts = ("--train", 20, "--val", 4, "--test", 6, "--k-query", 3, "--workers", 1)
    build = ("build", "glyphs", "--out", tmp_path / "a", *counts)
    first = run(*build, "--shards", "1/2", root=glyphs_root)
    assert f"{tmp_path / 'a'}: portion 1/2, 2 of 3 shards, 2 of them written by this call" in first.stdout
    assert "run the same command without --shards to close the archive" in first.stderr
    second = json.loads(run(*build, "--shards", "2/2", "--json", root=glyphs_root).stdout)
    assert second == {
        "archive": str(tmp_path / "a"),
        "portion": "2/2",
        "shards": 1,
        "written": 1,
        "of_shards": 3,
        "left_out": [],
    }
    refused(run("inspect", tmp_path / "a"), 2, "unfinished build")
    closed = run(*build, "--json", root=glyphs_root)
    assert json.loads(closed.stdout)["digest"] == json.loads(run("inspect", archive, "--json").stdout)["digest"]


@pytest.mark.slow
def test_build_to_an_address(s3: Any, archive: Path, glyphs_root: Path):
    """Build to S3, then inspect and verify there: the digest of the folder's archive."""
    counts = ("--train", 20, "--val", 4, "--test", 6, "--k-query", 3, "--workers", 1)
    built = run("build", "glyphs", "--out", f"{s3.url}/a", *counts, "--json", root=glyphs_root)
    digest = json.loads(run("inspect", archive, "--json").stdout)["digest"]
    assert json.loads(built.stdout)["digest"] == digest
    assert json.loads(run("inspect", f"{s3.url}/a", "--json").stdout)["digest"] == digest
    assert f"{s3.url}/a is whole, digest {digest}" in run("verify", f"{s3.url}/a").stdout


def test_what_is_left_out_of_a_folder_is_told(tmp_path: Path):
    """By build, by portions and by inspect: how many images and classes, and which files are not among them."""
    folder, root = tmp_path / "photos", tmp_path / "root"
    photographs(folder)
    (folder / "iphone").mkdir()
    (folder / "iphone" / "1.HEIC").write_bytes(b"x")
    asked = ("build", folder, "--n-way", 2, "--k-query", 1, "--train", 2, "--val", 0, "--test", 0, "--workers", 1)
    told = [
        "Left out: 1 file that is not read as an image (.heic 1): iphone/1.HEIC",
        "Left out: 1 folder of files without any image: iphone",
    ]
    built = run(*asked, "--out", tmp_path / "a", root=root)
    assert built.stderr.splitlines()[:3] == [f"{folder}: 80 images of 20 classes", *told]
    assert run(*asked, "--out", tmp_path / "b", "--shards", "1/1", root=root).stderr.splitlines()[1:3] == told
    inspected = run("inspect", tmp_path / "a", root=root)
    assert inspected.stderr.splitlines()[:2] == told
    assert "of    13 classes (52 images)" in inspected.stdout
    (folder / "iphone" / "2.HEIC").write_bytes(b"x")
    values = [
        json.loads(run(*command, "--json", root=root).stdout)
        for command in ((*asked, "--out", tmp_path / "a"), ("inspect", tmp_path / "a"))
    ]
    assert [[group["count"] for group in one["left_out"]] for one in values] == [[2, 1], [1, 1]]
    assert values[1]["splits"]["train"]["images"] == 52
    elsewhere = run("inspect", tmp_path / "a", "--root", tmp_path / "none", "--json")
    assert json.loads(elsewhere.stdout)["left_out"] is None


def test_fetch_then_build_then_verify(tmp_path: Path):
    """The data verbs in a row, in an empty root; the second fetch and build find everything there."""
    root, out = tmp_path / "root", tmp_path / "archive"
    build = ("build", "glyphs", "--out", out, "--train", 4, "--val", 2, "--test", 2, "--workers", 1)
    fetched = run("fetch", "glyphs", root=root)
    assert fetched.exit_code == 0, fetched.output
    assert "generated" in fetched.stdout
    assert "here already" in run("fetch", "glyphs", root=root).stdout
    built = run(*build, root=root)
    assert built.exit_code == 0, built.output
    digest = re.search(r"digest sha256:([0-9a-f]{64})", built.stdout)
    assert digest is not None
    assert digest[0] in run(*build, root=root).stdout
    assert digest[0] in run("inspect", out).stdout
    assert json.loads(run("inspect", out, "--json").stdout)["digest"] == digest[1]
    assert run("verify", out).stdout == f"{out} is whole, digest {digest[1]}\n"
    assert run("verify", out, "--digest", f"sha256:{digest[1]}").exit_code == 0
    wrong = run("verify", out, "--digest", "0" * 64)
    assert wrong.exit_code == 1
    assert "is another archive" in wrong.stdout
    assert run("verify", "glyphs", root=root).exit_code == 0


def test_verify_names_the_damaged_file(archive: Path, tmp_path: Path):
    """A flipped byte makes ``verify`` exit with 1 and name the shard, also in JSON."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in archive.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    shard = copy / "test-00000.tar"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    result = run("verify", copy)
    assert result.exit_code == 1
    assert "test-00000.tar" in result.stdout
    report = json.loads(run("verify", copy, "--json").stdout)
    assert report["whole"] is False
    assert "test-00000.tar" in report["problems"][0]


def done(*arguments: object, root: Path | None = None) -> Result:
    """A command that succeeds."""
    result = run(*arguments, root=root)
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.slow
def test_thin_archives_and_narrower_episodes(glyphs_root: Path, tmp_path: Path):
    """A thin archive is built, shown, verified, drawn, trained and evaluated on by the same commands as a full one."""
    episodes = ("--n-way", 3, "--k-query", 4, "--train", 500, "--val", 12, "--test", 8)
    full = done("build", "glyphs", "--out", tmp_path / "full", *episodes, root=glyphs_root)
    thin = done("build", "glyphs", "--out", tmp_path / "thin", *episodes, "--thin", root=glyphs_root)
    assert "thin: " in thin.stdout
    assert "thin: " not in full.stdout
    assert "is whole" in done("verify", tmp_path / "thin").stdout
    assert json.loads(done("inspect", tmp_path / "thin", "--json").stdout)["thin"] is True
    results = []
    for kind in ("full", "thin"):
        archive, out = tmp_path / kind, tmp_path / f"{kind}-run"
        done("preview", archive, "--out", tmp_path / f"{kind}.png")
        done(
            "train",
            archive,
            "--out",
            out,
            "--filters",
            4,
            "--meta-batch-size",
            2,
            "--eval-episodes",
            4,
            "--device",
            "cpu",
            "--steps",
            2,
            "--eval-every",
            2,
            "--k-query",
            2,
        )
        wide = json.loads(done("eval", out, archive, "--json").stdout)
        narrow = json.loads(done("eval", out, archive, "--json", "--k-query", 1).stdout)
        assert (wide["k_query"], narrow["k_query"]) == (4, 1)
        results.append((wide["accuracy"], narrow["accuracy"]))
        refused(run("eval", out, archive, "--k-query", 5), 2, "k_query must be from 1 to 4")
        refused(run("eval", out, archive, "--seed", 5), 2, "--seed: the episodes of the archive")
    assert results[0] == results[1]
    assert (tmp_path / "full.png").read_bytes()


@pytest.mark.slow
def test_unequal_queries(glyphs_root: Path, tmp_path: Path):
    """Queries that are shared out unequally can be drawn, stored thin and evaluated on, but not stored in full."""
    episodes = ("--n-way", 3, "--k-query", 4, "--query-alpha", 1)
    done("preview", "glyphs", "--out", tmp_path / "p.png", *episodes, root=glyphs_root)
    refused(run("build", "glyphs", "--out", tmp_path / "full", *episodes, root=glyphs_root), 2, "Build a thin one")
    done("build", "glyphs", "--out", tmp_path / "thin", *episodes, "--thin", "--train", 50, root=glyphs_root)
    done("preview", tmp_path / "thin", "--out", tmp_path / "q.png", "--split", "test", "--episode", 3)
    out = tmp_path / "run"
    done(
        "train",
        tmp_path / "thin",
        "--out",
        out,
        "--filters",
        4,
        "--meta-batch-size",
        2,
        "--eval-episodes",
        4,
        "--device",
        "cpu",
        "--steps",
        1,
        "--eval-every",
        1,
        "--no-remix",
    )
    stored = json.loads(done("eval", out, tmp_path / "thin", "--json", "--episodes", 9).stdout)
    drawn = json.loads(done("eval", out, "glyphs", "--json", "--episodes", 9, *episodes, root=glyphs_root).stdout)
    assert stored["accuracy"] == drawn["accuracy"]


def test_preview_draws_an_archive_and_a_dataset(archive: Path, glyphs_root: Path, tmp_path: Path):
    """``preview`` writes a PNG that Pillow reads, for both kinds of target."""
    for target in (archive, "glyphs"):
        out = tmp_path / "deep" / "folder" / "p.png"
        result = run("preview", target, "--out", out, "--episode", 1, root=glyphs_root)
        assert result.exit_code == 0, result.output
        with Image.open(out) as picture:
            assert picture.format == "PNG"
            assert picture.width > 400
        assert [path.name for path in out.parent.iterdir()] == ["p.png"]


def test_a_folder_of_photographs_is_a_dataset(tmp_path: Path):
    """Build, verify and preview straight from it; then a manifest is written, and fetched from it."""
    photographs(tmp_path / "photos")
    shape = ("--n-way", 3, "--k-shot", 1, "--k-query", 2, "--image-size", 8)
    counts = ("--train", 4, "--val", 2, "--test", 2)
    root, archive = tmp_path / "root", tmp_path / "archive"
    built = run("build", tmp_path / "photos", "--out", archive, *shape, *counts, root=root)
    assert built.exit_code == 0, built.output
    assert "photos (version 1), split scheme seeded" in built.stdout
    assert run("verify", tmp_path / "photos", root=root).stdout == f"{tmp_path / 'photos'} is whole\n"
    assert run("preview", tmp_path / "photos", "--out", tmp_path / "p.png", *shape, root=root).exit_code == 0
    refused(run("build", tmp_path / "photos", "--out", tmp_path / "b", *shape, "--n-way", 9, root=root), 2, "n_way")

    toml = tmp_path / "photos.toml"
    written = run("manifest", tmp_path / "photos", "--out", toml)
    assert "dataset photos, reader class-folders, of images.tar" in written.stdout
    refused(run("manifest", tmp_path / "photos", "--out", toml), 2, "already exists")
    assert json.loads(run("fetch", toml, "--dry-run", "--json", root=root).stdout)[0]["action"] == "missing"
    refused(run("fetch", toml, root=root), 1, "images.tar: looked for in", "--from FOLDER")
    fetched = run("fetch", toml, "--from", tmp_path / "photos", root=root)
    assert "images.tar: collected from" in fetched.stdout
    assert "80 images" in fetched.stdout
    assert "had" not in run("fetch", toml, root=root).stderr
    (entry,) = json.loads(run("fetch", toml, "--json", root=root).stdout)
    assert (entry["how"], entry["images"]) == ("had", 80)


SEVERAL = """\
import json, sys
from click.testing import CliRunner
import mamldata
from cli.main import main
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(main, arguments)
    print(json.dumps([result.exit_code, result.output]))
"""


@pytest.mark.slow
def test_a_root_of_others(glyphs_root: Path, tmp_path: Path, run_read_only: Callable[..., Any]):
    """With files and bank complete every verb but fetch works where nothing can be written; another is refused."""
    root = shutil.copytree(glyphs_root, tmp_path / "root")
    (root / "glyphs" / ".lock").unlink()
    few = ("--train", 2, "--val", 0, "--test", 0, "--workers", 1)
    verbs = [
        ("datasets",),
        ("fetch", "glyphs"),
        ("verify", "glyphs"),
        ("build", "glyphs", "--out", tmp_path / "archive", *few),
        ("preview", "glyphs", "--out", tmp_path / "episode.png"),
        ("train", "glyphs", "--out", tmp_path / "run", "--steps", 1, "--meta-batch-size", 1, "--device", "cpu"),
        ("build", "glyphs", "--out", tmp_path / "larger", *few, "--image-size", 29),
    ]
    given = json.dumps([list(map(str, verb)) for verb in verbs])
    done = run_read_only(root, "-c", SEVERAL, given, MAMLDATA_ROOT=str(root))
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [code for code, _ in told] == [0] * 6 + [1], (told, done.stderr)
    assert "Cannot write" in told[-1][1]


def test_train_and_eval(archive: Path, trained: Path, tmp_path: Path):
    """A run leaves its files; its folder and its checkpoint evaluate alike; the result says what it is."""
    assert {"config.json", "metrics.jsonl", "curves.png"} < {path.name for path in trained.iterdir()}
    by_folder = run("eval", trained, archive, "--device", "cpu")
    assert by_folder.exit_code == 0, by_folder.output
    checkpoint = next(trained.glob("maml_step2_acc*.pt"))
    assert run("eval", checkpoint, archive, "--device", "cpu").stdout == by_folder.stdout
    for text in ("95 % interval, 6 episodes", "split scheme seeded", "test, 5-way 1-shot", "batch norm transductive"):
        assert text in by_folder.stdout
    assert "No interval for other classes: 6 episodes of " in by_folder.stderr
    assert "Loss before adaptation and after each inner step: " in by_folder.stderr
    as_json = json.loads(run("eval", trained, archive, "--json", "--episodes", 4, "--device", "cpu").stdout)
    assert (as_json["episodes"], as_json["class_interval"]) == (4, None)
    again = run("train", archive, "--out", trained, "--steps", 2, "--meta-batch-size", 2, "--resume", "--device", "cpu")
    assert again.exit_code == 0, again.output
    refused(run("train", archive, "--out", trained, "--steps", 2), 2, "already holds a run", "--resume")


def test_evaluation_on_episodes_that_share_no_image(trained: Path, archive: Path, glyphs_root: Path) -> None:
    """Their number is what the images allow; more episodes than classes give an interval for other classes."""
    live = ("glyphs", "--k-query", 2, "--disjoint", "--device", "cpu", "--rotations", "none")
    apart = run("eval", trained, *live, root=glyphs_root)
    assert apart.exit_code == 0, apart.output
    assert "For other classes, of which these are a sample: ± " in apart.stderr
    kept = mamldata.live("glyphs", "test", k_query=2, rotations="none", disjoint=True, root=glyphs_root).episodes
    assert f"(95 % interval, {kept} episodes)" in apart.stdout
    refused(
        run("eval", trained, *live, "--episodes", kept + 1, root=glyphs_root), 2, f"glyphs has {kept} test episodes"
    )
    refused(run("eval", trained, archive, "--disjoint"), 2, "--disjoint: the episodes of the archive")


def test_training_starts_from_another_run(trained: Path, archive: Path, tmp_path: Path) -> None:
    """``--from`` takes a run's folder; the new run records its checkpoint, and goes on with it alone."""
    options = ("--steps", 2, "--meta-batch-size", 2, "--device", "cpu", "--meta-lr", 0.01)
    command = ("train", archive, "--out", tmp_path / "next", *options)
    begun = run(*command, "--from", trained)
    assert begun.exit_code == 0, begun.output
    record = json.loads((tmp_path / "next" / "config.json").read_text())["start"]
    assert Path(record["file"]).parent == trained
    assert run(*command, "--from", trained, "--resume").exit_code == 0
    refused(run(*command, "--from", tmp_path / "next", "--resume"), 2, "holds another run, which started from")


def test_train_remixes_an_archive_unless_told_not_to(archive: Path, trained: Path, tmp_path: Path):
    """The run records whether its episodes were remixed, and does not go on otherwise; live episodes have no choice."""
    assert json.loads((trained / "config.json").read_text())["data"]["remix"] is True
    options = ("--steps", 2, "--meta-batch-size", 2, "--device", "cpu")
    plain = run("train", archive, "--out", tmp_path / "plain", *options, "--no-remix", "--json")
    assert plain.exit_code == 0, plain.output
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["data"]["remix"] is False
    other = ("train", archive, "--out", trained, *options, "--no-remix", "--resume")
    refused(run(*other), 2, "holds another run", "remix: True there, False here")
    for option in ("--remix", "--no-remix"):
        refused(run("train", "glyphs", "--out", tmp_path / "live", option), 2, "live episodes never repeat")


def test_an_archive_at_an_address(archive: Path, tmp_path: Path):
    """Every verb that reads archives takes an address, and fetches a shard once for all of them but verify."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in archive.iterdir():
        if path.is_file():
            memory.pipe(f"/cli/glyphs-5w1s/{path.name}", path.read_bytes())
    address = "memory://cli/glyphs-5w1s"
    root = tmp_path / "root"
    try:
        assert (
            run("inspect", address, root=root).stdout.splitlines()[1:]
            == run("inspect", archive).stdout.splitlines()[1:]
        )
        whole = run("verify", address, root=root)
        assert whole.stdout.replace(address, str(archive)) == run("verify", archive).stdout
        options = ("--steps", 2, "--meta-batch-size", 2, "--device", "cpu")
        result = run("train", address, "--out", tmp_path / "run", *options, root=root)
        assert result.exit_code == 0, result.output
        result = run("preview", address, "--out", tmp_path / "p.png", root=root)
        assert result.exit_code == 0, result.output
        kept = {path.name for path in (root / "archive-cache").glob("mamldata-shards/*.tar")}
        assert len(kept) == 3
        memory.rm("/cli/glyphs-5w1s/test-00000.tar")
        result = run("eval", tmp_path / "run", address, "--device", "cpu", root=root)
        assert result.exit_code == 0, result.output
        assert result.stdout == run("eval", tmp_path / "run", archive, "--device", "cpu").stdout
        broken = run("verify", address, root=root)
        assert broken.exit_code == 1
        assert "test-00000.tar could not be fetched" in broken.stdout
    finally:
        memory.rm("/cli", recursive=True)


def test_train_on_live_episodes(glyphs_root: Path, tmp_path: Path):
    """A dataset's name trains on live episodes, with the episodes that the options ask for."""
    options = ("--steps", 1, "--meta-batch-size", 2, "--eval-episodes", 4, "--n-way", 3, "--k-query", 2)
    result = run("train", "glyphs", "--out", tmp_path / "run", *options, "--json", root=glyphs_root)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["step"] == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["n_way"] == 3


def test_a_recipe_gives_settings_and_episodes(glyphs_root: Path, tmp_path: Path):
    """Options override it; what is resolved is saved; where the episodes differ, that is said."""
    quick = ("--steps", 2, "--meta-batch-size", 2, "--eval-episodes", 4)
    done = run("train", "glyphs", "--recipe", "maml-omniglot-5w1s", *quick, "--out", tmp_path / "run", root=glyphs_root)
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "run" / "config.json").read_bytes())
    assert (config["data"]["k_query"], config["data"]["k_shot"]) == (1, 1)
    assert config["settings"]["inner_lr"] == 0.4
    assert config["settings"]["meta_schedule"] == "constant"
    assert config["settings"]["steps"] == 2
    assert "Different from the recipe maml-omniglot-5w1s: dataset is glyphs, not omniglot." in done.stderr
    refused(run("train", "glyphs", "--recipe", "maml", "--out", tmp_path / "b", root=glyphs_root), 2, "no recipe")


def test_a_recipe_trains_on_an_archive(archive: Path, tmp_path: Path):
    """Its network's width, too, is what is saved and evaluated; options override it."""
    quick = ("--steps", 1, "--meta-batch-size", 1, "--eval-episodes", 2, "--filters", 4)
    done = run("train", archive, "--recipe", "maml++-omniglot-5w1s", *quick, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    settings = json.loads((tmp_path / "run" / "config.json").read_bytes())["settings"]
    assert (settings["algorithm"], settings["bn"], settings["network"]) == ("maml++", "per-step", "conv4-pool")
    assert (settings["filters"], settings["msl_epochs"], settings["steps"]) == (4, 10, 1)
    assert run("eval", tmp_path / "run", archive, "--episodes", 2).exit_code == 0


def test_recipes_are_listed():
    """All of them, and one with its source and its notes."""
    assert "maml-mini-imagenet-5w1s: MAML, MiniImagenet 5-way 1-shot, published: 48.70" in run("recipes").stdout
    assert "source: Finn, C." in run("recipes", "maml-omniglot-20w1s").stdout
    assert "notes: It is called MAML there, but" in run("recipes", "pytorch-2018-omniglot-5w1s").stdout
    steps = {recipe["name"]: recipe["settings"]["steps"] for recipe in json.loads(run("recipes", "--json").stdout)}
    assert steps["maml-omniglot-5w1s"] == 60_000


def test_normalised_training_is_evaluated_normalised(archive: Path, tmp_path: Path):
    """The setting is in the checkpoint, so that nobody has to say it again."""
    quick = ("--steps", 2, "--meta-batch-size", 2, "--eval-episodes", 4, "--normalize")
    assert run("train", archive, *quick, "--out", tmp_path / "run").exit_code == 0
    assert json.loads((tmp_path / "run" / "config.json").read_bytes())["settings"]["normalize"] is True
    evaluated = json.loads(run("eval", tmp_path / "run", archive, "--split", "val", "--episodes", 4, "--json").stdout)
    last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert evaluated["loss"] == pytest.approx(last["loss"], rel=1e-5)


@pytest.mark.parametrize("algorithm", ["maml++", "pretrain"])
def test_the_family_trains_on_archives_and_live(algorithm: str, archive: Path, glyphs_root: Path, tmp_path: Path):
    """An algorithm brings its own batch norm along; joint training finds the classes wherever episodes come from."""
    options = ("--steps", 1, "--meta-batch-size", 2, "--eval-episodes", 2, "--algorithm", algorithm, "--device", "cpu")
    for place in (archive, "glyphs"):
        out = tmp_path / Path(place).name
        result = run("train", place, "--out", out, *options, root=glyphs_root)
        assert result.exit_code == 0, result.output
        bn = "per-step" if algorithm == "maml++" else "transductive"
        assert json.loads((out / "config.json").read_text())["settings"]["bn"] == bn


@pytest.mark.slow
def test_compare(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The table on stdout, everything in the folder; the same command is done at once, another one is refused."""
    quick = ("--steps", 2, "--meta-batch-size", 2, "--eval-episodes", 4, "--episodes", 4, "--device", "cpu")
    asked = ("compare", archive, "--algorithms", "maml, fomaml,maml++,random", "--set", "maml++.inner-lr=0.1", *quick)
    done = run(*asked, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    *rows, empty, verdict = done.stdout.splitlines()[4:]
    assert [row.split(" | ")[0] for row in rows] == ["| maml", "| fomaml", "| maml++", "| random"]
    assert empty == ""
    assert verdict.startswith("The 95 % interval of the difference to maml, on these episodes, ")
    files = {"compare.json", "compare.md", "learning.png", "accuracy.png", "inner-steps.png", "costs.png"}
    assert files | {"maml", "fomaml", "maml++", "random"} == {path.name for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr("trainer.reports.costs._peak", lambda *_: 1.0)  # which was measured above
    settings = {
        entry["name"]: entry["settings"]
        for entry in json.loads(run(*asked, "--out", tmp_path / "out", "--json").stdout)["entries"]
    }
    assert [settings[name]["inner_lr"] for name in ("maml", "maml++")] == [0.4, 0.1]
    assert settings["maml++"]["bn"] == "per-step"
    refused(run(*asked, "--seed", 1, "--out", tmp_path / "out"), 2, "holds another run", "seed: 0 there, 1 here")


def test_photographs_as_they_are(tmp_path: Path):
    """Small classes and damaged images are left out and said; so is what becomes of oblong images. ``train`` agrees."""
    folder, root = tmp_path / "photos", tmp_path / "root"
    photographs(folder)
    names = sorted(path for path in folder.iterdir() if path.is_dir())
    for image in sorted(names[0].iterdir())[1:]:
        image.unlink()
    bad = sorted(names[1].iterdir())[0]
    bad.write_bytes(bad.read_bytes()[:40])
    how = ("--min-images", 2, "--skip-damaged", "--fit", "crop", "--image-size", 16)
    shape = ("--n-way", 2, "--k-shot", 1, "--k-query", 1)
    refused(run("build", folder, "--out", tmp_path / "no", *shape, "--train", 2, *how[:2], root=root), 1, bad.name)
    counts = ("--train", 2, "--val", 0, "--test", 0)
    built = run("build", folder, "--out", tmp_path / "a", *shape, *counts, *how, root=root)
    assert built.exit_code == 0, built.output
    assert "Images become 16x16; oblong ones are cropped to their middle." in built.stderr
    assert f"Left out: 1 class with too few images: {names[0].name} (1)" in built.stderr
    assert "Left out: 1 image that is missing or cannot be read: " in built.stderr
    live = run("preview", folder, "--out", tmp_path / "p.png", "--split", "train", *shape, *how, root=root)
    assert live.exit_code == 0, live.output
    assert "--min-images 2 --skip-damaged --fit crop" in live.stderr
    refused(run("build", "glyphs", "--out", tmp_path / "b", *how, root=root), 2, "only for a folder of images")


def test_settings_of_the_inner_loop_are_for_those_that_have_one(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A comparison gives them to MAML and not to prototypical networks, which refuse one of their own."""
    plans = {}
    monkeypatch.setattr("trainer.reports.compare.compare", lambda given, *_, **__: plans.update(given) or 1 / 0)
    asked = ("compare", archive, "--algorithms", "maml,protonet", "--inner-lr", 0.1, "--inner-steps", 2)
    run(*asked, "--out", tmp_path / "out")
    assert [(one.inner_lr, one.inner_steps) for one in plans.values()] == [(0.1, 2), (None, 1)]
    refused(run(*asked, "--set", "protonet.inner_lr=0.1", "--out", tmp_path / "out"), 2, "protonet", "no inner loop")


def test_prototypes_are_evaluated_without_inner_steps(archive: Path, glyphs_root: Path, tmp_path: Path):
    """Trained on an archive's 5-way episodes, evaluated on live 3-way ones: one accuracy, nothing about steps."""
    options = ("--steps", 1, "--meta-batch-size", 1, "--eval-episodes", 2, "--algorithm", "protonet", "--device", "cpu")
    trained = run("train", archive, "--out", tmp_path / "run", *options)
    assert trained.exit_code == 0, trained.output
    live = ("--n-way", 3, "--k-shot", 1, "--k-query", 2, "--episodes", 2, "--image-size", 28)
    result = run("eval", tmp_path / "run", "glyphs", *live, root=glyphs_root)
    assert result.exit_code == 0, result.output
    assert "3-way 1-shot, 0 inner steps" in result.stdout
    assert "after each inner step" not in result.output


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--algorithms", "maml,fomamel"], "there is no algorithm 'fomamel'. Did you mean 'fomaml'?"),
        (["--algorithms", "maml"], "at least two"),
        (["--set", "maml.inner_lr"], "is not of the form ALGORITHM.SETTING=VALUE"),
        (["--set", "anil.inner_lr=1"], "'anil' is not one of those compared: maml, fomaml"),
        (["--set", "maml.inner_rl=1"], "there is no setting 'inner_rl'. Did you mean 'inner_lr'?"),
        (["--set", "maml.inner_lr=fast"], "maml: Invalid training settings:\n  inner_lr must be a number"),
        (["--set", "fomaml.checkpoint_inner=true"], "fomaml: Invalid training settings"),
        (["--set", "maml.normalise=true"], "normalize must be the same for all algorithms, not True for maml"),
        (["--set", "maml.steps=7"], "steps must be the same for all algorithms, not 7 for maml, 4000"),
        (["--episodes", "7"], "6 test episodes, but 7 were requested"),
    ],
)
def test_compare_refuses(options: list[str], text: str, archive: Path, tmp_path: Path):
    """Wrong usage is named before anything is trained."""
    algorithms = [] if "--algorithms" in options else ["--algorithms", "maml,fomaml"]
    refused(run("compare", archive, *algorithms, *options, "--out", tmp_path / "out"), 2, text)
    assert not (tmp_path / "out").exists()


def test_doctor_prints_versions(tmp_path: Path):
    """``doctor`` has what a bug report needs."""
    report = json.loads(run("doctor", "--json", root=tmp_path).stdout)
    assert report["root"] == str(tmp_path)
    assert report["root_free"] > 0
    assert report["packages"]["torch"] != "not installed"
    assert re.fullmatch(r"\d+ threads? \(.+\)", report["threads"])


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)],
)
def test_threads_spin_briefly(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], spins: str | None):
    """OpenMP is told so before torch is loaded, unless the user has told it how to wait."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # to be put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert os.environ.get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize("verb", ["preview", "train", "eval"])
def test_a_flipped_pixel_gets_into_no_result(archive: Path, trained: Path, tmp_path: Path, verb: str):
    """Whatever reads a damaged shard of a folder says so, and which shard it is."""
    own = Path(shutil.copytree(archive, tmp_path / "own"))
    shard = own / ("train-00000.tar" if verb == "train" else "test-00000.tar")
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1  # a pixel of the first episode
    shard.chmod(0o644)
    shard.write_bytes(data)
    words = {
        "preview": [own, "--out", tmp_path / "p.png"],
        "eval": [trained, own],
        "train": [own, "--out", tmp_path / "r"],
    }
    refused(run(verb, *words[verb]), 1, f"The shard {shard}", "is damaged: sha256")


@pytest.mark.parametrize("verb", ["build", "preview", "train", "eval"])
def test_a_flipped_pixel_of_the_bank_gets_into_no_result(glyphs_root: Path, trained: Path, tmp_path: Path, verb: str):
    """Whatever reads a damaged bank says so, and what to do; it writes nothing."""
    root = Path(shutil.copytree(glyphs_root, tmp_path / "root"))
    bank = root / "glyphs" / "glyphs-28.npy"
    data = bytearray(bank.read_bytes())
    data[1000] ^= 1
    bank.write_bytes(data)
    out = ("glyphs", "--out", tmp_path / "out.png")
    words = {
        "build": [*out, "--train", 1, "--val", 0, "--test", 0, "--workers", 1],
        "preview": out,
        "train": [*out, "--steps", 1, "--meta-batch-size", 1, "--eval-episodes", 1, "--device", "cpu"],
        "eval": [trained, "glyphs", "--episodes", 2, "--device", "cpu"],
    }
    result = run(verb, *words[verb], root=root)
    refused(result, 1, f"{bank} is damaged: sha256", "Delete it: the next build", "run: mamldata verify glyphs")
    assert not (tmp_path / "out.png").exists()


class TestBadInput:
    """What a user gets wrong is one clear paragraph and the right exit code."""

    def test_unknown_dataset(self):
        """The nearest name is offered, and all names."""
        refused(run("fetch", "omniglott"), 2, "no dataset 'omniglott'", "Did you mean 'omniglot'?", "glyphs")
        refused(run("train", "omniglott", "--out", "x"), 2, "neither the folder of an archive nor a dataset")

    def test_missing_raw_files(self, tmp_path: Path):
        """The command that gets them is named, and nothing is downloaded."""
        result = run("build", "omniglot", "--out", tmp_path / "a", root=tmp_path / "root")
        refused(result, 1, "images_background.zip, images_evaluation.zip", "Run: mamldata fetch omniglot")
        assert not (tmp_path / "a").exists()

    def test_nothing_to_verify(self, tmp_path: Path):
        """Verifying a dataset that is not here says so."""
        refused(run("verify", "omniglot", root=tmp_path), 1, "Run: mamldata fetch omniglot")

    @pytest.mark.parametrize("verb", ["inspect", "verify", "train", "preview"])
    def test_a_folder_that_is_no_archive(self, verb: str, tmp_path: Path):
        """Every verb says what the folder is not; those that take datasets too also say what one looks like."""
        (tmp_path / "folder").mkdir()
        remedy = "mamldata build" if verb == "inspect" else "class/image"
        more = {"train": ["--out", tmp_path / "run"], "preview": ["--out", tmp_path / "p.png"]}.get(verb, [])
        refused(run(verb, tmp_path / "folder", *more), 2, "archive", remedy)

    @pytest.mark.parametrize(
        ("portion", "text"),
        [
            ("0/3", "no portion 0/3: portions are counted from 1/3 to 3/3"),
            ("4/3", "no portion 4/3"),
            ("3", "'3' is not of the form 3/100"),
            ("-1/3", "'-1/3' is not of the form 3/100"),
            ("a/b", "'a/b' is not of the form 3/100"),
        ],
    )
    def test_a_portion_that_is_none(self, portion: str, text: str, glyphs_root: Path, tmp_path: Path):
        """How portions are written and counted is said; nothing is written."""
        refused(run("build", "glyphs", "--out", tmp_path / "a", "--shards", portion, root=glyphs_root), 2, text)
        assert not (tmp_path / "a").exists()

    def test_a_cluster_that_is_not_there(self, glyphs_root: Path, tmp_path: Path):
        """An address that is none is wrong usage, before anything is written."""
        pytest.importorskip("distributed", reason="the package distributed is not installed; the test group has it")
        result = run("build", "glyphs", "--out", tmp_path / "a", "--dask", "nonsense", root=glyphs_root)
        refused(result, 2, "'nonsense' is not a Dask scheduler's address")
        assert not (tmp_path / "a").exists()

    def test_a_web_server_to_build_to(self, glyphs_root: Path):
        """Why http cannot be written to is said."""
        result = run("build", "glyphs", "--out", "https://example.org/a", root=glyphs_root)
        refused(result, 2, "a web server takes no files")

    def test_more_ways_than_classes(self, glyphs_root: Path, tmp_path: Path):
        """Have and need are named; nothing is written."""
        out = tmp_path / "a"
        result = run("build", "glyphs", "--out", out, "--n-way", 500, root=glyphs_root)
        refused(result, 2, "120 classes, but n_way is 500")
        assert not out.exists()

    def test_more_shots_than_images(self, glyphs_root: Path, tmp_path: Path):
        """The class, have and need are named."""
        result = run("build", "glyphs", "--out", tmp_path / "a", "--k-shot", 6, root=glyphs_root)
        refused(result, 2, "class 'alphabet", "20 images", "k_shot + k_query = 6 + 15 = 21")

    def test_a_manifest_with_three_faults(self, tmp_path: Path):
        """All three are reported at once, each with its place."""
        path = tmp_path / "my.toml"
        path.write_text(MANIFEST)
        result = run("fetch", path)
        refused(result, 2, "my.toml has 3 faults", "name: 'Bad Name'", "files[0].urls", "files[0].sha256: is missing")

    def test_an_unwritable_place(self, glyphs_root: Path, tmp_path: Path):
        """A file where a folder should be: the place and the remedy are named."""
        (tmp_path / "file").write_text("")
        result = run("build", "glyphs", "--out", tmp_path / "file" / "a", root=glyphs_root)
        refused(result, 1, str(tmp_path / "file"), "Make the folder writable, or choose another one")
        refused(run("fetch", "glyphs", root=tmp_path / "file" / "root"), 1, str(tmp_path / "file"))

    def test_a_plan_without_passwords(self, tmp_path: Path):
        """Where a file would be had from is shown without what opens the place."""
        path = tmp_path / "my.toml"
        whole = MANIFEST.replace("Bad Name", "letters").replace("ftp:", "https:")
        path.write_text(whole.replace("bytes = 3", f'bytes = 3\nsha256 = "{"0" * 64}"'))
        asked = ("fetch", path, "--dry-run", "--from", "https://me:secret@host/folder?key=secret")
        for more in ((), ("--json",)):
            result = run(*asked, *more, root=tmp_path / "root")
            assert result.exit_code == 0, result.output
            assert "https://host/folder/a.zip?" in result.stdout
            assert "https://example.org/a.zip" in result.stdout
            assert "secret" not in result.output

    @pytest.mark.usefixtures("permissions_count")
    def test_a_read_only_folder(self, glyphs_root: Path, tmp_path: Path):
        """The same for a folder without the permission."""
        (tmp_path / "locked").mkdir(mode=0o555)
        refused(run("build", "glyphs", "--out", tmp_path / "locked" / "a", root=glyphs_root), 1, "Cannot write")

    def test_options_that_an_archive_cannot_take(self, archive: Path, tmp_path: Path):
        """An archive's episodes are fixed: the option is named."""
        refused(run("preview", archive, "--k-shot", 5, "--out", tmp_path / "p.png"), 2, "--k-shot", "are fixed")

    def test_a_picture_that_is_no_png(self, archive: Path, tmp_path: Path):
        """Another kind of picture is not promised by a name."""
        refused(run("preview", archive, "--out", tmp_path / "p.jpg"), 2, "p.jpg", "ends in .png")
        assert not (tmp_path / "p.jpg").exists()

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no place here where nobody can write")
    def test_where_nothing_can_be_made(self, archive: Path, glyphs_root: Path, tmp_path: Path):
        """Not even root writes into /proc, or under a name of 300 letters."""
        for out in ("/proc/x", tmp_path / ("x" * 300)):
            refused(run("build", "glyphs", "--out", out, root=glyphs_root), 1, str(out))
            refused(run("train", archive, "--out", out, "--device", "cpu"), 1, str(out))
        refused(run("fetch", "glyphs", root="/proc/x"), 1, "Cannot write /proc/x")
        refused(run("preview", archive, "--out", "/proc/p.png"), 1, "/proc/p.png")

    def test_an_episode_that_is_not_there(self, archive: Path, tmp_path: Path):
        """The number of episodes is named."""
        refused(run("preview", archive, "--episode", 6, "--out", tmp_path / "p.png"), 2, "no episode 6", "6 episodes")

    def test_more_test_episodes_than_there_are(self, archive: Path, trained: Path):
        """Evaluating on more episodes than the archive has is refused, not shortened."""
        refused(run("eval", trained, archive, "--episodes", 100), 2, "has 6 test episodes, but 100")

    def test_an_archive_without_validation(self, glyphs_root: Path, tmp_path: Path):
        """Training says at once that there is nothing to validate on."""
        out = tmp_path / "a"
        run("build", "glyphs", "--out", out, "--train", 4, "--val", 0, "--test", 0, "--workers", 1, root=glyphs_root)
        refused(run("train", out, "--out", tmp_path / "run"), 2, "no episodes of split 'val'")

    def test_wrong_settings(self, archive: Path, tmp_path: Path):
        """Every fault in the settings is named at once."""
        result = run("train", archive, "--out", tmp_path / "run", "--steps", 0, "--inner-lr", -1)
        refused(result, 2, "steps must be at least 1", "inner_lr must be a positive number")
        for option, value in {"--steps": "many", "--meta-lr": "fast", "--engine": "jax"}.items():
            refused(run("train", archive, "--out", tmp_path / "run", option, value), 2, f"'{option}'")

    def test_a_checkpoint_that_is_none(self, archive: Path, tmp_path: Path):
        """Another file is not loaded."""
        (tmp_path / "x.pt").write_bytes(b"not a checkpoint")
        refused(run("eval", tmp_path / "x.pt", archive), 2, "x.pt is not a checkpoint")


def test_every_setting_is_an_option():
    """Of its name, with its choices and its default; a flag can be turned off, and a former name is not in the help."""
    from cli.commands.train import command

    options = {parameter.name: parameter for parameter in command.params if isinstance(parameter, click.Option)}
    for name, setting in SETTINGS.items():
        option = options[name]
        plain = f"--{name.replace('_', '-')}"
        assert option.opts == [plain]
        assert option.secondary_opts == ([f"--no-{plain[2:]}"] if setting.kind == "bool" else [])
        if setting.choices:
            assert tuple(option.type.choices) == setting.choices
        else:
            assert option.type.name == {"int": "integer", "float": "float", "bool": "boolean"}[setting.kind]
        assert not option.hidden
        default = "no" if setting.kind == "bool" else setting.default
        assert f"  [default: {'' if default is None else default}" in option.help
    assert f"[default: {TrainSettings().point.bn};" in options["bn"].help
    assert [name for name, option in options.items() if option.hidden] == list(OLD_NAMES)


def test_a_former_name_is_an_option(archive: Path, tmp_path: Path):
    """``--normalize`` is ``--normalize``, and what a user gives is above what a recipe says."""
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        'title = "Mine"\ndataset = "glyphs"\nsource = "a paper"\npublished = "99 %"\n'
        "[episodes]\nn_way = 5\nk_shot = 1\nk_query = 3\n[settings]\ncheckpoint_inner = true\n"
    )
    quick = ("--steps", 1, "--meta-batch-size", 1, "--eval-episodes", 2, "--filters", 2, "--recipe", recipe)
    done = run("train", archive, *quick, "--normalise", "--no-checkpoint-inner", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    settings = json.loads((tmp_path / "run" / "config.json").read_bytes())["settings"]
    assert (settings["normalize"], settings["checkpoint_inner"]) == (True, False)
    assert "normalise" not in settings


def test_an_interruption_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C ends with a sentence and exit code 1."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cli.commands.datasets.list_datasets", interrupt)
    refused(run("datasets"), 1, "Interrupted", "to continue")


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))], ids=["own", "mmap"]
)
def test_too_little_memory(error: BaseException, monkeypatch: pytest.MonkeyPatch):
    """It is told in a sentence, whether Python or the system ran out of it."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("cli.commands.datasets.list_datasets", fail)
    refused(run("datasets"), 1, "not enough memory", "finished work is kept")


@pytest.mark.slow
def test_letters_that_a_terminal_lacks(tmp_path: Path, glyphs_root: Path):
    """A name that the terminal's encoding does not have is printed with escapes, and is not a traceback."""
    out = tmp_path / "中文"
    words = ["build", "glyphs", f"--root={glyphs_root}", f"--out={out}", *["--train", "1", "--val", "0", "--test", "0"]]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-m", "mamldata", *words]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"\\u4e2d\\u6587: glyphs" in done.stdout


def test_an_error_of_ours_has_its_exit_code(monkeypatch: pytest.MonkeyPatch):
    """Any error of the library becomes its message and its exit code."""

    class OwnError(MamldataError):
        exit_code = 1

    def fail(*_: object) -> None:
        raise OwnError("what and how")

    monkeypatch.setattr("cli.commands.datasets.list_datasets", fail)
    refused(run("datasets"), 1, "Error: what and how")
