"""Recompute a function for its gradient, and keep only its inputs in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Function = Callable[..., tuple[Tensor, ...]]


def recomputed(function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``function(*inputs)``, whose graph exists only while its gradient is computed.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", https://arxiv.org/abs/1604.06174, with the steps
    of the inner loop as segments. The function may take gradients itself (``torch.func.grad``), which
    ``torch.utils.checkpoint`` does not allow. The result can be differentiated once.

    Args:
        function: pure; returns new tensors, none of its inputs.
        inputs: all tensors that receive gradients.
    """
    return tuple(_Recomputed.apply(function, *inputs))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Function, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = [value.detach().requires_grad_(need) for value, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            outputs = ctx.function(*inputs)
        wanted = [value for value in inputs if value.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, slopes, allow_unused=True))
        return (None, *(next(found) if need else None for need in needed))
