"""Episodes per second from an archive over loopback HTTP, against plain webdataset over the same server.

The server is nginx (or a process that only calls sendfile), so that neither reader waits for it. Each candidate is one
process that reads all shards once, timed from its start to its last episode. Nothing is kept from one pass to the next,
except by the candidate whose shards are all in its cache. Plain webdataset reads an address through its own opener
(curl in a pipe) and hashes nothing. The stream shuffles, and hashes every byte before it gives an episode. ``curl`` to
nowhere is this machine's upper bound for downloads. Processor time is that of the reading process and its children,
including curl but not the server; on a machine with other work it says more than the rates.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import webdataset
from common import arguments, bank, in_turn, ratio, report
from server import serving

from mamldata.archive.build import build
from mamldata.archive.plan import BuildRequest
from mamldata.parallel import default_workers
from mamldata.streaming.stream import EpisodeStream


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--episodes", type=int, default=6000)
    parser.add_argument("--episodes-per-shard", type=int, help="(default: as many as fit into 64 MiB)")
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run(options, Path(place))


def run(o: argparse.Namespace, place: Path) -> None:
    """Build an archive, serve it, and time all readers."""
    manifest, images = bank(o)
    request = BuildRequest(5, 1, 15, {"train": o.episodes}, episodes_per_shard=o.episodes_per_shard)
    archive = build(manifest, images, place / "archive", request, workers=default_workers())
    with serving(place / "archive") as (url, server):
        shards = [f"{url}/{shard.file}" for shard in archive.splits["train"].shards]
        cached = EpisodeStream(url, batch_size=o.batch_size, dtype=torch.uint8, cache_dir=place / "cache")

        def remote(**options) -> int:
            fresh = EpisodeStream(url, batch_size=o.batch_size, dtype=torch.uint8, **options)
            return sum(len(batch.index) for batch in fresh.to("cpu"))

        def into_a_cache() -> int:
            try:
                return remote(cache_dir=place / "fresh")
            finally:
                shutil.rmtree(place / "fresh")

        def plain_webdataset() -> int:
            return sum(1 for _ in webdataset.WebDataset(shards, shardshuffle=False).decode())

        def curl() -> int:
            subprocess.run(
                ["curl", "-sSf", *(word for shard in shards for word in ("-o", "/dev/null", shard))], check=True
            )
            return o.episodes

        spent: dict[str, list[float]] = {}

        def timed(name: str, work: Callable[[], int]) -> Callable[[], int]:
            def run() -> int:
                before = _processor_time()
                done = work()
                spent.setdefault(name, []).append((_processor_time() - before) / done * 1e6)
                return done

            return run

        candidates: dict[str, Callable[[], int]] = {
            "curl to nowhere": curl,
            "stream over HTTP": remote,
            "stream over HTTP, kept in a cache": into_a_cache,
            "stream, cached": lambda: sum(len(batch.index) for batch in cached),
            "plain webdataset over HTTP": plain_webdataset,
        }
        results = in_turn({name: timed(name, work) for name, work in candidates.items()}, o.repeats)
    for name, values in spent.items():
        results[name]["processor time, microseconds an episode"] = statistics.median(values[1:])
    settings = {
        "dataset": manifest.name,
        "unit": "episodes/s",
        "episodes": o.episodes,
        "shards": len(shards),
        "bytes_per_episode": archive.layout.stride,
        "batch_size": o.batch_size,
        "server": server,
        "torch": torch.__version__,
        "webdataset": webdataset.__version__,
    }
    one, other = (results[name] for name in ("plain webdataset over HTTP", "stream over HTTP"))
    measure = "processor time, microseconds an episode"
    quotients = {
        "webdataset's processor time over the stream's": one[measure] / other[measure],
        "stream over webdataset": ratio(results, "stream over HTTP", "plain webdataset over HTTP"),
        "stream over curl": ratio(results, "stream over HTTP", "curl to nowhere"),
    }
    report("remote", settings, {**results, **quotients})


def _processor_time() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    main()
