"""The metrics of a run: ``metrics.jsonl``, one JSON object per line."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from mamldata.errors import DivergedError
from mamldata.io.atomic import write_atomic, writing
from mamldata.io.digest import parse_json
from mamldata.streaming.batch import EpisodeBatch
from trainer.maml.engines import Outcome

NAME = "metrics.jsonl"
_ADVICE = (
    "training has diverged. Lower inner_lr or meta_lr, or use fewer inner steps, and start again in another run "
    "folder. The last checkpoint was saved before this step."
)


def append(run_dir: Path, row: dict[str, Any]) -> None:
    """Add a line to the run's metrics.

    Raises:
        WriteError: the file cannot be written to.
    """
    path = run_dir / NAME
    with writing(path), path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def rewind(run_dir: Path, step: int, validated: int | None = None) -> None:
    """Drop the lines after ``step``, and those that are incomplete, as a killed process leaves them, or damaged.

    Args:
        run_dir: the run's folder.
        step: the last one whose training line is kept.
        validated: the last one whose validation is kept; None: the same.

    Raises:
        WriteError: the file cannot be written to.
    """
    last = {"val": step if validated is None else validated}
    path = run_dir / NAME
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_atomic(path, "".join(line for line in lines if _kept(line, step, last)).encode())


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics; empty if it has not begun. Incomplete and damaged ones are left out."""
    path = run_dir / NAME
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [row for row in map(_row, lines) if row is not None]


def marks(run_dir: Path) -> set[tuple[str, int]]:
    """Event and step of each line of a run's metrics that is whole; empty if it has not begun."""
    return {_mark(row) for row in read(run_dir)}


def _kept(line: str, step: int, last: Mapping[str, int]) -> bool:
    row = _row(line)
    if row is None:
        return False
    event, its_step = _mark(row)
    return its_step <= last.get(event, step)


def _mark(row: Mapping[str, Any]) -> tuple[str, int]:
    return str(row.get("event")), int(row["step"])


def _row(line: str) -> dict[str, Any] | None:
    """What a line says; None if it is incomplete or damaged."""
    try:
        row: dict[str, Any] = parse_json(line.encode())
        int(row["step"])
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
    return row


class Window:
    """The outer steps since the last line of the log.

    Losses and accuracies stay on the device until they are summed up: reading one makes the CPU wait.

    Args:
        step: of the last line.
        state: from ``state_dict``, to continue an interrupted window.
    """

    def __init__(self, step: int, state: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        self._losses: list[Tensor] = list(state["losses"]) if state else []
        self._unseen = [loss.isfinite() for loss in self._losses]  # of steps not yet checked: all finite?
        self._accuracies: list[Tensor] = list(state["accuracies"]) if state else []
        self.step = step - len(self._losses)
        self._before = len(self._losses)  # steps of another process, whose time is unknown
        self._images = 0
        self._waited: list[SupportsFloat] = []
        self._started = time.perf_counter()

    def state_dict(self) -> dict[str, Tensor]:
        """The losses ``[steps]`` and accuracies ``[steps, 1]`` so far, on the CPU; empty if there are none.

        Raises:
            DivergedError: see ``require_finite``.
        """
        self.require_finite()
        if not self._losses:
            return {}
        last = torch.stack([by_step[-1:] for by_step in self._accuracies])
        return {"losses": torch.stack(self._losses).cpu(), "accuracies": last.cpu()}

    def add(self, batch: EpisodeBatch, outcome: Outcome, waited: SupportsFloat, share: float = 1.0) -> None:
        """Count one outer step.

        Args:
            batch: this process's part of the meta-batch.
            outcome: of the whole meta-batch.
            waited: how long the device waited for the meta-batch, in seconds; read in ``sum_up``.
            share: the part's fraction of the meta-batch, in [0, 1].
        """
        self._losses.append(outcome.loss)
        found = [values.isfinite().all() for values in (outcome.loss, *outcome.gradient.tensors())]
        self._unseen.append(torch.stack(found).all())
        self._accuracies.append(outcome.score)
        self._images += round((batch.support_y.numel() + batch.query_y.numel()) / share)
        self._waited.append(waited)

    def require_finite(self) -> None:
        """Check that no step so far has diverged; the CPU waits for the device here.

        Raises:
            DivergedError: a loss or a gradient was not finite; the message names the first such step.
        """
        first = len(self._losses) - len(self._unseen)
        finite = torch.stack(self._unseen).tolist() if self._unseen else []
        if not all(finite):
            place = first + finite.index(False)
            step = self.step + place + 1
            require_finite(self._losses[place].item(), f"The training loss at step {step}")
            raise DivergedError(f"The meta-gradient at step {step} is not finite: {_ADVICE}")
        self._unseen.clear()

    def sum_up(self) -> dict[str, Any]:
        """Means over the window, and the last step's accuracy before and after each inner step.

        Raises:
            DivergedError: see ``require_finite``.
        """
        self.require_finite()
        losses = torch.stack(self._losses).tolist()
        seconds = time.perf_counter() - self._started
        steps = len(losses)
        return {
            "step": self.step + steps,
            "loss": sum(losses) / steps,
            "accuracy": torch.stack([by_step[-1] for by_step in self._accuracies]).mean().item(),
            "accuracy_by_step": self._accuracies[-1].tolist(),
            "ms_per_step": 1000 * seconds / (steps - self._before),
            "images_per_second": self._images / seconds,
            "data_wait_percent": 100 * sum(map(float, self._waited)) / seconds,
        }


def require_finite(loss: float, what: str) -> None:
    """Check that a loss is finite.

    Raises:
        DivergedError: ``loss`` is infinite or not a number.
    """
    if not -float("inf") < loss < float("inf"):
        raise DivergedError(f"{what} is {loss}: {_ADVICE}")
