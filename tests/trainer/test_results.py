"""The files of evaluations: what they hold, what can be asked of them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import Synthetic, generator

import trainer
from mamldata.errors import DamagedError, MamldataError, RequestError
from mamldata.sampling.order import Indices
from trainer.evaluation import Answers, Evaluation, Origin, evaluate
from trainer.intervals import class_half_width
from trainer.loop import train
from trainer.maml.adapt import adapt
from trainer.maml.parameters import episodes
from trainer.maml.variants import method_of
from trainer.results import (
    Result,
    class_interval,
    confusion,
    paired_difference,
    read_result,
    result_of,
    save_result,
    worst_episodes,
)
from trainer.runs.folder import RunResult
from trainer.settings import TrainSettings

SETTINGS = TrainSettings(
    steps=2, eval_every=1, eval_episodes=2, meta_batch_size=2, inner_lr=0.1, filters=4, device="cpu"
)


class Named(Synthetic):
    """Episodes whose classes have names."""

    def class_names(self, _: str, index: Indices) -> list[list[str]]:
        return [[f"class {way}" for way in self.labels(generator(2000, one)).tolist()] for one in index.tolist()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(SETTINGS, Named(size=8), tmp_path_factory.mktemp("run"))


@pytest.fixture
def evaluation(run: RunResult) -> Evaluation:
    return evaluate(run.run_dir, Named(size=8), episodes=6, device="cpu")


def made(given: list[list[int]], names: list[list[str]] | None = None, losses: list[float] | None = None) -> Evaluation:
    """An evaluation of 2-way episodes with two queries for each class, and these answers."""
    answers = np.array(given)
    right = (answers == [0, 0, 1, 1]).sum(1)
    shares = right / 4
    origin = Origin(Path("maml_step1.pt"), 1, {}, {"digest": "d"}, {"device": "cpu"}, names)
    per_step = np.stack([right * 0, right], 1)
    final = np.ones(len(answers)) if losses is None else np.array(losses)
    true = np.tile([0, 0, 1, 1], (len(answers), 1))
    kept = Answers(np.arange(len(answers)), true, answers, per_step, np.stack([final, final], 1), final)
    values = {"interval": 0.0, "loss": final.mean().item(), "accuracy_by_step": (0.0, shares.mean().item())}
    values |= {"bn": "support", "inner_steps": 1, "inner_lr": 0.1, "rates": "fixed", "precision": "fp32"}
    values |= {"dataset": "d", "split_scheme": "s", "split": "test", "n_way": 2, "k_shot": 1, "k_query": 2}
    return Evaluation(
        accuracy=int(right.sum()) / answers.size,
        episodes=len(answers),
        accuracy_by_episode=tuple(shares.tolist()),
        answers=kept,
        origin=origin,
        **values,  # type: ignore[arg-type]
    )


def test_a_file_gives_back_what_was_measured(evaluation: Evaluation, run: RunResult) -> None:
    """All of it: conditions, environment, and each episode's answers, which add up to the accuracy."""
    path = save_result(evaluation)
    assert path.parent == run.run_dir / "results"
    result = read_result(path)
    assert result == result_of(evaluation)
    assert result.evaluation == json.loads(json.dumps(evaluation.to_json()))
    assert result.settings == SETTINGS.for_images(result.target).resolved()
    assert result.target["digest"] == "sha256:synthetic"
    assert result.checkpoint == {"file": run.best.name, "step": run.best_step}
    assert set(result.environment["versions"]) == {"mamldata", "numpy", "python", "torch"}
    assert {key: result.environment[key] for key in ("device", "threads", "processes")} == {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "processes": 1,
    }
    assert result.environment["hardware"]
    assert [episode.right / 25 for episode in result.episodes] == list(evaluation.accuracy_by_episode)
    assert [total / 150 for total in result.right_by_step] == list(evaluation.accuracy_by_step)
    assert len(result.loss_by_step) == 4
    assert result.loss_by_step[-1] == evaluation.loss
    named = Named(size=8).class_names("test", np.arange(6))
    assert [[result.class_names[one] for one in episode.classes] for episode in result.episodes] == named


def test_answers_are_those_of_the_network(evaluation: Evaluation, run: RunResult) -> None:
    """Each is the largest logit after the last inner step, in the order of the query images."""
    loaded, data = trainer.load_run(run.run_dir), Named(size=8)
    method = method_of(loaded.network, loaded.settings.inner_loop_at_test())
    for episode, kept in zip(episodes(data.batch("test", list(range(6)))), result_of(evaluation).episodes, strict=True):
        last = adapt(loaded.network, loaded.parameters, episode, method)[-1]
        assert method.query_logits(loaded.network, last, episode, method).argmax(1).tolist() == list(kept.given)


def test_each_kind_of_evaluation_has_its_file(run: RunResult) -> None:
    """The same again replaces it; another checkpoint, target, split, or number of episodes or steps does not."""
    data, count = Named(size=8), {"episodes": 3, "device": "cpu"}
    first = save_result(evaluate(run.best, data, **count))
    first.write_text("something else")
    assert save_result(evaluate(run.best, data, **count)) == first
    assert read_result(first).evaluation["episodes"] == 3
    others = [
        evaluate(run.best, data, episodes=2, device="cpu"),
        evaluate(run.best, data, inner_steps=1, **count),
        evaluate(run.best, data, split="val", **count),
        evaluate(run.best, Named(size=8, k_query=3), **count),
    ]
    copied = run.best.with_name("another.pt")
    copied.write_bytes(run.best.read_bytes())
    others.append(evaluate(copied, data, **count))
    assert len({save_result(one) for one in others} | {first}) == 6
    archive = {**others[0].origin.target, "archive_sha256": "0123456789abcdef"}
    assert result_of(replace(others[0], origin=replace(others[0].origin, target=archive))).name == (
        f"test-0123456789ab-5w1s5q-{run.best.stem}-2episodes-3steps-cpu-fp32.json"
    )


def test_a_usual_evaluation_takes_little_room(tmp_path: Path) -> None:
    """600 episodes of 75 query images: far below a megabyte, an episode a line."""
    given = np.random.default_rng(0).integers(0, 5, (600, 75))
    right = (given == np.arange(75) // 15).sum(1)
    one = made([[0, 0, 1, 1]])
    true = np.tile(np.arange(75) // 15, (600, 1))
    answers = Answers(
        np.arange(600), true, given, np.stack([right] * 4, 1), np.full((600, 4), 1.2345678901234567), right + 0.0
    )
    names = [[f"alphabet/character {way}" for way in range(start, start + 5)] for start in range(600)]
    origin = replace(one.origin, checkpoint=tmp_path / "a.pt", class_names=names)
    accuracy = int(right.sum()) / 45_000
    path = save_result(
        replace(one, episodes=600, n_way=5, k_query=15, accuracy=accuracy, answers=answers, origin=origin)
    )
    assert path.stat().st_size < 250_000
    assert sum(line.startswith('{"index":') for line in path.read_text().splitlines()) == 600
    assert len(read_result(path).episodes) == 600


def test_classes_may_have_unequal_numbers_of_queries() -> None:
    """Then each episode says its own, and answers are in the order of the labels, whatever the images' order was."""
    one = made([[1, 0, 1, 0], [0, 0, 1, 0]], [["b", "a"], ["a", "c"]])
    true = np.array([[1, 0, 1, 1], [0, 0, 0, 1]])
    unequal = replace(one.answers, true=true, right=np.array([[0, 3], [0, 2]]))
    result = result_of(replace(one, answers=unequal, accuracy=5 / 8))
    assert [episode.queries for episode in result.episodes] == [(1, 3), (3, 1)]
    assert [episode.given for episode in result.episodes] == [(0, 1, 1, 0), (0, 0, 1, 0)]
    assert confusion(result).counts.tolist() == [[4, 1, 1], [0, 1, 0], [1, 0, 0]]


def test_worst_episodes_come_first() -> None:
    """By the number of right answers; among equals by the loss, one that is no number before all."""
    given = [[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1], [1, 0, 1, 1]]
    result = result_of(made(given, losses=[0.1, 9, 1, 2, float("nan")]))
    assert [episode.index for episode in worst_episodes(result)] == [1, 4, 3, 2, 0]
    assert [episode.index for episode in worst_episodes(result, 2)] == [1, 4]
    assert result.episodes[4].loss is None


def test_interval_for_other_classes() -> None:
    """Of the accuracies by episode and their classes, where a class and its turned images are one; else refused."""
    drawn = np.array([[i, j] for i in range(5) for j in range(5) if i != j])
    right = [min(i, j) for i, j in drawn.tolist()]
    given = [[0, 0, 1, 1] if one == 3 else [0, 1, 1, 1] if one else [1, 1, 0, 0] for one in right]
    names = [[f"class {i}", f"class {j}, turned {90 * (1 + i % 3)}"] for i, j in drawn.tolist()]
    one = made(given, names)
    expected = class_half_width(np.array(one.accuracy_by_episode), drawn)
    assert class_interval(result_of(one)) == pytest.approx(expected)
    assert expected > 0
    with pytest.raises(RequestError, match="does not name the classes"):
        class_interval(result_of(made(given)))


def test_confusion_is_over_classes_not_labels() -> None:
    """A class has another label in each episode; rows are true classes, and sums their query images."""
    result = result_of(made([[0, 0, 1, 0], [1, 0, 1, 1]], [["b", "a"], ["a", "c"]]))
    names, counts = confusion(result)
    assert names == ("a", "b", "c")
    assert counts.tolist() == [[2, 1, 1], [0, 2, 0], [0, 0, 2]]
    with pytest.raises(RequestError, match="does not name the classes"):
        confusion(result_of(made([[0, 0, 1, 0], [1, 0, 1, 1]])))


def test_pairs_tell_more_than_two_intervals() -> None:
    """Where hard episodes are hard for both, the interval of the difference is the narrower one."""
    one = result_of(made([[0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1]]))
    other = result_of(made([[0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]))
    ahead, interval = paired_difference(one, other)
    assert ahead == 0.1875
    assert interval == pytest.approx(3.182 * np.std([0.25, 0.25, 0.25, 0], ddof=1) / 2, rel=2e-4)
    assert paired_difference(other, one) == (-ahead, interval)


def test_other_episodes_are_not_paired() -> None:
    """Another target, split or number of episodes, or other indices: the message says which."""
    one = result_of(made([[0, 0, 1, 1], [0, 0, 1, 0]]))
    with pytest.raises(RequestError, match=r"not of the same episodes:\n  digest: 'd' and 'other'$"):
        paired_difference(one, replace(one, target={"digest": "other"}))
    with pytest.raises(RequestError, match=r"split: 'test' and 'val'"):
        paired_difference(one, replace(one, evaluation={**one.evaluation, "split": "val"}))
    with pytest.raises(RequestError, match=r"episodes: 2 and 1"):
        paired_difference(one, replace(one, episodes=one.episodes[:1]))
    with pytest.raises(RequestError, match="their indices differ"):
        paired_difference(one, replace(one, episodes=one.episodes[::-1]))
    elsewhere = replace(one, target={"digest": "d", "source": "/another/place", "remix": False})
    assert paired_difference(one, elsewhere).ahead == 0


def changed(path: tuple[str | int, ...], value: object) -> Callable[[Any], None]:
    """A change of one value in a file."""

    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(("episodes", 1, "right"), 2), "episode 1 has other answers than 2 right ones"),
        (changed(("episodes", 1, "given"), [0, 0, 1, 2]), "episode 1 has other labels"),
        (changed(("episodes", 0, "given"), [0, 0, 1]), "episode 0 has other labels"),
        (changed(("episodes", 0, "given"), {}), "is damaged"),
        (changed(("episodes", 0, "queries"), [1, 3, 0]), "episode 0 has other numbers of query images"),
        (changed(("episodes", 0, "queries"), [4, -1]), "episode 0 has other numbers of query images"),
        (changed(("episodes", 0, "queries"), [5, -1]), "is damaged"),
        (changed(("episodes", 0, "classes"), [0, 9]), "other classes than 2"),
        (changed(("evaluation", "accuracy"), 0.5), "accuracy is not that of the episodes"),
        (changed(("evaluation",), {}), "is damaged"),
        (changed(("episodes",), 3), "is damaged"),
        (changed(("later",), 3), "is damaged"),
        (lambda content: content.pop("class_names"), "is damaged"),
    ],
)
def test_a_changed_file_is_refused(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    """Answers that contradict the numbers beside them, or are none at all, are an error that names the file."""
    one = made([[0, 0, 1, 1], [0, 0, 1, 0]], [["b", "a"], ["a", "c"]])
    path = save_result(replace(one, origin=replace(one.origin, checkpoint=tmp_path / "a.pt")))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedError, match=message) as caught:
        read_result(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"{}", b"\xff", b"[" * 99_999, b'{"format": "mamldata-result/2"}'])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    """It is not the file of an evaluation, and the message says so; nor is one that is missing."""
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(MamldataError, match=r"a\.json is not the file of an evaluation"):
        read_result(path)
    with pytest.raises(RequestError, match="No such file"):
        read_result(tmp_path / "none.json")


@pytest.mark.parametrize("largest", [1e12, float("inf"), float("nan")])
def test_an_inner_loop_that_diverges_is_told(largest: float) -> None:
    """Logits that are not finite or beyond reason, in as few as one episode; usual ones are no reason for doubt."""
    assert made([[0, 0, 1, 1], [0, 0, 1, 0]], losses=[1, 6]).doubt is None
    one = made([[0, 0, 1, 1], [0, 0, 1, 0]])
    wild = replace(one, answers=replace(one.answers, largest=np.array([3, largest])))
    assert wild.doubt is not None
    assert wild.doubt.startswith(
        f"In 1 of 2 test episodes the inner loop diverges: logits after adaptation of up to {largest:.2g}, and"
    )


def test_answers_far_worse_than_guesses_are_told() -> None:
    """A mean loss of ten times that of guessing is a sign of an inner loop that diverges, too."""
    told = made([[0, 0, 1, 1], [0, 0, 1, 0]], losses=[1, 36]).doubt
    assert told is not None
    assert "losses of up to 36 nats, where guessing has 0.69. A lower inner_lr, fewer inner steps or another" in told


def test_an_accuracy_is_a_number_of_answers_divided_once(run: RunResult) -> None:
    """No digits of rounding: 7 of 25 is 0.28."""
    found: Result = result_of(evaluate(run.run_dir, Named(size=8), episodes=6, device="cpu"))
    right = sum(episode.right for episode in found.episodes)
    assert found.evaluation["accuracy"] == right / 150
    assert all(value * 150 == round(value * 150) for value in found.evaluation["accuracy_by_step"])
