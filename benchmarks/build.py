"""Episodes built per second: drawn, gathered, framed and hashed in memory; and also written to disk."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from common import arguments, bank, in_turn, report

from mamldata.archive.build import build
from mamldata.archive.plan import BuildRequest, plan_archive
from mamldata.archive.write import shard_pieces
from mamldata.parallel import default_workers


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.set_defaults(repeats=3)
    parser.add_argument("--episodes", type=int, default=8000)
    parser.add_argument("--n-way", type=int, default=5)
    parser.add_argument("--k-shot", type=int, default=1)
    parser.add_argument("--k-query", type=int, default=15)
    options = parser.parse_args()
    manifest, images = bank(options)
    request = BuildRequest(options.n_way, options.k_shot, options.k_query, {"train": options.episodes})
    plan = plan_archive(manifest, images, request)

    def in_memory() -> int:
        for number in range(len(plan.splits["train"].shards)):
            digest = hashlib.sha256()
            for piece in shard_pieces(plan, "train", number, images.open_images()):
                digest.update(piece)
        return options.episodes

    def to_disk(workers: int) -> int:
        place = tempfile.mkdtemp()
        try:
            build(manifest, images, Path(place) / "archive", request, workers=workers)
        finally:
            shutil.rmtree(place)
        return options.episodes

    workers = default_workers()
    results = in_turn(
        {
            "one process, in memory": in_memory,
            "1 worker, to disk": lambda: to_disk(1),
            f"{workers} workers, to disk": lambda: to_disk(workers),
        },
        options.repeats,
    )
    report(
        "build",
        {
            "dataset": manifest.name,
            "unit": "episodes/s",
            "episodes": options.episodes,
            "n_way": options.n_way,
            "k_shot": options.k_shot,
            "k_query": options.k_query,
            "bytes_per_episode": plan.layout.stride,
        },
        results,
    )


if __name__ == "__main__":
    main()
