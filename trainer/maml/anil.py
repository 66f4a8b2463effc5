"""For algorithms that adapt the head alone: an episode's images pass through the body once for all inner steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.maml.adapt import Method
from trainer.maml.parameters import Episode, MetaParameters, Parameters
from trainer.networks.norms import Norm, batch_statistics, leading_statistics
from trainer.networks.precision import call, precision_of


def head_on_features(
    network: nn.Module, parameters: MetaParameters, episode: Episode, method: Method
) -> tuple[nn.Module, MetaParameters, Episode]:
    """A smaller problem with the same answers: the head as the network, and features in place of images.

    The features, through which the body's gradient flows, are computed and differentiated once. The body must be the
    same in all steps: see ``method_of``.

    Args:
        network: with a ``features(x, norm)`` before its head.
        parameters, episode, method: as for ``adapt``.

    Returns:
        A network, parameters and an episode for ``adapt``.
    """
    head = _Head(network)
    support_x, query_x = _features(network, parameters, episode, method)
    if method.inner.order == "first":
        support_x = support_x.detach()  # a constant, as in every first-order inner gradient
    heads = {name: parameters.weights[name] for name in method.names}
    return head, parameters._replace(weights=heads), episode._replace(support_x=support_x, query_x=query_x)


def _features(
    network: nn.Module, parameters: MetaParameters, episode: Episode, method: Method
) -> tuple[Tensor, Tensor]:
    """The features of support and query images, ``[images, features]`` each."""
    if method.inner.bn == "support":
        return features_together(network, parameters.weights, episode, leading_statistics(len(episode.support_x)))
    # The body has only a first-order gradient.
    support_x = features_of(network, parameters.weights, episode.support_x, batch_statistics)
    return support_x, features_of(network, parameters.weights, episode.query_x, batch_statistics)


def features_together(network: nn.Module, weights: Parameters, episode: Episode, norm: Norm) -> tuple[Tensor, Tensor]:
    """The features of support and query images, ``[images, features]`` each, which pass the body as one batch."""
    both = features_of(network, weights, torch.cat([episode.support_x, episode.query_x]), norm)
    return both[: len(episode.support_x)], both[len(episode.support_x) :]


def features_of(network: nn.Module, weights: Parameters, images: Tensor, norm: Norm) -> Tensor:
    """The inputs of a network's head, ``[images, features]``."""
    return call(_Body(network), {f"network.{name}": value for name, value in weights.items()}, images, norm)


class _Body(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network: Any = network
        self.precision = precision_of(network)

    def forward(self, x: Tensor, norm: Norm) -> Tensor:
        features: Tensor = self.network.features(x, norm)
        return features


class _Head(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.head: nn.Parameter = network.head
        self.head_bias: nn.Parameter = network.head_bias
        self.precision = precision_of(network)

    def forward(self, x: Tensor, norm: Norm) -> Tensor:  # noqa: ARG002  # a linear layer has no norm
        return F.linear(x, self.head, self.head_bias)
