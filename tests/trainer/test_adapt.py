from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from problems import batch, perceptron, small_convnet

from trainer.adapt import (
    BatchNorm,
    Episode,
    InnerLoop,
    accuracy,
    adapt,
    episodes,
    func_slopes,
    query_logits,
    support_loss,
)
from trainer.algorithms import Order
from trainer.models import written_out


def inner_loop(steps: int = 3, order: Order = "second", bn: BatchNorm = "transductive") -> InnerLoop:
    return InnerLoop(steps=steps, lr=0.1, order=order, bn=bn)


def one() -> Episode:
    return next(episodes(batch()))


def test_each_step_is_gradient_descent_on_the_support_set() -> None:
    """Each set of parameters is the one before, less the learning rate times the support loss's slope."""
    network, episode = small_convnet(), one()
    path = adapt(network, dict(network.named_parameters()), episode, inner_loop())
    assert len(path) == 4
    for before, after in pairwise(path):
        slopes = torch.autograd.grad(support_loss(network, before, episode), list(before.values()), retain_graph=True)
        for name, slope in zip(before, slopes, strict=True):
            torch.testing.assert_close(after[name], before[name] - 0.1 * slope, rtol=1e-10, atol=1e-13)


def test_a_whole_number_is_a_rate() -> None:
    """1 is what 1.0 is, as a user writes it."""
    network, episode = perceptron(), one()
    at = dict(network.named_parameters())
    whole, broken = (adapt(network, at, episode, replace(inner_loop(), lr=lr))[-1] for lr in (1, 1.0))
    assert all(torch.equal(whole[name], broken[name]) for name in at)


@pytest.mark.parametrize("make", [perceptron, small_convnet])
def test_order_changes_the_graph_and_not_the_values(make) -> None:
    """First and second order adapt to the very same parameters."""
    network, episode = make(), one()
    at = dict(network.named_parameters())
    second, first = (adapt(network, at, episode, inner_loop(3, order))[-1] for order in ("second", "first"))
    assert all(torch.equal(second[name], first[name]) for name in at)


def test_first_order_treats_inner_gradients_as_constants() -> None:
    """To first order the adapted parameters follow the initial ones one to one."""
    network, episode = perceptron(), one()
    at = dict(network.named_parameters())
    adapted = adapt(network, at, episode, inner_loop(3, "first"))[-1]
    slopes = torch.autograd.grad(sum(value.sum() for value in adapted.values()), list(at.values()))
    assert all(torch.equal(slope, torch.ones_like(slope)) for slope in slopes)


@pytest.mark.parametrize("order", ["first", "second"])
def test_no_graph_is_kept_under_no_grad(order: Order) -> None:
    """Evaluation gets plain numbers, although the parameters require gradients."""
    network = small_convnet()
    with torch.no_grad():
        path = adapt(network, dict(network.named_parameters()), one(), inner_loop(2, order))
    assert all(value.grad_fn is None for value in path[-1].values())


def test_adapt_is_pure() -> None:
    """Twice the same call gives twice the same, and the network is as before."""
    network, episode = small_convnet(), one()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    at = dict(network.named_parameters())
    first, again = (adapt(network, at, episode, inner_loop())[-1] for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in at)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def logits_with_other_company(bn: BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of two query images, before and after all other query images were replaced."""
    network, episode = small_convnet(), one()
    at = dict(network.named_parameters())
    other = torch.cat([episode.query_x[:2], 30 * episode.query_x[2:].flip(0)])
    return tuple(
        query_logits(network, at, episode._replace(query_x=query_x), bn)[:2] for query_x in (episode.query_x, other)
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
    at = dict(network.named_parameters())
    same = episode._replace(query_x=episode.support_x)
    torch.testing.assert_close(
        query_logits(network, at, same, "support"), query_logits(network, at, same, "transductive")
    )


def test_accuracy_is_the_share_of_right_answers() -> None:
    """Three right of four."""
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [1.0, 2.0]])
    assert accuracy(logits, torch.tensor([0, 1, 0, 0])).item() == 0.75


def test_adapt_runs_under_vmap() -> None:
    """The inner loop can run for all tasks at once, with the results of one after the other."""
    network, tasks = small_convnet(), batch()
    inner = replace(inner_loop(2), norm=written_out, slopes=func_slopes)
    at = {name: value.detach() for name, value in network.named_parameters()}
    together = torch.func.vmap(lambda *parts: adapt(network, at, Episode(*parts), inner)[-1])(*tasks[:4])
    for i, episode in enumerate(episodes(tasks)):
        alone = adapt(network, at, episode, inner)[-1]
        for name in at:
            torch.testing.assert_close(together[name][i], alone[name], rtol=1e-9, atol=1e-12)
