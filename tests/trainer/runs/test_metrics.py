from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from synthetic import Synthetic

from mamldata.errors import MamldataError
from trainer.maml.engines import Outcome
from trainer.maml.parameters import MetaParameters
from trainer.runs.metrics import NAME, Window, append, require_finite, rewind


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / NAME).read_text().splitlines()]


def test_rows_are_lines_of_json(tmp_path: Path) -> None:
    """Each row is one line, in the order in which it came."""
    append(tmp_path, {"step": 1, "loss": 0.5})
    append(tmp_path, {"step": 2, "loss": 0.25})
    assert (tmp_path / NAME).read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'


def test_rewind_drops_what_comes_after(tmp_path: Path) -> None:
    """Lines after the checkpoint's step go, and so does half a line at the end."""
    for step in (1, 2, 2, 3, 4):
        append(tmp_path, {"step": step})
    with (tmp_path / NAME).open("a") as stream:
        stream.write('{"step": 1')
    rewind(tmp_path, 2)
    assert steps(tmp_path) == [1, 2, 2]
    append(tmp_path, {"step": 3})
    assert steps(tmp_path) == [1, 2, 2, 3]


def test_rewind_drops_what_is_damaged(tmp_path: Path) -> None:
    """A line that a bad disk changed is dropped, whatever it has become; the others stay as they are."""
    good = [b'{"step": 1, "loss": 0.5}\n', b'{"step": 2}\n']
    bad = [b"\xff\xfe\n", b"[]\n", b"{}\n", b"7\n", b"null\n", b'{"step": []}\n', b'{"step": Infinity}\n']
    bad += [b"[" * 100_000 + b"\n", b'{"step": 1e999}\n']
    (tmp_path / NAME).write_bytes(b"".join([good[0], *bad, good[1]]))
    rewind(tmp_path, 2)
    assert (tmp_path / NAME).read_bytes() == b"".join(good)


def test_rewind_of_nothing(tmp_path: Path) -> None:
    """A run that has logged nothing yet has nothing to drop."""
    rewind(tmp_path, 5)
    assert list(tmp_path.iterdir()) == []


def outcome(loss: float, by_step: list[float]) -> Outcome:
    return Outcome(MetaParameters({}), torch.tensor(loss), torch.tensor(by_step))


def test_window_sums_up() -> None:
    """Losses and accuracies are means over the steps; accuracies by inner step are the last step's."""
    window = Window(step=10)
    batch = Synthetic(k_query=3).batch("train", [0, 1])
    window.add(batch, outcome(2.0, [0.5]), waited=0.0)
    window.add(batch, outcome(1.0, [0.2, 1.0]), waited=0.0)
    row = window.sum_up()
    assert (row["step"], row["loss"], row["accuracy"]) == (12, 1.5, 0.75)
    assert row["accuracy_by_step"] == pytest.approx([0.2, 1.0])
    assert row["images_per_second"] == pytest.approx(2 * 40 / (2 * row["ms_per_step"] / 1000))
    assert row["data_wait_percent"] == 0


def test_images_are_those_of_all_processes() -> None:
    """One that learned from a fifth of the meta-batch counts the images of the whole."""
    window = Window(step=0)
    window.add(Synthetic(k_query=3).batch("train", [0]), outcome(1.0, [0.5]), waited=0.0, share=0.2)
    row = window.sum_up()
    assert row["images_per_second"] == pytest.approx(5 * 20 / (row["ms_per_step"] / 1000))


def test_window_names_the_step_that_diverged() -> None:
    """The first loss that is not finite is named, also if it is found some steps later."""
    window = Window(step=10)
    batch = Synthetic().batch("train", [0])
    for loss in (1.0, float("nan"), float("inf")):
        window.add(batch, outcome(loss, [0.5]), waited=0.0)
    with pytest.raises(MamldataError, match=r"The training loss at step 12 is nan: training has diverged. Lower inner"):
        window.sum_up()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_window_names_the_step_whose_gradient_diverged(bad: float) -> None:
    """When it is asked, summed up or saved; a look at it in between changes nothing."""
    batch = Synthetic().batch("train", [0])
    for ask in (Window.require_finite, Window.sum_up, Window.state_dict):
        window = Window(step=10)
        for step, slope in enumerate((1.0, 2.0, bad, bad)):
            slopes = MetaParameters({"a": torch.ones(2, 3)}, {"a": torch.tensor([1.0, slope])})
            window.add(batch, Outcome(slopes, torch.tensor(1.0), torch.tensor([0.5])), waited=0.0)
            if step < 2:
                window.require_finite()
        with pytest.raises(MamldataError, match=r"The meta-gradient at step 13 is not finite: training has diverged"):
            ask(window)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(loss: float) -> None:
    """Infinities and not-a-number stop a run; numbers do not."""
    require_finite(1e30, "This")
    with pytest.raises(MamldataError, match=r"^This is"):
        require_finite(loss, "This")


def test_a_window_goes_on_in_another_process() -> None:
    """Cut anywhere and put together again, a window sums up to the same; the time is that of the steps timed here."""
    batch = Synthetic(size=8).batch("train", [0, 1])
    outcomes = [Outcome(MetaParameters({}), torch.rand(()), torch.rand(1 if step < 4 else 3)) for step in range(5)]
    whole = Window(20)
    for outcome in outcomes:
        whole.add(batch, outcome, 0.0)
    expected = whole.sum_up()
    assert expected["step"] == 25
    for cut in range(5):
        first = Window(20)
        for outcome in outcomes[:cut]:
            first.add(batch, outcome, 0.0)
        assert bool(first.state_dict()) == bool(cut)
        second = Window(20 + cut, first.state_dict())
        for outcome in outcomes[cut:]:
            second.add(batch, outcome, 0.0)
        row = second.sum_up()
        assert {key: row[key] for key in ("step", "loss", "accuracy", "accuracy_by_step")} == {
            key: expected[key] for key in ("step", "loss", "accuracy", "accuracy_by_step")
        }
    diverged = Window(22, {"losses": torch.tensor([1.0, float("nan")]), "accuracies": torch.ones(2, 1)})
    diverged.add(batch, outcomes[0], 0.0)
    with pytest.raises(MamldataError, match=r"The training loss at step 22 is nan"):
        diverged.sum_up()
