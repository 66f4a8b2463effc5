"""Temporary folders: gone after use, and after a kill at the next start, but never while a process uses them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mamldata.errors import WriteError
from mamldata.io import scratch as scratch_module
from mamldata.io.scratch import Scratch, scratch

HOLD = """
import sys
from mamldata.io.scratch import Scratch
made = Scratch()
(made.path / "shard.tar").write_bytes(bytes(1000))
print(made.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary folders; each test counts as the start of a process."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scratch_module._remove_stale.cache_clear()
    return tmp_path


def holder(place: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that uses a temporary folder, and that folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(place)},
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def end(process: subprocess.Popen[str], how: int) -> None:
    """Kill a process and close its pipes."""
    process.send_signal(how)
    process.communicate(timeout=60)


def test_nothing_is_left(place: Path) -> None:
    """After use the folder is gone, with what is in it."""
    with scratch() as folder:
        (folder / "below").mkdir()
        (folder / "below" / "file").touch()
        assert len(list(place.iterdir())) == 1
    assert not list(place.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_next_start_clears_what_a_killed_process_left(how: int, place: Path) -> None:
    """Whatever killed it; while it lives, its folder stays."""
    process, folder = holder(place)
    Scratch().remove()
    assert (folder / "shard.tar").exists()
    end(process, how)
    assert (folder / "shard.tar").exists()
    scratch_module._remove_stale.cache_clear()
    Scratch().remove()
    assert not list(place.iterdir())


def stale(place: Path, name: str = "mamldata-stale") -> Path:
    """A folder that a killed process left."""
    folder = place / name
    (folder / "content").mkdir(parents=True)
    (folder / "content" / "shard.tar").touch()
    (folder / "lock").write_bytes(scratch_module._machine())
    return folder


def no_lock(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    (folder / "lock").unlink()


def just_made(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    (folder / "lock").write_bytes(b"")


def of_another_machine(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    (folder / "lock").write_bytes(b"another start of some machine\n")


def of_another_user(_folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "geteuid", lambda: os.getuid() + 1)


def a_link(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    lock = (folder / "lock").rename(folder.parent / "elsewhere")
    (folder / "lock").symlink_to(lock)


@pytest.mark.parametrize("change", [no_lock, just_made, of_another_machine, of_another_user, a_link])
def test_what_is_not_proven_to_be_ours_stays(
    change: Callable[[Path, pytest.MonkeyPatch], None], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a folder of this user with a free lock of this machine is removed."""
    gone, kept = stale(place), stale(place, "mamldata-kept")
    if change is of_another_user:
        gone = kept
    change(kept, monkeypatch)
    Scratch().remove()
    assert (kept / "content" / "shard.tar").exists()
    assert gone == kept or not gone.exists()


def test_too_few_descriptors_to_clear_up(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be cleared up is left to the next process; it hides no error of the one that uses the folder."""

    def full(*_: object) -> object:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", full)
        made = Scratch()
        patch.setattr(Path, "iterdir", full)
        patch.setattr(os, "open", full)
        made.remove()
    assert not list(place.glob("*/content"))
    scratch_module._remove_stale.cache_clear()
    with scratch():
        assert len(list(place.iterdir())) == 1


def test_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none can be written to, the error says what to do."""

    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none)
    with pytest.raises(WriteError, match="set TMPDIR"):
        Scratch()
