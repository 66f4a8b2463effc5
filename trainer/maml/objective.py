"""The objective of the outer loop: a loss of one adapted episode, the same for every engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.maml.adapt import Method
from trainer.maml.algorithms import Outer
from trainer.maml.losses import loss_of, score_of
from trainer.maml.parameters import Episode, FastWeights

_FLOOR = 0.03  # of 1 / steps; Antoniou's released code


@dataclass(frozen=True)
class Objective:
    """How the outer loop rates an adapted network.

    Attributes:
        outer: ``query`` or ``reptile``; see ``Algorithm``.
        weights: of the query losses after each inner step, ``steps`` numbers; empty for the last step's loss alone.
        every_step: measure the score before and after each inner step, at the cost of a forward pass each.
    """

    outer: Outer = "query"
    weights: tuple[float, ...] = ()
    every_step: bool = False


class Measured(NamedTuple):
    """The measurements on one episode.

    Attributes:
        loss: query loss after adaptation; a cross-entropy is in nats.
        score: query accuracy in [0, 1], or squared error if the answers are numbers, after adaptation ``[1]``, or
            with ``every_step`` before and after each inner step ``[inner.steps + 1]``.
    """

    loss: Tensor
    score: Tensor


def step_weights(steps: int, epoch: int, epochs: int) -> tuple[float, ...]:
    """The weights of the multi-step loss in an epoch, counted from 0.

    All are ``1 / steps`` at first. Those of the steps before the last fall by ``1 / steps / epochs`` per epoch, but
    not below ``0.03 / steps``; the last step takes the rest, so that the sum is always one. From ``epochs`` on, only
    the last step counts. Antoniou et al. 2019, section 4, "Multi-Step Loss Optimization", as in their released code.
    """
    if epoch >= epochs:
        return (*[0.0] * (steps - 1), 1.0)
    share = max(1 / steps - epoch / (steps * epochs), _FLOOR / steps)
    return (*[share] * (steps - 1), 1 - share * (steps - 1))


def meta_loss(
    network: nn.Module, path: list[FastWeights], episode: Episode, method: Method, objective: Objective
) -> tuple[Tensor, Measured]:
    """The loss of a network that has adapted to an episode; pure, and differentiable with respect to ``path``.

    Args:
        network: with a ``forward(x, norm)``.
        path: from ``adapt``.
        episode: that it adapted to.
        method: how it adapted.
        objective: what the outer loop follows.

    Returns:
        The scalar whose gradient the outer loop follows; and the measurements to report, without a graph.
    """
    steps, task_loss = method.inner.steps, method.inner.task_loss
    weights = objective.weights or (0,) * (steps - 1) + (1,)
    logits = {
        step: method.query_logits(network, path[step], episode, method)
        for step, weight in enumerate(weights, min(1, steps))
        if (weight and objective.outer == "query") or step == steps
    }
    losses = {step: loss_of(logits[step], episode.query_y, task_loss) for step in logits}
    if objective.outer == "reptile":
        goal = _distance(path)
    else:
        goal = losses[steps] * weights[-1]
        for step in sorted(losses.keys() - {steps}):
            goal = goal + weights[step - 1] * losses[step]
    with torch.no_grad():
        asked = range(steps + 1) if objective.every_step else [steps]
        shown = [logits[i] if i in logits else method.query_logits(network, path[i], episode, method) for i in asked]
        scores = torch.stack([score_of(one, episode.query_y, task_loss) for one in shown])
    return goal, Measured(losses[steps].detach(), scores)


def _distance(path: list[FastWeights]) -> Tensor:
    """Half the squared distance between initial and adapted weights, with the adapted ones as constants.

    Its gradient is initial minus adapted, which Nichol et al. 2018 (section 2) pass to an optimizer.
    """
    start, end = path[0].weights, path[-1].weights
    return torch.stack([(value - end[name].detach()).square().sum() for name, value in start.items()]).sum() / 2
