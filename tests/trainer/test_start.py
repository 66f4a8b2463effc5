"""Training that starts from another run's weights: what is taken over, what is new, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synthetic import Synthetic

from mamldata.errors import RequestError
from mamldata.io.digest import sha256_file
from trainer.loop import train
from trainer.runs.checkpoint import load_checkpoint
from trainer.runs.folder import CONFIG, RunResult
from trainer.settings import TrainSettings

BASE = TrainSettings(
    steps=2, inner_steps=2, meta_batch_size=2, filters=4, inner_lr=0.1, eval_every=2, eval_episodes=2, device="cpu"
)
STILL = {"meta_lr": 1e-30, "steps": 1, "eval_every": 1}  # the weights stay where they start
DATA = Synthetic(size=8)


def kept(result: RunResult) -> dict[str, torch.Tensor]:
    return load_checkpoint(result.last).weights


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(replace(BASE, meta_lr=0.05), DATA, tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def plus(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(replace(BASE, algorithm="maml++", meta_lr=0.05), DATA, tmp_path_factory.mktemp("plus"))


def test_weights_are_those_of_the_other_run(first: RunResult, tmp_path: Path) -> None:
    """Of the network with its head, from a folder or a file; the run records which, and its optimizer is new."""
    by_folder = train(replace(BASE, **STILL, seed=9), DATA, tmp_path / "a", start=first.run_dir)
    by_file = train(replace(BASE, **STILL, seed=9), DATA, tmp_path / "b", start=first.best)
    own, fresh = kept(first), kept(train(replace(BASE, **STILL, seed=9), DATA, tmp_path / "c"))
    for name, value in own.items():
        assert torch.equal(kept(by_folder)[name], value)
        assert torch.equal(kept(by_file)[name], value)
        assert name.endswith("scale") or not torch.equal(fresh[name], value)
    record = json.loads((tmp_path / "a" / CONFIG).read_text())["start"]
    assert record == {
        "file": str(first.best),
        "sha256": sha256_file(first.best),
        "step": first.best_step,
        "digest": "sha256:synthetic",
    }
    assert load_checkpoint(by_folder.last).optimizer["state"][0]["step"] == 1
    assert "start" not in json.loads((tmp_path / "c" / CONFIG).read_text())


def test_norms_of_each_step_start_from_the_others(first: RunResult, plus: RunResult, tmp_path: Path) -> None:
    """From plain norms they are copies; from norms and rates of each step they are those; joint heads are left."""
    mine = kept(train(replace(BASE, **STILL, algorithm="maml++"), DATA, tmp_path / "a", start=first.best))
    for name in ("blocks.0.scale", "blocks.3.shift"):
        assert torch.equal(mine[f"per_step:{name}"], kept(first)[name].repeat(3, 1))
    again = kept(train(replace(BASE, **STILL, algorithm="maml++"), DATA, tmp_path / "b", start=plus.best))
    assert all(torch.equal(again[name], value) for name, value in kept(plus).items())
    joint = train(replace(BASE, algorithm="pretrain", meta_lr=0.05), DATA, tmp_path / "c")
    after = kept(train(replace(BASE, **STILL), DATA, tmp_path / "d", start=joint.best))
    for name, value in kept(joint).items():
        if ":" not in name:  # Adam moves zeros by its rate
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-20)


@pytest.mark.parametrize(
    ("changed", "data", "why"),
    [
        ({"filters": 5}, DATA, "its network is conv4, and blocks.0.kernel differs in shape or is missing"),
        ({"network": "conv4-pool"}, Synthetic(size=16), "was trained with image_shape"),
        ({}, Synthetic(size=8, n_way=4), "was trained with n_way 5, but these episodes have 4"),
        ({"normalize": True}, DATA, "it was trained with normalize False, not True"),
    ],
)
def test_another_network_is_refused(first: RunResult, tmp_path: Path, changed, data, why: str) -> None:
    """Another width, number of ways, size or scale of images, before anything is written."""
    with pytest.raises(RequestError, match=why):
        train(replace(BASE, **changed), data, tmp_path / "run", start=first.best)
    assert not (tmp_path / "run").exists()


def test_what_was_learned_is_not_dropped(plus: RunResult, tmp_path: Path) -> None:
    """Rates and norms that the new run has no place for are refused, rather than forgotten."""
    with pytest.raises(RequestError, match=r"inner_lr:.* was learned there, and has no place here. Choose the same bn"):
        train(BASE, DATA, tmp_path / "run", start=plus.best)


def test_a_run_goes_on_from_where_it_began(first: RunResult, plus: RunResult, tmp_path: Path) -> None:
    """With the same start or, once it has a checkpoint, none; and then ends as at once. Another start is refused."""
    at_once = kept(train(replace(BASE, steps=4), DATA, tmp_path / "a", start=first.best))
    train(BASE, DATA, tmp_path / "b", start=first.best)
    train(replace(BASE, steps=3), DATA, tmp_path / "b", resume=True, start=first.best)
    later = kept(train(replace(BASE, steps=4), DATA, tmp_path / "b", resume=True))
    assert later.keys() == at_once.keys()
    assert json.loads((tmp_path / "b" / CONFIG).read_text())["start"]["sha256"] == sha256_file(first.best)
    train(BASE, DATA, tmp_path / "c")
    for folder, start in (("b", tmp_path / "c"), ("c", first.best)):
        with pytest.raises(RequestError, match=r"holds another run, which started from .*, not from "):
            train(replace(BASE, steps=5), DATA, tmp_path / folder, resume=True, start=start)
    for path in (tmp_path / "b").glob("*.pt"):
        path.unlink()
    with pytest.raises(RequestError, match=r"which started from .*, not from its seed"):
        train(replace(BASE, steps=4), DATA, tmp_path / "b", resume=True)
