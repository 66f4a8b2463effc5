"""Batch norm by statistics from several places; none of them keeps anything for a later call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.networks.batchnorm import EPSILON

# (x [N, C, H, W], weight [C], bias [C]) -> the normalised x.
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def batch_statistics(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Batch norm by the mean and variance of all images of ``x``; keeps nothing for a later call.

    The fastest one where no second derivative is asked for; ``batch_norm`` is where it is.
    """
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=EPSILON)


def written_out(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same as ``batch_statistics``, in elementary operations.

    For ``torch.func.vmap``, under which torch's batch norm, with scales that differ by task, gives wrong second
    derivatives without a word (torch 2.15).
    """
    return _normalise(x, _statistics(x), weight, bias)


def leading_statistics(count: int) -> Norm:
    """Batch norm by the mean and variance of the first ``count`` images only, for all images.

    With the support set in front, no query image has any influence on another one.
    """

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _normalise(x, _statistics(x[:count]), weight, bias)

    return norm


class Statistics(NamedTuple):
    """Of the images at one normalisation: mean and variance ``[C]``."""

    mean: Tensor
    variance: Tensor


def noting_statistics(noted: list[Statistics]) -> Norm:
    """Batch norm as ``batch_statistics`` that appends the statistics of each layer, in the layers' order."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        noted.append(_statistics(x))
        return _normalise(x, noted[-1], weight, bias)

    return norm


def given_statistics(given: Sequence[Statistics]) -> Norm:
    """Batch norm by the statistics given for each layer, for one forward pass."""
    layers = iter(given)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _normalise(x, next(layers), weight, bias)

    return norm


def _statistics(x: Tensor) -> Statistics:
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 has three digits
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return Statistics(mean, variance)


def _normalise(x: Tensor, by: Statistics, weight: Tensor, bias: Tensor) -> Tensor:
    scale = weight * torch.rsqrt(by.variance + EPSILON)
    shift = bias - by.mean * scale
    return x * scale[:, None, None] + shift[:, None, None]
