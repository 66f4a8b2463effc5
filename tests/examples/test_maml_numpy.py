"""The example from scratch: its derivatives are right, and it shows what it says."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mamldata.streaming.batch import EpisodeBatch
from trainer.maml.algorithms import ORDERS, InnerLoop
from trainer.maml.engines import loop
from trainer.maml.parameters import MetaParameters
from trainer.maml.variants import method_of
from trainer.networks.norms import Norm

FILE = Path(__file__).parents[2] / "examples" / "maml_numpy.py"
START = np.array([0.3, -0.7, 0.2])


@pytest.fixture(scope="module")
def example() -> SimpleNamespace:
    """All that the example defines; running it as a program is left out."""
    return SimpleNamespace(**runpy.run_path(str(FILE)))


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_the_meta_gradient_equals_finite_differences(example: SimpleNamespace, steps: int) -> None:
    """Of the query loss after so many inner steps, with respect to the weights before them."""
    task = example.draw_task(np.random.default_rng(0))

    def after(w: np.ndarray) -> float:
        return example.loss(example.adapt(w, task, steps)[-1], task.query_x, task.query_y)

    width = 1e-6
    expected = [(after(START + width * row) - after(START - width * row)) / (2 * width) for row in np.eye(3)]
    np.testing.assert_allclose(example.meta_gradient(START, task, steps), expected, rtol=1e-7, atol=1e-9)


class Sigmoid(nn.Module):
    """One sigmoid layer, as logits of two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.from_numpy(START))

    def forward(self, x: Tensor, norm: Norm) -> Tensor:  # noqa: ARG002
        z = x @ self.w
        return torch.stack([torch.zeros_like(z), z], 1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("steps", [1, 3])
def test_the_trainer_finds_the_same(example: SimpleNamespace, steps: int, order) -> None:
    """The mean of the tasks' meta-gradients is the trainer's, to first and to second order."""
    chance = np.random.default_rng(1)
    tasks = [example.draw_task(chance) for _ in range(4)]
    parts = [torch.from_numpy(np.stack(part)) for part in zip(*tasks, strict=True)]
    batch = EpisodeBatch(parts[0], parts[1].long(), parts[2], parts[3].long(), torch.arange(4))
    network = Sigmoid()
    inner = InnerLoop(steps, example.ALPHA, order, "transductive")
    parameters, method = MetaParameters(dict(network.named_parameters())), method_of(network, inner)
    expected = loop(network, parameters, batch, method).gradient.weights["w"]
    gradients = [example.meta_gradient(START, task, steps, first_order=order == "first") for task in tasks]
    np.testing.assert_allclose(np.mean(gradients, axis=0), expected.numpy(), rtol=1e-10)


def test_maml_is_the_best_after_adaptation(example: SimpleNamespace) -> None:
    """And joint training before it; adaptation helps both."""
    chance = np.random.default_rng(1)
    tasks = [example.draw_task(chance) for _ in range(1000)]
    zeros = example.mean_losses(np.zeros(3), tasks, steps=1)
    joint, maml = (example.mean_losses(example.train(steps), tasks, steps=1) for steps in (0, 1))
    assert joint[0] < maml[0] < zeros[0]
    assert maml[1] < joint[1] < zeros[1]
    assert maml[1] < maml[0]
