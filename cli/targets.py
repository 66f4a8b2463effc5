"""The target of a verb, a dataset or an archive, and its episodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.output import bars
from mamldata.archive.index import PLAN, image_shard_file, is_archive
from mamldata.datasets.paths import data_root
from mamldata.datasets.toml import builtin_names
from mamldata.errors import RequestError, did_you_mean
from mamldata.io.urls import is_remote, shown_place
from mamldata.sampling.sampler import LEAST

if TYPE_CHECKING:
    from trainer.data import EpisodeData
    from trainer.mixture import MixedData
from cli.options import option_name


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
        # A damaged or unfinished archive counts as one: reading it reports what is wrong.
        traces = ((path / PLAN).is_file(), any(path.glob("*-00000.tar")), (path / image_shard_file(0)).exists())
        return path if any(traces) else None
    raise RequestError(
        f"{target!r} is neither the folder of an archive nor a dataset.{did_you_mean(target, builtin_names())} "
        f"Datasets: {', '.join(builtin_names())}, or the path of a .toml file or of a folder of images."
    )


def archive_cache(folder: Path | str, root: str | None) -> Path | None:
    """The cache folder for shards of an archive at an address; None for a folder."""
    return data_root(root) / "archive-cache" if is_remote(folder) else None


def refuse_with_archive(folder: Path | str, options: dict[str, Any]) -> None:
    """Refuse options that would change episodes, because those of an archive are fixed.

    Raises:
        click.UsageError: such options were given.
    """
    if options:
        names = ", ".join(option_name(name) for name in options)
        raise click.UsageError(
            f"{names}: the episodes of the archive {shown_place(folder)} are fixed. Leave out these options."
        )


def refuse_with_benchmark(name: str, target: str | None, options: dict[str, Any]) -> None:
    """Refuse a dataset or an archive, and options that would change episodes, because a benchmark defines both.

    Raises:
        click.UsageError: such were given.
    """
    if target is not None:
        raise click.UsageError(f"Give either {target!r} or --benchmark {name}, not both.")
    if options:
        names = ", ".join(option_name(option) for option in options)
        raise click.UsageError(f"{names}: the benchmark {name} defines its episodes. Leave out these options.")


def episode_data(target: str, root: str | None, episodes: dict[str, Any], *, remix: bool | None = None) -> EpisodeData:
    """The episodes that a command trains or evaluates on. Imports torch.

    Args:
        target: an archive, or a dataset's name or manifest.
        root: the data root.
        episodes: the options that the user gave for episodes. Those of an archive can only be made narrower.
        remix: whether to train on remixed episodes; None: the user did not set it.

    Raises:
        RequestError: ``target`` is neither an archive nor a dataset.
        click.UsageError: options for live episodes were given with an archive, or the reverse.
    """
    from trainer.data import archive_data, live_data

    folder = archive_folder(target)
    if folder is None:
        if remix is not None:
            raise click.UsageError("--remix and --no-remix are for archives: live episodes never repeat.")
        return live_data(target, root, {**episodes, "progress": bars})
    narrow = {name: number for name, number in episodes.items() if name in LEAST}
    refuse_with_archive(folder, {name: value for name, value in episodes.items() if name not in narrow})
    return archive_data(
        folder, remix=remix is not False, narrow=narrow, cache_dir=archive_cache(folder, root), root=root
    )


def as_trained(
    target: str, episodes: dict[str, Any], trained: Mapping[str, Any], tell: Callable[[str], object]
) -> dict[str, Any]:
    """The options of live episodes, with the run's own ways, shots and queries where the user gave none.

    Args:
        target: as for ``episode_data``; options of an archive are only returned.
        episodes: the options that the user gave.
        trained: describes the run's training data.
        tell: called with the numbers that are used.
    """
    if archive_folder(target) is not None:
        return episodes
    used = {name: episodes.get(name, trained.get(name)) for name in LEAST}
    used = {name: number for name, number in used.items() if number is not None}
    words = ", ".join(f"{option_name(name)} {number}" for name, number in used.items())
    tell(f"Live episodes with {words}; without these options they are as in the run's training.")
    return {**episodes, **used}


def evaluated_episodes(data: EpisodeData | MixedData, split: str, asked: int | None) -> int:
    """How many episodes to evaluate on: ``asked``, else all of an archive, else 600, as is usual in the field."""
    return asked or data.available(split) or 600
