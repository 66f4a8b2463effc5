"""Batch norm by the statistics of its own batch, with second derivatives written out by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPSILON = 1e-5  # what torch's batch norm adds to the variance

_OVER = (0, 2, 3)  # all but the channels


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.batch_norm`` in training, without running statistics; can be differentiated twice.

    Value and first derivative are torch's own. torch composes the second one of some hundred passes over ``x``, a
    large part of an inner step at second order; here it takes eleven.

    Args:
        x: ``[N, C, H, W]``; the result has its memory layout.
        weight, bias: ``[C]``.
    """
    out: Tensor = _BatchNorm.apply(x, weight, bias)
    return out


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out, mean, scale = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, EPSILON)
        ctx.save_for_backward(x, weight, mean, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        dx, dweight, dbias = _Slopes.apply(slopes[0], x, weight, mean, scale)
        return dx, dweight, dbias


class _Slopes(torch.autograd.Function):
    """The first derivative, as a function that is itself differentiable.

    With the normalized image n = (x - mean) * scale, p = weight * scale, and means over all but the channels:

        dx = p * (g - mean(g) - n * mean(g * n)),    dweight = sum(g * n),    dbias = sum(g)
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            g, x, weight, None, None, mean, scale, True, EPSILON, [True, True, True]
        )
        ctx.save_for_backward(g, x, weight, mean, scale, dweight, dbias)
        return dx, dweight, dbias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        """The derivatives of a function L whose slopes with respect to dx, dweight and dbias are v, a and b.

        With K = mean(v * g) - mean(v) * mean(g) - mean(v * n) * mean(g * n) and e = a - p * mean(v * n):

            dL/dg      = p * (v - mean(v)) + e * n + b
            dL/dn      = e * g - p * mean(g * n) * v =: q
            dL/dx      = scale * (q - mean(q) - n * (mean(q * n) + p * K)),  since scale depends on x, too
            dL/dweight = scale * count * K
        """
        v, a, b = slopes
        g, x, weight, mean, scale, dweight, dbias = ctx.saved_tensors
        count = x.numel() / len(weight)
        n = torch.addcmul(_wide(-mean * scale), x, _wide(scale))
        g_mean, gn_mean = dbias / count, dweight / count
        v_mean, vn_mean, vg_mean = v.mean(_OVER), (v * n).mean(_OVER), (v * g).mean(_OVER)
        p = weight * scale
        e = torch.addcmul(a, p, vn_mean, value=-1)
        k = vg_mean - v_mean * g_mean - vn_mean * gn_mean
        by_g = torch.addcmul(_wide(torch.addcmul(b, p, v_mean, value=-1)), v, _wide(p))
        by_g.addcmul_(n, _wide(e))
        of_v = -p * gn_mean
        q_mean, qn_mean = of_v * v_mean + e * g_mean, of_v * vn_mean + e * gn_mean
        by_x = torch.addcmul(_wide(-scale * q_mean), v, _wide(scale * of_v))
        by_x.addcmul_(g, _wide(scale * e)).addcmul_(n, _wide(-scale * torch.addcmul(qn_mean, p, k)))
        return by_g.to(g.dtype), by_x.to(x.dtype), scale * k * count, None, None


def _wide(channels: Tensor) -> Tensor:
    return channels[:, None, None]
