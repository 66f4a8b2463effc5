"""``mamldata card``."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import click

from cli.options import LocalPath, json_option
from cli.output import next_command, print_json, say, show
from mamldata.card import write_cards
from mamldata.citation import dataset_of
from mamldata.errors import RequestError
from mamldata.io.urls import is_remote
from mamldata.pipeline import read_archive


@click.command(
    epilog="\b\nExample:\n  mamldata card glyphs-5w1s",
)
@click.argument("archive", metavar="ARCHIVE")
@click.option("--out", type=LocalPath(file_okay=False), help="Where to write.  [default: the archive's folder]")
@click.option("--manifest", metavar="FILE.toml", help="Of your own dataset: its title, licence and citation.")
@click.option("--date", type=click.DateTime(["%Y-%m-%d"]), help="Of publication, for Croissant; else it is left out.")
@click.option("--overwrite", is_flag=True, help="Replace files that hold something else.")
@json_option
def command(
    archive: str, out: str | None, manifest: str | None, date: datetime | None, overwrite: bool, as_json: bool
) -> None:
    """Write a dataset card (README.md) and Croissant 1.1 metadata (croissant.json) beside an archive.

    Hugging Face and search engines read them. They change neither the archive nor its digest.
    """
    if out is None and is_remote(archive):
        raise click.UsageError(
            "Missing option '--out': the archive is at an address, so name a folder on this machine."
        )
    content = read_archive(archive)
    known = dataset_of(vars(content), manifest)
    day = f"{date:%Y-%m-%d}" if date else None
    try:
        written = write_cards(content, Path(out or archive), known, date=day, overwrite=overwrite)
    except RequestError as error:
        raise RequestError(f"{error} That is what --out and --overwrite are for.") from error
    if as_json:
        print_json({"digest": content.digest, "files": [str(path) for path in written]})
        return
    for path in written:
        show(str(path))
    if known is None:
        say(f"The licence and the papers of {content.dataset} are not known here: give --manifest.")
    if date is None:
        say("Croissant's datePublished is left out, because an archive records no date: give --date.")
    next_command(["cite", archive])
