"""The options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import click
from click.shell_completion import CompletionItem

from mamldata.archive.benchmarks import benchmarks
from mamldata.datasets.manifest import FITS
from mamldata.datasets.toml import builtin_names
from mamldata.io.urls import is_remote, shown_place
from mamldata.sampling.sampler import ROTATIONS


class LocalPath(click.Path):
    """A path on this machine; an address is refused, which would become folders named after its parts."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check a value."""
        if is_remote(value):
            self.fail(f"{shown_place(value)} is an address. Give a path on this machine.", param, ctx)
        return super().convert(value, param, ctx)


def target_argument(name: str = "target", **more: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An argument that is a dataset or a path; shells complete both."""

    def complete(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
        names = [CompletionItem(name) for name in builtin_names() if name.startswith(begun)]
        return [CompletionItem(begun, type="file"), *names]  # in this order: bash drops what stands before it

    return click.argument(name, shell_complete=complete, **more)


root_option = click.option(
    "--root",
    type=LocalPath(file_okay=False),
    envvar="MAMLDATA_ROOT",
    show_envvar=True,
    help="The folder of all datasets.  [default: the user's cache folder]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
benchmark_option = click.option(
    "--benchmark",
    metavar="NAME",
    help="A benchmark; mamldata benchmarks lists them.",
    shell_complete=lambda _context, _parameter, begun: [name for name in benchmarks() if name.startswith(begun)],
)
# The settings of episodes; None: the user did not set it.
_EPISODE_OPTIONS = {
    "n_way": click.option("--n-way", type=click.IntRange(2), help="Classes in an episode.  [default: 5]"),
    "k_shot": click.option("--k-shot", type=click.IntRange(1), help="Support images per class.  [default: 1]"),
    "k_query": click.option("--k-query", type=click.IntRange(1), help="Query images per class.  [default: 15]"),
    "split_scheme": click.option("--split-scheme", help="How the classes are split.  [default: the dataset's own]"),
    "rotations": click.option(
        "--rotations", type=click.Choice(ROTATIONS), help="Splits with rotated classes.  [default: the dataset's own]"
    ),
    "image_size": click.option(
        "--image-size", type=click.IntRange(1, 4096), help="Side of the images in pixels.  [default: the dataset's own]"
    ),
    "min_images": click.option(
        "--min-images",
        type=click.IntRange(0),
        help="Of a folder of images: leave out classes with fewer.  [default: 0]",
    ),
    "skip_damaged": click.option(
        "--skip-damaged", is_flag=True, default=None, help="Of a folder of images: leave out those that cannot be read."
    ),
    "fit": click.option(
        "--fit", type=click.Choice(tuple(FITS)), help="How a folder's images become square.  [default: stretch]"
    ),
    "query_alpha": click.option(
        "--query-alpha", type=click.IntRange(1), help="Unequal queries: Dirichlet's parameter.  [default: all equal]"
    ),
    "seed": click.option("--seed", type=click.IntRange(0), help="Seed of the episodes.  [default: 0]"),
}


def episode_options(*, seed: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options that define episodes; the command gets those that were given in a dict ``episodes``.

    Args:
        seed: whether ``--seed`` is one of them.
    """
    return options_as("episodes", {name: one for name, one in _EPISODE_OPTIONS.items() if seed or name != "seed"})


def options_as(
    argument: str, options: Mapping[str, Callable[..., Any]]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add options to a command, which gets those that were given in one dict.

    Args:
        argument: the name of that dict's parameter.
        options: click's decorators, by parameter name.
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


def as_words(options: Mapping[str, Any]) -> list[object]:
    """Options and values, given by parameter name, as words of a command line."""
    return [
        word for name, value in options.items() for word in (option_name(name), *(() if value is True else (value,)))
    ]


def option_name(name: str) -> str:
    """The option of a parameter."""
    return "--" + name.replace("_", "-")
