"""The verbs' output: messages on stderr, results on stdout, progress bars, and the next command."""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
from tqdm import tqdm

from cli.options import as_words
from mamldata.errors import WriteError, system_problem
from mamldata.io.urls import is_remote, shown_place
from mamldata.words import printable, size_text


class Manner:
    """How much is said on stderr, as ``-q`` and ``-v`` of the command line set it."""

    quiet = False
    verbose = False


_PAUSE = 30  # seconds between two lines of progress where stderr is no terminal


def show(line: str) -> None:
    """Print a line of a result on stdout. It may have names from files, whose control characters are escaped."""
    _write(printable(line))


def say(message: str) -> None:
    """Print a message for people on stderr, escaped as by ``show``, but for the ends of lines; with ``-q``, nothing."""
    if not Manner.quiet:
        _write(printable(message, keep="\n"), err=True)


def _write(text: str, *, err: bool = False) -> None:
    """Print a text.

    Raises:
        WriteError: the output cannot be written, such as to a full disk.
    """
    try:
        click.echo(text, err=err)
    except OSError as error:
        if error.errno == errno.EPIPE:  # click ends quietly if the reader has gone
            raise
        drop_output()
        raise WriteError(f"The output cannot be written: {system_problem(error)}") from error


def drop_output() -> None:
    """Send all further output nowhere: Python would try to write the rest again as it ends, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):  # a test's stream has no descriptor
                os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def next_command(*commands: Sequence[object]) -> None:
    """Print the closing line: the command to run next, quoted for a shell.

    Args:
        commands: each a verb and its arguments; the current command's ``--root`` is added.
    """
    context = click.get_current_context()
    given_root = context.get_parameter_source("root") is click.core.ParameterSource.COMMANDLINE
    root = ["--root", context.params["root"]] if given_root else []
    lines = [shlex.join(["mamldata", *(shown_place(str(word)) for word in words), *root]) for words in commands]
    say(f"Next: {' && '.join(lines)}")


def trainable(splits: Collection[str]) -> bool:
    """Whether an archive with these splits has all that training needs."""
    return {"train", "val"} <= set(splits)


def use_command(target: Path | str, splits: Collection[str]) -> list[object]:
    """For ``next_command``: train on an archive; where it has no train or no val episodes, show an episode of it."""
    if trainable(splits):
        return train_command(target)
    return ["preview", target, "--split", next(iter(splits)), "--out", f"{_name(target)}.png"]


def train_command(target: Path | str, episodes: Mapping[str, Any] = MappingProxyType({})) -> list[object]:
    """For ``next_command``: train with the defaults, into a new folder named after the data.

    Args:
        target: an archive, or a dataset.
        episodes: the options for live episodes that the user gave.
    """
    name = _name(target)
    names = chain([f"{name}-maml"], (f"{name}-maml-{number}" for number in count(2)))
    out = next(one for one in names if not Path(one).exists())
    shape = {option: value for option, value in episodes.items() if option != "seed"}  # train's --seed sets the weights
    return ["train", target, *as_words(shape), "--out", out]


def _name(target: Path | str) -> str:
    if is_remote(target):
        return shown_place(target).partition("?")[0].rstrip("/").rpartition("/")[2]
    return Path(target).absolute().name.removesuffix(".toml")


def build_command(dataset: str) -> list[object]:
    """For ``next_command``: build with the defaults, 5-way 1-shot."""
    return ["build", dataset, "--out", f"{_name(dataset)}-5w1s"]


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table as lines, with columns as wide as their longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def print_json(value: Any) -> None:
    """Print a result for programs on stdout, with null for numbers that are not finite, which JSON lacks."""
    _write(json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), indent=2))


@contextmanager
def bars(label: str, total: int | None, unit: str, /) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr with rate and time left; a line every half minute if stderr is not a terminal."""
    scale, begun, done = unit == "B", time.monotonic(), 0
    told = begun

    def amount(number: int) -> str:
        return size_text(number) if scale else f"{number:,} {unit}"

    with tqdm(
        total=total,
        desc=printable(label),
        unit=unit if scale else f" {unit}",
        unit_scale=scale,
        unit_divisor=1024,
        disable=Manner.quiet or None,  # None: unless stderr is a terminal
        leave=False,
        dynamic_ncols=True,
    ) as bar:

        def advance(number: int) -> None:
            nonlocal done, told
            done += number
            bar.update(number)
            if bar.disable and time.monotonic() - told >= _PAUSE:
                told = time.monotonic()
                say(f"{label}: {amount(done)}{f' of {amount(total)}' if total else ''}")

        yield advance
    if Manner.verbose:
        say(f"{label}: {amount(done)} in {time.monotonic() - begun:.1f} s")
