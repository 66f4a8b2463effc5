"""The page of a run: its settings, curves, results, and the episodes that it answers worst and best."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from mamldata.errors import DamagedError, RequestError
from mamldata.io.atomic import MOST_NOTE, read_whole
from mamldata.io.digest import parse_json
from mamldata.io.urls import is_remote
from mamldata.parallel import default_workers
from mamldata.sampling.sampler import LEAST
from mamldata.sources.live import live
from mamldata.sources.open import open_archive
from mamldata.sources.source import SplitSource
from mamldata.words import quoted
from trainer.reports.page import MOST_PICTURES, Problems, drawing
from trainer.reports.pictures import episode_rows
from trainer.reports.plots import draw_accuracies, draw_by_step, draw_losses
from trainer.results import FOLDER, Result, confusion, known_class_interval, read_result, worst_episodes
from trainer.runs import metrics
from trainer.runs.folder import CONFIG
from trainer.runs.recipe import Recipe, load_recipe, recipe_names
from trainer.settings import TrainSettings, saved_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_RESULTS = 50  # files that are read
_MOST_POINTS = 1000  # of a curve
_HARDEST, _EASIEST = 6, 4  # episodes shown
_MOST_CONFUSED = 4000  # classes whose confusion is counted
_MOST_CELLS = 25  # classes of a confusion that is shown as a table
_PAIRS = 15  # pairs of classes, and classes, shown of a larger one


def run_page(
    run_dir: Path,
    now: datetime,
    *,
    data: Path | str | None = None,
    root: str | None = None,
    cache_dir: Path | None = None,
) -> dict[str, Any]:
    """The values of the template ``run``.

    Args:
        run_dir: the run's folder.
        now: the time that the page gives.
        data: the archive, or the dataset, of the evaluated episodes; None: where the result says that they are.
        root: the data root.
        cache_dir: where to keep the shards of an archive at an address.

    Returns:
        Plain values. ``problems`` lists what cannot be shown, and why.

    Raises:
        RequestError: the folder holds no run.
        DamagedError: its ``config.json`` is damaged.
    """
    problems = Problems()
    settings, about, config = _config(run_dir / CONFIG)
    rows = _thinned(metrics.read(run_dir))
    files = sorted((run_dir / FOLDER).glob("*.json"))
    read = [problems.without(read_result, file) for file in files[:_MOST_RESULTS]]
    results: list[Result] = [result for result in read if result is not None]
    # The one that is shown in full: on the test split, on the most episodes.
    ranked = sorted(results, key=lambda one: (one.evaluation["split"] == "test", len(one.episodes)))
    main = ranked[-1] if ranked else None
    page = {
        "title": str(run_dir),
        "now": now,
        "problems": problems,
        "settings": settings,
        "data": about,
        "start": config.get("start"),
        "recipe": (recipe := _recipe(settings, about)),
        "recipe_differences": list(recipe.differences(about)) if recipe else [],
        "table": _settings_table(settings, recipe),
        "best": max((row for row in rows if row["event"] == "val"), key=lambda row: row["accuracy"], default=None),
        "costs": list(_costs(rows)),
        "loss": drawing("loss", lambda axes: draw_losses(axes, rows)) if rows else "",
        "accuracy": drawing("accuracy", lambda axes: draw_accuracies(axes, rows)) if rows else "",
        "results": [(result, known_class_interval(result)) for result in results],
        "more_results": max(0, len(files) - _MOST_RESULTS),
        "main": main,
        "environment": _flat(main.environment if main else config.get("versions")),
    }
    return page | (_answers(main, problems, data, root, cache_dir) if main else {})


def _config(path: Path) -> tuple[TrainSettings, dict[str, Any], dict[str, Any]]:
    """The settings, the data and all of ``config.json``."""
    try:
        config = parse_json(read_whole(path, MOST_NOTE))
        about = config["data"]
        if not all(type(about[key]) is int for key in LEAST) or not isinstance(about["dataset"], str):
            raise ValueError("its data are not described")
        return saved_settings(config["settings"], path), about, config
    except FileNotFoundError:
        raise RequestError(f"{path.parent} holds no run: it has no {CONFIG}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} is damaged ({error!r}). Start again in another folder.") from error


def _thinned(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of both events that have all numbers, evenly thinned to what a curve can show."""
    needed = {"train": ("step", "loss", "accuracy", "ms_per_step"), "val": ("step", "loss", "accuracy", "interval")}
    kept: list[Mapping[str, Any]] = []
    for event, keys in needed.items():
        own = [row for row in rows if row.get("event") == event and all(_is_number(row.get(key)) for key in keys)]
        kept += own[:: math.ceil(len(own) / _MOST_POINTS) or 1]
    return kept


def _is_number(value: object) -> bool:
    return type(value) in {int, float} and abs(value) < 1e12  # type: ignore[arg-type]  # not for NaN either


def _recipe(settings: TrainSettings, about: Mapping[str, Any]) -> Recipe | None:
    """The recipe for the same algorithm, dataset, ways and shots with the fewest other settings; None if none is."""
    ours = settings.resolved()
    fitting = []
    for recipe in map(load_recipe, recipe_names()):
        own = TrainSettings(**recipe.settings)
        alike = recipe.dataset == about["dataset"] and own.algorithm == settings.algorithm
        if alike and all(recipe.episodes[key] == about[key] for key in ("n_way", "k_shot")):
            differing = sum(ours[key] != value for key, value in own.resolved().items())
            fitting.append((differing, recipe.name, recipe))
    return min(fitting)[2] if fitting else None


def _settings_table(settings: TrainSettings, recipe: Recipe | None) -> list[dict[str, Any]]:
    """Each setting with the recipe's value, if there is a recipe, and the default of the algorithm."""
    default = TrainSettings(algorithm=settings.algorithm).resolved()
    theirs = TrainSettings(**recipe.settings).resolved() if recipe else default
    return [
        {"name": name, "value": value, "recipe": theirs[name], "default": default[name]}
        for name, value in settings.resolved().items()
    ]


def _costs(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """What training took, as its log says: medians over the lines of the log."""
    train = [row for row in rows if row["event"] == "train"]
    if not train:
        return
    steps = [row["step"] - before for row, before in zip(train, [0, *(row["step"] for row in train)], strict=False)]
    hours, rest = divmod(sum(row["ms_per_step"] * step for row, step in zip(train, steps, strict=True)) / 60_000, 60)
    yield "training steps", f"{hours:.0f} h {rest:.0f} min" if hours else f"{rest:.1f} min"
    if spent := [row["seconds"] for row in rows if _is_number(row.get("seconds"))]:
        yield "a validation", f"{median(spent):.1f} s"
    for key, name, unit in (
        ("ms_per_step", "an outer step", "ms"),
        ("images_per_second", "images", "per second"),
        ("data_wait_percent", "waiting for data", "%"),
        ("allocated_mib", "peak memory of tensors", "MiB"),
    ):
        if values := [row[key] for row in train if _is_number(row.get(key))]:
            yield name, f"{median(values):,.1f} {unit}"


def _flat(values: object) -> list[tuple[str, Any]]:
    """The entries of a dict, with those of the dicts in it."""
    return [
        pair
        for key, value in (values.items() if isinstance(values, dict) else ())
        for pair in (value.items() if isinstance(value, dict) else [(key, value)])
    ]


def _answers(
    result: Result, problems: Problems, data: Path | str | None, root: str | None, cache_dir: Path | None
) -> dict[str, Any]:
    """What a result says of each inner step, of episodes and of classes."""

    def accuracies(axes: Axes) -> None:
        images = len(result.episodes) * result.images
        draw_by_step(axes, [100 * right / images for right in result.right_by_step], "accuracy, %")

    def losses(axes: Axes) -> None:
        values = [math.nan if loss is None else loss for loss in result.loss_by_step]
        draw_by_step(axes, values, "query loss, nats")

    ordered = worst_episodes(result, len(result.episodes))
    wanted = [*ordered[:_HARDEST], *ordered[_HARDEST:][-_EASIEST:][::-1]]
    source = problems.without(_source, result, data, root, cache_dir)
    shown: list[dict[str, Any]] = []
    for episode in wanted if source is not None else ():
        named = source.class_labels(episode.index)
        if result.class_names and episode.classes and named != [result.class_names[one] for one in episode.classes]:
            problems.append(f"Episode {episode.index} has other classes here than those of the result.")
            break
        share = MOST_PICTURES // len(wanted)
        rows = problems.without(episode_rows, source, episode.index, share, episode.given)
        if rows is None:
            break
        title = f"episode {episode.index:,}: {episode.right} of {result.images} right"
        shown.append({"title": title, "rows": rows, "more": source.info.n_way - len(rows)})
    return {
        "step_accuracy": drawing("step-accuracy", accuracies),
        "step_loss": drawing("step-loss", losses),
        "hardest": shown[:_HARDEST],
        "easiest": shown[_HARDEST:],
        "confusion": _confusion(result),
    }


def _source(result: Result, data: Path | str | None, root: str | None, cache_dir: Path | None) -> SplitSource:
    """The evaluated episodes.

    Raises:
        RequestError: they are at an address, which only the user may have read from; or others are at this place.
        MamldataError: they are not there, or damaged.
    """
    target, split = result.target, result.evaluation["split"]
    try:
        place, shape = data or target["source"], {key: target[key] for key in LEAST}
        own: dict[str, Any] = {"seed": target["episode_seed"], "image_size": target["image_shape"][0]}
        own |= {key: target.get(key) for key in ("split_scheme", "rotations", "query_alpha")}
        stored = target["archive_sha256"] is not None
    except (KeyError, TypeError, IndexError) as error:
        raise RequestError(f"The result does not describe its episodes ({error!r}).") from error
    source: SplitSource
    if stored and data is None and is_remote(place):
        raise RequestError(f"The episodes are at {place}, and nothing is fetched unasked. Name it to show them.")
    try:
        if stored:
            whole = open_archive(place, split, cache_dir=cache_dir)
            source = whole.narrowed(**{key: value for key, value in shape.items() if value != getattr(whole.info, key)})
        else:
            disjoint, workers = bool(target.get("disjoint")), default_workers()
            source = live(str(place), split, root=root, workers=workers, disjoint=disjoint, **shape, **own)
    except (OSError, ValueError, TypeError) as error:  # of a place that is no name of a file
        raise RequestError(f"The episodes of the result cannot be opened at {quoted(place)}: {error}.") from error
    if different := [key for key in ("archive_sha256", "bank_sha256") if getattr(source.info, key) != target.get(key)]:
        raise RequestError(f"{place} has other episodes than those of the result: {different[0]} differs.")
    return source


def _confusion(result: Result) -> dict[str, Any] | None:
    """Which classes were taken for which: all of them, or the most frequent pairs and the hardest classes."""
    if result.class_names is None or len(result.class_names) > _MOST_CONFUSED:
        return None
    names, counts = confusion(result)
    total, right = counts.sum(1), counts.diagonal()
    page: dict[str, Any] = {"names": [], "counts": [], "pairs": [], "classes": [], "of": len(names)}
    if len(names) <= _MOST_CELLS:
        page |= {"names": names, "counts": counts.tolist(), "totals": total.tolist()}
    wrong = counts - np.diag(right)
    for place in np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS].tolist():
        true, given = divmod(place, len(names))
        if wrong[true, given]:
            page["pairs"].append((names[true], names[given], int(wrong[true, given]), int(total[true])))
    for one in np.argsort(right / np.maximum(total, 1), kind="stable")[:_PAIRS].tolist():
        if right[one] < total[one]:
            page["classes"].append((names[one], int(right[one]), int(total[one])))
    return page
