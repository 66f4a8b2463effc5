"""Engines: how the meta-gradient of a meta-batch is computed. All have the signature of ``loop``."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mamldata.errors import RequestError
from mamldata.streaming.batch import EpisodeBatch
from trainer.adapt import (
    Episode,
    InnerLoop,
    Parameters,
    adapt,
    adapted_names,
    episodes,
    func_slopes,
    inner_rate,
    loss_of,
    support_of_step,
)
from trainer.batchnorm import batch_norm
from trainer.crew import each_task
from trainer.features import head_on_features
from trainer.models import batch_statistics, written_out
from trainer.objective import Measured, Objective, judge

FINAL = Objective()


class Outcome(NamedTuple):
    """What a meta-batch taught.

    Attributes:
        gradient: of the loss with respect to each parameter.
        loss: mean over the episodes of the query loss after adaptation, a scalar; a cross-entropy is in nats.
        score: mean query accuracy in [0, 1], or squared error where the answers are numbers, after adaptation ``[1]``,
            or before and after each inner step ``[inner.steps + 1]`` if that was asked for.
    """

    gradient: Parameters
    loss: Tensor
    score: Tensor


def loop(
    network: nn.Module,
    parameters: Parameters,
    batch: EpisodeBatch,
    inner: InnerLoop,
    objective: Objective = FINAL,
    *,
    every_step: bool = False,
) -> Outcome:
    """One task after the other, on a CPU as many at once as torch has threads; memory holds the graphs of as many.

    The outer loss is that of equation 1 of Finn et al. 2017's section 2.2, with the mean over the tasks in place of
    the sum, so that the meta learning rate does not depend on the meta-batch size.

    Args:
        network: with a ``forward(x, norm)``.
        parameters: those of ``meta_parameters``, all requiring gradients; they are not changed.
        batch: B episodes.
        inner: how to adapt.
        objective: what the gradient is of.
        every_step: report the score before and after each inner step, at the price of as many forward passes.
    """
    if inner.order == "second":
        inner = replace(inner, norm=batch_norm)  # the same numbers as torch's, with a cheaper second derivative

    def one(own: nn.Module, episode: Episode) -> tuple[Gradient, Measured]:
        own, at, episode = head_on_features(own, parameters, episode, inner)
        goal, measured = judge(own, adapt(own, at, episode, inner), episode, inner, objective, every_step=every_step)
        return _gradient(goal, parameters), measured

    tasks = list(episodes(batch))
    return _mean(each_task(one, network, tasks, batch.support_x.device), parameters, len(tasks))


Gradient = tuple[Tensor, ...]


def _gradient(goal: Tensor, parameters: Parameters) -> Gradient:
    # To first order not everything has a part in the loss, such as the norms of a step: its gradient is zero.
    return torch.autograd.grad(goal, list(parameters.values()), materialize_grads=True)


def _mean(results: Iterable[tuple[Gradient, Measured]], parameters: Parameters, tasks: int) -> Outcome:
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    rows = []
    for slopes, measured in results:
        for whole, slope in zip(total.values(), slopes, strict=True):
            whole.add_(slope, alpha=1 / tasks)
        rows.append(measured)
    losses, scores = zip(*rows, strict=True)
    return Outcome(total, torch.stack(losses).mean(), torch.stack(scores).mean(0))


def vmap(
    network: nn.Module,
    parameters: Parameters,
    batch: EpisodeBatch,
    inner: InnerLoop,
    objective: Objective = FINAL,
    *,
    every_step: bool = False,
) -> Outcome:
    """All tasks at once, by ``torch.func.vmap``; memory holds the graphs of all of them.

    Arguments and outcome are those of ``loop``.
    """
    inner = replace(inner, norm=written_out, slopes=func_slopes)

    def mean(at: Parameters) -> tuple[Tensor, Measured]:
        def one(*parts: Tensor) -> tuple[Tensor, Measured]:
            episode = Episode(*parts)
            return judge(network, adapt(network, at, episode, inner), episode, inner, objective, every_step=every_step)

        goals, measured = torch.func.vmap(one)(*batch[:4])
        return goals.mean(), measured

    # Constants, or autograd would keep a second graph beside the one of torch.func.
    at = {name: value.detach() for name, value in parameters.items()}
    gradient, measured = torch.func.grad(mean, has_aux=True)(at)
    return Outcome(gradient, measured.loss.mean(), measured.score.mean(0))


def higher(
    network: nn.Module,
    parameters: Parameters,
    batch: EpisodeBatch,
    inner: InnerLoop,
    objective: Objective = FINAL,
    *,
    every_step: bool = False,
) -> Outcome:
    """The reference: the inner loop of the package ``higher``, with its own networks and optimizer.

    Arguments and outcome are those of ``loop``; ``TrainSettings`` refuses what it does not do.
    """

    def one(episode: Episode) -> tuple[Gradient, Measured]:
        path = _higher_path(network, parameters, episode, inner)
        goal, measured = judge(network, path, episode, inner, objective, every_step=every_step)
        return _gradient(goal, parameters), measured

    return _mean(map(one, episodes(batch)), parameters, len(batch.index))


def _higher_path(network: nn.Module, parameters: Parameters, episode: Episode, inner: InnerLoop) -> list[Parameters]:
    """What ``adapt`` gives, by Grefenstette et al. 2019, https://arxiv.org/abs/1910.01727."""
    package = _import_higher()
    own = dict(network.named_parameters())
    adapted = adapted_names(network, inner)
    # A group for each parameter, so that each can have a rate of its own.
    optimizer = torch.optim.SGD([{"params": [own[name]]} for name in adapted], lr=inner.lr)
    functional = package.monkeypatch(network, copy_initial_weights=False)
    descent = package.get_diff_optim(optimizer, network.parameters(), fmodel=functional)
    path = [{name: parameters[name] for name in own}]
    for step in range(inner.steps):
        rates = None
        if inner.rates != "fixed":
            rates = {"lr": [inner_rate(parameters, name, inner, step) for name in adapted]}
        part = support_of_step(episode, inner, step)
        loss = loss_of(functional(part.support_x, batch_statistics), part.support_y, inner.task_loss)
        constant = inner.order == "first"
        descent.step(loss, override=rates, grad_callback=_detach_all if constant else None)
        path.append(dict(zip(own, functional.parameters(), strict=True)))
    return path


def _detach_all(slopes: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if slope is None else slope.detach() for slope in slopes]


def _import_higher() -> Any:
    try:
        return importlib.import_module("higher")
    except ModuleNotFoundError as error:
        raise RequestError(
            "The engine higher needs the package of that name: pip install 'mamldata[higher]'."
        ) from error


class Engine(Protocol):
    """The signature of the engines."""

    def __call__(
        self,
        network: nn.Module,
        parameters: Parameters,
        batch: EpisodeBatch,
        inner: InnerLoop,
        objective: Objective = FINAL,
        *,
        every_step: bool = False,
    ) -> Outcome:
        """See ``loop``."""
        ...


ENGINES: dict[str, Engine] = {"loop": loop, "vmap": vmap, "higher": higher}


def pick_engine(name: str) -> Engine:
    """The engine called ``name``.

    ``auto`` is ``loop``, which ``benchmarks/train.py`` found the faster one on a CPU, and whose memory does not grow
    with the meta-batch.

    Raises:
        RequestError: its package is not installed.
    """
    if name == "higher":
        _import_higher()
    return ENGINES["loop" if name == "auto" else name]
