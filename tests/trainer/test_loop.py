"""The training loop as a user meets it; the processes that are killed are in test_resume.py."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from synthetic import Synthetic, SyntheticStream

from mamldata.errors import DamagedError, DivergedError, MamldataError, RequestError
from mamldata.streaming.batch import EpisodeBatch
from trainer.evaluation import evaluate
from trainer.learner import Learner
from trainer.loop import train
from trainer.maml.engines import Outcome
from trainer.protocol import endless
from trainer.runs.checkpoint import load_checkpoint
from trainer.runs.folder import alone_in
from trainer.settings import TrainSettings

SETTINGS = TrainSettings(
    steps=6, meta_batch_size=2, inner_lr=0.1, eval_every=3, eval_episodes=4, log_every=2, device="cpu"
)


def rows(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path).weights


def assert_equal_weights(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "bn"), [("maml", "transductive"), ("fomaml", "support")])
def test_training_learns(tmp_path: Path, algorithm: str, bn: str) -> None:
    """A short run gets from chance, 20 %, to far above it on classes that it has never seen."""
    settings = TrainSettings(
        algorithm=algorithm, bn=bn, steps=60, meta_batch_size=4, eval_every=30, eval_episodes=30, device="cpu"
    )
    data = Synthetic()
    result = train(settings, data, tmp_path)
    assert result.best_accuracy > 0.85
    test = evaluate(tmp_path, data, episodes=40, device="cpu")
    assert test.accuracy - test.interval > 0.8
    assert test.accuracy_by_step[0] < 0.3
    losses = [row["loss"] for row in rows(tmp_path) if row["event"] == "train"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("network", ["conv4", "conv3-pool"])
def test_every_network_trains(tmp_path: Path, network: str) -> None:
    """Each network goes through training and evaluation at its smallest size."""
    result = train(replace(SETTINGS, network=network, steps=1), Synthetic(size=22), tmp_path)
    assert result.step == 1


def test_run_folder(tmp_path: Path) -> None:
    """A run leaves its settings, its metrics and at most two checkpoints, and nothing half written."""
    result = train(SETTINGS, Synthetic(), tmp_path / "runs" / "a")
    folder = tmp_path / "runs" / "a"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        result.last.name,
        result.best.name,
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["inner_lr"] == 0.1
    assert config["data"]["split_scheme"] == "made-up"
    assert set(config["versions"]) == {"mamldata", "numpy", "python", "torch"}
    assert [(row["event"], row["step"]) for row in rows(folder)] == [
        ("train", 2),
        ("train", 3),
        ("val", 3),
        ("train", 4),
        ("train", 6),
        ("val", 6),
    ]
    first = rows(folder)[0]
    assert len(first["accuracy_by_step"]) == 2
    assert first["images_per_second"] > 0
    assert 0 < first["data_wait_percent"] < 100
    assert load_checkpoint(result.last).settings == config["settings"]


def test_report_lines_say_it_all(tmp_path: Path) -> None:
    """Progress shows loss, accuracy before and after adaptation, speed and waiting; validation its conditions."""
    lines: list[str] = []
    train(replace(SETTINGS, steps=2, bn="support"), Synthetic(), tmp_path, notify=lines.append)
    threads, progress, validation = lines
    assert threads.startswith("Computing with 1 thread (")
    for part in ("step 2/2  loss ", "accuracy ", " → ", " ms/step  ", " images/s  data wait "):
        assert part in progress
    assert validation.startswith("step 2  val ")
    assert validation.endswith("4 episodes): synthetic, split scheme made-up, val, 5-way 1-shot, 3 inner steps, "
                             "batch norm support, fp32, single model")  # fmt: skip


def test_no_global_generator_is_used(tmp_path: Path) -> None:
    """The same run gives the same weights whatever the global generator's state, and leaves that state alone."""
    torch.manual_seed(1)
    first = train(SETTINGS, Synthetic(), tmp_path / "a")
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = train(SETTINGS, Synthetic(), tmp_path / "b")
    assert torch.equal(before, torch.get_rng_state())
    assert_equal_weights(first.last, second.last)
    other = train(replace(SETTINGS, seed=1), Synthetic(), tmp_path / "c")
    assert not torch.equal(weights(first.last)["head"], weights(other.last)["head"])


def test_one_step_is_one_adam_step_on_the_meta_gradient(tmp_path: Path) -> None:
    """With Adam, each weight's first step is the meta learning rate against the sign of its gradient."""
    result = train(replace(SETTINGS, steps=1, meta_lr=0.01), Synthetic(), tmp_path)
    start = train(replace(SETTINGS, steps=1, meta_lr=1e-30), Synthetic(), tmp_path / "start")
    moved = weights(result.last)["head"] - weights(start.last)["head"]
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.01), rtol=1e-3, atol=1e-6)


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    """A folder with a run in it is refused, with both ways out; the run stays as it is."""
    train(replace(SETTINGS, steps=2), Synthetic(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RequestError, match=r"already holds a run. Resume it, or choose another fol"):
        train(SETTINGS, Synthetic(), tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_run_goes_on_with_the_rates_that_it_began_with(tmp_path: Path) -> None:
    """Defaults were others once: such a run resumes by its own command, with its own rates."""
    once = replace(SETTINGS, bn="frozen", inner_lr=0.4, meta_lr=1e-3, filters=4, eval_inner_steps=1)
    train(replace(once, steps=3), Synthetic(size=8), tmp_path)
    result = train(replace(once, inner_lr=None, meta_lr=None), Synthetic(size=8), tmp_path, resume=True)
    saved = load_checkpoint(result.last).settings
    assert (result.step, saved["inner_lr"], saved["meta_lr"]) == (6, 0.4, 1e-3)
    with pytest.raises(RequestError, match=r"  inner_lr: 0\.4 there, 0\.05 here"):
        train(replace(once, inner_lr=0.05), Synthetic(size=8), tmp_path, resume=True)
    with pytest.raises(RequestError, match=r"  meta_lr: 0\.001 there, 0\.004 here"):
        train(replace(once, meta_lr=4e-3), Synthetic(size=8), tmp_path, resume=True)


def test_divergence_of_the_inner_loop_is_told(tmp_path: Path) -> None:
    """Frozen batch norm at too high a rate: an accuracy of logits of millions is not reported without a word."""
    lines: list[str] = []
    wild = replace(SETTINGS, bn="frozen", inner_lr=4.0, eval_inner_steps=1, filters=4, steps=3)
    train(wild, Synthetic(), tmp_path, notify=lines.append)
    assert any(line.startswith("Training diverges: a loss of ") for line in lines)
    assert any("of 4 val episodes the inner loop diverges: logits after adaptation of up to " in line for line in lines)
    told = evaluate(tmp_path, Synthetic(), episodes=4, device="cpu").doubt
    assert told is not None
    assert "A lower inner_lr" in told
    lines.clear()
    train(replace(wild, inner_lr=None), Synthetic(), tmp_path / "b", notify=lines.append)
    assert not any("diverges" in line for line in lines)


def test_fewer_steps_than_there_are(tmp_path: Path) -> None:
    """A run that is asked for fewer steps than it has taken says so; no step is one hundred of forty."""
    lines: list[str] = []
    train(SETTINGS, Synthetic(size=8), tmp_path)
    train(replace(SETTINGS, steps=4), Synthetic(size=8), tmp_path, resume=True, notify=lines.append)
    assert lines == [f"{tmp_path} is done: 6 (4 are asked for) steps."]


@pytest.mark.parametrize(("name", "kind"), [("archive.json", "an archive"), ("compare.json", "a comparison")])
def test_other_things_are_not_written_among(tmp_path: Path, name: str, kind: str) -> None:
    """The folder of an archive or of a comparison is no run's, with or without resuming."""
    (tmp_path / name).write_text("{}")
    for resume in (False, True):
        with pytest.raises(RequestError, match=f"holds {kind}. Choose another folder"):
            train(SETTINGS, Synthetic(), tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_validation_is_asked_for_before_training(tmp_path: Path) -> None:
    """What cannot be validated on is refused before the first step, and nothing is written."""

    class Few(Synthetic):
        def eval(self, _: str, episodes: int, *__: object, **___: object) -> Iterator[EpisodeBatch]:
            raise RequestError(f"{episodes} are too many")

    with pytest.raises(RequestError, match=f"{SETTINGS.eval_episodes} are too many"):
        train(SETTINGS, Few(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_steps_go_on_as_if_never_stopped(tmp_path: Path) -> None:
    """A finished run that is resumed with more steps ends like one that was asked for them at once."""
    settings = replace(SETTINGS, meta_schedule="constant")
    at_once = train(replace(settings, steps=9), Synthetic(), tmp_path / "a")
    train(replace(settings, steps=3), Synthetic(), tmp_path / "b")
    lines: list[str] = []
    later = train(
        replace(settings, steps=9, log_every=3), Synthetic(), tmp_path / "b", resume=True, notify=lines.append
    )
    assert lines[0] == "Resuming after step 3 of 9."
    assert_equal_weights(at_once.last, later.last)
    assert at_once == replace(later, run_dir=at_once.run_dir, last=at_once.last, best=at_once.best)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["settings"]["steps"] == 9


def test_the_outer_learning_rate_is_annealed(tmp_path: Path) -> None:
    """The last step of a cosine run is taken with the schedule's rate, that of a constant one with ``meta_lr``."""
    for schedule in ("cosine", "constant"):
        settings = replace(SETTINGS, steps=3, meta_schedule=schedule)
        last = train(settings, Synthetic(), tmp_path / schedule).last
        assert load_checkpoint(last).optimizer["param_groups"][0]["lr"] == settings.meta_lr_at(2)


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    """Resuming it does nothing, reads no data, and gives the same result."""
    done = train(SETTINGS, Synthetic(), tmp_path)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}

    class NoData(Synthetic):
        def train(self, *_: object, **__: object) -> SyntheticStream:
            raise AssertionError("data was read")

    lines: list[str] = []
    assert train(SETTINGS, NoData(), tmp_path, resume=True, notify=lines.append) == done
    assert lines == [f"{tmp_path} is done: 6 of 6 steps."]
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}


def test_resume_of_nothing_starts(tmp_path: Path) -> None:
    """With nothing there yet, --resume starts the run, so that one command serves for start and restart."""
    assert train(SETTINGS, Synthetic(), tmp_path / "new", resume=True).step == 6


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    """Settings and data that differ are named, each with both values; cadence and place may change."""
    train(replace(SETTINGS, steps=3), Synthetic(), tmp_path)
    data = Synthetic(k_query=2)
    data.digest = "sha256:other"
    with pytest.raises(RequestError) as caught:
        train(replace(SETTINGS, inner_lr=0.2, bn="support", eval_every=1, log_every=1), data, tmp_path, resume=True)
    assert str(caught.value).splitlines() == [
        f"{tmp_path} holds another run:",
        "  bn: 'transductive' there, 'support' here",
        "  inner_lr: 0.1 there, 0.2 here",
        "  digest: 'sha256:synthetic' there, 'sha256:other' here",
        "  k_query: 5 there, 2 here",
        "Resume it with its own settings, or choose another folder.",
    ]


def test_a_moved_archive_is_the_same_data(tmp_path: Path) -> None:
    """What the data is matters, not where it lies."""

    class Moved(Synthetic):
        def describe(self) -> dict[str, object]:
            return {**super().describe(), "source": "elsewhere"}

    train(replace(SETTINGS, steps=3), Synthetic(), tmp_path)
    assert train(SETTINGS, Moved(), tmp_path, resume=True).step == 6


def test_damaged_config_is_named(tmp_path: Path) -> None:
    """A run whose settings cannot be read is not gone on with; nor is one whose settings are missing."""
    train(replace(SETTINGS, steps=3), Synthetic(), tmp_path)
    for content in ("{", "[]", "{}"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(DamagedError, match=r"config.json is damaged .* Start again in another folder"):
            train(SETTINGS, Synthetic(), tmp_path, resume=True)
    (tmp_path / "config.json").unlink()
    with pytest.raises(RequestError, match=r"holds checkpoints, but no config.json with their settings"):
        train(SETTINGS, Synthetic(), tmp_path, resume=True)


def test_a_run_of_another_version_is_not_gone_on_with(tmp_path: Path) -> None:
    """Settings or weights that are not known here are named."""
    last = train(replace(SETTINGS, steps=3), Synthetic(), tmp_path).last
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "settings": {**config["settings"], "later": 1}}))
    with pytest.raises(RequestError, match=r"config\.json has unknown settings: later\."):
        train(SETTINGS, Synthetic(), tmp_path, resume=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    content = torch.load(last, weights_only=True)
    content["weights"]["later"] = torch.ones(1)
    torch.save(content, last)
    with pytest.raises(RequestError, match=r"step3_acc.*\.pt are not those of a network with its settings: later "):
        train(SETTINGS, Synthetic(), tmp_path, resume=True)


def test_divergence_stops_the_run(tmp_path: Path) -> None:
    """A loss that is not finite ends the run with the step and what to try, and no checkpoint is made of it."""

    class Poisoned(Synthetic):
        def batch(self, split: str, indices: list[int]) -> EpisodeBatch:
            batch = super().batch(split, indices)
            return batch._replace(query_x=batch.query_x * float("nan")) if 8 in indices and split == "train" else batch

    with pytest.raises(MamldataError, match=r"The training loss at step 5 is nan: training has diverged. Lower"):
        train(SETTINGS, Poisoned(), tmp_path)
    assert [path.name.split("_")[1] for path in tmp_path.glob("*.pt")] == ["step3"]


@pytest.mark.parametrize("clip", [None, 10.0])
def test_a_gradient_that_is_not_finite_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clip: float | None
) -> None:
    """Whatever the loss is, also if clipping would hide it; neither weights nor a line of the log are kept of it."""

    def poisoned(learner: Learner, batch: EpisodeBatch, step: int, *rest: Any, **options: Any) -> Outcome:
        outcome = gradient(learner, batch, step, *rest, **options)
        if step == 3:
            outcome.gradient.weights["head_bias"][0] = float("inf")
        return outcome

    gradient = Learner.gradient
    monkeypatch.setattr(Learner, "gradient", poisoned)
    settings = replace(SETTINGS, meta_clip_value=clip)
    with pytest.raises(DivergedError, match=r"The meta-gradient at step 4 is not finite: training has diverged. Lower"):
        train(settings, Synthetic(), tmp_path)
    assert [path.name.split("_")[1] for path in tmp_path.glob("*.pt")] == ["step3"]
    assert max(row["step"] for row in rows(tmp_path)) == 3


def test_a_signal_saves_nothing_that_has_diverged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A checkpoint between two lines of the log is preceded by a look at the gradients, also on a GPU."""

    class Poisoned(Synthetic):
        def batch(self, split: str, indices: list[int]) -> EpisodeBatch:
            batch = super().batch(split, indices)
            if 8 in indices and split == "train":
                signal.raise_signal(signal.SIGTERM)
                return batch._replace(query_x=batch.query_x * float("nan"))
            return batch

    with pytest.raises(DivergedError, match="The training loss at step 5 is nan"):
        train(SETTINGS, Poisoned(), tmp_path)
    assert [path.name.split("_")[1] for path in tmp_path.glob("*.pt")] == ["step3"]


def test_divergence_is_seen_in_validation(tmp_path: Path) -> None:
    """Weights that give no finite validation loss are not kept either."""

    class Poisoned(Synthetic):
        def batch(self, split: str, indices: list[int]) -> EpisodeBatch:
            batch = super().batch(split, indices)
            return batch._replace(query_x=batch.query_x * float("inf")) if split == "val" else batch

    with pytest.raises(MamldataError, match=r"The validation loss at step 3 is nan: training has diverged"):
        train(SETTINGS, Poisoned(), tmp_path)
    assert list(tmp_path.glob("*.pt")) == []


def test_the_earliest_of_equal_validations_is_the_best(tmp_path: Path) -> None:
    """A later checkpoint replaces the best one only if it is better; both files are there."""
    result = train(replace(SETTINGS, meta_lr=1e-30), Synthetic(), tmp_path)
    assert (result.best_step, result.step) == (3, 6)
    assert result.best_accuracy == result.accuracy
    assert {path.name.split("_")[1] for path in tmp_path.glob("*.pt")} == {"step3", "step6"}


def test_images_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    """Oblong or too small images are an error, and no run folder is left behind."""

    class Oblong(Synthetic):
        def describe(self) -> dict[str, object]:
            return {**super().describe(), "image_shape": (12, 14, 1)}

    with pytest.raises(RequestError, match=r"take square images, but these have 12x14 pixels"):
        train(SETTINGS, Oblong(), tmp_path / "run")
    with pytest.raises(RequestError, match=r"at least 22x22 pixels"):
        train(replace(SETTINGS, network="conv3-pool"), Synthetic(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_interrupt_keeps_the_last_checkpoint_and_closes_the_stream(tmp_path: Path) -> None:
    """Ctrl-C comes through; the stream's iterator is closed, and resuming ends like an undisturbed run."""
    closed: list[bool] = []

    class Watched(SyntheticStream):
        def __iter__(self) -> Iterator[EpisodeBatch]:
            try:
                yield from super().__iter__()
            finally:
                closed.append(True)

    class Data(Synthetic):
        def train(self, batch_size: int, seed: int, *_: object, **__: object) -> SyntheticStream:
            return Watched(self, batch_size, seed)

    def interrupt(line: str) -> None:
        if line.startswith("step 4/"):
            raise KeyboardInterrupt

    # While the error is looked at, its traceback keeps the loop's variables alive.
    with pytest.raises(KeyboardInterrupt) as caught:
        train(SETTINGS, Data(), tmp_path / "a", notify=interrupt)
    assert (closed, caught.type) == ([True], KeyboardInterrupt)
    resumed = train(SETTINGS, Synthetic(), tmp_path / "a", resume=True)
    assert_equal_weights(resumed.last, train(SETTINGS, Synthetic(), tmp_path / "b").last)


def test_endless_goes_through_epochs() -> None:
    """One epoch follows the other, and an empty one is an error instead of a wait for ever."""
    batches = endless(SyntheticStream(Synthetic(), 1, seed=0))
    assert [next(batches).index.item() for _ in range(16)] == list(range(16))
    batches.close()

    class Empty(SyntheticStream):
        def __iter__(self) -> Iterator[EpisodeBatch]:
            return iter(())

    with pytest.raises(RequestError, match=r"The train split gives no meta-batch"):
        next(endless(Empty(Synthetic(), 1, seed=0)))


def test_a_name_in_place_of_episodes_is_refused(tmp_path: Path) -> None:
    """With the functions that open it."""
    for attempt in (
        lambda: train(TrainSettings(steps=1), "glyphs", tmp_path / "run"),  # type: ignore[arg-type]
        lambda: evaluate(tmp_path / "run", "glyphs"),  # type: ignore[arg-type]
    ):
        with pytest.raises(RequestError, match=r"Give trainer\.archive_data\('glyphs'\) for an archive, or "):
            attempt()


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    """While a process trains in a folder no other one may, not even to resume."""
    with alone_in(tmp_path), pytest.raises(RequestError, match="Another process is training in"):
        train(SETTINGS, Synthetic(), tmp_path, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_when_the_data_do_not_fit(tmp_path: Path) -> None:
    """A stream that cannot be made is refused before anything is written, so that the folder can be used again."""

    class Short(Synthetic):
        def train(self, *_: object, **__: object) -> NoReturn:
            raise RequestError("too few episodes")

    with pytest.raises(RequestError, match="too few episodes"):
        train(SETTINGS, Short(), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_memory_of_the_gpu_and_seconds_of_validation_are_in_the_log(tmp_path, monkeypatch) -> None:
    """Where there is a GPU each training line tells its peak memory, and everywhere each validation its seconds."""
    monkeypatch.setattr("trainer.recorder.peak_memory", lambda _: {"allocated_mib": 1.5, "reserved_mib": 2.0})
    train(replace(SETTINGS, steps=1), Synthetic(), tmp_path / "run")
    first, second = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert (first["event"], first["allocated_mib"], first["reserved_mib"]) == ("train", 1.5, 2.0)
    assert second["event"] == "val"
    assert second["seconds"] > 0
