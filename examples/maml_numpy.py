"""MAML from scratch, with NumPy alone: binary classification by one sigmoid layer, and every derivative by hand.

    python examples/maml_numpy.py

A task is a straight line through the plane: of ten points we are told on which side they are, of other points we are
asked. Not every line is equally likely, so there is something to learn from many tasks that helps with the next one.

    inner step:     w' = w - alpha * slope of the support loss at w
    meta-gradient:  the slope of the query loss at w', with respect to w, through that step:
                    (I - alpha * H) @ slope of the query loss at w',  H = the Hessian of the support loss at w

First-order MAML leaves out H; with several inner steps there is such a factor for each of them, the last one first;
without any it is plain training on all tasks jointly. That is better before adaptation, and MAML is better after it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
ALPHA, BETA = 5.0, 0.1  # the inner and the outer learning rate


class Task(NamedTuple):
    """Points ``[n, 3]``, whose last coordinate is 1, and which of two classes they are in, ``[n]``: 0 or 1."""

    support_x: Array
    support_y: Array
    query_x: Array
    query_y: Array


def draw_task(chance: np.random.Generator, support: int = 10, query: int = 50) -> Task:
    """A line with its class 1 more or less to the right, at up to 0.5 from the origin."""
    angle, offset = chance.uniform(-np.pi / 2, np.pi / 2), chance.uniform(-0.5, 0.5)
    line = np.array([np.cos(angle), np.sin(angle), offset])
    x = np.hstack([chance.normal(size=(support + query, 2)), np.ones((support + query, 1))])
    y = (x @ line > 0).astype(float)
    return Task(x[:support], y[:support], x[support:], y[support:])


def sigmoid(z: Array) -> Array:
    """``1 / (1 + exp(-z))``, which for no z overflows."""
    return 0.5 * (1 + np.tanh(z / 2))


def loss(w: Array, x: Array, y: Array) -> float:
    """Mean cross-entropy, in nats: of ``sigmoid(x @ w)`` where y is 1, and of what is left to 1 where it is 0."""
    z = x @ w
    return float(np.mean(np.logaddexp(0, z) - y * z))


def slope(w: Array, x: Array, y: Array) -> Array:
    """The gradient of the loss, ``[3]``."""
    return x.T @ (sigmoid(x @ w) - y) / len(y)


def hessian_times(w: Array, x: Array, v: Array) -> Array:
    """The Hessian of the loss times ``v``, ``[3]``, without the Hessian; the labels have no part in it."""
    p = sigmoid(x @ w)
    return x.T @ (p * (1 - p) * (x @ v)) / len(x)


def adapt(w: Array, task: Task, steps: int, alpha: float = ALPHA) -> list[Array]:
    """The inner loop: the weights at first and after each step, ``steps + 1`` of them."""
    path = [w]
    for _ in range(steps):
        path.append(path[-1] - alpha * slope(path[-1], task.support_x, task.support_y))
    return path


def meta_gradient(w: Array, task: Task, steps: int, alpha: float = ALPHA, *, first_order: bool = False) -> Array:
    """How the query loss after adaptation changes with the weights before it, ``[3]``."""
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
    """The outer loop, from zero: MAML, or joint training if there is no inner step."""
    chance, w = np.random.default_rng(0), np.zeros(3)
    for _ in range(outer_steps):
        w = w - BETA * np.mean([meta_gradient(w, draw_task(chance), inner_steps) for _ in range(tasks)], axis=0)
    return w


def main() -> None:
    """Compare weights that know nothing, jointly trained ones, and meta-trained ones."""
    chance = np.random.default_rng(1)
    new_tasks = [draw_task(chance) for _ in range(1000)]
    for name, w in (("zeros", np.zeros(3)), ("joint training", train(inner_steps=0)), ("MAML", train(inner_steps=1))):
        before, after = mean_losses(w, new_tasks, steps=1)
        print(f"{name}: loss on {len(new_tasks)} new tasks {before:.3f} before the inner step, {after:.3f} after it")


if __name__ == "__main__":
    main()
