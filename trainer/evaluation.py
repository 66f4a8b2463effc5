"""The evaluator, used both for validation during training and for final results."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamldata.errors import RequestError
from mamldata.sampling.normalization import Normalization
from mamldata.streaming.batch import EpisodeBatch
from mamldata.words import counted
from trainer.intervals import half_width
from trainer.maml.adapt import Method, adapt
from trainer.maml.algorithms import InnerLoop
from trainer.maml.losses import loss_of, score_of
from trainer.maml.parameters import Episode, MetaParameters, episodes
from trainer.maml.variants import method_of
from trainer.networks.precision import pick_precision, precision_of, set_precision
from trainer.protocol import TrainData
from trainer.runs.checkpoint import Checkpoint, find_checkpoint
from trainer.settings import pick_device, saved_settings
from trainer.system.distributed import ALONE, World
from trainer.system.malloc import keep_large_buffers
from trainer.system.threads import each_task, limited_threads


@dataclass(frozen=True)
class Evaluation:
    """A result, with everything needed to compare it with another one.

    Attributes:
        accuracy: query accuracy after the last inner step, mean over the episodes, in [0, 1].
        interval: half the width of its 95 % confidence interval, ``t * s / sqrt(episodes)``, where ``s`` is the
            sample standard deviation over episodes (divisor ``episodes - 1``), and ``t`` is Student's quantile, 1.96
            for many episodes; see ``trainer.intervals``.
        loss: query loss after the last inner step, mean over the episodes, in nats.
        accuracy_by_step: mean accuracy before adaptation and after each inner step.
        episodes: their number.
        bn, inner_steps, inner_lr, rates: how the network adapted; see ``InnerLoop``.
        precision: of its arithmetic, one of ``PRECISIONS``.
        dataset, split_scheme, split, n_way, k_shot, k_query: describe the episodes.
        accuracy_by_episode: after the last inner step, in the episodes' order, so that two results on the same
            episodes can be compared pair by pair; not in ``to_json``.
        trained_on: the training data, if its dataset, split scheme or number of shots differs; otherwise None.
    """

    accuracy: float
    interval: float
    loss: float
    accuracy_by_step: tuple[float, ...]
    episodes: int
    bn: str
    inner_steps: int
    inner_lr: float
    rates: str
    precision: str
    dataset: str
    split_scheme: str
    split: str
    n_way: int
    k_shot: int
    k_query: int
    accuracy_by_episode: tuple[float, ...] = field(repr=False)
    trained_on: str | None = None

    @property
    def deviation(self) -> float:
        """The sample standard deviation of the accuracy over episodes."""
        return statistics.stdev(self.accuracy_by_episode)

    def to_json(self) -> dict[str, Any]:
        """As a dict of plain values; ``trained_on`` only if it is not None."""
        values = asdict(self)
        del values["accuracy_by_episode"]
        if self.trained_on is None:
            del values["trained_on"]
        return values

    def __str__(self) -> str:
        return (
            f"{100 * self.accuracy:.2f} % ± {100 * self.interval:.2f} (95 % interval, "
            f"{counted(self.episodes, 'episode')}): "
            f"{self.dataset}, split scheme {self.split_scheme}, {self.split}, {self.n_way}-way {self.k_shot}-shot, "
            f"{counted(self.inner_steps, 'inner step')}, batch norm {self.bn}, "
            f"{self.precision}, single model{f', trained on {self.trained_on}' if self.trained_on else ''}"
        )


def evaluate_network(
    network: nn.Module,
    batches: Iterable[EpisodeBatch],
    inner: InnerLoop,
    data: dict[str, Any],
    split: str,
    learned: MetaParameters | None = None,
    world: World = ALONE,
) -> Evaluation:
    """Adapt to each episode separately and measure on its query set. The network is not changed.

    On a CPU, torch's threads each work on an episode of a batch; see ``each_task``. No graph outlives an inner step
    and nothing is kept from one episode to the next, so memory does not grow with the episodes.

    Args:
        network: on the device of the episodes.
        batches: one pass over the episodes; with several processes, over this one's part.
        inner: how to adapt; its order makes no difference here.
        data: describes the episodes, see ``TrainData.describe``.
        split: the episodes' split.
        learned: with the rates and per-step norms that ``inner`` asks for.
        world: the processes that evaluate together; all get the whole result.

    Raises:
        RequestError: there are fewer than two episodes, too few for an interval.
    """
    parameters = (learned or MetaParameters({}))._replace(weights=dict(network.named_parameters()), joint={})
    method = method_of(network, inner)

    def one(own: nn.Module, episode: Episode) -> Tensor:
        with torch.no_grad():  # the mode is per thread
            return measure(own, parameters, episode, method)

    rows: list[Tensor] = []
    index: list[Tensor] = []
    with world.together():
        for batch in batches:
            rows += each_task(one, network, list(episodes(batch)), batch.support_x.device)
            index.append(batch.index)
    # [episodes, 1 + inner.steps + 1]; with several processes, one's part can be empty.
    table = torch.stack(rows).cpu().double() if rows else torch.empty(0, inner.steps + 2, dtype=torch.float64)
    if world.world_size > 1:
        # In the order of the episodes, so that sums are bit-identical for any number of processes.
        parts = world.gather((torch.cat(index).cpu() if index else torch.empty(0, dtype=torch.int64), table))
        order = torch.cat([places for places, _ in parts]).argsort()
        table = torch.cat([measured for _, measured in parts])[order]
    if len(table) < 2:
        raise RequestError(f"An accuracy with an interval takes at least 2 episodes, not {len(table)}.")
    accuracies = table[:, 1:]
    return Evaluation(
        accuracy=accuracies[:, -1].mean().item(),
        interval=half_width(accuracies[:, -1].std(correction=1).item(), len(table)),
        loss=table[:, 0].mean().item(),
        accuracy_by_step=tuple(accuracies.mean(0).tolist()),
        episodes=len(table),
        bn=inner.bn,
        inner_steps=inner.steps,
        inner_lr=inner.lr,
        rates=inner.rates,
        precision=precision_of(network),
        split=split,
        accuracy_by_episode=tuple(accuracies[:, -1].tolist()),
        **{key: data[key] for key in ("dataset", "split_scheme", "n_way", "k_shot", "k_query")},
    )


def measure(network: nn.Module, parameters: MetaParameters, episode: Episode, method: Method) -> Tensor:
    """Query loss after adaptation, then the score before adaptation and after each step: ``[steps + 2]``.

    The score is the query set's accuracy, or its squared error where the answers are numbers.
    """
    network, parameters, episode = method.shortcut(network, parameters, episode, method)
    path = adapt(network, parameters, episode, method)
    logits = [method.query_logits(network, fast, episode, method) for fast in path]
    task_loss = method.inner.task_loss
    loss = loss_of(logits[-1], episode.query_y, task_loss)
    return torch.stack([loss, *(score_of(step, episode.query_y, task_loss).to(loss.dtype) for step in logits)])


def measure_together(network: nn.Module, parameters: MetaParameters, batch: EpisodeBatch, inner: InnerLoop) -> Tensor:
    """``measure`` for all episodes at once, ``[B, steps + 2]``, by ``torch.func.vmap``.

    Many times faster than one episode after the other for networks as small as the sinusoid problem's.
    """
    method = method_of(network, inner, "vmap")

    def one(*parts: Tensor) -> Tensor:
        return measure(network, parameters, Episode(*parts), method)

    with torch.no_grad():
        rows: Tensor = torch.func.vmap(one)(*batch[:4])
    return rows


def evaluate(
    place: Path | str,
    data: TrainData,
    *,
    split: str = "test",
    episodes: int = 600,
    inner_steps: int | None = None,
    device: str = "auto",
    world: World = ALONE,
) -> Evaluation:
    """Evaluate a checkpoint, or the best one of a run folder.

    Images are transformed as in training: with ``normalize``, by the mean and deviation of the training data, also
    if the evaluation is on other data.

    Args:
        place: file or folder.
        data: the episodes.
        split: of the data.
        episodes: their number, at least 2; 600 is customary.
        inner_steps: 0 measures the initialization itself; None takes the number used in validation.
        device: see ``TrainSettings``.
        world: the processes that evaluate together, as ``trainer.joined`` gives it; all get the result.

    Raises:
        RequestError: not a checkpoint of this trainer, its network does not fit the data, or a number is invalid.
        DamagedError: the checkpoint is damaged.
    """
    if episodes < 2:
        raise RequestError(f"episodes must be at least 2, not {episodes}: fewer give no interval.")
    if inner_steps is not None and inner_steps < 0:
        raise RequestError(f"inner_steps must be at least 0, not {inner_steps}.")

    path, checkpoint = world.from_first(lambda: find_checkpoint(Path(place)))
    with world.together():
        about = data.describe()
        require_fit(path, checkpoint, about)
        settings = saved_settings(checkpoint.settings, path)
        normalize = settings.normalize and _normalisation_of(path, checkpoint, about)
        inner = settings.inner_loop_at_test()
        if inner_steps is not None:
            inner = replace(inner, steps=inner_steps)
        inner.require_shots(about["k_shot"])
        keep_large_buffers()
        where = world.device(pick_device(device))
        # So that each process gets an episode of every meta-batch; its size makes no difference here.
        size = max(settings.meta_batch_size, world.world_size)
        batches = data.eval(
            split, episodes, size, where, normalize=normalize, rank=world.rank, world_size=world.world_size
        )
        network, learned = checkpoint.restored(path, where)
        # Runs trained in tf32 are evaluated in fp32 where tf32 is not available.
        set_precision(network, pick_precision(None if settings.precision == "tf32" else settings.precision, where))
    with limited_threads():
        evaluation = evaluate_network(network, batches, inner, about, split, learned, world)
    return replace(evaluation, trained_on=_origin(checkpoint.data, about))


def require_fit(path: Path, checkpoint: Checkpoint, about: Mapping[str, Any]) -> None:
    """Check that a checkpoint's network takes episodes.

    Args:
        path: of the checkpoint, for the message.
        checkpoint: with the network.
        about: describes the episodes: at least their ``n_way`` and ``image_shape``.

    Raises:
        RequestError: it was trained with another number of ways or shape of images.
    """
    for key in ("n_way", "image_shape"):
        here, there = about[key], checkpoint.data.get(key)
        if here != there:
            raise RequestError(f"{path} was trained with {key} {there}, but these episodes have {here}.")


def _origin(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """A network's training data, if it is evaluated on something else, such as another split scheme."""
    if all(there[key] == here[key] for key in ("dataset", "split_scheme", "k_shot")):
        return None
    return f"{there['dataset']}, split scheme {there['split_scheme']}, {there['n_way']}-way {there['k_shot']}-shot"


def _normalisation_of(path: Path, checkpoint: Checkpoint, about: dict[str, Any]) -> bool | Normalization:
    """The statistics that normalized the training images.

    Raises:
        RequestError: the checkpoint does not hold them, and these are other data.
    """
    if (known := checkpoint.data.get("normalisation")) is not None:
        return Normalization(tuple(known["mean"]), tuple(known["std"]))
    # The first checkpoints do not hold them, but the data that they were trained on do.
    if any(checkpoint.data[key] != about[key] for key in ("digest", "split_scheme")):
        raise RequestError(
            f"{path} was trained on normalized images, but does not record their mean and deviation. Evaluate it on "
            f"the data that it was trained on: {checkpoint.data['dataset']}, split scheme "
            f"{checkpoint.data['split_scheme']}, digest {checkpoint.data['digest']}."
        )
    return True
