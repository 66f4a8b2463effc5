"""Folders of photographs as they are: of uneven classes, with damaged and oblong images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mamldata
from mamldata.bank.format import read_description
from mamldata.bank.make import files_left_out, make_bank
from mamldata.bank.prepare import prepare_image, recipe_of
from mamldata.datasets.load import load_manifest
from mamldata.errors import DatasetError, RequestError
from mamldata.sampling.splits import divide
from mamldata.sources.live import live
from trainer.data import live_data

SIZES = {"ants": 4, "bees": 2, "cats": 5, "dogs": 4, "elks": 3}
SMALL = 8


def photos(folder: Path) -> Path:
    """Three stripes, red, green and blue, in each image of the classes in ``SIZES``; no two images are equal."""
    for place, (name, count) in enumerate(SIZES.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((20, 60, 3), 8 * number + place, np.uint8)
            for stripe in range(3):
                pixels[:, 20 * stripe : 20 * stripe + 20, stripe] = 255
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def test_small_classes_are_left_out(tmp_path: Path):
    """With their numbers of images; the others are divided as if these were not there, and the bank is the same."""
    folder, root = photos(tmp_path / "photos"), tmp_path / "root"
    manifest = load_manifest(str(folder), min_images=3)
    bank = make_bank(manifest, root, SMALL)
    assert bank.class_names == ("ants", "cats", "dogs", "elks")
    assert manifest.scheme().description == "2/1/1 classes at random, seed 0"
    assert sum(map(len, divide(manifest.scheme(), bank.class_names, "photos").values())) == 4
    assert [str(group) for group in files_left_out(manifest, bank, root)] == ["1 class with too few images: bees (2)"]
    for image in (folder / "bees").iterdir():
        image.unlink()
    assert make_bank(load_manifest(str(folder)), root, SMALL).sha256 == bank.sha256


def test_too_few_classes_are_left(tmp_path: Path):
    """The error says with how many images."""
    folder = photos(tmp_path / "photos")
    with pytest.raises(RequestError, match="has images of 1 class with at least 5 images; train, val and test need"):
        load_manifest(str(folder), min_images=5)


def test_damaged_images_are_left_out_on_request(tmp_path: Path):
    """Counted, named, and in the bank's JSON; otherwise an error. The images left give the same bank without them."""
    folder, root = photos(tmp_path / "photos"), tmp_path / "root"
    bad = [folder / "cats" / "1.png", folder / "dogs" / "0.png"]
    for path in bad:
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DatasetError, match=r"(?s)cats/1.png.*dogs/0.png.*or leave out .* with --skip-damaged"):
        make_bank(load_manifest(str(folder)), root, SMALL)
    manifest = load_manifest(str(folder), skip_damaged=True)
    bank = make_bank(manifest, root, SMALL)
    (group,) = files_left_out(manifest, bank, root)
    assert str(group).startswith("2 images that are missing or cannot be read: ")
    assert [any(path.name in line and path.parent.name in line for line in bank.left_out) for path in bad] == [True] * 2
    assert bank.shape[0] == sum(SIZES.values()) - 2
    for path in bad:
        path.unlink()
    assert make_bank(load_manifest(str(folder)), root, SMALL).sha256 == bank.sha256


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_oblong_images_become_squares(fit: str, tmp_path: Path):
    """Stretched they have all three stripes, cropped the middle one alone, padded all of them between white bars."""
    folder, root = photos(tmp_path / "photos"), tmp_path / "root"
    bank = make_bank(load_manifest(str(folder), fit=fit), root, 12)
    pixels = np.where(np.load(bank.path)[0] > 128, 255, 0)
    middle, corner, side = pixels[6, 6], pixels[0, 0], pixels[6, 0]
    assert middle.tolist() == [0, 255, 0]
    assert side.tolist() == ([0, 255, 0] if fit == "crop" else [255, 0, 0])
    assert corner.tolist() == {"stretch": [255, 0, 0], "crop": [0, 255, 0], "pad": [255, 255, 255]}[fit]


def test_single_images_are_prepared_alike(tmp_path: Path):
    """The bank records the fit, a run's data take it from there, and ``prepare_image`` gives the bank's pixels."""
    folder, root = photos(tmp_path / "photos"), tmp_path / "root"
    bank = make_bank(load_manifest(str(folder), fit="crop"), root, SMALL)
    recipe = recipe_of(bank.name, bank.sha256, SMALL, root)
    assert recipe is not None
    assert recipe.fit == "crop"
    assert np.array_equal(prepare_image(folder / "ants" / "0.png", recipe), np.load(bank.path)[0])
    shape = {"n_way": 2, "k_shot": 1, "k_query": 1, "image_size": SMALL}
    about = live_data(str(folder), root, {**shape, "fit": "crop", "min_images": 3}).describe()
    assert about["image"]["fit"] == "crop"


def test_without_options_banks_are_described_as_before(tmp_path: Path):
    """Their JSON has no word of what is not asked for, so banks of earlier versions stay valid."""
    folder, root = photos(tmp_path / "photos"), tmp_path / "root"
    bank = make_bank(load_manifest(str(folder)), root, SMALL)
    description = read_description(bank.path.with_suffix(".json"))
    assert description["reader"] == {"type": "class-folders", "depth": 0, "splits": False, "damaged": "fail"}
    assert description["image"].keys() == {"size", "channels", "resampling", "invert", "upright"}


def test_other_options_make_another_bank(tmp_path: Path):
    """A bank of another fit is not taken for this one's."""
    folder, root = photos(tmp_path / "photos"), tmp_path / "root"
    stretched, cropped = (make_bank(load_manifest(str(folder), fit=fit), root, SMALL) for fit in ("stretch", "crop"))
    assert stretched.sha256 != cropped.sha256


def test_the_options_in_python(tmp_path: Path):
    """``build`` and ``live`` take them, with the same images."""
    folder, how = photos(tmp_path / "photos"), {"min_images": 3, "fit": "crop", "root": tmp_path / "root"}
    shape = {"n_way": 2, "k_shot": 1, "k_query": 2, "image_size": SMALL}
    archive = mamldata.build(folder, tmp_path / "out", episodes={"train": 2}, workers=1, **shape, **how)
    assert live(str(folder), **shape, **how).info.bank_sha256 == archive.bank_sha256


def test_they_are_for_folders_alone(tmp_path: Path):
    """A manifest says how its images are read; and values that make no sense are refused."""
    with pytest.raises(RequestError, match="min_images, fit: only for a folder of images; the manifest of glyphs says"):
        load_manifest("glyphs", min_images=3, fit="crop")
    with pytest.raises(RequestError, match="fit one of stretch, crop, pad, not 0 and 'squash'"):
        load_manifest(str(photos(tmp_path / "photos")), fit="squash")
