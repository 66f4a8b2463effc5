"""The algorithms: points in a small space, not classes with loops of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Order = Literal["first", "second"]


@dataclass(frozen=True)
class Algorithm:
    """One way of meta-learning.

    Attributes:
        name: as the user writes it, and as checkpoints are called.
        order: ``second`` differentiates through the inner loop; ``first`` takes its gradients for constants.
    """

    name: str
    order: Order


_ALL = (
    # Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017,
    # https://arxiv.org/abs/1703.03400, algorithm 2; FOMAML is the approximation of its section 5.2.
    Algorithm("maml", order="second"),
    Algorithm("fomaml", order="first"),
)

ALGORITHMS = {algorithm.name: algorithm for algorithm in _ALL}
