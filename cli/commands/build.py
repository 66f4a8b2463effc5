"""``mamldata build``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from cli.commands.inspect import describe, left_out_values, print_archive, say_left_out
from cli.options import episode_options, json_option, root_option
from cli.output import bars, next_command, print_json, say, show, use_command
from mamldata.archive.build import Portion, build, build_portion
from mamldata.archive.plan import DEFAULT_EPISODES, BuildRequest
from mamldata.bank.make import files_left_out, make_bank
from mamldata.datasets.load import load_manifest
from mamldata.datasets.paths import data_root
from mamldata.io.urls import is_remote, shown_place
from mamldata.parallel import default_workers
from mamldata.words import counted


def _portion(_context: click.Context, _option: click.Parameter, value: str | None) -> Portion | None:
    number, _, of = (value or "").partition("/")
    if value is None:
        return None
    if not (number.isdecimal() and of.isdecimal()):
        raise click.BadParameter(f"{value!r} is not of the form 3/100, the third of a hundred portions.")
    return Portion(int(number), int(of))


@click.command(
    epilog="\b\nExample:\n  mamldata build glyphs --out glyphs-5w1s --train 2000 --val 200 --test 600",
)
@click.argument("name", metavar="NAME|FILE.toml|FOLDER")
@click.option("--out", metavar="FOLDER|ADDRESS", required=True, help="The new archive: a folder, or s3://… .")
@episode_options()
@click.option("--train", type=int, default=DEFAULT_EPISODES["train"], show_default=True, help="Train episodes.")
@click.option("--val", type=int, default=DEFAULT_EPISODES["val"], show_default=True, help="Val episodes.")
@click.option("--test", type=int, default=DEFAULT_EPISODES["test"], show_default=True, help="Test episodes.")
@click.option("--episodes-per-shard", type=click.IntRange(1), help="[default: as many as fit in 64 MiB]")
@click.option("--workers", type=click.IntRange(1), help="Processes on this machine.  [default: one for each processor]")
@click.option("--dask", metavar="ADDRESS", help="Write the shards on the Dask cluster with this scheduler.")
@click.option("--shards", metavar="I/N", callback=_portion, help="Write only the I-th of N portions, from 1/N to N/N.")
@root_option
@json_option
def command(
    name: str,
    out: str,
    episodes: dict[str, Any],
    train: int,
    val: int,
    test: int,
    episodes_per_shard: int | None,
    workers: int | None,
    dask: str | None,
    shards: Portion | None,
    root: str | None,
    as_json: bool,
) -> None:
    """Build an archive of episodes; the same command gives the same bytes on every machine.

    To continue an interrupted build, run the same command again. Images are first decoded into a bank, once for each
    image size.

    A FOLDER of your own images is a dataset: class/image, or train/class/image and so on. Without such splits, 64 % of
    the classes are train, 16 % val and 20 % test, drawn with seed 0.

    With --shards, several calls share the work, at the same time or not, on one machine or many. A last call without
    it writes the missing shards and closes the archive.
    """
    start = time.monotonic()
    image_size = episodes.pop("image_size", None)
    counts = {"train": train, "val": val, "test": test}
    request = BuildRequest(episodes=counts, episodes_per_shard=episodes_per_shard, **episodes)
    manifest = load_manifest(name)
    processes = workers or default_workers()
    place = out if is_remote(out) else Path(out)
    shown = shown_place(out)
    with _executor(dask) as executor:
        bank = make_bank(manifest, data_root(root), image_size, workers=processes, progress=bars)
        left_out = files_left_out(manifest, bank, data_root(root))
        if not as_json:
            classes = counted(len(bank.class_names), "class", "classes")
            say(f"{manifest.reference}: {counted(bank.shape[0], 'image')} of {classes}")
            say_left_out(left_out)
        how: dict[str, Any] = {"workers": processes, "executor": executor, "progress": bars}
        if shards is not None:
            built = build_portion(manifest, bank, place, shards, request, **how)
            if as_json:
                portion = {"archive": shown, "portion": str(shards), **vars(built)}
                print_json({**portion, "left_out": left_out_values(left_out)})
                return
            share = f"{built.shards} of {counted(built.of_shards, 'shard')}"
            show(f"{shown}: portion {shards}, {share}, {built.written} of them written by this call")
            say(f"Done in {time.monotonic() - start:.1f} s.")
            say("When all portions are done, run the same command without --shards to close the archive.")
            return
        archive = build(manifest, bank, place, request, **how)
    if as_json:
        print_json(describe(archive, shown, left_out))
        return
    print_archive(archive, shown)
    say(f"Done in {time.monotonic() - start:.1f} s.")
    next_command(use_command(shown, archive.splits))


@contextmanager
def _executor(dask: str | None) -> Iterator[Executor | None]:
    if dask is None:
        yield None
        return
    from mamldata.archive.dask import dask_executor

    with dask_executor(dask) as (executor, workers):
        say(f"The Dask cluster at {shown_place(dask)} has {counted(workers, 'worker')}.")
        yield executor
