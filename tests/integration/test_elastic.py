"""Elastic determinism: meta-batch t holds the same episodes for any ranks and workers, from any source."""

from __future__ import annotations

import functools
import itertools
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mamldata import EpisodeStream, live
from mamldata.archive.build import build
from mamldata.archive.plan import BuildRequest

EPISODES, BATCH, EPOCHS = 26, 8, 3
PER_EPOCH = EPISODES // BATCH
RANKS = st.sampled_from([1, 2, 3, 4, 8])
# Live episodes have no ways to remix. Without a cache, there is no room for those of all shards at once.
KINDS = [
    (source, order)
    for source in ("local", "remote", "cached", "live")
    for order in ("shuffled", "remixed")
    if order == "shuffled" or source in ("local", "cached")
]

Parts = tuple[list[int], bytes, bytes]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format, *args) -> None:  # noqa: A002
        """Silent."""


@dataclass(frozen=True)
class Places:
    """Where the episodes are: a folder, its address, a cache, and the data root."""

    folder: Path
    url: str
    cache: Path
    root: Path

    def stream(self, source: str, order: str, rank: int = 0, world_size: int = 1) -> EpisodeStream:
        options: dict[str, Any] = {
            "rank": rank,
            "world_size": world_size,
            "dtype": torch.uint8,
            "remix": order == "remixed",
        }
        if source == "live":
            episodes = live("glyphs", n_way=3, k_shot=2, k_query=3, seed=9, episodes=EPISODES, root=self.root)
            return EpisodeStream(episodes, None, BATCH, 5, shuffle=True, **options)
        if source == "cached":
            options["cache_dir"] = self.cache
        return EpisodeStream(self.folder if source == "local" else self.url, None, BATCH, 5, **options)


@pytest.fixture(scope="module")
def places(tmp_path_factory, glyphs_manifest, glyphs_bank, glyphs_root) -> Iterator[Places]:
    place = tmp_path_factory.mktemp("elastic")
    request = BuildRequest(n_way=3, k_shot=2, k_query=3, episodes={"train": EPISODES}, seed=9, episodes_per_shard=7)
    build(glyphs_manifest, glyphs_bank, place / "archive", request)
    handler = functools.partial(Quiet, directory=str(place / "archive"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield Places(place / "archive", f"http://127.0.0.1:{server.server_address[1]}", place / "cache", glyphs_root)
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def expected(places) -> dict[tuple[str, str], list[Parts]]:
    """The meta-batches of one process, through all epochs, of each kind of stream."""
    found = {}
    for kind in KINDS:
        stream = places.stream(*kind)
        found[kind] = [kept for _ in range(EPOCHS) for kept in map(keep, stream)]
    return found


def keep(batch) -> Parts:
    return batch.index.tolist(), batch.support_x.numpy().tobytes(), batch.query_x.numpy().tobytes()


def joined(parts: list[Parts]) -> Parts:
    """What all ranks have of a meta-batch, one after the other."""
    indices, *images = zip(*parts, strict=True)
    support, query = map(b"".join, images)
    return list(itertools.chain(*indices)), support, query


def test_sources_agree(expected):
    """One order is the same from all sources that can have it, and has every episode's own images."""
    assert expected["local", "remixed"] == expected["cached", "remixed"]
    assert expected["local", "shuffled"] == expected["live", "shuffled"]
    assert expected["remote", "shuffled"] == expected["cached", "shuffled"]
    assert all(len(batches) == EPOCHS * PER_EPOCH for batches in expected.values())


@pytest.mark.slow
@settings(max_examples=40)
@given(kind=st.sampled_from(KINDS), before=RANKS, after=RANKS, at=st.integers(0, EPOCHS * PER_EPOCH - 1))
def test_ranks_change_nothing(places, expected, kind, before, after, at):
    """Some processes go up to any meta-batch, and others, more or fewer, from one's state on through all epochs."""
    found: list[Parts] = []
    earlier = [places.stream(*kind, rank, before) for rank in range(before)]
    for epoch in range(at // PER_EPOCH + 1):
        passes = [iter(stream) for stream in earlier]
        for _ in range(min(PER_EPOCH, at - epoch * PER_EPOCH)):
            found.append(joined([keep(next(one)) for one in passes]))
    states = {json.dumps(stream.state_dict()) for stream in earlier}
    assert len(states) == 1  # it is that of all of them
    later = [places.stream(*kind, rank, after) for rank in range(after)]
    for stream in later:
        stream.load_state_dict(json.loads(next(iter(states))))
    while len(found) < EPOCHS * PER_EPOCH:
        found += [joined([keep(part) for part in parts]) for parts in zip(*later, strict=True)]
    assert found == expected[kind]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_change_nothing(places, expected, kind, workers):
    """Worker processes give the same meta-batches in the same order, also of a rank among several, and resumed."""
    for rank, world_size in ((0, 1), (1, 3)):
        stream = places.stream(*kind, rank, world_size)
        next(iter(stream))  # what is open and under way here stays here
        stream.load_state_dict(stream.state_dict() | {"next_batch": PER_EPOCH + 1})
        loader = DataLoader(stream, batch_size=None, num_workers=workers, multiprocessing_context="fork")
        share = slice(BATCH * rank // world_size, BATCH * (rank + 1) // world_size)
        found = [batch.index.tolist() for batch in loader]
        assert found == [index[share] for index, _, _ in expected[kind][PER_EPOCH + 1 : 2 * PER_EPOCH]]


def test_mixture_with_an_address(places, expected, monkeypatch):
    """In a mixture a folder and an address each keep their order, and the shards of the address are fetched ahead."""
    stream = EpisodeStream([places.folder, places.url], None, BATCH, 5, dtype=torch.uint8)
    remote, asked = stream.source.parts[1], []
    fetch = remote.prefetch
    monkeypatch.setattr(remote, "prefetch", lambda upcoming: (asked.append(list(upcoming)), fetch(upcoming)))
    found = {0: [], 1: []}
    for batch in itertools.islice(stream, 12):
        number, own = stream.source.place(batch.index.numpy())
        found[number].append((own.tolist(), *keep(batch)[1:]))
    for number, kind in enumerate(("local", "remote")):
        assert len(found[number]) > 2
        assert found[number] == list(itertools.islice(itertools.cycle(expected[kind, "shuffled"]), len(found[number])))
    assert len(asked) == len(found[1])
    assert all(len(upcoming) > 1 for upcoming in asked)
