"""The site, built by `make docs`: MyST reads the pages as GitHub does; autodoc and sphinx-click make the references."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from sphinx.ext.napoleon import Config, GoogleDocstring

from cli.main import VERBS
from mamldata.version import __version__

project = "mamldata"
version = release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_click"]

myst_heading_anchors = 4  # for links such as page.md#a-heading, as on GitHub
highlight_language = "none"  # of indented blocks
smartquotes = False  # they would turn --option into a dash
nb_execution_mode = "force"  # the notebooks are stored without outputs; a cell that fails, fails the build
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 300

autodoc_typehints = "description"  # beside the words, where signatures would be too long
autodoc_typehints_description_target = "documented"

html_theme = "furo"  # with the reader's own fonts: nothing is fetched from elsewhere, so the site works from a folder
html_title = f"mamldata {version}"
html_show_copyright = False
html_show_sphinx = False

# Attributes are described together, as "n_way, k_shot: ...", which Napoleon can do for parameters only.
_DOCSTRINGS = Config(napoleon_custom_sections=[("Attributes", "params_style")])

for _verb in VERBS:  # sphinx-click takes headings and anchors from a command's name; at home all are called `command`
    import_module(f"cli.commands.{_verb}").command.name = _verb


def _as_rst(_app: Any, _what: str, _name: str, thing: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings show code as Markdown does, indented after a colon, and have Google's sections."""
    text = re.sub(r"(?m):\n\n(?=    )", "::\n\n", "\n".join(lines))
    lines[:] = str(GoogleDocstring(text, _DOCSTRINGS, obj=thing)).replace("** -- ", "**: ").split("\n")


def _is_a_field(_app: Any, _what: str, _name: str, thing: Any, _skip: bool, _options: Any) -> bool | None:
    """Leave out the fields of named tuples, which their class's docstring describes."""
    return True if type(thing).__name__ == "_tuplegetter" else None


def setup(app: Any) -> None:
    """Connect both."""
    app.connect("autodoc-process-docstring", _as_rst)
    app.connect("autodoc-skip-member", _is_a_field)
