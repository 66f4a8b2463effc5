"""``mamldata preview``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.options import LocalPath, episode_options, json_option, root_option, target_argument
from cli.output import bars, next_command, print_json, show, train_command, trainable
from cli.targets import archive_cache, archive_folder, refuse_with_archive
from mamldata.io.urls import is_remote
from mamldata.parallel import default_workers
from mamldata.pictures import contact_sheet
from mamldata.pipeline import read_archive
from mamldata.preview import episode, save, title
from mamldata.sampling.splits import SPLITS
from mamldata.sources.live import live
from mamldata.sources.open import open_archive
from mamldata.sources.source import Source


@click.command(
    epilog="\b\nExample:\n  mamldata preview glyphs --episode 3 --out episode.png",
)
@target_argument(metavar="NAME|FOLDER|ARCHIVE")
@click.option("--out", type=LocalPath(dir_okay=False, path_type=Path), required=True, help="The PNG file to write.")
@click.option("--split", type=click.Choice(SPLITS), default="test", show_default=True, help="The episode's split.")
@click.option("--episode", "index", type=click.IntRange(0), default=0, show_default=True, help="The episode's index.")
@episode_options()
@root_option
@json_option
def command(
    target: str,
    out: Path,
    split: str,
    index: int,
    episodes: dict[str, Any],
    root: str | None,
    as_json: bool,
) -> None:
    """Draw an episode: rows are classes, support images left, query images right."""
    folder = archive_folder(target)
    source: Source
    if folder is None:
        source = live(target, split, root=root, workers=default_workers(), progress=bars, **episodes)
        following = train_command(target, episodes)
    else:
        refuse_with_archive(folder, episodes)
        source = open_archive(folder, split, verify=not is_remote(folder), cache_dir=archive_cache(folder, root))
        following = train_command(target) if trainable(read_archive(folder).splits) else ["inspect", target]
    support, query, names = episode(source, index)
    save(contact_sheet(support, query, names, title(source, index)), out)
    if as_json:
        print_json({"out": str(out), "classes": names})
        return
    show(f"{out}: {title(source, index)}")
    next_command(following)
