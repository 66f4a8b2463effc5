"""Words of messages: plurals, commands, and texts from files and servers made short and harmless."""

from __future__ import annotations

import shlex
from importlib.metadata import version

# What each extra of pyproject.toml installs. The project is on no index, so that its extras have no name there.
_EXTRAS = {
    "dask": "distributed",
    "higher": "higher",
    "plots": "matplotlib",
    "resnet": "torchvision",
    "s3": "s3fs",
    "tensorboard": "tensorboard",
    "vision": "torchvision",
}
_MOST = 1000  # characters of a line that is shown
_MOST_QUOTED = 200  # characters of a value that is quoted


def counted(number: int, one: str, several: str = "") -> str:
    """``1 shard``, ``2,000 shards``; ``several`` where the plural is not ``one`` and an s."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def size_text(size: int) -> str:
    """A size in bytes as people read it."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def printable(text: str, keep: str = "") -> str:
    """A text without what changes a terminal or cannot be encoded: such characters are escaped, except those kept."""
    if text.isprintable():
        return text
    return "".join(
        mark if mark.isprintable() or mark in keep else mark.encode("unicode_escape").decode() for mark in text
    )


def shortened(text: str, most: int = _MOST) -> str:
    """A text of at most ``most`` characters: of a longer one the beginning and the end."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def quoted(value: object) -> str:
    """A value of a file in Python's notation; of a long or nested one only its beginning, or its type."""
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= _MOST_QUOTED else f"{value[:_MOST_QUOTED]!r}…"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length():,} bits"
    return f"a {type(value).__name__}" if isinstance(value, list | dict) else repr(value)


def install_command(extra: str) -> str:
    """The command that installs what an extra of this project needs, and leaves torch as it is."""
    package = _EXTRAS[extra]
    # Every torchvision needs one certain torch, and pip would exchange the installed one for that of the newest.
    keep = f" torch=={version('torch')}" if package == "torchvision" else ""
    return f"pip install {package}{keep}"


def mamldata_command(verb: str, *words: object) -> str:
    """A command line of mamldata, quoted for a shell."""
    return shlex.join(["mamldata", verb, *map(str, words)])
