"""Runs the code of the documentation, as `make test-docs` does: every Python block and every shell command of a page.

A pytest plugin on Sybil. Each page runs from top to bottom in a folder of its own, without a network, on the embedded
glyphs in place of Omniglot and with numbers as small as may be (``SMALLER``, ``FEWER``). A block that cannot run here
says why, where readers do not see it: ``<!-- skip: next "needs a GPU" -->``. Pytest's summary counts these by reason.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from PIL import Image
from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

from cli.main import main

PROJECT = Path(__file__).parents[2]
SERVER = pytest.StashKey[ThreadingHTTPServer]()
SHELL = {"", "bash", "console", "sh"}  # languages of fences; an indented block has none
DATA = {"bibtex", "json", "text", "toml"}

# What is said of Omniglot is done with the glyphs, and what is said of 4,000 steps with two.
SMALLER = {
    r"(?<![\w./-])(omniglot|omniglot-small|mini-imagenet|cub-200)(?![\w./-])": "glyphs",
    r" dtd ": " glyphs-5w1s ",
    r"--benchmark [\w-]+": "--benchmark glyphs-5w1s",
    r'build_benchmark\("[\w-]+"': 'build_benchmark("glyphs-5w1s"',
    r"(?<=--recipe )maml-mini-imagenet": "maml-omniglot",
    r"\b(steps|episodes)=\d+": r"\1=4",
    r"--(split-scheme|n-way|k-shot) \S+": "",
    r'"cuda"': '"cpu"',
}
ARCHIVES = ["omniglot-5w1s", "glyphs-5w1s", "mini-imagenet-5w1s", "ARCHIVE", "A", "B"]
# Options added to a command; the last one of a name counts.
FEWER = {
    "build": "--train 32 --val 8 --test 8",
    "compare": "--algorithms maml,random --steps 2 --meta-batch-size 2 --eval-every 2 --eval-episodes 2 --episodes 2",
    "eval": "--episodes 4 --inner-steps 1",
    "train": "--steps 2 --meta-batch-size 2 --eval-every 2 --eval-episodes 2",
}


class OnGlyphs(Document):
    """A page whose blocks speak of small things; its lines keep their numbers."""

    def __init__(self, text: str, path: str) -> None:
        for large, small in SMALLER.items():
            text = re.sub(large, small, text)
        super().__init__(text, path)


def shell_blocks(document: Document) -> Iterator[Region]:
    """Blocks of shell commands, fenced or indented.

    Raises:
        ValueError: a fence is in a language that nothing here knows, so that nothing would run it.
    """
    starts = [0, *(match.end() for match in re.finditer("\n", document.text)), document.end]
    for token in MarkdownIt().parse(document.text):
        if token.type not in {"fence", "code_block"} or token.map is None:
            continue
        first, end = token.map
        if token.info in SHELL:
            yield Region(starts[first], starts[end], token.content, run_shell)
        elif token.info not in DATA | {"python"} and not token.info.startswith("{"):
            raise ValueError(f"{document.path}:{first + 1}: say what kind of block this is; {token.info!r} is unknown")


def run_shell(example: Example) -> None:
    """Run the commands of a block one after the other in this process, where torch is imported already."""
    text = example.parsed.replace("\\\n", " ")
    lines = [re.split(r"\s>>?\s", line.removeprefix("$ "))[0] for line in text.splitlines()]
    for words in filter(None, (shlex.split(line, comments=True) for line in lines)):
        if words[0] != "mamldata":
            raise ValueError(f"only mamldata runs here, not {words[0]}: mark this block with its reason to skip it")
        run_words(words[1:])


def run_words(words: list[str]) -> None:
    """Run one command of ours, with options that keep it small."""
    if "--benchmark" not in words:
        words = [*words, *FEWER.get(words[0], "").split()]
    if "--out" in words and not {"--resume", "--shards"} & set(words):
        _make_room(Path(words[words.index("--out") + 1]))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main.main(words, prog_name="mamldata", standalone_mode=False)
        except Exception as error:
            raise AssertionError(f"mamldata {shlex.join(words)}\n{said.getvalue()}{error}") from error
    assert not code, f"mamldata {shlex.join(words)}\n{said.getvalue()}exit code {code}"


def _make_room(out: Path) -> None:
    """Remove what is there: the commands of a page are alternatives, and often name the same place."""
    if out.is_dir() and not out.is_symlink():
        shutil.rmtree(out)
    else:
        out.unlink(missing_ok=True)


class _Quiet(SimpleHTTPRequestHandler):
    """Serves the folder of the page that is running."""

    def log_message(self, *_: Any) -> None:  # type: ignore[override]
        pass


def pytest_configure(config: pytest.Config) -> None:
    """Take a port before pages are read, since their addresses become its own."""
    config.stash[SERVER] = ThreadingHTTPServer(("127.0.0.1", 0), _Quiet)
    SMALLER["https://example.org"] = f"http://127.0.0.1:{config.stash[SERVER].server_port}"


def pytest_unconfigure(config: pytest.Config) -> None:
    """Free the port."""
    config.stash[SERVER].server_close()


@pytest.fixture(scope="session")
def at_hand(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What pages presume: an archive under the names that they use, and a run with a result; and the server."""
    place = tmp_path_factory.mktemp("at-hand")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(place):
        patch.setenv("MAMLDATA_ROOT", str(tmp_path_factory.mktemp("root")))
        patch.setenv("MAMLDATA_CACHE", str(tmp_path_factory.mktemp("cache")))
        threading.Thread(target=pytestconfig.stash[SERVER].serve_forever, daemon=True).start()
        run_words(["fetch", "glyphs"])
        run_words(["build", "glyphs", "--out", ARCHIVES[0]])
        for name in ARCHIVES[1:]:
            Path(name).symlink_to(ARCHIVES[0])
        Path("train-00000.tar").symlink_to(Path(ARCHIVES[0], "train-00000.tar"))
        run_words(["train", ARCHIVES[0], "--out", "run"])
        run_words(["eval", "run", ARCHIVES[0]])
        (result,) = Path("run/results").iterdir()
        result.with_name("test-….json").symlink_to(result.name)  # as pages shorten it
        for file in ("mine.png", "my-classes/ant/1.png", "my-classes/bee/1.png", "unsorted/1.png", "unsorted/2.png"):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (105, 105), 255).save(file)
        for number in range(32 * 16):
            folder = Path(f"my-photos/{number % 32}")
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(folder / f"{number}.png")
        yield place
        pytestconfig.stash[SERVER].shutdown()


@pytest.fixture(scope="module")
def fresh(at_hand: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], None]]:
    """A folder for a page, with links to what is at hand. A hidden block may ask for one of them again."""

    def link(name: str) -> None:
        _make_room(place / name)
        (place / name).symlink_to(at_hand / name)

    place = tmp_path_factory.mktemp("page")
    for thing in at_hand.iterdir():
        link(thing.name)
    with contextlib.chdir(place):
        yield link


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), shell_blocks, SkipParser()],
    patterns=["README.md", "docs/*.md"],
    excludes=["docs/guide.md"],  # tests/test_guide.py runs it, with a network of its own
    path=str(PROJECT),
    fixtures=["fresh"],
    document_types={".md": OnGlyphs},
).pytest()
