"""What the pages promise about themselves, and that the runner of their code finds faults."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from sybil import Document

from mamldata.archive.benchmarks import benchmark
from tests.docs import blocks

PROJECT = blocks.PROJECT
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((PROJECT / "docs" / "notebooks").glob("*.ipynb"))


def shell(text: str) -> list:
    """The shell blocks of a page with this text."""
    page = Document(text, "page.md")
    for region in blocks.shell_blocks(page):
        page.add(region)
    return list(page.examples())


def test_the_runner_finds_fenced_and_indented_commands():
    """Each block of commands is found; blocks of data and of Python are left to others."""
    others = "```text\nthree\n```\n\n```python\nfour\n```\n"
    found = shell(f"Text\n\n    mamldata one\n\n```bash\nmamldata two\n```\n\n{others}")
    assert [(example.line, example.parsed) for example in found] == [(3, "mamldata one\n"), (5, "mamldata two\n")]


def test_a_wrong_command_fails():
    """With what it printed and its message."""
    (example,) = shell("    mamldata build --benchmark gliphs-5w1s\n")
    with pytest.raises(AssertionError, match="There is no benchmark 'gliphs-5w1s'"):
        example.evaluate()


@pytest.mark.parametrize("text", ["    make demo\n", "```\nCtrl-C\n```\n"])
def test_other_commands_are_not_skipped_silently(text: str):
    """A block that is not ours has to be marked."""
    with pytest.raises(ValueError, match="mark this block"):
        shell(text)[0].evaluate()


def test_a_block_says_what_it_is():
    """A language that nothing knows is a fault, as it would be left out."""
    with pytest.raises(ValueError, match=r"page\.md:3: .*'pyhton'"):
        shell("Text\n\n```pyhton\n1\n```\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_smaller_pages_keep_their_lines(page: Path):
    """So that a failure names the line of the page, and what is said of Omniglot is done with the glyphs."""
    text = page.read_text(encoding="utf-8")
    smaller = blocks.OnGlyphs(text, str(page)).text
    assert smaller.count("\n") == text.count("\n")
    assert not re.search(r"(fetch|build|train) omniglot\b(?!-)", smaller)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    """Every relative link is a file of the project. (The site's builder checks headings.)"""
    for place in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / place).exists(), f"{page.name}: {place}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_stored_without_outputs(notebook: Path):
    """The site's builder runs them, so what readers see is today's."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")


def test_the_first_screen_has_the_pinned_digest():
    """The digest that readers of the README can check is the benchmark's."""
    digests = re.findall(r"digest sha256:(\w+)", (PROJECT / "README.md").read_text(encoding="utf-8"))
    assert set(digests) == {benchmark("omniglot-5w1s").sha256}
