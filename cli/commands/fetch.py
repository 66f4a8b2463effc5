"""``mamldata fetch``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from cli.options import json_option, root_option, target_argument
from cli.output import bars, build_command, next_command, print_json, say, show
from mamldata.datasets.load import load_manifest
from mamldata.datasets.manifest import Manifest
from mamldata.datasets.paths import data_root
from mamldata.errors import FetchError
from mamldata.fetching.act import Fetched, fetch
from mamldata.fetching.plan import Action, plan
from mamldata.io.urls import shown_place
from mamldata.words import counted, size_text


@click.command(
    epilog="\b\nExamples:\n  mamldata fetch glyphs\n  mamldata fetch omniglot --dry-run",
)
@target_argument("name", metavar="NAME|FILE.toml")
@click.option(
    "--from",
    "places",
    metavar="PLACE",
    multiple=True,
    help="A folder or address to try before the manifest's own sources.  [repeatable]",
)
@click.option("--offline", is_flag=True, help="Do not use the network.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
@root_option
@json_option
def command(name: str, places: tuple[str, ...], offline: bool, dry_run: bool, root: str | None, as_json: bool) -> None:
    """Get a dataset's raw files, verify each, and keep them read-only.

    An interrupted download continues where it stopped. Files that are here already are not fetched again.
    """
    manifest = load_manifest(name)
    home = data_root(root)
    if dry_run:
        _show_plan(manifest, home, plan(manifest, home, places, offline=offline), as_json)
        return
    results = fetch(manifest, home, places, offline=offline, progress=bars, notify=say)
    if as_json:
        print_json([asdict(result) for result in results])
        return
    for result in results:
        show(_line(result))
    show(f"{manifest.name} is in {manifest.home(home).raw}")
    next_command(build_command(name))


def _line(result: Fetched) -> str:
    if result.images is not None:
        how = f"collected from {result.source}" if result.source else "here already"
        digest = f"content digest {result.content_sha256}, pinned"
        return f"{result.name}: {how}, {counted(result.images, 'image')}, {size_text(result.bytes)}, {digest}"
    if result.how == "had":
        return f"{result.name}: here already, {size_text(result.bytes)}, verified when it was fetched"
    if result.how == "checked":
        return f"{result.name}: here already, {size_text(result.bytes)}, verified now"
    origin = f" from {result.source}" if result.source else ""
    check = "content digest" if result.checked_by == "content_sha256" else result.checked_by
    return f"{result.name}: {result.how}{origin}, {size_text(result.bytes)}, {check} matches"


def _show_plan(manifest: Manifest, root: Path, actions: list[Action], as_json: bool) -> None:
    if as_json:
        print_json(
            [
                {
                    "name": action.file.name,
                    "action": action.kind,
                    "path": str(action.path),
                    "bytes": action.file.bytes,
                    "have_bytes": action.have_bytes,
                    "sources": [shown_place(source) for source in action.sources],
                }
                for action in actions
            ]
        )
    else:
        for action in actions:
            size = f", {size_text(action.file.bytes)}" if action.file.bytes else ""
            show(f"{action.file.name}: {action.kind}{size}")
            for source in action.sources:
                show(f"    {shown_place(source)}")
        show(f"into {manifest.home(root).raw}")
    if missing := [action.file.name for action in actions if action.kind == "missing"]:
        raise FetchError(f"Without the network there is no source for: {', '.join(missing)}. Give one with --from.")
