"""The parts of an inner loop, and the choice of them for a network, an algorithm and an engine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamldata.errors import RequestError
from trainer.maml.adapt import Method, descend, query_logits
from trainer.maml.algorithms import InnerLoop
from trainer.maml.anil import features_together, head_on_features
from trainer.maml.checkpointing import recomputed
from trainer.maml.parameters import Episode, FastWeights, MetaParameters, Parameters, adapted_names
from trainer.networks.batchnorm import batch_norm
from trainer.networks.norms import (
    Norm,
    Statistics,
    batch_statistics,
    given_statistics,
    leading_statistics,
    noting_statistics,
    written_out,
)
from trainer.networks.precision import call


def method_of(network: nn.Module, inner: InnerLoop, engine: str = "loop") -> Method:
    """Choose the parts of an inner loop.

    Args:
        network: with a ``forward(x, norm)``, and perhaps with ``features(x, norm)``, ``head`` and ``head_bias``.
        inner: the inner loop to compute.
        engine: that computes it; ``auto`` is ``loop``.

    Raises:
        RequestError: prototypes of a network without ``features``.
    """
    if inner.classifier == "prototypes" and not hasattr(network, "features"):
        raise RequestError("Prototypes are means of features, but the network has no method features(x, norm).")
    by_batch, at_once = batch_statistics, engine in {"vmap", "graphed"}
    if at_once:
        by_batch = written_out
    elif inner.order == "second":
        by_batch = batch_norm  # the same numbers as torch's, with a cheaper second derivative
    # The body is recomputed in each step if it differs between steps or is not separate from the head; also in a
    # checkpointed step, which has gradients only for its parameters, not for features.
    once = inner.adapts == "head" and inner.bn in {"transductive", "support"} and inner.support_batches == 1
    once = once and not inner.checkpoint and all(hasattr(network, part) for part in ("features", "head_bias"))
    return Method(
        inner,
        names=tuple(adapted_names(network, inner)),
        slopes=func_slopes if at_once else autograd_slopes,
        norm=kept_statistics if inner.bn == "frozen" else lambda _: by_batch,
        start=keep_statistics if inner.bn == "frozen" else lambda _, fast, *__: fast,
        descend=descend_recomputed if inner.checkpoint else descend,
        query_logits=_query_logits(inner),
        shortcut=head_on_features if once else lambda *problem: problem[:3],
    )


def autograd_slopes(loss: Callable[[Parameters], Tensor], at: Parameters) -> Parameters:
    """By ``torch.autograd``; under ``torch.no_grad``, or at constants, no graph is kept for a second derivative."""
    keep = torch.is_grad_enabled() and any(value.requires_grad for value in at.values())
    with torch.enable_grad():
        if keep:
            # Views, so that the slopes leave out other paths to the parameters, such as frozen statistics.
            at = {name: value.view_as(value) for name, value in at.items()}
        else:
            at = {name: value.detach().requires_grad_() for name, value in at.items()}
        slopes = torch.autograd.grad(loss(at), list(at.values()), create_graph=keep, materialize_grads=True)
    return dict(zip(at, slopes, strict=True))


def func_slopes(loss: Callable[[Parameters], Tensor], at: Parameters) -> Parameters:
    """By ``torch.func``, as ``torch.func.vmap`` requires."""
    slopes: Parameters = torch.func.grad(loss)(at)
    return slopes


def keep_statistics(network: nn.Module, fast: FastWeights, episode: Episode, method: Method) -> FastWeights:
    """For ``frozen``: add the statistics of the support images at the initial weights."""
    noted: list[Statistics] = []
    call(network, fast.weights, episode.support_x, noting_statistics(noted))
    if method.inner.order == "first":  # a function of the initial weights, but constant like the slopes
        noted = [Statistics(*(value.detach() for value in layer)) for layer in noted]
    return fast._replace(statistics=tuple(noted))


def kept_statistics(fast: FastWeights) -> Norm:
    """For ``frozen``: by the statistics kept for each normalization."""
    return given_statistics(fast.statistics)


def query_logits_by_support(network: nn.Module, fast: FastWeights, episode: Episode, _: Method) -> Tensor:
    """For ``support``: by the statistics of the support images, which pass the network with the query images."""
    support = len(episode.support_x)
    together = torch.cat([episode.support_x, episode.query_x])
    return call(network, fast.weights, together, leading_statistics(support))[support:]


def query_logits_by_prototypes(network: nn.Module, fast: FastWeights, episode: Episode, method: Method) -> Tensor:
    """For ``prototypes``: minus the squared Euclidean distance of each query image's features to each class's mean.

    Snell et al. 2017, equations 1 and 2. Support and query images pass the network as one batch, as in its released
    code; ``bn`` tells whose statistics normalize them.
    """
    norm = leading_statistics(len(episode.support_x)) if method.inner.bn == "support" else method.norm(fast)
    support, query = features_together(network, fast.weights, episode, norm)
    n_way = method.inner.n_way or int(episode.support_y.max()) + 1
    members = F.one_hot(episode.support_y, n_way).to(support.dtype)  # [support images, n_way]
    prototypes = (members / members.sum(0)).T @ support
    return -(query[:, None] - prototypes).square().sum(2)


def _query_logits(inner: InnerLoop) -> Callable[[nn.Module, FastWeights, Episode, Method], Tensor]:
    if inner.classifier == "prototypes":
        return query_logits_by_prototypes
    return query_logits_by_support if inner.bn == "support" else query_logits


def descend_recomputed(
    network: nn.Module, parameters: MetaParameters, fast: FastWeights, episode: Episode, method: Method, step: int
) -> FastWeights:
    """For ``checkpoint``: the same as ``descend`` up to rounding, without keeping its graph."""

    def after(*values: Tensor) -> tuple[Tensor, ...]:
        given = iter(values)
        weights = {name: next(given) for name in fast.weights}
        statistics = tuple(Statistics(next(given), next(given)) for _ in fast.statistics)
        rates = {name: next(given) for name in parameters.rates}
        at = parameters._replace(rates=rates)
        moved = descend(network, at, FastWeights(weights, statistics), episode, method, step).weights
        return tuple(moved[name] for name in method.names)

    known = [*fast.weights.values(), *(value for pair in fast.statistics for value in pair)]
    found = recomputed(after, [*known, *parameters.rates.values()])
    return fast._replace(weights=fast.weights | dict(zip(method.names, found, strict=True)))
