"""``mamldata compare``."""

from __future__ import annotations

import os
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from cli.options import LocalPath, as_words, episode_options, given, json_option, root_option, target_argument
from cli.output import bars, next_command, print_json, say, show
from cli.own_network import own_network
from cli.targets import evaluated_episodes
from cli.train_options import begin, setting_options
from mamldata.errors import RequestError, did_you_mean
from mamldata.sampling.splits import SPLITS
from mamldata.words import install_command
from trainer.maml.algorithms import ALGORITHMS
from trainer.settings import OF_INNER_STEPS, OLD_NAMES, SETTINGS, TrainSettings

_DEFAULT = "maml,fomaml,maml++,anil,reptile,pretrain,random"
# These change what an algorithm is, or fit only some: they are set for one algorithm at a time, by --set.
_OF_ONE = (
    "algorithm",
    "order",
    "loss",
    "rates",
    "adapts",
    "inner_loss",
    "msl_epochs",
    "first_order_epochs",
    "epoch_steps",
    "checkpoint_inner",
)


@click.command(
    epilog="\b\nExamples:\n  mamldata compare glyphs-5w1s --algorithms maml,fomaml,random --steps 40 --out compared\n"
    "  mamldata compare glyphs-5w1s --algorithms maml,reptile --set reptile.inner_lr=0.1 --steps 40 --out other",
)
@target_argument(metavar="NAME|FOLDER|ARCHIVE")
@click.option("--out", type=LocalPath(file_okay=False, path_type=Path), required=True, help="The folder for all runs.")
@click.option("--algorithms", default=_DEFAULT, show_default=True, help="Algorithms to compare, separated by commas.")
@click.option(
    "--set", "own", multiple=True, metavar="ALGORITHM.SETTING=VALUE", help="A setting of one algorithm.  [repeatable]"
)
@click.option("--split", type=click.Choice(SPLITS), default="test", show_default=True, help="The split to evaluate on.")
@click.option("--episodes", "count", type=click.IntRange(2), help="Number to evaluate on.  [default: all, or 600 live]")
@setting_options(leave_out=_OF_ONE)
@episode_options(seed=False)
@root_option
@json_option
def command(
    target: str,
    out: Path,
    algorithms: str,
    own: tuple[str, ...],
    split: str,
    count: int | None,
    chosen: dict[str, Any],
    episodes: dict[str, Any],
    root: str | None,
    as_json: bool,
) -> None:
    """Train with several algorithms on the same episodes, and report the accuracy and cost of each.

    Writes a run folder for each, compare.json, the table compare.md, and pictures. To continue an
    interrupted comparison, run the same command again.
    """
    from trainer.reports.compare import RESULT, compare, table
    from trainer.reports.plots import have_matplotlib, plot_comparison
    from trainer.system.distributed import world_of
    from trainer.system.signals import stop_at_signals

    if world_of(os.environ).world_size > 1:
        raise click.UsageError("compare runs in one process: start it without torchrun.")
    names = list(dict.fromkeys(part.strip() for part in algorithms.split(",") if part.strip()))
    for name in names:
        if name not in ALGORITHMS:
            raise click.BadParameter(
                f"there is no algorithm {name!r}.{did_you_mean(name, ALGORITHMS)} Algorithms: {', '.join(ALGORITHMS)}.",
                param_hint="--algorithms",
            )
    changes = _changes(own, names)
    data, values, episodes = begin([target], root, episodes, chosen)
    plans = {}
    for name in names:
        inner = ALGORITHMS[name].classifier == "head"
        shared = {key: value for key, value in values.items() if inner or key not in OF_INNER_STEPS}
        try:
            plans[name] = TrainSettings(**{**shared, "algorithm": name, **changes[name]})
        except RequestError as error:
            raise RequestError(f"{name}: {error}") from error
    start = time.monotonic()
    number = evaluated_episodes(data, split, count)
    network = own_network(chosen.get("network"), data.describe(), next(iter(plans.values())).seed)
    with stop_at_signals(keyboard=True, at_once=True):
        result = compare(plans, data, out, split=split, episodes=number, network=network, notify=say, progress=bars)
    if have_matplotlib():
        for picture in plot_comparison(result, out):
            say(f"Drawn: {picture}")
    else:
        say(f"For pictures, install matplotlib ({install_command('plots')}) and run the same command again.")
    if as_json:
        print_json(result.to_json())
        return
    for line in table(result).splitlines():
        show(line)
    say(f"Done in {(time.monotonic() - start) / 60:.1f} min. The numbers are in {out / RESULT}.")
    named = given(network=chosen["network"] if network else None)
    next_command(["eval", result.entries[0].run.best, target, *as_words(named | episodes)])


def _changes(own: Iterable[str], names: list[str]) -> dict[str, dict[str, Any]]:
    """The settings given by ``--set``, for each algorithm.

    Raises:
        click.BadParameter: one is not of that form, or names an unknown algorithm or setting.
    """
    changes: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text in own:
        place, equals, value = text.partition("=")
        algorithm, dot, setting = place.strip().rpartition(".")
        if not (equals and dot):
            raise click.BadParameter(f"{text!r} is not of the form ALGORITHM.SETTING=VALUE.", param_hint="--set")
        if algorithm not in changes:
            raise click.BadParameter(
                f"{text!r}: {algorithm!r} is not one of those compared: {', '.join(names)}.", param_hint="--set"
            )
        setting = setting.replace("-", "_")
        setting = OLD_NAMES.get(setting, setting)
        if setting not in SETTINGS or setting == "algorithm":
            raise click.BadParameter(
                f"{text!r}: there is no setting {setting!r}.{did_you_mean(setting, SETTINGS)}", param_hint="--set"
            )
        changes[algorithm][setting] = _value(value.strip())
    return changes


def _value(text: str) -> Any:
    """Parse a value as TOML (a number, true, false, …); anything else is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
