"""The training loop, in the order in which things happen."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mamldata.batch import EpisodeBatch
from mamldata.errors import RequestError, StoppedError
from trainer import metrics
from trainer.adapt import RATE, STEP_NORM, Parameters, meta_parameters, require_shots
from trainer.allocator import keep_large_buffers
from trainer.baselines import joint, joint_parameters
from trainer.board import Board, require_tensorboard
from trainer.checkpoint import Checkpoint, all_weights, find_best, load_weights, save_checkpoint
from trainer.distributed import ALONE, World
from trainer.engines import Outcome, pick_engine
from trainer.evaluate import Evaluation, evaluate
from trainer.models import build_network
from trainer.preemption import Stop, stop_at_signals
from trainer.protocol import TrainData, TrainStream, endless
from trainer.rates import rate_lines
from trainer.run import alone_in, begin_run, open_run, require_agreement
from trainer.settings import TrainSettings, pick_device


@dataclass(frozen=True)
class RunResult:
    """Where a run ended.

    Attributes:
        run_dir: its folder.
        step: outer steps done.
        accuracy: of the last validation, in [0, 1].
        best_step, best_accuracy: of the best validation.
        last, best: their checkpoints.
    """

    run_dir: Path
    step: int
    accuracy: float
    best_step: int
    best_accuracy: float
    last: Path
    best: Path


def train(
    settings: TrainSettings,
    data: TrainData,
    run_dir: Path | str,
    *,
    resume: bool = False,
    report: Callable[[str], object] = lambda _: None,
    world: World = ALONE,
) -> RunResult:
    """Meta-train a network; what comes of it is in ``run_dir``.

    Killed at any moment and resumed, it ends with the weights, to the bit, that it would have ended with on the same
    CPU without the interruption. SIGTERM and SIGUSR1 end it with a checkpoint after the outer step under way.

    Args:
        settings: what to do.
        data: the episodes.
        run_dir: made if need be.
        resume: go on with the run in ``run_dir``; start it if there is nothing yet.
        report: told of the progress, a line at a time.
        world: the processes that train together, as ``trainer.distributed.joined`` gives it. The first one writes and
            reports; ``run_dir`` need not be there for the others.

    Raises:
        RequestError: the settings, the data and the folder do not go together.
        StoppedError: SIGTERM or SIGUSR1 came; the run is saved, and can be resumed.
        MamldataError: training has diverged.
        PeerError: it is another process that fails, and says why.
        LostPeerError: another process is gone.
        DamagedError: a checkpoint that is needed is damaged.
        WriteError: ``run_dir`` cannot be written to.
    """
    run_dir = Path(run_dir)
    with world.together():
        if world.ranks > settings.meta_batch_size:
            raise RequestError(
                f"{world.ranks} processes cannot share a meta-batch of {settings.meta_batch_size}: each must get an "
                f"episode. Start at most {settings.meta_batch_size}, or raise meta_batch_size."
            )
        device = world.device(pick_device(settings.device))
        pick_engine(settings.engine)  # its package may not be there
        if settings.tensorboard:
            require_tensorboard()
        about = data.describe()
        require_shots(settings.inner_loop(), about["k_shot"])
        network = _fresh_network(settings, about)  # before anything is written: the images may not fit it
    require_agreement(world, settings, about)
    with stop_at_signals() as stop, ExitStack() as held:
        with world.together():
            if world.first:
                held.enter_context(alone_in(run_dir))
        if not world.first:
            report = _silent
        return _train(settings, data, run_dir, about, network, device, world, stop, resume=resume, report=report)


def _silent(line: str) -> None:
    """The report of all processes but the first."""


def _train(
    settings: TrainSettings,
    data: TrainData,
    run_dir: Path,
    about: dict[str, Any],
    network: nn.Module,
    device: torch.device,
    world: World,
    stop: Stop,
    *,
    resume: bool,
    report: Callable[[str], object],
) -> RunResult:
    """What is before the loop and after it, with nobody else in the run folder."""
    # One process looks which checkpoint is the last: all go on from that one, wherever they run.
    checkpoint = world.from_first(lambda: open_run(run_dir, settings, about, resume=resume))
    if checkpoint and checkpoint.step >= settings.outer_steps and checkpoint.accuracy is not None:
        report(f"{run_dir} is done: {checkpoint.step} of {settings.outer_steps} steps.")
        return _result(run_dir, checkpoint, world)

    board = None
    with world.together():
        stream = data.train(
            settings.meta_batch_size,
            settings.seed,
            device,
            normalise=settings.normalise,
            rank=world.rank,
            ranks=world.ranks,
        )
        if world.first:
            begin_run(run_dir, settings, about, checkpoint)
            board = Board(run_dir, checkpoint.step if checkpoint else 0) if settings.tensorboard else None
    try:
        return _loop(settings, data, run_dir, about, network, device, stream, checkpoint, board, world, stop, report)
    finally:
        if board:
            board.close()


def _loop(
    settings: TrainSettings,
    data: TrainData,
    run_dir: Path,
    about: dict[str, Any],
    network: nn.Module,
    device: torch.device,
    stream: TrainStream,
    checkpoint: Checkpoint | None,
    board: Board | None,
    world: World,
    stop: Stop,
    report: Callable[[str], object],
) -> RunResult:
    """The loop itself.

    All processes hold the same weights at every step: they begin with those of the first one, and then each applies
    the same averaged gradient, equal to the bit on all, by the same arithmetic. Validations make sure of it.
    """
    keep_large_buffers()
    network.to(device)
    parameters = _parameters(settings, network, data, about)
    optimizer = _optimizer(settings, parameters)
    step, best_step, best_accuracy = 0, 0, -1.0
    if checkpoint:
        load_weights(network, parameters, checkpoint.weights)
        optimizer.load_state_dict(checkpoint.optimizer)
        stream.load_state_dict(checkpoint.stream)
        step, best_step, best_accuracy = checkpoint.step, checkpoint.best_step, checkpoint.best_accuracy
        report(f"Going on after step {step} of {settings.steps}.")
    learned = [*network.parameters(), *parameters.values()]
    world.spread_(learned)

    def note(row: dict[str, Any]) -> None:
        if world.first:
            metrics.append(run_dir, row)
        if board:
            board.add(row)

    def save(accuracy: float | None) -> Checkpoint:
        better = accuracy is not None and accuracy > best_accuracy
        made = Checkpoint(
            step=step,
            accuracy=accuracy,
            best_step=step if better else best_step,
            best_accuracy=accuracy if accuracy is not None and better else best_accuracy,
            settings=asdict(settings),
            data=about,
            weights=all_weights(network, parameters),
            optimizer=optimizer.state_dict(),
            stream=stream.state_dict(),
            window=window.state_dict() if accuracy is None else {},
        )
        if world.first:
            save_checkpoint(run_dir, made)
        return made

    def validate() -> Checkpoint:
        world.require_same(learned, f"The weights at step {step}")
        evaluation = _validate(network, parameters, settings, data, about, device, step, world)
        with world.together():
            note({"event": "val", "step": step, **evaluation.to_json()})
            report(f"step {step}  val {evaluation}")
            return save(evaluation.accuracy)

    begun = {name: value.to(device) for name, value in checkpoint.window.items()} if checkpoint else {}
    window = metrics.Window(step, begun)
    if not settings.outer_steps:
        return _result(run_dir, validate(), world)
    with closing(endless(stream)) as batches:
        while step < settings.steps:
            asked = time.perf_counter()
            with world.together(stop):
                batch = next(batches)
                waited = time.perf_counter() - asked

            step += 1
            validating = step % settings.eval_every == 0 or step == settings.steps
            logging = step % settings.log_every == 0 or validating
            share = len(batch.index) / settings.meta_batch_size if world.ranks > 1 else 1.0
            outcome = _learn(settings, network, parameters, data, batch, step - 1, world, every_step=logging)
            outcome = _average(outcome, share, world)
            for name, parameter in parameters.items():
                parameter.grad = outcome.gradient[name]
            _clip(settings, parameters)
            for group in optimizer.param_groups:
                group["lr"] = settings.meta_lr_at(step - 1)
            optimizer.step()
            window.add(batch, outcome, waited, share)
            del batch  # its memory can be used again while the next one is read

            if logging:
                with world.together():
                    row = window.sum_up()
                    note({"event": "train", **row})
                    report(_progress(row, settings))
            if validating:
                checkpoint = validate()
                best_step, best_accuracy = checkpoint.best_step, checkpoint.best_accuracy
            if logging:
                window = metrics.Window(step)  # only now, so that validation is not timed
            if stop.agreed and step < settings.steps:
                with world.together():
                    if not validating:
                        save(None)
                raise StoppedError(
                    f"Stopped by {stop.agreed}: step {step} of {settings.steps} is saved in {run_dir}. The same "
                    "command with --resume goes on."
                )
    if checkpoint is not None and checkpoint.accuracy is None:
        checkpoint = validate()  # stopped at a step that has become the last one
    for line in rate_lines(parameters, settings.point.rates):
        report(line)
    assert checkpoint is not None  # the last step validates
    return _result(run_dir, checkpoint, world)


def _parameters(settings: TrainSettings, network: nn.Module, data: TrainData, about: dict[str, Any]) -> Parameters:
    """All that the outer loop learns."""
    if settings.point.outer == "joint":
        return joint_parameters(network, _fresh_network(settings, {**about, "n_way": data.class_count()}))
    return meta_parameters(network, settings.inner_loop())


def _optimizer(settings: TrainSettings, parameters: Parameters) -> torch.optim.Optimizer:
    values = list(parameters.values())
    if settings.meta_optimizer == "sgd":
        return torch.optim.SGD(values, lr=settings.meta_lr)
    return torch.optim.Adam(values, lr=settings.meta_lr)


def _clip(settings: TrainSettings, parameters: Parameters) -> None:
    if settings.meta_clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters.values(), settings.meta_clip_norm)
    if settings.meta_clip_value is not None:
        nn.utils.clip_grad_value_(parameters.values(), settings.meta_clip_value)


def _learn(
    settings: TrainSettings,
    network: nn.Module,
    parameters: Parameters,
    data: TrainData,
    batch: EpisodeBatch,
    step: int,
    world: World,
    *,
    every_step: bool,
) -> Outcome:
    """The gradient of one outer step, counted from 0, by this process's part of the meta-batch."""
    if settings.point.outer == "joint":
        return joint(network, parameters, batch, data.classes(batch.index), world)
    inner, objective = settings.inner_loop(step), settings.objective(step)
    engine = pick_engine(settings.engine)
    return engine(network, parameters, batch, inner, objective, every_step=every_step)


def _average(outcome: Outcome, share: float, world: World) -> Outcome:
    """What the whole meta-batch taught; all at once, since each exchange has its price."""
    *slopes, loss, accuracy = world.average([*outcome.gradient.values(), *outcome[1:]], share)
    return Outcome(dict(zip(outcome.gradient, slopes, strict=True)), loss, accuracy)


def _fresh_network(settings: TrainSettings, about: dict[str, Any]) -> nn.Module:
    height, width, channels = about["image_shape"]
    if height != width:
        raise RequestError(f"The networks take square images, and these have {height}x{width} pixels.")
    return build_network(settings.network, channels, height, about["n_way"], settings.seed)


def _validate(
    network: nn.Module,
    parameters: Parameters,
    settings: TrainSettings,
    data: TrainData,
    about: dict[str, Any],
    device: torch.device,
    step: int,
    world: World,
) -> Evaluation:
    with world.together():
        batches = data.eval(
            "val",
            settings.eval_episodes,
            settings.meta_batch_size,
            device,
            normalise=settings.normalise,
            rank=world.rank,
            ranks=world.ranks,
        )
    learned = {name: value for name, value in parameters.items() if name.startswith((RATE, STEP_NORM))}
    evaluation = evaluate(network, batches, settings.inner_loop_at_test(), about, "val", learned, world)
    with world.together():
        metrics.require_finite(evaluation.loss, f"The validation loss at step {step}")
    return evaluation


def _progress(row: dict[str, Any], settings: TrainSettings) -> str:
    *before, _ = row["accuracy_by_step"]
    start = f"{100 * before[0]:.1f} → " if before else ""  # joint training adapts to nothing
    return (
        f"step {row['step']}/{settings.steps}  loss {row['loss']:.4f}  "
        f"accuracy {start}{100 * row['accuracy']:.1f} %  {row['ms_per_step']:.0f} ms/step  "
        f"{row['images_per_second']:,.0f} images/s  data wait {row['data_wait_percent']:.1f} %"
    )


def _result(run_dir: Path, last: Checkpoint, world: World) -> RunResult:
    assert last.accuracy is not None  # runs end with a validation
    return RunResult(
        run_dir=run_dir,
        step=last.step,
        accuracy=last.accuracy,
        best_step=last.best_step,
        best_accuracy=last.best_accuracy,
        last=run_dir / last.name,
        best=world.from_first(lambda: find_best(run_dir)),
    )
