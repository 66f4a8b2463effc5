"""Count the files of a dataset that are not used as images: how many, why, and some of their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal, get_args

Why = Literal["no image", "no class", "unreadable", "hidden", "folder without images", "few images", "damaged"]
_WORDS: Mapping[Why, tuple[str, str]] = {  # of one, of several
    "no image": ("file that is not read as an image", "files that are not read as images"),
    "no class": ("image outside all class folders", "images outside all class folders"),
    "unreadable": ("link or folder that cannot be followed", "links or folders that cannot be followed"),
    "hidden": ("hidden file", "hidden files"),
    "folder without images": ("folder of files without any image", "folders of files without any image"),
    "few images": ("class with too few images", "classes with too few images"),
    "damaged": ("image that is missing or cannot be read", "images that are missing or cannot be read"),
}
_JUNK = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})
_MOST_NAMES = 3
_MOST_ENDINGS = 8
_MOST_LETTERS = 100  # of a name


@dataclass(frozen=True)
class LeftOut:
    """Files that were left out for one reason.

    Attributes:
        why: the reason.
        count: number of files, of folders for ``folder without images``, or of classes for ``few images``.
        endings: number of files with each of the most frequent endings, if endings are the reason.
        names: of the first few.
    """

    why: Why
    count: int
    endings: Mapping[str, int] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        one, several = _WORDS[self.why]
        text = f"{self.count:,} {one if self.count == 1 else several}"
        if self.endings:
            text += f" ({', '.join(f'{ending} {count:,}' for ending, count in self.endings.items())})"
        if self.names:
            text += f": {', '.join(self.names)}{', …' if self.count > len(self.names) else ''}"
        return text

    def to_values(self) -> dict[str, Any]:
        """The values as they are stored in JSON."""
        return {**asdict(self), "names": list(self.names)}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> LeftOut:
        """The inverse of ``to_values``."""
        return cls(values["why"], values["count"], values["endings"], tuple(values["names"]))


class Tally:
    """Records which files a reader takes and which it leaves out."""

    def __init__(self) -> None:
        self._left_out: dict[Why, list[str]] = {why: [] for why in get_args(Why)}
        self._folders: dict[str, None] = {}  # of left-out files, where images of a class could be
        self._full: set[str] = {""}  # folders of images, and their parents

    def take(self, name: str) -> None:
        """Record a file that is an image of a class."""
        folder = name.rpartition("/")[0]
        while folder not in self._full:
            self._full.add(folder)
            folder = folder.rpartition("/")[0]

    def leave_out(self, name: str, why: Why, *, in_class: bool) -> None:
        """Record a file that is left out; ``in_class``: it is where images of a class could be."""
        self._left_out[why].append(name)
        if in_class and why != "hidden":
            self._folders[name.rpartition("/")[0]] = None

    def groups(self) -> tuple[LeftOut, ...]:
        """What was left out, by reason."""
        bare = [folder for folder in self._folders if folder not in self._full]
        groups = {**self._left_out, "folder without images": bare}
        return tuple(group(why, names) for why, names in groups.items() if names)

    def __str__(self) -> str:
        """A sentence to append to a message; empty if nothing was left out."""
        text = "; ".join(map(str, self.groups()))
        return f" Left out: {text}" if text else ""


def group(why: Why, names: Sequence[str]) -> LeftOut:
    """Files left out for one reason, given by their names; damaged images by what is wrong with them."""
    endings = Counter(PurePosixPath(name).suffix.lower() or "no ending" for name in names if why == "no image")
    return LeftOut(
        why,
        len(names),
        {_shown(ending): count for ending, count in endings.most_common(_MOST_ENDINGS)},
        tuple(_shown(name) for name in names[:_MOST_NAMES] if why != "hidden"),
    )


def is_hidden(path: PurePosixPath) -> bool:
    """Whether a file is hidden, or the leftover of a file manager."""
    return any(part.startswith(".") or part in _JUNK for part in path.parts)


def _shown(name: str) -> str:
    """A name on one line: unprintable characters are escaped, and long names are cut off."""
    short = name if len(name) <= _MOST_LETTERS else f"{name[:_MOST_LETTERS]}…"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in short)
