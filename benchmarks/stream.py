"""Episodes per second from a local archive, against a plain copy of the same bytes and against plain webdataset.

The copy goes from one contiguous array to a reused buffer of one meta-batch, which is as fast as this machine copies.
Way by way, it takes single ways of that array in a random order, as remix must. webdataset decodes the same shards with
its own ``decode()``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import webdataset
from common import arguments, bank, in_turn, ratio, report

from mamldata.archive.build import build
from mamldata.archive.plan import BuildRequest
from mamldata.parallel import default_workers
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
    batch_size: int = o.batch_size
    streams: dict[str, Iterable[EpisodeBatch]] = {}
    for name, dtype in (("uint8", torch.uint8), ("float32", torch.float32)):
        for order, remix in (("", False), (", remixed", True)):
            stream = EpisodeStream(folder, batch_size=batch_size, dtype=dtype, remix=remix)
            streams[f"stream, {name}{order}"] = stream
            streams[f"stream, {name}{order}, read ahead by a thread"] = stream.to("cpu")
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

    def passing(stream: Iterable[EpisodeBatch]) -> int:
        return sum(len(batch.index) for batch in stream)

    def plain_webdataset() -> int:
        return sum(1 for _ in webdataset.WebDataset(shards, shardshuffle=False).decode())

    results = in_turn(
        {
            "plain copy": copy,
            "plain copy, way by way": copy_ways,
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
            "stream over webdataset": ratio(results, "stream, uint8", "plain webdataset"),
        },
    )


if __name__ == "__main__":
    main()
