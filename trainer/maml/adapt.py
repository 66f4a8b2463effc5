"""The inner loop, the same for every algorithm and for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.maml.algorithms import InnerLoop
from trainer.maml.losses import inner_loss_of
from trainer.maml.parameters import Episode, FastWeights, MetaParameters, Parameters, support_of_step
from trainer.maml.rates import inner_rate
from trainer.networks.norms import Norm
from trainer.networks.precision import call


@dataclass(frozen=True)
class Method:
    """An inner loop with its parts, as ``trainer.maml.variants.method_of`` chooses them for a network and an engine.

    Attributes:
        inner: the steps, their order, rates and losses.
        names: the parameters that a step changes.
        slopes: (loss of parameters, parameters) -> the gradient of the loss with respect to each of them.
        norm: the batch norm of a forward pass with these weights.
        start: adds to the initial weights the statistics that later steps reuse.
        descend: takes one step.
        query_logits: computes the logits of the query set.
        shortcut: replaces a network, parameters and an episode by a smaller problem with the same answers.
    """

    inner: InnerLoop
    names: tuple[str, ...]
    slopes: Callable[[Callable[[Parameters], Tensor], Parameters], Parameters]
    norm: Callable[[FastWeights], Norm]
    start: Callable[[nn.Module, FastWeights, Episode, Method], FastWeights]
    descend: Callable[[nn.Module, MetaParameters, FastWeights, Episode, Method, int], FastWeights]
    query_logits: Callable[[nn.Module, FastWeights, Episode, Method], Tensor]
    shortcut: Callable[[nn.Module, MetaParameters, Episode, Method], tuple[nn.Module, MetaParameters, Episode]]


def adapt(network: nn.Module, parameters: MetaParameters, episode: Episode, method: Method) -> list[FastWeights]:
    """Gradient descent on the support set: equation 1 of Finn et al. 2017, ``steps`` times.

    A pure function. The results are differentiable with respect to ``parameters``, except under ``torch.no_grad``,
    where no graph is kept.

    Args:
        network: with a ``forward(x, norm)``.
        parameters: those of ``meta_parameters``.
        episode: to adapt to.
        method: how to adapt.

    Returns:
        ``steps + 1`` sets of weights: the initial ones, and those after each step.
    """
    return list(adaptation(network, parameters, episode, method))


def adaptation(
    network: nn.Module, parameters: MetaParameters, episode: Episode, method: Method
) -> Iterator[FastWeights]:
    """The same as ``adapt``, one set of weights at a time."""
    fast = method.start(network, FastWeights(parameters.weights | parameters.norms_of(0)), episode, method)
    yield fast
    for step in range(method.inner.steps):
        fast = method.descend(network, parameters, fast, episode, method, step)
        fast = fast._replace(weights=fast.weights | parameters.norms_of(step + 1))
        yield fast


def descend(
    network: nn.Module, parameters: MetaParameters, fast: FastWeights, episode: Episode, method: Method, step: int
) -> FastWeights:
    """One inner step, counted from 0.

    With learned rates this is the update of Antoniou et al. 2019 (section 4, a rate for each layer and step) or
    equation 3 of Li et al. 2017 (a rate for each parameter).
    """
    inner, weights = method.inner, fast.weights
    # First order takes gradients at constants, so that their graph is not kept.
    place = weights if inner.order == "second" else {name: value.detach() for name, value in weights.items()}
    support = support_of_step(episode, inner, step)
    slopes = method.slopes(
        lambda at: support_loss(network, fast._replace(weights=place | at), support, method),
        {name: place[name] for name in method.names},
    )
    rates = {name: inner_rate(parameters, name, inner, step) for name in method.names}
    return fast._replace(weights=weights | {name: _less(weights[name], rates[name], slopes[name]) for name in rates})


def _less(value: Tensor, rate: Tensor | float, slope: Tensor) -> Tensor:
    """``value - rate * slope`` in one pass."""
    if isinstance(rate, Tensor):
        return torch.addcmul(value, rate, slope, value=-1)
    return torch.sub(value, slope, alpha=rate)


def support_loss(network: nn.Module, fast: FastWeights, episode: Episode, method: Method) -> Tensor:
    """Loss of the support set, a scalar: equation 3 of Finn et al. 2017, or equation 2 for regression."""
    logits = call(network, fast.weights, episode.support_x, method.norm(fast))
    return inner_loss_of(logits, episode.support_y, method.inner)


def query_logits(network: nn.Module, fast: FastWeights, episode: Episode, method: Method) -> Tensor:
    """Logits ``[n_way * k_query, n_way]`` of the query set, with weights from ``adapt``."""
    return call(network, fast.weights, episode.query_x, method.norm(fast))
