"""The algorithms, as points in a small space that share one loop, and their inner loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mamldata.errors import RequestError

Order = Literal["first", "second"]
BatchNorm = Literal["transductive", "per-step", "support", "frozen"]
Loss = Literal["final", "multi-step"]
Rates = Literal["fixed", "layer-step", "parameter"]
Adapts = Literal["all", "all-but-norms", "head"]
InnerLoss = Literal["mean", "class-sum"]
Outer = Literal["query", "reptile", "joint", "none"]
TaskLoss = Literal["cross-entropy", "squared-error"]
Classifier = Literal["head", "prototypes"]

ORDERS: tuple[Order, ...] = ("first", "second")
BN_MODES: tuple[BatchNorm, ...] = ("transductive", "per-step", "support", "frozen")
LOSSES: tuple[Loss, ...] = ("final", "multi-step")
RATES: tuple[Rates, ...] = ("fixed", "layer-step", "parameter")
ADAPTS: tuple[Adapts, ...] = ("all", "all-but-norms", "head")
INNER_LOSSES: tuple[InnerLoss, ...] = ("mean", "class-sum")


@dataclass(frozen=True)
class InnerLoop:
    """How a network adapts to an episode.

    Attributes:
        steps: of gradient descent on the support set; 0 with ``prototypes``.
        lr: the inner learning rate, alpha in Finn et al. 2017; the initial value of learned rates.
        order: ``first`` treats the inner gradients as constants.
        bn: the source of the statistics that normalize query images: ``transductive``, all query images of the
            episode together; ``support``, the support images alone, so that query images do not affect one another;
            ``frozen``, the support images before the first step, whose statistics are also used in the inner steps;
            ``per-step``, as transductive, but each step has its own scale and shift, which the outer loop learns and
            the inner loop does not change (Antoniou et al. 2019, section 4).
        rates: ``fixed``, or learned for each ``layer-step`` or ``parameter``; see ``Algorithm``.
        adapts: ``all``; ``all-but-norms``, whose scales and shifts only the outer loop changes; or the ``head`` alone.
        inner_loss: scale of the loss that a step descends on: the ``mean`` over the support images; or ``class-sum``,
            the mean of each class summed over the classes, which is ``n_way`` times the mean. For classes only.
        support_batches: divide the support set into this many batches of equal shots, of which each step takes the
            next one; must divide k_shot.
        checkpoint: keep only the weights of each step, not its graph, and recompute each step for the gradient,
            which is then equal up to rounding; for second order with the engine loop.
        task_loss: of the support and of the query set: ``cross-entropy`` if the answers are classes,
            ``squared-error`` if they are numbers.
        classifier: of query images: the network's ``head``; or ``prototypes``, the class means of the support images'
            embeddings. Then ``transductive`` normalizes by support and query images together.
        n_way: number of classes of the episodes, for ``prototypes``; None: as the labels say, which cannot be read
            under ``torch.func.vmap``.

    Raises:
        RequestError: ``class-sum`` with answers that are numbers.
    """

    steps: int
    lr: float
    order: Order
    bn: BatchNorm
    rates: Rates = "fixed"
    adapts: Adapts = "all"
    inner_loss: InnerLoss = "mean"
    support_batches: int = 1
    checkpoint: bool = False
    task_loss: TaskLoss = "cross-entropy"
    classifier: Classifier = "head"
    n_way: int | None = None

    def __post_init__(self) -> None:
        if self.inner_loss == "class-sum" and self.task_loss != "cross-entropy":
            raise RequestError(f"inner_loss class-sum is for classes, but the loss is {self.task_loss}. Use mean.")

    def require_shots(self, k_shot: int) -> None:
        """Check that a class's support images can be divided evenly among the batches.

        Raises:
            RequestError: they cannot be.
        """
        if k_shot % self.support_batches:
            raise RequestError(
                f"k_shot is {k_shot}, which cannot be divided into {self.support_batches} support batches. Use "
                f"episodes whose k_shot is a multiple of {self.support_batches}, or change support_batches."
            )


@dataclass(frozen=True)
class Algorithm:
    """One way of meta-learning.

    Attributes:
        name: in settings and in the names of checkpoints.
        order: ``second`` differentiates through the inner loop; ``first`` treats its gradients as constants.
        outer: what the outer loop follows: ``query``, the gradient of the query loss; ``reptile``, the difference
            between the initial and the adapted weights; ``joint``, the gradient of a plain classifier over all
            training classes; ``none``, nothing, so that the weights keep their initial values.
        loss: the query loss after the ``final`` inner step, or ``multi-step``, a weighted sum over all steps.
        rates: inner learning rates: ``fixed``; learned, one for each ``layer-step`` (tensor of the network and inner
            step); or learned, one for each ``parameter`` (single number of the network), for all steps.
        adapts: what the inner loop changes: ``all``, ``all-but-norms``, or the ``head`` alone.
        bn: the default batch norm; see ``InnerLoop``.
        inner_loss: the scale of the inner loss: ``mean`` or ``class-sum``; see ``InnerLoop``.
        classifier: ``head``; or ``prototypes``, without an inner loop, for any number of classes; see ``InnerLoop``.
    """

    name: str
    order: Order
    outer: Outer = "query"
    loss: Loss = "final"
    rates: Rates = "fixed"
    adapts: Adapts = "all"
    bn: BatchNorm = "transductive"
    inner_loss: InnerLoss = "mean"
    classifier: Classifier = "head"


_ALL = (
    # Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017,
    # https://arxiv.org/abs/1703.03400, algorithm 2; FOMAML is the approximation of its section 5.2.
    Algorithm("maml", order="second"),
    Algorithm("fomaml", order="first"),
    # Antoniou, Edwards, Storkey, "How to train your MAML", 2019, https://arxiv.org/abs/1810.09502.
    Algorithm("maml++", order="second", loss="multi-step", rates="layer-step", bn="per-step"),
    # Raghu, Raghu, Bengio, Vinyals, "Rapid Learning or Feature Reuse?", 2020, https://arxiv.org/abs/1909.09157.
    Algorithm("anil", order="second", adapts="head"),
    # Li, Zhou, Chen, Li, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", 2017,
    # https://arxiv.org/abs/1707.09835, algorithm 1.
    Algorithm("meta-sgd", order="second", rates="parameter"),
    # Nichol, Achiam, Schulman, "On First-Order Meta-Learning Algorithms", 2018, https://arxiv.org/abs/1803.02999,
    # algorithm 2.
    Algorithm("reptile", order="first", outer="reptile"),
    # Snell, Swersky, Zemel, "Prototypical Networks for Few-shot Learning", 2017, https://arxiv.org/abs/1703.05175,
    # algorithm 1.
    Algorithm("protonet", order="first", classifier="prototypes"),
    # Baselines: without meta-learning, and without any prior learning.
    Algorithm("pretrain", order="first", outer="joint", adapts="head"),
    Algorithm("random", order="first", outer="none"),
)

ALGORITHMS = {algorithm.name: algorithm for algorithm in _ALL}


def objections(algorithm: Algorithm, *, first_order_epochs: int) -> list[str]:
    """Reasons why the combination of parts is invalid; empty if it is valid.

    Args:
        algorithm: with the settings that replace parts of it.
        first_order_epochs: epochs at the start for which the order is ``first``.
    """
    found = []
    learns = algorithm.outer == "query"
    if not learns and algorithm.order == "second":
        found.append(f"order cannot be second with {algorithm.name}: it takes no gradient through the inner loop.")
    if not learns and algorithm.loss == "multi-step":
        found.append(f"loss cannot be multi-step with {algorithm.name}: it uses no query loss.")
    if not learns and algorithm.rates != "fixed":
        found.append(f"rates cannot be {algorithm.rates} with {algorithm.name}: it would not learn them.")
    if not learns and algorithm.bn == "per-step":
        found.append(f"bn cannot be per-step with {algorithm.name}: it would not learn each step's scale and shift.")
    if algorithm.outer == "reptile" and algorithm.adapts == "all-but-norms":
        found.append(f"adapts cannot be all-but-norms with {algorithm.name}: it would not learn scales and shifts.")
    if algorithm.classifier == "prototypes":
        own = ALGORITHMS[algorithm.name]
        found += [
            f"{name} cannot be {value} with {algorithm.name}: it has no inner loop."
            for name in ("order", "loss", "rates", "adapts", "inner_loss", "bn")
            if (value := getattr(algorithm, name)) not in {getattr(own, name), "support"}
        ]
    elif learns and (algorithm.bn, algorithm.order, algorithm.loss) == ("per-step", "first", "final"):
        found.append(
            "bn cannot be per-step with order first and loss final: only the last step's scale and shift would be "
            "learned. Use order second or loss multi-step."
        )
    if algorithm.order == "first" and first_order_epochs:
        found.append("first_order_epochs must be 0 with order first: the order never changes to second.")
    return found
