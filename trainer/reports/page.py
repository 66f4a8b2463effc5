"""A page of HTML that stands alone: templates, style and script of this folder, filled with plain values."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, Undefined
from markupsafe import Markup

from mamldata.errors import MamldataError, RequestError
from mamldata.io.atomic import make_folder, write_atomic
from mamldata.version import __version__
from mamldata.words import printable, shortened, size_text
from trainer.reports.plots import svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PICTURES = 3_000_000  # bytes of all pictures of a page, which stays below 5 MB with its words and drawings
_SUFFIXES = {".html", ".htm"}


def save_page(path: Path, template: str, content: Mapping[str, Any]) -> int:
    """Fill a template and write the page, whole or not at all; an earlier file of the name is replaced.

    Every text is escaped for HTML, its control characters as well, and a long one is shortened.

    Args:
        path: ends in ``.html`` or ``.htm``.
        template: its name in the folder ``templates``, without suffix.
        content: its values.

    Returns:
        The bytes of the page.

    Raises:
        RequestError: the name ends otherwise.
        WriteError: the place cannot be written to.
    """
    require_page(path)
    data = _render(template, content).encode()
    make_folder(path.parent)
    write_atomic(path, data)
    return len(data)


def require_page(path: Path) -> None:
    """Check that a file is named as a page is.

    Raises:
        RequestError: it is not.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise RequestError(f"{path}: reports are written as HTML. Choose a name that ends in .html.")


def _render(template: str, content: Mapping[str, Any]) -> str:
    folder = resources.files("trainer.reports") / "templates"
    style, script = (Markup((folder / name).read_text(encoding="utf-8")) for name in ("style.css", "script.js"))
    environment = Environment(
        loader=PackageLoader("trainer.reports"),
        autoescape=True,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(size=size_text, percent=_percent)
    # A browser runs no other script than ours, and loads nothing, even if a text got in unescaped.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    page = environment.get_template(f"{template}.html.j2")
    return page.render(content, style=style, script=script, script_digest=digest, version=__version__)


def _shown(value: Any) -> Any:
    """A value as it is written into the page; what is ready HTML stays, and what files may lack is left out."""
    if value is None or isinstance(value, Markup | Undefined):
        return "" if value is None else value
    return printable(shortened(str(value)), keep="\n")


def _percent(share: Any) -> str:
    return f"{100 * share:.2f}" if isinstance(share, int | float) else ""


def drawing(name: str, draw: Callable[[Axes], object]) -> Markup:
    """A drawing for a page, see ``trainer.reports.plots.svg``; empty if its numbers cannot be drawn."""
    try:
        return Markup(svg(draw, name))
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError):
        return Markup()


class Problems(list[str]):
    """What is wrong with the files of a page, one line each, in place of an error."""

    def without(self, make: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The result of ``make``; None, with the error noted once, if there is one that a user can understand."""
        try:
            return make(*args, **options)
        except MamldataError as error:
            if str(error) not in self:
                self.append(str(error))
            return None
