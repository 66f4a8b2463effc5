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
from cli.options import benchmark_option, episode_options, given, json_option, options_as, root_option, target_argument
from cli.output import bars, next_command, print_json, say, show, use_command
from cli.targets import refuse_with_benchmark
from mamldata.archive.benchmarks import benchmark as benchmark_named
from mamldata.archive.build import Portion, build, build_portion
from mamldata.archive.plan import DEFAULT_EPISODES, BuildRequest
from mamldata.bank.make import files_left_out, make_bank
from mamldata.datasets.image_folder import FolderOptions
from mamldata.datasets.load import load_manifest
from mamldata.datasets.manifest import FITS
from mamldata.datasets.paths import data_root
from mamldata.io.urls import is_remote, shown_place
from mamldata.parallel import default_workers
from mamldata.pipeline import build_benchmark
from mamldata.words import counted


def _portion(_context: click.Context, _option: click.Parameter, value: str | None) -> Portion | None:
    number, _, of = (value or "").partition("/")
    if value is None:
        return None
    if not (number.isdecimal() and of.isdecimal()):
        raise click.BadParameter(f"{value!r} is not of the form 3/100, the third of a hundred portions.")
    return Portion(int(number), int(of))


_COUNTS = {
    split: click.option(f"--{split}", type=int, help=f"{split.capitalize()} episodes.  [default: {count}]")
    for split, count in DEFAULT_EPISODES.items()
}


@click.command(
    epilog="\b\nExamples:\n  mamldata build glyphs --out glyphs-5w1s --train 2000 --val 200 --test 600\n"
    "  mamldata build --benchmark glyphs-5w1s",
)
@target_argument("name", metavar="[NAME|FILE.toml|FOLDER]", required=False)
@click.option("--out", metavar="FOLDER|ADDRESS", help="The new archive: a folder, or s3://… .")
@benchmark_option
@episode_options()
@options_as("counts", _COUNTS)
@click.option("--episodes-per-shard", type=click.IntRange(1), help="[default: as many as fit in 64 MiB]")
@click.option("--thin", is_flag=True, help="Store each image once, and draw the same episodes when they are read.")
@click.option("--workers", type=click.IntRange(1), help="Processes on this machine.  [default: one for each processor]")
@click.option("--dask", metavar="ADDRESS", help="Write the shards on the Dask cluster with this scheduler.")
@click.option("--shards", metavar="I/N", callback=_portion, help="Write only the I-th of N portions, from 1/N to N/N.")
@root_option
@json_option
def command(
    name: str | None,
    out: str | None,
    benchmark: str | None,
    episodes: dict[str, Any],
    counts: dict[str, int],
    episodes_per_shard: int | None,
    thin: bool,
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

    With --thin, the archive takes no more space than the images, however many episodes it has: use it for training.
    Without, it holds each episode as tar files that any tool reads: use it for test episodes that others shall have.

    With --shards, several calls share the work, at the same time or not, on one machine or many. A last call without
    it writes the missing shards and closes the archive.

    With --benchmark, the dataset and the episodes are the benchmark's, --out is a folder under the root, and the digest
    is checked.
    """
    if benchmark is not None:
        given_here = given(episodes_per_shard=episodes_per_shard, shards=shards, thin=thin or None)
        refuse_with_benchmark(benchmark, name, {**episodes, **counts, **given_here})
        _build_benchmark(benchmark, out, workers, dask, root, as_json)
        return
    if name is None:
        raise click.UsageError("Missing the dataset: give NAME, FILE.toml or FOLDER, or --benchmark.")
    if out is None:
        raise click.UsageError("Missing option '--out': the folder or the address of the new archive.")
    start = time.monotonic()
    image_size = episodes.pop("image_size", None)
    folder: Any = {name: episodes.pop(name) for name in FolderOptions.__annotations__ if name in episodes}
    request = BuildRequest(
        episodes={**DEFAULT_EPISODES, **counts}, episodes_per_shard=episodes_per_shard, thin=thin, **episodes
    )
    manifest = load_manifest(name, **folder)
    processes = workers or default_workers()
    place = out if is_remote(out) else Path(out)
    shown = shown_place(out)
    with _executor(dask) as executor:
        bank = make_bank(manifest, data_root(root), image_size, workers=processes, progress=bars)
        left_out = files_left_out(manifest, bank, data_root(root))
        if not as_json:
            classes = counted(len(bank.class_names), "class", "classes")
            say(f"{manifest.reference}: {counted(bank.shape[0], 'image')} of {classes}")
            if manifest.folder:
                say(f"Images become {bank.shape[1]}x{bank.shape[2]}; oblong ones are {FITS[manifest.image.fit]}.")
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


def _build_benchmark(
    name: str, out: str | None, workers: int | None, dask: str | None, root: str | None, as_json: bool
) -> None:
    start = time.monotonic()
    place = out or str(benchmark_named(name).folder(data_root(root)))
    with _executor(dask) as executor:
        archive = build_benchmark(name, place, root=root, workers=workers, executor=executor, progress=bars)
    if as_json:
        print_json(describe(archive, shown_place(place), None))
        return
    print_archive(archive, shown_place(place))
    say(f"Done in {time.monotonic() - start:.1f} s.")
    if benchmark_named(name).sha256 is None:
        say(f"The digest of the benchmark {name} is not pinned yet: give this one beside an accuracy on it.")
    next_command(["inspect", place])


@contextmanager
def _executor(dask: str | None) -> Iterator[Executor | None]:
    if dask is None:
        yield None
        return
    from mamldata.archive.dask import dask_executor

    with dask_executor(dask) as (executor, workers):
        say(f"The Dask cluster at {shown_place(dask)} has {counted(workers, 'worker')}.")
        yield executor
