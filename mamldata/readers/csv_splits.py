"""The reader ``csv-splits``: ``train.csv``, ``val.csv`` and ``test.csv`` name the images and their classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mamldata.errors import Fault, Report
from mamldata.io.containers import Member, list_members
from mamldata.readers.image import ImageRef, Reader, ReaderRecipe
from mamldata.readers.left_out import Tally
from mamldata.readers.split_files import MembersByName, Row, check_classes, read_rows
from mamldata.sampling.splits import SPLITS


def _csv_splits(_recipe: ReaderRecipe, files: Sequence[Path], report: Report, _tally: Tally) -> Iterator[ImageRef]:
    """Images that ``train.csv``, ``val.csv`` and ``test.csv`` name, anywhere in the other files."""
    rows: list[Row] = []
    tables = {file.name: file for file in files if file.suffix == ".csv"}
    for split in SPLITS:
        if (table := tables.get(f"{split}.csv")) is None:
            report(Fault("layout", f"there is no {split}.csv among the raw files"))
        else:
            rows += read_rows(table, split, report)
    check_classes(rows, report)
    others = [file for file in files if file.suffix != ".csv"]
    members = MembersByName((file, member) for file in others for member in list_members(file))
    known: dict[tuple[Path, Member], Row] = {}
    for row in rows:
        matches = members.find(row.filename)
        if len(matches) == 1:
            file, member = matches[0]
            if (other := known.setdefault((file, member), row)).filename != row.filename:
                where = f"{other.filename} in {other.place}: {file.name}/{member.name}"
                report(Fault("layout", f"{row.place}: {row.filename} means the same image as {where}"))
                continue
            yield ImageRef(row.label, row.filename, file, member, split=row.split, asked=row.place)
        elif matches:
            places = ", ".join(f"{file.name}/{member.name}" for file, member in matches)
            report(Fault("layout", f"{row.place}: {row.filename} exists more than once: {places}"))
        else:
            report(row.missing())


READER = Reader("csv-splits", ("damaged",), _csv_splits)
