"""Batch norms that differ in the source of their statistics; none keeps anything for a later call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.networks.batchnorm import EPSILON

# (x [N, C, H, W], weight [C], bias [C]) -> the normalized x.
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def batch_statistics(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Batch norm by the mean and variance of all images of ``x``; keeps nothing for a later call.

    The fastest one without a second derivative; ``batch_norm`` is the fastest one with it.
    """
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=EPSILON)


def written_out(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same as ``batch_statistics``, in elementary operations.

    For ``torch.func.vmap``, under which torch's batch norm silently gives wrong second derivatives if scales differ
    by task (torch 2.15).
    """
    return _normalise(x, _statistics(x), weight, bias)


def leading_statistics(count: int) -> Norm:
    """Batch norm of all images by the mean and variance of the first ``count`` only.

    With the support set in front, query images do not affect one another.
    """

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _normalise(x, _statistics(x[:count]), weight, bias)

    return norm


class Statistics(NamedTuple):
    """Mean and variance ``[C]`` of the images at one normalization."""

    mean: Tensor
    variance: Tensor


def noting_statistics(noted: list[Statistics]) -> Norm:
    """Batch norm as ``batch_statistics``, which also appends each layer's statistics to ``noted``, in order."""

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
