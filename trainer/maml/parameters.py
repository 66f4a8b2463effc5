"""The outer loop's parameters, the inner loop's adapted weights, and the episodes that both work on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mamldata.streaming.batch import EpisodeBatch
from trainer.maml.algorithms import InnerLoop
from trainer.networks.networks import head_names, norm_names
from trainer.networks.norms import Statistics

Parameters = dict[str, Tensor]  # by their names in a network


class MetaParameters(NamedTuple):
    """Everything that an outer loop learns, or its gradient, in the same structure; a tree for ``torch.func``.

    Attributes:
        weights: the network's own parameters that require gradients, without those that ``norms`` or ``joint`` replace.
        rates: learned inner learning rates of the parameters that adapt, ``[steps]`` or of the parameter's shape.
        norms: the scales and shifts of each step, ``[steps + 1, C]``: row i applies to the support images of step i
            and to query images after i steps.
        joint: in joint training, the head for all training classes.
    """

    weights: Parameters
    rates: Parameters = {}  # noqa: RUF012  # never modified
    norms: Parameters = {}  # noqa: RUF012
    joint: Parameters = {}  # noqa: RUF012

    def tensors(self) -> list[Tensor]:
        """All tensors, always in this order, which an optimizer's saved state relies on."""
        return [value for part in self for value in part.values()]

    def like(self, tensors: Iterable[Tensor]) -> MetaParameters:
        """Other tensors under the same names, given in the order of ``tensors``."""
        values = iter(tensors)
        return MetaParameters(*({name: next(values) for name in part} for part in self))

    def norms_of(self, step: int) -> Parameters:
        """The scales and shifts after ``step`` inner steps; beyond the trained steps, the last ones."""
        return {name: rows[min(step, len(rows) - 1)] for name, rows in self.norms.items()}


class FastWeights(NamedTuple):
    """The weights of a network while it adapts to an episode.

    Attributes:
        weights: all of its parameters.
        statistics: with ``frozen`` batch norm, those that each normalization keeps; otherwise empty.
    """

    weights: Parameters
    statistics: tuple[Statistics, ...] = ()


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


def support_of_step(episode: Episode, inner: InnerLoop, step: int) -> Episode:
    """The episode with the support images of a step, counted from 0."""
    if inner.support_batches == 1:
        return episode
    # Images of one class are adjacent, so taking every n-th image takes an equal share of each class.
    part = slice(step % inner.support_batches, None, inner.support_batches)
    return episode._replace(support_x=episode.support_x[part], support_y=episode.support_y[part])


def adapted_names(network: nn.Module, inner: InnerLoop) -> list[str]:
    """The parameters that the inner loop changes."""
    names = head_names(network) if inner.adapts == "head" else list(learnable(network))
    outer_only = inner.bn == "per-step" or inner.adapts == "all-but-norms"
    untouched = set(norm_names(network)) if outer_only else set()
    return [name for name in names if name in learnable(network).keys() - untouched]


def learnable(network: nn.Module) -> Parameters:
    """The parameters of a network that require gradients; the others are constants."""
    return {name: value for name, value in network.named_parameters() if value.requires_grad}


def with_outputs(network: nn.Module, parameters: MetaParameters, inner: InnerLoop, count: int) -> MetaParameters:
    """The parameters with the first ``count`` outputs of the head only.

    Labels are dealt to classes at random in every training episode, so no output has a meaning of its own.
    """
    heads = head_names(network)

    def cut(part: Parameters) -> Parameters:
        return part | {name: part[name][:count] for name in heads if name in part}

    rates = cut(parameters.rates) if inner.rates == "parameter" else parameters.rates
    return parameters._replace(weights=cut(parameters.weights), rates=rates)


def meta_parameters(network: nn.Module, inner: InnerLoop) -> MetaParameters:
    """The network's parameters themselves, and fresh rates, all ``inner.lr``, and fresh per-step norms."""
    weights = learnable(network)
    rates: Parameters = {}
    norms: Parameters = {}
    if inner.rates != "fixed":
        for name in adapted_names(network, inner):
            # With the parameter's memory layout: products with another one are slow.
            like = weights[name].detach() if inner.rates == "parameter" else weights[name].new_empty(inner.steps)
            rates[name] = torch.full_like(like, inner.lr).requires_grad_()
    if inner.bn == "per-step":
        for name in [name for name in norm_names(network) if name in weights]:
            norms[name] = weights.pop(name).detach().repeat(inner.steps + 1, 1).requires_grad_()
    return MetaParameters(weights, rates, norms)
