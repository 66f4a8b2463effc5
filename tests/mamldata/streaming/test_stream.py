"""Streams: the archive's own episodes in a known order, resumable anywhere, on any device, nothing left behind."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mamldata import EpisodeStream, live
from mamldata.archive.build import build
from mamldata.archive.index import read_archive
from mamldata.archive.plan import BuildRequest
from mamldata.archive.shard import open_shard
from mamldata.bank.make import make_bank
from mamldata.errors import DamagedError, RequestError
from mamldata.sampling.normalization import Normalization
from mamldata.sources import stored
from mamldata.sources.stored import ArchiveSource
from mamldata.streaming.device import _copy_stream

N_WAY, K_SHOT, K_QUERY = 3, 2, 4
REQUEST = BuildRequest(
    n_way=N_WAY,
    k_shot=K_SHOT,
    k_query=K_QUERY,
    episodes={"train": 23, "val": 7, "test": 10},
    seed=9,
    episodes_per_shard=5,
)
BATCH = 4
EPOCH = 23 // BATCH
FORK = "fork"
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, glyphs_manifest, glyphs_bank) -> Path:
    """A small archive; not to be written to."""
    out = tmp_path_factory.mktemp("stream") / "archive"
    build(glyphs_manifest, glyphs_bank, out, REQUEST)
    return out


@pytest.fixture
def own(folder, tmp_path) -> Path:
    """A copy of the archive, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


@pytest.fixture(autouse=True)
def _no_thread_left():
    """Whatever a test does with a stream, no thread of ours outlives it."""
    yield
    gc.collect()
    assert not reading_threads()


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mamldata")]


def stored_episodes(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All support and query images of a split, read with the archive's views."""
    archive = read_archive(folder)
    support, query = [], []
    for shard in archive.split(split).shards:
        mapped = open_shard(folder / shard.file, shard, archive.layout)
        support += [*archive.layout.view(mapped, archive.layout.support)]
        query += [*archive.layout.view(mapped, archive.layout.query)]
    return np.array(support), np.array(query)


def as_images(stored: np.ndarray) -> torch.Tensor:
    """``[B, n_way, k, H, W, C]`` as a stream gives it: ``[B, n_way * k, C, H, W]``."""
    episodes, _, _, *image = stored.shape
    return torch.from_numpy(stored.reshape(episodes, -1, *image).transpose(0, 1, 4, 2, 3).copy())


def kept(batches) -> list[tuple[torch.Tensor, ...]]:
    """Copies of meta-batches on the CPU."""
    return [tuple(tensor.cpu().clone() for tensor in batch) for batch in batches]


def same(one, other) -> bool:
    one, other = list(one), list(other)
    return len(one) == len(other) and all(
        a.dtype == b.dtype and torch.equal(a, b)
        for first, second in zip(one, other, strict=True)
        for a, b in zip(first, second, strict=True)
    )


def order_of(batches) -> list[list[int]]:
    return [batch.index.tolist() for batch in batches]


class TestBatches:
    @pytest.mark.parametrize(
        "dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
    )
    def test_shapes_dtypes_and_order_in_memory(self, folder, dtype):
        """Everything is as the documentation of EpisodeBatch says."""
        batch = next(iter(EpisodeStream(folder, batch_size=BATCH, dtype=dtype)))
        for images, k in ((batch.support_x, K_SHOT), (batch.query_x, K_QUERY)):
            assert images.shape == (BATCH, N_WAY * k, 1, 28, 28)
            assert images.dtype == dtype
            assert images.stride()[-3:] == (1, 28, 1)
            assert images.permute(0, 1, 3, 4, 2).is_contiguous()
            assert images.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
            assert images.min() >= 0
            assert images.max() == (255 if dtype == torch.uint8 else 1)
        for labels, k in ((batch.support_y, K_SHOT), (batch.query_y, K_QUERY)):
            assert labels.dtype == torch.int64
            assert labels.tolist() == [[way for way in range(N_WAY) for _ in range(k)]] * BATCH
        assert batch.index.dtype == torch.int64
        assert batch.index.shape == (BATCH,)

    @pytest.mark.parametrize("split", ["train", "val", "test"])
    def test_bytes_are_the_archives(self, folder, split):
        """As uint8, every meta-batch is the stored episodes that its index names."""
        support, query = map(as_images, stored_episodes(folder, split))
        seen = 0
        for batch in EpisodeStream(folder, split, batch_size=BATCH, dtype=torch.uint8):
            assert torch.equal(batch.support_x, support[batch.index])
            assert torch.equal(batch.query_x, query[batch.index])
            seen += len(batch.index)
        assert seen == {"train": 20, "val": 7, "test": 10}[split]

    @pytest.mark.parametrize(
        ("dtype", "tolerance"),
        [(torch.float16, 2**-11), (torch.bfloat16, 2**-8), (torch.float32, 2**-23), (torch.float64, 2**-23)],
        ids=str,
    )
    def test_scaling_divides_by_255(self, folder, dtype, tolerance):
        """Floating images are the stored bytes over 255, within the dtype's rounding, and on the device alike."""
        stored = kept(EpisodeStream(folder, "test", BATCH, dtype=torch.uint8))
        scaled = kept(EpisodeStream(folder, "test", BATCH, dtype=dtype))
        for (support, _, query, *_), (support_x, _, query_x, *_) in zip(stored, scaled, strict=True):
            for images, images_x in ((support, support_x), (query, query_x)):
                assert ((images.double() / 255 - images_x.double()).abs() <= tolerance).all()
        assert same(scaled, EpisodeStream(folder, "test", BATCH, dtype=dtype).to("cpu"))

    @pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
    def test_torchs_default_dtype_changes_nothing(self, folder, default):
        """No global setting reaches the pixels."""
        expected = kept(EpisodeStream(folder, "val", BATCH))
        torch.set_default_dtype(default)
        try:
            found = kept(EpisodeStream(folder, "val", BATCH))
            reader = EpisodeStream(folder, "val", BATCH)
            next(iter(reader))
            finished = reader._reader.finish(reader._reader.read_stored(0))
        finally:
            torch.set_default_dtype(torch.float32)
        assert same(found, expected)
        assert same([finished], expected[:1])

    def test_the_reference_road_and_the_devices_scale_alike(self, folder):
        """What a device computes after the copy equals what the CPU writes into its buffers, to the bit."""
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            stream = EpisodeStream(folder, "test", BATCH, dtype=dtype)
            batches = kept(stream)
            reader = stream._reader
            assert same([reader.finish(reader.read_stored(t)) for t in range(3)], batches)

    def test_the_last_meta_batch_of_a_plain_pass_is_smaller(self, folder):
        """Ten test episodes by four: 4, 4, 2, in order, none dropped and none twice."""
        batches = kept(EpisodeStream(folder, "test", BATCH))
        assert [batch[4].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert [tensor.shape[0] for tensor in batches[-1]] == [2] * 5

    @pytest.mark.parametrize("is_live", [False, True])
    @pytest.mark.parametrize("device", [None, "cpu"])
    def test_the_part_of_a_rank_can_be_empty_at_the_end(self, folder, glyphs_root, is_live, device):
        """Of a last meta-batch of one episode some ranks get nothing, and all together every episode once."""
        source = (
            live("glyphs", "val", root=glyphs_root, episodes=5) if is_live else ArchiveSource(folder, "val", episodes=5)
        )
        seen, sizes = [], []
        for rank in range(4):
            part = EpisodeStream(source, batch_size=4, shuffle=False, rank=rank, world_size=4)
            for batch in part.to(device) if device else part:
                seen += batch.index.tolist()
                sizes.append(len(batch.query_y))
        assert sorted(seen) == list(range(5))
        assert sorted(sizes) == [0, 0, 0, 1, 1, 1, 1, 1]

    def test_live_episodes_are_those_of_an_archive(self, folder, glyphs_root):
        """The same seed and index give the same episode from a bank and from an archive."""
        for split in ("train", "val", "test"):
            source = live(
                "glyphs", split, n_way=N_WAY, k_shot=K_SHOT, k_query=K_QUERY, seed=9, episodes=7, root=glyphs_root
            )
            drawn = kept(EpisodeStream(source, batch_size=1, shuffle=False))
            stored = kept(itertools.islice(EpisodeStream(folder, split, batch_size=1, shuffle=False), 7))
            assert same(drawn, stored)
            archive = ArchiveSource(folder, split)
            assert [source.class_labels(i) for i in range(7)] == [archive.class_labels(i) for i in range(7)]
            some = np.array([5, 0, 6, 6])
            assert source.classes(some).tolist() == archive.classes(some).tolist()
            names = [[source.table.label(way) for way in row] for row in source.classes(some).tolist()]
            assert names == [archive.class_labels(i) for i in some.tolist()]

    def test_live_episodes_in_any_order(self, folder, glyphs_root):
        """A shuffled live stream gives what the shuffled archive gives."""
        source = live("glyphs", n_way=N_WAY, k_shot=K_SHOT, k_query=K_QUERY, seed=9, episodes=23, root=glyphs_root)
        assert same(
            kept(EpisodeStream(source, batch_size=BATCH, seed=1, shuffle=True)), EpisodeStream(folder, None, BATCH, 1)
        )


class TestNormalised:
    @pytest.fixture
    def colours(self, tmp_path, make_dataset) -> Path:
        """An archive of RGB images, whose channels differ."""
        tiny = make_dataset(sizes={f"{c}/{d}": 9 for c in "abcd" for d in "xyz"}, channels=3)
        return self.built(tiny, tmp_path / "colours")

    @staticmethod
    def built(tiny, out: Path) -> Path:
        episodes = {"train": 12, "val": 5, "test": 5}
        build(tiny.manifest, make_bank(tiny.manifest, tiny.root), out, BuildRequest(3, 2, 4, episodes))
        return out

    @pytest.mark.parametrize("split", ["train", "test"])
    @pytest.mark.parametrize("device", [None, "cpu"])
    def test_by_the_train_splits_mean_and_deviation(self, colours, split, device):
        """As torchvision's Normalize does it, for every split, on both roads."""
        plain = EpisodeStream(colours, split, BATCH, shuffle=False)
        stream = EpisodeStream(colours, split, BATCH, shuffle=False, normalize=True)
        mean, std = (torch.tensor(values)[:, None, None] for values in stream.info.normalization)
        for expected, batch in zip(plain, stream.to(device) if device else stream, strict=True):
            for part in ("support_x", "query_x"):
                wanted = (getattr(expected, part) - mean) / std
                torch.testing.assert_close(getattr(batch, part), wanted, atol=2e-6, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
    def test_the_reference_road_and_the_devices_agree(self, colours, dtype):
        """To the bit."""
        stream = EpisodeStream(colours, "test", BATCH, normalize=True, dtype=dtype)
        reader = stream.reader(torch.device("cpu"))
        one = [part.clone() for part in reader.read(0)[:4]]
        other = reader.finish(reader.read_stored(0))
        assert all(map(torch.equal, one, other[:4]))

    def test_live_episodes_alike(self, tmp_path, make_dataset):
        """The same figures from a bank as from an archive of it."""
        tiny = make_dataset(name="other", sizes={f"{c}/{d}": 9 for c in "abcd" for d in "xyz"}, channels=3)
        archive = read_archive(self.built(tiny, tmp_path / "archive"))
        source = live(str(tiny.manifest_path), "val", n_way=3, k_shot=2, k_query=4, root=tiny.root)
        assert source.info.normalization == archive.normalization
        assert all(0 < value < 1 for values in archive.normalization for value in values)

    def test_by_given_numbers(self, colours):
        """In place of the train split's own; it takes one for each channel, and nothing is divided by 0."""
        given = Normalization((0.1, 0.2, 0.3), (0.5, 0.25, 0.125))
        mean, std = (torch.tensor(values)[:, None, None] for values in given)
        plain = EpisodeStream(colours, "test", BATCH)
        for expected, batch in zip(plain, EpisodeStream(colours, "test", BATCH, normalize=given), strict=True):
            torch.testing.assert_close(batch.query_x, (expected.query_x - mean) / std, atol=2e-6, rtol=0)
        for wrong in (Normalization((0.1,), (0.5,)), given._replace(std=(0.5, 0.0, 0.5))):
            with pytest.raises(RequestError, match="above 0 for each of the images' 3 channels"):
                EpisodeStream(colours, "test", BATCH, normalize=wrong)

    def test_bytes_cannot_be_normalised(self, folder):
        """There is no such dtype."""
        with pytest.raises(RequestError, match=r"Leave out normalize or dtype=torch\.uint8"):
            EpisodeStream(folder, normalize=True, dtype=torch.uint8)


class TestEpochs:
    def test_each_iter_is_the_next_epoch(self, folder):
        """Epochs have other orders, the same in every stream of the seed."""
        stream = EpisodeStream(folder, batch_size=BATCH, seed=1)
        epochs = [order_of(stream) for _ in range(3)]
        assert epochs[0] != epochs[1] != epochs[2]
        assert [len(epoch) for epoch in epochs] == [EPOCH] * 3
        again = EpisodeStream(folder, batch_size=BATCH, seed=1)
        assert [order_of(again.to("cpu")) for _ in range(3)] == epochs
        assert order_of(EpisodeStream(folder, batch_size=BATCH, seed=2)) != epochs[0]

    @pytest.mark.parametrize("device", [None, "cpu"])
    def test_an_epoch_broken_off_is_not_taken_up_again(self, folder, device):
        """After a break the next pass is the next whole epoch."""
        stream = EpisodeStream(folder, batch_size=BATCH, seed=1)
        expected = [order_of(stream) for _ in range(3)]
        stream = EpisodeStream(folder, batch_size=BATCH, seed=1)
        stream = stream.to(device) if device else stream
        assert order_of(itertools.islice(stream, 2)) == expected[0][:2]
        assert order_of(stream) == expected[1]
        assert order_of(itertools.islice(stream, 1)) == expected[2][:1]

    def test_set_epoch(self, folder):
        """set_epoch chooses the next pass, forwards and backwards, and forgets a resumed position."""
        stream = EpisodeStream(folder, batch_size=BATCH, seed=1)
        epochs = [order_of(stream) for _ in range(4)]
        for epoch in (2, 0, 3, 3):
            stream.set_epoch(epoch)
            assert order_of(stream) == epochs[epoch]
        state = stream.state_dict() | {"next_batch": 7}
        stream.load_state_dict(state)
        stream.set_epoch(1)
        assert order_of(stream) == epochs[1]

    def test_its_representation(self, folder, glyphs_root):
        """What it gives, in a line."""
        shape = f"{N_WAY}-way {K_SHOT}-shot {K_QUERY}-query"
        assert repr(EpisodeStream(folder, batch_size=np.int64(BATCH))) == (
            f"<EpisodeStream: glyphs train, {shape}, 23 episodes, in meta-batches of {BATCH}>"
        )
        assert "episodes without end" in repr(EpisodeStream(live("glyphs", root=glyphs_root)))

    def test_length(self, folder, glyphs_root):
        """len() is the number of meta-batches of an epoch; endless streams have none."""
        assert len(EpisodeStream(folder, batch_size=BATCH)) == EPOCH
        assert len(EpisodeStream(folder, "test", batch_size=BATCH).to("cpu")) == 3
        with pytest.raises(TypeError, match="never ends, so it has no length"):
            len(EpisodeStream(live("glyphs", root=glyphs_root)))

    @pytest.mark.parametrize("device", [None, "cpu"])
    def test_endless_episodes_go_on(self, glyphs_root, device):
        """Live episodes count on from pass to pass."""
        stream = EpisodeStream(live("glyphs", root=glyphs_root, k_query=1), batch_size=2)
        stream = stream.to(device) if device else stream
        assert order_of(itertools.islice(stream, 2)) == [[0, 1], [2, 3]]
        assert order_of(itertools.islice(stream, 1)) == [[4, 5]]


class TestResume:
    @pytest.mark.parametrize("device", [None, "cpu"])
    @pytest.mark.parametrize("split", ["train", "test"])
    def test_from_every_position(self, folder, device, split):
        """Wherever it stopped, also at the end of an epoch, a new stream goes on at exactly the next meta-batch."""

        def stream():
            new = EpisodeStream(folder, split, BATCH, seed=1)
            return new.to(device, prefetch=3) if device else new

        whole = stream()
        expected = [indices for _ in range(3) for indices in order_of(whole)]
        per_epoch = len(whole)
        for position in range(2 * per_epoch + 1):
            first = stream()
            taken = []
            while len(taken) < position:
                taken += order_of(itertools.islice(first, position - len(taken)))
            state = first.state_dict()
            assert state["next_batch"] == position
            second = stream()
            second.load_state_dict(pickle.loads(pickle.dumps(state)))
            rest = [indices for _ in range(3) for indices in order_of(second)]
            assert (taken + rest)[: 3 * per_epoch] == expected

    def test_prefetched_meta_batches_are_not_counted(self, folder):
        """The state is of what was handed out, however far the thread has read ahead."""
        stream = EpisodeStream(folder, batch_size=BATCH).to("cpu", prefetch=4)
        iterator = iter(stream)
        next(iterator)
        time.sleep(0.1)
        assert stream.state_dict()["next_batch"] == 1
        next(iterator)
        assert stream.state_dict()["next_batch"] == 2
        iterator.close()

    def test_a_state_goes_from_one_device_to_another(self, folder):
        """Where a state was saved does not matter."""
        stream = EpisodeStream(folder, batch_size=BATCH, seed=1)
        expected = order_of(stream)
        first = EpisodeStream(folder, batch_size=BATCH, seed=1)
        list(itertools.islice(first, 2))
        second = EpisodeStream(folder, batch_size=BATCH, seed=1).to("cpu")
        second.load_state_dict(first.state_dict())
        assert order_of(second) == expected[2:]

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *(("version", 2), ("batch_size", 5), ("seed", 2), ("shuffle", False), ("episodes", 24), ("split", "val")),
            *(("n_way", 5), ("k_shot", 1), ("k_query", 15), ("dataset", "omniglot"), ("split_scheme", "lake")),
            *(("rotations", "none"), ("image_shape", [84, 84, 3]), ("bank_sha256", "00"), ("episode_seed", 0)),
            *(("archive_sha256", None),),
        ],
    )
    def test_the_state_of_another_stream(self, folder, field, value):
        """A state that does not fit is refused, naming the field and both values, and changes nothing."""
        stream = EpisodeStream(folder, batch_size=BATCH, seed=1)
        state = stream.state_dict()
        wrong = {**state, field: value, "next_batch": 3}
        text = re.escape(f"{field}: {value!r} saved, {state[field]!r} here")
        with pytest.raises(RequestError, match=rf"The saved state is of another stream:\n  {text}$"):
            stream.load_state_dict(wrong)
        assert stream.state_dict() == state
        with pytest.raises(RequestError, match=f"{field}: None saved"):
            stream.load_state_dict({key: value for key, value in state.items() if key != field} | {field: None})

    @pytest.mark.parametrize("device", [None, "cpu"])
    def test_a_resumed_epoch_broken_off_is_not_taken_up_again(self, folder, device):
        """A loaded state counts for one pass: after a break the next one is the next whole epoch."""
        stream = EpisodeStream(folder, batch_size=BATCH, seed=1)
        epochs = [order_of(stream) for _ in range(2)]
        stream = EpisodeStream(folder, batch_size=BATCH, seed=1)
        stream.load_state_dict(stream.state_dict() | {"next_batch": 1})
        stream = stream.to(device) if device else stream
        assert order_of(itertools.islice(stream, 2)) == epochs[0][1:3]
        assert order_of(stream) == epochs[1]

    def test_every_difference_is_named(self, folder):
        """Two wrong fields are two lines."""
        stream = EpisodeStream(folder, batch_size=BATCH)
        with pytest.raises(RequestError, match=r"batch_size: 9 saved, 4 here\n  seed: 8 saved, 0 here"):
            stream.load_state_dict({**stream.state_dict(), "seed": 8, "batch_size": 9})

    def test_a_state_is_plain(self, folder):
        """Numbers, strings, lists: it can be saved as JSON or with weights_only."""
        state = EpisodeStream(folder, batch_size=BATCH).state_dict()
        assert all(type(value) in {int, str, bool, list} for value in state.values())


class TestMemory:
    @pytest.mark.parametrize("device", [None, "cpu"])
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
    def test_holding_on_to_meta_batches_is_safe(self, folder, device, dtype):
        """A list of all meta-batches is not overwritten by those that come after."""

        def stream():
            new = EpisodeStream(folder, batch_size=BATCH, dtype=dtype)
            return new.to(device) if device else new

        held = stream()
        batches = [batch for _ in range(3) for batch in held]
        fresh = stream()
        assert same(batches, (batch for _ in range(3) for batch in kept(fresh)))
        assert len({batch.support_x.data_ptr() for batch in batches}) == 3 * EPOCH

    def test_buffers_are_used_again(self, folder):
        """A consumer that lets go of each meta-batch sees the same few buffers."""
        stream = EpisodeStream(folder, batch_size=BATCH)
        places = [(batch.support_x.data_ptr(), batch.query_x.data_ptr()) for _ in range(6) for batch in stream]
        assert len(set(places)) <= 2

    def test_buffers_are_used_again_behind_a_thread(self, folder):
        """Within a pass, the thread takes no more buffers than it reads ahead, and those in hand."""
        stream = EpisodeStream(folder, batch_size=1).to("cpu", prefetch=2)
        places = [batch.query_x.data_ptr() for batch in stream]
        assert len(places) == 23
        assert len(set(places)) <= 5

    @pytest.mark.parametrize("device", [None, "cpu"])
    def test_memory_is_flat_over_epochs(self, folder, device):
        """Epoch after epoch takes no more memory than the first few."""
        stream = EpisodeStream(folder, batch_size=BATCH)
        stream = stream.to(device) if device else stream

        def passes(count):
            for _ in range(count):
                for _ in stream:
                    pass
            gc.collect()

        passes(5)
        tracemalloc.start()
        try:
            passes(5)
            before = tracemalloc.get_traced_memory()[0]
            passes(30)
            after = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        # One meta-batch is 225 kB, and how many are under way at once is the threads' chance, a few at the most:
        # thirty epochs that each kept one would show.
        assert after - before < 1_000_000


class TestDataLoader:
    def test_without_workers(self, folder):
        """In a DataLoader of no workers the stream is what it is alone, epoch after epoch."""
        alone, inside = (EpisodeStream(folder, batch_size=BATCH, seed=3) for _ in range(2))
        loader = DataLoader(inside, batch_size=None, num_workers=0)
        assert len(loader) == EPOCH
        for _ in range(2):
            assert same(kept(loader), kept(alone))

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
    @pytest.mark.parametrize("workers", [3])
    def test_with_workers(self, folder, workers):
        """Workers share an epoch out among them without changing its order; set_epoch tells them which."""
        alone, inside = (EpisodeStream(folder, batch_size=BATCH, seed=3) for _ in range(2))
        loader = DataLoader(inside, batch_size=None, num_workers=workers, multiprocessing_context="spawn")
        expected = [kept(alone) for _ in range(2)]
        inside.set_epoch(1)
        assert same(list(loader), expected[1])

    @pytest.mark.slow
    def test_with_workers_that_resume(self, folder):
        """A loaded state is where the workers go on, too."""
        alone, inside = (EpisodeStream(folder, batch_size=BATCH, seed=3) for _ in range(2))
        expected = kept(alone)
        inside.load_state_dict(inside.state_dict() | {"next_batch": 2})
        loader = DataLoader(inside, batch_size=None, num_workers=2, multiprocessing_context="spawn")
        assert [batch.index.tolist() for batch in loader] == [batch[4].tolist() for batch in expected[2:]]

    @pytest.mark.slow
    @pytest.mark.parametrize("context", ["spawn", "fork"])
    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
    def test_with_workers_that_stay(self, folder, context):
        """Workers that outlive an epoch hear which one is next, forwards, backwards and the same again."""
        alone, inside = (EpisodeStream(folder, batch_size=BATCH, seed=3) for _ in range(2))
        expected = [order_of(alone) for _ in range(3)]
        loader = DataLoader(
            inside, batch_size=None, num_workers=2, persistent_workers=True, multiprocessing_context=context
        )
        for epoch in (0, 0, 2, 1):
            inside.set_epoch(epoch)
            assert order_of(loader) == expected[epoch]

    def test_pickling(self, folder, glyphs_root):
        """A stream in the midst of an epoch can be sent to another process, and takes no archive with it."""
        for source in (folder, live("glyphs", root=glyphs_root, episodes=50, k_query=3)):
            stream = EpisodeStream(source, batch_size=BATCH)
            list(itertools.islice(stream, 2))
            data = pickle.dumps(stream)
            assert len(data) < 200_000
            copy = pickle.loads(data)
            assert copy.state_dict() == stream.state_dict()
            assert same(kept(copy), kept(stream))

    def test_workers_that_stay_repeat_no_live_episode(self, glyphs_root):
        """Workers that outlive a broken-off pass over endless episodes give none of them twice."""
        stream = EpisodeStream(live("glyphs", root=glyphs_root, k_query=1))
        loader = DataLoader(stream, None, num_workers=2, persistent_workers=True, multiprocessing_context=FORK)
        seen = [index for _ in range(3) for (index,) in order_of(itertools.islice(loader, 5))]
        assert seen[:5] == [0, 1, 2, 3, 4]
        assert len(set(seen)) == 15

    def test_an_error_ends_the_pass(self, own):
        """Who asks on after an error is told that the pass is over; the state is still that of before the error."""
        stream = EpisodeStream(own, batch_size=5, shuffle=False)
        passing = iter(stream)
        next(passing)
        (own / "train-00001.tar").unlink()
        with pytest.raises(DamagedError):
            next(passing)
        assert list(passing) == []
        assert stream.state_dict()["next_batch"] == 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.slow
class TestMisuseOfADataLoader:
    @pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"num_workers": 1, "multiprocessing_context": FORK}])
    def test_batches_of_meta_batches(self, folder, options):
        """A forgotten batch_size=None is refused with what to write, and a collate_fn of one's own is not."""
        with pytest.raises(RequestError, match=r"Write DataLoader\(stream, batch_size=None\)"):
            next(iter(DataLoader(EpisodeStream(folder), **options)))
        loader = DataLoader(EpisodeStream(folder), collate_fn=order_of, **options)
        assert len(next(iter(loader))) == options.get("batch_size", 1)

    @pytest.mark.parametrize("options", [{}, {"batch_size": None}, {"num_workers": 1, "multiprocessing_context": FORK}])
    def test_a_stream_on_a_device(self, folder, glyphs_root, options):
        """What .to(device) gives is refused with what to write instead."""
        what_to_write = r"takes the stream itself.* write DataLoader\(stream, batch_size=None\)"
        with pytest.raises(RequestError, match=what_to_write):
            next(iter(DataLoader(EpisodeStream(folder).to("cpu"), **options)))
        endless = EpisodeStream(live("glyphs", root=glyphs_root)).to("cpu")
        with pytest.raises(TypeError, match=what_to_write):
            len(endless)  # which a DataLoader asks for first

    @pytest.mark.parametrize("endless", [False, True])
    def test_nobody_tells_the_epoch(self, folder, glyphs_root, endless):
        """Workers that begin where those before them did say so once, with what to write."""
        stream = EpisodeStream(live("glyphs", root=glyphs_root) if endless else folder, None, BATCH)
        loader = DataLoader(stream, None, num_workers=2, multiprocessing_context=FORK)
        first = next(iter(loader)).index.tolist()
        place, line = ("meta-batch 0", r"load_state_dict\(.*\)") if endless else ("epoch 0", r"set_epoch\(epoch\)")
        with pytest.raises(UserWarning, match=rf"begin at {place}.* Write stream\.{line} before each"):
            next(iter(loader))  # a warning is an error here, and in workers that are forked
        assert next(iter(loader)).index.tolist() == first

    @pytest.mark.slow
    def test_nobody_tells_spawned_workers_the_epoch(self, folder, capfd):
        """Spawned workers know of those before them, too."""
        stream = EpisodeStream(folder, None, BATCH)
        loader = DataLoader(stream, None, num_workers=1, multiprocessing_context="spawn")
        list(loader)
        assert "set_epoch" not in capfd.readouterr().err
        list(loader)
        assert capfd.readouterr().err.count("UserWarning: The workers of this DataLoader begin at epoch 0") == 1

    @pytest.mark.slow
    def test_no_false_alarm(self, folder):
        """Workers do not warn if they are told where to go on, stay, keep one order, or are another process's."""

        def loader(stream, **options):
            return DataLoader(stream, None, num_workers=2, multiprocessing_context=FORK, **options)

        told, resumed, stay, same = (EpisodeStream(folder, None, BATCH, shuffle=i < 3) for i in range(4))
        staying = loader(stay, persistent_workers=True)
        for epoch in range(3):
            told.set_epoch(epoch)
            resumed.load_state_dict(resumed.state_dict() | {"next_batch": epoch * EPOCH})
            orders = [order_of(some) for some in (loader(told), loader(resumed), staying)]
            assert orders[0] == orders[1] == orders[2]
            assert order_of(loader(same)) == order_of(EpisodeStream(folder, None, BATCH, shuffle=False))

        shared = EpisodeStream(folder, None, BATCH)
        context = multiprocessing.get_context("fork")
        for _ in range(2):  # each with a DataLoader of its own
            process = context.Process(target=_one_epoch, args=(shared,))
            process.start()
            process.join(60)
            assert process.exitcode == 0


def _one_epoch(stream: EpisodeStream) -> None:
    list(DataLoader(stream, None, num_workers=1, multiprocessing_context=FORK))


@pytest.fixture
def loader():
    """Makes torchdata's loader of a stream, with a state if there is one."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")

    def make(stream, workers, state=None, **options):
        if workers:
            options.setdefault("multiprocessing_context", FORK)
        made = stateful.StatefulDataLoader(stream, batch_size=None, num_workers=workers, **options)
        if state is not None:
            made.load_state_dict(pickle.loads(pickle.dumps(state)))
        return made

    return make


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # by torchdata, in new versions of torch
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.slow
class TestStatefulDataLoader:
    """torchdata's loader goes on at exactly the next meta-batch, which its workers' states tell."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("workers", "options"),
        [
            *((workers, {}) for workers in (0, 1, 2, 4)),
            (2, {"persistent_workers": True, "snapshot_every_n_steps": 3, "prefetch_factor": 1}),
        ],
    )
    def test_from_every_position(self, folder, loader, workers, options):
        """Wherever the second epoch was left, what comes is the rest of it, then the whole of the third, each once."""

        def stream():
            return EpisodeStream(folder, None, 7, seed=3)

        alone, first = stream(), stream()
        expected = [order_of(alone) for _ in range(3)]
        first.set_epoch(0)
        running = loader(first, workers, **options)
        assert order_of(running) == expected[0]
        first.set_epoch(1)
        states = []
        for batch in running:
            states.append(running.state_dict())
            assert batch.index.tolist() == expected[1][len(states) - 1]
        for seen, state in enumerate(states, start=1):
            second = stream()
            resumed = loader(second, workers, state, **options)
            second.set_epoch(1)
            assert order_of(resumed) == expected[1][seen:]  # and nothing where all of it was seen
            second.set_epoch(2)
            assert order_of(resumed) == expected[2]
        second = stream()
        second.set_epoch(2)
        assert order_of(loader(second, workers, running.state_dict(), **options)) == expected[2]

    @pytest.mark.parametrize("workers", [0, 3])
    def test_endless_episodes(self, glyphs_root, loader, workers):
        """Live episodes go on in the same way."""

        def stream():
            return EpisodeStream(live("glyphs", root=glyphs_root, k_query=1))

        running = loader(stream(), workers)
        state = running.state_dict()
        for batch in running:
            assert order_of(itertools.islice(loader(stream(), workers, state), 4)) == [
                [batch.index.item() + i] for i in range(4)
            ]
            state = running.state_dict()
            if batch.index == 4:
                break

    @pytest.mark.parametrize(("workers", "options"), [(0, {}), (2, {"persistent_workers": True})])
    def test_a_resumed_epoch_broken_off_is_not_taken_up_again(self, folder, loader, workers, options):
        """A loaded state counts for one pass: after a break the next one is the next whole epoch."""
        alone, stream = (EpisodeStream(folder, None, BATCH) for _ in range(2))
        expected = [order_of(alone) for _ in range(2)]
        running = loader(stream, workers, **options)
        next(iter(running))
        resumed = loader(EpisodeStream(folder, None, BATCH), workers, running.state_dict(), **options)
        assert order_of(itertools.islice(resumed, 1)) == expected[0][1:2]
        assert order_of(resumed) == expected[1]

    @pytest.mark.slow
    def test_spawned_workers(self, folder, loader):
        """What forked workers saved, spawned ones take up."""
        expected = order_of(EpisodeStream(folder, None, BATCH))
        running = loader(EpisodeStream(folder, None, BATCH), 2)
        assert order_of(itertools.islice(running, 1)) == expected[:1]
        resumed = loader(EpisodeStream(folder, None, BATCH), 2, running.state_dict(), multiprocessing_context="spawn")
        assert order_of(resumed) == expected[1:]

    def test_what_does_not_fit(self, folder, loader):
        """The state of another stream, or of another number of workers, is refused with the reason."""
        running = loader(EpisodeStream(folder, None, BATCH), 0)
        with pytest.raises(RequestError, match=r"batch_size: 4 saved, 5 here"):
            iter(loader(EpisodeStream(folder, None, 5), 0, running.state_dict()))
        passing = iter(EpisodeStream(folder, None, BATCH))
        share = passing.state_dict() | {"worker": 1, "workers": 2}
        with pytest.raises(RequestError, match=r"worker 1 of 2, and this is worker 0 of 1\. Give .* num_workers=2"):
            passing.load_state_dict(share)


class TestDamage:
    def test_a_missing_shard(self, own):
        """A shard that is not there is noticed when the stream is made, and named with its episodes."""
        (own / "train-00002.tar").unlink()
        with pytest.raises(DamagedError, match=r"train-00002\.tar is missing \(episodes 10 to 14\)"):
            EpisodeStream(own)
        assert len(list(EpisodeStream(own, "val"))) == 7

    @pytest.mark.parametrize("cut", [1, 512, 1024, 30_000])
    def test_a_truncated_shard(self, own, cut):
        """A shard that is too short is noticed when the stream is made."""
        path = own / "train-00004.tar"
        data = path.read_bytes()
        path.write_bytes(data[:-cut])
        text = rf"train-00004\.tar \(episodes 20 to 22\) has {len(data) - cut:,} bytes, expected {len(data):,}"
        with pytest.raises(DamagedError, match=text):
            EpisodeStream(own)

    @pytest.mark.parametrize("device", [None, "cpu"])
    @pytest.mark.parametrize("verify", [False, True])
    def test_a_damaged_header(self, own, device, verify):
        """A flipped byte in a header names shard and episode when the shard is first read, verify or not."""
        archive = read_archive(own)
        path = own / "train-00001.tar"
        data = bytearray(path.read_bytes())
        data[2 * archive.layout.stride + archive.layout.query.header + 5] ^= 1
        path.write_bytes(data)
        stream = EpisodeStream(own, shuffle=False, batch_size=5, verify=verify)
        passing = iter(stream.to(device) if device else stream)
        assert next(passing).index.tolist() == [0, 1, 2, 3, 4]
        with pytest.raises(DamagedError, match=r"train-00001\.tar is damaged: episode 7 does not start as it should"):
            next(passing)

    @pytest.mark.parametrize("device", [None, "cpu"])
    def test_a_flipped_pixel(self, own, device):
        """verify=True notices a single pixel before it is handed out."""
        archive = read_archive(own)
        path = own / "train-00000.tar"
        data = bytearray(path.read_bytes())
        data[archive.layout.support.data + 300] ^= 1
        path.write_bytes(data)
        stream = EpisodeStream(own, shuffle=False, verify=True)
        with pytest.raises(DamagedError, match=r"train-00000\.tar \(episodes 0 to 4\) is damaged: sha256 [0-9a-f]{64}"):
            next(iter(stream.to(device) if device else stream))

    @pytest.mark.parametrize("device", [None, "cpu"])
    def test_shards_exchanged_between_splits(self, own, device):
        """Shards of the same length in each other's place are an error that names the shard, and not another split."""
        (own / "train-00000.tar").rename(own / "aside")
        (own / "val-00000.tar").rename(own / "train-00000.tar")
        (own / "aside").rename(own / "val-00000.tar")
        for split in ("train", "val"):
            stream = EpisodeStream(own, split, shuffle=False)
            with pytest.raises(DamagedError, match=rf"{split}-00000\.tar holds other episodes than archive\.json says"):
                next(iter(stream.to(device) if device else stream))
        with pytest.raises(DamagedError, match=r"train-00000\.tar holds other episodes"):
            next(iter(EpisodeStream(own, batch_size=BATCH, remix=True)))

    def test_no_archive(self, tmp_path):
        """A folder that is no archive is refused with the command that makes one."""
        with pytest.raises(RequestError, match=r"is not an archive.*mamldata build"):
            EpisodeStream(tmp_path)


@pytest.fixture(scope="module")
def many(tmp_path_factory, glyphs_manifest, glyphs_bank) -> Path:
    """An archive of many shards. Do not write to it."""
    out = tmp_path_factory.mktemp("many") / "archive"
    build(glyphs_manifest, glyphs_bank, out, BuildRequest(2, 1, 1, {"train": 200}, episodes_per_shard=1))
    return out


@pytest.fixture
def few_descriptors():
    """The process may have fewer files open than ``many`` has shards; gives how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 2 * len(list(Path("/dev/fd").iterdir())) + 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    yield few
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def cut(path: Path) -> None:
    os.truncate(path, 1000)


def zeros(path: Path) -> None:
    with path.open("rb+") as stream:
        stream.write(bytes(path.stat().st_size))


class TestChangedUnderAReader:
    @pytest.fixture(autouse=True)
    def _look_always(self, monkeypatch):
        """Look at the files before each meta-batch, not every few seconds."""
        monkeypatch.setattr(stored, "_LOOK_EVERY", 0.0)

    @pytest.mark.parametrize("remix", [False, True])
    @pytest.mark.parametrize(
        ("change", "message"), [(cut, "has 1,000 bytes, expected"), (zeros, "is damaged: episode 0")]
    )
    def test_a_shard_that_is_changed_in_place(self, own, change, message, remix):
        """The next meta-batch from it is an error that names it: neither the end of the process nor zeros."""
        stream = EpisodeStream(own, batch_size=BATCH, shuffle=None if remix else False, remix=remix)
        for _ in stream:
            pass
        change(own / "train-00000.tar")
        with pytest.raises(DamagedError, match=rf"train-00000\.tar .*{message}"):
            for _ in stream:
                pass

    def test_a_shard_that_is_only_touched(self, own):
        """It is checked again, and read on."""
        stream = EpisodeStream(own, batch_size=BATCH, shuffle=False)
        before = [batch.support_x.clone() for batch in stream]
        (own / "train-00000.tar").touch()
        assert all(torch.equal(a, b.support_x) for a, b in zip(before, stream, strict=True))

    def test_a_shard_that_is_replaced_by_renaming(self, own):
        """The stream reads on what it has mapped, whatever has the name now."""
        stream = EpisodeStream(own, batch_size=BATCH, shuffle=False)
        before = [batch.support_x.clone() for batch in stream]
        (own / "other").write_bytes(b"another file")
        (own / "other").rename(own / "train-00000.tar")
        assert all(torch.equal(a, b.support_x) for a, b in zip(before, stream, strict=True))


class TestManyShards:
    @pytest.mark.parametrize("remix", [False, True])
    def test_more_shards_than_open_files(self, many, few_descriptors, remix):
        """They are read in any order, and descriptors stay free for others; where there are enough, all stay mapped."""
        stream = EpisodeStream(many, batch_size=BATCH, seed=3, remix=remix)
        found = [kept(stream) for _ in range(2)]
        others = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]
        for descriptor in others:
            os.close(descriptor)
        source = getattr(stream.source, "source", stream.source)
        assert 1 < len(source._open) < 200
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (few_descriptors + 1000, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        )
        roomy = EpisodeStream(many, batch_size=BATCH, seed=3, remix=remix)
        assert all(same(epoch, kept(roomy)) for epoch in found)
        assert len(getattr(roomy.source, "source", roomy.source)._open) == 200

    @pytest.mark.usefixtures("few_descriptors")
    def test_what_was_handed_out_stays(self, many):
        """A map that has made room for others is good for as long as someone refers to it."""
        source = ArchiveSource(many)
        mapped = source._open_shard(7)
        for number in range(200):
            source._open.get(number) or source._open_shard(number)
        assert source._open.get(7) is not mapped
        assert bytes(mapped) == (many / "train-00007.tar").read_bytes()

    @pytest.mark.usefixtures("few_descriptors")
    def test_sources_have_room_beside_each_other(self, many):
        """However many are read from in turn: what one has open leaves others some."""
        streams = [EpisodeStream(many, shuffle=False) for _ in range(4)]
        for batches in zip(*streams, strict=True):
            assert len({batch.query_x.numpy().tobytes() for batch in batches}) == 1


class TestRequests:
    def test_what_cannot_be(self, folder, glyphs_root):
        """Arguments that make no sense are refused at once."""
        endless = live("glyphs", root=glyphs_root)
        for call, message in [
            (
                lambda: EpisodeStream(folder, dtype=torch.int64),
                "dtype must be torch.uint8 or a floating torch.dtype, not torch.int64",
            ),
            (lambda: EpisodeStream(folder, dtype="float16"), "dtype must be .* not 'float16'"),
            (lambda: EpisodeStream(folder, batch_size="8"), "batch_size must be a whole number, not '8'"),
            (lambda: EpisodeStream(folder).to("gpu"), "There is no device 'gpu'. Use 'cuda'"),
            (lambda: EpisodeStream(folder, "dev"), "no split 'dev'; the splits are train, val, test"),
            (lambda: EpisodeStream(folder, batch_size=0), "batch_size must be at least 1, not 0"),
            (lambda: EpisodeStream(folder, batch_size=24), "batch_size is 24, but there are only 23 episodes"),
            (lambda: EpisodeStream(folder, seed=-1), "seed must be at least 0, not -1"),
            (lambda: EpisodeStream(endless, shuffle=True), "never end are random already"),
            (lambda: EpisodeStream(endless, "val"), "The source has the split 'train', not 'val'"),
            (lambda: EpisodeStream(endless, verify=True), "verify=True is for archives"),
            (lambda: EpisodeStream(folder).to("cpu", prefetch=0), "prefetch must be at least 1, not 0"),
            (lambda: live("glyphs", "dev", root=glyphs_root), "There is no split 'dev'"),
            (lambda: live("glyphs", rotations="some", root=glyphs_root), "rotations must be one of"),
            (lambda: live("glyphs", episodes=0, root=glyphs_root), "episodes must be at least 1, not 0"),
        ]:
            with pytest.raises(RequestError, match=message):
                call()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
    def test_no_gpu(self, folder):
        """A GPU that is not there is an error that says so."""
        with pytest.raises(RequestError, match=r"There is no device cuda: torch finds no GPU. Use 'cpu'"):
            EpisodeStream(folder).to("cuda")

    def test_what_a_stream_says_of_itself(self, folder):
        """Info names everything that a result must be printed with."""
        stream = EpisodeStream(folder, "val")
        assert stream.to("cpu").info == stream.info
        info = dataclasses.asdict(stream.info)
        assert info["archive_sha256"] == read_archive(folder).digest
        assert (info["dataset"], info["split"], info["rotations"], info["episode_seed"]) == ("glyphs", "val", "all", 9)


class _Failing(ArchiveSource):
    """Fails at the third meta-batch."""

    def __init__(self, folder, error):
        super().__init__(folder)
        self.error = error
        self.reads = 0

    def read(self, index, support, query):
        self.reads += 1
        if self.reads == 3:
            raise self.error
        super().read(index, support, query)


class TestThread:
    @pytest.mark.parametrize("prefetch", [1, 2, 5])
    def test_it_ends_with_the_pass(self, folder, prefetch):
        """No thread is left when a pass is exhausted, broken off, or ends in the consumer's exception."""
        stream = EpisodeStream(folder, batch_size=BATCH).to("cpu", prefetch=prefetch)
        for _ in stream:
            pass
        assert not reading_threads()
        for _ in stream:
            break
        gc.collect()
        assert not reading_threads()
        with pytest.raises(ZeroDivisionError):
            _fail_in_the_midst(stream)
        gc.collect()
        assert not reading_threads()
        iterator = iter(stream)
        next(iterator)
        assert len(reading_threads()) <= 1
        iterator.close()
        assert not reading_threads()

    @pytest.mark.parametrize(
        "error", [OSError("the disk went away"), KeyError("x"), MemoryError(), SystemExit(3)], ids=repr
    )
    def test_its_error_reaches_the_consumer(self, folder, error):
        """What is raised in the thread is raised where the consumer waits, after the meta-batches before it."""
        stream = EpisodeStream(_Failing(folder, error), batch_size=BATCH, shuffle=False).to("cpu")
        seen = []
        with pytest.raises(type(error)) as caught:
            seen.extend(batch.index.tolist() for batch in stream)
        assert caught.value is error
        assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert stream.state_dict()["next_batch"] == 2
        assert not reading_threads()

    def test_a_loop_that_ends_amid_a_long_read(self, folder, monkeypatch):
        """Whoever breaks a loop off does not wait for a silent server; the next pass does, and is right."""
        monkeypatch.setattr("mamldata.streaming.device._PATIENCE", 0.05)
        source = ArchiveSource(folder)
        reads, may_end, plain_read = [], threading.Event(), source.read

        def read(index, support, query):
            reads.append(index)
            if len(reads) == 2:
                assert may_end.wait(60)
            plain_read(index, support, query)

        source.read = read  # type: ignore[method-assign]
        stream = EpisodeStream(source, batch_size=BATCH, seed=1).to("cpu", prefetch=1)
        iterator = iter(stream)
        next(iterator)
        iterator.close()
        assert len(reading_threads()) == 1
        may_end.set()
        whole = EpisodeStream(folder, batch_size=BATCH, seed=1)
        kept(whole)
        assert same(stream, whole)  # the second epoch
        assert not reading_threads()

    def test_two_passes_at_once(self, folder):
        """Two iterators of one stream are two epochs, and do not mix."""
        stream = EpisodeStream(folder, batch_size=BATCH, seed=1)
        expected = [kept(stream), kept(stream)]
        two = EpisodeStream(folder, batch_size=BATCH, seed=1).to("cpu")
        first, second = iter(two), iter(two)
        pairs = [(next(first), next(second)) for _ in range(EPOCH)]
        assert same([pair[0] for pair in pairs], expected[0])
        assert same([pair[1] for pair in pairs], expected[1])
        first.close()
        second.close()

    def test_a_slow_consumer_gets_what_a_fast_one_gets(self, folder):
        """Reading ahead does not overwrite what the consumer still looks at."""
        expected = kept(EpisodeStream(folder, batch_size=BATCH))
        for batch, reference in zip(EpisodeStream(folder, batch_size=BATCH).to("cpu"), expected, strict=True):
            time.sleep(0.02)
            assert same([batch], [reference])


def _fail_in_the_midst(stream) -> None:
    for batch in stream:
        batch.index[0] / 0
        raise ZeroDivisionError


class TestWithoutGpu:
    """What the road to a GPU asks of it, on one that is not there."""

    @pytest.fixture(autouse=True)
    def _no_stream_of_another_test(self):
        _copy_stream.cache_clear()
        yield
        _copy_stream.cache_clear()

    @pytest.mark.usefixtures("fake_gpu")
    def test_the_same_meta_batches(self, folder):
        """Through the ring of page-locked buffers come the CPU's meta-batches, pass after pass, and two at once."""
        cuda = EpisodeStream(folder, batch_size=BATCH).to("cuda")
        expected = EpisodeStream(folder, batch_size=BATCH)
        for _ in range(2):
            assert same(kept(cuda), kept(expected))
        both = [kept(expected), kept(expected)]
        first, second = iter(cuda), iter(cuda)
        pairs = [(next(first), next(second)) for _ in range(EPOCH)]
        assert all(same([pair[i] for pair in pairs], both[i]) for i in range(2))
        first.close()
        second.close()

    def test_all_passes_share_one_ring_and_one_cuda_stream(self, folder, fake_gpu):
        """Also those of another stream: torch's allocator would keep the memory of each CUDA stream apart."""
        before, rings = fake_gpu.streams, set()
        for _ in range(2):
            cuda = EpisodeStream(folder, batch_size=BATCH).to("cuda")
            for _ in range(3):
                kept(cuda)
                rings.add(cuda._transfer)
        assert fake_gpu.streams == before + 1
        assert len(rings) == 2

    def test_the_cpu_is_at_most_two_meta_batches_ahead(self, folder, fake_gpu):
        """Before a meta-batch is handed over, the work on the last but one is done."""
        fake_gpu.log.clear()
        for t, _ in enumerate(EpisodeStream(folder, batch_size=BATCH).to("cuda")):
            fake_gpu.log.append(("step", t, 0))
        log = [(what, number) for what, number, stream in fake_gpu.log if stream == 0]  # without the reading thread
        for t in range(2, EPOCH):
            before, step = log.index(("step", t - 2)), log.index(("step", t))
            ends = [number for what, number in log[before:step] if what == "record"]
            assert ("wait", ends[0]) in log[before:step], f"at meta-batch {t} the work on {t - 2} may not be done"

    def test_nothing_but_images_goes_to_the_gpu_for_each_meta_batch(self, folder, fake_gpu):
        """Mean and deviation and labels are there already; no copy makes the CPU wait."""
        cuda = iter(EpisodeStream(folder, batch_size=BATCH, normalize=True).to("cuda", prefetch=1))
        next(cuda)
        fake_gpu.moved.clear()
        for _ in range(EPOCH - 1):
            next(cuda)
        cuda.close()
        assert {len(shape) for shape, _ in fake_gpu.moved} == {5, 1}  # images and indices
        assert not any(waited for _, waited in fake_gpu.moved)

    @pytest.mark.usefixtures("fake_gpu")
    def test_a_gpu_that_is_not_there(self, folder):
        """Is refused at once, by its number."""
        with pytest.raises(RequestError, match=r"There is no device cuda:7: the last GPU that torch finds is cuda:0\."):
            EpisodeStream(folder).to("cuda:7")
        EpisodeStream(folder).to("cuda:0")

    def test_a_driver_too_old(self, folder, fake_gpu, monkeypatch):
        """Torch's reason stands in the message."""
        fake_gpu.gpus = 0
        old = RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it.")
        monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(old))
        with pytest.raises(RequestError, match=r"finds no GPU. Use 'cpu'. torch: The NVIDIA driver .* is too old"):
            EpisodeStream(folder).to("cuda")


class TestGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("split", ["train", "test"])
    def test_the_same_meta_batches(self, folder, dtype, split):
        """A GPU gets the CPU's meta-batches to the bit, in every dtype, the smaller last one included."""
        cpu = EpisodeStream(folder, split, BATCH, dtype=dtype)
        cuda = EpisodeStream(folder, split, BATCH, dtype=dtype).to("cuda")
        for _ in range(2):
            batches = list(cuda)
            assert all(tensor.is_cuda for batch in batches for tensor in batch)
            assert all(
                x.permute(0, 1, 3, 4, 2).is_contiguous() for batch in batches for x in (batch.support_x, batch.query_x)
            )
            assert same(kept(batches), kept(cpu))

    @pytest.mark.parametrize("prefetch", [1, 3])
    def test_a_consumer_that_is_slow_on_a_stream_of_its_own(self, folder, prefetch):
        """Memory is not used again while the consumer's stream still works on it, without any wait on the host."""
        expected = kept(EpisodeStream(folder, batch_size=BATCH))
        cuda = EpisodeStream(folder, batch_size=BATCH).to("cuda", prefetch=prefetch)
        results = []
        with torch.cuda.stream(torch.cuda.Stream()):
            for batch in cuda:
                torch.cuda._sleep(20_000_000)
                results.append(tuple(tensor + 0 for tensor in batch))
                del batch
        torch.cuda.synchronize()
        assert same(kept(results), expected)

    def test_memory_on_the_device_is_flat(self, folder):
        """Epoch after epoch takes no more memory on the device."""
        cuda = EpisodeStream(folder, batch_size=BATCH).to("cuda")
        peaks = []
        for _ in range(8):
            torch.cuda.reset_peak_memory_stats()
            for _ in cuda:
                pass
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated())
        assert max(peaks[3:]) <= 2 * peaks[1]

    def test_reserved_memory_is_flat(self, folder):
        """Pass after pass, and stream after stream, torch asks the GPU for no more memory."""
        reserved = []
        for _ in range(5):
            cuda = EpisodeStream(folder, batch_size=BATCH).to("cuda")
            for _ in range(8):
                for _ in cuda:
                    pass
            torch.cuda.synchronize()
            reserved.append(torch.cuda.memory_reserved())
        assert len(set(reserved[1:])) == 1


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_the_read_ahead_thread_makes_no_team_of_its_own(glyphs_root):
    """Scaling in the background never makes torch work in parallel: one thread more, and no team of OpenMP threads."""

    def threads():
        return len(list(Path("/proc/self/task").iterdir()))

    torch.ones(1 << 20).mul_(2)  # the team of this thread, if it has one
    before = threads()
    passing = iter(EpisodeStream(live("glyphs", root=glyphs_root), batch_size=16).to("cpu"))
    next(passing)
    next(passing)
    assert threads() <= before + 1
    passing.close()
