"""MAML from scratch in NumPy: binary classification by one sigmoid layer, with every derivative by hand.

    python examples/maml_numpy.py

A task is a straight line through the plane: the sides of ten points are given, those of other points must be predicted.
Not every line is equally likely, so many tasks teach something that helps with the next one.

    inner step:     w' = w - alpha * slope of the support loss at w
    meta-gradient:  the slope of the query loss at w', with respect to w, through that step:
                    (I - alpha * H) @ slope of the query loss at w',  H = the Hessian of the support loss at w

First-order MAML leaves out H. Several inner steps give a factor each, the last one first; no inner step is plain joint
training on all tasks. Joint training is better before adaptation, and MAML is better after it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
ALPHA, BETA = 5.0, 0.1  # the inner and the outer learning rate


class Task(NamedTuple):
    """Points ``[n, 3]``, whose last coordinate is 1, and their classes ``[n]``, 0 or 1."""

    support_x: Array
    support_y: Array
    query_x: Array
    query_y: Array


def draw_task(chance: np.random.Generator, support: int = 10, query: int = 50) -> Task:
    """A line within about 0.5 of the origin, with class 1 roughly to its right, and random points."""
    angle, offset = chance.uniform(-np.pi / 2, np.pi / 2), chance.uniform(-0.5, 0.5)
    line = np.array([np.cos(angle), np.sin(angle), offset])
    x = np.hstack([chance.normal(size=(support + query, 2)), np.ones((support + query, 1))])
    y = (x @ line > 0).astype(float)
    return Task(x[:support], y[:support], x[support:], y[support:])


def sigmoid(z: Array) -> Array:
    """``1 / (1 + exp(-z))`` without overflow."""
    return 0.5 * (1 + np.tanh(z / 2))


def loss(w: Array, x: Array, y: Array) -> float:
    """Mean cross-entropy in nats, with ``sigmoid(x @ w)`` as the probability that y is 1."""
    z = x @ w
    return float(np.mean(np.logaddexp(0, z) - y * z))


def slope(w: Array, x: Array, y: Array) -> Array:
    """The gradient of the loss, ``[3]``."""
    return x.T @ (sigmoid(x @ w) - y) / len(y)


def hessian_times(w: Array, x: Array, v: Array) -> Array:
    """The Hessian of the loss times ``v``, ``[3]``, without forming the Hessian; it does not depend on the labels."""
    p = sigmoid(x @ w)
    return x.T @ (p * (1 - p) * (x @ v)) / len(x)


def adapt(w: Array, task: Task, steps: int, alpha: float = ALPHA) -> list[Array]:
    """The inner loop: the initial weights and those after each step, ``steps + 1`` in all."""
    path = [w]
    for _ in range(steps):
        path.append(path[-1] - alpha * slope(path[-1], task.support_x, task.support_y))
    return path


def meta_gradient(w: Array, task: Task, steps: int, alpha: float = ALPHA, *, first_order: bool = False) -> Array:
    """The gradient of the query loss after adaptation with respect to the initial weights, ``[3]``."""
    *before, adapted = adapt(w, task, steps, alpha)
    g = slope(adapted, task.query_x, task.query_y)
    if not first_order:
        for at in reversed(before):
            g = g - alpha * hessian_times(at, task.support_x, g)
    return g


def mean_losses(w: Array, tasks: list[Task], steps: int) -> tuple[float, float]:
    """The query loss before and after adaptation."""
    paths = [adapt(w, task, steps) for task in tasks]
    before, after = (
        float(np.mean([loss(path[i], task.query_x, task.query_y) for path, task in zip(paths, tasks, strict=True)]))
        for i in (0, -1)
    )
    return before, after


def train(inner_steps: int, outer_steps: int = 1000, tasks: int = 20) -> Array:
    """The outer loop, starting from zeros: MAML, or joint training if there is no inner step."""
    chance, w = np.random.default_rng(0), np.zeros(3)
    for _ in range(outer_steps):
        w = w - BETA * np.mean([meta_gradient(w, draw_task(chance), inner_steps) for _ in range(tasks)], axis=0)
    return w


def main() -> None:
    """Compare untrained, jointly trained and meta-trained weights."""
    chance = np.random.default_rng(1)
    new_tasks = [draw_task(chance) for _ in range(1000)]
    for name, w in (("zeros", np.zeros(3)), ("joint training", train(inner_steps=0)), ("MAML", train(inner_steps=1))):
        before, after = mean_losses(w, new_tasks, steps=1)
        print(f"{name}: loss on {len(new_tasks)} new tasks {before:.3f} before the inner step, {after:.3f} after it")


if __name__ == "__main__":
    main()
