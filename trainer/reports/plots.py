"""Pictures of runs and comparisons, by matplotlib."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamldata.errors import RequestError
from mamldata.io.atomic import write_atomic
from mamldata.words import install_command
from trainer.maml.algorithms import ALGORITHMS
from trainer.runs import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from trainer.reports.compare import Comparison, Entry

# Okabe and Ito 2008, "Color Universal Design": also distinct to colour-blind people.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_BASELINE = "#808080"


def have_matplotlib() -> bool:
    """Whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_run(run_dir: Path) -> Path:
    """Draw a run's loss and accuracy by outer step into its folder, as ``curves.png``.

    Raises:
        RequestError: matplotlib is not installed.
        WriteError: the folder cannot be written to.
    """
    figure, (losses, accuracies) = _figure(1, 2)
    rows = metrics.read(run_dir)
    train = [row for row in rows if row["event"] == "train"]
    alone = "." if len(train) == 1 else ""  # a line through one point is invisible
    losses.plot([row["step"] for row in train], [row["loss"] for row in train], marker=alone, color=_COLOURS[0])
    accuracies.plot(*_percent(train), marker=alone, color=_COLOURS[0], label=_after("train", train))
    val = [row for row in rows if row["event"] == "val"]
    losses.plot([row["step"] for row in val], [row["loss"] for row in val], color=_COLOURS[1], marker=".")
    _curve(accuracies, val, _COLOURS[1], _after("val", val))
    _label(losses, "outer step", "query loss, nats")
    _label(accuracies, "outer step", "query accuracy, %", legend=True)
    for axes in (losses, accuracies):
        axes.locator_params(axis="x", integer=True)
    return _save(figure, run_dir / "curves.png")


def plot_comparison(result: Comparison, out: Path) -> list[Path]:
    """Draw a comparison into its folder.

    Returns:
        ``learning.png``, validation accuracy by outer step; ``accuracy.png``, on the evaluated split, with intervals;
        ``inner-steps.png``, that accuracy before adaptation and after each inner step; ``costs.png``, time and memory
        of an outer step. Algorithms without meta-learning are drawn dashed and grey.

    Raises:
        RequestError: matplotlib is not installed.
        WriteError: the folder cannot be written to.
    """
    looks = _looks(result.entries)
    split = result.entries[0].evaluation.split
    paths = []

    figure, (axes,) = _figure(1, 1)
    for entry in result.entries:
        rows = [row for row in metrics.read(entry.run.run_dir) if row["event"] == "val"]
        _curve(axes, rows, **looks[entry.name]) if len(rows) > 1 else axes.axhline(
            100 * rows[0]["accuracy"], **looks[entry.name]
        )
    axes.locator_params(axis="x", integer=True)
    _label(axes, "outer step", "val accuracy, %", legend=True)
    paths.append(_save(figure, out / "learning.png"))

    figure, (axes,) = _figure(1, 1)
    names = [entry.name for entry in result.entries]
    for place, entry in enumerate(result.entries):
        value, interval = 100 * entry.evaluation.accuracy, 100 * entry.evaluation.interval
        axes.errorbar(value, place, xerr=interval, fmt="o", capsize=4, color=looks[entry.name]["color"])
        axes.annotate(f"{value:.2f} ± {interval:.2f}", (value, place), (0, 8), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.7)
    axes.margins(x=0.15)
    _label(axes, f"{split} accuracy, %, with 95 % interval", "")
    paths.append(_save(figure, out / "accuracy.png"))

    figure, (axes,) = _figure(1, 1)
    for entry in result.entries:
        values = [100 * value for value in entry.evaluation.accuracy_by_step]
        axes.plot(range(len(values)), values, marker="o", **looks[entry.name])
    axes.set_xticks(range(max(len(entry.evaluation.accuracy_by_step) for entry in result.entries)))
    _label(axes, "inner steps of adaptation", f"{split} accuracy, %", legend=True)
    paths.append(_save(figure, out / "inner-steps.png"))

    figure, panels = _figure(1, 2)
    costs = {entry.name: entry.costs for entry in result.entries if entry.costs}
    for axes, key, what in zip(
        panels, ("milliseconds", "peak_mib"), ("time of an outer step, ms", "its peak memory, MiB"), strict=True
    ):
        values = [getattr(cost, key) for cost in costs.values()]
        bars = axes.barh(list(costs), values, color=[looks[name]["color"] for name in costs])
        axes.bar_label(bars, labels=[_rounded(value) for value in values], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        _label(axes, what, "")
    paths.append(_save(figure, out / "costs.png"))
    return paths


def _after(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A curve's name with the inner steps that its episodes take, which differ between training and validation."""
    steps = len(rows[-1]["accuracy_by_step"]) - 1 if rows else 0
    return f"{name}, {steps} inner step{'' if steps == 1 else 's'}" if steps else f"{name}, without adaptation"


def _looks(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """Colours and lines, the same in all pictures of a comparison."""
    looks: dict[str, dict[str, Any]] = {}
    lines = iter(("--", ":", "-."))
    for entry in entries:
        if ALGORITHMS[entry.settings.algorithm].outer in {"joint", "none"}:
            looks[entry.name] = {"color": _BASELINE, "linestyle": next(lines, "--"), "label": entry.name}
        else:
            looks[entry.name] = {"color": _COLOURS[len(looks) % len(_COLOURS)], "linestyle": "-", "label": entry.name}
    return looks


def _rounded(value: float) -> str:
    """With three digits, and with all of those before the point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def _figure(rows: int, columns: int) -> tuple[Figure, Sequence[Axes]]:
    if not have_matplotlib():
        raise RequestError(f"Pictures need matplotlib: {install_command('plots')}.")
    # Not pyplot, which keeps global state and may want a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns if columns > 1 else 7, 4.2 * rows), dpi=120, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _percent(rows: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float]]:
    return [row["step"] for row in rows], [100 * row["accuracy"] for row in rows]


def _curve(axes: Axes, rows: Sequence[Mapping[str, Any]], color: str, label: str, linestyle: str = "-") -> None:
    """Validation accuracy with its interval as a band."""
    steps, values = _percent(rows)
    intervals = [100 * row["interval"] for row in rows]
    axes.plot(steps, values, marker=".", color=color, linestyle=linestyle, label=label)
    low = [value - interval for value, interval in zip(values, intervals, strict=True)]
    high = [value + interval for value, interval in zip(values, intervals, strict=True)]
    axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)


def _label(axes: Axes, x: str, y: str, *, legend: bool = False) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if legend and axes.figure:
        axes.figure.legend(loc="outside right upper", frameon=False)


def _save(figure: Figure, path: Path) -> Path:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomic(path, content.getvalue())
    return path
