"""What a training run is told to do: checked whole, stored with every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from mamldata.errors import RequestError
from trainer.maml.algorithms import (
    ADAPTS,
    ALGORITHMS,
    BN_MODES,
    LOSSES,
    ORDERS,
    RATES,
    Adapts,
    Algorithm,
    BatchNorm,
    InnerLoop,
    Loss,
    Order,
    Rates,
    objections,
)
from trainer.maml.engines import ENGINES
from trainer.maml.objective import Objective, step_weights
from trainer.networks.networks import NETWORKS
from trainer.networks.precision import PRECISIONS, Precision

DEVICES = ("auto", "cpu", "cuda", "mps")
COORDINATES = ("order", "loss", "rates", "adapts", "bn")  # of an algorithm; None stands for its own
SCHEDULES = ("cosine", "constant")
OPTIMIZERS = ("adam", "sgd")
MOST_SEED = 2**64 - 1  # what torch's generators take
MSL_EPOCHS = 10  # Antoniou et al. 2019, Omniglot; 15 for miniImageNet

# A run that goes on may change these. They do not touch the weights of a step, but for one thing: with more steps a
# cosine schedule goes on from where the longer curve is, as a run that is prolonged should.
CHANGEABLE = frozenset({"steps", "eval_every", "log_every", "tensorboard"})


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a run. The defaults are the Omniglot 5-way ones of Finn et al. 2017, appendix A.1, but shorter.

    Attributes:
        algorithm: one of ``ALGORITHMS``.
        network: one of ``NETWORKS``.
        filters: of each convolution of the network, in place of its own number; not for ``resnet18``.
        normalise: images by the train split's mean and deviation, in place of [0, 1].
        bn: batch norm of query images, one of ``BN_MODES``; see ``InnerLoop``. None: the algorithm's own,
            ``transductive``, and for maml++ ``per-step``.
        steps: outer steps (the paper: 60,000).
        inner_steps: adaptation steps while training.
        inner_lr: alpha.
        eval_inner_steps: adaptation steps while evaluating. None: three, as in the paper's 5-way experiments, or
            ``inner_steps`` if that is more; with learned rates or norms ``inner_steps``, for which they were learned.
        order, loss, rates, adapts: in place of the algorithm's own; see ``Algorithm``.
        msl_epochs: epochs in which a multi-step loss comes down to its last step, see ``step_weights``. None: 10.
        first_order_epochs: begin with so many epochs of the first order, and only then go over to the second
            (derivative-order annealing, Antoniou et al. 2019, section 4).
        epoch_steps: outer steps in an epoch, for these two (Antoniou et al. 2019: 500).
        support_batches: different support batches for the inner steps; see ``InnerLoop``.
        checkpoint_inner: compute the inner loop twice, to keep only one of its steps in memory; see ``InnerLoop``.
        meta_clip_norm: make meta-gradients longer than this so long, all parameters together.
        meta_clip_value: bring each element of a meta-gradient into plus and minus this (Finn's MiniImagenet code: 10).
        meta_lr: the rate of the outer loop (beta), at the start.
        meta_optimizer: of the outer loop, ``adam`` or plain ``sgd``, with which ``reptile`` is its paper's algorithm.
        meta_schedule: ``cosine`` lets it fall to a hundredth over ``steps``; ``constant`` is the paper's.
        meta_batch_size: episodes per outer step.
        seed: of the initial weights and of the order of the episodes; below 2**64.
        eval_every: outer steps between validations; each ends with a checkpoint.
        eval_episodes: of the val split, at each validation.
        log_every: outer steps between lines of the log.
        device: ``auto`` takes cuda, then mps, then cpu.
        engine: one of ``ENGINES``, or ``auto``; see ``pick_engine``.
        precision: one of ``PRECISIONS``. None: the device's own, tf32 on CUDA and fp32 elsewhere.
        tensorboard: write the metrics for TensorBoard, too.

    Raises:
        RequestError: every fault, all at once.
    """

    algorithm: str = "maml"
    network: str = "conv4"
    filters: int | None = None
    normalise: bool = False
    bn: BatchNorm | None = None
    steps: int = 4000
    inner_steps: int = 1
    inner_lr: float = 0.4
    eval_inner_steps: int | None = None
    order: Order | None = None
    loss: Loss | None = None
    rates: Rates | None = None
    adapts: Adapts | None = None
    msl_epochs: int | None = None
    first_order_epochs: int = 0
    epoch_steps: int = 500
    support_batches: int = 1
    checkpoint_inner: bool = False
    meta_clip_norm: float | None = None
    meta_clip_value: float | None = None
    meta_lr: float = 1e-3
    meta_optimizer: str = "adam"
    meta_schedule: str = "cosine"
    meta_batch_size: int = 16
    seed: int = 0
    eval_every: int = 500
    eval_episodes: int = 200
    log_every: int = 50
    device: str = "auto"
    engine: str = "auto"
    precision: Precision | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        # A value of a wrong type cannot be judged any further.
        if faults := list(self._wrong_types()) or list(self._faults()):
            raise RequestError("The training settings cannot be:\n" + "\n".join(f"  {fault}" for fault in faults))

    def _wrong_types(self) -> Iterator[str]:
        words = {"int": "a whole number", "float": "a number", "bool": "true or false"}
        for field in fields(self):
            kind, value = str(field.type).partition(" ")[0], getattr(self, field.name)
            if kind not in words:
                if not isinstance(value, str | None):
                    yield f"{field.name} must be a string, not {value!r}."
                continue  # choices are compared with what there is
            if value is None and field.default is None:
                continue
            if type(value).__name__ not in {kind, "int" if kind == "float" else kind}:
                yield f"{field.name} must be {words[kind]}, not {value!r}."

    def _faults(self) -> Iterator[str]:
        choices: dict[str, Any] = {
            "algorithm": ALGORITHMS,
            "network": NETWORKS,
            "bn": BN_MODES,
            "order": ORDERS,
            "loss": LOSSES,
            "rates": RATES,
            "adapts": ADAPTS,
            "meta_optimizer": OPTIMIZERS,
            "meta_schedule": SCHEDULES,
            "device": DEVICES,
            "engine": ("auto", *ENGINES),
            "precision": PRECISIONS,
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known and not (value is None and name in {*COORDINATES, "precision"}):
                yield f"{name} must be one of {', '.join(known)}, not {value!r}."
        least = {
            "filters": 1,
            "steps": 1,
            "inner_steps": 1,
            "eval_inner_steps": 1,
            "msl_epochs": 1,
            "first_order_epochs": 0,
            "epoch_steps": 1,
            "support_batches": 1,
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
        if self.seed > MOST_SEED:
            yield f"seed must be at most {MOST_SEED}, not {self.seed}."
        for name in ("inner_lr", "meta_lr", "meta_clip_norm", "meta_clip_value"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                yield f"{name} must be a positive number, not {value}."
        if self.filters is not None and self.network == "resnet18":
            yield "filters is not for the network resnet18, whose widths are its own."
        if self.meta_clip_norm is not None and self.meta_clip_value is not None:
            yield "meta_clip_norm and meta_clip_value cannot both be given: one would undo a part of the other."
        if self.support_batches > max(self.inner_steps, 1):
            yield (
                f"support_batches must be at most inner_steps, {self.inner_steps}, not {self.support_batches}: "
                "the rest would never be used."
            )
        if self.algorithm in ALGORITHMS:
            yield from objections(self.point, first_order_epochs=self.first_order_epochs)
            if self.msl_epochs is not None and self.point.loss == "final":
                yield "msl_epochs is for the loss multi-step, and this one is final."
            if self.msl_epochs is not None and self.point.loss == "multi-step" and self.inner_steps == 1:
                yield "msl_epochs is of no use with one inner step, whose loss is the last one's from the start."
            epochs_count = self.first_order_epochs or self.point.loss == "multi-step"
            if self.epoch_steps != TrainSettings.epoch_steps and not epochs_count:
                yield "epoch_steps is for first_order_epochs and for the loss multi-step, and there is neither."
            if self.engine == "higher" and self.point.bn in {"per-step", "frozen"}:
                yield f"The engine higher knows no bn {self.point.bn}. Take the engine loop."
            if self.engine == "higher" and self.precision == "bf16":
                yield "The engine higher knows no precision bf16: its forward passes are its own. Take the engine loop."
            if self.precision == "tf32" and self.device in {"cpu", "mps"}:
                yield f"precision cannot be tf32 with device {self.device}: only CUDA devices have it."
            if self.checkpoint_inner and self.point.order == "first":
                yield "checkpoint_inner is of no use with order first, which keeps no graph of the inner loop."
            if self.checkpoint_inner and self.engine not in {"auto", "loop"}:
                yield f"checkpoint_inner is for the engine loop, not {self.engine}."
            clips = self.meta_clip_norm is not None or self.meta_clip_value is not None
            if clips and self.point.outer == "none":
                yield f"There is nothing to clip with {self.algorithm}, which has no meta-gradient."
            if self.engine != "auto" and self.point.outer in {"joint", "none"}:
                yield f"engine is of no use with {self.algorithm}, which has no inner loop in training."

    @property
    def point(self) -> Algorithm:
        """The algorithm with what the settings put in place of its own."""
        given = {name: getattr(self, name) for name in COORDINATES}
        return replace(ALGORITHMS[self.algorithm], **{name: value for name, value in given.items() if value})

    def resolved(self) -> dict[str, Any]:
        """All settings as plain values, with the algorithm's own where none were given: equal for equal runs."""
        return {**asdict(self), **{name: getattr(self.point, name) for name in COORDINATES}}

    @property
    def outer_steps(self) -> int:
        """Steps that the outer loop takes: none for an algorithm that learns nothing."""
        return 0 if self.point.outer == "none" else self.steps

    def meta_lr_at(self, step: int) -> float:
        """The outer learning rate of a step, counted from 0; a function of the step, so that resuming needs no state.

        Loshchilov and Hutter 2017, "SGDR", equation 5, with one period of ``steps``.
        """
        if self.meta_schedule == "constant":
            return self.meta_lr
        lowest = self.meta_lr / 100
        return lowest + (self.meta_lr - lowest) * (1 + math.cos(math.pi * step / self.steps)) / 2

    def inner_loop(self, step: int = 0) -> InnerLoop:
        """How the network adapts in an outer step, counted from 0."""
        early = step < self.first_order_epochs * self.epoch_steps
        return self._inner_loop(self.inner_steps, "first" if early else self.point.order)

    def inner_loop_at_test(self) -> InnerLoop:
        """How the network adapts while it is evaluated."""
        learned = self.point.rates != "fixed" or self.point.bn == "per-step"
        least = self.inner_steps if learned else max(3, self.inner_steps)
        return self._inner_loop(self.eval_inner_steps or least, "first")

    def _inner_loop(self, steps: int, order: Order) -> InnerLoop:
        point = self.point
        return InnerLoop(
            steps,
            self.inner_lr,
            order,
            point.bn,
            point.rates,
            point.adapts,
            support_batches=self.support_batches,
            checkpoint=self.checkpoint_inner and order == "second",
        )

    def objective(self, step: int) -> Objective:
        """What the outer loop follows in an outer step, counted from 0."""
        if self.point.loss == "final":
            return Objective(self.point.outer)
        weights = step_weights(self.inner_steps, step // self.epoch_steps, self.msl_epochs or MSL_EPOCHS)
        return Objective(self.point.outer, weights)


def saved_settings(values: Mapping[str, Any], place: Path) -> TrainSettings:
    """The settings that ``TrainSettings.resolved`` gave and a file holds; one that it lacks has its default.

    Args:
        values: what the file holds.
        place: the file.

    Raises:
        RequestError: there are settings that are not known here, or that cannot be.
    """
    if unknown := sorted(values.keys() - {field.name for field in fields(TrainSettings)}):
        raise RequestError(
            f"{place} has settings that are not known here: {', '.join(unknown)}. Another version of this trainer "
            "wrote it; use that one."
        )
    return TrainSettings(**values)


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
