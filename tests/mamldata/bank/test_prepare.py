"""Images of one's own become the pixels that a bank has of the same files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mamldata.bank.format import Bank, read_description
from mamldata.bank.make import make_bank
from mamldata.bank.prepare import prepare_image, recipe_of
from mamldata.datasets.load import load_manifest
from mamldata.datasets.manifest import ImageRecipe, Manifest
from mamldata.errors import RequestError
from mamldata.readers.image import read_images
from mamldata.readers.index import index_images

RECIPE = ImageRecipe(size=8, channels=3, resampling="bilinear", invert=False, bank_sha256={})


def photos(folder: Path) -> list[Path]:
    """Made-up photographs of several shapes, modes and formats, three with a camera's note of how they are turned."""
    chance = np.random.default_rng(5)
    paths = []
    for number, (suffix, mode, turned) in enumerate(
        [("png", "RGB", 1), ("jpg", "RGB", 6), ("png", "RGBA", 1), ("png", "L", 1), ("jpg", "RGB", 8), ("jpg", "L", 3)]
    ):
        path = folder / f"class{number % 3}" / f"{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        notes = Image.Exif()
        notes[274] = turned
        pixels = chance.integers(0, 256, (20 + number, 31, 4), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path, exif=notes)
        paths.append(path)
    return sorted(paths)


def test_embedded_drawings_are_the_rows_of_their_bank(
    glyphs_manifest: Manifest, glyphs_root: Path, glyphs_bank: Bank
) -> None:
    """All 28 by 28 pixels of each, from the bytes of its file: by the recipe in the bank's own description."""
    raw = glyphs_manifest.home(glyphs_root).raw
    index = index_images(glyphs_manifest.reader, [raw / name for name in glyphs_manifest.raw_names])
    recipe = recipe_of("glyphs", glyphs_bank.sha256, 28, glyphs_root)
    assert recipe is not None
    rows = glyphs_bank.open_images()
    some = index.images[:: len(index.images) // 50]
    for position, data in read_images(some):
        assert isinstance(data, bytes)
        row = position * (len(index.images) // 50)
        assert np.array_equal(prepare_image(data, recipe), rows[row])


def test_photographs_are_the_rows_of_their_bank(tmp_path: Path) -> None:
    """Colour, transparency and turning by the camera's notes, from the files of a user's own folder."""
    paths = photos(tmp_path / "photos")
    manifest = load_manifest(str(tmp_path / "photos"))
    bank = make_bank(manifest, tmp_path / "root", 12)
    recipe = recipe_of(bank.name, bank.sha256, 12, tmp_path / "root")
    assert recipe is not None
    assert recipe.to_json() == read_description(bank.path.with_suffix(".json"))["image"]
    assert recipe.upright  # photographs are turned, published datasets are not
    rows = [prepare_image(path, recipe) for path in paths]
    assert np.array_equal(np.stack(rows), bank.open_images())
    plain = [
        prepare_image(path, ImageRecipe(**{**recipe.to_json(), "upright": False}, bank_sha256={})) for path in paths
    ]
    assert sum(not np.array_equal(*pair) for pair in zip(rows, plain, strict=True)) == 3


def test_a_recipe_is_only_that_of_the_same_bank(tmp_path: Path, glyphs_bank: Bank) -> None:
    """Another digest, size or name, a damaged description, or an empty root: None, and never a guess."""
    photos(tmp_path / "photos")
    root = tmp_path / "root"
    bank = make_bank(load_manifest(str(tmp_path / "photos")), root, 12)
    assert recipe_of(bank.name, bank.sha256, 12, root)
    assert recipe_of(bank.name, glyphs_bank.sha256, 12, root) is None
    assert recipe_of(bank.name, bank.sha256, 13, root) is None
    assert recipe_of("phot", bank.sha256, 12, root) is None
    assert recipe_of(bank.name, bank.sha256, 12, tmp_path / "nothing") is None
    description = bank.path.with_suffix(".json")
    content = json.loads(description.read_bytes())
    content["image"]["invert"] = True
    description.write_text(json.dumps(content))
    assert recipe_of(bank.name, bank.sha256, 12, root) is None


def test_a_pinned_digest_needs_no_bank(tmp_path: Path, glyphs_manifest: Manifest, glyphs_bank: Bank) -> None:
    """The built-in manifest that pins the bank's digest tells the recipe, at that size alone."""
    found = recipe_of("glyphs", glyphs_bank.sha256, 28, tmp_path)
    assert found is not None
    assert found.to_json() == glyphs_manifest.image.to_json()
    assert recipe_of("glyphs", glyphs_bank.sha256, 29, tmp_path) is None


@pytest.mark.parametrize("kind", ["missing", "text", "cut"])
def test_what_is_not_an_image_is_refused_by_its_name(tmp_path: Path, kind: str) -> None:
    """A file that is not there, is no image, or is damaged."""
    path = tmp_path / "mine.png"
    stream = io.BytesIO()
    Image.new("RGB", (30, 30)).save(stream, "PNG")
    if kind != "missing":
        path.write_bytes(b"no image" if kind == "text" else stream.getvalue()[:60])
    with pytest.raises(RequestError, match=r"mine\.png cannot be (read|prepared)"):
        prepare_image(path, RECIPE)


def test_pixels_are_prepared_like_files() -> None:
    """An array is resized and inverted as the file with the same pixels is."""
    pixels = np.random.default_rng(1).integers(0, 256, (11, 17, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    inverted = ImageRecipe(**{**RECIPE.to_json(), "invert": True}, bank_sha256={})
    assert np.array_equal(prepare_image(pixels, RECIPE), prepare_image(stream.getvalue(), RECIPE))
    assert np.array_equal(prepare_image(pixels, inverted), 255 - prepare_image(pixels, RECIPE))
