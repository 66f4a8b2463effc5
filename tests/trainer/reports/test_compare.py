"""Several algorithms on the same episodes."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from synthetic import Synthetic

from mamldata.errors import DivergedError, RequestError, StoppedError
from trainer.intervals import student_quantile
from trainer.loop import train
from trainer.reports.compare import compare, table, verdict
from trainer.reports.costs import Costs
from trainer.reports.plots import plot_comparison, plot_run
from trainer.results import paired_difference, read_result
from trainer.runs import metrics
from trainer.runs.folder import RunResult
from trainer.settings import TrainSettings

BASE = TrainSettings(steps=4, meta_batch_size=2, inner_lr=0.1, eval_every=2, eval_episodes=4, log_every=1, device="cpu")
PLANS = {
    "fomaml": replace(BASE, algorithm="fomaml"),
    "maml": BASE,
    "pretrain": replace(BASE, algorithm="pretrain"),
    "random": replace(BASE, algorithm="random"),
}


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)["weights"]
    return found


@pytest.fixture(scope="module", autouse=True)
def _peak_given() -> Iterator[None]:
    """Peak memory is not measured, which takes a process that imports torch for each algorithm; test_costs does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.reports.costs._peak", lambda *_: 1.0)
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("compared")
    torch.set_num_threads(1)  # as in the tests themselves, which compare bits
    return compare(PLANS, Synthetic(), out, episodes=12), out


def test_each_run_is_the_one_that_train_makes(compared, tmp_path: Path) -> None:
    """The same weights, and the accuracy of the best checkpoint on the same episodes."""
    result, _ = compared
    entry = result.entries[0]
    alone = train(PLANS["fomaml"], Synthetic(), tmp_path / "alone")
    mine, other = weights(entry.run.last), weights(alone.last)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert len(entry.evaluation.accuracy_by_episode) == 12
    assert entry.evaluation.accuracy == pytest.approx(statistics.fmean(entry.evaluation.accuracy_by_episode))
    assert entry.evaluation.deviation == pytest.approx(entry.evaluation.interval * math.sqrt(12) / student_quantile(11))


def test_the_table(compared) -> None:
    """A line for each in the order asked for, with ratios to MAML; what trains nothing has no costs."""
    result, out = compared
    text = table(result)
    assert (out / "compare.md").read_text() == text + "\n"
    assert result.reference == "maml"
    heading, _, head, rule, *rows, _, said = text.splitlines()
    assert said == verdict(result) == json.loads((out / "compare.json").read_text())["verdict"]
    assert heading.startswith(
        "synthetic, split scheme made-up, 5-way 1-shot 5-query; 4 outer steps of 2 episodes; 12 test"
    )
    assert len({line.count("|") for line in (head, rule, *rows)}) == 1
    cells = {row.split(" | ")[0].strip("| "): [cell.strip() for cell in row.split("|")[1:-1]] for row in rows}
    assert list(cells) == list(PLANS)
    assert cells["maml"][2] == ""
    assert cells["maml"][8] == cells["maml"][10] == "1.00"
    assert cells["fomaml"][2].startswith(("+", "-"))
    assert cells["random"][7:] == ["", "", "", ""]


def test_the_verdict(compared) -> None:
    """It names those ahead and behind with the difference, and those whose interval includes zero, its ends as well."""
    result, _ = compared
    gaps = {"fomaml": (-0.05, 0.02), "maml": (0.0, 0.0), "pretrain": (0.05, 0.02), "random": (0.02, 0.02)}
    told = [replace(entry, ahead=gaps[entry.name][0], ahead_interval=gaps[entry.name][1]) for entry in result.entries]
    start = "The 95 % interval of the difference to maml, on these episodes, "
    assert verdict(replace(result, entries=tuple(told))) == (
        f"{start}is clear of zero for fomaml (-5.00), pretrain (+5.00), and includes zero for random."
    )
    assert verdict(replace(result, entries=tuple(told[:2]))) == f"{start}is clear of zero for fomaml (-5.00)."
    assert verdict(replace(result, entries=tuple(told[1::2]))) == f"{start}includes zero for random."


def test_the_document(compared) -> None:
    """All that the table says and more, for programs."""
    result, out = compared
    document = json.loads((out / "compare.json").read_text())
    assert document == json.loads(json.dumps(result.to_json()))
    assert [entry["name"] for entry in document["entries"]] == list(PLANS)
    for entry in document["entries"]:
        assert entry["settings"]["steps"] == 4
        assert len(entry["accuracy_by_episode"]) == 12
        assert Path(entry["run"]["best"]).is_file()


def test_differences_are_those_of_the_kept_results(compared) -> None:
    """The file in each run's folder gives what the table says, and the accuracy of every episode."""
    result, out = compared
    kept = {}
    for entry in result.entries:
        [path] = (out / entry.name / "results").iterdir()
        kept[entry.name] = read_result(path)
        shares = [episode.right / 25 for episode in kept[entry.name].episodes]
        assert shares == list(entry.evaluation.accuracy_by_episode)
    for entry in result.entries:
        assert paired_difference(kept[entry.name], kept["maml"]) == (entry.ahead, entry.ahead_interval)
    assert result.entries[1].ahead == 0


def test_pictures(compared) -> None:
    """Each is a picture with more in it than paper, and the same result draws the same one."""
    result, out = compared
    paths = plot_comparison(result, out)
    assert [path.name for path in paths] == ["learning.png", "accuracy.png", "inner-steps.png", "costs.png"]
    paths.append(plot_run(result.entries[0].run.run_dir))
    first = [path.read_bytes() for path in paths]
    for path in paths:
        with Image.open(path) as picture:
            assert picture.width > 600
            assert len(np.unique(np.asarray(picture.convert("L").reduce(4)))) > 10
    assert [path.read_bytes() for path in plot_comparison(result, out)] == first[:4]


def texts(figure: Figure) -> list[str]:
    """What a picture says."""
    return [text.get_text() for text in figure.findobj(Text)]


def test_pictures_say_what_they_compare(compared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner steps differ between training and validation, so curves name them; small costs keep their digits."""
    result, out = compared
    seen: dict[str, list[str]] = {}

    def noted(figure: Figure, path: Path) -> Path:
        seen[path.name] = texts(figure)
        return path

    monkeypatch.setattr("trainer.reports.plots._save", noted)
    entries = {entry.name: entry for entry in result.entries}
    plot_run(entries["maml"].run.run_dir)
    assert {"train, 1 inner step", "val, 3 inner steps"} <= set(seen["curves.png"])
    plot_run(entries["pretrain"].run.run_dir)
    assert {"train, without adaptation", "val, 3 inner steps"} <= set(seen["curves.png"])
    small = [
        replace(entry, costs=Costs(milliseconds, 0, 0, 1.0))
        for entry, milliseconds in zip(result.entries, (1.586, 2.001, 1234.5), strict=False)
    ]
    plot_comparison(replace(result, entries=tuple(small)), out)
    assert {"1.59", "2.00", "1234"} <= set(seen["costs.png"])


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("steps", 5),
        ("meta_batch_size", 3),
        ("seed", 1),
        ("normalize", True),
        ("network", "conv3-pool"),
        ("filters", 8),
        ("device", "auto"),
        ("precision", "bf16"),
    ],
)
def test_what_differs_must_be_the_algorithm(name: str, other: object, tmp_path: Path) -> None:
    """Other steps, seeds or networks would make the table say something else."""
    base = BASE.for_images(Synthetic().describe())
    told = rf"{name} must be the same for all algorithms, not {getattr(base, name)!r} for maml, {other!r} for f"
    with pytest.raises(RequestError, match=told):
        compare({"maml": BASE, "f": replace(BASE, **{name: other})}, Synthetic(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_folder_of_a_run_is_not_taken(tmp_path: Path) -> None:
    """A comparison's runs are not mixed with another one."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(RequestError, match=r"holds a run\. Choose another folder"):
        compare({"maml": BASE, "fomaml": replace(BASE, algorithm="fomaml")}, Synthetic(), tmp_path / "run")


def test_a_comparison_takes_two(tmp_path: Path) -> None:
    """One algorithm has nothing to be compared with."""
    with pytest.raises(RequestError, match="at least two"):
        compare({"maml": BASE}, Synthetic(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_another_comparison_is_not_mixed_in(compared) -> None:
    """A folder with other runs is refused, and stays as it is."""
    _, out = compared
    before = (out / "compare.json").read_bytes()
    plans = {name: replace(settings, seed=1) for name, settings in PLANS.items()}
    with pytest.raises(RequestError, match="holds another run:\n  seed: 0 there, 1 here"):
        compare(plans, Synthetic(), out, episodes=12)
    assert (out / "compare.json").read_bytes() == before


def test_divergence_names_the_algorithm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One of many has failed: the message says which."""

    def diverging(settings: TrainSettings, *rest: Any, **options: Any) -> RunResult:
        if settings.algorithm == "fomaml":
            raise DivergedError("The training loss at step 1 is nan")
        return train(settings, *rest, **options)

    monkeypatch.setattr("trainer.reports.compare.train", diverging)
    plans = {"maml": BASE, "wild": replace(BASE, algorithm="fomaml")}
    with pytest.raises(DivergedError, match=r"^wild: The training loss at step 1"):
        compare(plans, Synthetic(), tmp_path, episodes=4)


def test_stopped_while_costs_are_measured(tmp_path: Path) -> None:
    """Between two steps that are timed, before any training."""
    with pytest.raises(StoppedError, match=rf"costs: stopped. {tmp_path} keeps what is done") as caught:
        compare(PLANS, Synthetic(), tmp_path, notify=lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert caught.value.exit_code == 75
    assert not list(tmp_path.iterdir())


def test_stopped_by_a_signal_it_goes_on(compared, tmp_path: Path) -> None:
    """What is saved is said in the words of a comparison, and the same call ends as if nothing had happened."""
    expected, _ = compared

    def notify(line: str) -> None:
        if line.startswith("maml  step 1/"):
            os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(StoppedError, match=rf"maml: stopped. {tmp_path} keeps what is done; run the same command"):
        compare(PLANS, Synthetic(), tmp_path, episodes=12, notify=notify)
    result = compare(PLANS, Synthetic(), tmp_path, episodes=12)
    assert [entry.evaluation for entry in result.entries] == [entry.evaluation for entry in expected.entries]


KILLED = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch
torch.set_num_threads(1)
from synthetic import Synthetic
from test_compare import PLANS
from trainer.reports.compare import compare
if __name__ == "__main__":
    compare(PLANS, Synthetic(), sys.argv[3], episodes=12)
"""


@pytest.mark.slow
def test_killed_it_goes_on(compared, tmp_path: Path) -> None:
    """After kill -9 in the midst of the second run, the same call ends with the same weights and accuracies."""
    expected, _ = compared
    script, out = tmp_path / "killed.py", tmp_path / "out"
    script.write_text(KILLED)
    process = subprocess.Popen([sys.executable, script, *Path(__file__).parents[:2], out])
    deadline = time.monotonic() + 120
    while not metrics.read(out / "maml") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "compare.json").exists()
    done = (out / "fomaml" / "metrics.jsonl").stat().st_mtime_ns
    result = compare(PLANS, Synthetic(), out, episodes=12)
    assert (out / "fomaml" / "metrics.jsonl").stat().st_mtime_ns == done
    for entry, reference in zip(result.entries, expected.entries, strict=True):
        assert entry.evaluation == reference.evaluation
        mine, other = weights(entry.run.last), weights(reference.run.last)
        assert all(torch.equal(mine[name], other[name]) for name in other)
