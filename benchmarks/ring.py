"""How long a consumer with the pace of training waits for its meta-batches.

The consumer computes for the time of a step (or sleeps, as if waiting for a GPU), takes the next meta-batch, and so on.
The figure is the share of the total time that it waits, after the first meta-batch. Images are float32, as networks
take them, from a folder, from the address of a server in another process (see ``server.py``), whose shards arrive
during use, and from a cache that has them all.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import arguments, bank, report
from server import serving

from mamldata.archive.build import build
from mamldata.archive.plan import BuildRequest
from mamldata.parallel import default_workers
from mamldata.streaming.stream import EpisodeStream

STEPS = (0.05, 0.005)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.set_defaults(repeats=3)
    parser.add_argument("--episodes", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--most-batches", type=int, default=120, help="upper bound in one run (default: 120)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run(options, Path(place))


def run(o: argparse.Namespace, place: Path) -> None:
    """Build an archive, serve it, and let a consumer work on it."""
    manifest, images = bank(o)
    request = BuildRequest(5, 1, 15, {"train": o.episodes})
    build(manifest, images, place / "archive", request, workers=default_workers())
    torch.set_num_threads(1)
    with serving(place / "archive") as (url, server):

        def stream(source: object, **options: Any) -> EpisodeStream:
            return EpisodeStream(source, batch_size=o.batch_size, **options)

        sources: dict[str, Callable[[], EpisodeStream]] = {
            "folder": lambda: stream(place / "archive"),
            "folder, remixed": lambda: stream(place / "archive", remix=True),
            "address": lambda: stream(url),
            "address, all in the cache": lambda: stream(url, cache_dir=place / "cache"),
        }
        for _ in sources["address, all in the cache"]():
            pass
        results: dict[str, Any] = {}
        for step in STEPS:
            for kind, work in (("computing", compute), ("asleep", time.sleep)):
                shares: dict[str, list[float]] = {name: [] for name in sources}
                for _ in range(o.repeats):
                    for name, make in sources.items():
                        shares[name].append(waiting(make(), step, work, o.most_batches))
                results[f"steps of {step * 1000:g} ms, {kind}"] = {
                    name: {"median": statistics.median(values), "highest": max(values)}
                    for name, values in shares.items()
                }
    settings = {
        "dataset": manifest.name,
        "unit": "share of the time that the consumer waits",
        "episodes": o.episodes,
        "batch_size": o.batch_size,
        "dtype": "float32",
        "server": server,
        "torch": torch.__version__,
    }
    report("ring", settings, results)


def waiting(stream: EpisodeStream, step: float, work: Callable[[float], object], most: int) -> float:
    """The share of the time that a consumer waits, from its first meta-batch on."""
    passing = iter(stream.to("cpu"))
    next(passing)
    start = time.perf_counter()
    waited = 0.0
    for _ in range(min(most, len(stream)) - 1):
        work(step)
        before = time.perf_counter()
        next(passing)
        waited += time.perf_counter() - before
    share = waited / (time.perf_counter() - start)
    passing.close()
    return share


_MATRIX = torch.ones(128, 128)


def compute(seconds: float) -> None:
    """Work for ``seconds`` as a network does: in torch, which lets other threads run meanwhile."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(_MATRIX, _MATRIX)


if __name__ == "__main__":
    main()
