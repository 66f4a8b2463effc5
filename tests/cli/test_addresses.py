"""Verbs on an archive at an address that carries a password: nothing that is said or kept has it."""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli.main import main


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Silent."""


@pytest.fixture(scope="module")
def archive(glyphs_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small archive."""
    out = tmp_path_factory.mktemp("addresses") / "archive"
    options = "--train 6 --val 4 --test 4 --n-way 3 --k-query 2 --workers 1"
    result = CliRunner().invoke(
        main, ["build", "glyphs", "--out", str(out), *options.split(), "--root", str(glyphs_root)]
    )
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def host(archive: Path) -> Iterator[str]:
    """Of a server of the archive."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(archive))) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


QUICK = "--filters 4 --meta-batch-size 2 --eval-episodes 4 --device cpu"


@pytest.mark.slow
def test_no_password_is_said_or_kept(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by any verb that reads archives, in results, messages, refusals, or a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAMLDATA_ROOT", "root")

    def run(line: str, code: int = 0) -> Result:
        words = shlex.split(line.replace("ADDRESS", f"http://me:SECRET@{host}"))
        result = CliRunner().invoke(main, words)
        assert result.exit_code == code, result.output
        assert "SECRET" not in result.output, line
        return result

    public = f"http://{host}"
    assert run("inspect ADDRESS").stdout.startswith(f"{public}: glyphs")
    assert json.loads(run("inspect ADDRESS --json").stdout)["archive"] == public
    assert run("verify ADDRESS").stdout.startswith(f"{public} is whole")
    assert json.loads(run("verify ADDRESS --json").stdout)["target"] == public
    assert run("verify ADDRESS --digest abcabcabcabc", 1).stdout.startswith(f"{public} is another archive")
    run("verify ADDRESS/nowhere", 1)
    run("preview ADDRESS --out episode.png")
    assert f"the archive {public} are fixed" in run("preview ADDRESS --out x.png --n-way 4", 2).stderr
    run(f"train ADDRESS --out run --steps 1 {QUICK}")
    run("eval run ADDRESS --split val --episodes 4 --device cpu")
    assert f"{public} has 4 test episodes" in run("eval run ADDRESS --episodes 5 --device cpu", 2).stderr
    run(f"compare ADDRESS --algorithms fomaml,random --steps 1 --out compared --episodes 4 {QUICK}")
    assert json.loads(Path("compared/compare.json").read_bytes())["data"]["source"] == public
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if b"SECRET" in path.read_bytes()]


@pytest.mark.parametrize("verb", ["inspect", "verify", "preview --out x.png", "train --out run"])
@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://", "http://: an address with no host"),
        ("http://[me:SECRET@", "http://: an address with no host"),
        ("pipe://me:SECRET@x", "pipe://x: not an address"),
        ("nosuch://me:SECRET@x", "nosuch://x: nosuch:// is not known"),
    ],
)
def test_what_is_no_address_is_refused(
    verb: str, address: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exit code 2, without a traceback, and without showing more of it than may be shown."""
    monkeypatch.chdir(tmp_path)
    name, *options = verb.split()
    result = CliRunner().invoke(main, [name, address, *options])
    assert result.exit_code == 2, result.output
    assert f"Error: {said}" in result.stderr
    assert "SECRET" not in result.output
