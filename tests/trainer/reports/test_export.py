from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import mamldata
import trainer
from mamldata.archive.benchmarks import benchmark_of
from mamldata.errors import DamagedError, RequestError, WriteError
from trainer.results import read_result
from trainer.runs import model as module
from trainer.runs.checkpoint import find_best, load_checkpoint
from trainer.runs.model import read_about


@pytest.fixture
def run_dir(glyphs_run: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(glyphs_run, tmp_path / "run"))


def front_of(card: Path) -> dict[str, Any]:
    """The front matter of a card."""
    yaml = pytest.importorskip("yaml")
    _, front, _ = card.read_text().split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(front)
    return found


def test_the_same_run_gives_the_same_bytes(run_dir: Path, glyphs_run: Path, tmp_path: Path) -> None:
    """Of the file and of the card, wherever the run is, and again in place of the first ones."""
    cards = [
        trainer.export_model(place, tmp_path / name / "tiny.safetensors")
        for place, name in ((run_dir, "a"), (glyphs_run, "b"), (run_dir, "a"))
    ]
    files = [card.with_suffix(".safetensors").read_bytes() for card in cards]
    assert files[0] == files[1] == files[2]
    assert cards[0].read_bytes() == cards[1].read_bytes()
    assert str(tmp_path).encode() not in files[0] + cards[0].read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["tiny.md", "tiny.safetensors"]


def test_the_card_says_what_the_model_is(run_dir: Path, tmp_path: Path) -> None:
    """Data and digest, images, accuracy with interval, licence, versions and use; its front matter is the hub's."""
    card = trainer.export_model(run_dir, tmp_path / "tiny.safetensors")
    text, front, about = card.read_text(), front_of(card), read_about(tmp_path / "tiny.safetensors")
    result = read_result(next((run_dir / "results").glob("*.json")))
    accuracy, interval = result.evaluation["accuracy"], result.evaluation["interval"]
    data = load_checkpoint(find_best(run_dir)).data
    for words in (
        f"{100 * accuracy:.2f} ± {100 * interval:.2f} %",
        f"Data: glyphs, split scheme seeded, digest `{data['digest']}`. Licence: MIT.",
        "Images are prepared as in training: size 28, channels 1, resampling lanczos, invert True, upright False.",
        "trained by maml++ for 3-way 2-shot episodes of glyphs",
        'trainer.load_run("tiny.safetensors")',
        f"torch {torch.__version__}",
        hashlib.sha256((tmp_path / "tiny.safetensors").read_bytes()).hexdigest(),
    ):
        assert words in text
    assert front["license"] == "mit"
    assert (front["datasets"], front["metrics"], front["library_name"]) == (["glyphs"], ["accuracy"], "mamldata")
    (index,) = front["model-index"]
    assert index["name"] == "tiny"
    (one,) = index["results"]
    assert one["metrics"] == [{"type": "accuracy", "value": accuracy}]
    assert one["dataset"] == {"name": "glyphs", "type": "glyphs", "revision": data["digest"], "split": "test"}
    assert about["results"][0]["accuracy"] == accuracy
    assert about["results"][0]["target"]["bank_sha256"] == data["bank_sha256"]


def test_only_results_of_this_checkpoint_on_test_episodes(run_dir: Path, tmp_path: Path) -> None:
    """Others in the folder are of no concern; without any, the card says so; a damaged one is an error."""
    (path,) = (run_dir / "results").glob("*.json")
    content = path.read_text()
    for name, change in {
        "other": ('"step": 2', '"step": 1'),
        "val": ('"split": "test"', '"split": "val"'),
    }.items():
        assert change[0] in content
        (run_dir / "results" / f"{name}.json").write_text(content.replace(*change))
    out = tmp_path / "tiny.safetensors"
    trainer.export_model(run_dir, out)
    assert len(read_about(out)["results"]) == 1
    path.unlink()
    card = trainer.export_model(run_dir, out)
    assert read_about(out)["results"] == []
    assert "none is recorded" in card.read_text()
    assert front_of(card)["model-index"] == [{"name": "tiny", "results": []}]
    path.write_text(content[:-100])
    with pytest.raises(RequestError, match="is not the file of an evaluation"):
        trainer.export_model(run_dir, out)


def test_another_checkpoint_than_the_best(run_dir: Path, tmp_path: Path) -> None:
    """By its file; one that was saved on a signal has no accuracy."""
    best = find_best(run_dir)
    content = torch.load(best, weights_only=True)
    window = {"losses": torch.ones(1), "accuracies": torch.ones(1, 1)}
    torch.save({**content, "step": 3, "accuracy": None, "window": window}, run_dir / "maml++_step3.pt")
    out = tmp_path / "tiny.safetensors"
    card = trainer.export_model(run_dir, out, checkpoint=run_dir / "maml++_step3.pt")
    assert (read_about(out)["step"], read_about(out)["accuracy"]) == (3, None)
    assert "Validation accuracy after 3 outer steps: unknown." in card.read_text()
    assert trainer.load_run(out).settings == trainer.load_run(best).settings


def test_a_checkpoint_of_another_run_is_refused(run_dir: Path, tmp_path: Path) -> None:
    """The card would tell of a run and of results that are not its own."""
    other = tmp_path / find_best(run_dir).name
    other.write_bytes(find_best(run_dir).read_bytes())
    with pytest.raises(RequestError, match="is not a checkpoint of"):
        trainer.export_model(run_dir, tmp_path / "tiny.safetensors", checkpoint=other)
    assert not (tmp_path / "tiny.safetensors").exists()


def test_an_old_run_says_how_its_images_were_prepared(run_dir: Path, tmp_path: Path, glyphs_root: Path) -> None:
    """If a bank or a manifest with its digest tells; otherwise the model does not say, and the card says that."""
    best = find_best(run_dir)
    content = torch.load(best, weights_only=True)
    recorded = content["data"].pop("image")
    torch.save(content, best)
    out = tmp_path / "tiny.safetensors"
    trainer.export_model(run_dir, out)
    assert trainer.load_run(out).image.to_json() == recorded
    torch.save({**content, "data": {**content["data"], "dataset": "mine"}}, best)
    card = trainer.export_model(run_dir, out, root=glyphs_root)
    assert trainer.load_run(out).data["image"] == "unknown"
    assert "in training: this is not recorded." in card.read_text()
    front = front_of(card)
    assert (front["license"], front["license_name"]) == ("other", "not recorded")


def test_a_run_that_started_from_weights_says_from_which(run_dir: Path, tmp_path: Path) -> None:
    """By their digest, and without their place."""
    config = json.loads((run_dir / "config.json").read_text())
    config["start"] = {"file": "/home/me/x.pt", "sha256": "5e" * 32, "step": 7, "digest": "0" * 64}
    (run_dir / "config.json").write_text(json.dumps(config))
    card = trainer.export_model(run_dir, tmp_path / "tiny.safetensors")
    assert f"Weights at its start: those with SHA-256 `{'5e' * 32}`" in card.read_text()
    assert "--from WEIGHTS" in card.read_text()
    assert b"/home/me" not in (tmp_path / "tiny.safetensors").read_bytes()


def test_what_is_not_ours_is_kept(run_dir: Path, tmp_path: Path) -> None:
    """Another file, or another text under the card's name: refused before anything is written."""
    out, card = tmp_path / "tiny.safetensors", tmp_path / "tiny.md"
    card.write_text("# My notes\n")
    with pytest.raises(RequestError, match=r"tiny.md is not a card that an export wrote"):
        trainer.export_model(run_dir, out)
    assert not out.exists()
    card.unlink()
    out.write_bytes(b"somebody's")
    with pytest.raises(RequestError, match="is not a model of this trainer"):
        trainer.export_model(run_dir, out)
    assert out.read_bytes() == b"somebody's"
    with pytest.raises(RequestError, match=r"tiny.pt must end in .safetensors"):
        trainer.export_model(run_dir, tmp_path / "tiny.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "tiny.safetensors"]


def test_what_is_no_run_is_refused(run_dir: Path, tmp_path: Path) -> None:
    """No folder of a run, one whose config is damaged, and a place that cannot be written."""
    out = tmp_path / "tiny.safetensors"
    with pytest.raises(RequestError, match="holds no checkpoint"):
        trainer.export_model(tmp_path, out)
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="Cannot write"):
        trainer.export_model(run_dir, tmp_path / "file" / "tiny.safetensors")
    (run_dir / "config.json").write_text('{"versions": 1}')
    with pytest.raises(DamagedError, match=r"config.json is damaged"):
        trainer.export_model(run_dir, out)
    (run_dir / "config.json").unlink()
    with pytest.raises(RequestError, match=r"is not a run folder: it has no config.json"):
        trainer.export_model(run_dir, out)


def test_a_model_is_evaluated_as_its_run_is(
    run_dir: Path, glyphs_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same numbers; the answers of a shipped model are kept in the current folder, where one may write."""
    data = trainer.live_data("glyphs", glyphs_root, {"n_way": 3, "k_shot": 2, "k_query": 2})
    shipped = tmp_path / "shipped"
    trainer.export_model(run_dir, shipped / "tiny.safetensors")
    by_run, by_file = (
        trainer.evaluate(place, data, episodes=4, device="cpu") for place in (run_dir, shipped / "tiny.safetensors")
    )
    assert by_file == by_run
    assert trainer.save_result(by_file).parent == shipped / "results"
    monkeypatch.setattr(module, "SHIPPED", shipped)
    monkeypatch.chdir(tmp_path)
    by_name = trainer.evaluate("tiny", data, episodes=4, device="cpu")
    assert by_name == by_run
    assert trainer.save_result(by_name).parent.resolve() == tmp_path / "results"


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(module.shipped_models()))
def test_a_shipped_model_is_as_good_as_it_says(name: str, omniglot_root: Path, tmp_path: Path) -> None:
    """On the benchmark that its card names; another processor may round otherwise."""
    about = read_about(module.shipped_models()[name])
    (stated,) = about["results"]
    benchmark = benchmark_of(stated["target"]["digest"])
    assert benchmark is not None
    mamldata.build_benchmark(benchmark.name, tmp_path / "a", root=omniglot_root)
    data = trainer.archive_data(tmp_path / "a")
    assert data.describe()["bank_sha256"] == about["data"]["bank_sha256"]
    found = trainer.evaluate(name, data, episodes=stated["episodes"], device="cpu")
    assert abs(found.accuracy - stated["accuracy"]) <= stated["interval"]
