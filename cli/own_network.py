"""A network of the user's own, made by a function that the command line names as ``module:function``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import click

from trainer.settings import is_own

own_network_option = click.option(
    "--network",
    metavar="MODULE:FUNCTION",
    help="The run's network, if it is one of your own: it is never loaded unasked.",
)


def own_network(name: str | None, about: dict[str, Any], seed: int) -> Any:
    """The network that the function makes, whose module is in the current folder or installed; None for another name.

    Args:
        name: as the user gave it on this command line; never one from a file.
        about: describes the episodes.
        seed: of the run.

    Raises:
        click.BadParameter: there is no such function.
        RequestError: the function fails or gives no network.
    """
    if name is None or not is_own(name):
        return None
    from trainer.runs.network import called

    place, _, function = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        make = getattr(importlib.import_module(place), function)
    except (ImportError, AttributeError) as error:
        raise click.BadParameter(f"{name} cannot be imported: {error}.", param_hint="--network") from error
    return called(make, about, seed)


def seed_of_run(place: Path, name: str | None) -> int:
    """The seed of a run, after a check that the user has named its network if that is one of their own.

    Raises:
        click.UsageError: they have not, or have named another one.
    """
    from trainer.runs.checkpoint import find_checkpoint
    from trainer.settings import saved_settings

    path, checkpoint = find_checkpoint(place)
    settings = saved_settings(checkpoint.settings, path)
    own = settings.network if is_own(settings.network) else None
    if name != own:
        then = f"Add --network {own}, if you trust its code" if own else "Leave out --network"
        raise click.UsageError(f"{path} was trained with the network {settings.network}. {then}.")
    return settings.seed
