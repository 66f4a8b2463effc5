"""The reader ``webdataset``: shards of samples, each an image with its label beside it, in ``.cls`` or ``.json``.

It does not use the package ``webdataset``, which reads shards as streams and in order: images are listed first and
then read in place, by several processes, from files whose digests were verified.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from mamldata.errors import Fault, Report
from mamldata.io.containers import Member, is_inside, list_members, read_members
from mamldata.io.digest import parse_json
from mamldata.readers.image import ImageRef, Reader, ReaderRecipe, as_text, is_image, why_not
from mamldata.readers.left_out import Tally

_SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # webdataset: the key ends at the first dot of the name
_LABELS = ("cls", "json")  # in the order in which they count
_MOST_LABEL = 1 << 16  # bytes of a label's file
_MOST_NAME = 255  # letters of a class name


@dataclass
class _Sample:
    images: list[Member] = field(default_factory=list)
    labels: dict[str, Member] = field(default_factory=dict)


def _webdataset(recipe: ReaderRecipe, files: Sequence[Path], report: Report, tally: Tally) -> Iterator[ImageRef]:
    """Images with the label of their sample; their names are ``<shard>/<key>.<ending>``."""
    for file in files:
        labelled = dict(_labelled(file, _samples(file, tally), report))
        for member, data in read_members(file, labelled, _MOST_LABEL):
            image = labelled[member]
            name = f"{file.name}/{image.name}"
            try:
                class_name = _class_name(member.name, data, recipe.classes)
            except ValueError as error:
                report(Fault("image", f"{file}, {as_text(image.name)}: its label {as_text(member.name)} {error}"))
                continue
            yield ImageRef(class_name, as_text(name), file, image)


def _samples(file: Path, tally: Tally) -> dict[str, _Sample]:
    """The images and labels of a shard by their keys."""
    samples: dict[str, _Sample] = {}
    for member in list_members(file):
        match = _SAMPLE.fullmatch(member.name)
        ending = match[2].lower() if match else ""
        if match and ending in _LABELS:
            samples.setdefault(match[1], _Sample()).labels[ending] = member
        elif match and is_image(member.name):
            tally.take(member.name)
            samples.setdefault(match[1], _Sample()).images.append(member)
        else:
            tally.leave_out(member.name, why_not(member), in_class=False)
    return samples


def _labelled(file: Path, samples: dict[str, _Sample], report: Report) -> Iterator[tuple[Member, Member]]:
    """Each label that counts with its image; samples that have not one of each are reported."""
    for key, sample in samples.items():
        label = next((sample.labels[ending] for ending in _LABELS if ending in sample.labels), None)
        if len(sample.images) > 1:
            names = ", ".join(as_text(PurePosixPath(member.name).name) for member in sample.images[:3])
            report(Fault("layout", f"{file}: the sample {as_text(key)} has several images: {names}"))
        elif sample.images and label is None:
            report(
                Fault("image", f"{file}, {as_text(sample.images[0].name)}: it has no label, {key}.cls or {key}.json")
            )
        elif sample.images and label is not None:
            yield label, sample.images[0]


def _class_name(name: str, data: bytes | str, classes: Sequence[str]) -> str:
    """The class that a label names.

    Raises:
        ValueError: it names none; the message continues a sentence that begins with the label's file.
    """
    if isinstance(data, str):
        raise ValueError(f"cannot be read: {data}")
    try:
        label = parse_json(data)["label"] if name.lower().endswith(".json") else data.decode().strip()
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError('is not UTF-8 text, or not JSON with a "label"') from error
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ValueError("is neither a whole number nor a name")
    text = str(label)
    if not 0 < len(text) <= _MOST_NAME or not text.isprintable() or not is_inside(text):
        raise ValueError("is not a valid class name")
    if not classes or text in classes:
        return text
    if text.isdecimal() and int(text) < len(classes):
        return classes[int(text)]
    raise ValueError(f"is {text}, which is neither one of the {len(classes)} classes nor the number of one, from 0 on")


READER = Reader("webdataset", ("classes", "damaged"), _webdataset)
