"""Several processes that share a cache with little room, some of them killed: all others read the true episodes."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from mamldata.fetching.http import Network
from mamldata.sources.remote import RemoteSource
from tests.storm import material
from tests.storm.harness import Broken, Campaign, Outcome
from tests.storm.kills import server


def _reader(seed: int, cache_dir: Path, bound: int, out: Path) -> None:
    """In a fork: read episodes in some order, again and again, and compare each with the true one."""
    chance = random.Random(seed)
    split = chance.choice(sorted(material.EPISODES))
    source = RemoteSource(
        f"{server()}/archive", split, cache_dir=cache_dir, cache_bytes=bound, network=Network(backoff=0)
    )
    info = source.info
    image = int(np.prod(info.image_shape))
    supports, queries = info.n_way * info.k_shot * image, info.n_way * info.k_query * image
    truth = material.true_episodes(split)
    for _ in range(30):
        index = chance.randrange(source.episodes)
        support, query = np.empty(supports, np.uint8), np.empty(queries, np.uint8)
        source.read(np.array([index]), support, query)
        start = source.episodes * supports + index * queries
        right = truth[index * supports : (index + 1) * supports] + truth[start : start + queries]
        if support.tobytes() + query.tobytes() != right:
            out.write_text(f"episode {index} of {split} is another one")
            return
        time.sleep(chance.choice((0, 0, 0.001)))
    out.write_text("well")


def shared_cache(chance: random.Random, place: Path) -> Outcome:
    """Every process that nobody kills reads the true episodes, and the cache ends within its bound."""
    server()
    for split in material.EPISODES:
        material.true_episodes(split)
    largest = max(shard.bytes for shard in material.archive_of().shards())
    bound = largest * chance.choice((2, 2, 3, 5))
    readers: dict[int, Path] = {}
    for number in range(chance.randint(2, 4)):
        out, seed = place / f"reader-{number}", chance.randrange(1 << 30)
        child = os.fork()
        if child == 0:
            try:
                _reader(seed, place / "cache", bound, out)
            except BaseException as error:  # told to the parent, whatever it is
                out.write_text(repr(error))
            os._exit(0)
        readers[child] = out
    killed = set()
    for child in readers:
        if chance.random() < 0.3:
            time.sleep(chance.uniform(0, 0.2))
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            killed.add(child)
    for child, out in readers.items():
        os.waitpid(child, 0)
        told = out.read_text() if out.exists() else "nothing"
        if told != "well" and child not in killed:
            raise Broken(f"a reader ended with: {told}")
    # One more reader alone, which evicts what the killed ones left.
    _reader(chance.randrange(1 << 30), place / "cache", bound, place / "last")
    if (told := (place / "last").read_text()) != "well":
        raise Broken(f"the last reader ended with: {told}")
    size = sum(path.stat().st_size for path in (place / "cache" / "mamldata-shards").glob("*.tar*"))
    if size > bound:
        raise Broken(f"the cache has {size:,} bytes, of {bound:,} allowed")
    return "same"


CAMPAIGNS = (
    Campaign(
        "shared-cache",
        "two to four processes share a cache with room for two to five shards; some are killed",
        500,
        shared_cache,
    ),
)
