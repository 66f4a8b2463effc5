"""Episodes a second from a local archive, against a plain copy of the same bytes and against plain webdataset.

The copy goes from one contiguous array to a buffer of a meta-batch that is used again and again: as fast as this
machine copies. webdataset decodes the same shards with its own ``decode()``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import webdataset
from common import arguments, bank, in_turn, ratio, report

from mamldata.build import BuildRequest, build
from mamldata.parallel import default_workers
from mamldata.stream import EpisodeStream


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
    """Build an archive and time all ways of reading it."""
    manifest, images = bank(o)
    request = BuildRequest(o.n_way, o.k_shot, o.k_query, {"train": o.episodes})
    archive = build(manifest, images, folder, request, workers=default_workers())
    batch_size: int = o.batch_size
    stored = EpisodeStream(folder, batch_size=batch_size, dtype=torch.uint8)
    remixed = EpisodeStream(folder, batch_size=batch_size, dtype=torch.uint8, remix=True)
    scaled = EpisodeStream(folder, batch_size=batch_size)
    ahead = EpisodeStream(folder, batch_size=batch_size, dtype=torch.uint8).to("cpu")
    whole = EpisodeStream(folder, batch_size=1, dtype=torch.uint8, shuffle=False)
    flat = np.stack([np.concatenate([b.support_x.numpy().ravel(), b.query_x.numpy().ravel()]) for b in whole])
    buffer = np.empty((batch_size, flat.shape[1]), dtype=np.uint8)
    shards = [str(folder / shard.file) for shard in archive.splits["train"].shards]

    def copy() -> int:
        for start in range(0, len(flat) - batch_size + 1, batch_size):
            np.copyto(buffer, flat[start : start + batch_size])
        return len(flat) // batch_size * batch_size

    def stream(source: object) -> int:
        return sum(len(batch.index) for batch in source)

    def plain_webdataset() -> int:
        return sum(1 for _ in webdataset.WebDataset(shards, shardshuffle=False).decode())

    results = in_turn(
        {
            "plain copy": copy,
            "stream, uint8": lambda: stream(stored),
            "stream, uint8, remixed": lambda: stream(remixed),
            "stream, float32": lambda: stream(scaled),
            "stream, uint8, read ahead by a thread": lambda: stream(ahead),
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
            "remixed over plain stream": ratio(results, "stream, uint8, remixed", "stream, uint8"),
            "stream over webdataset": ratio(results, "stream, uint8", "plain webdataset"),
        },
    )


if __name__ == "__main__":
    main()
