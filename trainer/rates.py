"""Learned inner learning rates, in words."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from trainer.adapt import RATE, Parameters
from trainer.algorithms import Rates


def rate_lines(parameters: Parameters, rates: Rates) -> Iterator[str]:
    """A line for each layer: its rate in each inner step, or the mean and the extremes of its parameters' rates.

    Nothing if the rates are fixed.
    """
    if rates != "fixed":
        yield f"learned inner learning rates, by layer{' and step' if rates == 'layer-step' else ''}:"
    for name, value in sorted(parameters.items()):  # the head after the blocks
        if name.startswith(RATE):
            shown = _by_step(value) if rates == "layer-step" else _spread(value)
            yield f"  {name.removeprefix(RATE)}: {shown}"


def _by_step(value: Tensor) -> str:
    return ", ".join(f"{rate:.4g}" for rate in value.tolist())


def _spread(value: Tensor) -> str:
    return f"mean {value.mean().item():.4g}, from {value.min().item():.4g} to {value.max().item():.4g}"
