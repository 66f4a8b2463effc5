"""What a training run is told to do: checked whole, stored with every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mamldata.errors import RequestError
from trainer.adapt import BatchNorm, InnerLoop
from trainer.algorithms import ALGORITHMS
from trainer.models import NETWORKS

DEVICES = ("auto", "cpu", "cuda", "mps")
SCHEDULES = ("cosine", "constant")
BN_MODES: tuple[BatchNorm, ...] = ("transductive", "support")

# A run that goes on may change these. They do not touch the weights of a step, but for one thing: with more steps a
# cosine schedule goes on from where the longer curve is, as a run that is prolonged should.
CHANGEABLE = frozenset({"steps", "eval_every", "log_every"})


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a run. The defaults are the Omniglot 5-way ones of Finn et al. 2017, appendix A.1, but shorter.

    Attributes:
        algorithm: one of ``ALGORITHMS``.
        network: one of ``NETWORKS``.
        normalise: images by the train split's mean and deviation, in place of [0, 1].
        bn: batch norm of query images, ``transductive`` or ``support``; see ``InnerLoop``.
        steps: outer steps (the paper: 60,000).
        inner_steps: adaptation steps while training.
        inner_lr: alpha.
        eval_inner_steps: adaptation steps while evaluating. None: three, as in the paper's 5-way experiments, or
            ``inner_steps`` if that is more.
        meta_lr: Adam's rate for the outer loop (beta), at the start.
        meta_schedule: ``cosine`` lets it fall to a hundredth over ``steps``; ``constant`` is the paper's.
        meta_batch_size: episodes per outer step.
        seed: of the initial weights and of the order of the episodes.
        eval_every: outer steps between validations; each ends with a checkpoint.
        eval_episodes: of the val split, at each validation.
        log_every: outer steps between lines of the log.
        device: ``auto`` takes cuda, then mps, then cpu.

    Raises:
        RequestError: every fault, all at once.
    """

    algorithm: str = "maml"
    network: str = "conv4"
    normalise: bool = False
    bn: BatchNorm = "transductive"
    steps: int = 4000
    inner_steps: int = 1
    inner_lr: float = 0.4
    eval_inner_steps: int | None = None
    meta_lr: float = 1e-3
    meta_schedule: str = "cosine"
    meta_batch_size: int = 16
    seed: int = 0
    eval_every: int = 500
    eval_episodes: int = 200
    log_every: int = 50
    device: str = "auto"

    def __post_init__(self) -> None:
        if faults := list(self._faults()):
            raise RequestError("The training settings cannot be:\n" + "\n".join(f"  {fault}" for fault in faults))

    def _faults(self) -> Iterator[str]:
        choices: dict[str, Any] = {
            "algorithm": ALGORITHMS,
            "network": NETWORKS,
            "bn": BN_MODES,
            "meta_schedule": SCHEDULES,
            "device": DEVICES,
        }
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                yield f"{name} must be one of {', '.join(known)}, not {value!r}."
        least = {
            "steps": 1,
            "inner_steps": 1,
            "eval_inner_steps": 1,
            "meta_batch_size": 1,
            "seed": 0,
            "eval_every": 1,
            "eval_episodes": 2,  # an interval needs two
            "log_every": 1,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                yield f"{name} must be at least {bound}, not {value}."
        for name in ("inner_lr", "meta_lr"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                yield f"{name} must be a positive number, not {value}."

    def meta_lr_at(self, step: int) -> float:
        """The outer learning rate of a step, counted from 0; a function of the step, so that resuming needs no state.

        Loshchilov and Hutter 2017, "SGDR", equation 5, with one period of ``steps``.
        """
        if self.meta_schedule == "constant":
            return self.meta_lr
        lowest = self.meta_lr / 100
        return lowest + (self.meta_lr - lowest) * (1 + math.cos(math.pi * step / self.steps)) / 2

    def inner_loop(self) -> InnerLoop:
        """How the network adapts while it is trained."""
        return InnerLoop(self.inner_steps, self.inner_lr, ALGORITHMS[self.algorithm].order, self.bn)

    def inner_loop_at_test(self) -> InnerLoop:
        """How the network adapts while it is evaluated."""
        steps = self.eval_inner_steps or max(3, self.inner_steps)
        return InnerLoop(steps, self.inner_lr, "first", self.bn)


def pick_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` takes the best one that is there.

    Raises:
        RequestError: it is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, available in there.items() if available))
    if not there[name]:
        present = ", ".join(kind for kind, available in there.items() if available)
        raise RequestError(f"There is no device {name!r} on this machine. There is: {present}.")
    return torch.device(name)
