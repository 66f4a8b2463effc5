"""The training loop, in the order in which things happen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mamldata.batch import EpisodeBatch
from mamldata.errors import RequestError, StoppedError
from trainer import metrics
from trainer.adapt import require_shots
from trainer.allocator import keep_large_buffers
from trainer.board import Board, require_tensorboard
from trainer.checkpoint import Checkpoint, find_best, save_checkpoint
from trainer.distributed import ALONE, World
from trainer.engines import pick_engine
from trainer.evaluate import evaluate
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
    CPU without the interruption. SIGTERM, SIGUSR1 and, in one process, the first SIGINT end it with a
    checkpoint after the outer step under way.

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
        StoppedError: such a signal came; the run is saved, and can be resumed.
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
        _validation(settings, data, device, world)  # before hours of training: the episodes may be too few
        keep_large_buffers()
        learner = Learner(settings, data, about, device)  # before anything is written: the images may not fit it
    require_agreement(world, settings, about)
    with stop_at_signals(keyboard=world.ranks == 1) as stop, ExitStack() as held:
        with world.together():
            if world.first:
                held.enter_context(alone_in(run_dir))
        run = _Run(learner, data, about, run_dir, world, report if world.first else _silent)
        return run.go(stop, resume=resume)


def _validation(settings: TrainSettings, data: TrainData, device: torch.device, world: World) -> Iterable[EpisodeBatch]:
    return data.eval(
        "val",
        settings.eval_episodes,
        settings.meta_batch_size,
        device,
        normalise=settings.normalize,
        rank=world.rank,
        ranks=world.ranks,
    )


def _silent(line: str) -> None:
    """The report of all processes but the first."""


class _Run:
    """A run, as one of its processes sees it, with nobody else in its folder.

    All processes hold the same weights at every step: they begin with those of the first one, and then each applies
    the same averaged gradient, equal to the bit on all, by the same arithmetic. Validations make sure of it.

    Args:
        learner: what is trained.
        data: the episodes.
        about: what they are.
        run_dir: the folder, which only the first process uses.
        world: all processes.
        report: told of the progress.

    Attributes:
        step: outer steps done.
        best: the step and the accuracy of the best validation so far.
        window: what has happened since the last line of the log.
    """

    def __init__(
        self,
        learner: Learner,
        data: TrainData,
        about: dict[str, Any],
        run_dir: Path,
        world: World,
        report: Callable[[str], object],
    ) -> None:
        self.learner = learner
        self.settings = learner.settings
        self.data = data
        self.about = about
        self.run_dir = run_dir
        self.world = world
        self.report = report
        self.board: Board | None = None
        self.step = 0
        self.best: tuple[int, float] = 0, -1.0
        self.window = metrics.Window(0)

    def go(self, stop: Stop, *, resume: bool) -> RunResult:
        """Begin, or go on where the folder's last checkpoint stands, and train to the end."""
        settings, world = self.settings, self.world
        # One process looks which checkpoint is the last: all go on from that one, wherever they run.
        checkpoint = world.from_first(lambda: open_run(self.run_dir, settings, self.about, resume=resume))
        if checkpoint and checkpoint.step >= settings.outer_steps and checkpoint.accuracy is not None:
            self.report(f"{self.run_dir} is done: {checkpoint.step} of {settings.outer_steps} steps.")
            return self._result(checkpoint)
        with world.together():
            stream = self.data.train(
                settings.meta_batch_size,
                settings.seed,
                self.learner.device,
                normalise=settings.normalize,
                rank=world.rank,
                ranks=world.ranks,
            )
            if world.first:
                begin_run(self.run_dir, settings, self.about, checkpoint)
                if settings.tensorboard:
                    self.board = Board(self.run_dir, checkpoint.step if checkpoint else 0)
        try:
            if checkpoint:
                self._load(checkpoint, stream)
            world.spread_(self.learner.learned)
            last = self._loop(stream, stop) if self.step < settings.outer_steps else None
            # No step is to be done by a baseline without training, or where the last one was stopped after.
            last = last or self._validate(stream)
        finally:
            if self.board:
                self.board.close()
        for line in rate_lines(self.learner.parameters, settings.point.rates):
            self.report(line)
        return self._result(last)

    def _loop(self, stream: TrainStream, stop: Stop) -> Checkpoint:
        """The outer steps; gives the checkpoint of the last one, which is validated."""
        settings, learner, world = self.settings, self.learner, self.world
        with closing(endless(stream)) as batches:
            while True:
                asked = time.perf_counter()
                with world.together(stop):
                    batch = next(batches)
                    waited = time.perf_counter() - asked

                self.step += 1
                validating = self.step % settings.eval_every == 0 or self.step == settings.steps
                logging = self.step % settings.log_every == 0 or validating
                share = len(batch.index) / settings.meta_batch_size if world.ranks > 1 else 1.0
                outcome = learner.gradient(batch, self.step - 1, share, world, every_step=logging)
                learner.descend(outcome, self.step - 1)
                self.window.add(batch, outcome, waited, share)
                del batch  # its memory can be used again while the next one is read

                if logging:
                    with world.together():
                        row = self.window.sum_up()
                        self._note({"event": "train", **row})
                        self.report(_progress(row, settings))
                if validating:
                    checkpoint = self._validate(stream)
                if logging:
                    self.window = metrics.Window(self.step)  # only now, so that validation is not timed
                if self.step == settings.steps:
                    return checkpoint
                if stop.agreed:
                    with world.together():
                        if not validating:
                            self._save(stream, None)
                    raise StoppedError(
                        f"Stopped by {stop.agreed}: step {self.step} of {settings.steps} is saved in {self.run_dir}. "
                        "The same command with --resume goes on."
                    )

    def _load(self, checkpoint: Checkpoint, stream: TrainStream) -> None:
        self.learner.load(checkpoint.weights, checkpoint.optimizer, self.run_dir / checkpoint.name)
        stream.load_state_dict(checkpoint.stream)
        self.step = checkpoint.step
        self.best = checkpoint.best_step, checkpoint.best_accuracy
        begun = {name: value.to(self.learner.device) for name, value in checkpoint.window.items()}
        self.window = metrics.Window(self.step, begun)
        self.report(f"Going on after step {self.step} of {self.settings.steps}.")

    def _save(self, stream: TrainStream, accuracy: float | None) -> Checkpoint:
        """A checkpoint of now, after a validation or, with None, between two."""
        if accuracy is not None and accuracy > self.best[1]:
            self.best = self.step, accuracy
        best_step, best_accuracy = self.best
        made = Checkpoint(
            step=self.step,
            accuracy=accuracy,
            best_step=best_step,
            best_accuracy=best_accuracy,
            settings=self.settings.resolved(),
            data=self.about,
            weights=self.learner.weights(),
            optimizer=self.learner.optimizer.state_dict(),
            stream=stream.state_dict(),
            window=self.window.state_dict() if accuracy is None else {},
        )
        if self.world.first:
            save_checkpoint(self.run_dir, made)
        return made

    def _validate(self, stream: TrainStream) -> Checkpoint:
        """Evaluate on the val split, and save."""
        settings, learner, world = self.settings, self.learner, self.world
        world.require_same(learner.learned, f"The weights at step {self.step}")
        with world.together():
            batches = _validation(settings, self.data, learner.device, world)
        inner = settings.inner_loop_at_test()
        evaluation = evaluate(learner.network, batches, inner, self.about, "val", learner.beside, world)
        with world.together():
            metrics.require_finite(evaluation.loss, f"The validation loss at step {self.step}")
            self._note({"event": "val", "step": self.step, **evaluation.to_json()})
            self.report(f"step {self.step}  val {evaluation}")
            return self._save(stream, evaluation.accuracy)

    def _note(self, row: dict[str, Any]) -> None:
        if self.world.first:
            metrics.append(self.run_dir, row)
        if self.board:
            self.board.add(row)

    def _result(self, last: Checkpoint) -> RunResult:
        assert last.accuracy is not None  # runs end with a validation
        return RunResult(
            run_dir=self.run_dir,
            step=last.step,
            accuracy=last.accuracy,
            best_step=last.best_step,
            best_accuracy=last.best_accuracy,
            last=self.run_dir / last.name,
            best=self.world.from_first(lambda: find_best(self.run_dir)),
        )


def _progress(row: dict[str, Any], settings: TrainSettings) -> str:
    *before, _ = row["accuracy_by_step"]
    start = f"{100 * before[0]:.1f} → " if before else ""  # joint training adapts to nothing
    return (
        f"step {row['step']}/{settings.steps}  loss {row['loss']:.4f}  "
        f"accuracy {start}{100 * row['accuracy']:.1f} %  {row['ms_per_step']:.0f} ms/step  "
        f"{row['images_per_second']:,.0f} images/s  data wait {row['data_wait_percent']:.1f} %"
    )
