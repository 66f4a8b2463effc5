"""The options of training that several verbs share, and how they become ``TrainSettings``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from cli.options import option_name, options_as
from cli.output import say
from cli.targets import archive_folder, episode_data
from trainer.settings import OLD_NAMES, SETTINGS, Setting, TrainSettings, is_own, renamed

if TYPE_CHECKING:
    from trainer.data import EpisodeData
    from trainer.mixture import MixedData


_TYPES = {"int": int, "float": float, "bool": bool}


class _OrOwn(click.Choice[str]):
    """A choice; the name of the user's own code is checked by the setting."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return value if is_own(value) else super().convert(value, param, ctx)


def _option(setting: Setting, name: str, *, hidden: bool = False) -> Callable[..., Any]:
    option = option_name(name)
    return click.option(
        option if setting.kind != "bool" else f"{option}/--no-{option.removeprefix('--')}",
        type=_OrOwn(setting.shown_choices) if setting.choices else _TYPES[setting.kind],
        default=None,
        hidden=hidden,
        help=f"{setting.meaning}  [default: {setting.default_in_words}]",
    )


# None: the user did not set it. ``TrainSettings`` checks the values, so that all faults are reported at once.
_OPTIONS = {
    "recipe": click.option(
        "--recipe", metavar="NAME|FILE.toml", help="Start from the settings of a recipe; see mamldata recipes."
    ),
    **{name: _option(setting, name) for name, setting in SETTINGS.items()},
    **{old: _option(SETTINGS[new], old, hidden=True) for old, new in OLD_NAMES.items()},
    "remix": click.option(
        "--remix/--no-remix",
        default=None,
        help="Form new episodes in each epoch from the ways of all episodes of an archive.  [default: yes]",
    ),
}


def setting_options(*, leave_out: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options that define training; the command gets those that were given in a dict ``chosen``.

    Args:
        leave_out: options that do not apply to the command.
    """
    return options_as("chosen", {name: option for name, option in _OPTIONS.items() if name not in set(leave_out)})


def begin(
    targets: Sequence[str],
    root: str | None,
    episodes: dict[str, Any],
    chosen: dict[str, Any],
    tell: Callable[[str], object] = say,
    weights: Sequence[float] | None = None,
) -> tuple[EpisodeData | MixedData, dict[str, Any], dict[str, Any]]:
    """The episodes to train on, with the settings of the recipe and, overriding them, of the user.

    Returns:
        The episodes, arguments for ``TrainSettings``, and options for live episodes.

    Args:
        targets: archives and datasets; several are mixed.
        root: the data root.
        episodes: the options for live episodes that the user gave.
        chosen: the options of ``setting_options`` that the user gave.
        tell: called with each difference between the episodes and the recipe's.
        weights: of the targets in the mixture; None: all equal.

    Raises:
        RequestError: there is no such recipe, a target is neither an archive nor a dataset, or they cannot be mixed.
        click.UsageError: an option does not fit a target.
    """
    from trainer.mixture import MixedData

    values = renamed(chosen)
    recipe, remix = values.pop("recipe", None), values.pop("remix", None)
    plan, options = None, [episodes] * len(targets)
    if recipe is not None:
        from trainer.runs.recipe import load_recipe

        plan = load_recipe(recipe)
        values = {**plan.settings, **values}
        live = {**plan.episodes, **episodes}
        options = [live if archive_folder(target) is None else episodes for target in targets]
        episodes = live if live in options else episodes
    parts = [episode_data(target, root, own, remix=remix) for target, own in zip(targets, options, strict=True)]
    data = parts[0] if weights is None and len(parts) == 1 else MixedData(parts, weights)
    if plan is not None:
        for difference in plan.differences(data.describe()):
            tell(f"Different from the recipe {plan.name}: {difference}")
    most = data.available("val") or TrainSettings.eval_episodes
    values.setdefault("eval_episodes", min(TrainSettings.eval_episodes, most))
    return data, values, episodes
