"""The settings of a training run: validated together, and stored with every checkpoint.

Each setting is declared once, in ``TrainSettings``, which its check, its command-line option and its line in
docs/training.md are made from. Help must not wait for torch, so functions here that need torch import it themselves,
and the names of networks, engines and precisions are repeated here; a test compares them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamldata.errors import RequestError
from trainer.maml.algorithms import (
    ADAPTS,
    ALGORITHMS,
    BN_MODES,
    INNER_LOSSES,
    LOSSES,
    ORDERS,
    RATES,
    Adapts,
    Algorithm,
    BatchNorm,
    InnerLoop,
    InnerLoss,
    Loss,
    Order,
    Rates,
    objections,
)

if TYPE_CHECKING:
    import torch

    from trainer.maml.objective import Objective
    from trainer.networks.precision import Precision

# The parts of an algorithm that settings replace; None means the algorithm's own.
COORDINATES = tuple(part.name for part in fields(Algorithm) if part.name not in {"name", "outer", "classifier"})
# An algorithm without an inner loop takes none of these.
OF_INNER_STEPS = ("inner_steps", "inner_lr", "eval_inner_steps", "support_batches")
INNER_LR, INNER_LR_FROZEN, INNER_LR_POOLED = 0.4, 0.05, 0.03
SMALLEST_POOLED = 16  # pixels, for conv4-pool
META_LR = 4e-3
MSL_EPOCHS = 10  # Antoniou et al. 2019, Omniglot; 15 for miniImageNet
OWN = re.compile(r"[\w.]+:[\w.<>]+")  # the name of a network of one's own: module:function
OLD_NAMES = {"normalise": "normalize"}  # of settings in older files and commands

# A resumed run may change these. They do not affect the weights of a step, with one exception: after a change of steps,
# a cosine schedule continues on the new curve, as it should in an extended run.
CHANGEABLE = frozenset({"steps", "eval_every", "log_every", "tensorboard"})

# Their defaults depend on the data or on the version: a resumed run keeps its own.
DEPENDENT = ("network", "normalize", "inner_lr", "meta_lr")

_OF_INNER_LOOP = {part.name for part in fields(InnerLoop)}
_TYPES: dict[str, tuple[set[type], str]] = {
    "int": ({int}, "a whole number"),
    "float": ({int, float}, "a number"),
    "bool": ({bool}, "true or false"),
}


@dataclass(frozen=True)
class Setting:
    """The declaration of one setting.

    Attributes:
        name: of the field.
        kind: its type, ``int``, ``float`` or ``bool``; ignored if there are ``choices``.
        default: None if it depends on other settings or on the data.
        meaning: one sentence, for help and docs.
        shown: the default in words, if its value alone is unclear.
        choices: the valid strings; empty for numbers and flags.
        or_own: a name like ``module:function`` is valid, too.
        at_least, at_most: inclusive bounds of a number, which is finite in any case.
        positive: the number must be above zero.
    """

    name: str
    kind: str
    default: Any
    meaning: str
    shown: str = ""
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    positive: bool = False
    or_own: bool = False

    @property
    def default_in_words(self) -> str:
        """The default, for help and docs."""
        return self.shown or (("no", "yes")[self.default] if self.kind == "bool" else str(self.default))

    @property
    def shown_choices(self) -> tuple[str, ...]:
        """The choices, for messages, help and docs."""
        return (*self.choices, "MODULE:FUNCTION") if self.or_own else self.choices

    def takes(self, value: object) -> bool:
        """Whether a value is one of the choices, or of the right type; bounds are not checked."""
        if value is None:
            return self.default is None
        if self.or_own and isinstance(value, str) and is_own(value):
            return True
        return value in self.choices if self.choices else type(value) in _TYPES[self.kind][0]

    def fault(self, value: Any) -> str | None:
        """What an invalid value must be instead; None for a valid one."""
        if not self.takes(value):
            return f"one of {', '.join(self.shown_choices)}" if self.choices else _TYPES[self.kind][1]
        if value is None or self.choices:
            return None
        if self.positive and not 0 < value < math.inf:
            return "a positive number"
        if not -math.inf < value < math.inf:
            return "a finite number"
        if self.at_least is not None and value < self.at_least:
            return f"at least {self.at_least}"
        return f"at most {self.at_most}" if self.at_most is not None and value > self.at_most else None


def is_own(network: str | None) -> bool:
    """Whether the name of a network is that of the user's own code."""
    return network is not None and OWN.fullmatch(network) is not None


def setting(default: Any, meaning: str, **rules: Any) -> Any:
    """A field of ``TrainSettings``; ``rules`` are attributes of its ``Setting``."""
    return field(default=default, metadata={"meaning": meaning, **rules})


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a run.

    The defaults are those of Finn et al. 2017 for Omniglot 5-way (A.1), with fewer steps and a higher ``meta_lr``.

    See ``Algorithm`` and ``InnerLoop`` for ``order``, ``loss``, ``rates``, ``adapts``, ``inner_loss`` and ``bn``.

    Raises:
        RequestError: lists all faults. Conflicts are looked for only if each setting has a valid type or choice.
    """

    algorithm: str = setting("maml", "Meta-learning algorithm.", choices=tuple(ALGORITHMS))
    # What is None here depends on the images: see ``for_images``.
    network: str | None = setting(
        None,
        "Network to train; MODULE:FUNCTION is one of your own.",
        shown="conv4; conv4-pool for colour images",
        choices=("conv4", "conv3-pool", "conv4-pool", "resnet18"),
        or_own=True,
    )
    filters: int | None = setting(
        None,
        "Filters of each convolution; not for resnet18 or your own network.",
        shown="the network's own",
        at_least=1,
        at_most=4096,
    )
    normalize: bool | None = setting(
        None, "Normalize images by the train split's mean and standard deviation.", shown="no; yes for colour images"
    )
    augment: str = setting(
        "none",
        "Random changes of training images: photo crops, flips, changes colours; character turns, scales, shifts.",
        choices=("none", "photo", "character"),
    )
    bn: BatchNorm | None = setting(
        None,
        "Source of the statistics that normalize query images.",
        shown="transductive; per-step for maml++",
        choices=BN_MODES,
    )
    steps: int = setting(4000, "Number of outer steps.", at_least=1, at_most=10**9)
    inner_steps: int = setting(1, "Number of inner steps in training.", at_least=1, at_most=10**6)
    # Frozen statistics do not follow the weights, so large steps make activations grow without bound. The bounds of
    # this and other rates keep their products in the range of float32.
    inner_lr: float | None = setting(
        None,
        "Inner learning rate (alpha); learned rates start from it.",
        shown=f"{INNER_LR}; {INNER_LR_FROZEN} with bn frozen; {INNER_LR_POOLED} with colour images' own network",
        positive=True,
        at_most=10**6,
    )
    # 3 as in the paper's 5-way experiments; learned rates and norms are for the steps that they were learned in.
    eval_inner_steps: int | None = setting(
        None,
        "Number of inner steps in evaluation.",
        shown="3; as in training if that is more, or if rates or norms are learned",
        at_least=1,
        at_most=10**6,
    )
    order: Order | None = setting(None, "Order of the meta-gradient.", shown="the algorithm's", choices=ORDERS)
    loss: Loss | None = setting(
        None,
        "Query loss of the outer loop: after the last inner step, or a weighted sum over all inner steps.",
        shown="the algorithm's",
        choices=LOSSES,
    )
    rates: Rates | None = setting(
        None,
        "Inner learning rates: fixed, or learned for each layer and step, or for each parameter.",
        shown="the algorithm's",
        choices=RATES,
    )
    adapts: Adapts | None = setting(
        None, "Part of the network that the inner loop adapts.", shown="the algorithm's", choices=ADAPTS
    )
    inner_loss: InnerLoss | None = setting(
        None,
        "Loss of an inner step: the mean over the support images, or n_way times that, as in MAML's released code.",
        shown="mean",
        choices=INNER_LOSSES,
    )
    msl_epochs: int | None = setting(
        None, "Epochs until only the last step counts in the multi-step loss.", shown=str(MSL_EPOCHS), at_least=1
    )
    # Antoniou et al. 2019, section 4; their epochs have 500 steps.
    first_order_epochs: int = setting(0, "First-order epochs at the start (derivative-order annealing).", at_least=0)
    epoch_steps: int = setting(
        500, "Outer steps in an epoch, for the multi-step loss and derivative-order annealing.", at_least=1
    )
    support_batches: int = setting(
        1, "Number of batches to divide the support set into; each inner step uses the next one.", at_least=1
    )
    checkpoint_inner: bool = setting(
        False, "Recompute inner steps for the meta-gradient, equal up to rounding; uses less memory and more time."
    )
    meta_clip_norm: float | None = setting(
        None, "Clip the global norm of the meta-gradient to this.", shown="no clipping", positive=True, at_most=1e30
    )
    meta_clip_value: float | None = setting(
        None,
        "Clip each element of the meta-gradient to between minus and plus this.",
        shown="no clipping",
        positive=True,
        at_most=1e30,
    )
    meta_lr: float | None = setting(
        None, "Initial outer learning rate (beta).", shown=str(META_LR), positive=True, at_most=10**6
    )
    meta_optimizer: str = setting("adam", "Optimizer of the outer loop.", choices=("adam", "sgd"))
    meta_schedule: str = setting(
        "cosine",
        "Schedule of the outer learning rate: a cosine that falls to a hundredth, or constant.",
        choices=("cosine", "constant"),
    )
    meta_batch_size: int = setting(16, "Episodes in an outer step.", at_least=1, at_most=2**16)
    # The bound is that of torch's generators.
    seed: int = setting(0, "Seed of the initial weights and of the order of episodes.", at_least=0, at_most=2**64 - 1)
    eval_every: int = setting(500, "Outer steps between validations; each saves a checkpoint.", at_least=1)
    # A confidence interval needs two.
    eval_episodes: int = setting(200, "Episodes in a validation.", shown="200, or all if fewer", at_least=2)
    log_every: int = setting(50, "Outer steps between progress lines.", at_least=1)
    device: str = setting(
        "auto",
        "Device to train on; auto is the first available of cuda, mps and cpu.",
        choices=("auto", "cpu", "cuda", "mps"),
    )
    engine: str = setting(
        "auto",
        "Engine that computes meta-gradients.",
        shown="auto: graphed on CUDA, loop elsewhere",
        choices=("auto", "loop", "vmap", "higher", "graphed"),
    )
    compile: bool = setting(
        False, "Compile the engine vmap or graphed with torch's Inductor, which takes minutes at the start."
    )
    precision: Precision | None = setting(
        None, "Precision of the arithmetic.", shown="fp32", choices=("fp32", "tf32", "bf16")
    )
    tensorboard: bool = setting(False, "Also write metrics for TensorBoard.")

    def __post_init__(self) -> None:
        given = [(one, getattr(self, one.name)) for one in SETTINGS.values()]
        faults = [f"{one.name} must be {valid}, not {value!r}." for one, value in given if (valid := one.fault(value))]
        if all(one.takes(value) for one, value in given):
            faults += self._conflicts()
        if faults:
            raise RequestError("Invalid training settings:\n" + "\n".join(f"  {fault}" for fault in faults))

    def _conflicts(self) -> Iterator[str]:
        if self.filters is not None and (self.network == "resnet18" or is_own(self.network)):
            yield f"filters is not for the network {self.network}, whose widths are fixed."
        if self.meta_clip_norm is not None and self.meta_clip_value is not None:
            yield "meta_clip_norm and meta_clip_value cannot both be set: use one of them."
        if self.point.classifier == "prototypes":
            given = [name for name in OF_INNER_STEPS if getattr(self, name) != getattr(TrainSettings, name)]
            yield from (f"{name} has no effect with {self.algorithm}, which has no inner loop." for name in given)
            if self.engine == "higher":
                yield f"engine cannot be higher with {self.algorithm}: it has no inner loop. Use the engine loop."
        elif self.support_batches > max(self.inner_steps, 1):
            yield (
                f"support_batches must be at most inner_steps ({self.inner_steps}), not {self.support_batches}: "
                "the rest would never be used."
            )
        yield from objections(self.point, first_order_epochs=self.first_order_epochs)
        if self.msl_epochs is not None and self.point.loss == "final":
            yield "msl_epochs is for the loss multi-step, but the loss is final."
        if self.msl_epochs is not None and self.point.loss == "multi-step" and self.inner_steps == 1:
            yield "msl_epochs has no effect with one inner step, which is always the last one."
        epochs_count = self.first_order_epochs or self.point.loss == "multi-step"
        if self.epoch_steps != TrainSettings.epoch_steps and not epochs_count:
            yield "epoch_steps is for first_order_epochs and for the loss multi-step, but neither is set."
        if self.engine == "higher" and self.point.bn in {"per-step", "frozen"}:
            yield f"The engine higher does not support bn {self.point.bn}. Use the engine loop."
        if self.engine == "higher" and self.precision == "bf16":
            yield "The engine higher does not support precision bf16. Use the engine loop."
        if self.precision == "tf32" and self.device in {"cpu", "mps"}:
            yield f"precision cannot be tf32 with device {self.device}: only CUDA devices have it."
        if self.checkpoint_inner and self.point.order == "first":
            yield "checkpoint_inner has no effect with order first, which keeps no graph of the inner loop."
        if self.checkpoint_inner and self.engine not in {"auto", "loop"}:
            yield f"checkpoint_inner is for the engine loop, not {self.engine}."
        if self.engine == "graphed" and self.device in {"cpu", "mps"}:
            yield f"engine cannot be graphed with device {self.device}: only CUDA devices have graphs."
        if self.compile and self.engine not in {"auto", "vmap", "graphed"}:
            yield f"compile is for the engines vmap and graphed, not {self.engine}."
        if self.compile and self.precision == "bf16":
            yield "compile does not support precision bf16, whose autocast torch's compiler does not know."
        if self.compile and self.checkpoint_inner:
            yield "compile and checkpoint_inner cannot both be set: checkpoint_inner is for the engine loop."
        clips = self.meta_clip_norm is not None or self.meta_clip_value is not None
        if clips and self.point.outer == "none":
            yield f"{self.algorithm} has no meta-gradient to clip."
        if self.engine != "auto" and self.point.outer in {"joint", "none"}:
            yield f"engine has no effect with {self.algorithm}, which has no inner loop in training."
        if self.compile and self.point.outer in {"joint", "none"}:
            yield f"compile has no effect with {self.algorithm}, which has no inner loop in training."

    @property
    def point(self) -> Algorithm:
        """The algorithm, with the parts that the settings replace."""
        given = {name: getattr(self, name) for name in COORDINATES}
        return replace(ALGORITHMS[self.algorithm], **{name: value for name, value in given.items() if value})

    def resolved(self) -> dict[str, Any]:
        """All settings as plain values, with the algorithm's own for those not given: equal for equal runs."""
        own = {name: getattr(self.point, name) for name in COORDINATES}
        inner_lr = None if self.point.classifier == "prototypes" else self.alpha
        return {**asdict(self), "inner_lr": inner_lr, "meta_lr": self.beta, **own}

    def for_images(self, about: Mapping[str, Any]) -> TrainSettings:
        """The settings, with the defaults for these images where none are given.

        Colour images have the network of Finn et al. 2017 for MiniImagenet, whose head has a feature for each place
        and so needs a lower inner rate, and are normalized, as is usual for them.

        Args:
            about: describes the episodes, see ``TrainData.describe``.
        """
        shape: Sequence[int] = about["image_shape"]
        own: dict[str, Any] = {"network": "conv4", "normalize": False}
        if len(shape) == 3 and shape[2] == 3 and min(shape[:2]) >= SMALLEST_POOLED:
            own = {"network": "conv4-pool", "normalize": about.get("normalisation") is not None}
        own = {name: value for name, value in own.items() if getattr(self, name) is None}
        if own.get("network") == "conv4-pool" and self.inner_lr is None and self.point.bn != "frozen":
            own |= {"inner_lr": INNER_LR_POOLED} if self.point.classifier == "head" else {}
        return replace(self, **own)

    @property
    def alpha(self) -> float:
        """The inner learning rate: as given, or the default of the batch norm."""
        return self.inner_lr or (INNER_LR_FROZEN if self.point.bn == "frozen" else INNER_LR)

    @property
    def beta(self) -> float:
        """The initial outer learning rate: as given, or the default."""
        return self.meta_lr or META_LR

    @property
    def outer_steps(self) -> int:
        """The number of outer steps: 0 for an algorithm that learns nothing."""
        return 0 if self.point.outer == "none" else self.steps

    def meta_lr_at(self, step: int) -> float:
        """The outer learning rate of a step, counted from 0; a pure function, so that resuming needs no state.

        Loshchilov and Hutter 2017, "SGDR", equation 5, with one period of ``steps``.
        """
        if self.meta_schedule == "constant":
            return self.beta
        lowest = self.beta / 100
        return lowest + (self.beta - lowest) * (1 + math.cos(math.pi * step / self.steps)) / 2

    def inner_loop(self, step: int = 0) -> InnerLoop:
        """How the network adapts in an outer step, counted from 0."""
        early = step < self.first_order_epochs * self.epoch_steps
        return self._inner_loop(self.inner_steps, "first" if early else self.point.order)

    def inner_loop_at_test(self) -> InnerLoop:
        """How the network adapts in evaluation."""
        learned = self.point.rates != "fixed" or self.point.bn == "per-step"
        least = self.inner_steps if learned else max(3, self.inner_steps)
        return self._inner_loop(self.eval_inner_steps or least, "first")

    def _inner_loop(self, steps: int, order: Order) -> InnerLoop:
        point = replace(self.point, order=order)
        if point.classifier == "prototypes":
            return InnerLoop(0, 0.0, point.order, point.bn, classifier=point.classifier)
        coordinates = {name: getattr(point, name) for name in COORDINATES if name in _OF_INNER_LOOP}
        checkpoint = self.checkpoint_inner and order == "second"
        return InnerLoop(steps, self.alpha, support_batches=self.support_batches, checkpoint=checkpoint, **coordinates)

    def objective(self, step: int) -> Objective:
        """The objective of an outer step, counted from 0."""
        from trainer.maml.objective import Objective, step_weights

        if self.point.loss == "final":
            return Objective(self.point.outer)
        weights = step_weights(self.inner_steps, step // self.epoch_steps, self.msl_epochs or MSL_EPOCHS)
        return Objective(self.point.outer, weights)


SETTINGS = {
    one.name: Setting(one.name, str(one.type).partition(" ")[0], one.default, **one.metadata)
    for one in fields(TrainSettings)
}


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their current names."""
    return {OLD_NAMES.get(name, name): value for name, value in values.items()}


def saved_settings(values: Mapping[str, Any], place: Path) -> TrainSettings:
    """Settings from a file, as ``TrainSettings.resolved`` gives them; a missing one gets its default.

    Args:
        values: the settings in the file.
        place: the file.

    Raises:
        RequestError: settings are unknown or invalid.
    """
    values = renamed(values)
    if unknown := sorted(values.keys() - SETTINGS.keys()):
        raise RequestError(
            f"{place} has unknown settings: {', '.join(unknown)}. Another version of this trainer wrote it; use that "
            "version."
        )
    try:
        return TrainSettings(**values)
    except RequestError as error:
        raise RequestError(f"{place}: {error}") from error


def pick_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the best one available.

    Raises:
        RequestError: the device is not available.
    """
    import torch

    from mamldata.streaming.device import why_no_gpu

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, available in there.items() if available))
    if not there[name]:
        present = ", ".join(kind for kind, available in there.items() if available)
        why = why_no_gpu() if name == "cuda" else ""
        raise RequestError(f"This machine has no device {name!r}. Available: {present}.{why}")
    return torch.device(name)
