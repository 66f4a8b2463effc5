from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import Synthetic

from mamldata.errors import RequestError
from trainer.loop import train
from trainer.runs.tensorboard import FOLDER
from trainer.settings import TrainSettings

SETTINGS = TrainSettings(
    steps=2, meta_batch_size=1, eval_every=2, eval_episodes=2, log_every=1, device="cpu", tensorboard=True
)
needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")


@needs_tensorboard
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own imports
def test_metrics_are_there_for_tensorboard(tmp_path: Path) -> None:
    """What TensorBoard reads are the metrics, by event and step, also after the run has gone on."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(SETTINGS, Synthetic(size=8), tmp_path)
    train(replace(SETTINGS, steps=4), Synthetic(size=8), tmp_path, resume=True)
    board = EventAccumulator(str(tmp_path / FOLDER))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in board.Scalars("val/accuracy")] == [2, 4]
    assert all(0 <= event.value <= 1 for event in board.Scalars("val/accuracy"))


def test_without_tensorboard_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written, with the command that installs it; without the setting it is not missed."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(RequestError, match="TensorBoard is not installed: pip install tensorboard"):
        train(SETTINGS, Synthetic(size=8), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(replace(SETTINGS, steps=1, tensorboard=False), Synthetic(size=8), tmp_path / "run")
    assert not (tmp_path / "run" / FOLDER).exists()
