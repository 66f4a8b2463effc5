"""``mamldata benchmarks``."""

from __future__ import annotations

from dataclasses import asdict

import click

from cli.options import json_option, root_option
from cli.output import next_command, print_json, show
from mamldata.archive.benchmarks import benchmarks
from mamldata.archive.index import is_archive
from mamldata.datasets.paths import data_root


@click.command(
    epilog="\b\nExample:\n  mamldata benchmarks",
)
@root_option
@json_option
def command(root: str | None, as_json: bool) -> None:
    """List the benchmarks: test archives by name, with the digest that each must have, and which are built here."""
    home = data_root(root)
    here = {name: is_archive(one.folder(home)) for name, one in benchmarks().items()}
    if as_json:
        print_json([{**asdict(one), "here": here[name]} for name, one in benchmarks().items()])
        return
    for name, one in benchmarks().items():
        show(
            f"{name}: {one.n_way}-way {one.k_shot}-shot, {one.k_query} queries per class; {one.episodes:,} {one.split} "
            f"episodes of {one.dataset}, split scheme {one.split_scheme}, {one.image_size}x{one.image_size}, rotations "
            f"{one.rotations}, seed {one.seed}"
        )
        built = f", built in {one.folder(home)}" if here[name] else ""
        show(f"    {f'digest sha256:{one.sha256}' if one.sha256 else 'digest not pinned yet'}{built}")
    next_command(["build", "--benchmark", "glyphs-5w1s"])  # glyphs needs no network
