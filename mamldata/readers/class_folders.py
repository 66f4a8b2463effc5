"""The reader ``class-folders``: every image lies in a folder named after its class."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from mamldata.errors import Fault, Report
from mamldata.io.containers import MOST_IMAGE_BYTES, Member, list_members, read_members
from mamldata.readers.image import ImageRef, Reader, ReaderRecipe, as_text, is_image, why_not
from mamldata.readers.left_out import Tally
from mamldata.sampling.splits import SPLITS


def _class_folders(recipe: ReaderRecipe, files: Sequence[Path], report: Report, tally: Tally) -> Iterator[ImageRef]:
    """Images in folders named after their class: ``[split/]class/image``.

    Images with the same class, name and bytes, in one file or several, count as one.
    """
    seen: dict[tuple[str, str], list[ImageRef]] = {}
    homes: dict[str, dict[str, Path]] = {}
    for file in files:
        for member in list_members(file):
            path = PurePosixPath(member.name)
            split, class_name = _folders(recipe, path.parts[:-1])
            if not is_image(member.name) or not class_name:
                tally.leave_out(member.name, why_not(member), in_class=bool(class_name))
                continue
            tally.take(member.name)
            if recipe.splits and split not in SPLITS:
                report(Fault("layout", f"{file}, {member.name}: {split!r} is not one of {', '.join(SPLITS)}"))
                continue
            if as_text(class_name) != class_name:
                report(Fault("layout", f"{file}, {as_text(member.name)}: the name of its class is not UTF-8"))
                continue
            homes.setdefault(class_name, {})[split] = file
            image = ImageRef(class_name, path.name, file, member, split=split)
            alike = seen.setdefault((class_name, path.name), [])
            if not alike:
                yield image
            alike.append(image)
    _check_doubles([alike for alike in seen.values() if len(alike) > 1], report)
    for class_name, splits in homes.items():
        if len(splits) > 1:
            where = " and ".join(repr(split) for split in splits)
            report(Fault("class", f"{files[0]}: the class {class_name!r} is in {where}; splits share no class"))


def _check_doubles(doubles: Sequence[Sequence[ImageRef]], report: Report) -> None:
    """Report images with the class and name of another but different bytes. The first of each is used."""
    sums = _checksums([image for alike in doubles for image in alike])
    for first, *others in doubles:
        for image in others:
            mine, its = sums[id(image)], sums[id(first)]
            if isinstance(mine, str):
                report(image.fault(mine))
            elif (mine, image.member.size) != (its, first.member.size) and not isinstance(its, str):
                same = f"the image of the same class and name in {first.file.name}"
                where = f"{image.file}, {image.member.name}"
                report(Fault("layout", f"{where}: differs from {same} ({image.class_name}/{image.name})"))


def _checksums(images: Sequence[ImageRef]) -> dict[int, int | str]:
    """For the ``id`` of each image the CRC-32 of its bytes, which zips store, or why it cannot be read."""
    sums: dict[int, int | str] = {id(image): image.member.crc for image in images if image.member.crc is not None}
    unknown: dict[Path, list[ImageRef]] = {}
    for image in images:
        if id(image) not in sums:
            unknown.setdefault(image.file, []).append(image)
    for file, wanted in unknown.items():
        found: dict[Member, list[int | str]] = {}  # in a compressed tar, members of one name and size are equal
        for member, data in read_members(file, [image.member for image in wanted], MOST_IMAGE_BYTES):
            found.setdefault(member, []).append(data if isinstance(data, str) else zlib.crc32(data))
        sums |= {id(image): found[image.member].pop(0) for image in wanted}
    return sums


def _folders(recipe: ReaderRecipe, folders: tuple[str, ...]) -> tuple[str, str]:
    """The split and the class that an image's folders name; both empty if there are too few folders."""
    if len(folders) < (recipe.depth or 1) + recipe.splits:
        return "", ""
    start = len(folders) - recipe.depth if recipe.depth else int(recipe.splits)
    return folders[start - 1] if recipe.splits else "", "/".join(folders[start:])


READER = Reader("class-folders", ("depth", "splits", "damaged", "min_images"), _class_folders)
