"""``mamldata verify``."""

from __future__ import annotations

import click

from cli.options import json_option, root_option, target_argument
from cli.output import bars, build_command, next_command, print_json, show, use_command
from cli.targets import archive_folder
from mamldata.archive.benchmarks import benchmark_of
from mamldata.archive.verify import verify_archive
from mamldata.bank.verify import verify_dataset
from mamldata.datasets.load import load_manifest
from mamldata.datasets.paths import data_root
from mamldata.io.urls import shown_place
from mamldata.pipeline import read_archive


@click.command(
    epilog="\b\nExamples:\n  mamldata verify glyphs\n  mamldata verify glyphs-5w1s",
)
@target_argument(metavar="NAME|FOLDER|ARCHIVE")
@click.option("--digest", help="The digest that the archive should have: all 64 digits, or at least the first 12.")
@root_option
@json_option
def command(target: str, digest: str | None, root: str | None, as_json: bool) -> None:
    """Hash a dataset's raw files and banks, or an archive's shards, again; exit with 1 if a byte has changed."""
    folder = archive_folder(target)
    if folder is None:
        if digest is not None:
            raise click.UsageError("--digest is for archives; the digests of a dataset are in its manifest.")
        problems = verify_dataset(load_manifest(target), data_root(root), bars)
    else:
        problems = verify_archive(folder, bars, digest=digest)
    if as_json:
        print_json({"target": shown_place(target), "whole": not problems, "problems": problems})
    else:
        for problem in problems:
            show(problem)
        if not problems:
            archive = None if folder is None else read_archive(folder)
            known = benchmark_of(archive.digest) if archive else None
            digest_shown = f", digest {archive.digest}" if archive else ""
            show(f"{shown_place(target)} is whole{digest_shown}{f', benchmark {known.name}' if known else ''}")
            next_command(use_command(target, archive.splits) if archive else build_command(target))
    if problems:
        raise click.exceptions.Exit(1)
