"""Write a manifest for a user's files, with their hashes, so that others can verify that they have the same files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path, PurePosixPath

from mamldata.datasets.image_folder import FOLDER_IMAGES, folder_name, lie_in_splits, seeded_counts
from mamldata.datasets.manifest import ImageForm, ImageRecipe, Manifest
from mamldata.datasets.toml import parse_manifest
from mamldata.errors import RequestError
from mamldata.fetching.collect import digest_images
from mamldata.fetching.layouts import find_images, list_images
from mamldata.fetching.receipts import Collected
from mamldata.io.atomic import make_folder, write_atomic
from mamldata.io.containers import ARCHIVE_SUFFIXES, MOST_IMAGE_BYTES, Member, list_members, read_members
from mamldata.io.content_digest import content_sha256
from mamldata.io.digest import sha256_file
from mamldata.io.images import open_image
from mamldata.progress import Progress, silent
from mamldata.readers.image import is_image
from mamldata.sampling.splits import SPLITS

_TABLES = tuple(f"{split}.csv" for split in SPLITS)
_GREY = frozenset({"1", "L", "LA", "I;16", "I;16B"})
_FORMS = (ImageForm("by-name"),)


@dataclass(frozen=True)
class _Layout:
    """How the images of a folder are arranged.

    Attributes:
        reader: its name.
        splits: whether folders above the classes are the splits.
        classes: their names, if they come from folders.
        depth: how many folders make up a class's name, if it comes from folders; 0 for all.
        image: what the images become in a bank.
    """

    reader: str
    splits: bool
    classes: tuple[str, ...]
    depth: int
    image: ImageRecipe


def write_manifest(folder: Path, out: Path, name: str | None = None, progress: Progress = silent) -> Manifest:
    """Write a manifest for the files in a folder: archives and CSV split files, or loose images.

    Archives and split files are listed with their digests. Loose images, in folders of classes or named by split files,
    become a collection with one content digest.

    Args:
        folder: the folder with the files, as ``fetch`` will find them.
        out: the TOML file; it must not exist yet.
        name: of the dataset; taken from the folder's name if None.
        progress: told of images.

    Returns:
        The manifest, as it will be read.

    Raises:
        RequestError: there are no images that a reader could read, or ``out`` exists.
        DamagedError: a file cannot be read.
        WriteError: ``out`` cannot be written.
    """
    if out.exists():
        raise RequestError(f"{out} already exists. Delete it, or choose another file.")
    if not folder.is_dir():
        raise RequestError(f"{folder} is not a folder.")
    tables = [folder / table for table in _TABLES if (folder / table).is_file()]
    archives = sorted(path for path in folder.iterdir() if path.is_file() and path.name.endswith(ARCHIVE_SUFFIXES))
    layout = _layout(folder, tables, archives)
    text = "\n".join(_text(name or folder_name(folder), folder, tables, archives, layout))
    if not archives:
        draft = parse_manifest(text.encode(), str(out), out.parent)
        collected = _collected(draft, folder, progress)
        digest = f"content_sha256 = {_quoted(collected.content_sha256)}  # of {collected.images:,} images"
        text = text.replace(_NO_DIGEST, digest)
    manifest = parse_manifest(text.encode(), str(out), out.parent)
    make_folder(out.absolute().parent)
    write_atomic(out, text.encode())
    return manifest


_NO_DIGEST = "# no digest yet"


def _collected(draft: Manifest, folder: Path, progress: Progress) -> Collected:
    found = find_images(_FORMS, folder)
    if found is None:
        raise RequestError(f"There are no images in {folder}.")
    return digest_images(draft, found, folder, progress)


def _layout(folder: Path, tables: Sequence[Path], archives: Sequence[Path]) -> _Layout:
    images = _images(folder, archives)
    if not images:
        raise RequestError(f"There are no images in {folder} or its archives: nothing to write a manifest for.")
    if tables and len(tables) < len(_TABLES):
        raise RequestError(f"{folder} has {tables[0].name}, but not all of {', '.join(_TABLES)}.")
    # If the folder can be used as a dataset directly, the manifest describes that same dataset.
    image = _recipe(_first(images[0])) if tables or archives else FOLDER_IMAGES
    if tables:
        return _Layout("csv-splits", splits=True, classes=(), depth=0, image=image)
    homes = sorted({home for _, member in images if (home := PurePosixPath(member.name).parts[:-1])})
    if not homes:
        raise RequestError(
            f"The images in {folder} have no classes: put them into folders named after their classes, or add "
            f"{', '.join(_TABLES)}."
        )
    wrapper = _wrapper(homes) if archives else ()
    inner = [home[len(wrapper) :] for home in homes]
    splits = lie_in_splits(inner, folder)
    lengths = {len(home) - splits for home in inner}
    depth = lengths.pop() if wrapper and len(lengths) == 1 else 0
    if wrapper and splits and not depth:
        raise RequestError(
            f"The classes in {folder} lie at different depths below {'/'.join(wrapper)}/train, val "
            f"and test: pack the archives without {'/'.join(wrapper)}."
        )
    classes = tuple("/".join(home[int(splits) :]) for home in (inner if depth or splits else homes))
    return _Layout("class-folders", splits, classes, depth, image)


def _images(folder: Path, archives: Sequence[Path]) -> list[tuple[Path, Member]]:
    """The images that the dataset will have: those in the archives, or else the loose ones."""
    if archives:
        return [(box, member) for box in archives for member in list_members(box) if is_image(member.name)]
    found = find_images(_FORMS, folder)
    # Their faults are reported when they are hashed.
    items = list_images(found, None, lambda _: None) if found else []
    return [(item.file, item.member) for item in items if item.member]


def _wrapper(homes: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The folders common to all classes, such as the name of the packed folder; ``homes`` are sorted."""
    pairs = takewhile(lambda pair: pair[0] == pair[1] and pair[0] not in SPLITS, zip(homes[0], homes[-1], strict=False))
    return tuple(name for name, _ in pairs)[: min(map(len, homes)) - 1]


def _first(image: tuple[Path, Member]) -> bytes:
    ((_, data),) = read_members(image[0], [image[1]], MOST_IMAGE_BYTES)
    return data if isinstance(data, bytes) else b""


def _text(name: str, folder: Path, tables: Sequence[Path], archives: Sequence[Path], layout: _Layout) -> Iterator[str]:
    yield from (
        "# Fill in title, licence, homepage and citation. Everything else decides what banks and archives will be.",
        'format = "mamldata-manifest/1"',
        f"name = {_quoted(name)}",
        f"title = {_quoted(f'The images of {folder.resolve().name}')}",
        'version = "1"',
        'licence = "to be filled in"',
        'homepage = "to be filled in"',
        'citation = "to be filled in"',
        'rotations = "none"',
        f"split_scheme = {_quoted(_scheme(layout))}",
        "",
    )
    for path in [*tables, *archives]:
        yield from _file(path)
    if not archives:
        yield from ("[images]", 'how = "to be filled in: where to get the images"', _NO_DIGEST, "")
    yield from ("[reader]", f"type = {_quoted(layout.reader)}")
    if layout.reader == "class-folders" and layout.splits:
        yield "splits = true"
    if layout.classes:
        named = f"{layout.depth or 'all'} folders above its images" if layout.depth != 1 else "the folder of its images"
        yield f"depth = {layout.depth}  # a class is called by {named}, such as {_quoted(layout.classes[0])}"
    yield from (
        "",
        "[image]",
        f"size = {layout.image.size}",
        f"channels = {layout.image.channels}",
        f"resampling = {_quoted(layout.image.resampling)}",
        "invert = false",
        "upright = true  # as the camera noted",
        "",
    )
    yield from _splits(layout)


def _file(path: Path) -> Iterator[str]:
    yield from ("[[files]]", f"name = {_quoted(path.name)}", "urls = []  # where it can be downloaded, if anywhere")
    yield from (f"bytes = {path.stat().st_size}", f"sha256 = {_quoted(sha256_file(path))}")
    if path.name.endswith(ARCHIVE_SUFFIXES):
        size = sum(member.size for member in list_members(path))
        yield f"content_sha256 = {_quoted(content_sha256(path, size))}"
        yield f"content_bytes = {size}"
    yield ""


def _recipe(sample: bytes) -> ImageRecipe:
    """The recipe of a folder, but with the images' own size if that is smaller, and grey if they are grey."""
    try:
        with open_image(sample) as image:
            size, channels = min(FOLDER_IMAGES.size, *image.size), 1 if image.mode in _GREY else 3
    except ValueError:
        return FOLDER_IMAGES
    return replace(FOLDER_IMAGES, size=size, channels=channels)


def _scheme(layout: _Layout) -> str:
    """The split scheme's name, on which the episodes of a seed depend."""
    if not layout.splits:
        return "seeded"
    return "folders" if layout.reader == "class-folders" else "files"


def _splits(layout: _Layout) -> Iterator[str]:
    if layout.splits:
        yield from (f"[splits.{_scheme(layout)}]", 'description = "as the files say"', 'by = "files"', "")
        return
    classes = len(layout.classes)
    if classes < len(SPLITS):
        raise RequestError(f"Train, val and test need at least one class each; the images have {classes}.")
    counts = seeded_counts(classes)
    description = "/".join(map(str, counts.values())) + " classes at random"
    yield from ("[splits.seeded]", f"description = {_quoted(description)}")
    yield from ("seed = 0", *(f"{split} = {count}" for split, count in counts.items()), "")


def _quoted(text: str) -> str:
    return json.dumps(text)  # every JSON string is a TOML string
