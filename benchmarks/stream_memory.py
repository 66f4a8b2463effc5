"""Peak memory of a process that streams one epoch, without the pages of mapped files.

The system drops those pages when it needs the memory. The figures are the highest ``RssAnon`` of ``/proc/self/status``,
read every two milliseconds, and its value before the stream is made, which is mostly torch's own.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from common import arguments, bank, report
from server import serving

from mamldata.archive.build import build
from mamldata.archive.plan import BuildRequest
from mamldata.parallel import default_workers
from mamldata.streaming.stream import EpisodeStream


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.set_defaults(repeats=1)
    parser.add_argument("--episodes", type=int, default=100_000, help="the default of 100,000 takes 6.6 GB of disk")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--place", help="where to build the archive (default: the system's temporary folder)")
    parser.add_argument("--one", nargs=3, metavar=("KIND", "SOURCE", "CACHE"), help="measure in this process")
    options = parser.parse_args()
    if options.one:
        print(*measure(*options.one, options.batch_size))
        return
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        run(options, Path(place))


def run(o: argparse.Namespace, place: Path) -> None:
    """Build an archive, and stream it in a separate process for each kind."""
    manifest, images = bank(o)
    request = BuildRequest(5, 1, 15, {"train": o.episodes})
    archive = build(manifest, images, place / "archive", request, workers=default_workers())
    results: dict[str, Any] = {}
    with serving(place / "archive") as (url, _):
        for kind in KINDS:
            source = str(place / "archive") if kind.startswith("folder") else url
            command = [sys.executable, __file__, "--batch-size", str(o.batch_size)]
            command += ["--one", kind, source, str(place / "cache")]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            before, peak, mapped = map(float, done.stdout.split())
            results[kind] = {"peak": peak, "of it before the stream is made": before, "mapped pages at the end": mapped}
    settings = {
        "dataset": manifest.name,
        "unit": "MiB",
        "episodes": o.episodes,
        "bytes": sum(shard.bytes for shard in archive.splits["train"].shards),
        "shards": len(archive.splits["train"].shards),
        "batch_size": o.batch_size,
        "dtype": "uint8",
        "torch": torch.__version__,
    }
    report("stream memory", settings, results)


KINDS: dict[str, dict[str, Any]] = {
    "folder": {},
    "folder, remixed": {"remix": True},
    "address": {},
    "address, cache of 256 MiB": {"cache_bytes": 1 << 28},
}


def measure(kind: str, source: str, cache: str, batch_size: int) -> tuple[float, float, float]:
    """Memory before the stream is made, its peak in one epoch, and the mapped pages at the end, in MiB."""
    torch.set_num_threads(1)
    before = peak = in_use("RssAnon")
    end = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not end.wait(0.002):
            peak = max(peak, in_use("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    options = dict(KINDS[kind])
    if "cache_bytes" in options:
        options["cache_dir"] = cache
    stream = EpisodeStream(source, batch_size=batch_size, dtype=torch.uint8, **options)
    for _ in stream.to("cpu"):
        pass
    end.set()
    watcher.join()
    return before, peak, in_use("RssFile")


def in_use(field: str) -> float:
    """A field of the process's status, in MiB."""
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise SystemExit("This benchmark reads Linux's /proc/self/status.")
    return int(found[1]) / 1024


if __name__ == "__main__":
    main()
