from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import batch, fill, small_convnet
from torch import nn

from trainer.adapt import InnerLoop, adapt, episodes, meta_parameters, query_logits
from trainer.algorithms import ORDERS, RATES
from trainer.engines import loop
from trainer.evaluate import measure
from trainer.features import head_on_features
from trainer.models import build_network

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
        measure(network, meta_parameters(network, inner), next(episodes(tasks)), inner)
    assert seen == [6, 12]


@pytest.mark.parametrize("bn", ["transductive", "support"])
@pytest.mark.parametrize("rates", RATES)
def test_answers_are_the_same_at_each_step(bn, rates) -> None:
    """Before and after each inner step, to float64 rounding."""
    network, episode, inner = small_convnet(), next(episodes(batch())), replace(ANIL, bn=bn, rates=rates)
    at = meta_parameters(network, inner)
    head, heads, features = head_on_features(network, at, episode, inner)
    assert head is not network
    for whole, part in zip(adapt(network, at, episode, inner), adapt(head, heads, features, inner), strict=True):
        torch.testing.assert_close(
            query_logits(head, part, features, bn), query_logits(network, whole, episode, bn), rtol=1e-9, atol=1e-12
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
    assert head_on_features(network, at, episode, inner) == (network, at, episode)


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
    for name, value in expected.gradient.items():
        torch.testing.assert_close(outcome.gradient[name], value, rtol=1e-9, atol=1e-12)
    assert torch.equal(outcome.score, expected.score)
    torch.testing.assert_close(outcome.loss, expected.loss)


def test_resnet18_has_features() -> None:
    """The other kind of network, too."""
    pytest.importorskip("torchvision")
    network = fill(build_network("resnet18", 1, 6, 3, seed=0))
    head, _, features = head_on_features(network, meta_parameters(network, ANIL), next(episodes(batch())), ANIL)
    assert head is not network
    assert features.query_x.shape == (12, 512)
