"""Small problems in float64 for the proofs of gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamldata.streaming.batch import EpisodeBatch
from trainer.adapt import Parameters
from trainer.models import Block, ConvNet, Norm


class Perceptron(nn.Module):
    """Two layers and a smooth bend; takes a normalisation as all networks do, and has no use for it."""

    def __init__(self, inputs: int, hidden: int, n_way: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(hidden, inputs))
        self.first_bias = nn.Parameter(torch.zeros(hidden))
        self.second = nn.Parameter(torch.empty(n_way, hidden))

    def forward(self, x: Tensor, norm: Norm) -> Tensor:  # noqa: ARG002
        return F.linear(torch.tanh(F.linear(x.flatten(1), self.first, self.first_bias)), self.second)


def fill(network: nn.Module, seed: int = 0) -> nn.Module:
    chance = torch.Generator().manual_seed(seed)
    network = network.double()
    with torch.no_grad():
        for value in network.parameters():
            value.copy_(0.6 * torch.randn(value.shape, generator=chance, dtype=torch.float64))
    return network


def perceptron() -> nn.Module:
    return fill(Perceptron(36, 7, 3))


def small_convnet() -> nn.Module:
    """Two blocks with batch norm, the second one with stride 2."""
    blocks = [
        Block(1, 4, stride=1, padding=1, pool=False),
        Block(4, 3, stride=2, padding=1, pool=False),
    ]
    return fill(ConvNet(blocks, 3, 3, mean_over_space=True))


def batch(tasks: int = 3, n_way: int = 3, k_shot: int = 2, k_query: int = 4, seed: int = 1) -> EpisodeBatch:
    chance = torch.Generator().manual_seed(seed)
    support, query = (
        torch.randn(tasks, n_way * k, 1, 6, 6, generator=chance, dtype=torch.float64) for k in (k_shot, k_query)
    )
    labels = [torch.arange(n_way).repeat_interleave(k).repeat(tasks, 1) for k in (k_shot, k_query)]
    return EpisodeBatch(support, labels[0], query, labels[1], torch.arange(tasks))


def directional(function: Callable[[Parameters], Tensor], at: Parameters, along: Parameters, width: float) -> float:
    """The derivative along a direction by central differences, of fourth order."""

    def value(distance: float) -> float:
        return function({name: at[name].detach() + distance * along[name] for name in at}).item()

    near, far = value(width) - value(-width), value(2 * width) - value(-2 * width)
    return (8 * near - far) / (12 * width)


def direction(at: Parameters, seed: int) -> Parameters:
    """Random and of length one."""
    chance = torch.Generator().manual_seed(seed)
    raw = {name: torch.randn(value.shape, generator=chance, dtype=value.dtype) for name, value in at.items()}
    length = torch.stack([value.pow(2).sum() for value in raw.values()]).sum().sqrt()
    return {name: value / length for name, value in raw.items()}


def dot(a: Parameters, b: Parameters) -> float:
    return sum((a[name] * b[name]).sum().item() for name in a)
