"""Runs that signals ask to save and leave; those of several processes are in test_distributed.py."""

from __future__ import annotations

import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synthetic import Synthetic
from test_resume import plain, strip_times

from mamldata.errors import RequestError, StoppedError
from mamldata.streaming.batch import EpisodeBatch
from trainer.loop import train
from trainer.runs.checkpoint import find_best, find_last, load_checkpoint
from trainer.settings import TrainSettings
from trainer.system.signals import stop_at_signals

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")

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
        assert [("_acc" in name) for name in seen] == [False, True, False, True]  # 6 and 12 are validated anyway
        train(settings, Synthetic(size=8), parts, resume=True)
        assert {path.name for path in parts.iterdir()} == {path.name for path in whole.iterdir()}
        for path in whole.glob("*.pt"):
            assert plain(load_checkpoint(parts / path.name)) == plain(load_checkpoint(path))
        assert strip_times(parts) == strip_times(whole)


@pytest.mark.slow
def test_each_start_gets_a_step_further(tmp_path: Path) -> None:
    """A run that is stopped as soon as it starts, again and again, comes to its end nevertheless."""
    for step in range(1, 14):
        with pytest.raises(StoppedError, match=f"step {step} of 14 is saved"):
            train(SETTINGS, Signalled(1, signal.SIGTERM), tmp_path, resume=True)
        assert len(list(tmp_path.glob("*.pt"))) <= 2
    # In its last step there is nothing left to save for.
    result = train(SETTINGS, Signalled(1, signal.SIGTERM), tmp_path, resume=True)
    assert result.step == 14
    whole = train(SETTINGS, Synthetic(size=8), tmp_path / "whole")
    assert plain(load_checkpoint(result.last)) == plain(load_checkpoint(whole.last))
    assert strip_times(tmp_path) == strip_times(whole.run_dir)


def test_a_signal_amid_a_validation(tmp_path: Path) -> None:
    """Validation is ended first, and the step after it is saved; its checkpoint stays the best one."""
    with pytest.raises(StoppedError, match="step 7 of 14 is saved"):
        train(SETTINGS, Signalled(2, signal.SIGTERM, "val"), tmp_path)
    last = find_last(tmp_path)
    assert last == tmp_path / "maml_step7.pt"
    assert load_checkpoint(last).accuracy is None
    assert find_best(tmp_path).name.startswith("maml_step6_acc")


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


def test_handlers_are_put_back() -> None:
    """Before and after the block signals mean what they meant; within, any number of them is one wish."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with stop_at_signals() as stop:
        assert stop.asked is None
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked == "SIGTERM"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


def test_the_keyboard(capsys: pytest.CaptureFixture[str]) -> None:
    """The first SIGINT is a wish, and says what the second one is: what it always was. Where it was ignored, it is."""
    before = signal.getsignal(signal.SIGINT)
    assert before is signal.default_int_handler
    with stop_at_signals(keyboard=True) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked == "SIGINT"
        assert "Interrupt again to stop at once" in capsys.readouterr().err
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
