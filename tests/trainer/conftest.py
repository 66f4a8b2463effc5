"""Makes ``synthetic`` and ``problems`` importable by the tests and by the processes that they start."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The problems are so small that threads would only wait for one another, longest on a busy machine."""
