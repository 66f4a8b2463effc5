"""The verbs export, models and predict, and eval's episodes of a run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import mamldata
import trainer
from cli.main import main
from trainer.runs import model as module
from trainer.runs.checkpoint import find_best


def run(*arguments: object, root: Path | None = None) -> Result:
    """A command in this process."""
    environment = {"MAMLDATA_ROOT": str(root) if root else ""}
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env=environment)


def done(*arguments: object, root: Path | None = None) -> Result:
    """A command that succeeds."""
    result = run(*arguments, root=root)
    assert result.exit_code == 0, result.output
    return result


def refused(result: Result, code: int, *texts: str) -> None:
    """Check a failure: its code and its words, without a traceback."""
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    for text in texts:
        assert text in result.stderr


OPTIONS = ("--n-way", 3, "--k-shot", 2, "--k-query", 4)
QUICK = ("--steps", 2, "--meta-batch-size", 2, "--eval-episodes", 2, "--filters", 4, "--device", "cpu")


@pytest.fixture(scope="module")
def trained(glyphs_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on live 3-way 2-shot episodes with 4 queries."""
    out = tmp_path_factory.mktemp("runs") / "run"
    done("train", "glyphs", "--out", out, *OPTIONS, *QUICK, "--inner-lr", 0.1, "--no-normalize", root=glyphs_root)
    return out


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    """A support set of three classes with unequal shots, and images to ask about."""
    chance = np.random.default_rng(0)
    for name in ("known/ant/1", "known/ant/2", "known/bee/1", "known/cat/1", "known/cat/2", "new/a", "new/b", "new/c"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (30, 40), dtype=np.uint8)).save(path)
    (tmp_path / "known" / "notes.txt").write_text("no image\n")
    return tmp_path


def test_predictions_are_those_of_python(trained: Path, drawings: Path) -> None:
    """The table and the JSON name the classes after their folders, by each image alone or together."""
    support, new = drawings / "known", drawings / "new"
    model = trainer.load_run(trained)
    files = sorted(support.rglob("*.png"))
    adapted, asked = model.adapt(files, [file.parent.name for file in files]), sorted(new.iterdir())
    for together in (False, True):
        expected = adapted(asked, together=together).softmax(1)
        options = ["--together"] if together else []
        told = json.loads(done("predict", trained, "--support", support, new, "--json", *options).stdout)
        assert (told["classes"], told["together"], told["unreadable"]) == (["ant", "bee", "cat"], together, [])
        assert [one["image"] for one in told["images"]] == [str(file) for file in asked]
        shares = [list(one["probabilities"].values()) for one in told["images"]]
        torch.testing.assert_close(torch.tensor(shares), expected)
        best = [told["classes"][place] for place in expected.argmax(1).tolist()]
        assert [one["class"] for one in told["images"]] == best
        table = done("predict", trained, "--support", support, *asked, *options).stdout.splitlines()
        lines = [
            f"{one}  {name}  {100 * top:5.1f} %" for one, name, top in zip(asked, best, expected.amax(1), strict=True)
        ]
        assert table == lines


def test_fewer_classes_are_said(trained: Path, drawings: Path) -> None:
    """Two classes use two of three outputs; one, or four, are refused."""
    support, image = drawings / "known", drawings / "new" / "a.png"
    (support / "cat").rename(drawings / "cat")
    said = done("predict", trained, "--support", support, image)
    assert "The network has 3 outputs, of which the first 2 are used." in said.stderr
    (support / "bee").rename(drawings / "bee")
    refused(run("predict", trained, "--support", support, image), 2, "has 1 class, but this network tells 2 to 3 apart")


def test_images_that_cannot_be_read_are_named(trained: Path, drawings: Path) -> None:
    """The others are answered, and the exit code is 1; of the support set, each is needed."""
    support, new = drawings / "known", drawings / "new"
    whole = done("predict", trained, "--support", support, new / "a.png", new / "c.png").stdout
    (new / "b.png").write_bytes((new / "a.png").read_bytes()[:60])
    result = run("predict", trained, "--support", support, new)
    refused(result, 1, "1 image without an answer:", f"{new / 'b.png'} cannot be prepared:")
    assert result.stdout == whole
    told = json.loads(run("predict", trained, "--support", support, new, "--json").stdout)
    assert [len(told["images"]), len(told["unreadable"])] == [2, 1]
    refused(run("predict", trained, "--support", support, new / "b.png"), 1, "1 image without an answer")
    (support / "bee" / "1.png").write_bytes(b"")
    result = run("predict", trained, "--support", support, new)
    refused(result, 1, "Replace or remove these support images:", str(support / "bee" / "1.png"))
    assert result.stdout == ""


def test_a_network_that_diverges_gives_no_answers(trained: Path, drawings: Path, tmp_path: Path) -> None:
    """It says so, and prints no NaN, which is no JSON."""
    content = torch.load(find_best(trained), weights_only=True)
    content["weights"] = {name: torch.full_like(value, torch.nan) for name, value in content["weights"].items()}
    torch.save(content, tmp_path / find_best(trained).name)
    model = tmp_path / find_best(trained).name
    result = run("predict", model, "--support", drawings / "known", drawings / "new", "--json")
    refused(result, 1, "answers are not finite numbers")
    assert result.stdout == ""


def test_folders_of_another_kind_are_refused(trained: Path, drawings: Path) -> None:
    """No images, images outside class folders, no such place."""
    (drawings / "empty").mkdir()
    image = drawings / "new" / "a.png"
    refused(run("predict", trained, "--support", drawings / "new", image), 2, "a.png is in no class folder")
    refused(run("predict", trained, "--support", drawings / "empty", image), 2, "empty has no images")
    refused(run("predict", trained, "--support", drawings / "known", drawings / "empty"), 2, "empty has no images")
    refused(run("predict", trained, "--support", drawings / "known", drawings / "no.png"), 2, "does not exist")
    refused(run("predict", drawings / "no", "--support", drawings / "known", image), 2, "There is no run folder")


def test_an_old_run_asks_how_images_are_prepared(trained: Path, drawings: Path, tmp_path: Path) -> None:
    """Its digest may tell; otherwise a dataset has to be named, whose images have as many channels."""
    command = ("--support", drawings / "known", drawings / "new", "--json")
    right = json.loads(done("predict", trained, *command).stdout)
    content = torch.load(find_best(trained), weights_only=True)
    del content["data"]["image"]
    old = tmp_path / "maml_step2_acc0.5000.pt"
    torch.save(content, old)
    assert json.loads(done("predict", old, *command).stdout) == right
    refused(run("predict", old, *command, "--like", "glyphs"), 2, "it is known how the run's images were prepared")
    refused(run("predict", trained, *command, "--like", "glyphs"), 2, "it is known how the run's images were prepared")
    torch.save({**content, "data": {**content["data"], "bank_sha256": "0" * 64}}, old)
    refused(run("predict", old, *command), 2, "does not record how its images were prepared", "--like")
    assert json.loads(done("predict", old, *command, "--like", "glyphs").stdout) == right
    refused(run("predict", old, *command, "--like", "mini-imagenet"), 2, "channels 3, but the run's have 1")


def test_models_are_listed(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, glyphs_root: Path) -> None:
    """With accuracy and digest; a name serves eval, predict and train --from; without any, that is said."""
    monkeypatch.setattr(module, "SHIPPED", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    assert "No model comes with this version." in done("models").stderr
    assert json.loads(done("models", "--json").stdout) == []
    evaluated = done("eval", trained, "glyphs", "--episodes", 4, root=glyphs_root)
    file = tmp_path / "models" / "tiny.safetensors"
    out = done("export", trained, "--out", file)
    assert f"Its card: {file.with_suffix('.md')}" in out.stderr
    listed = done("models").stdout
    digest = mamldata.io.digest.sha256_file(file)
    accuracy = evaluated.stdout.partition(" (95 %")[0].replace(" %", "")
    assert listed == f"tiny: maml, glyphs 3-way 2-shot, {accuracy} %, sha256:{digest}\n"
    (told,) = json.loads(done("models", "--json").stdout)
    assert (told["name"], told["sha256"], told["results"][0]["k_query"]) == ("tiny", digest, 4)
    assert done("eval", "tiny", "glyphs", "--episodes", 4, root=glyphs_root).stdout == evaluated.stdout
    assert [path.name for path in (tmp_path / "results").iterdir()]
    begun = done("train", "glyphs", "--out", "next", *OPTIONS, *QUICK, "--from", "tiny", root=glyphs_root)
    assert begun.exit_code == 0
    refused(run("eval", "tinny", "glyphs", root=glyphs_root), 2, "Did you mean 'tiny'?")


def test_the_command_of_a_card_makes_the_same_run(trained: Path, tmp_path: Path, glyphs_root: Path) -> None:
    """Settings, data and weights: what it prints is all that the run was told."""
    done("export", trained, "--out", tmp_path / "tiny.safetensors")
    lines = (tmp_path / "tiny.md").read_text().splitlines()
    (command,) = [line.strip() for line in lines if line.startswith("    mamldata train ")]
    words = shlex.split(command)[1:]
    done(*words[:-1], tmp_path / "again", root=glyphs_root)
    one, other = ((place / "config.json").read_text() for place in (trained, tmp_path / "again"))
    assert one == other
    one_run, other_run = (trainer.load_run(place) for place in (trained, tmp_path / "again"))
    assert all(map(torch.equal, one_run.parameters.tensors(), other_run.parameters.tensors()))


def test_live_episodes_are_the_runs_unless_options_say_otherwise(trained: Path, glyphs_root: Path) -> None:
    """Ways, shots and queries come from its training; the output says which are used."""
    usual = done("eval", trained, "glyphs", "--episodes", 2, "--json", root=glyphs_root)
    told = json.loads(usual.stdout)
    assert [told[key] for key in ("n_way", "k_shot", "k_query")] == [3, 2, 4]
    assert "Live episodes with --n-way 3, --k-shot 2, --k-query 4; without these options they are as" in usual.stderr
    other = done("eval", trained, "glyphs", "--episodes", 2, "--k-shot", 1, "--json", root=glyphs_root)
    assert [json.loads(other.stdout)[key] for key in ("n_way", "k_shot", "k_query")] == [3, 1, 4]
    assert "--k-shot 1, --k-query 4" in other.stderr
    refused(run("eval", trained, "glyphs", "--n-way", 5, root=glyphs_root), 2, "n_way 3, but these episodes have 5")


@pytest.mark.slow
def test_the_page_runs(trained: Path, glyphs_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command and each program of docs/models.md, on glyphs in place of Omniglot."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8").replace("omniglot", "glyphs")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "run")
    for name in ("my-classes/ant/1", "my-classes/bee/1", "unsorted/1", "unsorted/2"):
        path = Path(f"{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(len(name)).integers(0, 256, (9, 9), dtype=np.uint8)).save(path)
    commands = re.findall(r"^    mamldata (.*)$", page, re.MULTILINE)
    programs = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert (len(commands), len(programs)) == (7, 1)
    quick = {"eval": ("--episodes", 4), "train": (*OPTIONS, *QUICK)}
    for command in commands:
        verb, *words = shlex.split(command)
        done(verb, *words, *quick.get(verb, ()), root=glyphs_root)
    for program in programs:
        exec(program, {})
