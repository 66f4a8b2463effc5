"""Split files in MiniImagenet's format: a CSV for each split, with the header ``filename,label``."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mamldata.errors import Fault, Report
from mamldata.io.atomic import MOST_TEXT, read_whole
from mamldata.io.containers import Member, is_inside

HEADER = ["filename", "label"]
_MOST_LINES = 1 << 21  # ImageNet has 1.28 million images


@dataclass(frozen=True)
class Row:
    """One image that a split file names, with the file and line."""

    filename: str
    label: str
    split: str
    file: str
    line: int

    @property
    def place(self) -> str:
        """The file and line, for messages."""
        return f"{self.file}, line {self.line}"

    def missing(self) -> Fault:
        """The fault that the image does not exist."""
        return Fault("missing", f"{self.place}: there is no image {self.filename}")


def read_rows(path: Path, split: str, report: Report) -> list[Row]:
    """The valid rows of a split file; every other row is reported with its line."""
    try:
        text = read_whole(path, MOST_TEXT).decode("utf-8-sig")
    except OSError as error:
        report(Fault("table", f"{path.name}: it cannot be read ({error.strerror})"))
        return []
    except UnicodeDecodeError as error:
        report(Fault("table", f"{path.name}: not UTF-8 text ({error})"))
        return []
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    try:
        header = next(lines, [])
        if header != HEADER:
            report(Fault("table", f"{path.name}, line 1: the header is {','.join(header)!r}, not {','.join(HEADER)!r}"))
            return []
        for fields in lines:
            if lines.line_num > _MOST_LINES:
                report(Fault("table", f"{path.name}: more than {_MOST_LINES:,} lines"))
                return []
            if fields:
                rows += _row(fields, split, path.name, lines.line_num, report)
    except csv.Error as error:
        report(Fault("table", f"{path.name}, line {lines.line_num}: {error}"))
    if not rows:
        report(Fault("table", f"{path.name}: it names no image"))
    return rows


def _row(fields: list[str], split: str, file: str, line: int, report: Report) -> Iterator[Row]:
    place = f"{file}, line {line}"
    if len(fields) != len(HEADER):
        report(Fault("table", f"{place}: {len(fields)} fields, expected a file name and a label"))
    elif not all(fields):
        report(Fault("table", f"{place}: the {HEADER[fields.index('')]} is empty"))
    elif not is_inside(fields[0]):
        report(Fault("table", f"{place}: {fields[0]!r} points outside the images' folder"))
    elif not is_inside(fields[1]):
        report(Fault("table", f"{place}: {fields[1]!r} is not a valid class name"))
    else:
        yield Row(fields[0], fields[1], split, file, line)


def check_classes(rows: Iterable[Row], report: Report) -> None:
    """Report images named twice, and classes in two splits; those of an episode must all differ."""
    images: dict[str, Row] = {}
    classes: dict[str, Row] = {}
    told = set()
    for row in rows:
        first = images.setdefault(row.filename, row)
        if first is not row:
            report(Fault("table", f"{row.place}: {row.filename} is already in {first.place}"))
        home = classes.setdefault(row.label, row)
        if home.split != row.split and (row.label, row.split) not in told:
            told.add((row.label, row.split))
            report(
                Fault("class", f"{row.place}: the class {row.label} is also in {home.place}, which is another split")
            )


class MembersByName:
    """Members of files, by the names that split files give them.

    Args:
        members: each with the file that holds it.
    """

    def __init__(self, members: Iterable[tuple[Path, Member]]) -> None:
        self._by_last_part: dict[str, list[tuple[Path, Member]]] = {}
        for file, member in members:
            self._by_last_part.setdefault(PurePosixPath(member.name).name, []).append((file, member))

    def find(self, name: str) -> list[tuple[Path, Member]]:
        """All members whose path ends in ``name``; if the path of one equals it, only those."""
        alike = self._by_last_part.get(PurePosixPath(name).name, [])
        found = [pair for pair in alike if f"/{pair[1].name}".endswith(f"/{name}")]
        return [pair for pair in found if pair[1].name == name] or found
