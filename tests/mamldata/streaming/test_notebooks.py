"""What a notebook shows: names of classes, one line for each object, and an episode as a picture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mamldata import EpisodeBatch, EpisodeStream, live, read_archive
from mamldata.archive.build import build
from mamldata.archive.plan import BuildRequest
from mamldata.sampling import draws
from mamldata.sources.open import open_archive

REQUEST = BuildRequest(n_way=3, k_shot=2, k_query=4, episodes={"train": 9, "val": 1}, seed=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, glyphs_manifest, glyphs_bank) -> Path:
    """A small archive, which tests only read."""
    out = tmp_path_factory.mktemp("notebooks") / "archive"
    build(glyphs_manifest, glyphs_bank, out, REQUEST)
    return out


class TestClassNames:
    @pytest.mark.parametrize("options", [{}, {"n_way": 2}, {"shuffle": False}], ids=str)
    def test_of_a_batch(self, folder, options):
        """For each episode, in the batch's order, the names by label; the same from a stream that reads ahead."""
        stream = EpisodeStream(folder, batch_size=4, **options)
        batch = next(iter(stream))
        expected = [stream.source.class_labels(index) for index in batch.index.tolist()]
        assert stream.class_names(batch) == expected
        assert stream.to("cpu").class_names(batch) == expected
        assert len({name for names in expected for name in names}) > len(expected[0])
        assert {len(names) for names in expected} == {stream.info.n_way}

    def test_of_remixed_episodes(self, folder):
        """Remixed episodes are named by the ways that are in them."""
        stream = EpisodeStream(folder, batch_size=4, remix=True)
        list(stream)
        batch = next(iter(stream))
        assert stream.class_names(batch) == [stream.source.class_labels(index) for index in batch.index.tolist()]

    def test_of_live_episodes_read_ahead(self, glyphs_root, monkeypatch):
        """Asking for earlier names leaves what reading remembers alone."""
        monkeypatch.setattr(draws, "_AHEAD", 4)
        stream = EpisodeStream(live("glyphs", n_way=3, k_query=2, root=glyphs_root), batch_size=4)
        batches = iter(stream)
        first, _ = next(batches), next(batches)
        before = stream.source._draws._next
        assert stream.class_names(first) == [stream.source.class_labels(index) for index in range(4)]
        assert stream.source._draws._next is before


class TestInShort:
    def test_a_batch(self, folder):
        """One line of shapes and dtypes, also of parts that are no tensors."""
        batch = next(iter(EpisodeStream(folder, batch_size=4, dtype=torch.float16)))
        assert repr(batch) == (
            "EpisodeBatch(support_x=float16[4, 6, 1, 28, 28], support_y=int64[4, 6], "
            "query_x=float16[4, 12, 1, 28, 28], query_y=int64[4, 12], index=int64[4])"
        )
        assert repr(EpisodeBatch(0, None, *batch[2:])).startswith("EpisodeBatch(support_x=0, support_y=None, query_x=f")
        assert "on meta" in repr(batch.to("meta"))

    def test_everything_else(self, folder, glyphs_bank, glyphs_root):
        """An archive, a bank, a table of classes, sources and streams say what they are in a line."""
        archive, endless = read_archive(folder), live("glyphs", "test", n_way=3, k_query=2, root=glyphs_root)
        assert repr(archive) == "<Archive: glyphs, 3-way 2-shot 4-query, train 9 episodes, val 1 episode>"
        assert repr(archive.split("val").classes) == "<ClassTable: 120 classes>"
        assert repr(glyphs_bank) == f"<Bank: glyphs, 4,800 images [28, 28, 1] of 240 classes, {glyphs_bank.path}>"
        source = open_archive(folder)
        assert repr(source) == "<ArchiveSource: glyphs train, 3-way 2-shot 4-query, 9 episodes>"
        assert repr(endless) == "<LiveSource: glyphs test, 3-way 1-shot 2-query, episodes without end>"
        stream = EpisodeStream(source, batch_size=4)
        assert repr(stream) == ("<EpisodeStream: glyphs train, 3-way 2-shot 4-query, 9 episodes, in meta-batches of 4>")
        assert repr(stream.to("cpu")) == f"<DeviceStream: {stream!r} on cpu>"
        assert repr(EpisodeStream(source, remix=True).source).startswith("<RemixedSource: glyphs train, ")


class TestPicture:
    def test_the_first_episode(self, folder):
        """It is a PNG with the images of the first episode, the same for all dtypes, normalized or not."""
        stored = next(iter(EpisodeStream(folder, batch_size=4, dtype=torch.uint8)))
        picture = np.asarray(Image.open(io.BytesIO(stored._repr_png_())).convert("L"))
        first = stored.support_x[0, 0, 0].numpy().repeat(2, 0).repeat(2, 1)  # enlarged to two pixels for each
        windows = np.lib.stride_tricks.sliding_window_view(picture, first.shape)
        assert (windows == first).all((-1, -2)).any()
        for options in ({}, {"dtype": torch.float64}):
            assert next(iter(EpisodeStream(folder, batch_size=4, **options)))._repr_png_() == stored._repr_png_()
        normalized = next(iter(EpisodeStream(folder, batch_size=4, normalize=True)))._repr_png_()
        close = np.asarray(Image.open(io.BytesIO(normalized)).convert("L")).astype(int)
        assert abs(close - picture).max() <= 1

    def test_unequal_queries(self, glyphs_root):
        """A class with fewer queries has fewer images in its row."""
        stream = EpisodeStream(live("glyphs", n_way=3, k_query=4, query_alpha=1, root=glyphs_root), batch_size=2)
        assert Image.open(io.BytesIO(next(iter(stream))._repr_png_())).format == "PNG"

    def test_what_has_no_picture(self, folder):
        """Batches of points, without episodes, or with another number of channels."""
        batch = next(iter(EpisodeStream(folder, batch_size=4)))
        points = batch._replace(support_x=batch.support_x[..., 0, 0])
        two = batch._replace(support_x=batch.support_x.repeat(1, 1, 2, 1, 1))
        empty = EpisodeBatch(*(part[:0] for part in batch))
        assert [one._repr_png_() for one in (points, two, empty)] == [None] * 3


def test_a_batch_on_a_device(folder):
    """All five parts move; the result is a batch again."""
    batch = next(iter(EpisodeStream(folder, batch_size=4))).to("meta")
    assert type(batch) is EpisodeBatch
    assert {part.device.type for part in batch} == {"meta"}
