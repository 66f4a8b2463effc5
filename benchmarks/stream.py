"""Episodes per second from full and thin archives, against plain copies of the same bytes and against webdataset.

The copy goes from one contiguous array to a reused buffer of one meta-batch, which is as fast as this machine copies.
Way by way, it takes single ways of that array in a random order, as remix must. Image by image, it takes the rows of a
thin archive's episodes from one array of all its images, turned ones included; the rows are known beforehand.
webdataset decodes the shards of the full archive with its own ``decode()``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import webdataset
from common import arguments, bank, in_turn, ratio, report

from mamldata.archive.build import build
from mamldata.archive.index import Archive
from mamldata.archive.plan import BuildRequest
from mamldata.bank.format import Bank
from mamldata.parallel import default_workers
from mamldata.sampling.sampler import EpisodeSampler
from mamldata.streaming.batch import EpisodeBatch
from mamldata.streaming.stream import EpisodeStream


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--n-way", type=int, default=5)
    parser.add_argument("--k-shot", type=int, default=1)
    parser.add_argument("--k-query", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run(options, Path(place) / "archive")


def run(o: argparse.Namespace, folder: Path) -> None:
    """Build an archive and time each method of reading it."""
    manifest, images = bank(o)
    request = BuildRequest(o.n_way, o.k_shot, o.k_query, {"train": o.episodes})
    archive = build(manifest, images, folder, request, workers=default_workers())
    thin = folder.with_name("thin")
    build(manifest, images, thin, replace(request, thin=True))
    batch_size: int = o.batch_size
    streams: dict[str, Iterable[EpisodeBatch]] = {}
    for kind, place in (("stream", folder), ("thin", thin)):
        for name, dtype in (("uint8", torch.uint8), ("float32", torch.float32)):
            for order, remix in (("", False), (", remixed", True)):
                stream = EpisodeStream(place, batch_size=batch_size, dtype=dtype, remix=remix)
                streams[f"{kind}, {name}{order}"] = stream
                streams[f"{kind}, {name}{order}, read ahead by a thread"] = stream.to("cpu")
    stored = EpisodeStream(folder, batch_size=1, dtype=torch.uint8, shuffle=False)
    parts = ([part.reshape(o.n_way, -1).numpy() for part in (batch.support_x, batch.query_x)] for batch in stored)
    flat = np.stack([np.concatenate(pair, axis=1) for pair in parts]).reshape(o.episodes, -1)
    ways = flat.reshape(o.episodes * o.n_way, -1)
    buffer = np.empty((batch_size, flat.shape[1]), dtype=np.uint8)
    shards = [str(folder / shard.file) for shard in archive.splits["train"].shards]

    def copy() -> int:
        for start in range(0, len(flat) - batch_size + 1, batch_size):
            np.copyto(buffer, flat[start : start + batch_size])
        return len(flat) // batch_size * batch_size

    def copy_ways() -> int:
        mixed = np.random.default_rng(0).permutation(len(ways))
        count = batch_size * o.n_way
        for start in range(0, len(ways) - count + 1, count):
            np.take(ways, mixed[start : start + count], axis=0, out=buffer.reshape(count, -1), mode="clip")
        return len(flat) // batch_size * batch_size

    every, rows = turned_images(images, archive)
    image_buffer = np.empty((batch_size * rows.shape[1], every.shape[1]), dtype=np.uint8)

    def gather_images() -> int:
        order = np.random.default_rng(0).permutation(len(rows))
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            some = rows[order[start : start + batch_size]].reshape(-1)
            np.take(every, some, axis=0, out=image_buffer, mode="clip")
        return len(rows) // batch_size * batch_size

    def passing(stream: Iterable[EpisodeBatch]) -> int:
        return sum(len(batch.index) for batch in stream)

    def plain_webdataset() -> int:
        return sum(1 for _ in webdataset.WebDataset(shards, shardshuffle=False).decode())

    results = in_turn(
        {
            "plain copy": copy,
            "plain copy, way by way": copy_ways,
            "plain copy, image by image": gather_images,
            **{name: partial(passing, stream) for name, stream in streams.items()},
            "plain webdataset": plain_webdataset,
        },
        o.repeats,
    )
    report(
        "stream",
        {
            "dataset": manifest.name,
            "unit": "episodes/s",
            "episodes": o.episodes,
            "batch_size": batch_size,
            "image_bytes_per_episode": int(flat.shape[1]),
            "torch": torch.__version__,
            "webdataset": webdataset.__version__,
        },
        {
            **results,
            "stream over copy": ratio(results, "stream, uint8", "plain copy"),
            "remixed over plain, uint8": ratio(results, "stream, uint8, remixed", "stream, uint8"),
            "remixed over plain, float32": ratio(results, "stream, float32, remixed", "stream, float32"),
            "remixed over copy, way by way": ratio(results, "stream, uint8, remixed", "plain copy, way by way"),
            "thin over copy, image by image": ratio(results, "thin, uint8", "plain copy, image by image"),
            "thin remixed over copy, image by image": ratio(
                results, "thin, uint8, remixed", "plain copy, image by image"
            ),
            "thin over stream, uint8": ratio(results, "thin, uint8", "stream, uint8"),
            "thin over stream, float32": ratio(results, "thin, float32", "stream, float32"),
            "stream over webdataset": ratio(results, "stream, uint8", "plain webdataset"),
        },
    )


def turned_images(bank: Bank, archive: Archive) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The images of the train split in each of their turns, uint8 ``[rows, bytes]``; and each episode's rows."""
    table, images = archive.splits["train"].classes, bank.open_images()
    parts = [
        np.rot90(images[row : row + count], turns, axes=(1, 2)).reshape(count, -1)
        for row, count, turns in zip(table.first_row, table.images, table.quarter_turns, strict=True)
    ]
    starts = np.cumsum(table.images) - table.images
    drawn = EpisodeSampler(archive.spec("train"), table).draw(np.arange(archive.splits["train"].episodes))
    rows = starts[drawn.classes][..., None] + drawn.images
    return np.concatenate(parts), rows.reshape(len(rows), -1)


if __name__ == "__main__":
    main()
