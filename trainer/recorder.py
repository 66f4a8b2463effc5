"""What a run leaves behind: lines of the log and of the metrics, TensorBoard's events and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mamldata.progress import Notify
from trainer.evaluation import Evaluation
from trainer.learner import Learner
from trainer.protocol import TrainStream
from trainer.runs import metrics
from trainer.runs.checkpoint import Checkpoint, save_checkpoint
from trainer.runs.folder import begin_run
from trainer.runs.tensorboard import Board


class Recorder:
    """Keeps the records of a run: on rank 0 in its folder; on the other ranks it only counts along.

    Args:
        run_dir: the folder.
        learner: what is trained.
        data: what the episodes are.
        writes: whether this is rank 0.
        notify: told of the progress, a line at a time.
        last: the checkpoint that the run goes on from.

    Attributes:
        window: what has happened since the last line of the log.
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
        self._board: Board | None = None
        if writes:
            begin_run(run_dir, self._settings, data, last)
            if self._settings.tensorboard:
                self._board = Board(run_dir, step)
        if last:
            self._report(f"Going on after step {step} of {self._settings.steps}.")

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board:
            self._board.close()

    def log(self) -> None:
        """Sum up the window.

        Raises:
            DivergedError: a loss in it was not finite.
        """
        row = self.window.sum_up()
        self._note({"event": "train", **row})
        *before, _ = row["accuracy_by_step"]
        start = f"{100 * before[0]:.1f} → " if before else ""  # joint training adapts to nothing
        self._report(
            f"step {row['step']}/{self._settings.steps}  loss {row['loss']:.4f}  "
            f"accuracy {start}{100 * row['accuracy']:.1f} %  {row['ms_per_step']:.0f} ms/step  "
            f"{row['images_per_second']:,.0f} images/s  data wait {row['data_wait_percent']:.1f} %"
        )

    def validated(self, step: int, evaluation: Evaluation, stream: TrainStream) -> Checkpoint:
        """Note a validation, and save.

        Raises:
            DivergedError: its loss is not finite.
        """
        metrics.require_finite(evaluation.loss, f"The validation loss at step {step}")
        self._note({"event": "val", "step": step, **evaluation.to_json()})
        self._report(f"step {step}  val {evaluation}")
        if evaluation.accuracy > self._best[1]:
            self._best = step, evaluation.accuracy
        return self.save(step, stream, evaluation.accuracy)

    def save(self, step: int, stream: TrainStream, accuracy: float | None = None) -> Checkpoint:
        """A checkpoint of now, after a validation or, without its accuracy, between two."""
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
        if self._board:
            self._board.add(row)
