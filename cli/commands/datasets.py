"""``mamldata datasets``."""

from __future__ import annotations

from pathlib import Path

import click

from cli.options import json_option, root_option
from cli.output import next_command, print_json, show
from mamldata.bank.inventory import disk_use, list_datasets
from mamldata.datasets.paths import cache_folder, data_root
from mamldata.words import size_text


@click.command(
    epilog="\b\nExamples:\n  mamldata datasets\n  mamldata datasets --disk",
)
@click.option("--disk", is_flag=True, help="List what lies in the data root and in the caches, and how large it is.")
@root_option
@json_option
def command(disk: bool, root: str | None, as_json: bool) -> None:
    """List the built-in datasets, their split schemes, and which files of them are on this machine."""
    if disk:
        _show_disk(disk_use(data_root(root), cache_folder()), as_json)
        return
    entries = list_datasets(data_root(root))
    if as_json:
        print_json(entries)
        return
    for entry in entries:
        have = f"{entry['files_here']} of {entry['files']} raw files"
        banks = "".join(f", bank at {size} pixels" for size in entry["banks"])
        show(f"{entry['name']}: {entry['title']}")
        show(f"    here: {have}{banks}")
        for scheme in entry["split_schemes"]:
            mark = " (default)" if scheme["default"] else ""
            show(f"    split scheme {scheme['name']}{mark}: {scheme['description']}")
    show(f"Kept in {data_root(root)}")
    next_command(["fetch", "glyphs"])  # glyphs needs no network


def _show_disk(found: dict[Path, int], as_json: bool) -> None:
    if as_json:
        print_json({str(path): size for path, size in found.items()})
        return
    for path, size in found.items():
        show(f"{size_text(size):>10}  {path}")
    show(f"{size_text(sum(found.values())):>10}  together")
