"""How long operations report progress: the library counts, and its caller draws bars and prints lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], object]  # called with the number of units just done
Notify = Callable[[str], object]  # called with a line of text


class Progress(Protocol):
    """Called as ``progress(label, total, unit)``; returns a context manager that yields ``advance(n)``.

    ``unit`` is ``"B"`` for bytes, else a plural noun such as ``"images"``; ``total`` is None when unknown.
    """

    def __call__(self, label: str, total: int | None, unit: str, /) -> AbstractContextManager[Advance]:
        """Start one bar."""
        ...


@contextmanager
def silent(label: str, total: int | None, unit: str, /) -> Iterator[Advance]:  # noqa: ARG001
    """The default: no output at all."""
    yield lambda _: None


def silence(line: str) -> None:
    """The default of ``notify``: the line is dropped."""
