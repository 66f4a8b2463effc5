"""The evaluator, used both for validation during training and for final results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mamldata.errors import ImageShapeError, RequestError, StoppedError
from mamldata.progress import Progress, silent
from mamldata.sampling.normalization import Normalization
from mamldata.streaming.batch import EpisodeBatch
from mamldata.words import counted
from trainer.intervals import half_width
from trainer.maml.adapt import Method, adaptation
from trainer.maml.algorithms import InnerLoop
from trainer.maml.losses import loss_of, score_of
from trainer.maml.parameters import Episode, MetaParameters, episodes
from trainer.maml.variants import method_of
from trainer.networks.precision import arithmetic, pick_precision, precision_of, set_precision
from trainer.protocol import NamesClasses, TrainData
from trainer.runs.checkpoint import Checkpoint, find_checkpoint
from trainer.runs.folder import environment
from trainer.settings import pick_device, saved_settings
from trainer.system.distributed import ALONE, World
from trainer.system.gpu import enough_memory
from trainer.system.malloc import keep_large_buffers
from trainer.system.signals import BrokenOffError, Stop, stop_at_signals
from trainer.system.threads import each_task, limited_threads

_LESS_MEMORY = "adapting to an episode. Free some of it, or evaluate on the device cpu."
AT_ONCE = {"cuda"}  # kinds of devices that are faster with all episodes of a meta-batch at once
# Of an inner loop that does not diverge. Trained networks have logits below a hundred and losses below guessing.
LARGEST_LOGIT, LARGEST_LOSS = 1e4, 10.0  # the loss is in times that of guessing, ln(n_way)


@dataclass(frozen=True)
class Origin:
    """Where an evaluation comes from.

    Attributes:
        checkpoint: its file.
        step: outer steps that it was trained for.
        settings: of its run, by ``TrainSettings.resolved``.
        target: the episodes that it was evaluated on, by ``TrainData.describe``.
        environment: versions, device, hardware, threads and processes.
        class_names: of each episode's classes, by label; None if the data do not name them.
    """

    checkpoint: Path
    step: int
    settings: dict[str, Any]
    target: dict[str, Any]
    environment: dict[str, Any]
    class_names: Sequence[Sequence[str]] | None


@dataclass(frozen=True, eq=False)
class Answers:
    """Every answer of an evaluation: E episodes of Q query images, S inner steps.

    Attributes:
        index: the episodes' indices in their split, int64 ``[E]``, ascending.
        true: the label of each query image, int64 ``[E, Q]``.
        given: the label that it was given after the last step, int64 ``[E, Q]``.
        right: the number of right answers before adaptation and after each step, int64 ``[E, S + 1]``.
        losses: the mean query loss before adaptation and after each step, in nats, float64 ``[E, S + 1]``.
        largest: the largest size of each episode's logits after the last step, float64 ``[E]``.
    """

    index: npt.NDArray[np.int64]
    true: npt.NDArray[np.int64]
    given: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float64]
    largest: npt.NDArray[np.float64]

    @staticmethod
    def joined(parts: Sequence[Answers]) -> Answers:
        """The answers of several parts of the episodes, in the order of the episodes."""
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in Answers.__annotations__}
        order = columns["index"].argsort(kind="stable")
        return Answers(**{name: column[order] for name, column in columns.items()})


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
        trained_on: the training data, if its dataset, split scheme, ways or shots differ; otherwise None.
        fitted_from: the shape (H, W, C) that images had before they were fitted to the network; None if they were not.
        answers: to each query image; not in ``to_json``.
        origin: of ``evaluate``: the checkpoint, its settings, the data and the environment; not in ``to_json``.
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
    fitted_from: tuple[int, ...] | None = None
    answers: Answers | None = field(default=None, repr=False, compare=False)
    origin: Origin | None = field(default=None, repr=False, compare=False)

    @property
    def deviation(self) -> float:
        """The sample standard deviation of the accuracy over episodes."""
        return statistics.stdev(self.accuracy_by_episode)

    @property
    def doubt(self) -> str | None:
        """Why the accuracy says little: logits that are not finite, or too large or too wrong to come from learning.

        None without inner steps, which alone can diverge.
        """
        if self.answers is None or not self.inner_steps:
            return None
        logits, losses = self.answers.largest, self.answers.losses[:, -1]
        wild = ~((logits <= LARGEST_LOGIT) & (losses <= LARGEST_LOSS * math.log(self.n_way)))
        if not wild.any():
            return None
        return (
            f"In {wild.sum()} of {self.episodes} {self.split} episodes the inner loop diverges: logits after "
            f"adaptation of up to {logits.max():.2g}, and losses of up to {losses.max():.2g} nats, where guessing has "
            f"{math.log(self.n_way):.2g}. A lower inner_lr, fewer inner steps or another bn than {self.bn} may help."
        )

    def to_json(self) -> dict[str, Any]:
        """As a dict of plain values; ``trained_on`` and ``fitted_from`` only if they are not None."""
        left_out = {"accuracy_by_episode", "answers", "origin"}
        return {name: value for name, value in vars(self).items() if name not in left_out and value is not None}

    def __str__(self) -> str:
        fitted = "x".join(map(str, self.fitted_from or ()))
        return (
            f"{100 * self.accuracy:.2f} % ± {100 * self.interval:.2f} (95 % interval, "
            f"{counted(self.episodes, 'episode')}): "
            f"{self.dataset}, split scheme {self.split_scheme}, {self.split}, {self.n_way}-way {self.k_shot}-shot, "
            f"{counted(self.inner_steps, 'inner step')}, batch norm {self.bn}, "
            f"{self.precision}, single model{f', trained on {self.trained_on}' if self.trained_on else ''}"
            f"{f', images fitted from {fitted}' if fitted else ''}"
        )


def evaluate_network(
    network: nn.Module,
    batches: Iterable[EpisodeBatch],
    inner: InnerLoop,
    data: dict[str, Any],
    split: str,
    learned: MetaParameters | None = None,
    world: World = ALONE,
    stop: Stop | None = None,
) -> Evaluation:
    """Adapt to each episode separately and measure on its query set. The network is not changed.

    On a CPU, torch's threads each work on an episode of a batch; see ``each_task``. On CUDA all episodes of a batch
    are adapted to at once, if memory allows it, since each launch of a kernel costs the same for all as for one. Of
    an episode only its answers are kept, and of an inner step neither graph nor weights, so memory hardly grows with
    episodes and steps.

    Args:
        network: on the device of the episodes.
        batches: one pass over the episodes; with several processes, over this one's part.
        inner: how to adapt, to classes; its order makes no difference here.
        data: describes the episodes, see ``TrainData.describe``.
        split: the episodes' split.
        learned: with the rates and per-step norms that ``inner`` asks for.
        world: the processes that evaluate together; all get the whole result.
        stop: whether to stop; a process that is asked to stops before the next inner step, and tells the others
            after their part of the same meta-batch.

    Raises:
        RequestError: there are fewer than two episodes, too few for an interval; or a GPU has too little memory for
            one.
        StoppedError: a process was asked to stop.
    """
    inner = replace(inner, n_way=data["n_way"])
    parameters = (learned or MetaParameters({}))._replace(weights=dict(network.named_parameters()), joint={})
    device = next(network.parameters()).device
    stop = stop or Stop()

    def one(own: nn.Module, episode: Episode, method: Method) -> _Measured:
        with torch.no_grad():  # the mode is per thread
            return _measure_classes(own, parameters, episode, method, stop.break_off)

    def measured(batch: EpisodeBatch) -> list[_Measured]:
        if device.type in AT_ONCE:
            with suppress(RuntimeError):  # of memory, or of an operation that vmap lacks: then one after the other
                method = method_of(network, inner, "vmap")
                columns = torch.func.vmap(lambda *parts: one(network, Episode(*parts), method))(*batch[:4])
                return [_Measured(*row) for row in zip(*columns, strict=True)]
        method = method_of(network, inner)
        return list(each_task(partial(one, method=method), network, list(episodes(batch)), device))

    parts: list[Answers] = []
    rounds, done = iter(batches), False
    while not done:
        with world.together(stop):
            batch = next(rounds, None)
            if batch is not None:
                with suppress(BrokenOffError), arithmetic(network, device), enough_memory(_LESS_MEMORY):
                    parts += _answers(batch, measured(batch)) if len(batch.index) else []
        done = world.all(batch is None)
        if stop.agreed and not done:
            raise StoppedError(f"Stopped by {stop.agreed} amid an evaluation, of which nothing is kept.")
    answers = [part for parts in world.gather(parts) for part in parts]
    if (count := sum(len(part.index) for part in answers)) < 2:
        raise RequestError(f"An accuracy with an interval takes at least 2 episodes, not {count}.")
    return _summary(Answers.joined(answers), inner, data, split, precision_of(network))


def counting(
    batches: Iterable[EpisodeBatch], split: str, episodes: int, progress: Progress, world: World
) -> Iterator[EpisodeBatch]:
    """The same batches, of all processes' ``episodes``; on the first process, progress counts its part of them."""
    progress = progress if world.first else silent
    with progress(f"evaluate on {split}", math.ceil(episodes / world.world_size), "episodes") as advance:
        for batch in batches:
            yield batch
            advance(len(batch.index))


def _summary(answers: Answers, inner: InnerLoop, data: dict[str, Any], split: str, precision: str) -> Evaluation:
    count, images = answers.given.shape
    shares = answers.right[:, -1] / images
    return Evaluation(
        # Counted in whole numbers and divided once.
        accuracy=int(answers.right[:, -1].sum()) / (count * images),
        interval=half_width(shares.std(ddof=1).item(), count),
        loss=answers.losses[:, -1].mean().item(),
        accuracy_by_step=tuple(int(total) / (count * images) for total in answers.right.sum(0)),
        episodes=count,
        bn=inner.bn,
        inner_steps=inner.steps,
        inner_lr=inner.lr,
        rates=inner.rates,
        precision=precision,
        split=split,
        accuracy_by_episode=tuple(shares.tolist()),
        answers=answers,
        **{key: data[key] for key in ("dataset", "split_scheme", "n_way", "k_shot", "k_query")},
    )


def answers_by_step(
    network: nn.Module, parameters: MetaParameters, episode: Episode, method: Method
) -> Iterator[Tensor]:
    """The answers to the query set before adaptation and after each step, ``[queries, answers]`` each."""
    network, parameters, episode = method.shortcut(network, parameters, episode, method)
    for fast in adaptation(network, parameters, episode, method):
        yield method.query_logits(network, fast, episode, method)


class _Measured(NamedTuple):
    """The row of one episode in each column of ``Answers``, on the device, so that the CPU does not wait for it."""

    given: Tensor
    right: Tensor
    losses: Tensor
    largest: Tensor


def _measure_classes(
    network: nn.Module,
    parameters: MetaParameters,
    episode: Episode,
    method: Method,
    before_step: Callable[[], object],
) -> _Measured:
    right, losses = [], []
    for logits in answers_by_step(network, parameters, episode, method):
        before_step()
        given = logits.argmax(1)
        right.append((given == episode.query_y).sum())
        losses.append(loss_of(logits, episode.query_y, "cross-entropy"))
        largest = logits.abs().amax()
    return _Measured(given, torch.stack(right), torch.stack(losses), largest)


def _answers(batch: EpisodeBatch, measured: Sequence[_Measured]) -> list[Answers]:
    given, right, losses, largest = (torch.stack(column).cpu() for column in zip(*measured, strict=True))
    # Copies: NumPy's view of a tensor would keep the tensor.
    columns = (batch.index.cpu(), batch.query_y.cpu(), given, right, losses.double(), largest.double())
    return [Answers(*(column.numpy().copy() for column in columns))]


def measure(network: nn.Module, parameters: MetaParameters, episode: Episode, method: Method) -> Tensor:
    """Query loss after adaptation, then the score before adaptation and after each step: ``[steps + 2]``.

    The score is the query set's accuracy, or its squared error where the answers are numbers.
    """
    answers = list(answers_by_step(network, parameters, episode, method))
    task_loss = method.inner.task_loss
    loss = loss_of(answers[-1], episode.query_y, task_loss)
    return torch.stack([loss, *(score_of(step, episode.query_y, task_loss).to(loss.dtype) for step in answers)])


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
    fit: bool = False,
    device: str = "auto",
    network: nn.Module | None = None,
    progress: Progress = silent,
    world: World = ALONE,
) -> Evaluation:
    """Evaluate a checkpoint, the best one of a run folder, or a model.

    Images are transformed as in training: with ``normalize``, by the mean and deviation of the training data, also
    if the evaluation is on other data.

    Args:
        place: file or folder, or the name of a model that comes with the package.
        data: the episodes.
        split: of the data.
        episodes: their number, at least 2; 600 is customary.
        inner_steps: 0 measures the initialization itself; None takes the number used in validation.
        fit: bring images of another shape to the network's, see ``fit_images``.
        device: see ``TrainSettings``.
        network: of a run with a network of your own: one as it was trained with; its weights do not matter.
        progress: counts episodes; with several processes, those of the first one.
        world: the processes that evaluate together, as ``trainer.joined`` gives it; all get the result.

    Raises:
        RequestError: not a checkpoint of this trainer, its network does not fit the data, or a number is invalid.
        DamagedError: the checkpoint is damaged.
        StoppedError: SIGTERM, SIGUSR1 or, in one process, SIGINT came.
    """
    if episodes < 2:
        raise RequestError(f"episodes must be at least 2, not {episodes}: fewer give no interval.")
    if inner_steps is not None and inner_steps < 0:
        raise RequestError(f"inner_steps must be at least 0, not {inner_steps}.")

    require_data(data)
    path, checkpoint = world.from_first(lambda: find_checkpoint(Path(place)))
    with world.together():
        about = data.describe()
        shape, stored = checkpoint.data["image_shape"], None
        if fit and list(about["image_shape"]) != list(shape):
            stored = tuple(about["image_shape"])
            about = {**about, "image_shape": shape, "fitted_from": stored}
        require_fit(path, checkpoint, about)
        settings = saved_settings(checkpoint.settings, path)
        normalize = bool(settings.normalize) and _normalisation_of(path, checkpoint, about)
        inner = settings.inner_loop_at_test()
        if inner_steps and inner.classifier == "prototypes":
            raise RequestError(f"inner_steps must be 0, not {inner_steps}: {settings.algorithm} has no inner loop.")
        if inner_steps is not None:
            inner = replace(inner, steps=inner_steps)
        inner.require_shots(about["k_shot"])
        keep_large_buffers()
        where = world.device(pick_device(device))
        # So that each process gets an episode of every meta-batch; its size makes no difference here.
        size = max(settings.meta_batch_size, world.world_size)
        batches = data.eval(
            split,
            episodes,
            size,
            where,
            normalize=False if stored else normalize,
            rank=world.rank,
            world_size=world.world_size,
        )
        if stored:
            batches = _fitted(batches, shape, normalize)
        restored, learned = checkpoint.restored(path, where, network)
        # Runs trained in tf32 are evaluated in fp32 where tf32 is not available.
        lacking = settings.precision == "tf32" and where.type != "cuda"
        set_precision(restored, pick_precision(None if lacking else settings.precision, where))
    with limited_threads(), stop_at_signals(keyboard=world.world_size == 1) as stop:
        batches = counting(batches, split, episodes, progress, world)
        evaluation = evaluate_network(restored, batches, inner, about, split, learned, world, stop)
        around = environment(where, world)
    with world.together():
        names = None
        if isinstance(data, NamesClasses) and evaluation.answers and world.first:
            names = data.class_names(split, evaluation.answers.index)
    origin = Origin(path, checkpoint.step, settings.resolved(), about, around, names)
    return replace(evaluation, trained_on=_trained_on(checkpoint.data, about), fitted_from=stored, origin=origin)


def require_data(data: object) -> None:
    """Refuse a place in place of its episodes.

    Raises:
        RequestError: it is a text or a path.
    """
    if isinstance(data, str | Path):
        raise RequestError(
            f"The data must be episodes, not the text {str(data)!r}. Give trainer.archive_data({str(data)!r}) for an "
            f"archive, or trainer.live_data({str(data)!r}, None, {{}}) for a dataset."
        )


def require_fit(path: Path, checkpoint: Checkpoint, about: Mapping[str, Any]) -> None:
    """Check that a checkpoint's network takes episodes; one that classifies by prototypes takes any number of ways.

    Args:
        path: of the checkpoint, for the message.
        checkpoint: with the network.
        about: describes the episodes: at least their ``n_way`` and ``image_shape``.

    Raises:
        RequestError: it was trained with another number of ways.
        ImageShapeError: or with another shape of images.
    """
    prototypes = saved_settings(checkpoint.settings, path).point.classifier == "prototypes"
    for key in ("image_shape",) if prototypes else ("n_way", "image_shape"):
        here, there = about[key], checkpoint.data.get(key)
        if key == "image_shape":  # a tuple, or JSON's list
            here, there = tuple(here), tuple(there or ())
        if here != there:
            error = ImageShapeError if key == "image_shape" else RequestError
            raise error(
                f"{path} was trained with {key} {there}, but these episodes have {here}. Choose episodes with the same."
            )


def _trained_on(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """A network's training data, if it is evaluated on something else, such as another split scheme."""
    if all(there[key] == here[key] for key in ("dataset", "split_scheme", "n_way", "k_shot")):
        return None
    return f"{there['dataset']}, split scheme {there['split_scheme']}, {there['n_way']}-way {there['k_shot']}-shot"


def fit_images(images: Tensor, shape: Sequence[int]) -> Tensor:
    """Images ``[B, N, C, H, W]`` in [0, 1] as a network takes them: first grey or RGB, and then resized.

    Grey images get three equal channels; of colours, grey is 0.299 R + 0.587 G + 0.114 B. Resizing interpolates
    linearly, over all pixels that a smaller image combines, as Pillow's bilinear filter does; it does not round.

    Args:
        images: with 1 or 3 channels.
        shape: (H, W, C) of the network's.
    """
    height, width, channels = shape
    flat = images.flatten(0, 1)
    if channels == 1 and flat.shape[1] == 3:
        flat = (flat * flat.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    flat = interpolate(flat.expand(-1, channels, -1, -1), (height, width), mode="bilinear", antialias=True)
    return flat.reshape(*images.shape[:2], *flat.shape[1:])


def _fitted(
    batches: Iterable[EpisodeBatch], shape: Sequence[int], normalize: bool | Normalization
) -> Iterator[EpisodeBatch]:
    """Batches of images in [0, 1], with images that are fitted and then normalized."""
    for batch in batches:
        fitted = [fit_images(images, shape) for images in (batch.support_x, batch.query_x)]
        if isinstance(normalize, Normalization):
            mean, std = (batch.support_x.new_tensor(values)[:, None, None] for values in normalize)
            fitted = [(images - mean) / std for images in fitted]
        yield batch._replace(support_x=fitted[0], query_x=fitted[1])


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
