"""Runs the examples as people do: as programs, on a tiny archive."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mamldata.archive.build import build
from mamldata.archive.plan import BuildRequest
from mamldata.bank.format import Bank
from mamldata.datasets.manifest import Manifest

PROJECT = Path(__file__).parents[2]

# Runs the program in sys.argv[1] with the packages in MISSING not to be had.
WITHOUT = """
import os, runpy, sys
sys.modules.update(dict.fromkeys(os.environ["MISSING"].split()))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def archive(glyphs_manifest: Manifest, glyphs_bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of glyphs with two meta-batches of four for training. Shared: do not write to it, copy it."""
    out = tmp_path_factory.mktemp("examples") / "glyphs-5w1s"
    build(glyphs_manifest, glyphs_bank, out, BuildRequest(k_query=3, episodes={"train": 8, "val": 2, "test": 3}))
    return out


@pytest.fixture
def run_example(tmp_path: Path) -> Callable[..., str]:
    """Runs an example in an empty folder and gives what it printed; it must not fail.

    Arguments: ``name`` of the file and its own arguments; ``warnings``, what becomes of them; ``missing``, packages
    that are not to be had; ``code``, another exit status that is expected, whose message is then what is given.
    """

    def run(
        name: str, *arguments: object, warnings: str = "error", missing: tuple[str, ...] = (), code: int = 0
    ) -> str:
        program = [str(PROJECT / "examples" / name), *map(str, arguments)]
        start = ["-c", WITHOUT] if missing else []
        # The examples import the packages of the checkout under test, wherever it is.
        paths = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
        more = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MISSING": " ".join(missing)}
        done = subprocess.run(
            [sys.executable, "-W", warnings, *start, *program],
            cwd=tmp_path,
            env={**os.environ, **more},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    return run
