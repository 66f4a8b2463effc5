"""Proofs of the meta-gradient: against finite differences, a closed form, and code written by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import adapt, batch, direction, directional, dot, loop, of, perceptron, query_logits, small_convnet
from torch import Tensor, nn
from torch.nn import functional as F

from mamldata.streaming.batch import EpisodeBatch
from trainer.maml.algorithms import BatchNorm, InnerLoop, Order
from trainer.maml.losses import accuracy
from trainer.maml.parameters import MetaParameters, Parameters, episodes
from trainer.networks.batchnorm import EPSILON
from trainer.networks.norms import Norm, written_out

NETWORKS = [perceptron, small_convnet]


def inner_loop(steps: int = 2, order: Order = "second", bn: BatchNorm = "transductive") -> InnerLoop:
    return InnerLoop(steps=steps, lr=0.1, order=order, bn=bn)


def meta_loss(network: nn.Module, tasks: EpisodeBatch, inner: InnerLoop, at: MetaParameters) -> Tensor:
    """The outer loss as the definition has it, without any of the engine's code."""
    losses = [
        F.cross_entropy(query_logits(network, adapt(network, at, one, inner)[-1], one, inner), one.query_y)
        for one in episodes(tasks)
    ]
    return torch.stack(losses).mean()


def flat(gradient: MetaParameters) -> Tensor:
    return torch.cat([value.flatten() for value in gradient.tensors()])


@pytest.mark.parametrize("bn", ["transductive", "support"])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("make", NETWORKS)
def test_maml_gradient_equals_finite_differences(make: Callable[[], nn.Module], steps: int, bn: BatchNorm) -> None:
    """The second-order meta-gradient is the slope of the meta-loss, in both batch-norm modes."""
    network, tasks, inner = make(), batch(), inner_loop(steps, bn=bn)
    at = of(network)
    gradient = loop(network, at, tasks, inner).gradient
    for seed in range(2):
        along = direction(at, seed)
        # The ReLU's kinks ask for small steps, rounding for large ones.
        slope = directional(lambda point: meta_loss(network, tasks, inner, point), at, along, width=1e-5)
        assert dot(gradient, along) == pytest.approx(slope, rel=1e-6, abs=1e-10)


class Point(nn.Module):
    """Its parameter is its answer ``[1, 4]``, whatever the images are."""

    def __init__(self, place: Tensor) -> None:
        super().__init__()
        self.place = nn.Parameter(place.clone())

    def forward(self, x: Tensor, norm: Norm) -> Tensor:  # noqa: ARG002
        return self.place[None]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_maml_gradient_equals_the_closed_form(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For quadratic losses the meta-gradient is (I - alpha A)^k C (theta_k - d), and FOMAML's C (theta_k - d)."""
    chance = torch.Generator().manual_seed(5)
    roots = torch.randn(2, 4, 4, generator=chance, dtype=torch.float64)
    support, query = (root @ root.T / 4 + torch.eye(4, dtype=torch.float64) for root in roots)
    b, d, theta = torch.randn(3, 4, generator=chance, dtype=torch.float64)

    # In the place of cross-entropy; the support set has the label 0, the query set the label 1.
    def quadratic(answer: Tensor, label: Tensor) -> Tensor:
        x = answer[0]
        return 0.5 * x @ support @ x - b @ x if label[0] == 0 else 0.5 * (x - d) @ query @ (x - d)

    monkeypatch.setattr(F, "cross_entropy", quadratic)
    one = torch.zeros(1, 1, 1, 1, 1)
    tasks = EpisodeBatch(one, torch.zeros(1, 1).long(), one, torch.ones(1, 1).long(), torch.zeros(1).long())

    alpha = 0.1
    network = Point(theta)
    contraction = torch.linalg.matrix_power(torch.eye(4, dtype=torch.float64) - alpha * support, steps)
    minimum = torch.linalg.solve(support, b)
    adapted = minimum + contraction @ (theta - minimum)
    first = query @ (adapted - d)
    for order, expected in {"second": contraction.T @ first, "first": first}.items():
        outcome = loop(network, of(network), tasks, InnerLoop(steps, alpha, order, "transductive"))
        torch.testing.assert_close(outcome.gradient.weights["place"], expected, rtol=1e-12, atol=1e-12)


def by_hand(network: nn.Module, at: Parameters, tasks: EpisodeBatch, inner: InnerLoop) -> Parameters:
    """The meta-gradient with nothing but torch.autograd.grad: no code of ours but the network."""
    names, total = list(at), [torch.zeros_like(value) for value in at.values()]
    for one in zip(tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y, strict=True):
        support_x, support_y, query_x, query_y = one
        values = list(at.values())
        for _ in range(inner.steps):
            logits = torch.func.functional_call(
                network, dict(zip(names, values, strict=True)), (support_x, written_out)
            )
            loss = F.cross_entropy(logits, support_y)
            slopes = torch.autograd.grad(loss, values, create_graph=True)
            if inner.order == "first":
                slopes = tuple(slope.detach() for slope in slopes)
            values = [value - inner.lr * slope for value, slope in zip(values, slopes, strict=True)]
        logits = torch.func.functional_call(network, dict(zip(names, values, strict=True)), (query_x, written_out))
        slopes = torch.autograd.grad(F.cross_entropy(logits, query_y), list(at.values()))
        total = [whole + slope / len(tasks.index) for whole, slope in zip(total, slopes, strict=True)]
    return dict(zip(names, total, strict=True))


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("make", NETWORKS)
def test_gradient_equals_one_written_by_hand(make: Callable[[], nn.Module], steps: int, order: Order) -> None:
    """MAML is autograd with create_graph, FOMAML the same with detached inner gradients."""
    network, tasks, inner = make(), batch(), inner_loop(steps, order)
    at = of(network)
    expected = by_hand(network, at.weights, tasks, inner)
    gradient = loop(network, at, tasks, inner).gradient.weights
    for name in at.weights:
        torch.testing.assert_close(gradient[name], expected[name], rtol=1e-9, atol=1e-12)


def test_frozen_statistics_are_constants_to_first_order() -> None:
    """The gradient is that of a network in whose norms the support images' statistics stand as numbers."""
    network, tasks, inner = small_convnet(), batch(), inner_loop(2, "first", "frozen")
    parameters = of(network)
    at = parameters.weights
    names, total = list(at), [torch.zeros_like(value) for value in at.values()]
    for support_x, support_y, query_x, query_y in zip(*tasks[:4], strict=True):
        numbers: list[tuple[Tensor, Tensor]] = []

        def noting(x: Tensor, weight: Tensor, bias: Tensor, numbers: list[tuple[Tensor, Tensor]] = numbers) -> Tensor:
            variance, mean = torch.var_mean(x.detach(), dim=(0, 2, 3), correction=0)
            numbers.append((mean, variance))
            return F.batch_norm(x, mean, variance, weight, bias, eps=EPSILON)

        def logits(values: list[Tensor], x: Tensor, numbers: list[tuple[Tensor, Tensor]] = numbers) -> Tensor:
            layers = iter(numbers)
            norm = lambda x, weight, bias: F.batch_norm(x, *next(layers), weight, bias, eps=EPSILON)  # noqa: E731
            return torch.func.functional_call(network, dict(zip(names, values, strict=True)), (x, norm))

        network(support_x, noting)
        values = list(at.values())
        for _ in range(inner.steps):
            slopes = torch.autograd.grad(F.cross_entropy(logits(values, support_x), support_y), values)
            values = [value - inner.lr * slope for value, slope in zip(values, slopes, strict=True)]
        slopes = torch.autograd.grad(F.cross_entropy(logits(values, query_x), query_y), list(at.values()))
        total = [whole + slope / len(tasks.index) for whole, slope in zip(total, slopes, strict=True)]
    gradient = loop(network, parameters, tasks, inner).gradient.weights
    for name, expected in zip(names, total, strict=True):
        torch.testing.assert_close(gradient[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", NETWORKS)
def test_first_and_second_order_differ(make: Callable[[], nn.Module]) -> None:
    """Second order is really second order: the two gradients point in clearly different directions."""
    network, tasks = make(), batch()
    at = of(network)
    second, first = (flat(loop(network, at, tasks, inner_loop(5, order)).gradient) for order in ("second", "first"))
    assert F.cosine_similarity(second, first, dim=0) < 0.995


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("bn", ["transductive", "support"])
def test_episodes_are_independent(order: Order, bn: BatchNorm) -> None:
    """The order of the tasks makes no difference beyond rounding, and each counts as much as if it were alone."""
    network, tasks, inner = small_convnet(), batch(tasks=4), inner_loop(2, order, bn)
    at = of(network)
    whole = flat(loop(network, at, tasks, inner).gradient)
    turned = EpisodeBatch(*(part.flip(0) for part in tasks))
    torch.testing.assert_close(flat(loop(network, at, turned, inner).gradient), whole, rtol=1e-12, atol=1e-14)
    alone = [
        flat(loop(network, at, EpisodeBatch(*(part[i : i + 1] for part in tasks)), inner).gradient) for i in range(4)
    ]
    torch.testing.assert_close(torch.stack(alone).mean(0), whole, rtol=1e-12, atol=1e-14)


def test_outcome_is_that_of_the_definition() -> None:
    """Loss and accuracies are means over the episodes, and every step's accuracy is given when asked for."""
    network, tasks, inner = small_convnet(), batch(tasks=5, k_query=20), InnerLoop(3, 1.0, "second", "transductive")
    at = of(network)
    outcome = loop(network, at, tasks, inner, every_step=True)
    assert len(set(outcome.score.tolist())) > 2  # or the order of the steps would not show
    torch.testing.assert_close(outcome.loss, meta_loss(network, tasks, inner, at).detach())
    expected = [
        torch.stack([accuracy(query_logits(network, p, one, inner), one.query_y) for p in path])
        for one in episodes(tasks)
        for path in [adapt(network, at, one, inner)]
    ]
    torch.testing.assert_close(outcome.score, torch.stack(expected).mean(0))
    assert outcome.score.shape == (4,)
    assert torch.equal(loop(network, at, tasks, inner).score, outcome.score[-1:])


@pytest.mark.parametrize("order", ["first", "second"])
def test_engine_changes_nothing(order: Order) -> None:
    """Parameters, their gradients and the global generator are as they were, and results hold no graph."""
    network, tasks = small_convnet(), batch()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    chance = torch.get_rng_state()
    outcome = loop(network, of(network), tasks, inner_loop(2, order), every_step=True)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(value.grad is None for value in network.parameters())
    assert torch.equal(chance, torch.get_rng_state())
    assert not any(part.requires_grad for part in (outcome.loss, outcome.score, *outcome.gradient.tensors()))
