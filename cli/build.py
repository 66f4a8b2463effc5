"""``mamldata build``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from cli.common import bars, episode_options, json_option, next_command, print_json, root_option, say
from cli.inspect import describe, print_archive
from mamldata.bank import make_bank
from mamldata.build import DEFAULT_EPISODES, BuildRequest, build
from mamldata.manifest import load_manifest
from mamldata.parallel import default_workers
from mamldata.root import data_root


@click.command(
    epilog="\b\nExample:\n  mamldata build glyphs --out glyphs-5w1s --train 2000 --val 200 --test 600",
)
@click.argument("name", metavar="NAME|FILE.toml|FOLDER")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The archive's folder.")
@episode_options()
@click.option("--train", type=int, default=DEFAULT_EPISODES["train"], show_default=True, help="Episodes.")
@click.option("--val", type=int, default=DEFAULT_EPISODES["val"], show_default=True, help="Episodes.")
@click.option("--test", type=int, default=DEFAULT_EPISODES["test"], show_default=True, help="Episodes.")
@click.option("--episodes-per-shard", type=click.IntRange(1), help="[default: as many as fit into 64 MiB]")
@click.option("--workers", type=click.IntRange(1), help="Processes.  [default: one for each processor]")
@root_option
@json_option
def command(
    name: str,
    out: Path,
    episodes: dict[str, Any],
    train: int,
    val: int,
    test: int,
    episodes_per_shard: int | None,
    workers: int | None,
    root: str | None,
    as_json: bool,
) -> None:
    """Build an archive of episodes; the same command gives the same bytes on every machine.

    Interrupted, the same command goes on. Images are decoded into a bank first, once for each image size.

    A FOLDER of your own images is a dataset: class/image, or train/class/image and so on. Where it has no such splits,
    64 % of the classes are train, 16 % val and 20 % test, drawn with the seed 0.
    """
    start = time.monotonic()
    image_size = episodes.pop("image_size", None)
    counts = {"train": train, "val": val, "test": test}
    request = BuildRequest(episodes=counts, episodes_per_shard=episodes_per_shard, **episodes)
    manifest = load_manifest(name)
    processes = workers or default_workers()
    bank = make_bank(manifest, data_root(root), image_size, workers=processes, progress=bars)
    archive = build(manifest, bank, out, request, workers=processes, progress=bars)
    if as_json:
        print_json(describe(archive, out))
        return
    print_archive(archive, out)
    say(f"Done in {time.monotonic() - start:.1f} s.")
    next_command(f"mamldata train {out}")
