"""Verify a thin archive and draw its episodes with nothing but the standard library and NumPy (see docs/format.md).

    python examples/read_thin.py ARCHIVE [SPLIT [FIRST [COUNT]]]

Prints the archive's digest, then for each episode (the first three of each split if you name none) its classes as
name@quarter-turns:queries, and the SHA-256 of its support images and of its query images.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Way = tuple[str, int, list[int], list[int]]  # a class's name and quarter turns; its support rows and query rows


def verify(folder: Path) -> tuple[str, dict[str, Any]]:
    """Check archive.json, each shard and the whole bank; return the archive's digest and what archive.json holds."""
    digest = hashlib.sha256((folder / "archive.json").read_bytes()).hexdigest()
    require((folder / "archive.json.sha256").read_text() == f"{digest}  archive.json\n", "archive.json is damaged")
    archive = json.loads((folder / "archive.json").read_bytes())
    require(archive["format"] == "mamldata-thin/1", f"the format is {archive['format']!r}, not 'mamldata-thin/1'")
    shape = (sum(shard["rows"] for shard in archive["images"]), *archive["image_shape"])
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(10 + len(header) + 1) % 128) + b"\n"
    bank = hashlib.sha256(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    for shard in archive["images"]:
        with (folder / shard["file"]).open("rb") as file:
            require(hashlib.file_digest(file, "sha256").hexdigest() == shard["sha256"], f"{shard['file']} is damaged")
        bank.update(np.load(folder / shard["file"], mmap_mode="r").reshape(-1))
    require(bank.hexdigest() == archive["bank_sha256"], "the images are not those of the bank")
    return digest, archive


def require(condition: bool, otherwise: str) -> None:
    """Raise an error unless the condition holds."""
    if not condition:
        raise ValueError(otherwise)


def draw_episode(archive: dict[str, Any], split: str, index: int) -> list[Way]:
    """Draw an episode: its classes, and the rows of their images."""
    classes, episodes = archive["splits"][split]["classes"], archive["splits"][split]["episodes"]
    require(0 <= index < episodes, f"{split} has no episode {index}")
    n_way, k_shot, k_query, alpha = (archive[name] for name in ("n_way", "k_shot", "k_query", "query_alpha"))
    turns = 4 if archive["rotations"] in ("all", split) else 1  # "all", "train" or "none"
    settings = {name: archive[name] for name in ("bank_sha256", "split_scheme", "n_way", "k_shot", "k_query", "seed")}
    settings |= {"split": split, "quarter_turns": turns} | ({} if alpha is None else {"query_alpha": alpha})
    text = json.dumps(settings, sort_keys=True, separators=(",", ":")) + "\n"
    key = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], "<u8").astype(np.uint64)
    # Numbers for the classes, then for the shares, then for the images of each way.
    cuts, images = (0, k_shot + k_query) if alpha is None else (n_way * alpha - 1, k_shot + n_way * k_query)
    count = n_way + cuts + n_way * images
    numbers = np.random.Philox(key=key, counter=index * -(-count // 4)).random_raw(count).tolist()
    drawn = [(classes[c // turns], c % turns) for c in draw(numbers[:n_way], len(classes) * turns)]
    queries, ways = [k_query] * n_way, []
    if alpha is not None:
        room = [entry["images"] - k_shot for entry, _ in drawn]
        queries = share(numbers[n_way : n_way + cuts], alpha, n_way * k_query, room)
    for way, (entry, turn) in enumerate(drawn):
        own = numbers[n_way + cuts + way * images :][: k_shot + queries[way]]
        rows = [entry["first_row"] + image for image in draw(own, entry["images"])]
        ways.append((entry["name"], turn, rows[:k_shot], rows[k_shot:]))
    return ways


def draw(numbers: list[int], n: int) -> list[int]:
    """Draw as many of 0 … n - 1 as there are numbers, without replacement."""
    things = list(range(n))
    for j, number in enumerate(numbers):
        p = j + number % (n - j)
        things[j], things[p] = things[p], things[j]
    return things[: len(numbers)]


def share(numbers: list[int], alpha: int, total: int, room: list[int]) -> list[int]:
    """Share out an episode's queries among its ways, of which each has room for so many."""
    cuts = sorted(number >> 32 for number in numbers)[alpha - 1 :: alpha]
    edges = [0, *((cut * total + 2**31) >> 32 for cut in cuts), total]
    queries = [min(edges[way + 1] - edges[way], room[way]) for way in range(len(room))]
    for way in sorted(range(len(room)), key=lambda way: room[way] - queries[way]):  # what is left over
        queries[way] += min(total - sum(queries), room[way] - queries[way])
    return queries


def episode(folder: Path, split: str, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64]]:
    """The support images [n_way, k_shot, H, W, C], the query images [n_way * k_query, H, W, C] and their labels."""
    archive = json.loads((folder / "archive.json").read_bytes())
    shards = [np.load(folder / shard["file"], mmap_mode="r") for shard in archive["images"]]
    size = len(shards[0])  # the last shard may have fewer rows

    def read(rows: list[int], turns: int) -> NDArray[np.uint8]:
        images = np.array([shards[row // size][row % size] for row in rows], np.uint8)
        return np.rot90(images.reshape(-1, *archive["image_shape"]), turns, axes=(1, 2))

    ways = draw_episode(archive, split, index)
    support = np.stack([read(rows, turns) for _, turns, rows, _ in ways])
    query = np.concatenate([read(rows, turns) for _, turns, _, rows in ways])
    return support, query, np.repeat(np.arange(len(ways), dtype=np.int64), [len(way[3]) for way in ways])


def main(folder: Path, splits: list[str], first: int = 0, count: int = 3) -> None:
    """Verify the archive and print the digests of some episodes."""
    digest, archive = verify(folder)
    print("archive", digest)
    for split in splits or archive["splits"]:
        for index in range(first, min(first + count, archive["splits"][split]["episodes"])):
            classes = [f"{way[0]}@{way[1]}:{len(way[3])}" for way in draw_episode(archive, split, index)]
            digests = [hashlib.sha256(images.tobytes()).hexdigest() for images in episode(folder, split, index)[:2]]
            print(split, index, *classes, *digests)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2:3], *map(int, sys.argv[3:5]))
    except ValueError as error:
        sys.exit(str(error))
