"""Runs the examples as people do: as programs, on a tiny archive."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def run_example(tmp_path: Path) -> Callable[..., str]:
    """Runs ``examples/NAME ARGUMENTS...`` in an empty folder and gives what it printed; it must not fail or warn."""

    def run(name: str, *arguments: object) -> str:
        command = [sys.executable, "-W", "error", str(PROJECT / "examples" / name), *map(str, arguments)]
        # The examples import the packages of the checkout under test, wherever it is.
        paths = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
