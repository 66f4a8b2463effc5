"""Pictures of runs and comparisons, by matplotlib."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamldata.errors import RequestError
from mamldata.io.atomic import write_atomic
from mamldata.words import install_command, shortened
from trainer.maml.algorithms import ALGORITHMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from trainer.reports.compare import Comparison

# Okabe and Ito 2008, "Color Universal Design": also distinct to colour-blind people.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_BASELINE = "#808080"
_LONGEST = 24  # characters of a name
_METADATA = ("Creator", "Date", "Format", "Type")  # of an SVG, all left out: the date would differ
COSTS = {"milliseconds": "time of an outer step, ms", "peak_mib": "its peak memory, MiB"}

Row = Mapping[str, Any]


def have_matplotlib() -> bool:
    """Whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Check that pictures can be drawn.

    Raises:
        RequestError: matplotlib is not installed; the message has the command that installs it.
    """
    if not have_matplotlib():
        raise RequestError(f"Pictures need matplotlib: {install_command('plots')}.")


def plot_run(run_dir: Path) -> Path:
    """Draw a run's loss and accuracy by outer step into its folder, as ``curves.png``.

    Raises:
        RequestError: matplotlib is not installed.
        WriteError: the folder cannot be written to.
    """
    from trainer.runs import metrics  # imports torch, which a page on an archive does not need

    figure, (losses, accuracies) = _figure(1, 2)
    rows = metrics.read(run_dir)
    draw_losses(losses, rows)
    draw_accuracies(accuracies, rows)
    return _save(figure, run_dir / "curves.png")


def draw_losses(axes: Axes, rows: Sequence[Row]) -> None:
    """A run's query loss by outer step."""
    train, val = _of_event(rows, "train"), _of_event(rows, "val")
    axes.plot([row["step"] for row in train], [row["loss"] for row in train], marker=_alone(train), color=_COLOURS[0])
    axes.plot([row["step"] for row in val], [row["loss"] for row in val], color=_COLOURS[1], marker=".")
    axes.locator_params(axis="x", integer=True)
    _label(axes, "outer step", "query loss, nats")


def draw_accuracies(axes: Axes, rows: Sequence[Row]) -> None:
    """A run's query accuracy by outer step, that of validation with its interval."""
    train, val = _of_event(rows, "train"), _of_event(rows, "val")
    axes.plot(*_percent(train), marker=_alone(train), color=_COLOURS[0], label=_after("train", train))
    _curve(axes, val, _COLOURS[1], _after("val", val))
    axes.locator_params(axis="x", integer=True)
    _label(axes, "outer step", "query accuracy, %", legend=True)


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
    from trainer.runs import metrics

    entries = result.to_json()["entries"]
    rows = {entry.name: metrics.read(entry.run.run_dir) for entry in result.entries}
    paths = []
    single: dict[str, Callable[[Axes], None]] = {
        "learning.png": lambda axes: draw_learning(axes, entries, rows),
        "accuracy.png": lambda axes: draw_accuracy(axes, entries),
        "inner-steps.png": lambda axes: draw_inner_steps(axes, entries),
    }
    for name, draw in single.items():
        figure, (axes,) = _figure(1, 1)
        draw(axes)
        paths.append(_save(figure, out / name))
    figure, panels = _figure(1, 2)
    for axes, key in zip(panels, COSTS, strict=True):
        draw_costs(axes, entries, key)
    paths.append(_save(figure, out / "costs.png"))
    return paths


# The functions below draw the ``entries`` of ``Comparison.to_json``.


def draw_learning(axes: Axes, entries: Sequence[Row], rows: Mapping[str, Sequence[Row]]) -> None:
    """Validation accuracy by outer step; ``rows`` are the metrics of each entry, by its name."""
    for name, look in _looks(entries).items():
        val = _of_event(rows[name], "val")
        if len(val) == 1:
            axes.axhline(100 * val[0]["accuracy"], **look)
        else:
            _curve(axes, val, **look)
    axes.locator_params(axis="x", integer=True)
    _label(axes, "outer step", "val accuracy, %", legend=True)


def draw_accuracy(axes: Axes, entries: Sequence[Row]) -> None:
    """Accuracy on the evaluated split, with intervals."""
    looks = _looks(entries)
    for place, entry in enumerate(entries):
        value, interval = 100 * entry["evaluation"]["accuracy"], 100 * entry["evaluation"]["interval"]
        axes.errorbar(value, place, xerr=interval, fmt="o", capsize=4, color=looks[entry["name"]]["color"])
        axes.annotate(f"{value:.2f} ± {interval:.2f}", (value, place), (0, 8), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(entries)), [look["label"] for look in looks.values()])
    axes.set_ylim(len(entries) - 0.5, -0.7)
    axes.margins(x=0.15)
    _label(axes, f"{entries[0]['evaluation']['split']} accuracy, %, with 95 % interval", "")


def draw_inner_steps(axes: Axes, entries: Sequence[Row]) -> None:
    """Accuracy on the evaluated split before adaptation and after each inner step."""
    looks = _looks(entries)
    for entry in entries:
        values = [100 * value for value in entry["evaluation"]["accuracy_by_step"]]
        axes.plot(range(len(values)), values, marker="o", **looks[entry["name"]])
    axes.set_xticks(range(max(len(entry["evaluation"]["accuracy_by_step"]) for entry in entries)))
    _label(axes, "inner steps of adaptation", f"{entries[0]['evaluation']['split']} accuracy, %", legend=True)


def draw_costs(axes: Axes, entries: Sequence[Row], key: str) -> None:
    """What an outer step of each costs; ``key`` is one of ``COSTS``."""
    looks = _looks(entries)
    costs = {entry["name"]: entry["costs"][key] for entry in entries if entry["costs"]}
    bars = axes.barh(
        [looks[name]["label"] for name in costs], list(costs.values()), color=[looks[name]["color"] for name in costs]
    )
    axes.bar_label(bars, labels=[_rounded(value) for value in costs.values()], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    _label(axes, COSTS[key], "")


def draw_trade(axes: Axes, entries: Sequence[Row]) -> None:
    """Accuracy on the evaluated split against the time of an outer step."""
    looks = _looks(entries)
    for entry in entries:
        if entry["costs"]:
            place, look = (entry["costs"]["milliseconds"], 100 * entry["evaluation"]["accuracy"]), looks[entry["name"]]
            axes.errorbar(*place, yerr=100 * entry["evaluation"]["interval"], fmt="o", capsize=4, color=look["color"])
            axes.annotate(look["label"], place, (7, 5), textcoords="offset points")
    axes.margins(x=0.2, y=0.15)
    _label(axes, COSTS["milliseconds"], f"{entries[0]['evaluation']['split']} accuracy, %")


def draw_by_step(axes: Axes, values: Sequence[float], what: str) -> None:
    """A value before adaptation and after each inner step."""
    axes.plot(range(len(values)), values, marker="o", color=_COLOURS[1])
    axes.locator_params(axis="x", integer=True)
    _label(axes, "inner steps of adaptation", what)


def draw_occurrences(axes: Axes, counts: Sequence[int]) -> None:
    """How many images occur how often: ``counts[i]`` of them in ``i`` places of episodes."""
    step = max(1, -(-len(counts) // 40))  # 40 bars are as many as can be told apart
    sums = [sum(counts[start : start + step]) for start in range(0, len(counts), step)]
    axes.bar([step * (place + 0.5) - 0.5 for place in range(len(sums))], sums, width=0.9 * step, color=_COLOURS[0])
    axes.locator_params(axis="both", integer=True)
    _label(axes, "occurrences in episodes", "images")


def svg(draw: Callable[[Axes], object], name: str) -> str:
    """A small drawing as SVG to stand in a page, in whose style its ink is ``currentColor`` and its colours variables.

    Args:
        draw: draws into the axes.
        name: of the drawing in the page, from which the identifiers in it are made: the same for the same drawing.

    Raises:
        RequestError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 11}
    content = io.StringIO()
    with matplotlib.rc_context(style):
        figure, (axes,) = _figure(1, 1, size=(5.2, 3.4))
        draw(axes)
        figure.savefig(content, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
    text = content.getvalue()
    text = re.sub(r' id="[a-z0-9.]+_[0-9]+"', "", text[text.index("<svg") :])  # equal in all drawings of a page
    text = re.sub(r' (?:width|height)="[0-9.]+pt"', "", text, count=2).replace("#000000", "currentColor")
    for place, colour in enumerate(_COLOURS[:-1]):
        text = text.replace(colour.lower(), f"var(--colour{place})")
    return text


def _of_event(rows: Sequence[Row], event: str) -> list[Row]:
    return [row for row in rows if row["event"] == event]


def _alone(rows: Sequence[Row]) -> str:
    """The marker of a curve: a line through one point is invisible."""
    return "." if len(rows) == 1 else ""


def _after(name: str, rows: Sequence[Row]) -> str:
    """A curve's name with the inner steps that its episodes take, which differ between training and validation."""
    steps = len(rows[-1]["accuracy_by_step"]) - 1 if rows else 0
    return f"{name}, {steps} inner step{'' if steps == 1 else 's'}" if steps else f"{name}, without adaptation"


def _looks(entries: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Colours and lines, the same in all pictures of a comparison."""
    looks: dict[str, dict[str, Any]] = {}
    lines = iter(("--", ":", "-."))
    for entry in entries:
        label = ascii(shortened(entry["name"], _LONGEST))[1:-1]  # of a file; matplotlib's font has few letters
        baseline = ALGORITHMS[entry["settings"]["algorithm"]].outer in {"joint", "none"}
        colour = _BASELINE if baseline else _COLOURS[len(looks) % len(_COLOURS)]
        looks[entry["name"]] = {"color": colour, "linestyle": next(lines, "--") if baseline else "-", "label": label}
    return looks


def _rounded(value: float) -> str:
    """With three digits, and with all of those before the point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def _figure(rows: int, columns: int, size: tuple[float, float] | None = None) -> tuple[Figure, Sequence[Axes]]:
    require_matplotlib()
    # Not pyplot, which keeps global state and may want a display.
    from matplotlib.figure import Figure

    size = size or (5.5 * columns if columns > 1 else 7, 4.2 * rows)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _percent(rows: Sequence[Row]) -> tuple[list[int], list[float]]:
    return [row["step"] for row in rows], [100 * row["accuracy"] for row in rows]


def _curve(axes: Axes, rows: Sequence[Row], color: str, label: str, linestyle: str = "-") -> None:
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
        figure: Any = axes.figure
        below = figure.get_figwidth() < 6
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": 3} if below else {"loc": "outside right upper"}
        figure.legend(frameon=False, **place)


def _save(figure: Figure, path: Path) -> Path:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomic(path, content.getvalue())
    return path
