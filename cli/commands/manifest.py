"""``mamldata manifest``."""

from __future__ import annotations

from pathlib import Path

import click

from cli.options import LocalPath, json_option
from cli.output import bars, next_command, print_json, show
from mamldata.datasets.image_folder import folder_name
from mamldata.fetching.author import write_manifest


@click.command(
    epilog="\b\nExample:\n  mamldata manifest my-photos --out my-photos.toml",
)
@click.argument("folder", type=LocalPath(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=LocalPath(dir_okay=False, path_type=Path), help="The new manifest.  [default: NAME.toml]")
@click.option("--name", help="The dataset's name.  [default: the folder's]")
@json_option
def command(folder: Path, out: Path | None, name: str | None, as_json: bool) -> None:
    """Write a manifest for the files in FOLDER, with their hashes: archives, CSV split files, or loose images.

    With it, others can fetch, verify and build the same dataset. Add its title, licence and citation.
    """
    target = out or Path(f"{name or folder_name(folder)}.toml")
    manifest = write_manifest(folder, target, name, bars)
    if as_json:
        print_json({"manifest": str(target), "name": manifest.name, "files": list(manifest.raw_names)})
        return
    what = ", ".join(manifest.raw_names)
    show(f"{target}: dataset {manifest.name}, reader {manifest.reader.type}, of {what}")
    next_command(["fetch", target, "--from", folder])
