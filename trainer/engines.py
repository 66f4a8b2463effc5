"""Engines: how the meta-gradient of a meta-batch is computed. All have the signature of ``loop``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamldata.batch import EpisodeBatch
from trainer.adapt import InnerLoop, Parameters, accuracy, adapt, episodes, query_logits


class Outcome(NamedTuple):
    """What a meta-batch taught.

    Attributes:
        gradient: of the loss with respect to each parameter.
        loss: mean over the episodes of the query loss after adaptation, a scalar in nats.
        accuracy: mean query accuracy in [0, 1], after adaptation ``[1]``, or before and after each inner step
            ``[inner.steps + 1]`` if that was asked for.
    """

    gradient: Parameters
    loss: Tensor
    accuracy: Tensor


def loop(
    network: nn.Module, parameters: Parameters, batch: EpisodeBatch, inner: InnerLoop, *, every_step: bool = False
) -> Outcome:
    """One task after the other, so that memory holds the graph of one task only.

    The outer loss is that of equation 1 of Finn et al. 2017's section 2.2, with the mean over the tasks in place of
    the sum, so that the meta learning rate does not depend on the meta-batch size.

    Args:
        network: with a ``forward(x, norm)``.
        parameters: which take part, all requiring gradients; they are not changed.
        batch: B episodes.
        inner: how to adapt.
        every_step: report the accuracy before and after each inner step, at the price of as many forward passes.
    """
    share = 1 / len(batch.index)
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    losses, accuracies = [], []
    for episode in episodes(batch):
        path = adapt(network, parameters, episode, inner)
        logits = query_logits(network, path[-1], episode, inner.bn)
        loss = F.cross_entropy(logits, episode.query_y)
        slopes = torch.autograd.grad(loss, list(parameters.values()))
        for whole, slope in zip(total.values(), slopes, strict=True):
            whole.add_(slope, alpha=share)
        with torch.no_grad():
            on_the_way = [query_logits(network, at, episode, inner.bn) for at in path[:-1]] if every_step else []
            losses.append(loss.detach())
            accuracies.append(torch.stack([accuracy(step, episode.query_y) for step in (*on_the_way, logits)]))
    return Outcome(total, torch.stack(losses).mean(), torch.stack(accuracies).mean(0))
