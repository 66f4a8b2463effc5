"""Files appear whole, also if several processes write them at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mamldata.io.atomic import temporary, write_atomic


def test_writers_of_one_file_take_turns(tmp_path: Path) -> None:
    """Each write succeeds, each content that is read is whole, and nothing is left, also of a killed one."""
    path = tmp_path / "page.html"
    temporary(path).write_bytes(b"left")

    def write(mark: bytes) -> None:
        for _ in range(20):
            write_atomic(path, mark * 1_000_000)
            assert len(content := path.read_bytes()) == 1_000_000
            assert len(set(content)) == 1

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, (b"a", b"b", b"c")))
    assert list(tmp_path.iterdir()) == [path]
