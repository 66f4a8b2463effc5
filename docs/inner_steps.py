"""Draw the README's picture, accuracy by inner step: python docs/inner_steps.py "NAME OF THE LINE=RESULT.json" ..."""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

from trainer.results import read_result

PICTURE = Path(__file__).with_name("images") / "inner-steps.png"
COLOURS = ("#0072B2", "#D55E00")  # Okabe and Ito 2008: distinct to colour-blind people, too


def draw(lines: dict[str, Path]) -> Figure:
    """The picture of some evaluations, given by the name of each line."""
    figure = Figure(figsize=(7, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for (name, file), colour in zip(lines.items(), COLOURS, strict=True):
        evaluation = read_result(file).evaluation
        values = [100 * value for value in evaluation["accuracy_by_step"]]
        axes.plot(values, marker="o", color=colour)
        end = (len(values) - 1, values[-1])
        label = f"{name}: {values[-1]:.1f} %"
        axes.annotate(label, end, (0, 8), textcoords="offset points", ha="right", color=colour)
    axes.set_xticks(range(len(values)))
    axes.axhline(100 / evaluation["n_way"], color="#808080", linestyle=":")
    axes.set_xlabel("gradient steps on one image of each class")
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(0, 108)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    given = (word.partition("=") for word in sys.argv[1:])
    draw({name: Path(file) for name, _, file in given}).savefig(PICTURE)
