"""The site, built by `make docs`: MyST reads the pages as GitHub does, autodoc and sphinx-click write the reference."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from cli.main import VERBS
from mamldata.version import __version__

project = "mamldata"
version = release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
exclude_patterns = ["_build"]

myst_heading_anchors = 4  # links such as page.md#a-heading, as on GitHub
highlight_language = "none"  # of indented blocks
nb_execution_mode = "force"  # the notebooks are stored without outputs; a failing cell fails the build
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_execution_show_tb = True
nb_execution_in_temp = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as a list: those of a NamedTuple are members too, and would be there twice

html_theme = "furo"  # its fonts are the reader's own: nothing is fetched from elsewhere, and file:// works
html_title = f"mamldata {version}"
html_show_copyright = False
html_show_sphinx = False

for _verb in VERBS:  # sphinx-click names a command's headings and anchors after it; all are called `command` at home
    import_module(f"cli.commands.{_verb}").command.name = _verb


def _as_rst(_app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings show code by indenting it after a colon, as Markdown does; reStructuredText wants two colons."""
    lines[:] = re.sub(r"(?m):\n\n(?=    )", "::\n\n", "\n".join(lines)).split("\n")


def setup(app: Any) -> None:
    """Connect the translation of docstrings."""
    app.connect("autodoc-process-docstring", _as_rst)
