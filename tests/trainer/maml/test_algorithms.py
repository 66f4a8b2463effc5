"""Proofs of each algorithm: what it adapts, what it learns, and that its gradient is the slope of its loss."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, pairwise

import pytest
import torch
from problems import (
    adapt,
    batch,
    direction,
    directional,
    dot,
    loop,
    named,
    query_logits,
    small_convnet,
    support_loss,
)
from torch import Tensor, nn
from torch.nn import functional as F

from mamldata.errors import RequestError
from mamldata.streaming.batch import EpisodeBatch
from trainer.maml.algorithms import ADAPTS, BN_MODES, RATES, InnerLoop
from trainer.maml.objective import Objective, step_weights
from trainer.maml.parameters import Episode, FastWeights, MetaParameters, adapted_names, episodes, meta_parameters
from trainer.networks.norms import Norm
from trainer.settings import TrainSettings

BASE = InnerLoop(steps=3, lr=0.1, order="second", bn="transductive")


def jittered(network: nn.Module, inner: InnerLoop) -> MetaParameters:
    """Meta-parameters no two of which are equal, as they are after some training."""
    chance = torch.Generator().manual_seed(9)
    parameters = meta_parameters(network, inner)
    with torch.no_grad():
        for value in [*parameters.rates.values(), *parameters.norms.values()]:
            value.mul_(1 + 0.3 * torch.rand(value.shape, generator=chance, dtype=value.dtype))
    return parameters


def one() -> Episode:
    return next(episodes(batch()))


def meta_loss(
    network: nn.Module, tasks: EpisodeBatch, inner: InnerLoop, weights: list[float], at: MetaParameters
) -> Tensor:
    """The weighted query loss as the definition has it, without any of the engine's code."""
    losses = []
    for episode in episodes(tasks):
        path = adapt(network, at, episode, inner)
        for weight, adapted in zip(weights, path[1:], strict=True):
            logits = query_logits(network, adapted, episode, inner)
            losses.append(weight * F.cross_entropy(logits, episode.query_y))
    return torch.stack(losses).sum() / len(tasks.index)


@pytest.mark.parametrize("weights", [(), (0.2, 0.3, 0.5)], ids=["final", "multi-step"])
@pytest.mark.parametrize("adapts", ADAPTS)
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("bn", BN_MODES)
def test_gradient_equals_finite_differences(bn, rates, adapts, weights) -> None:
    """In all of the space of second order, the gradient of weights, rates and norms is the slope of the loss."""
    network, tasks = small_convnet(), batch()
    inner = replace(BASE, bn=bn, rates=rates, adapts=adapts)
    at = jittered(network, inner)
    gradient = loop(network, at, tasks, inner, Objective("query", weights)).gradient
    along = direction(at, 0)
    expected = weights or (0, 0, 1)
    slope = directional(lambda point: meta_loss(network, tasks, inner, expected, point), at, along, width=1e-5)
    assert dot(gradient, along) == pytest.approx(slope, rel=1e-6, abs=1e-10)


class Regression(nn.Module):
    """A linear model whose logits are its answer; ``head`` is the weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.head = nn.Parameter(weight.clone())

    def forward(self, x: Tensor, norm: Norm) -> Tensor:  # noqa: ARG002
        return x.flatten(1) @ self.head[:, None]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_linear_regression_has_a_closed_form(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Least squares contract towards the support set's solution; weights, rates and multi-step loss follow from it."""
    monkeypatch.setattr(F, "cross_entropy", lambda answer, y: 0.5 * (answer[:, 0] - y).square().mean())
    chance = torch.Generator().manual_seed(3)
    x, z = torch.randn(2, 8, 3, generator=chance, dtype=torch.float64)
    y, t = torch.randn(2, 8, generator=chance, dtype=torch.float64)
    start = torch.randn(3, generator=chance, dtype=torch.float64)
    tasks = EpisodeBatch(x[None, :, None, None], y[None], z[None, :, None, None], t[None], torch.zeros(1).long())
    alphas = torch.linspace(0.05, 0.2, steps, dtype=torch.float64)
    weights = torch.linspace(1, 2, steps, dtype=torch.float64)

    # w_{i+1} - w* = (I - a_i H)(w_i - w*): the derivatives of w_i by w_0 and by each a_j are products of these.
    hessian, query_hessian = x.T @ x / 8, z.T @ z / 8
    solution, query_solution = torch.linalg.solve(hessian, x.T @ y / 8), torch.linalg.solve(query_hessian, z.T @ t / 8)
    place, by_start = start, torch.eye(3, dtype=torch.float64)
    by_rates = torch.zeros(3, steps, dtype=torch.float64)
    head, rates = torch.zeros(3, dtype=torch.float64), torch.zeros(steps, dtype=torch.float64)
    for i in range(steps):
        contraction = torch.eye(3, dtype=torch.float64) - alphas[i] * hessian
        by_rates = contraction @ by_rates
        by_rates[:, i] -= hessian @ (place - solution)
        place = solution + contraction @ (place - solution)
        by_start = contraction @ by_start
        slope = weights[i] * query_hessian @ (place - query_solution)
        head, rates = head + by_start.T @ slope, rates + by_rates.T @ slope

    network = Regression(start)
    inner = InnerLoop(steps, 0.1, "second", "transductive", rates="layer-step")
    parameters = meta_parameters(network, inner)
    with torch.no_grad():
        parameters.rates["head"] = alphas.clone().requires_grad_()
    outcome = loop(network, parameters, tasks, inner, Objective("query", tuple(weights.tolist())))
    torch.testing.assert_close(outcome.gradient.weights["head"], head, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(outcome.gradient.rates["head"], rates, rtol=1e-11, atol=1e-12)


def test_head_alone_adapts_in_anil() -> None:
    """ANIL's inner loop leaves the body as it is, and its outer loop teaches the body all the same."""
    network, inner = small_convnet(), replace(BASE, adapts="head")
    at = meta_parameters(network, inner)
    start, *_, end = adapt(network, at, one(), inner)
    changed = {name for name in start.weights if not torch.equal(start.weights[name], end.weights[name])}
    assert changed == {"head", "head_bias"}
    gradient = loop(network, at, batch(), inner).gradient
    assert all(value.abs().max() > 1e-6 for value in gradient.weights.values())


@pytest.mark.parametrize("rates", ["layer-step", "parameter"])
def test_learned_rates_scale_each_step(rates) -> None:
    """Each step moves against its slope, times the rate of its layer and step, or of each parameter."""
    network, inner, episode = small_convnet(), replace(BASE, rates=rates), one()
    at = jittered(network, inner)
    path = adapt(network, at, episode, inner)
    for i, (before, after) in enumerate(pairwise(path)):
        weights = before.weights
        slopes = torch.autograd.grad(
            support_loss(network, before, episode, inner), list(weights.values()), retain_graph=True
        )
        for name, slope in zip(weights, slopes, strict=True):
            rate = at.rates[name] if rates == "parameter" else at.rates[name][i]
            torch.testing.assert_close(after.weights[name], weights[name] - rate * slope, rtol=1e-10, atol=1e-13)


def test_fresh_rates_are_those_of_maml() -> None:
    """Before anything is learned, all kinds of rates adapt alike."""
    network, episode = small_convnet(), one()
    ends = []
    for rates in RATES:
        inner = replace(BASE, rates=rates)
        ends.append(adapt(network, meta_parameters(network, inner), episode, inner)[-1].weights)
    for end in ends[1:]:
        assert all(torch.equal(end[name], ends[0][name]) for name in ends[0])


def test_per_step_norms_are_taken_in_turn_and_not_adapted() -> None:
    """Step i normalises by row i, the query images after it by row i + 1; further steps keep to the last row."""
    network, inner = small_convnet(), replace(BASE, bn="per-step")
    at = jittered(network, inner)
    assert "blocks.0.scale" not in at.weights
    path = adapt(network, at, one(), replace(inner, steps=5))
    for i, fast in enumerate(path):
        for name in ("blocks.0.scale", "blocks.1.shift"):
            assert torch.equal(fast.weights[name], at.norms[name][min(i, 3)])


def test_frozen_statistics_are_those_before_the_first_step() -> None:
    """They do not follow the weights: a query image's logits are those of a network normalised by constants."""
    network, episode = small_convnet(), one()
    inner = replace(BASE, bn="frozen")
    path = adapt(network, meta_parameters(network, inner), episode, inner)
    kept, last = (fast.statistics for fast in (path[0], path[-1]))
    assert len(kept) == 2  # of two layers
    assert all(map(torch.equal, chain(*kept), chain(*last)))
    before = query_logits(network, path[-1], episode, inner)
    other = torch.cat([episode.query_x[:2], 30 * episode.query_x[2:]])
    after = query_logits(network, path[-1], episode._replace(query_x=other), inner)
    torch.testing.assert_close(before[:2], after[:2], rtol=1e-12, atol=1e-13)
    same = episode._replace(query_x=episode.support_x)
    at_start = [query_logits(network, path[0], same, replace(inner, bn=bn)) for bn in ("frozen", "support")]
    torch.testing.assert_close(*at_start)
    later = [query_logits(network, path[-1], same, replace(inner, bn=bn)) for bn in ("frozen", "support")]
    assert (later[0] - later[1]).abs().max() > 1e-3


def test_reptile_goes_to_the_adapted_weights() -> None:
    """Its gradient is the initial weights less the adapted ones, in the mean over the tasks."""
    network, tasks = small_convnet(), batch()
    inner = replace(BASE, order="first")
    at = meta_parameters(network, inner)
    gradient = loop(network, at, tasks, inner, Objective("reptile")).gradient
    ends = [adapt(network, at, episode, inner)[-1] for episode in episodes(tasks)]
    for name, start in at.weights.items():
        way = torch.stack([start - end.weights[name] for end in ends]).mean(0)
        torch.testing.assert_close(gradient.weights[name], way, rtol=1e-12, atol=1e-14)


def test_first_order_takes_learned_rates_slopes_for_constants() -> None:
    """To first order a rate's gradient is that of its own step: less the slope of the query loss, times the slope."""
    network, episode = small_convnet(), one()
    inner = replace(BASE, steps=1, order="first", rates="layer-step")
    at = meta_parameters(network, inner)
    tasks = EpisodeBatch(*(part[None] for part in episode), torch.zeros(1).long())
    gradient = loop(network, at, tasks, inner).gradient
    loss = support_loss(network, FastWeights(at.weights), episode, inner)
    for name, slope in zip(at.weights, torch.autograd.grad(loss, list(at.weights.values())), strict=True):
        expected = -(slope * gradient.weights[name]).sum()
        torch.testing.assert_close(gradient.rates[name][0], expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("weights", [(), (0.2, 0.3, 0.5)], ids=["final", "multi-step"])
@pytest.mark.parametrize("rates", RATES)
def test_gradient_of_the_class_sum_equals_finite_differences(rates, weights) -> None:
    """The scale of the inner loss is differentiated, too: the meta-gradient is the slope of the outer loss."""
    network, tasks = small_convnet(), batch()
    inner = replace(BASE, lr=0.05, rates=rates, inner_loss="class-sum")
    at = jittered(network, inner)
    gradient = loop(network, at, tasks, inner, Objective("query", weights)).gradient
    along = direction(at, 0)
    expected = weights or (0, 0, 1)
    slope = directional(lambda point: meta_loss(network, tasks, inner, expected, point), at, along, width=1e-5)
    assert dot(gradient, along) == pytest.approx(slope, rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("adapts", ADAPTS)
@pytest.mark.parametrize("bn", BN_MODES)
def test_class_sum_is_the_mean_with_n_way_times_the_rate(bn, adapts) -> None:
    """So the rates of MAML's released code are n_way times larger on the mean; both losses and gradients agree."""
    network, tasks = small_convnet(), batch()
    summed = replace(BASE, bn=bn, adapts=adapts, inner_loss="class-sum")
    mean = replace(summed, inner_loss="mean", lr=3 * BASE.lr)
    at = meta_parameters(network, mean)
    one, other, plain = (loop(network, at, tasks, inner) for inner in (summed, mean, replace(mean, lr=BASE.lr)))
    for name, value in named(other.gradient).items():
        torch.testing.assert_close(named(one.gradient)[name], value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-12, atol=0)
    assert abs(one.loss - plain.loss) > 1e-4


def test_class_sum_adds_the_losses_of_images_over_the_shots() -> None:
    """As MAML's released code has it: the sum over all support images, divided by the shots of a class."""
    network, episode = small_convnet(), one()
    inner = replace(BASE, inner_loss="class-sum")
    fast = FastWeights(meta_parameters(network, inner).weights)
    logits = query_logits(network, fast, episode._replace(query_x=episode.support_x), inner)
    expected = F.cross_entropy(logits, episode.support_y, reduction="sum") / 2
    torch.testing.assert_close(support_loss(network, fast, episode, inner), expected)


def test_class_sum_of_numbers_is_refused() -> None:
    """A regression problem has no classes to sum over."""
    with pytest.raises(RequestError, match="inner_loss class-sum is for classes, but the loss is squared-error"):
        replace(BASE, inner_loss="class-sum", task_loss="squared-error")


def test_norms_that_do_not_adapt_are_learned_all_the_same() -> None:
    """The inner loop leaves scales and shifts as they are and moves the rest; the outer loop has their gradient."""
    network, inner = small_convnet(), replace(BASE, adapts="all-but-norms")
    at = meta_parameters(network, inner)
    start, *_, end = adapt(network, at, one(), inner)
    same = {name for name in start.weights if torch.equal(start.weights[name], end.weights[name])}
    assert same == {f"blocks.{block}.{part}" for block in (0, 1) for part in ("scale", "shift")}
    gradient = loop(network, at, batch(), inner).gradient
    assert all(gradient.weights[name].abs().max() > 1e-6 for name in same)


def test_adapted_names_of_the_space() -> None:
    """Per-step norms are left alone by the inner loop, and ANIL's is the head's."""
    network = small_convnet()
    kernels = ["blocks.0.kernel", "blocks.1.kernel"]
    head = ["head", "head_bias"]
    assert adapted_names(network, BASE) == [name for name, _ in network.named_parameters()]
    assert sorted(adapted_names(network, replace(BASE, bn="per-step"))) == sorted(kernels + head)
    assert adapted_names(network, replace(BASE, adapts="head")) == head
    assert sorted(adapted_names(network, replace(BASE, adapts="all-but-norms"))) == sorted(kernels + head)


def test_multi_step_weights_are_annealed() -> None:
    """Equal at first, then down by an even amount an epoch to a floor; the last step has the rest, and then all."""
    assert step_weights(5, 0, 10) == pytest.approx((0.2,) * 5)
    assert step_weights(5, 5, 10) == pytest.approx((0.1, 0.1, 0.1, 0.1, 0.6))
    floor = 0.03 / 5
    assert step_weights(5, 99, 100) == pytest.approx((floor,) * 4 + (1 - 4 * floor,))
    for epoch in (10, 1000):
        assert step_weights(5, epoch, 10) == (0, 0, 0, 0, 1)
    assert step_weights(1, 3, 10) == (1.0,)


def test_settings_anneal_loss_and_order() -> None:
    """An epoch's weights and order hold for its outer steps."""
    settings = TrainSettings(
        algorithm="maml++", inner_steps=2, msl_epochs=4, first_order_epochs=2, epoch_steps=3, steps=20
    )
    assert [settings.inner_loop(step).order for step in range(8)] == ["first"] * 6 + ["second"] * 2
    weights = [settings.objective(step).weights for step in range(7)]
    assert weights[0] == weights[2] == (0.5, 0.5)
    assert weights[3] == pytest.approx((0.375, 0.625))
    assert weights[6] == pytest.approx((0.25, 0.75))


def test_every_part_of_mamlpp_can_be_switched() -> None:
    """Switched off one by one, what is left of MAML++ is MAML."""
    whole = TrainSettings(algorithm="maml++")
    assert (whole.point.loss, whole.point.rates, whole.point.bn) == ("multi-step", "layer-step", "per-step")
    bare = TrainSettings(algorithm="maml++", loss="final", rates="fixed", bn="transductive")
    maml = TrainSettings(algorithm="maml")
    assert (bare.inner_loop(), bare.objective(0)) == (maml.inner_loop(), maml.objective(0))
    assert replace(maml.point, name="maml++") == bare.point


def test_senseless_combinations_are_refused_all_at_once() -> None:
    """Each has its reason."""
    with pytest.raises(RequestError) as caught:
        TrainSettings(
            algorithm="reptile",
            order="second",
            loss="multi-step",
            rates="parameter",
            bn="per-step",
            adapts="all-but-norms",
        )
    assert str(caught.value).splitlines()[1:] == [
        "  order cannot be second with reptile: it takes no gradient through the inner loop.",
        "  loss cannot be multi-step with reptile: it uses no query loss.",
        "  rates cannot be parameter with reptile: it would not learn them.",
        "  bn cannot be per-step with reptile: it would not learn each step's scale and shift.",
        "  adapts cannot be all-but-norms with reptile: it would not learn scales and shifts.",
    ]
    with pytest.raises(RequestError) as caught:
        TrainSettings(algorithm="fomaml", bn="per-step", first_order_epochs=2, msl_epochs=3)
    assert str(caught.value).splitlines()[1:] == [
        (
            "  bn cannot be per-step with order first and loss final: only the last step's scale and shift would be "
            "learned. Use order second or loss multi-step."
        ),
        "  first_order_epochs must be 0 with order first: the order never changes to second.",
        "  msl_epochs is for the loss multi-step, but the loss is final.",
    ]
    with pytest.raises(RequestError, match="epoch_steps is for first_order_epochs and for the loss multi-step, but"):
        TrainSettings(epoch_steps=3)


@pytest.mark.parametrize(
    "more",
    [
        {"algorithm": "fomaml", "loss": "multi-step", "bn": "per-step"},
        {"algorithm": "anil", "rates": "parameter"},
        {"algorithm": "anil", "rates": "layer-step", "loss": "multi-step", "bn": "per-step"},
        {"algorithm": "pretrain", "adapts": "all"},
        {"algorithm": "random", "adapts": "head", "bn": "frozen"},
    ],
)
def test_combinations_that_make_sense_are_taken(more) -> None:
    """Parts of one algorithm go with another one."""
    point = TrainSettings(**{"inner_steps": 3, **more}).point
    assert all(getattr(point, name) == value for name, value in more.items() if name != "algorithm")
