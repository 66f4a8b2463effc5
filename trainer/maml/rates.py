"""Inner learning rates: their values in each step, and log lines about them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from trainer.maml.algorithms import InnerLoop, Rates
from trainer.maml.parameters import MetaParameters


def inner_rate(parameters: MetaParameters, name: str, inner: InnerLoop, step: int) -> Tensor | float:
    """The rate of a parameter in a step; beyond the trained steps, the last one's."""
    if inner.rates == "fixed":
        return inner.lr
    rate = parameters.rates[name]
    return rate if inner.rates == "parameter" else rate[min(step, len(rate) - 1)]


def rate_lines(parameters: MetaParameters, rates: Rates) -> Iterator[str]:
    """A line for each layer: its rate in each inner step, or the mean and the extremes of its parameters' rates.

    Nothing if the rates are fixed.
    """
    if rates != "fixed":
        yield f"learned inner learning rates, by layer{' and step' if rates == 'layer-step' else ''}:"
    for name, value in sorted(parameters.rates.items()):  # the head after the blocks
        yield f"  {name}: {_by_step(value) if rates == 'layer-step' else _spread(value)}"


def _by_step(value: Tensor) -> str:
    return ", ".join(f"{rate:.4g}" for rate in value.tolist())


def _spread(value: Tensor) -> str:
    return f"mean {value.mean().item():.4g}, from {value.min().item():.4g} to {value.max().item():.4g}"
