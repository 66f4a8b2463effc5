"""Episodes a second from an archive over loopback HTTP, against plain webdataset over the same server.

Plain webdataset reads an address through its own opener (curl in a pipe). Nothing is cached from one pass to the next,
but for the last candidate, whose shards are all in its cache.
"""

from __future__ import annotations

import argparse
import http.server
import tempfile
import threading
from functools import partial
from pathlib import Path

import torch
import webdataset
from common import arguments, bank, in_turn, ratio, report

from mamldata.build import BuildRequest, build
from mamldata.parallel import default_workers
from mamldata.stream import EpisodeStream


class Quiet(http.server.SimpleHTTPRequestHandler):
    """The standard library's server of files, with no log."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Silent."""


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--episodes-per-shard", type=int, default=250)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "archive"
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            run(options, folder, f"http://127.0.0.1:{server.server_address[1]}", Path(place) / "cache")
            server.shutdown()


def run(o: argparse.Namespace, folder: Path, url: str, cache: Path) -> None:
    """Build an archive, serve it, and time both readers."""
    manifest, images = bank(o)
    request = BuildRequest(5, 1, 15, {"train": o.episodes}, episodes_per_shard=o.episodes_per_shard)
    archive = build(manifest, images, folder, request, workers=default_workers())
    shards = [f"{url}/{shard.file}" for shard in archive.splits["train"].shards]
    cached = EpisodeStream(url, batch_size=o.batch_size, dtype=torch.uint8, cache_dir=cache)

    def remote() -> int:
        fresh = EpisodeStream(url, batch_size=o.batch_size, dtype=torch.uint8)
        return sum(len(batch.index) for batch in fresh.to("cpu"))

    results = in_turn(
        {
            "stream over HTTP": remote,
            "stream, cached": lambda: sum(len(batch.index) for batch in cached),
            "plain webdataset over HTTP": lambda: sum(
                1 for _ in webdataset.WebDataset(shards, shardshuffle=False).decode()
            ),
        },
        o.repeats,
    )
    settings = {
        "dataset": manifest.name,
        "unit": "episodes/s",
        "episodes": o.episodes,
        "shards": len(shards),
        "batch_size": o.batch_size,
        "torch": torch.__version__,
        "webdataset": webdataset.__version__,
    }
    over = ratio(results, "stream over HTTP", "plain webdataset over HTTP")
    report("remote", settings, {**results, "stream over webdataset": over})


if __name__ == "__main__":
    main()
