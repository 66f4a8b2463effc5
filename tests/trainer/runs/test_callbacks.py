"""Callbacks receive what ``metrics.jsonl`` does, and cannot end a run."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from synthetic import Synthetic

import trainer
from mamldata.errors import StoppedError
from trainer.loop import train
from trainer.runs import metrics
from trainer.runs.folder import CONFIG, RunResult
from trainer.settings import TrainSettings
from trainer.system.distributed import World

SETTINGS = TrainSettings(steps=4, meta_batch_size=1, eval_every=2, eval_episodes=2, log_every=1, device="cpu")
DOCS = Path(__file__).parents[3] / "docs"


class Notes(trainer.Callback):
    """All that a callback is told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def start(self, settings: dict[str, Any], data: dict[str, Any], run_dir: Path) -> None:
        self.told.append(("start", settings, data, run_dir))

    def row(self, row: dict[str, Any]) -> None:
        self.told.append(("row", row))

    def end(self, outcome: RunResult | BaseException) -> None:
        self.told.append(("end", outcome))

    @property
    def marks(self) -> list[tuple[str, int]]:
        return [(one[1]["event"], one[1]["step"]) for one in self.told if one[0] == "row"]


class Ending(Synthetic):
    """The meta-batch after ``most`` cannot be read."""

    def __init__(self, most: int) -> None:
        super().__init__(size=8)
        self.most = most

    def batch(self, split: str, indices: list[int]):
        if split == "train" and indices[0] >= self.most:
            raise OSError("the disk is gone")
        return super().batch(split, indices)


def test_a_run_is_told_from_start_to_end(tmp_path: Path) -> None:
    """The start as in config.json, each row as in metrics.jsonl and in its order, and the result."""
    notes = Notes()
    result = train(SETTINGS, Synthetic(size=8), tmp_path, callbacks=[notes])
    (start, settings, data, place), *rows, end = notes.told
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (start, place) == ("start", tmp_path)
    assert json.loads(json.dumps([settings, data])) == [config["settings"], config["data"]]
    assert json.loads(json.dumps([row for _, row in rows])) == metrics.read(tmp_path)
    assert [(kind, step) for kind, step in notes.marks if kind == "val"] == [("val", 2), ("val", 4)]
    assert end == ("end", result)


def test_an_error_is_the_end_and_rows_are_not_repeated(tmp_path: Path) -> None:
    """What came after the checkpoint is computed again, but not told again; a run that is done tells nothing."""
    before, after, done = Notes(), Notes(), Notes()
    with pytest.raises(OSError, match="the disk is gone"):
        train(replace(SETTINGS, steps=6), Ending(3), tmp_path, callbacks=[before])
    assert before.marks == [("train", 1), ("train", 2), ("val", 2), ("train", 3)]
    assert isinstance(before.told[-1][1], OSError)
    train(replace(SETTINGS, steps=6), Synthetic(size=8), tmp_path, resume=True, callbacks=[after])
    assert after.marks == [("train", 4), ("val", 4), ("train", 5), ("train", 6), ("val", 6)]
    assert [row["step"] for row in metrics.read(tmp_path) if row["event"] == "train"] == [1, 2, 3, 4, 5, 6]
    train(replace(SETTINGS, steps=6), Synthetic(size=8), tmp_path, resume=True, callbacks=[done])
    assert done.told == []


@pytest.mark.parametrize("where", ["start", "row", "end"])
def test_an_error_in_a_callback_is_one_warning(where: str, tmp_path: Path) -> None:
    """It names the callback; the run goes on, and others are told all; so is this one, whose fault may pass."""

    class Broken(Notes):
        def __getattribute__(self, name: str) -> Any:
            if name == where:
                object.__getattribute__(self, "told").append((name,))
                raise ValueError("no network")
            return super().__getattribute__(name)

    broken, notes = Broken(), Notes()
    with pytest.warns(UserWarning, match=f"callback Broken failed in {where}.*no network") as caught:
        result = train(SETTINGS, Synthetic(size=8), tmp_path, callbacks=[broken, notes])
    assert len(caught) == 1
    assert [one[0] for one in broken.told] == [one[0] for one in notes.told] == ["start", *["row"] * 6, "end"]
    assert result.step == 4


def test_a_callback_that_changes_what_it_is_told_changes_nothing(tmp_path: Path) -> None:
    """Neither the run, nor its records, nor what other callbacks are told."""

    class Greedy(trainer.Callback):
        def start(self, settings: dict[str, Any], data: dict[str, Any], run_dir: Path) -> None:  # noqa: ARG002
            settings.clear()
            data.clear()

        def row(self, row: dict[str, Any]) -> None:
            if row["event"] == "train":
                row["accuracy_by_step"].clear()
            row.clear()

    notes, alone = Notes(), Notes()
    result = train(SETTINGS, Synthetic(size=8), tmp_path / "greedy", callbacks=[Greedy(), notes])
    plain = train(SETTINGS, Synthetic(size=8), tmp_path / "plain", callbacks=[alone])
    assert (notes.told[0][1:3], notes.marks) == (alone.told[0][1:3], alone.marks)
    saved, other = (torch.load(one.last, weights_only=True) for one in (result, plain))
    assert saved["data"] == other["data"] == Synthetic(size=8).describe()


def test_only_the_first_process_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others train along and call nothing."""
    notes = Notes()
    monkeypatch.setattr(World, "first", property(lambda _: False))
    monkeypatch.setattr("trainer.loop.run_result", lambda *_: None)
    train(SETTINGS, Synthetic(size=8), tmp_path, callbacks=[notes])
    assert notes.told == []


def block(of: str) -> str:
    """The program in training.md that imports a module."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "training.md").read_text(encoding="utf-8"), re.DOTALL)
    (found,) = [one for one in blocks if f"import {of}\n" in one]
    return found


def run_block(of: str, module: Any, monkeypatch: pytest.MonkeyPatch, data: Synthetic, steps: int = 4) -> None:
    monkeypatch.setitem(sys.modules, of, module)
    exec(block(of), {"trainer": trainer, "settings": replace(SETTINGS, steps=steps), "data": data})


def test_weights_and_biases_by_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program in the docs begins, fails and resumes under one name, and logs each step's numbers once."""
    monkeypatch.chdir(tmp_path)
    logged: list[tuple[int, set[str]]] = []
    ends, inits = [], []

    def init(**given: Any) -> Any:
        inits.append(given)
        return SimpleNamespace(
            log=lambda numbers, step: logged.append((step, set(numbers))),
            finish=lambda exit_code: ends.append(exit_code),
        )

    module: Any = ModuleType("wandb")
    module.init = init
    with pytest.raises(OSError, match="disk"):
        run_block("wandb", module, monkeypatch, Ending(3))
    run_block("wandb", module, monkeypatch, Synthetic(size=8))
    assert [(one["id"], one["resume"], one["config"]["steps"]) for one in inits] == [("first", "allow", 4)] * 2
    assert [step for step, numbers in logged if "train/loss" in numbers] == [1, 2, 3, 4]
    assert [step for step, numbers in logged if "val/accuracy" in numbers] == [2, 4]
    assert ends == [1, 0]


def test_mlflow_by_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program in the docs goes on in the same run of MLflow, with the settings as parameters, given once."""
    monkeypatch.chdir(tmp_path)
    logged: list[tuple[int, set[str]]] = []
    started, ended, parameters = [], [], []
    module: Any = ModuleType("mlflow")

    def start_run(run_id: str | None, run_name: str) -> Any:
        started.append((run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="abc"))

    module.start_run, module.end_run, module.log_params = start_run, ended.append, parameters.append
    module.log_metrics = lambda numbers, step: logged.append((step, set(numbers)))
    with pytest.raises(OSError, match="disk"):
        run_block("mlflow", module, monkeypatch, Ending(3))
    run_block("mlflow", module, monkeypatch, Synthetic(size=8))
    assert started == [(None, "first"), ("abc", "first")]
    assert [step for step, numbers in logged if "train/loss" in numbers] == [1, 2, 3, 4]
    assert [one["algorithm"] for one in parameters] == ["maml"]
    assert ended == ["FAILED", "FINISHED"]


def test_a_stopped_run_ends_with_the_error_that_says_so(tmp_path: Path) -> None:
    """So that a callback can tell a run that will be resumed from one that failed."""

    class Stopping(Notes):
        def row(self, row: dict[str, Any]) -> None:
            super().row(row)
            if row["step"] == 1:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGTERM)

    notes = Stopping()
    with pytest.raises(StoppedError):
        train(SETTINGS, Synthetic(size=8), tmp_path, callbacks=[notes])
    assert isinstance(notes.told[-1][1], StoppedError)
