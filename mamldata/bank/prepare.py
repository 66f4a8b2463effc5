"""Prepare single images as a bank's were: for a network that was trained on that bank, and gets images of one's own."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from PIL import Image

from mamldata.bank.decode import decode_image
from mamldata.bank.format import read_description
from mamldata.datasets.load import load_manifest
from mamldata.datasets.manifest import ImageRecipe
from mamldata.datasets.paths import data_root
from mamldata.datasets.toml import builtin_names
from mamldata.errors import DamagedError, DataMissingError, RequestError
from mamldata.io.atomic import read_whole
from mamldata.io.containers import MOST_IMAGE_BYTES
from mamldata.io.images import Images

AnyImage = str | os.PathLike[str] | bytes | Images | Image.Image


def prepare_image(image: AnyImage, recipe: ImageRecipe) -> Images:
    """An image as a bank of this recipe holds it: uint8 ``[size, size, channels]``.

    Args:
        image: a file, the bytes of one, an image of Pillow's, or pixels, uint8 ``[H, W, 3]``.
        recipe: such as ``recipe_of`` finds, or ``trainer.load_run(...).image``.

    Raises:
        RequestError: it is not an image, is damaged, or has too many pixels.
    """
    name = "The image"
    try:
        if isinstance(image, str | os.PathLike):
            name = os.fspath(image)
            image = read_whole(Path(image), MOST_IMAGE_BYTES)
        return decode_image(
            image, recipe.size, recipe.channels, recipe.resampling, recipe.invert, recipe.upright, recipe.fit
        )
    except OSError as error:
        raise RequestError(f"{name} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise RequestError(f"{name} cannot be prepared: {error}.") from error


def recipe_of(
    dataset: str, bank_sha256: str, size: int, root: str | os.PathLike[str] | None = None
) -> ImageRecipe | None:
    """How the images of a bank were prepared, if this machine can prove it; None otherwise.

    Args:
        dataset: the dataset's name.
        bank_sha256: the bank's digest, which archives hold, too.
        size: height and width of its images, in pixels.
        root: the data root, where a bank of this digest tells its recipe. A built-in manifest tells it without a
            bank, if it pins this digest.
    """
    if dataset in builtin_names() and (image := load_manifest(dataset).image).bank_sha256.get(size) == bank_sha256:
        return replace(image, size=size)
    for path in sorted(data_root(root).glob(f"*/*-{size}.json")):
        if path.name.startswith(dataset):  # the folder of a user's own images has a suffix
            with suppress(DamagedError, DataMissingError, OSError):
                description = read_description(path)
                if description["name"] == dataset and description["sha256"] == bank_sha256:
                    return ImageRecipe(**description["image"], bank_sha256={})
    return None
