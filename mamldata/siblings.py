"""The packages installed beside this one, under names that others may use: ``cli``, ``trainer``, ``manifests``."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

NAMES = ("cli", "trainer", "manifests")


def foreign_siblings() -> Iterator[str]:
    """One message for each sibling that is missing, or that Python would import from elsewhere, with what to do.

    Nothing is imported. A file that another package has overwritten is recognized by its text: each of our
    ``__init__.py`` names mamldata.
    """
    here = Path(__file__).resolve().parent
    for name in NAMES:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            yield f"The folder {here.parent / name} is missing. Install mamldata again."
            continue
        found = Path(spec.origin).resolve()
        if found.parent != here.parent / name:
            yield (
                f"Python imports {name!r} from {found}, which is not part of mamldata: it hides {here.parent / name}. "
                "Rename that file, run the command from another folder, or take its folder out of PYTHONPATH."
            )
        elif "mamldata" not in found.read_text(encoding="utf-8", errors="replace"):
            yield (
                f"Another package has overwritten mamldata's {found} with its own. Install mamldata in an environment "
                "of its own."
            )
