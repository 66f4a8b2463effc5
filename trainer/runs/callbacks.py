"""Callbacks: where the metrics of a run go besides ``metrics.jsonl``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from trainer.runs.folder import RunResult


class Callback:
    """Receives a run's start, its metrics and its end. Subclasses override what they need; here nothing happens.

    Only the first process of a run calls it. If it raises an error, training goes on: the first error of each callback
    becomes a warning, and it is called again with the next row.
    """

    def start(self, settings: dict[str, Any], data: dict[str, Any], run_dir: Path) -> None:
        """The run begins or resumes.

        Args:
            settings, data: as in ``config.json``.
            run_dir: the run's folder.
        """

    def row(self, row: dict[str, Any]) -> None:
        """A row of ``metrics.jsonl``: its ``event``, ``train`` or ``val``, its ``step``, and what was measured.

        A resumed run computes again what came after its checkpoint, but gives no row again that the file held.
        """

    def end(self, outcome: RunResult | BaseException) -> None:
        """The run ends with its result; or with an error, which is a ``StoppedError`` if it can be resumed."""


class Callbacks:
    """Calls several callbacks; as a context manager, tells them of an error that ends the run.

    Args:
        callbacks: none in all processes but the first.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = callbacks
        self._warned: set[int] = set()

    def tell(self, what: str, *about: Any) -> None:
        """Call the method ``what`` of each, with dicts of its own, which it may change."""
        for place, callback in enumerate(self._callbacks):
            try:
                getattr(callback, what)(*(deepcopy(one) if isinstance(one, dict) else one for one in about))
            except Exception as error:
                if place not in self._warned:
                    self._warned.add(place)
                    warnings.warn(
                        f"The callback {type(callback).__name__} failed in {what}: {error!r}. Training goes on; its "
                        "further errors are not shown.",
                        stacklevel=2,
                    )

    def __enter__(self) -> Callbacks:
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if error is not None:
            self.tell("end", error)
