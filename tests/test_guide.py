"""The code of docs/guide.md runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "guide.md"


@pytest.mark.slow
def test_every_block_of_the_guide_runs(
    glyphs_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """In their order, in one session, in an empty folder."""
    pytest.importorskip("torchvision")
    root = tmp_path / "root"
    shutil.copytree(glyphs_root, root)
    monkeypatch.setenv("MAMLDATA_ROOT", str(root))
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    session: dict[str, object] = {"__name__": "guide"}
    for block in re.finditer(r"^```python\n(.*?)^```$", page, re.M | re.S):
        first = page.count("\n", 0, block.start(1))
        exec(compile("\n" * first + block[1], str(PAGE), "exec"), session)
    embedded, pictures = session["embedded"], session["pictures"]
    assert len(embedded) == len(pictures.targets)  # type: ignore[arg-type, attr-defined]
    assert (tmp_path / "runs" / "pretrained").is_dir()
