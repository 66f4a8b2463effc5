"""Write the table of benchmarks in benchmarks.md from their definition: python docs/benchmarks.py."""

from __future__ import annotations

from pathlib import Path

from mamldata.archive.benchmarks import Benchmark, benchmarks

PAGE = Path(__file__).with_name("benchmarks.md")
BEGIN, END = "<!-- written by docs/benchmarks.py -->\n\n", "\n<!-- end -->\n"


def _row(one: Benchmark) -> str:
    episodes = f"{one.n_way}-way {one.k_shot}-shot, {one.k_query} queries"
    counted = f"{one.episodes:,} of `{one.split}`"
    images = f"{one.image_size}x{one.image_size}, rotations `{one.rotations}`"
    data = f"`{one.dataset}`, `{one.split_scheme}`"
    pinned = f"`{one.sha256}`" if one.sha256 else "not pinned yet"
    return f"| `{one.name}` | {data} | {images} | {episodes} | {counted} | {one.seed} | {pinned} |"


def rewritten(page: str) -> str:
    """The page with today's table."""
    head, _, rest = page.partition(BEGIN)
    columns = ["name", "dataset, split scheme", "images", "episodes", "number", "seed", "archive's digest (SHA-256)"]
    rows = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *map(_row, benchmarks().values())]
    return head + BEGIN + "\n".join(rows) + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
