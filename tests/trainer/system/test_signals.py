"""Runs that signals ask to save and leave; those of several processes are in test_distributed.py."""

from __future__ import annotations

import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from synthetic import Synthetic
from test_resume import plain, strip_times

from mamldata.errors import RequestError, StoppedError
from mamldata.streaming.batch import EpisodeBatch
from trainer.evaluation import evaluate, evaluate_network
from trainer.loop import train
from trainer.maml.algorithms import InnerLoop
from trainer.networks.networks import build_network
from trainer.runs import metrics
from trainer.runs.checkpoint import find_best, find_last, load_checkpoint
from trainer.settings import TrainSettings
from trainer.system.signals import stop_at_signals

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")

CPU = torch.device("cpu")
SETTINGS = TrainSettings(
    steps=14, meta_batch_size=2, inner_lr=0.1, eval_every=6, eval_episodes=4, log_every=4, seed=3, device="cpu"
)


class Signalled(Synthetic):
    """Episodes, at one of whose meta-batches a signal comes in, as from a scheduler."""

    def __init__(self, step: int, number: int, split: str = "train") -> None:
        super().__init__(size=8)
        self.step, self.number, self.split, self.seen = step, number, split, 0

    def batch(self, split: str, indices: list[int]) -> EpisodeBatch:
        if split == self.split:
            self.seen += 1
            if self.seen == self.step:
                signal.raise_signal(self.number)
        return super().batch(split, indices)


@pytest.mark.slow
def test_stopped_and_resumed_a_run_ends_the_same(tmp_path: Path) -> None:
    """Stopped before a validation, amid a window of the log and after: all that is left is equal to the bit."""
    for settings in (
        SETTINGS,
        replace(SETTINGS, algorithm="maml++", bn="per-step", inner_steps=2, epoch_steps=4, first_order_epochs=1),
    ):
        whole = tmp_path / settings.algorithm
        parts = tmp_path / f"{settings.algorithm}-parts"
        train(settings, Synthetic(size=8), whole)
        seen = []
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            with pytest.raises(StoppedError, match=rf"Stopped by {number.name}: step \d+ of 14 is saved in "):
                train(settings, Signalled(3, number), parts, resume=True)
            last = find_last(parts)
            assert last is not None
            seen.append(last.name)
        names = [f"{settings.algorithm}_step{step}" for step in (3, 6, 9, 12)]
        assert [name.partition("_acc")[0].removesuffix(".pt") for name in seen] == names
        assert not any("_acc" in name for name in seen)  # also 6 and 12, whose validation waits for the resumed run
        train(settings, Synthetic(size=8), parts, resume=True)
        assert {path.name for path in parts.iterdir()} == {path.name for path in whole.iterdir()}
        for path in whole.glob("*.pt"):
            assert plain(load_checkpoint(parts / path.name)) == plain(load_checkpoint(path))
        assert strip_times(parts) == strip_times(whole)


@pytest.mark.slow
def test_each_start_gets_a_step_further(tmp_path: Path) -> None:
    """A run that is stopped as soon as it starts, again and again, comes to its end nevertheless."""
    for step in range(1, 15):
        with pytest.raises(StoppedError, match=f"step {step} of 14 is saved"):
            train(SETTINGS, Signalled(1, signal.SIGTERM), tmp_path, resume=True)
        assert len(list(tmp_path.glob("*.pt"))) <= 2
    # Only its validation is left, and no step at whose beginning the signal could come.
    result = train(SETTINGS, Signalled(1, signal.SIGTERM), tmp_path, resume=True)
    assert result.step == 14
    whole = train(SETTINGS, Synthetic(size=8), tmp_path / "whole")
    assert plain(load_checkpoint(result.last)) == plain(load_checkpoint(whole.last))
    assert strip_times(tmp_path) == strip_times(whole.run_dir)


SHORT = replace(SETTINGS, steps=5, eval_every=2, log_every=3)


@pytest.mark.parametrize("step", [2, 4, 5])
def test_a_signal_amid_a_validation(tmp_path: Path, step: int) -> None:
    """It is broken off and its step saved; resumed, all that the run leaves is equal to an undisturbed one's."""
    with pytest.raises(
        StoppedError, match=rf"step {step} of 5 is saved in {tmp_path}/a. It will be validated when the run is resumed"
    ):
        train(SHORT, Signalled(2 * (1 + step // 2 if step == 5 else step // 2), signal.SIGTERM, "val"), tmp_path / "a")
    last = find_last(tmp_path / "a")
    assert last == tmp_path / "a" / f"maml_step{step}.pt"
    assert load_checkpoint(last).accuracy is None
    assert [row["step"] for row in metrics.read(tmp_path / "a") if row["event"] == "val"] == list(range(2, step, 2))
    train(SHORT, Synthetic(size=8), tmp_path / "a", resume=True)
    train(SHORT, Synthetic(size=8), tmp_path / "b")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {path.name for path in (tmp_path / "b").iterdir()}
    for path in (tmp_path / "b").glob("*.pt"):
        assert plain(load_checkpoint(tmp_path / "a" / path.name)) == plain(load_checkpoint(path))
    assert strip_times(tmp_path / "a") == strip_times(tmp_path / "b")


def test_killed_after_a_validation_was_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the line of a validation that was done again and its checkpoint: no line is there twice."""
    with pytest.raises(StoppedError, match="step 2 of 5"):
        train(SHORT, Signalled(1, signal.SIGTERM, "val"), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("trainer.recorder.save_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(SHORT, Synthetic(size=8), tmp_path, resume=True)
    train(SHORT, Synthetic(size=8), tmp_path, resume=True)
    rows = [(row["event"], row["step"]) for row in metrics.read(tmp_path)]
    assert rows == [("train", 2), ("val", 2), ("train", 3), ("train", 4), ("val", 4), ("train", 5), ("val", 5)]


def interrupted(*_: object) -> NoReturn:
    """In place of a function during which the process ends."""
    raise KeyboardInterrupt


def test_a_long_adaptation_is_broken_off_between_two_inner_steps() -> None:
    """A signal during one episode of a thousand inner steps is heeded before the next one of them."""
    network, data = build_network("conv4", 1, 8, 5, seed=0, filters=2), Synthetic(size=8)
    passes = []

    def counted(*_: object) -> None:
        passes.append(1)
        if len(passes) == 9:
            signal.raise_signal(signal.SIGTERM)

    network.register_forward_pre_hook(counted)
    inner = InnerLoop(1000, 0.01, "first", "transductive")
    with stop_at_signals() as stop, pytest.raises(StoppedError, match="Stopped by SIGTERM amid an evaluation"):
        evaluate_network(network, data.eval("val", 2, 1, CPU), inner, data.describe(), "val", stop=stop)
    assert len(passes) <= 11


def test_an_evaluation_is_stopped(tmp_path: Path) -> None:
    """By a signal, with the exit code of a run that can be started again; and it leaves the handlers as they were."""
    train(replace(SHORT, steps=1), Synthetic(size=8), tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="Stopped by SIGUSR1 amid an evaluation") as caught:
        evaluate(tmp_path, Signalled(2, signal.SIGUSR1, "test"), episodes=6, device="cpu")
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) == before


def test_there_is_no_best_one_before_a_validation(tmp_path: Path) -> None:
    """A run stopped before its first validation has no best checkpoint, and says so; its last one can be given."""
    with pytest.raises(StoppedError):
        train(SETTINGS, Signalled(2, signal.SIGTERM), tmp_path)
    with pytest.raises(RequestError, match=r"stopped before its first validation. Resume it, or evaluate .*step2"):
        find_best(tmp_path)


def test_a_stopped_step_can_become_the_last(tmp_path: Path) -> None:
    """Resumed with no more steps than it has, a stopped run is validated, as every run is at its end."""
    with pytest.raises(StoppedError):
        train(SETTINGS, Signalled(3, signal.SIGTERM), tmp_path)
    result = train(replace(SETTINGS, steps=3), Synthetic(size=8), tmp_path, resume=True)
    assert [path.name for path in tmp_path.glob("*.pt")] == [result.last.name]
    assert result.last.name.startswith("maml_step3_acc")
    assert result.best == result.last
    assert [(row["event"], row["step"]) for row in metrics.read(tmp_path)] == [("val", 3)]


def test_handlers_are_put_back() -> None:
    """Before and after the block signals mean what they meant; within, any number of them is one wish."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with stop_at_signals() as stop:
        assert stop.asked is None
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked == "SIGTERM"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


def test_a_block_within_another_one() -> None:
    """It shares the Stop of the outer one, so that a signal within stops both; nothing is handled twice."""
    with stop_at_signals() as outer:
        with stop_at_signals(keyboard=True) as inner:
            assert inner is outer
            signal.raise_signal(signal.SIGTERM)
        assert outer.asked == "SIGTERM"


def test_the_second_interrupt_can_be_the_systems() -> None:
    """With ``at_once`` no Python code runs at it, so that it ends even a process amid a long operation."""
    with stop_at_signals(keyboard=True, at_once=True) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked == "SIGINT"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_keyboard(capfd: pytest.CaptureFixture[str]) -> None:
    """The first SIGINT is a wish, and says what the second one is: what it always was. Where it was ignored, it is."""
    before = signal.getsignal(signal.SIGINT)
    assert before is signal.default_int_handler
    with stop_at_signals(keyboard=True) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked == "SIGINT"
        assert "Interrupt again to stop at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with stop_at_signals() as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_at_signals(keyboard=True) as stop:
            signal.raise_signal(signal.SIGINT)
        assert stop.asked is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_trains_without_handlers(tmp_path: Path) -> None:
    """Only the main thread can handle signals; training in another one works, and leaves them alone."""
    results = []

    def work() -> None:
        torch.set_num_threads(1)
        results.append(train(replace(SETTINGS, steps=1), Synthetic(size=8), tmp_path))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results[0].step == 1
