"""The examples of the engines compute what the engines compute, and learn."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamldata.streaming.batch import EpisodeBatch
from trainer.maml.algorithms import InnerLoop
from trainer.maml.engines import ENGINES
from trainer.maml.parameters import meta_parameters
from trainer.maml.variants import method_of
from trainer.networks.norms import Norm

FOLDER = Path(__file__).parents[2] / "examples"


class TwoLayers(nn.Module):
    """The network of both examples."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value.detach()))

    def forward(self, x: Tensor, norm: Norm) -> Tensor:  # noqa: ARG002
        return F.linear(torch.tanh(F.linear(x, self.first, self.bias)), self.head)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_an_example_finds_the_gradient_of_its_engine(engine: str) -> None:
    """In float64, to rounding; with the loss."""
    example = SimpleNamespace(**runpy.run_path(str(FOLDER / f"engine_{engine}.py")))
    torch.manual_seed(0)
    weights, tasks = example.problem()
    weights = {name: value.double().requires_grad_() for name, value in weights.items()}
    columns = tasks if engine == "vmap" else [torch.stack(part) for part in zip(*tasks, strict=True)]
    batch = [part.double() if part.is_floating_point() else part for part in columns]
    value, slopes = example.meta_gradient(weights, batch if engine == "vmap" else list(zip(*batch, strict=True)))
    network = TwoLayers(weights)
    inner = InnerLoop(example.INNER_STEPS, example.INNER_LR, "second", "transductive")
    episodes = EpisodeBatch(*batch, torch.arange(len(batch[0])))
    method = method_of(network, inner, engine)
    outcome = ENGINES[engine](network, meta_parameters(network, inner), episodes, method)
    torch.testing.assert_close(value, outcome.loss, rtol=1e-6, atol=0)
    for name, slope in outcome.gradient.weights.items():
        torch.testing.assert_close(slopes[name], slope, rtol=1e-10, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_an_example_learns(engine: str, run_example: Callable[..., str]) -> None:
    """Its loss falls."""
    losses = [float(found) for found in re.findall(r"adaptation (\S+)", run_example(f"engine_{engine}.py"))]
    assert len(losses) == 3
    assert losses[2] < losses[1] < losses[0]
