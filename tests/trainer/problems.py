"""Small problems in float64 for the proofs of gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamldata.streaming.batch import EpisodeBatch
from trainer.maml import adapt as inner_loops
from trainer.maml import engines
from trainer.maml.algorithms import InnerLoop
from trainer.maml.objective import Objective
from trainer.maml.parameters import Episode, FastWeights, MetaParameters
from trainer.maml.variants import method_of
from trainer.networks.networks import Block, ConvNet
from trainer.networks.norms import Norm


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


def of(network: nn.Module) -> MetaParameters:
    """Nothing but a network's own parameters."""
    return MetaParameters(dict(network.named_parameters()))


def adapt(network: nn.Module, parameters: MetaParameters, episode: Episode, inner: InnerLoop) -> list[FastWeights]:
    """By the method that belongs to ``inner``, as the four below."""
    return inner_loops.adapt(network, parameters, episode, method_of(network, inner))


def support_loss(network: nn.Module, fast: FastWeights, episode: Episode, inner: InnerLoop) -> Tensor:
    return inner_loops.support_loss(network, fast, episode, method_of(network, inner))


def query_logits(network: nn.Module, fast: FastWeights, episode: Episode, inner: InnerLoop) -> Tensor:
    method = method_of(network, inner)
    return method.query_logits(network, fast, episode, method)


def run(
    engine: str,
    network: nn.Module,
    parameters: MetaParameters,
    tasks: EpisodeBatch,
    inner: InnerLoop,
    objective: Objective = engines.FINAL,
    *,
    every_step: bool = False,
) -> engines.Outcome:
    method = method_of(network, inner, engine)
    return engines.ENGINES[engine](network, parameters, tasks, method, replace(objective, every_step=every_step))


loop = partial(run, "loop")


def named(parameters: MetaParameters) -> dict[str, Tensor]:
    """All of it under names such as ``rates.head``."""
    parts = parameters._asdict().items()
    return {f"{part}.{name}": value for part, values in parts for name, value in values.items()}


def directional(
    function: Callable[[MetaParameters], Tensor], at: MetaParameters, along: MetaParameters, width: float
) -> float:
    """The derivative along a direction by central differences, of fourth order."""

    def value(distance: float) -> float:
        pairs = zip(at.tensors(), along.tensors(), strict=True)
        return function(at.like(start.detach() + distance * way for start, way in pairs)).item()

    near, far = value(width) - value(-width), value(2 * width) - value(-2 * width)
    return (8 * near - far) / (12 * width)


def direction(at: MetaParameters, seed: int) -> MetaParameters:
    """Random and of length one."""
    chance = torch.Generator().manual_seed(seed)
    raw = [torch.randn(value.shape, generator=chance, dtype=value.dtype) for value in at.tensors()]
    length = torch.stack([value.pow(2).sum() for value in raw]).sum().sqrt()
    return at.like(value / length for value in raw)


def dot(a: MetaParameters, b: MetaParameters) -> float:
    return sum((one * other).sum().item() for one, other in zip(a.tensors(), b.tensors(), strict=True))
