"""Runs of each algorithm, from the first step to an evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import adapt
from synthetic import CLASSES, Synthetic
from torch import nn
from torch.nn import functional as F

from trainer.evaluation import evaluate
from trainer.loop import train
from trainer.maml.algorithms import ALGORITHMS
from trainer.maml.joint import joint, joint_parameters
from trainer.maml.parameters import episodes, meta_parameters
from trainer.networks.networks import build_network
from trainer.runs.checkpoint import load_checkpoint
from trainer.settings import OF_INNER_STEPS, TrainSettings

SETTINGS = TrainSettings(
    steps=4, inner_steps=2, meta_batch_size=2, inner_lr=0.1, eval_every=2, eval_episodes=4, log_every=2, device="cpu"
)
LEARNERS = {
    "maml++": {"inner_steps": 2, "inner_lr": 0.2, "epoch_steps": 10, "msl_epochs": 3, "first_order_epochs": 1},
    "anil": {"inner_steps": 3, "inner_lr": 0.5, "meta_lr": 0.01},
    "meta-sgd": {"inner_lr": 0.3, "meta_lr": 0.003},
    "reptile": {"inner_steps": 5, "inner_lr": 0.1, "eval_inner_steps": 10},
    "protonet": {"meta_lr": 0.01},
    "pretrain": {"eval_inner_steps": 20, "inner_lr": 1.0},
}


def settings_of(algorithm: str, **more) -> TrainSettings:
    """``SETTINGS`` with changes; without those of the inner loop where there is none."""
    has_none = OF_INNER_STEPS if ALGORITHMS[algorithm].classifier == "prototypes" else ()
    base = {name: value for name, value in vars(SETTINGS).items() if name not in has_none}
    return TrainSettings(**{**base, "algorithm": algorithm, **more})


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", LEARNERS)
def test_every_algorithm_learns(tmp_path: Path, algorithm: str) -> None:
    """A short run gets far above the accuracy of a network that has learned nothing, on classes never seen."""
    more = {"steps": 60, "meta_batch_size": 4, "eval_every": 60, "eval_episodes": 40, **LEARNERS[algorithm]}
    data = Synthetic(noise=0.4)
    inner = {key: more[key] for key in ("inner_steps", "inner_lr", "eval_inner_steps") if key in more}
    floor = train(settings_of("random", **inner, eval_episodes=40), data, tmp_path / "random")
    result = train(settings_of(algorithm, **more), data, tmp_path / "run")
    assert result.accuracy > floor.accuracy + 0.02


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_goes_on_as_if_never_stopped(tmp_path: Path, algorithm: str) -> None:
    """All that is learned is in a checkpoint: stopped half-way and resumed, each ends equal to the bit."""
    settings = settings_of(algorithm, meta_schedule="constant", **({"epoch_steps": 3} if algorithm == "maml++" else {}))
    at_once = train(settings, Synthetic(size=8), tmp_path / "a")
    train(replace(settings, steps=2), Synthetic(size=8), tmp_path / "b")
    later = train(settings, Synthetic(size=8), tmp_path / "b", resume=True)
    one, other = (load_checkpoint(result.last).weights for result in (at_once, later))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert at_once.last.name.startswith(f"{algorithm}_step")


@pytest.mark.parametrize(
    ("algorithm", "prefix"), [("maml++", "inner_lr:"), ("maml++", "per_step:"), ("meta-sgd", "inner_lr:")]
)
def test_what_is_learned_beside_the_weights_is_evaluated_with(tmp_path: Path, algorithm: str, prefix: str) -> None:
    """Rates and norms move in training, are saved, and the evaluation's result depends on them."""
    settings = settings_of(algorithm, meta_lr=0.05)
    path = train(settings, Synthetic(), tmp_path).last
    saved = load_checkpoint(path)
    learned = {name: value for name, value in saved.weights.items() if name.startswith(prefix)}
    assert learned
    fresh = settings.inner_lr if prefix == "inner_lr:" else None
    assert all(fresh is None or (value != fresh).any() for value in learned.values())
    before = evaluate(path, Synthetic(), episodes=4, device="cpu")
    content = torch.load(path, weights_only=True)
    for name in learned:
        content["weights"][name] = content["weights"][name] * 3
    torch.save(content, tmp_path / "changed.pt")
    after = evaluate(tmp_path / "changed.pt", Synthetic(), episodes=4, device="cpu")
    assert before.loss != after.loss
    assert before.inner_steps == settings.inner_steps  # those that the rates were learned for


def test_learned_rates_are_printed(tmp_path: Path) -> None:
    """At the end of a run each layer's rates are told, by step or by their spread; fixed ones are not."""
    lines: list[str] = []
    train(settings_of("maml++", meta_lr=1e-30), Synthetic(), tmp_path / "a", notify=lines.append)
    assert lines[-7] == "learned inner learning rates, by layer and step:"
    assert lines[-6] == "  blocks.0.kernel: 0.1, 0.1"
    lines.clear()
    train(settings_of("meta-sgd", meta_lr=1e-30), Synthetic(), tmp_path / "b", notify=lines.append)
    assert lines[-1] == "  head_bias: mean 0.1, from 0.1 to 0.1"
    lines.clear()
    train(settings_of("maml"), Synthetic(), tmp_path / "c", notify=lines.append)
    assert not [line for line in lines if "rates" in line]


def test_random_is_the_fresh_network(tmp_path: Path) -> None:
    """It takes no step: its one checkpoint is the network as it was drawn, evaluated."""
    result = train(settings_of("random", seed=5), Synthetic(), tmp_path)
    assert (result.step, result.best_step) == (0, 0)
    saved, fresh = load_checkpoint(result.last).weights, build_network("conv4", 1, 12, 5, 5).state_dict()
    assert all(torch.equal(saved[name], fresh[name]) for name in fresh)
    assert evaluate(tmp_path, Synthetic(), episodes=4, device="cpu").accuracy_by_step[0] < 0.5


def test_reptile_with_sgd_is_interpolation(tmp_path: Path) -> None:
    """With plain SGD and a rate of one, an outer step ends at the mean of the adapted weights."""
    settings = settings_of("reptile", steps=1, meta_optimizer="sgd", meta_lr=1.0, meta_schedule="constant")
    data = Synthetic()
    weights = load_checkpoint(train(settings, data, tmp_path).last).weights
    network = build_network("conv4", 1, 12, 5, 0)
    at, inner = meta_parameters(network, settings.inner_loop()), settings.inner_loop()
    ends = [adapt(network, at, one, inner)[-1].weights for one in episodes(data.batch("train", [0, 1]))]
    for name in at.weights:
        torch.testing.assert_close(weights[name], torch.stack([end[name] for end in ends]).mean(0).detach())


def test_joint_training_is_plain_classification() -> None:
    """One loss over all images of a meta-batch, by their classes among all training classes."""
    data = Synthetic()
    network, wide = build_network("conv4", 1, 12, 5, 0), build_network("conv4", 1, 12, CLASSES, 0)
    parameters = joint_parameters(network, wide)
    batch = data.batch("train", [3, 8])
    classes = data.classes(batch.index)
    outcome = joint(network, parameters, batch, classes)
    x = torch.cat([batch.support_x.flatten(0, 1), batch.query_x.flatten(0, 1)])
    pairs = [pair for part in (batch.support_y, batch.query_y) for pair in zip(classes, part, strict=True)]
    y = torch.cat([row[labels] for row, labels in pairs])
    body = {name: value for name, value in network.state_dict().items() if "head" not in name}
    wide.load_state_dict({**wide.state_dict(), **body})
    loss = F.cross_entropy(wide(x), y)
    torch.testing.assert_close(outcome.loss, loss.detach())
    loss.backward()
    for name, value in wide.named_parameters():
        torch.testing.assert_close({**outcome.gradient.weights, **outcome.gradient.joint}[name], value.grad)


def test_pretraining_leaves_the_episodes_head_alone(tmp_path: Path) -> None:
    """The head that episodes adapt is as it was drawn; the body has learned."""
    saved = load_checkpoint(train(settings_of("pretrain"), Synthetic(), tmp_path).last)
    fresh: nn.Module = build_network("conv4", 1, 12, 5, 0)
    same = {name for name, value in fresh.state_dict().items() if torch.equal(value, saved.weights[name])}
    assert same == {"head", "head_bias"}
    assert saved.weights["joint:head"].shape == (CLASSES, 64)
