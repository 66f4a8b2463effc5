from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import adapt, batch, fill, loop, named, query_logits, small_convnet
from torch import nn

from trainer.evaluation import measure
from trainer.maml.algorithms import ORDERS, RATES, InnerLoop
from trainer.maml.anil import head_on_features
from trainer.maml.parameters import episodes, meta_parameters
from trainer.maml.variants import method_of
from trainer.networks.networks import build_network

ANIL = InnerLoop(steps=3, lr=0.1, order="second", bn="transductive", adapts="head")


def passes(network: nn.Module) -> list[int]:
    """Grows with each image batch that goes through the first block."""
    seen: list[int] = []
    network.blocks[0].register_forward_hook(lambda *about: seen.append(len(about[-1])))
    return seen


@pytest.mark.parametrize("order", ORDERS)
def test_each_image_goes_through_the_body_once(order) -> None:
    """In training and in evaluation, however many steps there are."""
    network, tasks, inner = small_convnet(), batch(tasks=1), replace(ANIL, order=order)
    seen = passes(network)
    loop(network, meta_parameters(network, inner), tasks, inner, every_step=True)
    assert seen == [6, 12]
    seen.clear()
    with torch.no_grad():
        measure(network, meta_parameters(network, inner), next(episodes(tasks)), method_of(network, inner))
    assert seen == [6, 12]


@pytest.mark.parametrize("bn", ["transductive", "support"])
@pytest.mark.parametrize("rates", RATES)
def test_answers_are_the_same_at_each_step(bn, rates) -> None:
    """Before and after each inner step, to float64 rounding."""
    network, episode, inner = small_convnet(), next(episodes(batch())), replace(ANIL, bn=bn, rates=rates)
    at = meta_parameters(network, inner)
    head, heads, features = head_on_features(network, at, episode, method_of(network, inner))
    assert head is not network
    for whole, part in zip(adapt(network, at, episode, inner), adapt(head, heads, features, inner), strict=True):
        torch.testing.assert_close(
            query_logits(head, part, features, ANIL),
            query_logits(network, whole, episode, inner),
            rtol=1e-9,
            atol=1e-12,
        )


@pytest.mark.parametrize(
    "changes",
    [{"adapts": "all"}, {"bn": "frozen"}, {"bn": "per-step"}, {"support_batches": 2}, {"checkpoint": True}],
    ids=str,
)
def test_a_body_that_changes_is_left_alone(changes) -> None:
    """Where features are not the same in all steps, images stay images."""
    network, episode, inner = small_convnet(), next(episodes(batch())), replace(ANIL, **changes)
    at = meta_parameters(network, inner)
    method = method_of(network, inner)
    assert method.shortcut(network, at, episode, method) == (network, at, episode)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bn", ["transductive", "support"])
def test_the_gradient_is_that_of_the_whole_network(bn, order) -> None:
    """Against the same network without a method that tells its body from its head."""

    class Whole(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.blocks, self.head, self.head_bias = network.blocks, network.head, network.head_bias

        def forward(self, x, norm):
            for block in self.blocks:
                x = block(x, norm)
            return nn.functional.linear(x.mean((2, 3)), self.head, self.head_bias)

    network, inner = small_convnet(), replace(ANIL, bn=bn, order=order)
    whole = Whole(network)
    expected = loop(whole, meta_parameters(whole, inner), batch(), inner, every_step=True)
    outcome = loop(network, meta_parameters(network, inner), batch(), inner, every_step=True)
    for name, value in named(expected.gradient).items():
        torch.testing.assert_close(named(outcome.gradient)[name], value, rtol=1e-9, atol=1e-12)
    assert torch.equal(outcome.score, expected.score)
    torch.testing.assert_close(outcome.loss, expected.loss)


def test_resnet18_has_features() -> None:
    """The other kind of network, too."""
    pytest.importorskip("torchvision")
    network = fill(build_network("resnet18", 1, 6, 3, seed=0))
    method = method_of(network, ANIL)
    head, _, features = method.shortcut(network, meta_parameters(network, ANIL), next(episodes(batch())), method)
    assert head is not network
    assert features.query_x.shape == (12, 512)
