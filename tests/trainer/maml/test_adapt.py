from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from problems import adapt, batch, of, perceptron, query_logits, small_convnet, support_loss

from trainer.maml import adapt as module
from trainer.maml.algorithms import BatchNorm, InnerLoop, Order
from trainer.maml.losses import accuracy
from trainer.maml.parameters import Episode, FastWeights, episodes
from trainer.maml.variants import method_of


def inner_loop(steps: int = 3, order: Order = "second", bn: BatchNorm = "transductive") -> InnerLoop:
    return InnerLoop(steps=steps, lr=0.1, order=order, bn=bn)


def one() -> Episode:
    return next(episodes(batch()))


def test_each_step_is_gradient_descent_on_the_support_set() -> None:
    """Each set of parameters is the one before, less the learning rate times the support loss's slope."""
    network, episode = small_convnet(), one()
    inner = inner_loop()
    path = adapt(network, of(network), episode, inner)
    assert len(path) == 4
    for before, after in pairwise(path):
        weights = before.weights
        slopes = torch.autograd.grad(
            support_loss(network, before, episode, inner), list(weights.values()), retain_graph=True
        )
        for name, slope in zip(weights, slopes, strict=True):
            torch.testing.assert_close(after.weights[name], weights[name] - 0.1 * slope, rtol=1e-10, atol=1e-13)


def test_a_whole_number_is_a_rate() -> None:
    """1 is what 1.0 is, as a user writes it."""
    network, episode = perceptron(), one()
    at = of(network)
    whole, broken = (adapt(network, at, episode, replace(inner_loop(), lr=lr))[-1].weights for lr in (1, 1.0))
    assert all(torch.equal(whole[name], broken[name]) for name in at.weights)


@pytest.mark.parametrize("make", [perceptron, small_convnet])
def test_order_changes_the_graph_and_not_the_values(make) -> None:
    """First and second order adapt to the very same parameters."""
    network, episode = make(), one()
    at = of(network)
    second, first = (adapt(network, at, episode, inner_loop(3, order))[-1].weights for order in ("second", "first"))
    assert all(torch.equal(second[name], first[name]) for name in at.weights)


def test_first_order_treats_inner_gradients_as_constants() -> None:
    """To first order the adapted parameters follow the initial ones one to one."""
    network, episode = perceptron(), one()
    at = of(network)
    adapted = adapt(network, at, episode, inner_loop(3, "first"))[-1].weights
    slopes = torch.autograd.grad(sum(value.sum() for value in adapted.values()), at.tensors())
    assert all(torch.equal(slope, torch.ones_like(slope)) for slope in slopes)


@pytest.mark.parametrize("order", ["first", "second"])
def test_no_graph_is_kept_under_no_grad(order: Order) -> None:
    """Evaluation gets plain numbers, although the parameters require gradients."""
    network = small_convnet()
    with torch.no_grad():
        path = adapt(network, of(network), one(), inner_loop(2, order))
    assert all(value.grad_fn is None for value in path[-1].weights.values())


def test_adapt_is_pure() -> None:
    """Twice the same call gives twice the same, and the network is as before."""
    network, episode = small_convnet(), one()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    at = of(network)
    first, again = (adapt(network, at, episode, inner_loop())[-1].weights for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in at.weights)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def logits_with_other_company(bn: BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of two query images, before and after all other query images were replaced."""
    network, episode = small_convnet(), one()
    at, inner = FastWeights(dict(network.named_parameters())), inner_loop(bn=bn)
    other = torch.cat([episode.query_x[:2], 30 * episode.query_x[2:].flip(0)])
    return tuple(
        query_logits(network, at, episode._replace(query_x=query_x), inner)[:2] for query_x in (episode.query_x, other)
    )


def test_support_mode_keeps_query_images_apart() -> None:
    """With the support set's statistics, an image's logits do not depend on the other query images."""
    before, after = logits_with_other_company("support")
    torch.testing.assert_close(before, after, rtol=1e-12, atol=1e-13)


def test_transductive_mode_does_not() -> None:
    """With the query set's statistics they do: the two modes must never be compared."""
    before, after = logits_with_other_company("transductive")
    assert (before - after).abs().max() > 0.01


def test_support_mode_takes_the_support_images_statistics() -> None:
    """Support images shown as query images get the logits that they have in the inner loop."""
    network, episode = small_convnet(), one()
    at = FastWeights(dict(network.named_parameters()))
    same = episode._replace(query_x=episode.support_x)
    modes = (inner_loop(bn="support"), inner_loop(bn="transductive"))
    torch.testing.assert_close(*(query_logits(network, at, same, inner) for inner in modes))


def test_accuracy_is_the_share_of_right_answers() -> None:
    """Three right of four."""
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [1.0, 2.0]])
    assert accuracy(logits, torch.tensor([0, 1, 0, 0])).item() == 0.75


def test_adapt_runs_under_vmap() -> None:
    """The inner loop can run for all tasks at once, with the results of one after the other."""
    network, tasks = small_convnet(), batch()
    method = method_of(network, inner_loop(2), "vmap")
    at = of(network).like(value.detach() for value in network.parameters())

    def adapted(*parts: torch.Tensor) -> FastWeights:
        return module.adapt(network, at, Episode(*parts), method)[-1]

    together = torch.func.vmap(adapted)(*tasks[:4]).weights
    for i, episode in enumerate(episodes(tasks)):
        alone = adapted(*episode).weights
        for name in at.weights:
            torch.testing.assert_close(together[name][i], alone[name], rtol=1e-9, atol=1e-12)
