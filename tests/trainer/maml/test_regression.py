"""Problems whose answers are numbers go through the same inner loop, engines and evaluator."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from problems import adapt, direction, directional, dot, loop, named, of, run
from torch import Tensor, nn
from torch.nn import functional as F

from mamldata.streaming.batch import EpisodeBatch
from trainer.evaluation import measure, measure_together
from trainer.maml.algorithms import ADAPTS, ORDERS, RATES, InnerLoop
from trainer.maml.objective import Objective
from trainer.maml.parameters import MetaParameters, episodes, meta_parameters
from trainer.maml.variants import method_of
from trainer.networks.networks import mlp
from trainer.networks.norms import Norm
from trainer.sinusoid import Sinusoids

BASE = InnerLoop(3, 0.01, "second", "transductive", task_loss="squared-error")
needs_higher = pytest.mark.skipif(importlib.util.find_spec("higher") is None, reason="needs the package higher")
OTHERS = ["vmap", pytest.param("higher", marks=needs_higher)]


def tasks(count: int = 4) -> EpisodeBatch:
    *points, index = Sinusoids(0, 5, 8).batch(0, count)
    return EpisodeBatch(*(part.double() for part in points), index)


def parameters_of(network: nn.Module, inner: InnerLoop) -> MetaParameters:
    """With rates that differ, where there are any, and with kinks away from one another."""
    parameters = meta_parameters(network, inner)
    with torch.no_grad():
        for name, value in named(parameters).items():
            if name.endswith("_bias") or name.startswith("rates"):
                value.add_(0.1 * inner.lr * torch.arange(value.numel(), dtype=value.dtype).view_as(value))
    return parameters


@pytest.mark.parametrize("engine", OTHERS)
@pytest.mark.parametrize("objective", [Objective(), Objective("query", (0.2, 0.3, 0.5))], ids=["final", "multi-step"])
@pytest.mark.parametrize("adapts", ADAPTS)
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("order", ORDERS)
def test_engines_agree(order, rates, adapts, objective, engine) -> None:
    """In float64, to 1e-9 of the largest number of each tensor: gradients, losses and errors by step."""
    network, inner = mlp(seed=1).double(), replace(BASE, order=order, rates=rates, adapts=adapts)
    at = parameters_of(network, inner)
    expected = loop(network, at, tasks(), inner, objective, every_step=True)
    outcome = run(engine, network, at, tasks(), inner, objective, every_step=True)
    for name, value in named(expected.gradient).items():
        scale = max(value.abs().max().item(), 1e-6)
        torch.testing.assert_close(named(outcome.gradient)[name], value, rtol=0, atol=1e-9 * scale, msg=name)
    torch.testing.assert_close(outcome.loss, expected.loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(outcome.score, expected.score, rtol=1e-9, atol=0)
    assert torch.equal(expected.loss, expected.score[-1])


def test_checkpointing_changes_nothing() -> None:
    """The inner loop computed twice has the same gradient."""
    network = mlp(seed=1).double()
    at = parameters_of(network, BASE)
    expected, found = (loop(network, at, tasks(), replace(BASE, checkpoint=twice)).gradient for twice in (False, True))
    for name, value in named(expected).items():
        torch.testing.assert_close(named(found)[name], value, rtol=1e-12, atol=1e-14)


def test_gradient_equals_finite_differences() -> None:
    """The meta-gradient is the slope of the mean squared error after adaptation."""
    network = mlp(seed=1).double()
    at = parameters_of(network, BASE)

    def error(point: MetaParameters) -> Tensor:
        losses = []
        for one in episodes(tasks()):
            fast = adapt(network, point, one, BASE)[-1]
            answers = torch.func.functional_call(network, fast.weights, (one.query_x,))
            losses.append(((answers - one.query_y) ** 2).mean())
        return torch.stack(losses).mean()

    gradient = loop(network, at, tasks(), BASE).gradient
    for seed in range(2):
        along = direction(at, seed)
        assert dot(gradient, along) == pytest.approx(directional(error, at, along, width=1e-6), rel=1e-6)


class Linear(nn.Module):
    """``x @ weight``, ``[N, 4]`` to ``[N, 1]``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None])

    def forward(self, x: Tensor, norm: Norm) -> Tensor:  # noqa: ARG002
        return x @ self.weight


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("engine", ["loop", *OTHERS])
def test_gradient_equals_the_closed_form(engine, steps) -> None:
    """Of a linear model: (I - alpha H)^k times the query error's slope, with H = 2 X'X / n; to first order the slope.

    After k steps the weights are w* + (I - alpha H)^k (w - w*), where w* fits the support set.
    """
    chance = torch.Generator().manual_seed(2)
    (support_x, query_x), (support_y, query_y) = (
        torch.randn(2, 6, size, generator=chance, dtype=torch.float64) for size in (4, 1)
    )
    batch = EpisodeBatch(support_x[None], support_y[None], query_x[None], query_y[None], torch.zeros(1).long())
    network = Linear()
    hessian = 2 * support_x.T @ support_x / 6
    fit = torch.linalg.lstsq(support_x, support_y).solution
    power = torch.linalg.matrix_power(torch.eye(4, dtype=torch.float64) - 0.1 * hessian, steps)
    adapted = fit + power @ (network.weight.detach() - fit)
    slope = 2 * query_x.T @ (query_x @ adapted - query_y) / 6
    for order, expected in {"second": power.T @ slope, "first": slope}.items():
        inner = InnerLoop(steps, 0.1, order, "transductive", task_loss="squared-error")
        outcome = run(engine, network, of(network), batch, inner)
        torch.testing.assert_close(outcome.gradient.weights["weight"], expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(outcome.loss, F.mse_loss(query_x @ adapted, query_y))


def test_the_evaluator_reports_squared_errors() -> None:
    """First the loss after the last step, then the error before adaptation and after each step; also all at once."""
    network = mlp(seed=1).double()
    at, method = of(network), method_of(network, BASE)
    with torch.no_grad():
        rows = torch.stack([measure(network, at, one, method) for one in episodes(tasks())])
        before = (network(tasks().query_x.flatten(0, 1)).view(4, 8, 1) - tasks().query_y).square().mean((1, 2))
    assert rows.shape == (4, 5)
    torch.testing.assert_close(rows[:, 1], before)
    assert torch.equal(rows[:, 0], rows[:, -1])
    torch.testing.assert_close(measure_together(network, at, tasks(), BASE), rows)
