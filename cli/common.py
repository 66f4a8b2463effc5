"""What the verbs share: options, the choice between a dataset and an archive, output, progress bars."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import chain, count
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from mamldata.archive.index import is_archive
from mamldata.datasets.paths import data_root
from mamldata.datasets.toml import builtin_names
from mamldata.errors import RequestError, did_you_mean
from mamldata.io.urls import is_remote, shown_place
from mamldata.sampling.sampler import ROTATIONS

if TYPE_CHECKING:
    from trainer.data import EpisodeData

root_option = click.option(
    "--root",
    type=click.Path(file_okay=False),
    envvar="MAMLDATA_ROOT",
    show_envvar=True,
    help="Where datasets are kept.  [default: the user's cache folder]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")

# The settings of episodes: None means that the user did not say.
_EPISODE_OPTIONS = {
    "n_way": click.option("--n-way", type=click.IntRange(2), help="Classes in an episode.  [default: 5]"),
    "k_shot": click.option("--k-shot", type=click.IntRange(1), help="Support images per class.  [default: 1]"),
    "k_query": click.option("--k-query", type=click.IntRange(1), help="Query images per class.  [default: 15]"),
    "split_scheme": click.option("--split-scheme", help="How the classes are divided.  [default: the dataset's own]"),
    "rotations": click.option(
        "--rotations", type=click.Choice(ROTATIONS), help="Turned classes.  [default: the dataset's own]"
    ),
    "image_size": click.option(
        "--image-size", type=click.IntRange(1, 4096), help="In pixels.  [default: the dataset's own]"
    ),
    "seed": click.option("--seed", type=click.IntRange(0), help="Of the episodes.  [default: 0]"),
}


def episode_options(*, seed: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options that say what episodes are; the command gets those that were given as ``episodes``, a dict.

    Args:
        seed: whether ``--seed`` is one of them.
    """
    return options_as("episodes", {name: one for name, one in _EPISODE_OPTIONS.items() if seed or name != "seed"})


def options_as(
    argument: str, options: Mapping[str, Callable[..., Any]]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add options to a command, which gets those that were given as one argument, a dict.

    Args:
        argument: its name.
        options: click's decorators, by the names of their parameters.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def collect(**arguments: Any) -> Any:
            chosen = given(**{name: arguments.pop(name) for name in options})
            return command(**{argument: chosen}, **arguments)

        for option in reversed(list(options.values())):
            collect = option(collect)
        return collect

    return decorate


def given(**options: Any) -> dict[str, Any]:
    """The options that the user gave."""
    return {name: value for name, value in options.items() if value is not None}


def archive_folder(target: str) -> Path | str | None:
    """The folder or the address if ``target`` is an archive, None if it is a dataset.

    Datasets are a name, a manifest, or a folder of images.

    Raises:
        RequestError: it is neither.
    """
    if is_remote(target):
        return target
    path = Path(target)
    if is_archive(path):
        return path
    if target.endswith(".toml") or target in builtin_names():
        return None
    if path.is_dir():
        # Of what was an archive once, whoever reads it says what is wrong with it.
        return path if (path / ".build").is_dir() or any(path.glob("*-00000.tar")) else None
    raise RequestError(
        f"{target!r} is neither the folder of an archive nor a dataset.{did_you_mean(target, builtin_names())} "
        f"Datasets: {', '.join(builtin_names())}, or the path of a .toml file or of a folder of images."
    )


def archive_cache(folder: Path | str, root: str | None) -> Path | None:
    """Where the shards of an archive at an address are kept between commands; None for a folder."""
    return data_root(root) / "archive-cache" if is_remote(folder) else None


def refuse_with_archive(folder: Path | str, options: dict[str, Any]) -> None:
    """An archive's episodes are what they are: options that would change them are wrong usage.

    Raises:
        click.UsageError: some were given.
    """
    if options:
        names = ", ".join(option_name(name) for name in options)
        raise click.UsageError(
            f"{names}: the episodes of the archive {shown_place(folder)} are fixed. Leave the option out."
        )


def episode_data(target: str, root: str | None, episodes: dict[str, Any], *, remix: bool | None = None) -> EpisodeData:
    """The episodes that a command trains or evaluates on. Imports torch.

    Args:
        target: an archive, or a dataset's name or manifest.
        root: the data root.
        episodes: the options that the user gave for live episodes.
        remix: whether to train on remixed episodes, if the user said.

    Raises:
        RequestError: ``target`` is neither an archive nor a dataset.
        click.UsageError: options for episodes with an archive, or for an archive with live episodes.
    """
    from trainer.data import archive_data, live_data

    folder = archive_folder(target)
    if folder is None:
        if remix is not None:
            raise click.UsageError("--remix and --no-remix are for archives: live episodes never repeat.")
        return live_data(target, root, episodes)
    refuse_with_archive(folder, episodes)
    return archive_data(folder, remix=remix is not False, cache_dir=archive_cache(folder, root))


def evaluated_episodes(data: EpisodeData, split: str, asked: int | None) -> int:
    """How many episodes to evaluate on: those asked for, else all of an archive, else 600, the field's custom."""
    return asked or data.available(split) or 600


def say(message: str) -> None:
    """A message for people, on stderr."""
    click.echo(message, err=True)


def next_command(*commands: Sequence[object]) -> None:
    """The closing line: what one would do next, as a shell takes it.

    Args:
        commands: the verb and its arguments, each; a ``--root`` of the command under way is added.
    """
    context = click.get_current_context()
    given_root = context.get_parameter_source("root") is click.core.ParameterSource.COMMANDLINE
    root = ["--root", context.params["root"]] if given_root else []
    lines = [shlex.join(["mamldata", *(shown_place(str(word)) for word in words), *root]) for words in commands]
    say(f"Next: {' && '.join(lines)}")


def train_command(target: Path | str, episodes: Mapping[str, Any] = MappingProxyType({})) -> list[object]:
    """For ``next_command``: train with the defaults, into a new folder called after the data.

    Args:
        target: an archive, or a dataset.
        episodes: the options for live episodes that the user gave.
    """
    name = _name(target)
    names = chain([f"{name}-maml"], (f"{name}-maml-{number}" for number in count(2)))
    out = next(one for one in names if not Path(one).exists())
    shape = {option: value for option, value in episodes.items() if option != "seed"}  # train's own is of the weights
    return ["train", target, *as_words(shape), "--out", out]


def _name(target: Path | str) -> str:
    if is_remote(target):
        return shown_place(target).partition("?")[0].rstrip("/").rpartition("/")[2]
    return Path(target).absolute().name.removesuffix(".toml")


def build_command(dataset: str) -> list[object]:
    """For ``next_command``: build with the defaults, which are 5 ways and 1 shot."""
    return ["build", dataset, "--out", f"{_name(dataset)}-5w1s"]


def as_words(options: Mapping[str, Any]) -> list[object]:
    """Options by their parameters' names, as the command line has them."""
    return [word for name, value in options.items() for word in (option_name(name), value)]


def option_name(name: str) -> str:
    """The option of a parameter."""
    return "--" + name.replace("_", "-")


def print_json(value: Any) -> None:
    """A result for programs, on stdout."""
    click.echo(json.dumps(value, indent=2))


@contextmanager
def bars(label: str, total: int | None, unit: str, /) -> Iterator[Callable[[int], object]]:
    """Progress as a bar on stderr with rate and time left; nothing at all where stderr is no terminal."""
    scale = unit == "B"
    with tqdm(
        total=total,
        desc=label,
        unit=unit if scale else f" {unit}",
        unit_scale=scale,
        unit_divisor=1024,
        disable=None,
        leave=False,
        dynamic_ncols=True,
    ) as bar:
        yield bar.update


def size_text(size: int) -> str:
    """Bytes as people read them."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError
