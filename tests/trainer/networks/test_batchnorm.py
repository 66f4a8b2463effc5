from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.networks.batchnorm import EPSILON, batch_norm

FORMATS = [torch.contiguous_format, torch.channels_last]


def arguments(memory_format: torch.memory_format) -> list[Tensor]:
    chance = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=chance, dtype=torch.float64) for shape in ((4, 3, 2, 5), 3, 3))
    return [value.requires_grad_() for value in (x.contiguous(memory_format=memory_format), weight, bias)]


@pytest.mark.parametrize("memory_format", FORMATS)
def test_value_is_torchs(memory_format: torch.memory_format) -> None:
    """The same numbers in the memory layout of the images."""
    x, weight, bias = arguments(memory_format)
    out = batch_norm(x, weight, bias)
    assert torch.equal(out, F.batch_norm(x, None, None, weight, bias, training=True, eps=EPSILON))
    assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_derivatives_equal_finite_differences(memory_format: torch.memory_format) -> None:
    """The first and the second ones, by images, scales and shifts."""
    assert torch.autograd.gradcheck(batch_norm, arguments(memory_format))
    assert torch.autograd.gradgradcheck(batch_norm, arguments(memory_format))


def test_second_derivatives_equal_torchs() -> None:
    """To float64 rounding, where they all come together."""

    def second(norm) -> tuple[Tensor, ...]:
        values = arguments(torch.channels_last)
        slopes = torch.autograd.grad(norm(*values).sin().sum(), values, create_graph=True)
        return torch.autograd.grad(sum(slope.square().sum() for slope in slopes), values)

    expected = second(lambda *values: F.batch_norm(values[0], None, None, *values[1:], training=True, eps=EPSILON))
    for slope, other in zip(second(batch_norm), expected, strict=True):
        torch.testing.assert_close(slope, other, rtol=1e-11, atol=1e-12)


def test_second_derivatives_keep_the_dtype() -> None:
    """Of images in bfloat16 with weights in float32, as under autocast."""
    x, weight, bias = arguments(torch.channels_last)
    values = [x.detach().bfloat16().requires_grad_(), weight.detach().float().requires_grad_(), bias.detach().float()]
    (slope,) = torch.autograd.grad(batch_norm(*values).square().sum(), values[:1], create_graph=True)
    by_x, by_weight = torch.autograd.grad(slope.square().sum(), values[:2])
    assert (by_x.dtype, by_weight.dtype) == (torch.bfloat16, torch.float32)
