"""The MAML step of the trainer's engine ``loop`` in plain PyTorch: one task after the other, by ``torch.autograd``.

    python examples/engine_loop.py

Memory holds the graph of a single task, however many tasks there are. ``engine_vmap.py`` computes the same at once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]
Task = tuple[Tensor, Tensor, Tensor, Tensor]  # support examples and labels, query examples and labels
INNER_LR, INNER_STEPS = 0.1, 3


def logits(weights: Weights, x: Tensor) -> Tensor:
    """Examples ``[N, features]`` to logits ``[N, n_way]``: two layers."""
    return F.linear(torch.tanh(F.linear(x, weights["first"], weights["bias"])), weights["head"])


def adapted(weights: Weights, x: Tensor, y: Tensor) -> Weights:
    """The inner loop. ``create_graph`` keeps how each step depends on the initial weights."""
    for _ in range(INNER_STEPS):
        loss = F.cross_entropy(logits(weights, x), y)
        slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        weights = {name: value - INNER_LR * slope for (name, value), slope in zip(weights.items(), slopes, strict=True)}
    return weights


def meta_gradient(weights: Weights, tasks: list[Task]) -> tuple[Tensor, Weights]:
    """The mean query loss after adaptation, and its gradient by the initial weights, which require gradients."""
    total, mean = torch.zeros(()), {name: torch.zeros_like(value) for name, value in weights.items()}
    for support_x, support_y, query_x, query_y in tasks:
        loss = F.cross_entropy(logits(adapted(weights, support_x, support_y), query_x), query_y)
        slopes = torch.autograd.grad(loss, list(weights.values()))  # back through all inner steps; frees this graph
        total = total + loss.detach() / len(tasks)
        for name, slope in zip(weights, slopes, strict=True):
            mean[name] += slope / len(tasks)
    return total, mean


def problem(tasks: int = 8, n_way: int = 3, features: int = 6) -> tuple[Weights, list[Task]]:
    """Initial weights, and made-up tasks: each class is a point with noise around it."""
    weights = {"first": torch.randn(16, features) / 3, "bias": torch.zeros(16), "head": torch.randn(n_way, 16) / 4}
    labels = torch.arange(n_way).repeat_interleave(5)
    centres = 2 * torch.randn(tasks, n_way, features)
    noisy = [centres[:, labels] + 0.5 * torch.randn(tasks, len(labels), features) for _ in range(2)]
    return weights, [(support, labels, query, labels) for support, query in zip(*noisy, strict=True)]


if __name__ == "__main__":
    torch.manual_seed(0)
    start, made = problem()
    start = {name: value.requires_grad_() for name, value in start.items()}
    outer = torch.optim.Adam(start.values(), lr=0.01)
    for step in range(30):
        value, gradient = meta_gradient(start, made)
        for name, weight in start.items():
            weight.grad = gradient[name]
        outer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: query loss after adaptation {value:.3f}")
