"""The images of a split as a dataset of torchvision: those of the bank, with the classes of the episodes."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import mamldata
from mamldata.bank.format import Bank
from mamldata.errors import RequestError

pytest.importorskip("torchvision")


def as_array(image: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy())


def test_the_images_of_a_split(glyphs_root: Path, glyphs_bank: Bank) -> None:
    """Every image of the split's classes once, as a PIL image, in the order of the classes of live episodes."""
    images = mamldata.images("glyphs", "val", root=glyphs_root)
    table = mamldata.live("glyphs", "val", n_way=2, k_query=1, rotations="none", root=glyphs_root).table
    assert images.classes == [table.label(c) for c in range(len(table))]
    assert images.class_to_idx == {name: c for c, name in enumerate(images.classes)}
    assert len(images) == len(images.targets) == table.images.sum()
    bank, i = glyphs_bank.open_images(), 0
    for c, (first, count) in enumerate(zip(table.first_row.tolist(), table.images.tolist(), strict=True)):
        for row in range(first, first + count):
            image, target = images[i]
            assert (image.mode, image.size, target) == ("L", (28, 28), c)
            assert np.array_equal(np.asarray(image), bank[row, :, :, 0])
            assert images.targets[i] == c
            i += 1
    with pytest.raises(IndexError):
        images[i]
    assert f"Number of datapoints: {i}" in repr(images)
    assert f"Dataset: glyphs, split val, {len(table)} classes" in repr(images)


def test_colours_and_a_split_without_classes(tmp_path: Path) -> None:
    """Images with three channels are RGB; a split that has no classes is refused."""
    folder = tmp_path / "photos" / "test" / "red"
    folder.mkdir(parents=True)
    Image.new("RGB", (84, 84), (200, 10, 20)).save(folder / "one.png")
    image, target = mamldata.images(folder.parents[1], "test", root=tmp_path / "root")[0]
    assert (image.mode, image.size, target) == ("RGB", (84, 84), 0)
    assert image.getpixel((40, 40)) == (200, 10, 20)
    with pytest.raises(RequestError, match="has no classes in train; it has classes in test"):
        mamldata.images(folder.parents[1], root=tmp_path / "root")


def test_rotations(glyphs_root: Path) -> None:
    """With rotations each class is there four times, turned counter-clockwise, as in episodes."""
    plain = mamldata.images("glyphs", "test", root=glyphs_root)
    turned = mamldata.images("glyphs", "test", rotations=True, root=glyphs_root)
    live = mamldata.live("glyphs", "test", n_way=2, k_query=1, rotations="all", root=glyphs_root)
    assert turned.classes == [live.table.label(c) for c in range(len(live.table))]
    assert len(turned) == 4 * len(plain)
    first = turned.targets.index(turned.class_to_idx[f"{plain.classes[0]}, turned 90"])
    assert np.array_equal(np.asarray(turned[first][0]), np.rot90(np.asarray(plain[0][0])))


def test_transforms(glyphs_root: Path) -> None:
    """Both transforms are applied, to the PIL image and to the index."""
    images = mamldata.images("glyphs", root=glyphs_root, transform=lambda image: image.size, target_transform=str)
    assert images[-1] == ((28, 28), str(len(images.classes) - 1))


def test_another_process_maps_the_bank_itself(glyphs_root: Path) -> None:
    """A pickle holds no pixels, although the bank was mapped before, and gives the same."""
    images = mamldata.images("glyphs", root=glyphs_root, transform=as_array)
    last, target = images[-1]
    data = pickle.dumps(images)
    assert len(data) < 28 * 28 * len(images) / 4
    again = pickle.loads(data)
    assert torch.equal(again[-1][0], last)
    assert again[-1][1] == target


@pytest.mark.slow
def test_in_a_data_loader(glyphs_root: Path) -> None:
    """Workers give the same batches as this process."""
    images = mamldata.images("glyphs", "val", root=glyphs_root, transform=as_array)
    for workers in (0, 1):
        pixels, targets = zip(*DataLoader(images, batch_size=16, num_workers=workers), strict=True)
        assert torch.equal(torch.cat(pixels), torch.stack([image for image, _ in images]))
        assert torch.cat(targets).tolist() == images.targets


def test_what_there_is_not(glyphs_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown splits and schemes, and a missing torchvision, are named."""
    with pytest.raises(RequestError, match="There is no split 'valid'; the splits are train, val, test"):
        mamldata.images("glyphs", "valid", root=glyphs_root)
    with pytest.raises(RequestError, match="glyphs has no split scheme 'other'"):
        mamldata.images("glyphs", split_scheme="other", root=glyphs_root)
    monkeypatch.delitem(sys.modules, "mamldata.streaming.images")
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(RequestError, match=r"mamldata\.images needs torchvision: pip install torchvision"):
        mamldata.images("glyphs", root=glyphs_root)
