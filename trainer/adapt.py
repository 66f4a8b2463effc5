"""The inner loop: the only one, for every algorithm and for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamldata.errors import RequestError
from mamldata.streaming.batch import EpisodeBatch
from trainer.algorithms import Adapts, BatchNorm, Order, Rates, TaskLoss
from trainer.models import (
    Norm,
    Statistics,
    batch_statistics,
    given_statistics,
    head_names,
    leading_statistics,
    norm_names,
    noting_statistics,
)
from trainer.precision import call
from trainer.recompute import recomputed

Parameters = dict[str, Tensor]

# What is learned beside the network's own parameters stands in the same dict, under their names with these in front.
RATE, STEP_NORM = "inner_lr:", "per_step:"
# And so do, for the time of an episode, the statistics that ``frozen`` keeps.
_STATISTICS = "statistics:"


# (loss of parameters, parameters) -> the gradient of the loss with respect to each of them.
Slopes = Callable[[Callable[[Parameters], Tensor], Parameters], Parameters]


def autograd_slopes(loss: Callable[[Parameters], Tensor], at: Parameters) -> Parameters:
    """By ``torch.autograd``; under ``torch.no_grad``, or at constants, nothing is kept for a second derivative."""
    keep = torch.is_grad_enabled() and any(value.requires_grad for value in at.values())
    with torch.enable_grad():
        if keep:
            # Of what else depends on the parameters, such as frozen statistics, no slope is asked for.
            at = {name: value.view_as(value) for name, value in at.items()}
        else:
            at = {name: value.detach().requires_grad_() for name, value in at.items()}
        slopes = torch.autograd.grad(loss(at), list(at.values()), create_graph=keep, materialize_grads=True)
    return dict(zip(at, slopes, strict=True))


def func_slopes(loss: Callable[[Parameters], Tensor], at: Parameters) -> Parameters:
    """By ``torch.func``, for ``torch.func.vmap``, which knows no other."""
    slopes: Parameters = torch.func.grad(loss)(at)
    return slopes


@dataclass(frozen=True)
class InnerLoop:
    """How a network adapts to an episode.

    Attributes:
        steps: of gradient descent on the support set.
        lr: the inner learning rate, alpha in Finn et al. 2017; where rates are learned, what they start from.
        order: ``first`` takes the inner gradients for constants.
        bn: where the batch norm of the query images comes from: ``transductive``, all query images of the
            episode together; ``support``, the support images alone, so that each query image stands for itself;
            ``frozen``, the support images before the first step, whose statistics are then kept for the inner steps,
            too; ``per-step``, as transductive, but each step has a scale and a shift of its own, which the outer loop
            learns and the inner loop leaves alone (Antoniou et al. 2019, section 4).
        rates: ``fixed``, or learned for each ``layer-step`` or ``parameter``; see ``Algorithm``.
        adapts: ``all``, or the ``head`` alone.
        norm: what normalises by the batch; an engine may need its own.
        slopes: what takes the inner gradients; likewise.
        support_batches: the support set is divided into so many batches of equal shots, of which each step takes the
            next one; k_shot must be a multiple.
        checkpoint: keep the weights of each step and none of its graph, and compute each step once more for the
            gradient; at second order, with the engine loop.
        task_loss: of the support and of the query set: ``cross-entropy`` where the answers are classes,
            ``squared-error`` where they are numbers.
    """

    steps: int
    lr: float
    order: Order
    bn: BatchNorm
    rates: Rates = "fixed"
    adapts: Adapts = "all"
    norm: Norm = batch_statistics
    slopes: Slopes = autograd_slopes
    support_batches: int = 1
    checkpoint: bool = False
    task_loss: TaskLoss = "cross-entropy"


class Episode(NamedTuple):
    """One task: images ``[images, C, H, W]`` and labels int64 ``[images]``, of the support and of the query set.

    In a regression problem points ``[points, inputs]`` and floating-point answers ``[points, outputs]``.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor


def episodes(batch: EpisodeBatch) -> Iterator[Episode]:
    """The episodes of a meta-batch, one after the other; views, no copies."""
    for parts in zip(batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True):
        yield Episode(*parts)


def adapted_names(network: nn.Module, inner: InnerLoop) -> list[str]:
    """The parameters that the inner loop changes."""
    names = head_names(network) if inner.adapts == "head" else [name for name, _ in network.named_parameters()]
    untouched = set(norm_names(network)) if inner.bn == "per-step" else set()
    return [name for name in names if name not in untouched]


def beside_network(parameters: Parameters) -> Parameters:
    """Of all that is learned, what an evaluation needs beside the network: learned rates and per-step norms."""
    return {name: value for name, value in parameters.items() if name.startswith((RATE, STEP_NORM))}


def meta_parameters(network: nn.Module, inner: InnerLoop) -> Parameters:
    """All that an outer loop learns: the network's own parameters, and fresh rates and per-step norms.

    Returns:
        The network's parameters themselves under their names, less those that per-step norms take the place of;
        ``inner_lr:NAME``, ``[steps]`` or of the parameter's shape, all ``inner.lr``; and ``per_step:NAME``
        ``[steps + 1, C]``: row i is for the support images of step i and for query images after i steps.
    """
    own = dict(network.named_parameters())
    learned: Parameters = {}
    if inner.rates != "fixed":
        for name in adapted_names(network, inner):
            # With the parameter's own memory layout, or each product with it would be slow.
            like = own[name].detach() if inner.rates == "parameter" else own[name].new_empty(inner.steps)
            learned[RATE + name] = torch.full_like(like, inner.lr)
    if inner.bn == "per-step":
        for name in norm_names(network):
            learned[STEP_NORM + name] = own.pop(name).detach().repeat(inner.steps + 1, 1)
    return own | {name: value.requires_grad_() for name, value in learned.items()}


def adapt(network: nn.Module, parameters: Parameters, episode: Episode, inner: InnerLoop) -> list[Parameters]:
    """Gradient descent on the support set: equation 1 of Finn et al. 2017, ``inner.steps`` times.

    With learned rates it is the update of Antoniou et al. 2019 (section 4, a rate for each layer and step) or
    equation 3 of Li et al. 2017 (a rate for each parameter). After more steps than were trained, the last trained
    step's rates and norms serve again.

    A pure function. The results are differentiable with respect to ``parameters``, unless it is called under
    ``torch.no_grad``, which then keeps no graph at all.

    Args:
        network: with a ``forward(x, norm)``.
        parameters: those of ``meta_parameters``.
        episode: to adapt to.
        inner: how.

    Returns:
        ``inner.steps + 1`` sets of parameters, fit for ``query_logits``: those given, and those after each step.
    """
    theta = _start(network, parameters, episode, inner)
    path = [theta]
    descend = _descend_recomputed if inner.checkpoint else _descend
    for i in range(inner.steps):
        theta = _at_step(descend(network, parameters, theta, episode, inner, i), parameters, i + 1)
        path.append(theta)
    return path


def _start(network: nn.Module, parameters: Parameters, episode: Episode, inner: InnerLoop) -> Parameters:
    own = {name: value for name, value in parameters.items() if not name.startswith((RATE, STEP_NORM))}
    theta = _at_step(own, parameters, 0)
    if inner.bn == "frozen":
        noted: list[Statistics] = []
        _forward(network, theta, episode.support_x, noting_statistics(noted))
        for layer, statistics in enumerate(noted):
            for kind, value in zip(("mean", "variance"), statistics, strict=True):
                # They are a function of the initial weights, and a constant to first order like the slopes.
                theta[f"{_STATISTICS}{layer}.{kind}"] = value if inner.order == "second" else value.detach()
    return theta


def _at_step(theta: Parameters, parameters: Parameters, step: int) -> Parameters:
    """With the scales and shifts of a step, if steps have their own."""
    start = len(STEP_NORM)
    rows = {name[start:]: rows for name, rows in parameters.items() if name.startswith(STEP_NORM)}
    return theta | {name: value[min(step, len(value) - 1)] for name, value in rows.items()}


def _descend(
    network: nn.Module, parameters: Parameters, theta: Parameters, episode: Episode, inner: InnerLoop, step: int
) -> Parameters:
    """One inner step, counted from 0."""
    # The first order takes its gradients at constants, so that no graph of theirs is kept.
    place = theta if inner.order == "second" else {name: value.detach() for name, value in theta.items()}
    names = adapted_names(network, inner)
    episode = support_of_step(episode, inner, step)
    slope = inner.slopes(
        lambda at: support_loss(network, place | at, episode, inner.norm, inner.task_loss),
        {name: place[name] for name in names},
    )
    rates = {name: inner_rate(parameters, name, inner, step) for name in names}
    return theta | {name: _less(theta[name], rates[name], slope[name]) for name in names}


def _less(value: Tensor, rate: Tensor | float, slope: Tensor) -> Tensor:
    """``value - rate * slope`` in one pass."""
    if isinstance(rate, Tensor):
        return torch.addcmul(value, rate, slope, value=-1)
    return torch.sub(value, slope, alpha=rate)


def _descend_recomputed(
    network: nn.Module, parameters: Parameters, theta: Parameters, episode: Episode, inner: InnerLoop, step: int
) -> Parameters:
    """The same as ``_descend``, without its graph."""
    names = adapted_names(network, inner)
    known = theta | {name: value for name, value in parameters.items() if name.startswith(RATE)}

    def descend(*values: Tensor) -> tuple[Tensor, ...]:
        at = dict(zip(known, values, strict=True))
        after = _descend(network, at, {name: at[name] for name in theta}, episode, inner, step)
        return tuple(after[name] for name in names)

    return theta | dict(zip(names, recomputed(descend, list(known.values())), strict=True))


def support_of_step(episode: Episode, inner: InnerLoop, step: int) -> Episode:
    """The episode with the support images of a step, counted from 0."""
    if inner.support_batches == 1:
        return episode
    # Images of one class stand together, so that every n-th image is an equal share of each class.
    part = slice(step % inner.support_batches, None, inner.support_batches)
    return episode._replace(support_x=episode.support_x[part], support_y=episode.support_y[part])


def require_shots(inner: InnerLoop, k_shot: int) -> None:
    """Make sure that a class's support images can be divided among the batches.

    Raises:
        RequestError: they cannot.
    """
    if k_shot % inner.support_batches:
        raise RequestError(
            f"k_shot is {k_shot}, which cannot be divided into {inner.support_batches} support batches. Take episodes "
            "with a multiple of it, or another support_batches."
        )


def inner_rate(parameters: Parameters, name: str, inner: InnerLoop, step: int) -> Tensor | float:
    """The rate of a parameter in a step, counted from 0."""
    if inner.rates == "fixed":
        return inner.lr
    rate = parameters[RATE + name]
    return rate if inner.rates == "parameter" else rate[min(step, len(rate) - 1)]


def support_loss(
    network: nn.Module,
    parameters: Parameters,
    episode: Episode,
    norm: Norm = batch_statistics,
    task_loss: TaskLoss = "cross-entropy",
) -> Tensor:
    """Mean loss of the support set, a scalar: equation 3 of Finn et al. 2017, or its equation 2."""
    logits = _forward(network, parameters, episode.support_x, _frozen(parameters) or norm)
    return loss_of(logits, episode.support_y, task_loss)


def query_logits(
    network: nn.Module, parameters: Parameters, episode: Episode, bn: BatchNorm, norm: Norm = batch_statistics
) -> Tensor:
    """Logits ``[n_way * k_query, n_way]`` of the query set, by parameters from ``adapt``."""
    if bn != "support":
        return _forward(network, parameters, episode.query_x, _frozen(parameters) or norm)
    support = len(episode.support_x)
    together = torch.cat([episode.support_x, episode.query_x])
    return _forward(network, parameters, together, leading_statistics(support))[support:]


def loss_of(answers: Tensor, truth: Tensor, task_loss: TaskLoss) -> Tensor:
    """The mean over a set of images or points, a scalar: cross-entropy in nats, or the squared error."""
    return F.cross_entropy(answers, truth) if task_loss == "cross-entropy" else F.mse_loss(answers, truth)


def score_of(answers: Tensor, truth: Tensor, task_loss: TaskLoss) -> Tensor:
    """What people compare, a scalar without a graph: the accuracy of classes, the mean squared error of numbers."""
    answers = answers.detach()
    return accuracy(answers, truth) if task_loss == "cross-entropy" else loss_of(answers, truth, task_loss)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers in [0, 1]: a float32 scalar on the device, so that nobody waits for it."""
    return (logits.argmax(1) == labels).float().mean()


def _frozen(parameters: Parameters) -> Norm | None:
    values = [value for name, value in parameters.items() if name.startswith(_STATISTICS)]
    pairs = zip(values[::2], values[1::2], strict=True)
    return given_statistics([Statistics(*pair) for pair in pairs]) if values else None


def _forward(network: nn.Module, parameters: Parameters, x: Tensor, norm: Norm) -> Tensor:
    own = {name: value for name, value in parameters.items() if not name.startswith(_STATISTICS)}
    return call(network, own, x, norm)
