"""The MAML step of the trainer's engine ``vmap`` in plain PyTorch: all tasks at once, by ``torch.func``.

    python examples/engine_vmap.py

Each operation works on all tasks in one call, which pays where calls cost more than their work: on a GPU, and with
small networks. Memory holds the graphs of all tasks. ``engine_loop.py`` computes the same task by task.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap
from torch.nn import functional as F

Weights = dict[str, Tensor]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]
INNER_LR, INNER_STEPS = 0.1, 3


def loss(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of examples ``[N, features]``, by two layers."""
    return F.cross_entropy(F.linear(torch.tanh(F.linear(x, weights["first"], weights["bias"])), weights["head"]), y)


def query_loss(weights: Weights, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
    """The loss of one task after adaptation: a pure function, written as if there were no other task."""
    for _ in range(INNER_STEPS):
        slopes = grad(loss)(weights, support_x, support_y)
        weights = {name: value - INNER_LR * slopes[name] for name, value in weights.items()}
    return loss(weights, query_x, query_y)


def meta_gradient(weights: Weights, batch: Batch) -> tuple[Tensor, Weights]:
    """The mean query loss after adaptation, and its gradient by the initial weights.

    Args:
        weights: of the network, the same for all tasks: ``None`` in ``in_dims``.
        batch: support examples ``[tasks, N, features]`` and labels ``[tasks, N]``, and those of the query set.
    """

    def mean_loss(at: Weights) -> Tensor:
        return vmap(query_loss, in_dims=(None, 0, 0, 0, 0))(at, *batch).mean()

    gradient, value = grad_and_value(mean_loss)(weights)  # grad around grad: through all inner steps
    return value, gradient


def problem(tasks: int = 8, n_way: int = 3, features: int = 6) -> tuple[Weights, Batch]:
    """Initial weights, and made-up tasks: each class is a point with noise around it."""
    weights = {"first": torch.randn(16, features) / 3, "bias": torch.zeros(16), "head": torch.randn(n_way, 16) / 4}
    labels = torch.arange(n_way).repeat_interleave(5).repeat(tasks, 1)
    centres = 2 * torch.randn(tasks, n_way, features)
    noisy = [centres[:, labels[0]] + 0.5 * torch.randn(tasks, labels.shape[1], features) for _ in range(2)]
    return weights, (noisy[0], labels, noisy[1], labels)


if __name__ == "__main__":
    torch.manual_seed(0)
    start, made = problem()
    outer = torch.optim.Adam(start.values(), lr=0.01)
    for step in range(30):
        value, slopes = meta_gradient(start, made)
        for name, weight in start.items():
            weight.grad = slopes[name]
        outer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: query loss after adaptation {value:.3f}")
