"""Engines, which compute the meta-gradient of a meta-batch. All have the signature of ``loop``."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mamldata.errors import RequestError
from mamldata.streaming.batch import EpisodeBatch
from mamldata.words import install_command
from trainer.maml.adapt import Method, adapt
from trainer.maml.losses import inner_loss_of
from trainer.maml.objective import Measured, Objective, meta_loss
from trainer.maml.parameters import Episode, FastWeights, MetaParameters, episodes, support_of_step
from trainer.maml.rates import inner_rate
from trainer.networks.norms import batch_statistics
from trainer.system.threads import each_task

FINAL = Objective()


class Outcome(NamedTuple):
    """The meta-gradient of a meta-batch, with its loss and score.

    Attributes:
        gradient: of the loss with respect to each parameter.
        loss, score: the means over the episodes of those of ``Measured``.
    """

    gradient: MetaParameters
    loss: Tensor
    score: Tensor


def loop(
    network: nn.Module, parameters: MetaParameters, batch: EpisodeBatch, method: Method, objective: Objective = FINAL
) -> Outcome:
    """One task after the other; on a CPU, one per torch thread at a time, with the graph of each in memory.

    The outer loss is that of equation 1 of Finn et al. 2017's section 2.2, with the mean over the tasks in place of
    the sum, so that the meta learning rate does not depend on the meta-batch size.

    Args:
        network: with a ``forward(x, norm)``.
        parameters: those of ``meta_parameters``, all requiring gradients; they are not changed.
        batch: B episodes.
        method: how to adapt, as ``method_of`` chooses it for the network and this engine.
        objective: the loss to differentiate, and the scores to report.
    """

    def one(own: nn.Module, episode: Episode) -> tuple[Gradient, Measured]:
        own, at, episode = method.shortcut(own, parameters, episode, method)
        path = adapt(own, at, episode, method)
        goal, measured = meta_loss(own, path, episode, method, objective)
        return _gradient(goal, parameters), measured

    tasks = list(episodes(batch))
    return _mean(each_task(one, network, tasks, batch.support_x.device), parameters, len(tasks))


Gradient = tuple[Tensor, ...]


def _gradient(goal: Tensor, parameters: MetaParameters) -> Gradient:
    # At first order some parameters, such as the norms of a step, do not affect the loss: their gradient is zero.
    return torch.autograd.grad(goal, parameters.tensors(), materialize_grads=True)


def _mean(results: Iterable[tuple[Gradient, Measured]], parameters: MetaParameters, tasks: int) -> Outcome:
    total = [torch.zeros_like(value) for value in parameters.tensors()]
    rows = []
    for slopes, measured in results:
        for whole, slope in zip(total, slopes, strict=True):
            whole.add_(slope, alpha=1 / tasks)
        rows.append(measured)
    losses, scores = zip(*rows, strict=True)
    return Outcome(parameters.like(total), torch.stack(losses).mean(), torch.stack(scores).mean(0))


def vmap(
    network: nn.Module, parameters: MetaParameters, batch: EpisodeBatch, method: Method, objective: Objective = FINAL
) -> Outcome:
    """All tasks at once, by ``torch.func.vmap``; memory holds the graphs of all of them.

    Arguments and outcome are those of ``loop``.
    """

    def mean(at: MetaParameters) -> tuple[Tensor, Measured]:
        def one(*parts: Tensor) -> tuple[Tensor, Measured]:
            episode = Episode(*parts)
            path = adapt(network, at, episode, method)
            return meta_loss(network, path, episode, method, objective)

        goals, measured = torch.func.vmap(one)(*batch[:4])
        return goals.mean(), measured

    # Detached, or autograd would keep a second graph beside the one of torch.func.
    at = parameters.like(value.detach() for value in parameters.tensors())
    gradient, measured = torch.func.grad(mean, has_aux=True)(at)
    return Outcome(gradient, measured.loss.mean(), measured.score.mean(0))


def higher(
    network: nn.Module, parameters: MetaParameters, batch: EpisodeBatch, method: Method, objective: Objective = FINAL
) -> Outcome:
    """The reference: the inner loop of the package ``higher``, with its own networks and optimizer.

    Arguments and outcome are those of ``loop``; ``TrainSettings`` refuses settings that it does not support.
    """

    def one(episode: Episode) -> tuple[Gradient, Measured]:
        path = _higher_path(network, parameters, episode, method)
        goal, measured = meta_loss(network, path, episode, method, objective)
        return _gradient(goal, parameters), measured

    return _mean(map(one, episodes(batch)), parameters, len(batch.index))


def _higher_path(network: nn.Module, parameters: MetaParameters, episode: Episode, method: Method) -> list[FastWeights]:
    """The result of ``adapt``, by Grefenstette et al. 2019, https://arxiv.org/abs/1910.01727."""
    package, inner = _import_higher(), method.inner
    own = dict(network.named_parameters())
    # A group for each parameter, so that each can have its own rate.
    optimizer = torch.optim.SGD([{"params": [own[name]]} for name in method.names], lr=inner.lr)
    functional = package.monkeypatch(network, copy_initial_weights=False)
    descent = package.get_diff_optim(optimizer, network.parameters(), fmodel=functional)
    path = [FastWeights(parameters.weights)]
    for step in range(inner.steps):
        rates = None
        if inner.rates != "fixed":
            rates = {"lr": [inner_rate(parameters, name, inner, step) for name in method.names]}
        part = support_of_step(episode, inner, step)
        loss = inner_loss_of(functional(part.support_x, batch_statistics), part.support_y, inner)
        constant = inner.order == "first"
        descent.step(loss, override=rates, grad_callback=_detach_all if constant else None)
        path.append(FastWeights(dict(zip(own, functional.parameters(), strict=True))))
    return path


def _detach_all(slopes: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if slope is None else slope.detach() for slope in slopes]


def _import_higher() -> Any:
    try:
        return importlib.import_module("higher")
    except ModuleNotFoundError as error:
        raise RequestError(f"The engine higher needs the package higher: {install_command('higher')}.") from error


class Engine(Protocol):
    """The signature of the engines."""

    def __call__(
        self,
        network: nn.Module,
        parameters: MetaParameters,
        batch: EpisodeBatch,
        method: Method,
        objective: Objective = FINAL,
    ) -> Outcome:
        """See ``loop``."""
        ...


ENGINES: dict[str, Engine] = {"loop": loop, "vmap": vmap, "higher": higher}


def pick_engine(name: str) -> Engine:
    """The engine called ``name``.

    ``auto`` is ``loop``: it is the fastest one on a CPU (``benchmarks/train.py``), and its memory does not grow with
    the meta-batch. ``trainer.maml.choice`` chooses for other devices.

    Raises:
        RequestError: its package is not installed.
    """
    if name == "higher":
        _import_higher()
    return ENGINES["loop" if name == "auto" else name]
