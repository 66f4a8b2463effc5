"""Augmented training: the transforms against torchvision's, and runs that use them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synthetic import Synthetic

from mamldata.errors import RequestError
from trainer import augment
from trainer.augment import augmentation, character, photo
from trainer.data import EpisodeData, live_data
from trainer.loop import train
from trainer.runs.checkpoint import find_last, load_checkpoint
from trainer.settings import TrainSettings

SETTINGS = TrainSettings(
    steps=2,
    meta_batch_size=2,
    eval_every=2,
    eval_episodes=2,
    filters=2,
    meta_schedule="constant",
    augment="character",
    device="cpu",
)


def data_of(root: Path) -> EpisodeData:
    return live_data("glyphs", root, {"n_way": 2, "k_query": 2})


def weights(run: Path) -> dict[str, torch.Tensor]:
    last = find_last(run)
    assert last is not None
    return load_checkpoint(last).weights


def test_photo_is_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """With given numbers, crop, flip and colours are those of torchvision's functions."""
    v2 = pytest.importorskip("torchvision.transforms.v2.functional")
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    # A quarter of the area, a square, so 20 x 20 pixels; at the top left, and at 15, 10. The second one is flipped.
    area, ratio = (0.25 - 0.08) / 0.92, 0.5
    first = [area, ratio, 0.0, 0.0, 0.9, 0.25, 0.75, 0.125]
    second = [area, ratio, 0.75, 0.5, 0.1, 0.9, 0.4, 0.6]
    monkeypatch.setattr(augment, "_draws", lambda *_: torch.tensor([first, second]).T)
    expected = []
    for image, (top, left), flip, colours in zip(
        images, [(0, 0), (10, 15)], [False, True], [first, second], strict=True
    ):
        crop = v2.resize(image[:, top : top + 20, left : left + 20], [40, 40], antialias=False)
        crop = v2.horizontal_flip(crop) if flip else crop
        brightness, contrast, saturation = (0.6 + 0.8 * draw for draw in colours[5:])
        crop = v2.adjust_contrast(v2.adjust_brightness(crop, brightness), contrast)
        expected.append(v2.adjust_saturation(crop, saturation))
    inside = (..., slice(1, -1), slice(1, -1))  # at its edge a crop sees the pixels around it
    torch.testing.assert_close(photo(images)[inside], torch.stack(expected)[inside], atol=0.01, rtol=0)


def test_a_character_stays_within_bounds() -> None:
    """Turned, scaled and shifted a little, each image differently; one with draws in the middle is unchanged."""
    images = torch.zeros(50, 1, 28, 28)
    images[..., 10:18, 10:18] = 1
    torch.manual_seed(0)
    moved = character(images)
    assert len({tuple(image.flatten().tolist()) for image in moved}) == 50
    places = torch.arange(28.0)
    for axis in (-1, -2):
        centre = (moved.sum(axis).squeeze(1) * places).sum(-1) / moved.sum((-1, -2)).squeeze(1)
        assert 0.3 < (centre - 13.5).abs().max() < 0.05 * 28 * 1.1 + 0.5
    assert ((moved.sum((1, 2, 3)) / 64).sqrt() - 1).abs().max() < 0.15


def test_draws_in_the_middle_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No turn, no scale, no shift."""
    images = torch.rand(3, 1, 28, 28)
    monkeypatch.setattr(augment, "_draws", lambda images, count: torch.full((count, len(images)), 0.5))
    torch.testing.assert_close(character(images), images)


def test_images_stay_images() -> None:
    """Photographs stay in [0, 1], in their dtype, and differ from one another."""
    images = torch.rand(1, 3, 20, 20).expand(30, -1, -1, -1).double()
    changed = photo(images)
    assert changed.dtype == torch.float64
    assert changed.shape == images.shape
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert len({tuple(image.flatten().tolist()) for image in changed}) == 30


def test_only_training_episodes_change(glyphs_root: Path, tmp_path: Path) -> None:
    """A run with augmentation learns other weights; the first validation of untrained weights is the same."""
    settings = replace(SETTINGS, meta_lr=1e-30)  # leaves the weights as they are
    plain, augmented = (
        train(replace(settings, augment=name), data_of(glyphs_root), tmp_path / f"still-{name}")
        for name in ("none", "character")
    )
    assert plain.accuracy == augmented.accuracy
    for name in ("none", "character"):
        train(replace(SETTINGS, augment=name), data_of(glyphs_root), tmp_path / name)
    one, other = weights(tmp_path / "none"), weights(tmp_path / "character")
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_sees_the_same_images(glyphs_root: Path, tmp_path: Path) -> None:
    """Two steps and then two more give the weights of four, bit for bit; without augmentation it does not go on."""
    train(replace(SETTINGS, steps=4), data_of(glyphs_root), tmp_path / "whole")
    train(SETTINGS, data_of(glyphs_root), tmp_path / "parts")
    torch.rand(3)
    with pytest.raises(RequestError, match="augment"):
        train(replace(SETTINGS, steps=4, augment="none"), data_of(glyphs_root), tmp_path / "parts", resume=True)
    train(replace(SETTINGS, steps=4), data_of(glyphs_root), tmp_path / "parts", resume=True)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_images_that_it_is_not_for(tmp_path: Path) -> None:
    """A photograph's augmentation is refused for characters, before anything is written, and the other way round."""
    with pytest.raises(RequestError, match="augment photo is for images with 3 channels, and these have 1"):
        train(replace(SETTINGS, augment="photo"), Synthetic(size=8), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(RequestError, match="augment character is for images with 1 channel, and these have 3"):
        augmentation("character", (84, 84, 3))
    assert augmentation("none", (84, 84, 3)) is None
