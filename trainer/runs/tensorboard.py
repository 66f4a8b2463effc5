"""Metrics for TensorBoard, beside those in ``metrics.jsonl``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from mamldata.errors import RequestError
from mamldata.words import install_command

FOLDER = "tensorboard"


class Board:
    """Writes numbers into a run's ``tensorboard`` folder.

    Args:
        run_dir: of the run.
        step: where the run begins or resumes; numbers from later steps of an interrupted process are hidden.

    Raises:
        RequestError: TensorBoard is not installed.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        require_tensorboard()
        module = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(str(run_dir / FOLDER), purge_step=step + 1)

    def add(self, row: dict[str, Any]) -> None:
        """Write the numbers of a line of the metrics at its step, under tags such as ``train/loss``."""
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(f"{row['event']}/{key}", value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Write what is pending."""
        self._writer.close()


def require_tensorboard() -> None:
    """Check that TensorBoard is installed.

    Raises:
        RequestError: it is not.
    """
    try:
        importlib.import_module("tensorboard")
    except ModuleNotFoundError as error:
        raise RequestError(f"TensorBoard is not installed: {install_command('tensorboard')}.") from error
