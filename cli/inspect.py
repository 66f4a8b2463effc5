"""``mamldata inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.common import json_option, next_command, print_json, size_text
from mamldata.archive import Archive, read_archive
from mamldata.places import is_remote, shown_place
from mamldata.remote import read_remote_archive


@click.command(
    epilog="\b\nExample:\n  mamldata inspect glyphs-5w1s",
)
@click.argument("archive", metavar="ARCHIVE")
@json_option
def command(archive: str, as_json: bool) -> None:
    """Show what is in an archive, and the digest to cite."""
    content = read_remote_archive(archive) if is_remote(archive) else read_archive(Path(archive))
    if as_json:
        print_json(describe(content, shown_place(archive)))
        return
    print_archive(content, shown_place(archive))
    next_command(["verify", archive])


def describe(archive: Archive, folder: Path | str) -> dict[str, Any]:
    """An archive as plain values."""
    return {
        "archive": str(folder),
        "digest": archive.digest,
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
                "shards": len(split.shards),
                "bytes": sum(shard.bytes for shard in split.shards),
            }
            for name, split in archive.splits.items()
        },
    }


def print_archive(archive: Archive, folder: Path | str) -> None:
    """An archive as people read it."""
    height, width, channels = archive.image_shape
    click.echo(f"{folder}: {archive.dataset} (version {archive.dataset_version}), split scheme {archive.split_scheme}")
    click.echo(
        f"  {archive.n_way}-way {archive.k_shot}-shot, {archive.k_query} queries per class, images "
        f"{height}x{width}x{channels}, rotations {archive.rotations}, seed {archive.seed}"
    )
    for name, split in archive.splits.items():
        size = size_text(sum(shard.bytes for shard in split.shards))
        shards = "1 shard" if len(split.shards) == 1 else f"{len(split.shards)} shards"
        click.echo(f"  {name:5} {split.episodes:7,} episodes of {len(split.classes):5,} classes, {shards}, {size}")
    click.echo(f"  bank   sha256:{archive.bank_sha256}")
    click.echo(f"  digest sha256:{archive.digest}")
