"""The page of a comparison: its table, the difference of every two algorithms, and what accuracy costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from mamldata.errors import DamagedError, RequestError
from mamldata.io.atomic import MOST_TEXT, read_whole
from mamldata.io.digest import parse_json
from trainer.intervals import half_width
from trainer.reports.compare import heading, rows
from trainer.reports.page import drawing
from trainer.reports.plots import COSTS, draw_accuracy, draw_costs, draw_inner_steps, draw_learning, draw_trade
from trainer.runs import metrics
from trainer.runs.folder import COMPARISON

_MOST_VALUES = 1 << 22


def comparison_page(folder: Path, now: datetime) -> dict[str, Any]:
    """The values of the template ``comparison``.

    Args:
        folder: of ``compare``, with the folders of its runs.
        now: the time that the page gives.

    Raises:
        RequestError: the folder holds no finished comparison.
        DamagedError: its ``compare.json`` is damaged.
    """
    path = folder / COMPARISON
    try:
        compared = parse_json(read_whole(path, MOST_TEXT), _MOST_VALUES)
        entries = compared["entries"]
        names = [_name(entry) for entry in entries]
        logs = {name: metrics.read(folder / name) for name in names}
        head, *lines = rows(compared)
        pictures = {
            "learning": drawing("learning", lambda axes: draw_learning(axes, entries, logs)),
            "accuracy": drawing("accuracy", lambda axes: draw_accuracy(axes, entries)),
            "inner_steps": drawing("inner-steps", lambda axes: draw_inner_steps(axes, entries)),
            "trade": drawing("trade", lambda axes: draw_trade(axes, entries)),
            **{key: drawing(key, partial(draw_costs, entries=entries, key=key)) for key in COSTS},
        }
        return {
            "title": str(folder),
            "now": now,
            "problems": [],
            "heading": heading(compared),
            "verdict": compared["verdict"],
            "head": head,
            "lines": lines,
            "names": names,
            "differences": [[_difference(one, other) for other in entries] for one in entries],
            **pictures,
        }
    except FileNotFoundError:
        raise RequestError(f"{folder} holds no finished comparison: it has no {COMPARISON}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DamagedError(f"{path} is damaged ({error!r}). Run the same comparison again.") from error


def _name(entry: Mapping[str, Any]) -> str:
    """The name of an entry, which is that of its folder.

    Raises:
        ValueError: it would be a folder elsewhere.
    """
    name = entry["name"]
    if not isinstance(name, str) or name in {"", ".", ".."} or Path(name).name != name:
        raise ValueError("an algorithm has no name")
    return name


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float] | None:
    """Mean difference over the episodes and half its 95 % interval; None if there is none."""
    pairs = list(zip(one["accuracy_by_episode"], other["accuracy_by_episode"], strict=True))
    gaps = [mine - theirs for mine, theirs in pairs]
    if one is other or len(gaps) < 2:
        return None
    return statistics.fmean(gaps), half_width(statistics.stdev(gaps), len(gaps))
