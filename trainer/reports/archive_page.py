"""The page of an archive: its digest, every class, episodes, statistics, and whether it is whole."""

from __future__ import annotations

import math
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from mamldata.archive.benchmarks import benchmark_of
from mamldata.archive.index import Archive, ArchiveSplit
from mamldata.archive.verify import verify_archive
from mamldata.errors import DamagedError
from mamldata.io.urls import shown_place
from mamldata.pipeline import read_archive
from mamldata.progress import Progress, silent
from mamldata.sampling.sampler import Draws
from mamldata.sources.drawn import ThinSource
from mamldata.sources.open import open_archive
from mamldata.sources.source import archive_sampler
from mamldata.sources.stored import StoredSource
from mamldata.words import mamldata_command, shortened
from trainer.reports.page import MOST_PICTURES, Problems, drawing
from trainer.reports.pictures import data_uri, episode_rows, support_images
from trainer.reports.plots import draw_occurrences

Counts = npt.NDArray[np.int64]

_MOST_PLACES = 1 << 22  # of images in the episodes of a split that are counted
_MOST_CLASSES, _MOST_BYTES = 4000, 1 << 28  # shown of a split, and their images before they are shrunk
_MOST_NAME = 48  # characters of a class in the gallery
_EPISODES = 12  # shown of a split
_COLUMNS = 40  # images in a row of a sheet


def archive_page(
    place: Path | str,
    now: datetime,
    *,
    verify: bool = True,
    cache_dir: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """The values of the template ``archive``.

    Args:
        place: the archive's folder or address.
        now: the time that the page gives.
        verify: hash the archive, see ``verify_archive``.
        cache_dir: where to keep the shards of an archive at an address.
        progress: counts hashed bytes.

    Returns:
        Plain values. ``problems`` lists what is damaged; what that concerns is left out.

    Raises:
        RequestError: the place is not an archive, or is an unfinished one.
        FetchError: its ``archive.json`` could not be fetched.
    """
    problems = Problems()
    page = {
        "title": shown_place(place),
        "now": now,
        "verified": verify,
        "verify_command": mamldata_command("verify", shown_place(place)),
        "problems": problems,
        "archive": None,
        "splits": [],
    }
    try:
        archive = read_archive(place)
    except DamagedError as error:
        problems.append(str(error))
        return page
    if verify:
        problems += verify_archive(place, progress)
    known = benchmark_of(archive.digest)
    share = MOST_PICTURES // len(archive.splits)
    return page | {
        "archive": archive,
        "benchmark": known.name if known else None,
        "bytes": sum(shard.bytes for shard in archive.shards()),
        "splits": [_split_page(place, archive, name, share, cache_dir, problems) for name in archive.splits],
    }


def _split_page(
    place: Path | str, archive: Archive, name: str, most: int, cache_dir: Path | None, problems: Problems
) -> dict[str, Any]:
    """The values of one split, whose pictures take at most ``most`` bytes."""
    split = archive.splits[name]
    page: dict[str, Any] = {"name": name, "episodes": split.episodes, "bytes": sum(one.bytes for one in split.shards)}
    page |= {"classes": _base(split), "turned": len(split.classes) - _base(split), "counted": 0, "shown": []}
    sampler = problems.without(archive_sampler, archive, name)
    queries = archive.k_query * (1 if archive.query_alpha is None else archive.n_way)
    drawn = min(split.episodes, _MOST_PLACES // (archive.n_way * (archive.k_shot + queries)))
    if sampler is None or not drawn:
        return page
    draws = sampler.draw(np.arange(drawn))
    shown = max(1, min(_base(split), _MOST_CLASSES, _MOST_BYTES // math.prod(archive.image_shape)))
    page |= _statistics(split, draws, archive.k_shot, name, shown)
    source = problems.without(open_archive, place, name, cache_dir=cache_dir)
    if source is None:
        return page
    page["sheet"] = problems.without(_sheet, source, split, draws, shown, most // 2) or ""
    for index in range(min(split.episodes, _EPISODES)):
        rows = problems.without(episode_rows, source, index, most // (2 * _EPISODES))
        if rows is None:
            break
        page["shown"].append({"title": f"{name} episode {index:,}", "rows": rows, "more": archive.n_way - len(rows)})
    return page


def _base(split: ArchiveSplit) -> int:
    """How many classes there are before they are turned."""
    return int((split.classes.quarter_turns == 0).sum())


def _statistics(split: ArchiveSplit, draws: Draws, k_shot: int, name: str, shown: int) -> dict[str, Any]:
    """How many images and episodes the classes have, and how often images occur, in the drawn episodes."""
    table = split.classes
    _, counts = np.unique(_rows(split, draws, k_shot), return_counts=True)
    per_class = np.bincount(draws.classes.reshape(-1), minlength=len(table)).reshape(_base(split), -1).sum(1)
    images = table.images[table.quarter_turns == 0]
    never = max(0, int(images.sum()) - len(counts))
    histogram = [never, *np.bincount(counts)[1:].tolist()]
    names = [name for name, turns in zip(table.names, table.quarter_turns.tolist(), strict=True) if not turns]
    listed = zip(names[:shown], images.tolist(), per_class.tolist(), strict=False)
    return {
        "counted": len(draws.classes),
        "images": int(images.sum()),
        "images_of_class": _spread(images),
        "episodes_of_class": _spread(per_class),
        "never": never,
        "most": int(counts.max(initial=0)),
        "mean": float(counts.sum() / max(1, images.sum())),
        "occurrences": drawing(f"occurrences-{name}", lambda axes: draw_occurrences(axes, histogram)),
        "listed": [
            {"name": shortened(one, _MOST_NAME), "images": own, "episodes": times} for one, own, times in listed
        ],
        "columns": _COLUMNS,
        "sheet": "",
    }


def _rows(split: ArchiveSplit, draws: Draws, k_shot: int) -> Counts:
    """The row in the bank of every place in the drawn episodes: int64, one dimension."""
    rows = split.classes.first_row[draws.classes][..., None] + draws.images
    if draws.queries is None:
        return rows.reshape(-1)
    return rows[np.arange(rows.shape[2]) < k_shot + draws.queries[..., None]]


def _spread(values: Counts) -> str:
    low, middle, high = int(values.min()), float(np.median(values)), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}, median {middle:,.0f}"


def _sheet(source: StoredSource | ThinSource, split: ArchiveSplit, draws: Draws, count: int, most: int) -> Markup:
    """An image of each of the first ``count`` classes side by side, as it is before it is turned.

    A full archive holds images of its episodes only: a class is black if it is in no drawn episode.
    """
    table, shape = split.classes, source.info.image_shape
    turned = len(table) // _base(split)
    sheet = np.zeros((count, *shape), dtype=np.uint8)
    if isinstance(source, ThinSource):
        for number, image in enumerate(sheet):
            source.read_class(number * turned, image)
        return data_uri(sheet, _COLUMNS, most)
    flat = draws.classes.reshape(-1)
    turns = table.quarter_turns[flat] if shape[0] == shape[1] else np.zeros_like(flat)
    order = np.argsort(turns, kind="stable")  # places where a class is not turned come first
    classes, first = np.unique(flat[order] // turned, return_index=True)
    shown, ways = classes[classes < count], order[first][classes < count]
    for number, way, image in zip(shown.tolist(), ways.tolist(), support_images(source, ways), strict=True):
        sheet[number] = np.rot90(image, -int(turns[way]))
    return data_uri(sheet, _COLUMNS, most)
