"""Images brought to the shape that a network takes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from mamldata import EpisodeStream, live
from mamldata.archive.build import build
from mamldata.archive.plan import BuildRequest
from mamldata.errors import RequestError
from mamldata.sources.fitted import FittedSource, fitted
from mamldata.sources.open import open_archive

SHAPE = {"n_way": 3, "k_shot": 1, "k_query": 2}


def pixels(source) -> np.ndarray:
    """The support images of two episodes, uint8 ``[6, C, H, W]``."""
    batch = next(iter(EpisodeStream(source, batch_size=2, dtype=torch.uint8)))
    return batch.support_x.numpy().reshape(6, *batch.support_x.shape[2:])


@pytest.mark.parametrize("size", [14, 28, 84])
def test_grey_becomes_rgb_of_another_size(glyphs_root, size: int) -> None:
    """Three channels, each of them what Pillow's Lanczos filter makes of the grey image; nothing is inverted."""
    source = live("glyphs", seed=1, root=glyphs_root, **SHAPE)
    for before, after in zip(pixels(source), pixels(FittedSource(source, (size, size, 3))), strict=True):
        expected = np.asarray(Image.fromarray(before[0]).resize((size, size), Image.Resampling.LANCZOS))
        assert after.shape == (3, size, size)
        assert all(np.array_equal(channel, expected) for channel in after)


def test_colours_become_grey_first(glyphs_root) -> None:
    """By the luma of ITU-R 601, and only then they are resized."""
    colours = FittedSource(live("glyphs", root=glyphs_root, **SHAPE), (20, 20, 3))
    colours.read = lambda _, support, query: [  # type: ignore[method-assign]
        np.copyto(part, np.random.default_rng(0).integers(0, 256, len(part), dtype=np.uint8))
        for part in (support, query)
    ]
    (found, *_), (before, *_) = pixels(FittedSource(colours, (9, 9, 1))), pixels(colours)
    grey = Image.fromarray(before.transpose(1, 2, 0)).convert("L")
    assert np.array_equal(found[0], np.asarray(grey.resize((9, 9), Image.Resampling.LANCZOS)))
    luma = before.transpose(1, 2, 0) @ np.array([0.299, 0.587, 0.114])
    assert np.abs(np.asarray(grey) - luma).max() <= 1


def test_the_episodes_are_the_same(glyphs_manifest, glyphs_bank, tmp_path) -> None:
    """Classes, queries and number are the source's; a view, a narrower one and a pickled one are fitted, too."""
    build(glyphs_manifest, glyphs_bank, tmp_path / "a", BuildRequest(**SHAPE, episodes={"test": 4}, seed=1))
    whole = open_archive(tmp_path / "a", "test")
    source = fitted(whole, (14, 14, 3))
    index = np.arange(4)
    assert (source.episodes, source.view(2).episodes) == (4, 2)
    assert np.array_equal(source.classes(index), whole.classes(index))
    assert source.class_labels(1) == whole.class_labels(1)
    assert (source.info.image_shape, source.info.fitted_from) == ((14, 14, 3), (28, 28, 1))
    assert source.info.identity()["fitted_from"] == [28, 28, 1]
    assert len(source.info.normalization.mean) == 3
    assert np.array_equal(pixels(pickle.loads(pickle.dumps(source))), pixels(source))
    narrow = source.narrowed(n_way=2)
    assert (narrow.info.n_way, narrow.info.image_shape) == (2, (14, 14, 3))
    assert fitted(whole, (28, 28, 1)) is whole
    assert "fitted_from" not in whole.info.identity()


@pytest.mark.parametrize("shape", [(28, 14, 1), (28, 28, 2), (0, 0, 1), (5000, 5000, 3)])
def test_other_shapes_are_refused(glyphs_root, shape) -> None:
    """Only squares, grey or RGB, up to the largest size of a bank."""
    with pytest.raises(RequestError, match=f"cannot be fitted to {shape[0]}x{shape[1]}.*only to squares"):
        FittedSource(live("glyphs", root=glyphs_root, **SHAPE), shape)
