"""All engines give the same gradient, to float64 rounding, for each algorithm that they share."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from problems import batch, fill, loop, named, perceptron, run, small_convnet
from torch import Tensor, nn
from torch.nn import functional as F

from mamldata.errors import RequestError
from trainer.loop import train
from trainer.maml import engines as module
from trainer.maml.algorithms import ADAPTS, BN_MODES, ORDERS, RATES, InnerLoop
from trainer.maml.engines import ENGINES, Outcome, pick_engine
from trainer.maml.objective import Objective
from trainer.maml.parameters import MetaParameters, meta_parameters
from trainer.networks.networks import Block, ConvNet, build_network
from trainer.networks.norms import Norm
from trainer.settings import TrainSettings

needs_higher = pytest.mark.skipif(importlib.util.find_spec("higher") is None, reason="needs the package higher")
OTHERS = ["vmap", pytest.param("higher", marks=needs_higher)]
BASE = InnerLoop(steps=3, lr=0.1, order="second", bn="transductive")


class NormedLinear(nn.Module):
    """Two linear layers with batch norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(7, 36))
        self.scale = nn.Parameter(torch.empty(7))
        self.shift = nn.Parameter(torch.empty(7))
        self.head = nn.Parameter(torch.empty(3, 7))
        self.head_bias = nn.Parameter(torch.empty(3))

    def forward(self, x: Tensor, norm: Norm) -> Tensor:
        x = F.linear(x.flatten(1), self.first)[:, :, None, None]
        return F.linear(torch.tanh(norm(x, self.scale, self.shift)).flatten(1), self.head, self.head_bias)


def normed_linear() -> nn.Module:
    return fill(NormedLinear())


def pooled() -> nn.Module:
    """With max-pooling and all of space."""
    return fill(ConvNet([Block(1, 4, stride=1, padding=0, pool=True)], 16, 3, mean_over_space=False))


def parameters_of(network: nn.Module, inner: InnerLoop) -> MetaParameters:
    parameters = meta_parameters(network, inner)
    with torch.no_grad():
        for i, value in enumerate([*parameters.rates.values(), *parameters.norms.values()]):
            value.mul_(torch.linspace(0.7, 1.8 + 0.1 * i, value.numel(), dtype=value.dtype).view_as(value))
    return parameters


def assert_same(one: Outcome, other: Outcome) -> None:
    """To 1e-9 of the largest number of each tensor."""
    found = named(other.gradient)
    for name, value in named(one.gradient).items():
        scale = max(value.abs().max().item(), 1e-6)
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9 * scale, msg=name)
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-9, atol=0)
    assert torch.equal(one.score, other.score)


@pytest.mark.parametrize("engine", OTHERS)
@pytest.mark.parametrize("objective", [Objective(), Objective("query", (0.2, 0.3, 0.5))], ids=["final", "multi-step"])
@pytest.mark.parametrize("adapts", ADAPTS)
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("make", [small_convnet, normed_linear])
def test_engines_agree_on_the_algorithms(make, order, rates, adapts, objective, engine) -> None:
    """Orders, learned rates, heads and losses, on a convolutional and a linear network with batch norm."""
    network, inner = make(), replace(BASE, order=order, rates=rates, adapts=adapts)
    at = parameters_of(network, inner)
    expected = loop(network, at, batch(), inner, objective, every_step=True)
    assert_same(expected, run(engine, network, at, batch(), inner, objective, every_step=True))


@pytest.mark.parametrize("engine", OTHERS)
@pytest.mark.parametrize("adapts", ADAPTS)
@pytest.mark.parametrize("order", ORDERS)
def test_engines_agree_on_the_class_sum(order, adapts, engine) -> None:
    """The scale of the inner loss is the same in every engine, and with recomputed steps."""
    network, inner = small_convnet(), replace(BASE, lr=0.05, order=order, adapts=adapts, inner_loss="class-sum")
    at = parameters_of(network, inner)
    expected = loop(network, at, batch(), inner)
    assert_same(expected, run(engine, network, at, batch(), inner))
    assert_same(expected, loop(network, at, batch(), replace(inner, checkpoint=order == "second")))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bn", BN_MODES)
@pytest.mark.parametrize("make", [small_convnet, normed_linear, pooled])
def test_vmap_agrees_in_every_norm(make, bn, order) -> None:
    """The batch-norm modes, per-step and frozen ones included, and max-pooling."""
    network, inner = make(), replace(BASE, order=order, bn=bn)
    at, objective = parameters_of(network, inner), Objective("query", (0.2, 0.3, 0.5))
    assert_same(loop(network, at, batch(), inner, objective), run("vmap", network, at, batch(), inner, objective))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")
@pytest.mark.parametrize("bn", ["transductive", "frozen"])
def test_engines_agree_on_resnet18(bn) -> None:
    """Torchvision's layers can be adapted with the second order, one after the other, at once, and checkpointed."""
    network, inner = build_network("resnet18", 1, 6, 3, seed=0).double(), replace(BASE, steps=1, lr=0.01, bn=bn)
    at, tasks = meta_parameters(network, inner), batch(tasks=2)
    expected = loop(network, at, tasks, inner)
    assert_same(expected, loop(network, at, tasks, replace(inner, checkpoint=True)))
    assert_same(expected, run("vmap", network, at, tasks, inner))


@needs_higher
@pytest.mark.parametrize("order", ORDERS)
def test_higher_agrees_in_support_mode(order) -> None:
    """The query set's normalisation is the same beside the inner loop of higher."""
    network, inner = small_convnet(), replace(BASE, order=order, bn="support")
    at = parameters_of(network, inner)
    assert_same(loop(network, at, batch(), inner), run("higher", network, at, batch(), inner))


@pytest.mark.parametrize("engine", OTHERS)
@pytest.mark.parametrize("make", [small_convnet, normed_linear, perceptron])
def test_engines_agree_on_reptile(make, engine) -> None:
    """The way to the adapted weights is the same."""
    network, inner = make(), replace(BASE, order="first")
    at = parameters_of(network, inner)
    expected = loop(network, at, batch(), inner, Objective("reptile"))
    assert_same(expected, run(engine, network, at, batch(), inner, Objective("reptile")))


@pytest.mark.parametrize("engine", ["loop", *OTHERS])
@pytest.mark.parametrize("make", [small_convnet, normed_linear])
def test_first_and_second_order_differ_in_every_engine(make, engine) -> None:
    """No engine drops the second order in silence."""
    network = make()
    at = parameters_of(network, BASE)
    both = [run(engine, network, at, batch(), replace(BASE, order=order)).gradient for order in ORDERS]
    first, second = (torch.cat([value.flatten() for value in gradient.tensors()]) for gradient in both)
    assert F.cosine_similarity(first, second, dim=0) < 0.999


@pytest.mark.parametrize("engine", OTHERS)
def test_engines_change_nothing(engine) -> None:
    """Parameters and their gradients are as they were, and outcomes hold no graph."""
    network = small_convnet()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    outcome = run(engine, network, parameters_of(network, BASE), batch(), BASE, every_step=True)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(value.requires_grad and value.grad is None for value in network.parameters())
    assert not any(part.requires_grad for part in (outcome.loss, outcome.score, *outcome.gradient.tensors()))


@pytest.mark.parametrize("engine", OTHERS)
def test_a_run_takes_its_engine(tmp_path, engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting chooses the engine, and a run with another one ends at nearly the same weights."""
    from synthetic import Synthetic

    from trainer.runs.checkpoint import load_checkpoint

    settings = TrainSettings(steps=2, inner_lr=0.1, meta_batch_size=2, eval_every=2, eval_episodes=2, device="cpu")
    settings = replace(settings, meta_optimizer="sgd", meta_lr=1e-3)
    expected = load_checkpoint(train(settings, Synthetic(), tmp_path / "loop").last).weights
    calls = []

    def watched(*args, **more) -> Outcome:
        calls.append(engine)
        return watching(*args, **more)

    watching = ENGINES[engine]
    monkeypatch.setitem(module.ENGINES, engine, watched)
    weights = load_checkpoint(train(replace(settings, engine=engine), Synthetic(), tmp_path / engine).last).weights
    assert calls == [engine] * 2
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-3, atol=1e-4)


def test_what_an_engine_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms that higher does not know, engines where none is used, and a package that is not there."""
    with pytest.raises(RequestError, match=r"The engine higher does not support bn per-step. Use the engine loop"):
        TrainSettings(algorithm="maml++", bn="per-step", engine="higher")
    with pytest.raises(RequestError, match="engine has no effect with pretrain"):
        TrainSettings(algorithm="pretrain", engine="vmap")
    monkeypatch.setitem(__import__("sys").modules, "higher", None)
    with pytest.raises(RequestError, match=r"needs the package higher: pip install higher"):
        pick_engine("higher")
