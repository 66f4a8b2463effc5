"""Readers: where the images of a dataset are inside its raw files. Files are read in place and never unpacked."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath

from mamldata.digest import reading_container, safe_member_name
from mamldata.errors import DamagedError
from mamldata.manifest import ReaderRecipe

_IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".pbm", ".pgm", ".ppm", ".bmp"})
_MOST_IMAGE_BYTES = 64 << 20  # no photograph is larger; a crafted member might be


@dataclass(frozen=True)
class ImageRef:
    """One image: its class and name, and the raw file and member that hold it."""

    class_name: str
    name: str
    file: Path
    member: str


@dataclass(frozen=True)
class ImageIndex:
    """All images of a dataset in canonical order: classes by path components, then images by name.

    Attributes:
        images: every image, the classes contiguous.
        class_names: the classes in order.
        class_sizes: the number of images of each.
    """

    images: tuple[ImageRef, ...]
    class_names: tuple[str, ...]
    class_sizes: tuple[int, ...]


def index_images(recipe: ReaderRecipe, files: Sequence[Path]) -> ImageIndex:
    """Find every image in the raw files.

    Raises:
        DamagedError: a file that the reader cannot read, or that holds no image.
    """
    found = sorted(_READERS[recipe.type](recipe, files), key=_canonical)
    if not found:
        raise DamagedError(f"No image in {', '.join(str(file) for file in files)}: is it the right file?")
    groups = [(name, len(list(group))) for name, group in groupby(found, key=lambda image: image.class_name)]
    return ImageIndex(tuple(found), tuple(name for name, _ in groups), tuple(size for _, size in groups))


def _canonical(image: ImageRef) -> tuple[tuple[str, ...], str]:
    return PurePosixPath(image.class_name).parts, image.name


def _class_folders(recipe: ReaderRecipe, files: Sequence[Path]) -> Iterator[ImageRef]:
    """Images in folders named after their class; the nearest ``depth`` folders are the name.

    The same class and image name twice, in one file or in two, is one image if the bytes are the same.
    """
    seen: dict[tuple[str, str], tuple[int, int, Path]] = {}
    for file in files:
        with reading_container(file), zipfile.ZipFile(file) as container:
            for info in container.infolist():
                path = PurePosixPath(safe_member_name(info.filename, str(file)))
                if info.is_dir() or not _is_image(path) or len(path.parts) <= recipe.depth:
                    continue
                class_name = "/".join(path.parts[-1 - recipe.depth : -1])
                known = seen.get((class_name, path.name))
                if known is None:
                    seen[class_name, path.name] = (info.CRC, info.file_size, file)
                    yield ImageRef(class_name, path.name, file, info.filename)
                elif known[:2] != (info.CRC, info.file_size):
                    raise DamagedError(
                        f"{file}: {info.filename} is not the image that {known[2].name} has under the same "
                        f"class and name ({class_name}/{path.name})."
                    )


def _is_image(path: PurePosixPath) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in _IMAGE_SUFFIXES and not hidden


_READERS: Mapping[str, Callable[[ReaderRecipe, Sequence[Path]], Iterator[ImageRef]]] = {
    "class-folders": _class_folders,
}


def read_members(images: Sequence[ImageRef]) -> Iterator[bytes]:
    """The encoded bytes of each image, in order; a container is opened once for a run of images in it.

    Raises:
        DamagedError: a member that cannot be read, or is too large to be an image.
    """
    for file, run in groupby(images, key=lambda image: image.file):
        with reading_container(file), zipfile.ZipFile(file) as container:
            for image in run:
                if container.getinfo(image.member).file_size > _MOST_IMAGE_BYTES:
                    raise DamagedError(f"{file}: {image.member} unpacks to more than 64 MiB; it is no image.")
                yield container.read(image.member)
