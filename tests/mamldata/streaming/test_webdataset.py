"""Meta-batches through webdataset's pipelines: equal to those of a stream, and errors for what is no episode."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mamldata
from mamldata import EpisodeStream, decode_episodes
from mamldata.archive.build import build
from mamldata.archive.plan import BuildRequest
from mamldata.errors import DamagedError, RequestError

wds = pytest.importorskip("webdataset")
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves shards open
REQUEST = BuildRequest(n_way=3, k_shot=2, k_query=4, episodes={"train": 9}, seed=9, episodes_per_shard=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, glyphs_manifest, glyphs_bank) -> Path:
    """A small archive of two shards, which tests only read."""
    out = tmp_path_factory.mktemp("webdataset") / "archive"
    build(glyphs_manifest, glyphs_bank, out, REQUEST)
    return out


def same(one, other) -> bool:
    one, other = list(one), list(other)
    return len(one) == len(other) and all(
        a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
        for first, second in zip(one, other, strict=True)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize(
    ("dtype", "normalized"),
    [
        (torch.uint8, False),
        *((dtype, on) for dtype in (torch.bfloat16, torch.float32) for on in (False, True)),
    ],
)
def test_the_batches_of_a_stream(folder, dtype, normalized):
    """In the shards' order: values, dtypes, memory order, labels and indices; the last one has fewer episodes."""
    normalize = mamldata.read_archive(folder).normalization if normalized else None
    shards = wds.WebDataset(str(folder / "train-{00000..00001}.tar"), shardshuffle=False)
    batches = list(shards.compose(decode_episodes(4, dtype=dtype, normalize=normalize)))
    assert [len(batch.index) for batch in batches] == [4, 4, 1]
    assert all(type(batch) is mamldata.EpisodeBatch for batch in batches)
    expected = EpisodeStream(folder, batch_size=4, shuffle=False, dtype=dtype, normalize=normalized)
    assert same(batches, expected)
    assert same(batches[:2], shards.compose(decode_episodes(4, dtype=dtype, normalize=normalize, drop_last=True)))


def test_in_a_web_loader(folder):
    """Webdataset's loader passes meta-batches through as they are."""
    shards = wds.WebDataset(str(folder / "train-{00000..00001}.tar"), shardshuffle=False).compose(decode_episodes(4))
    assert same(wds.WebLoader(shards, batch_size=None), EpisodeStream(folder, batch_size=4, shuffle=False))


@pytest.mark.slow
def test_in_workers(folder):
    """Two workers with a shard each give batches of episodes of one shard, and every episode once."""
    shards = wds.WebDataset(str(folder / "train-{00000..00001}.tar"), shardshuffle=False).compose(decode_episodes(4))
    batches = list(wds.WebLoader(shards, batch_size=None, num_workers=2))
    assert sorted(batch.index.tolist() for batch in batches) == [[0, 1, 2, 3], [4], [5, 6, 7, 8]]


def test_it_can_be_sent_to_another_process():
    """The stage is pickled, for workers that are spawned."""
    assert pickle.loads(pickle.dumps(decode_episodes(3))) == decode_episodes(3)


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


GOOD = npy(np.zeros((2, 1, 4, 4, 1), np.uint8))
HUGE = GOOD.replace(b"(2, 1, 4, 4, 1)", b"(2, 1, 4, 9, 9)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query.npy": None}, "it has no query.npy, or not its bytes"),
        ({"support.npy": np.zeros(3)}, "it has no support.npy, or not its bytes"),
        ({"support.npy": b"PNG"}, "its support.npy is no array"),
        ({"support.npy": npy(np.zeros((2, 1, 4, 4), np.uint8))}, "not the images of an episode"),
        ({"support.npy": npy(np.zeros((2, 1, 4, 4, 1)))}, "256 bytes of float64"),
        ({"support.npy": HUGE}, r"32 bytes of uint8 \[2, 1, 4, 9, 9\], not the images of an episode"),
        ({"support.npy": GOOD[:-1]}, "31 bytes of uint8"),
        (
            {"support.npy": npy(np.zeros((2, 2, 4, 4, 1), np.uint8))},
            r"its support.npy is \[2, 2, 4, 4, 1\], not \[2, 1",
        ),
        ({"__key__": "cat"}, "its key is no number"),
    ],
)
def test_what_is_no_episode(change, message):
    """The error names the shard, the sample and what is wrong."""
    good = {"__key__": "00000000", "__url__": "train-00000.tar", "support.npy": GOOD, "query.npy": GOOD}
    bad = {**good, "__key__": "00000001", **change}
    with pytest.raises(DamagedError, match=message) as caught:
        list(decode_episodes(2)([good, bad]))
    assert f"train-00000.tar, sample {bad['__key__']}: " in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"dtype": torch.int32}, "dtype must be torch.uint8 or a floating"),
        ({"dtype": torch.uint8, "normalize": 1}, "Normalized images cannot be uint8"),
    ],
)
def test_arguments(options, message):
    """Invalid ones are refused at once."""
    with pytest.raises(RequestError, match=message):
        decode_episodes(**options)
