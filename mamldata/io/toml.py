"""Read tables of a TOML file and collect every fault with its place."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection
from importlib.resources.abc import Traversable
from typing import Any

from mamldata.errors import ManifestError, did_you_mean
from mamldata.words import quoted


def toml_names(folder: Traversable) -> list[str]:
    """The TOML files of a folder, sorted and without their suffix."""
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_toml(data: bytes, source: str) -> dict[str, Any]:
    """Parse a TOML file; ``source`` is its name, for messages.

    Raises:
        ManifestError: it is not valid TOML.
    """
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not TOML, or a number of too many digits
        raise ManifestError(source, [f"not valid TOML: {error}"]) from error


class Table:
    """A TOML table being read: returns values by key and type, and collects every fault with its place.

    Args:
        values: the table.
        place: its place in the file, for messages; empty at the top.
        faults: the list to which faults are added.
    """

    def __init__(self, values: dict[str, Any], place: str, faults: list[str]) -> None:
        self.values = values
        self.place = place
        self.faults = faults
        self.known: set[str] = set()

    def fault(self, key: str, text: str) -> None:
        """Add what is wrong with the value of ``key`` to the faults."""
        self.faults.append(f"{self.at(key)}: {text}")

    def at(self, key: str) -> str:
        """The place of ``key`` in the file."""
        return f"{self.place}.{key}" if self.place else key

    def take(self, key: str, kind: type, default: Any = None, *, required: bool = True) -> Any:
        """The value of ``key`` if it is a ``kind``, else ``default``; a wrong or missing required value is a fault."""
        self.known.add(key)
        if key not in self.values:
            if required:
                self.fault(key, "is missing")
            return default
        value = self.values[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.fault(key, f"must be {_KINDS[kind]}, not {quoted(value)}")
            return default
        return value

    def text(self, key: str, check: Callable[[str], str | None] | None = None, *, required: bool = True) -> str:
        """A string that is not empty; ``check`` returns what is wrong with it, or None."""
        value: str = self.take(key, str, "", required=required)
        problem = check(value) if check and value else None
        if problem:
            self.fault(key, problem)
        if key in self.values and self.values[key] == "":
            self.fault(key, "is empty")
        return value

    def whole(self, key: str, minimum: int, maximum: int | None = None, *, required: bool = True) -> int:
        """An integer between bounds."""
        value: int = self.take(key, int, minimum, required=required)
        if value < minimum or (maximum is not None and value > maximum):
            limits = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
            self.fault(key, f"must be {limits}, not {quoted(value)}")
        return value

    def choice(self, key: str, choices: Collection[str], default: str | None = None) -> str:
        """One of several words; it may be missing if there is a default."""
        value: str = self.take(key, str, default or "", required=default is None)
        if value and value not in choices:
            self.fault(key, f"{quoted(value)} is not one of {', '.join(choices)}.{did_you_mean(value, choices)}")
        return value

    def table(self, key: str, *, required: bool = True) -> Table:
        """A table in this one."""
        # A missing table is one fault, not one for each of its keys.
        faults = self.faults if isinstance(self.values.get(key), dict) else []
        return Table(self.take(key, dict, {}, required=required), self.at(key), faults)

    def finish(self) -> None:
        """Report every key that was never read, so that misspelt options do not go unnoticed."""
        for key in self.values:
            if key not in self.known:
                self.fault(key, f"is not known here.{did_you_mean(key, self.known)}")


_KINDS = {str: "a string", int: "a whole number", bool: "true or false", list: "a list", dict: "a table"}
