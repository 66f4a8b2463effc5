"""Addresses with secrets of awkward characters, through every entry: no secret is said or kept."""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st

import mamldata
from cli.main import main
from mamldata.archive.dask import dask_executor
from mamldata.archive.verify import verify_archive
from mamldata.datasets.load import load_manifest
from mamldata.errors import MamldataError
from mamldata.fetching import act, http
from mamldata.sources import open as opening

# fsspec's FTP gives a warning when it is collected without ever having connected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True, scope="module")
def _collected() -> Iterator[None]:
    """So that no later test gets the warning."""
    yield
    gc.collect()


MANIFEST = """
format = "mamldata-manifest/1"
name = "tiny"
title = "t"
version = "1"
licence = "l"
homepage = "h"
citation = "c"
split_scheme = "s"
reader = {type = "class-folders"}
image = {size = 8, channels = 1, resampling = "box"}
[[files]]
name = "a.zip"
bytes = 3
sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
[splits.s]
description = "d"
seed = 0
train = 2
val = 2
test = 2
"""
SECRET = "S3cr3t"
# What people paste without escaping it, and what breaks a parser.
AWKWARD = "/#?\\'\"@:[]%&=+ \t\n;,<>|{}^`~é\x1b\u202e"

secrets = st.builds(
    lambda first, second: f"{SECRET}{first}{SECRET}{second}{SECRET}",
    st.text(AWKWARD, max_size=4),
    st.text(AWKWARD, max_size=4),
)
hosts = st.sampled_from(["127.0.0.1:1", "127.0.0.1:99999", "127.0.0.1:x", "[::1", "[::1]:1", "", "a..b", "bucket"])
schemes = st.sampled_from(
    ["http", "https", "HTTP", "s3", "memory", "ftp", "file", "github", "nosuch", "pipe", "zip::http", "simplecache::s3"]
)


@st.composite
def addresses(draw: st.DrawFn) -> str:
    """An address that nothing answers, with a secret as user, password, query, fragment, or several of them."""
    secret, where = draw(secrets), draw(st.sets(st.sampled_from(["user", "password", "query", "fragment"]), min_size=1))
    user = secret if "user" in where else "me"
    login = f"{user}:{secret}@" if "password" in where else f"{user}@" if "user" in where else ""
    query = f"?token={secret}" if "query" in where else ""
    fragment = f"#token={secret}" if "fragment" in where else ""
    return f"{draw(schemes)}://{login}{draw(hosts)}/a{query}{fragment}"


def fetch(place: str) -> object:
    return mamldata.fetch("tiny.toml", root="root", sources=[place])


def fetch_listed(place: str) -> object:
    manifest = load_manifest("tiny.toml")
    listed = type(manifest.files[0])(**{**vars(manifest.files[0]), "urls": (place,)})
    return act.fetch(type(manifest)(**{**vars(manifest), "files": (listed,)}), Path("root"), offline=True)


LIBRARY: dict[str, Callable[[str], object]] = {
    "fetch": fetch,
    "fetch from its own address": fetch_listed,
    "stream": lambda place: list(mamldata.EpisodeStream(place)),
    "open": opening.open_archive,
    "read": mamldata.read_archive,
    "verify": verify_archive,
    "name": mamldata.load_manifest,
    "root": lambda place: mamldata.live("glyphs", root=place),
    "cache": lambda place: mamldata.EpisodeStream("http://127.0.0.1:1/a", cache_dir=place),
    "dask": lambda place: dask_executor(place, seconds=0.1).__enter__(),
}
COMMANDS = [
    "fetch tiny.toml --from ADDRESS",
    "fetch ADDRESS",
    "fetch tiny.toml --dry-run --from ADDRESS",
    "build glyphs --out ADDRESS --train 2 --val 0 --test 0 --k-query 1 --n-way 2 --workers 1",
    "build ADDRESS --out x",
    "build glyphs --out x --dask ADDRESS",
    "verify ADDRESS",
    "verify ADDRESS --json",
    "inspect ADDRESS",
    "preview ADDRESS --out x.png",
    "eval nowhere ADDRESS",
    "eval ADDRESS glyphs",
    "train ADDRESS --out run",
    "train glyphs --out ADDRESS",
    "manifest ADDRESS",
    "recipes ADDRESS",
    "datasets --root ADDRESS",
    "inspect --nosuch=ADDRESS",
    "ADDRESS",
]


@pytest.fixture(scope="module")
def _world(tmp_path_factory: pytest.TempPathFactory, glyphs_root: Path) -> Iterator[None]:
    """A folder to stand in, with a manifest whose file is nowhere; nothing is tried twice, and no cloud is asked."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "tiny.toml").write_text(MANIFEST)
        patch.setenv("MAMLDATA_ROOT", str(glyphs_root))
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        patch.setenv("AWS_ACCESS_KEY_ID", "me")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("https_proxy", "http://127.0.0.1:1")
        patch.setattr(http.Network, "pause", lambda *_: 0.0)
        yield


def kept(folder: Path) -> list[Path]:
    """The files and folders below a folder with the secret in their names or bytes."""
    found = [path for path in folder.rglob("*") if SECRET in str(path)]
    return found + [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


OTHERS = [
    "http://me:S3cr3t/S3cr3t@127.0.0.1:1/a",
    "s3://S3cr3t:S3cr3t@bucket/a",
    "http://127.0.0.1:1/a#token=S3cr3t",
    "http://me:S3cr3t'\"@127.0.0.1:99999/a?S3cr3t@S3cr3t",
    "file://me:S3cr3t/S3cr3t@127.0.0.1/a",
]


@pytest.mark.slow
@pytest.mark.usefixtures("_world")
@pytest.mark.parametrize("entry", LIBRARY)
@settings(max_examples=25)
@given(place=addresses())
@example(place=OTHERS[0])
@example(place=OTHERS[1])
@example(place=OTHERS[2])
@example(place=OTHERS[3])
@example(place=OTHERS[4])
def test_the_library(entry: str, place: str) -> None:
    """Only errors of ours, whose whole traceback, like the log and the files, is without the secret."""
    with watched() as lines:
        try:
            LIBRARY[entry](place)
        except MamldataError as error:
            said = traceback.format_exception(error)
            # The source lines in it are not ours to hide; they have names, not addresses.
            assert SECRET not in "".join(said)
    assert SECRET not in "".join(lines)
    assert not kept(Path())


@pytest.mark.slow
@pytest.mark.usefixtures("_world")
@pytest.mark.parametrize("line", COMMANDS)
@settings(max_examples=15)
@given(place=addresses())
@example(place=OTHERS[0])
@example(place=OTHERS[1])
@example(place=OTHERS[2])
@example(place=OTHERS[3])
@example(place=OTHERS[4])
def test_the_command_line(line: str, place: str) -> None:
    """A clean exit code, and output without the secret and without what changes a terminal."""
    with watched() as lines:
        result = CliRunner().invoke(main, [word.replace("ADDRESS", place) for word in line.split()])
    assert result.exit_code in {0, 1, 2}, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert SECRET not in result.output
    assert result.output.replace("\n", "").isprintable()
    assert SECRET not in "".join(lines)
    assert not kept(Path())


class watched(logging.Handler):  # noqa: N801
    """Collects the log, from warnings up, with the tracebacks in it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(logging.Formatter().format(record))

    def __enter__(self) -> list[str]:
        logging.getLogger().addHandler(self)
        return self.lines

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)
