"""The training loop, in the order in which things happen."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mamldata.errors import RequestError, StoppedError
from trainer import metrics
from trainer.adapt import require_shots
from trainer.allocator import keep_large_buffers
from trainer.board import Board, require_tensorboard
from trainer.checkpoint import Checkpoint, find_best, save_checkpoint
from trainer.distributed import ALONE, World
from trainer.engines import pick_engine
from trainer.evaluate import Evaluation, evaluate
from trainer.learner import Learner
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
        DivergedError: training has diverged.
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
        keep_large_buffers()
        learner = Learner(settings, data, about, device)  # before anything is written: the images may not fit it
    require_agreement(world, settings, about)
    with stop_at_signals() as stop, ExitStack() as held:
        with world.together():
            if world.first:
                held.enter_context(alone_in(run_dir))
        if not world.first:
            report = _silent
        return _train(settings, data, run_dir, about, learner, device, world, stop, resume=resume, report=report)


def _silent(line: str) -> None:
    """The report of all processes but the first."""


def _train(
    settings: TrainSettings,
    data: TrainData,
    run_dir: Path,
    about: dict[str, Any],
    learner: Learner,
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
        return _loop(settings, data, run_dir, about, learner, device, stream, checkpoint, board, world, stop, report)
    finally:
        if board:
            board.close()


def _loop(
    settings: TrainSettings,
    data: TrainData,
    run_dir: Path,
    about: dict[str, Any],
    learner: Learner,
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
    step, best_step, best_accuracy = 0, 0, -1.0
    if checkpoint:
        learner.load(checkpoint.weights, checkpoint.optimizer)
        stream.load_state_dict(checkpoint.stream)
        step, best_step, best_accuracy = checkpoint.step, checkpoint.best_step, checkpoint.best_accuracy
        report(f"Going on after step {step} of {settings.steps}.")
    world.spread_(learner.learned)

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
            settings=settings.resolved(),
            data=about,
            weights=learner.weights(),
            optimizer=learner.optimizer.state_dict(),
            stream=stream.state_dict(),
            window=window.state_dict() if accuracy is None else {},
        )
        if world.first:
            save_checkpoint(run_dir, made)
        return made

    def validate() -> Checkpoint:
        world.require_same(learner.learned, f"The weights at step {step}")
        evaluation = _validate(learner, data, about, device, step, world)
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
            outcome = learner.gradient(batch, step - 1, share, world, every_step=logging)
            learner.descend(outcome, step - 1)
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
    for line in rate_lines(learner.parameters, settings.point.rates):
        report(line)
    assert checkpoint is not None  # the last step validates
    return _result(run_dir, checkpoint, world)


def _validate(
    learner: Learner,
    data: TrainData,
    about: dict[str, Any],
    device: torch.device,
    step: int,
    world: World,
) -> Evaluation:
    settings = learner.settings
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
    inner = settings.inner_loop_at_test()
    evaluation = evaluate(learner.network, batches, inner, about, "val", learner.beside, world)
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
