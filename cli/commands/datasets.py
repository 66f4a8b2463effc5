"""``mamldata datasets``."""

from __future__ import annotations

import click

from cli.options import json_option, root_option
from cli.output import next_command, print_json, show
from mamldata.bank.inventory import list_datasets
from mamldata.datasets.paths import data_root


@click.command(
    epilog="\b\nExample:\n  mamldata datasets",
)
@root_option
@json_option
def command(root: str | None, as_json: bool) -> None:
    """List the built-in datasets, their split schemes, and which files of them are on this machine."""
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
