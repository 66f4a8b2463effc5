"""The training loop, in the order in which things happen."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mamldata.batch import EpisodeBatch
from mamldata.errors import RequestError
from trainer import metrics
from trainer.adapt import RATE, STEP_NORM, Parameters, meta_parameters, require_shots
from trainer.allocator import keep_large_buffers
from trainer.baselines import joint, joint_parameters
from trainer.board import Board, require_tensorboard
from trainer.checkpoint import Checkpoint, all_weights, find_best, load_weights, save_checkpoint
from trainer.engines import Outcome, pick_engine
from trainer.evaluate import Evaluation, evaluate
from trainer.models import build_network
from trainer.precision import pick_precision, set_precision
from trainer.protocol import ClassData, TrainData, TrainStream, endless
from trainer.rates import rate_lines
from trainer.run import alone_in, begin_run, open_run
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
) -> RunResult:
    """Meta-train a network; what comes of it is in ``run_dir``.

    Killed at any moment and resumed, it ends with the weights, to the bit, that it would have ended with on the same
    CPU without the interruption.

    Args:
        settings: what to do.
        data: the episodes.
        run_dir: made if need be.
        resume: go on with the run in ``run_dir``; start it if there is nothing yet.
        report: told of the progress, a line at a time.

    Raises:
        RequestError: the settings, the data and the folder do not go together.
        DivergedError: training has diverged.
        DamagedError: a checkpoint that is needed is damaged.
        WriteError: ``run_dir`` cannot be written to.
    """
    run_dir = Path(run_dir)
    device = pick_device(settings.device)
    pick_engine(settings.engine)  # its package may not be there
    if settings.tensorboard:
        require_tensorboard()
    about = data.describe()
    require_shots(settings.inner_loop(), about["k_shot"])
    network = fresh_network(settings, about)  # before anything is written: the images may not fit it
    set_precision(network, pick_precision(settings.precision, device))
    with alone_in(run_dir):
        return _train(settings, data, run_dir, about, network, device, resume=resume, report=report)


def _train(
    settings: TrainSettings,
    data: TrainData,
    run_dir: Path,
    about: dict[str, Any],
    network: nn.Module,
    device: torch.device,
    *,
    resume: bool,
    report: Callable[[str], object],
) -> RunResult:
    """What is before the loop and after it, with nobody else in the run folder."""
    checkpoint = open_run(run_dir, settings, about, resume=resume)
    if checkpoint and checkpoint.step >= settings.outer_steps:
        report(f"{run_dir} is done: {checkpoint.step} of {settings.outer_steps} steps.")
        return _result(run_dir, checkpoint)

    stream = data.train(settings.meta_batch_size, settings.seed, device, normalise=settings.normalise)
    begin_run(run_dir, settings, about, checkpoint)
    board = Board(run_dir, checkpoint.step if checkpoint else 0) if settings.tensorboard else None
    try:
        return _loop(settings, data, run_dir, about, network, device, stream, checkpoint, board, report)
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
    report: Callable[[str], object],
) -> RunResult:
    """The loop itself."""
    keep_large_buffers()
    network.to(device)
    parameters = outer_parameters(settings, network, data, about)
    optimizer = make_optimizer(settings, parameters)
    step, best_step, best_accuracy = 0, 0, -1.0
    if checkpoint:
        load_weights(network, parameters, checkpoint.weights)
        optimizer.load_state_dict(checkpoint.optimizer)
        stream.load_state_dict(checkpoint.stream)
        step, best_step, best_accuracy = checkpoint.step, checkpoint.best_step, checkpoint.best_accuracy
        report(f"Going on after step {step} of {settings.steps}.")

    def note(row: dict[str, Any]) -> None:
        metrics.append(run_dir, row)
        if board:
            board.add(row)

    def validate() -> Checkpoint:
        evaluation = _validate(network, parameters, settings, data, about, device, step)
        note({"event": "val", "step": step, **evaluation.to_json()})
        report(f"step {step}  val {evaluation}")
        better = evaluation.accuracy > best_accuracy
        made = Checkpoint(
            step=step,
            accuracy=evaluation.accuracy,
            best_step=step if better else best_step,
            best_accuracy=evaluation.accuracy if better else best_accuracy,
            settings=settings.resolved(),
            data=about,
            weights=all_weights(network, parameters),
            optimizer=optimizer.state_dict(),
            stream=stream.state_dict(),
        )
        save_checkpoint(run_dir, made)
        return made

    if not settings.outer_steps:
        return _result(run_dir, validate())
    window = metrics.Window(step)
    with closing(endless(stream)) as batches:
        while step < settings.steps:
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked

            step += 1
            validating = step % settings.eval_every == 0 or step == settings.steps
            logging = step % settings.log_every == 0 or validating
            outcome = learn(settings, network, parameters, data, batch, step - 1, every_step=logging)
            descend(settings, parameters, optimizer, outcome, step - 1)
            window.add(batch, outcome, waited)
            del batch  # its memory can be used again while the next one is read

            if logging:
                row = window.sum_up()
                note({"event": "train", **row})
                report(_progress(row, settings))
            if validating:
                checkpoint = validate()
                best_step, best_accuracy = checkpoint.best_step, checkpoint.best_accuracy
            if logging:
                window = metrics.Window(step)  # only now, so that validation is not timed
    for line in rate_lines(parameters, settings.point.rates):
        report(line)
    assert checkpoint is not None  # the last step validates
    return _result(run_dir, checkpoint)


def outer_parameters(settings: TrainSettings, network: nn.Module, data: ClassData, about: dict[str, Any]) -> Parameters:
    """All that the outer loop learns."""
    if settings.point.outer == "joint":
        return joint_parameters(network, fresh_network(settings, {**about, "n_way": data.class_count()}))
    return meta_parameters(network, settings.inner_loop())


def make_optimizer(settings: TrainSettings, parameters: Parameters) -> torch.optim.Optimizer:
    """Of the outer loop."""
    values = list(parameters.values())
    if settings.meta_optimizer == "sgd":
        return torch.optim.SGD(values, lr=settings.meta_lr)
    return torch.optim.Adam(values, lr=settings.meta_lr)


def descend(
    settings: TrainSettings,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    outcome: Outcome,
    step: int,
) -> None:
    """Change the parameters by what one outer step, counted from 0, has taught."""
    for name, parameter in parameters.items():
        parameter.grad = outcome.gradient[name]
    if settings.meta_clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters.values(), settings.meta_clip_norm)
    if settings.meta_clip_value is not None:
        nn.utils.clip_grad_value_(parameters.values(), settings.meta_clip_value)
    for group in optimizer.param_groups:
        group["lr"] = settings.meta_lr_at(step)
    optimizer.step()


def learn(
    settings: TrainSettings,
    network: nn.Module,
    parameters: Parameters,
    data: ClassData,
    batch: EpisodeBatch,
    step: int,
    *,
    every_step: bool,
) -> Outcome:
    """The gradient of one outer step, counted from 0."""
    if settings.point.outer == "joint":
        return joint(network, parameters, batch, data.classes(batch.index))
    inner, objective = settings.inner_loop(step), settings.objective(step)
    engine = pick_engine(settings.engine)
    return engine(network, parameters, batch, inner, objective, every_step=every_step)


def fresh_network(settings: TrainSettings, about: dict[str, Any]) -> nn.Module:
    """The network as the seed draws it, for what ``TrainData.describe`` says.

    Raises:
        RequestError: it does not take such images.
    """
    height, width, channels = about["image_shape"]
    if height != width:
        raise RequestError(f"The networks take square images, and these have {height}x{width} pixels.")
    return build_network(settings.network, channels, height, about["n_way"], settings.seed, settings.filters)


def _validate(
    network: nn.Module,
    parameters: Parameters,
    settings: TrainSettings,
    data: TrainData,
    about: dict[str, Any],
    device: torch.device,
    step: int,
) -> Evaluation:
    batches = data.eval("val", settings.eval_episodes, settings.meta_batch_size, device, normalise=settings.normalise)
    learned = {name: value for name, value in parameters.items() if name.startswith((RATE, STEP_NORM))}
    evaluation = evaluate(network, batches, settings.inner_loop_at_test(), about, "val", learned)
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


def _result(run_dir: Path, last: Checkpoint) -> RunResult:
    return RunResult(
        run_dir=run_dir,
        step=last.step,
        accuracy=last.accuracy,
        best_step=last.best_step,
        best_accuracy=last.best_accuracy,
        last=run_dir / last.name,
        best=find_best(run_dir),
    )
