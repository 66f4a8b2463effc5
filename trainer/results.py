"""The file of an evaluation, with every answer, and what can be asked of it later.

It is in the folder ``results`` beside the checkpoint; docs/training.md describes its name and its content.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mamldata.errors import DamagedError, RequestError
from mamldata.io.atomic import make_folder, read_whole, write_atomic
from mamldata.io.digest import canonical_json, parse_json, sha256_bytes
from trainer.evaluation import Evaluation
from trainer.intervals import class_half_width, half_width
from trainer.runs import model

FOLDER = "results"
_FORMAT = "mamldata-result/1"
_TARGETS = "mamldata-targets/1"
_NAMELESS = "This result does not name the classes of its episodes: the data did not tell them."
_MOST_BYTES, _MOST_VALUES = 1 << 28, 1 << 26
# Keys of the target's description that do not tell its evaluated episodes from others.
_INCIDENTAL = ("source", "normalisation", "image", "remix")


class EpisodeResult(NamedTuple):
    """One episode.

    Attributes:
        index: in its split; ``mamldata preview`` draws it.
        right: number of right answers after the last inner step.
        loss: mean query loss after the last inner step, in nats; None if it is not finite.
        classes: of each label, as positions in ``Result.class_names``; None if the data do not name them.
        queries: number of query images of each label.
        given: the label given to each query image: first to those of label 0, then to those of label 1, and so on.
    """

    index: int  # type: ignore[assignment]  # tuple.index is not needed here
    right: int
    loss: float | None
    classes: tuple[int, ...] | None
    queries: tuple[int, ...]
    given: tuple[int, ...]

    @property
    def true(self) -> npt.NDArray[np.int64]:
        """The true label of each query image, int64 ``[queries]``."""
        return np.arange(len(self.queries)).repeat(self.queries)


@dataclass(frozen=True)
class Result:
    """An evaluation as its file holds it.

    Attributes:
        checkpoint: ``file``, the name of the checkpoint, and ``step``, the outer steps done.
        settings: of the run, by ``TrainSettings.resolved``.
        environment: versions, platform, device, hardware, threads, processes.
        target: the episodes' description, see ``TrainData.describe``.
        evaluation: ``Evaluation.to_json``.
        right_by_step: right answers of all episodes before adaptation and after each inner step.
        loss_by_step: mean query loss before adaptation and after each inner step, in nats; None if not finite.
        class_names: of the classes in these episodes, sorted; None if the data do not name them.
        episodes: in the order of the split.
    """

    checkpoint: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]
    target: dict[str, Any]
    evaluation: dict[str, Any]
    right_by_step: tuple[int, ...]
    loss_by_step: tuple[float | None, ...]
    class_names: tuple[str, ...] | None
    episodes: tuple[EpisodeResult, ...]

    @property
    def images(self) -> int:
        """Query images of an episode."""
        return int(self.evaluation["n_way"] * self.evaluation["k_query"])

    @property
    def name(self) -> str:
        """The name of its file: equal for another evaluation of the same kind, which replaces it."""
        measured = self.evaluation
        about = (
            f"{measured['split']}-{_digest(self.target)[:12]}",
            f"{measured['n_way']}w{measured['k_shot']}s{measured['k_query']}q-{Path(self.checkpoint['file']).stem}",
            f"{measured['episodes']}episodes-{measured['inner_steps']}steps",
            f"{self.environment['device']}-{measured['precision']}",
        )
        return "-".join(about) + ".json"


def result_of(evaluation: Evaluation) -> Result:
    """The result of an evaluation by ``trainer.evaluate``, with every answer."""
    origin, answers = evaluation.origin, evaluation.answers
    assert origin is not None, "evaluate_network does not know its checkpoint; evaluate does"
    assert answers is not None, "evaluate keeps all answers"
    names, classes = None, [None] * len(answers.index)
    if origin.class_names is not None:
        names = tuple(sorted({name for ways in origin.class_names for name in ways}))
        places = {name: place for place, name in enumerate(names)}
        classes = [tuple(places[name] for name in ways) for ways in origin.class_names]  # type: ignore[misc]
    rows = zip(
        answers.index.tolist(),
        answers.right[:, -1].tolist(),
        map(_finite, answers.losses[:, -1].tolist()),
        classes,
        (tuple(np.bincount(true, minlength=evaluation.n_way).tolist()) for true in answers.true),
        (
            tuple(given[true.argsort(kind="stable")].tolist())
            for true, given in zip(answers.true, answers.given, strict=True)
        ),
        strict=True,
    )
    return Result(
        checkpoint={"file": origin.checkpoint.name, "step": origin.step},
        settings=origin.settings,
        environment=origin.environment,
        target=json.loads(json.dumps(origin.target)),  # lists in place of tuples, as in the file
        evaluation=json.loads(json.dumps({**evaluation.to_json(), "loss": _finite(evaluation.loss)})),
        right_by_step=tuple(answers.right.sum(0).tolist()),
        loss_by_step=tuple(map(_finite, answers.losses.mean(0).tolist())),
        class_names=names,
        episodes=tuple(EpisodeResult(*row) for row in rows),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no other numbers


def save_result(evaluation: Evaluation) -> Path:
    """Write the result of an evaluation by ``trainer.evaluate`` into the folder ``results`` beside its checkpoint.

    Of a model that comes with the package, into ``results`` in the current folder.

    Returns:
        The file; an earlier one of the same checkpoint, target and settings is replaced.

    Raises:
        WriteError: the folder cannot be written to.
    """
    assert evaluation.origin is not None, "evaluate_network does not know its checkpoint; evaluate does"
    result = result_of(evaluation)
    beside = evaluation.origin.checkpoint.parent
    path = (Path() if beside == model.SHIPPED else beside) / FOLDER / result.name
    make_folder(path.parent)
    head = {"format": _FORMAT, **asdict(result)}
    del head["episodes"]
    lines = [json.dumps(episode._asdict(), separators=(",", ":"), allow_nan=False) for episode in result.episodes]
    # An episode a line, which other tools can read one by one.
    text = json.dumps(head, indent=1, allow_nan=False)[:-2] + ',\n "episodes": [\n' + ",\n".join(lines) + "\n]\n}\n"
    write_atomic(path, text.encode())
    return path


def save_targets(folder: Path, checkpoint: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write a table of evaluations on several targets into ``targets`` below the folder of their results.

    Args:
        folder: where ``save_result`` wrote.
        checkpoint: its file.
        rows: one for each target, as values for JSON: ``target``, and either ``error`` or the keys of
            ``Evaluation.to_json``, ``digest`` and ``file``, the name of its file in ``results``.

    Returns:
        The file; an earlier one of the same checkpoint and targets is replaced.

    Raises:
        WriteError: the folder cannot be written to.
    """
    names = sha256_bytes(canonical_json([[row["target"] for row in rows]]))[:12]
    path = folder / "targets" / f"{checkpoint.stem}-{names}.json"
    make_folder(path.parent)
    finite = [{key: _finite(value) if key == "loss" else value for key, value in row.items()} for row in rows]
    head = {"format": _TARGETS, "checkpoint": checkpoint.name, "targets": finite}
    write_atomic(path, (json.dumps(head, indent=1, allow_nan=False) + "\n").encode())
    return path


def read_result(path: Path | str) -> Result:
    """Read the file of an evaluation.

    Raises:
        RequestError: it is not the file of an evaluation.
        DamagedError: its content contradicts itself.
    """
    path = Path(path)
    try:
        content = parse_json(read_whole(path, _MOST_BYTES), _MOST_VALUES)
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} is not the file of an evaluation: {error}.") from error
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        raise RequestError(f"{path} is not the file of an evaluation ({_FORMAT}).")
    try:
        names, rows = content.pop("class_names"), content.pop("episodes")
        result = Result(
            class_names=None if names is None else tuple(names),
            episodes=tuple(_episode(**row) for row in rows),
            right_by_step=tuple(content.pop("right_by_step")),
            loss_by_step=tuple(content.pop("loss_by_step")),
            **content,
        )
        _require_consistent(result)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise DamagedError(f"{path} is damaged ({error!r}). Evaluate the checkpoint again.") from error
    return result


def _episode(
    index: int, right: int, loss: float | None, classes: list[int] | None, queries: list[int], given: list[int]
) -> EpisodeResult:
    places = None if classes is None else tuple(classes)
    return EpisodeResult(index, right, loss, places, tuple(queries), tuple(given))


def _require_consistent(result: Result) -> None:
    """Check that the answers are labels, and that they add up to the numbers of right ones and to the accuracy."""
    n_way, names = result.evaluation["n_way"], result.class_names
    if not isinstance(result.evaluation["split"], str):
        raise ValueError("the split has no name")
    if not all(isinstance(name, str) for name in names or ()):
        raise ValueError("a class has no name")
    for episode in result.episodes:
        if type(episode.index) is not int or type(episode.loss) not in {int, float, type(None)}:
            raise ValueError("an episode has no index or no loss")
        if len(episode.queries) != n_way or sum(episode.queries) != result.images:
            raise ValueError(f"episode {episode.index} has other numbers of query images")
        given, true = np.array(episode.given), episode.true
        if given.shape != true.shape or given.min() < 0 or given.max() >= n_way:
            raise ValueError(f"episode {episode.index} has other labels than its query images")
        if (given == true).sum() != episode.right:
            raise ValueError(f"episode {episode.index} has other answers than {episode.right} right ones")
        if names is not None and [0 <= one < len(names) for one in episode.classes or ()] != [True] * n_way:
            raise ValueError(f"episode {episode.index} has other classes than {n_way} of those named")
    right = sum(episode.right for episode in result.episodes)
    if result.evaluation["accuracy"] != right / (len(result.episodes) * result.images):
        raise ValueError("the accuracy is not that of the episodes")


def worst_episodes(result: Result, count: int = 10) -> list[EpisodeResult]:
    """The episodes with the fewest right answers, the worst first; among equals, the one with the larger loss."""

    def badness(episode: EpisodeResult) -> tuple[int, float, int]:
        return episode.right, -(math.inf if episode.loss is None else episode.loss), episode.index

    return sorted(result.episodes, key=badness)[:count]


class Confusion(NamedTuple):
    """Which classes were taken for which.

    Attributes:
        names: of the C classes.
        counts: query images of class i that were taken for class j, int64 ``[C, C]``.
    """

    names: tuple[str, ...]
    counts: npt.NDArray[np.int64]


def confusion(result: Result) -> Confusion:
    """Count over all episodes which classes were taken for which; a class can be taken only for those beside it.

    Raises:
        RequestError: the result does not name the classes.
    """
    names = result.class_names
    if names is None:
        raise RequestError(_NAMELESS)
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    for episode in result.episodes:
        classes = np.array(episode.classes)
        np.add.at(counts, (classes[episode.true], classes[np.array(episode.given)]), 1)
    return Confusion(names, counts)


_TURNED = re.compile(r", turned (90|180|270)$")  # see ``ClassTable.label``


def class_interval(result: Result) -> float:
    """Half the width of the 95 % interval of the accuracy for other classes, of which those evaluated are a sample.

    The interval beside the accuracy, ``evaluation["interval"]``, is for more episodes of the same classes. This one is
    wider; see ``trainer.intervals.class_half_width``. The turned images of a class belong to that class.

    Raises:
        RequestError: the result does not name the classes, or has too few episodes or classes to tell.
    """
    if result.class_names is None:
        raise RequestError(_NAMELESS)
    roots = {name: place for place, name in enumerate(dict.fromkeys(map(_root, result.class_names)))}
    places = np.array([roots[_root(name)] for name in result.class_names])
    classes = places[np.array([episode.classes for episode in result.episodes])]
    return class_half_width(np.array([episode.right / result.images for episode in result.episodes]), classes)


def known_class_interval(result: Result) -> float | None:
    """``class_interval``; None if the result does not tell."""
    with suppress(RequestError):
        return class_interval(result)
    return None


def _root(name: str) -> str:
    return _TURNED.sub("", name)


class Difference(NamedTuple):
    """The difference of two accuracies on the same episodes.

    Attributes:
        ahead: mean accuracy of the first minus that of the second.
        interval: half the width of its 95 % confidence interval, taken episode by episode, so that the difficulty of
            an episode cancels.
    """

    ahead: float
    interval: float


def paired_difference(one: Result, other: Result) -> Difference:
    """Compare two results on the same episodes.

    Raises:
        RequestError: they are of other data, of another split or of other episodes; the message lists what differs.
    """
    mine, theirs = _identity(one), _identity(other)
    if wrong := [
        f"{key}: {mine.get(key)!r} and {theirs.get(key)!r}"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    ]:
        raise RequestError("The two results are not of the same episodes:\n" + "\n".join(f"  {line}" for line in wrong))
    if [episode.index for episode in one.episodes] != [episode.index for episode in other.episodes]:
        raise RequestError("The two results are not of the same episodes of the split: their indices differ.")
    gaps = [(a.right - b.right) / one.images for a, b in zip(one.episodes, other.episodes, strict=True)]
    return Difference(statistics.fmean(gaps), half_width(statistics.stdev(gaps), len(gaps)))


def _identity(result: Result) -> dict[str, Any]:
    """What tells the evaluated episodes from others."""
    evaluated = {"split": result.evaluation["split"], "episodes": len(result.episodes)}
    return {**{key: value for key, value in result.target.items() if key not in _INCIDENTAL}, **evaluated}


def _digest(target: dict[str, Any]) -> str:
    """Of the archive; of other episodes, that of their description."""
    known = {key: value for key, value in target.items() if key not in _INCIDENTAL}
    return target.get("archive_sha256") or sha256_bytes(canonical_json(known))
