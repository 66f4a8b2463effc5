"""What the verbs share: options, the choice between a dataset and an archive, output, progress bars."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from tqdm import tqdm

from mamldata.archive import is_archive
from mamldata.errors import RequestError
from mamldata.manifest import ROTATIONS, builtin_names, did_you_mean

Command = TypeVar("Command", bound=Callable[..., Any])

root_option = click.option(
    "--root",
    type=click.Path(file_okay=False),
    envvar="MAMLDATA_ROOT",
    show_envvar=True,
    help="Where datasets are kept.  [default: the user's cache folder]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")

# The settings of live episodes: None means that the user did not say.
_EPISODE_OPTIONS = (
    click.option("--n-way", type=click.IntRange(2), help="Classes in an episode.  [default: 5]"),
    click.option("--k-shot", type=click.IntRange(1), help="Support images per class.  [default: 1]"),
    click.option("--k-query", type=click.IntRange(1), help="Query images per class.  [default: 15]"),
    click.option("--split-scheme", help="How the classes are divided.  [default: the dataset's own]"),
    click.option("--rotations", type=click.Choice(ROTATIONS), help="Turned classes.  [default: the dataset's own]"),
    click.option("--image-size", type=click.IntRange(1, 4096), help="In pixels.  [default: the dataset's own]"),
)


def episode_options(command: Command) -> Command:
    """Add the options that say what episodes are, for commands that can draw them live."""
    for option in reversed(_EPISODE_OPTIONS):
        command = option(command)
    return command


def given(**options: Any) -> dict[str, Any]:
    """The options that the user gave."""
    return {name: value for name, value in options.items() if value is not None}


def archive_folder(target: str) -> Path | None:
    """The folder if ``target`` is an archive, None if it is a dataset's name or manifest.

    Raises:
        RequestError: it is neither.
    """
    path = Path(target)
    if is_archive(path):
        return path
    if target.endswith(".toml") or target in builtin_names():
        return None
    if path.is_dir():
        return path  # whoever reads it says what is wrong with it
    raise RequestError(
        f"{target!r} is neither the folder of an archive nor a dataset.{did_you_mean(target, builtin_names())} "
        f"Datasets: {', '.join(builtin_names())}, or the path of a .toml file."
    )


def refuse_with_archive(folder: Path, options: dict[str, Any]) -> None:
    """An archive's episodes are what they are: options that would change them are wrong usage.

    Raises:
        click.UsageError: some were given.
    """
    if options:
        names = ", ".join("--" + name.replace("_", "-") for name in options)
        raise click.UsageError(f"{names}: the episodes of the archive {folder} are fixed. Leave the option out.")


def say(message: str) -> None:
    """A message for people, on stderr."""
    click.echo(message, err=True)


def next_command(command: str) -> None:
    """The closing line: what one would do next."""
    say(f"Next: {command}")


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


def size_text(count: int) -> str:
    """Bytes as people read them."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError
