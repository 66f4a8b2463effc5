"""How long work reports its progress: the library counts, whoever calls it draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Called as ``progress(label, total, unit)``; gives a context in which ``advance(n)`` counts.

    ``unit`` is ``"B"`` for bytes, else a plural noun such as ``"images"``; ``total`` is None when unknown.
    """

    def __call__(self, label: str, total: int | None, unit: str, /) -> AbstractContextManager[Callable[[int], object]]:
        """Start one bar."""
        ...


@contextmanager
def silent(label: str, total: int | None, unit: str, /) -> Iterator[Callable[[int], object]]:  # noqa: ARG001
    """The default: no output at all."""
    yield lambda _: None
