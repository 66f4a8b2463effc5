"""``mamldata inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from cli.options import json_option, root_option
from cli.output import next_command, print_json, say, show
from mamldata.archive.benchmarks import benchmark_of
from mamldata.archive.index import AnyShard, Archive, ArchiveSplit
from mamldata.bank.inventory import files_left_out_of
from mamldata.datasets.paths import data_root
from mamldata.io.urls import shown_place
from mamldata.pipeline import read_archive
from mamldata.readers.left_out import LeftOut
from mamldata.words import counted, size_text


@click.command(
    epilog="\b\nExample:\n  mamldata inspect glyphs-5w1s",
)
@click.argument("archive", metavar="ARCHIVE")
@root_option
@json_option
def command(archive: str, root: str | None, as_json: bool) -> None:
    """Show an archive's contents, and the digest to cite.

    If the bank that it was built from is under the root, also show which files were left out.
    """
    content = read_archive(archive)
    left_out = files_left_out_of(content.dataset, content.image_shape[0], content.bank_sha256, data_root(root))
    if as_json:
        print_json(describe(content, shown_place(archive), left_out))
        return
    print_archive(content, shown_place(archive))
    say_left_out(left_out or ())
    next_command(["verify", archive])


def describe(archive: Archive, folder: Path | str, left_out: Sequence[LeftOut] | None) -> dict[str, Any]:
    """An archive as plain values.

    Args:
        archive: the archive.
        folder: its place, as shown to the user.
        left_out: files that are not in its bank; None if unknown.
    """
    return {
        "archive": str(folder),
        "digest": archive.digest,
        "benchmark": known.name if (known := benchmark_of(archive.digest)) else None,
        "dataset": archive.dataset,
        "dataset_version": archive.dataset_version,
        "bank_sha256": archive.bank_sha256,
        "split_scheme": archive.split_scheme,
        "rotations": archive.rotations,
        "n_way": archive.n_way,
        "k_shot": archive.k_shot,
        "k_query": archive.k_query,
        "seed": archive.seed,
        "image_shape": list(archive.image_shape),
        "splits": {
            name: {
                "episodes": split.episodes,
                "classes": len(split.classes),
                "images": _images(split),
                "shards": len(split.shards),
                "bytes": sum(shard.bytes for shard in split.shards),
            }
            for name, split in archive.splits.items()
        },
        "thin": archive.thin,
        "image_shards": len(archive.images),
        "bytes": sum(shard.bytes for shard in archive.shards()),
        "left_out": left_out_values(left_out),
    }


def left_out_values(left_out: Sequence[LeftOut] | None) -> list[dict[str, Any]] | None:
    """Files that were left out, as plain values."""
    return None if left_out is None else [group.to_values() for group in left_out]


def say_left_out(left_out: Sequence[LeftOut]) -> None:
    """Print the files that were left out on stderr."""
    for group in left_out:
        say(f"Left out: {group}")


def _images(split: ArchiveSplit) -> int:
    """How many images the classes have; rotated classes are not counted again."""
    return int(split.classes.images[split.classes.quarter_turns == 0].sum())


def _stored(shards: Sequence[AnyShard]) -> str:
    count = "1 shard" if len(shards) == 1 else f"{len(shards)} shards"
    return f"{count}, {size_text(sum(shard.bytes for shard in shards))}"


def print_archive(archive: Archive, folder: Path | str) -> None:
    """Print an archive for people."""
    height, width, channels = archive.image_shape
    show(f"{folder}: {archive.dataset} (version {archive.dataset_version}), split scheme {archive.split_scheme}")
    show(
        f"  {archive.n_way}-way {archive.k_shot}-shot, {archive.k_query} queries per class, images "
        f"{height}x{width}x{channels}, rotations {archive.rotations}, seed {archive.seed}"
    )
    for name, split in archive.splits.items():
        stored = "" if archive.thin else f", {_stored(split.shards)}"
        episodes = counted(split.episodes, "episode")
        classes = f"{counted(len(split.classes), 'class', 'classes'):>13} ({counted(_images(split), 'image')})"
        show(f"  {name:5} {episodes:>16} of {classes}{stored}")
    if archive.thin:
        images = sum(shard.rows for shard in archive.images)
        show(f"  thin: {counted(images, 'image')}, {_stored(archive.images)}; episodes are drawn when they are read")
    show(f"  bank   sha256:{archive.bank_sha256}")
    show(f"  digest sha256:{archive.digest}")
    if known := benchmark_of(archive.digest):
        show(f"  benchmark {known.name}")
