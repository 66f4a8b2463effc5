"""Manifests: the definition of a dataset as data. They are written in TOML, see ``docs/datasets.md``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mamldata.datasets.paths import DatasetFolder
from mamldata.errors import RequestError, did_you_mean
from mamldata.io.digest import sha256_bytes
from mamldata.readers.image import ReaderRecipe
from mamldata.sampling.splits import SplitScheme

COLLECTED = "images.tar"  # what an ImageCollection becomes under raw/
UNKNOWN = "unknown"  # stands for an ``ImageRecipe`` where none is recorded
PIN = "images.json"  # what was collected first


@dataclass(frozen=True)
class SourceFile:
    """One raw file: where to get it and how to verify it.

    Attributes:
        name: its file name under ``raw/``.
        bytes: its length; 0 if it is not published, which is only allowed for a file without addresses.
        sha256: the digest of its bytes, in hex; None if only an MD5 is published.
        urls: mirrors, tried in turn; empty for a generated file, and for one that must be fetched by hand.
        how: how to get it by hand.
        content_sha256: the digest of a zip's or tar's members (see ``content_sha256``), so that a
            repacked container with genuine members is also accepted.
        content_bytes: unpacked size of the members in bytes: the limit on reading a repacked container.
        generator: the name of the program that draws the file, for embedded datasets.
        md5: the MD5 of its bytes, in hex; only if there is no SHA-256.
    """

    name: str
    bytes: int
    sha256: str | None
    urls: tuple[str, ...] = ()
    content_sha256: str | None = None
    content_bytes: int | None = None
    generator: str | None = None
    md5: str | None = None
    how: str = ""


@dataclass(frozen=True)
class ImageForm:
    """One layout in which users have the images of a dataset; ``mamldata.fetching.collect`` reads it.

    Attributes:
        type: ``by-name``: files with the dataset's own names, in a folder, zip or tar. ``by-position``: the last
            ``digits`` digits of a name are the image's position in the sorted list of its class, from 1, in folders
            or tars named after the classes, or in one tar of such tars. ``pickled-arrays``: a pickle for each split
            with ``image_data`` and ``class_dict``.
        container: the name of the tar of tars.
        digits: of the position.
        files: for each split the possible names of its pickle.
    """

    type: str
    container: str = ""
    digits: int = 0
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageCollection:
    """Images without a published hash: collected from a place that the user names, checked, and pinned.

    Attributes:
        forms: their possible layouts, tried in turn.
        how: how to get them by hand.
        content_sha256: the content digest of the collected images, if it is known.
    """

    forms: tuple[ImageForm, ...]
    how: str
    content_sha256: str | None = None


# How images that are not square become so, in words.
FITS = {"stretch": "stretched", "crop": "cropped to their middle", "pad": "padded with white"}


@dataclass(frozen=True)
class ImageRecipe:
    """How a raw image becomes an image of the bank, in this order: upright, channels, fit and resize, invert.

    Attributes:
        size: default height and width in pixels.
        channels: 1 (grey) or 3 (RGB).
        resampling: the name of a Pillow filter.
        invert: replace each value v by 255 - v, so that ink is 255 and paper 0.
        upright: turn photographs by their EXIF orientation; published datasets were made without it.
        fit: a key of ``FITS``, how an image that is not square becomes a square: ``stretch`` changes its proportions,
            ``crop`` keeps its middle, ``pad`` keeps all of it on white.
        bank_sha256: the known digest of the bank for image sizes: a machine that computes other
            pixels gets an error instead of archives that compare with no others.
    """

    size: int
    channels: int
    resampling: str
    invert: bool
    bank_sha256: Mapping[int, str]
    upright: bool = False
    fit: str = "stretch"

    def to_json(self) -> dict[str, Any]:
        """What makes the pixels, as plain values: all but ``bank_sha256``; ``fit`` only if it is not ``stretch``."""
        left_out = {"bank_sha256"} | ({"fit"} if self.fit == "stretch" else set())  # files of earlier versions lack it
        return {key: value for key, value in vars(self).items() if key not in left_out}


@dataclass(frozen=True)
class Manifest:
    """A dataset: its files, how they are read, its split schemes. See ``docs/datasets.md`` for the TOML.

    Attributes:
        reference: how the user named it, a built-in name or a path, for commands in messages.
        images: images without a published hash; collected into ``raw/images.tar``.
        folder: the user's own folder of images, read in place; then there are no files.
    """

    reference: str
    name: str
    title: str
    version: str
    licence: str
    homepage: str
    citation: str
    files: tuple[SourceFile, ...]
    reader: ReaderRecipe
    image: ImageRecipe
    rotations: str
    split_scheme: str
    schemes: Mapping[str, SplitScheme]
    images: ImageCollection | None = None
    folder: Path | None = None

    @property
    def raw_names(self) -> tuple[str, ...]:
        """The file names under ``raw/`` once everything is fetched, in the order in which the reader gets them."""
        return tuple(file.name for file in self.files) + ((COLLECTED,) if self.images else ())

    def home(self, root: Path) -> DatasetFolder:
        """Where the dataset is kept under a data root. User folders of the same name at different paths stay apart."""
        if self.folder is None:
            return DatasetFolder(root, self.name)
        return DatasetFolder(root, f"{self.name}-{sha256_bytes(str(self.folder).encode())[:8]}")

    def scheme(self, name: str | None = None) -> SplitScheme:
        """The split scheme ``name``, or the default one.

        Raises:
            RequestError: there is no scheme of that name; the message lists the existing ones.
        """
        chosen = name or self.split_scheme
        if chosen not in self.schemes:
            raise RequestError(
                f"{self.name} has no split scheme {chosen!r}; it has: {', '.join(self.schemes)}."
                f"{did_you_mean(chosen, self.schemes)}"
            )
        return self.schemes[chosen]
