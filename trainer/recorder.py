"""Records of a run: log lines, metrics and checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mamldata.progress import Notify
from trainer.evaluation import LARGEST_LOSS, Evaluation
from trainer.learner import Learner
from trainer.protocol import TrainStream
from trainer.runs import metrics
from trainer.runs.callbacks import Callbacks
from trainer.runs.checkpoint import Checkpoint, save_checkpoint
from trainer.runs.folder import begin_run
from trainer.system.gpu import peak_memory


def reached(step: int, steps: int) -> str:
    """How far a step is; a resumed run may be asked for fewer steps than it has."""
    return f"{step} of {steps}" if step <= steps else f"{step} ({steps} are asked for)"


class Recorder:
    """Keeps the records of a run. Only rank 0 writes them; the other ranks keep the same counts.

    Args:
        run_dir: the folder.
        learner: the one that is trained.
        data: describes the episodes.
        writes: whether this is rank 0.
        callbacks: receive the rows that the metrics did not hold when the run was interrupted.
        notify: receives the progress, a line at a time.
        last: the checkpoint that the run resumes from.

    Attributes:
        window: the outer steps since the last line of the log.
        run_dir: as given.

    Raises:
        WriteError: the folder cannot be written to.
    """

    def __init__(
        self,
        run_dir: Path,
        learner: Learner,
        data: dict[str, Any],
        *,
        writes: bool,
        callbacks: Callbacks,
        notify: Notify,
        last: Checkpoint | None,
    ) -> None:
        self.run_dir, self._learner, self._data = run_dir, learner, data
        self._settings = learner.settings
        self._writes = writes
        self._report = notify
        self._best = (last.best_step, last.best_accuracy) if last else (0, -1.0)
        step = last.step if last else 0
        begun = {name: value.to(learner.device) for name, value in last.window.items()} if last else {}
        self.window = metrics.Window(step, begun)
        self._callbacks = callbacks
        if writes:
            self._told = metrics.marks(run_dir)
            begin_run(run_dir, self._settings, data, last, learner.start and learner.start.record)
            callbacks.tell("start", self._settings.resolved(), data, run_dir)
        if last:
            self._report(f"Resuming after step {reached(step, self._settings.outer_steps)}.")

    def log(self) -> None:
        """Log the window.

        Raises:
            DivergedError: a loss in it was not finite.
        """
        row = {**self.window.sum_up(), **peak_memory(self._learner.device)}
        self._note({"event": "train", **row})
        *before, _ = row["accuracy_by_step"]
        start = f"{100 * before[0]:.1f} → " if before else ""  # joint training does not adapt
        self._report(
            f"step {row['step']}/{self._settings.steps}  loss {row['loss']:.4f}  "
            f"accuracy {start}{100 * row['accuracy']:.1f} %  {row['ms_per_step']:.0f} ms/step  "
            f"{row['images_per_second']:,.0f} images/s  data wait {row['data_wait_percent']:.1f} %"
        )
        if row["loss"] > LARGEST_LOSS * (guessing := math.log(self._data["n_way"])):
            self._report(
                f"Training diverges: a loss of {row['loss']:.2g} nats, where guessing has {guessing:.2g}. A lower "
                "inner_lr or meta_lr, fewer inner steps or another bn may help."
            )

    def validated(self, step: int, evaluation: Evaluation, stream: TrainStream, seconds: float) -> Checkpoint:
        """Record a validation, which took some seconds, and save a checkpoint.

        Raises:
            DivergedError: its loss is not finite.
        """
        metrics.require_finite(evaluation.loss, f"The validation loss at step {step}")
        self._note({"event": "val", "step": step, **evaluation.to_json(), "seconds": seconds})
        self._report(f"step {step}  val {evaluation}")
        if evaluation.doubt:
            self._report(evaluation.doubt)
        # Older checkpoints hold means of float32 shares, which differ from the same accuracy in the eighth digit.
        if evaluation.accuracy > self._best[1] + 1e-7:
            self._best = step, evaluation.accuracy
        return self.save(step, stream, evaluation.accuracy)

    def save(self, step: int, stream: TrainStream, accuracy: float | None = None) -> Checkpoint:
        """Save a checkpoint: after a validation, or without an accuracy between two validations."""
        best_step, best_accuracy = self._best
        made = Checkpoint(
            step=step,
            accuracy=accuracy,
            best_step=best_step,
            best_accuracy=best_accuracy,
            settings=self._settings.resolved(),
            data=self._data,
            weights=self._learner.weights(),
            optimizer=self._learner.optimizer.state_dict(),
            stream=stream.state_dict(),
            window=self.window.state_dict() if accuracy is None else {},
        )
        if self._writes:
            save_checkpoint(self.run_dir, made)
        return made

    def _note(self, row: dict[str, Any]) -> None:
        if self._writes:
            metrics.append(self.run_dir, row)
            if (row["event"], row["step"]) not in self._told:
                self._callbacks.tell("row", row)
