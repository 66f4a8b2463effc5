"""What transforms cost: streams with transforms that change nothing, beside the same stream without one.

``fixed`` is called once for each half of a meta-batch, ``batched`` once for each half of an episode, after the random
generators are seeded, and ``each`` once for each image.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from common import arguments, bank, in_turn, ratio, report

import mamldata
from mamldata.archive.build import build
from mamldata.archive.plan import BuildRequest
from mamldata.parallel import default_workers


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run(options, Path(place) / "archive")


def run(o: argparse.Namespace, place: Path) -> None:
    """Build an archive, and read it with each transform."""
    manifest, images = bank(o)
    build(manifest, images, place, BuildRequest(5, 1, 15, {"train": o.episodes}), workers=default_workers())
    torch.set_num_threads(1)
    transforms = {
        "none": None,
        "fixed": mamldata.batched(same, random=False),
        "batched": mamldata.batched(same),
        "each": same,
    }
    candidates: dict[str, Callable[[], int]] = {}
    for way in ("plain", "read ahead"):
        for name, transform in transforms.items():
            stream = mamldata.EpisodeStream(place, batch_size=o.batch_size, transform=transform)
            candidates[f"{way}, {name}"] = reading(stream if way == "plain" else stream.to("cpu"))
    results = in_turn(candidates, o.repeats)
    ratios = {name: round(ratio(results, name, f"{name.partition(',')[0]}, none"), 3) for name in candidates}
    settings = {
        "dataset": manifest.name,
        "unit": "episodes per second",
        "episodes": o.episodes,
        "torch": torch.__version__,
    }
    report("transforms", settings, {**results, "of the speed without a transform": ratios})


def same(images: torch.Tensor) -> torch.Tensor:
    """Change nothing."""
    return images


def reading(stream: Iterable[mamldata.EpisodeBatch]) -> Callable[[], int]:
    """A function that reads an epoch and returns the number of its episodes."""
    return lambda: sum(len(batch.index) for batch in stream)


if __name__ == "__main__":
    main()
