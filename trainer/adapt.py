"""The inner loop: the only one, for every algorithm and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F

from mamldata.batch import EpisodeBatch
from trainer.algorithms import Order
from trainer.models import Norm, batch_statistics, leading_statistics

Parameters = dict[str, Tensor]
BatchNorm = Literal["transductive", "support"]


@dataclass(frozen=True)
class InnerLoop:
    """How a network adapts to an episode.

    Attributes:
        steps: of gradient descent on the support set.
        lr: the inner learning rate, alpha in Finn et al. 2017.
        order: ``first`` takes the inner gradients for constants.
        bn: where the batch norm of the query images comes from: ``transductive``, all query images of the
            episode together; ``support``, the support images alone, so that each query image stands for itself.
    """

    steps: int
    lr: float
    order: Order
    bn: BatchNorm


class Episode(NamedTuple):
    """One task: images ``[images, C, H, W]`` and labels int64 ``[images]``, of the support and of the query set."""

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor


def episodes(batch: EpisodeBatch) -> Iterator[Episode]:
    """The episodes of a meta-batch, one after the other; views, no copies."""
    for parts in zip(batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True):
        yield Episode(*parts)


def adapt(network: nn.Module, parameters: Parameters, episode: Episode, inner: InnerLoop) -> list[Parameters]:
    """Gradient descent on the support set: equation 1 of Finn et al. 2017, ``inner.steps`` times.

    A pure function. The results are differentiable with respect to ``parameters``, unless it is called under
    ``torch.no_grad``, which then keeps no graph at all.

    Returns:
        ``inner.steps + 1`` sets of parameters: those given, and those after each step.
    """
    path = [parameters]
    for _ in range(inner.steps):
        theta = path[-1]
        # The first order takes its gradients at constants, so that no graph of theirs is kept.
        place = theta if inner.order == "second" else {name: value.detach() for name, value in theta.items()}
        slope = grad(lambda at: support_loss(network, at, episode))(place)
        path.append({name: value - inner.lr * slope[name] for name, value in theta.items()})
    return path


def support_loss(network: nn.Module, parameters: Parameters, episode: Episode) -> Tensor:
    """Mean cross-entropy of the support set (equation 3 of Finn et al. 2017), a scalar in nats."""
    return F.cross_entropy(_forward(network, parameters, episode.support_x, batch_statistics), episode.support_y)


def query_logits(network: nn.Module, parameters: Parameters, episode: Episode, bn: BatchNorm) -> Tensor:
    """Logits ``[n_way * k_query, n_way]`` of the query set."""
    if bn == "transductive":
        return _forward(network, parameters, episode.query_x, batch_statistics)
    support = len(episode.support_x)
    together = torch.cat([episode.support_x, episode.query_x])
    return _forward(network, parameters, together, leading_statistics(support))[support:]


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers in [0, 1]: a float32 scalar on the device, so that nobody waits for it."""
    return (logits.argmax(1) == labels).float().mean()


def _forward(network: nn.Module, parameters: Parameters, x: Tensor, norm: Norm) -> Tensor:
    logits: Tensor = functional_call(network, parameters, (x, norm))
    return logits
