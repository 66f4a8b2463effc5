"""Compare algorithms on the same episodes: their accuracy and their cost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mamldata.errors import DivergedError, RequestError, StoppedError
from mamldata.io.atomic import make_folder, write_atomic
from mamldata.progress import Notify, Progress, silence, silent
from trainer.evaluation import Evaluation, evaluate
from trainer.loop import train
from trainer.protocol import TrainData
from trainer.reports.costs import Costs, measure_costs
from trainer.results import paired_difference, result_of, save_result
from trainer.runs.folder import COMPARISON, RunResult, as_begun, refuse_others
from trainer.runs.network import named
from trainer.settings import TrainSettings, saved_settings
from trainer.system.signals import BrokenOffError, stop_at_signals
from trainer.system.threads import limited_threads

RESULT, TABLE = COMPARISON, "compare.md"
_FORMAT = "mamldata-compare/1"
# These must be equal, so that only the algorithms differ.
_EQUAL = ("steps", "meta_batch_size", "seed", "normalize", "network", "filters", "device", "precision")


@dataclass(frozen=True)
class Entry:
    """The results of one algorithm.

    Attributes:
        name: in the comparison.
        settings: of its run.
        run: the result of its run.
        evaluation: of its best checkpoint.
        ahead, ahead_interval: its mean accuracy minus that of the reference, episode by episode, and half the width
            of the 95 % confidence interval of that difference, which is narrower than a comparison of two intervals
            because the episodes are the same.
        costs: of an outer step; None if it takes none.
    """

    name: str
    settings: TrainSettings
    run: RunResult
    evaluation: Evaluation
    ahead: float
    ahead_interval: float
    costs: Costs | None


@dataclass(frozen=True)
class Comparison:
    """The results of all algorithms.

    Attributes:
        reference: the name of the entry that the others are compared with.
        data: describes the episodes, see ``TrainData.describe``.
        entries: in the order of the plans.
    """

    reference: str
    data: dict[str, Any]
    entries: tuple[Entry, ...]

    def to_json(self) -> dict[str, Any]:
        """As a dict of plain values."""
        return {
            "format": _FORMAT,
            "reference": self.reference,
            "verdict": verdict(self),
            "data": self.data,
            "entries": [_entry_json(entry) for entry in self.entries],
        }


def compare(
    plans: Mapping[str, TrainSettings],
    data: TrainData,
    out: Path | str,
    *,
    split: str = "test",
    episodes: int = 600,
    network: nn.Module | None = None,
    notify: Notify = silence,
    progress: Progress = silent,
) -> Comparison:
    """Train with each of several settings on the same episodes in the same order, and evaluate on the same episodes.

    Each run has its own folder in ``out``, with the result of its evaluation, beside ``compare.json`` and the table
    ``compare.md``. Another call after an interruption resumes training, but measures costs and evaluates checkpoints
    again.

    Args:
        plans: settings by name; the one called ``maml``, or else the first, is the reference.
        data: the episodes.
        out: created if missing.
        split, episodes: to evaluate on.
        network: one of your own for all; see ``train``.
        notify: receives the progress, a line at a time.
        progress: counts the episodes of each validation and evaluation.

    Raises:
        RequestError: the settings cannot be compared, or do not fit the data; or ``out`` holds other runs.
        DivergedError: training has diverged; the message names the algorithm.
        StoppedError: SIGTERM, SIGUSR1 or SIGINT came.
        MamldataError: a process that measures costs was killed.
        WriteError: ``out`` cannot be written to.
    """
    out = Path(out)
    about = data.describe()
    begun = {name: as_begun(out / name, named(settings, network)) for name, settings in plans.items()}
    plans = {name: settings.for_images(about) for name, settings in begun.items()}
    _require_comparable(plans)
    refuse_others(out, COMPARISON)
    asked = {("val", settings.eval_episodes) for settings in plans.values()} | {(split, episodes)}
    normalize = bool(next(iter(plans.values())).normalize)
    for what, count in asked:  # raises now rather than after hours of training
        data.eval(what, count, 1, torch.device("cpu"), normalize=normalize, rank=0, world_size=1)
    make_folder(out)
    runs, evaluations, now = {}, {}, "costs"
    with stop_at_signals(keyboard=True) as stop:
        try:
            notify(f"Measuring the outer steps of {', '.join(plans)}.")
            with limited_threads():
                costs = measure_costs(plans, data, network=network, before_step=stop.break_off)
            minutes = sum(cost.milliseconds * plans[name].steps for name, cost in costs.items()) / 60_000
            notify(f"Training will take about {minutes:.0f} min; evaluation comes on top.")
            for now, settings in plans.items():
                say = _prefixed(notify, now)
                own: dict[str, Any] = {"network": network, "progress": progress}
                runs[now] = train(settings, data, out / now, resume=True, notify=say, **own)
                evaluations[now] = evaluate(
                    runs[now].best, data, split=split, episodes=episodes, device=settings.device, **own
                )
                save_result(evaluations[now])
                say(str(evaluations[now]))
                if evaluations[now].doubt:
                    say(f"{evaluations[now].doubt}")
        except DivergedError as error:
            raise DivergedError(f"{now}: {error}") from error
        except (BrokenOffError, StoppedError) as error:
            raise StoppedError(
                f"{now}: stopped. {out} keeps what is done; run the same command to continue."
            ) from error
    reference = "maml" if "maml" in plans else next(iter(plans))
    entries = []
    for name, settings in plans.items():
        difference = paired_difference(result_of(evaluations[name]), result_of(evaluations[reference]))
        entries.append(Entry(name, settings, runs[name], evaluations[name], *difference, costs.get(name)))
    result = Comparison(reference, about, tuple(entries))
    write_atomic(out / RESULT, json.dumps(result.to_json(), indent=2).encode() + b"\n")
    write_atomic(out / TABLE, (table(result) + "\n").encode())
    return result


def _prefixed(notify: Notify, name: str) -> Notify:
    return lambda line: notify(f"{name}  {line}")


def _require_comparable(plans: Mapping[str, TrainSettings]) -> None:
    if len(plans) < 2:
        raise RequestError("A comparison needs at least two algorithms.")
    for key in _EQUAL:
        values = {name: getattr(settings, key) for name, settings in plans.items()}
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{value!r} for {name}" for name, value in values.items())
            raise RequestError(f"{key} must be the same for all algorithms, not {shown}.")


def table(result: Comparison) -> str:
    """The result in Markdown: a description, then a line for each algorithm."""
    compared = result.to_json()
    head, *lines = rows(compared)
    return "\n".join(
        [heading(compared), "", _row(head), _row(["---"] * len(head)), *map(_row, lines), "", verdict(result)]
    )


def heading(compared: Mapping[str, Any]) -> str:
    """The description above the table, from ``Comparison.to_json``."""
    settings, of = compared["entries"][0]["settings"], compared["entries"][0]["evaluation"]
    return (
        f"{of['dataset']}, split scheme {of['split_scheme']}, {of['n_way']}-way {of['k_shot']}-shot "
        f"{of['k_query']}-query; {settings['steps']} outer steps of {settings['meta_batch_size']} episodes; "
        f"{of['episodes']} {of['split']} episodes, the same for all, with 95 % intervals; single models."
    )


def verdict(result: Comparison) -> str:
    """A sentence on which differences from the reference have an interval without zero."""
    others = [entry for entry in result.entries if entry.name != result.reference]
    clear = [f"{one.name} ({100 * one.ahead:+.2f})" for one in others if abs(one.ahead) > one.ahead_interval]
    rest = [one.name for one in others if abs(one.ahead) <= one.ahead_interval]
    said = [f"is clear of zero for {', '.join(clear)}"] if clear else []
    said += [f"includes zero for {', '.join(rest)}"] if rest else []
    return f"The 95 % interval of the difference to {result.reference}, on these episodes, {', and '.join(said)}."


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def rows(compared: Mapping[str, Any]) -> Iterator[list[str]]:
    """The heading of the table and a line for each algorithm, cell by cell, from ``Comparison.to_json``."""
    reference = next(entry for entry in compared["entries"] if entry["name"] == compared["reference"])
    yield [
        "algorithm",
        "accuracy",
        f"ahead of {reference['name']}",
        "σ over episodes",
        "before → after",
        "inner steps",
        "batch norm",
        "ms a step",
        "ratio",
        "peak MiB",
        "ratio",
    ]
    for entry in compared["entries"]:
        evaluation, costs = entry["evaluation"], entry["costs"]
        by_step, settings = evaluation["accuracy_by_step"], saved_settings(entry["settings"], Path(COMPARISON))
        cells = [
            entry["name"],
            f"{100 * evaluation['accuracy']:.2f} ± {100 * evaluation['interval']:.2f} %",
            "" if entry is reference else f"{100 * entry['ahead']:+.2f} ± {100 * entry['ahead_interval']:.2f}",
            f"{100 * evaluation['deviation']:.1f}",
            f"{100 * by_step[0]:.1f} → {100 * by_step[-1]:.1f}" if by_step[1:] else "",
            f"{settings.inner_loop().steps}, {evaluation['inner_steps']} in evaluation"
            if costs
            else str(evaluation["inner_steps"]),
            evaluation["bn"],
        ]
        yield cells + list(_cost_cells(costs or {}, reference["costs"] or {}))


def _cost_cells(costs: Mapping[str, float], reference: Mapping[str, float]) -> Iterator[str]:
    for key, digits in (("milliseconds", 0), ("peak_mib", 1)):
        value, base = costs.get(key), reference.get(key)
        yield "" if value is None else f"{value:.{digits}f}"
        yield f"{value / base:.2f}" if value is not None and base else ""


def _entry_json(entry: Entry) -> dict[str, Any]:
    run = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(entry.run).items()}
    return {
        "name": entry.name,
        "settings": entry.settings.resolved(),
        "run": run,
        "evaluation": {**entry.evaluation.to_json(), "deviation": entry.evaluation.deviation},
        "accuracy_by_episode": list(entry.evaluation.accuracy_by_episode),
        "ahead": entry.ahead,
        "ahead_interval": entry.ahead_interval,
        "costs": asdict(entry.costs) if entry.costs else None,
    }
