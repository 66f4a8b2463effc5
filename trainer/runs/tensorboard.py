"""Metrics for TensorBoard, beside those in ``metrics.jsonl``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from mamldata.errors import RequestError
from mamldata.words import install_command
from trainer.runs.callbacks import Callback

FOLDER = "tensorboard"


class Board(Callback):
    """Writes numbers into a run's ``tensorboard`` folder.

    Raises:
        RequestError: TensorBoard is not installed.
    """

    def __init__(self) -> None:
        require_tensorboard()

    def start(self, _: dict[str, Any], __: dict[str, Any], run_dir: Path) -> None:
        """Open a file of events."""
        module = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(str(run_dir / FOLDER))

    def row(self, row: dict[str, Any]) -> None:
        """Write the numbers of a line of the metrics at its step, under tags such as ``train/loss``."""
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(f"{row['event']}/{key}", value, row["step"])
        self._writer.flush()

    def end(self, _: object) -> None:
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
