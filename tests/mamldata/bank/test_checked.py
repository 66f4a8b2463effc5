"""A bank is hashed when it is opened: once while it stays the same, and no damage that changes a time gets through."""

from __future__ import annotations

import errno
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamldata.archive.build import build
from mamldata.archive.plan import BuildRequest
from mamldata.bank import checked
from mamldata.bank.checked import hash_and_note, is_noted
from mamldata.bank.format import Bank, check_bank
from mamldata.bank.make import make_bank
from mamldata.errors import DamagedError
from mamldata.io import atomic
from mamldata.io.digest import sha256_file
from mamldata.sources.live import LiveSource, live

Make = Callable[..., Any]

REQUEST = BuildRequest(3, 1, 2, {"train": 6, "val": 0, "test": 0}, episodes_per_shard=2)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, not made yet. Files count as old enough to be noted at once."""
    monkeypatch.setenv("MAMLDATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(atomic, "_TICK_NS", 0)
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were hashed, in order, in this process."""
    seen: list[Path] = []

    def hash_file(path: Path, advance: Any = None) -> str:
        seen.append(path)
        return sha256_file(path, advance)

    monkeypatch.setattr(checked, "sha256_file", hash_file)
    return seen


@pytest.fixture
def tiny(make_dataset: Make) -> Any:
    """A made-up dataset that can be opened, its bank made."""
    dataset = make_dataset()
    make_bank(dataset.manifest, dataset.root)
    return dataset


def damage(path: Path, *, old_time: bool) -> None:
    """Invert the last pixels in place; perhaps pretend by the time of change that nothing happened."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-100:] = bytes(255 - value for value in data[-100:])
    with path.open("rb+") as stream:
        stream.write(data)
    times = (before.st_atime_ns, before.st_mtime_ns if old_time else path.stat().st_mtime_ns)
    os.utime(path, ns=times)
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # the same tick, which only a larger _TICK_NS tells apart
        os.utime(path, ns=times)


def opened(tiny: Any) -> LiveSource:
    return live(str(tiny.manifest_path), n_way=3, k_query=2, root=tiny.root)


def first_episode(source: LiveSource) -> tuple[bytes, bytes]:
    """The pixels of its support and of its query images."""
    info = source.info
    image = math.prod(info.image_shape)
    support, query = (np.empty(info.n_way * k * image, np.uint8) for k in (info.k_shot, info.k_query))
    source.read(np.array([0]), support, query)
    return support.tobytes(), query.tobytes()


@pytest.mark.parametrize("old_time", [False, True])
@pytest.mark.parametrize("noted", [False, True])
def test_a_damaged_bank_is_not_opened(old_time: bool, noted: bool, tiny: Any) -> None:
    """The error names file, digests and remedy, also if the time of change was put back; deleted, it is made again."""
    path = tiny.folder.bank(8)
    whole = sha256_file(path)
    if noted:
        assert make_bank(tiny.manifest, tiny.root).sha256 == whole
        assert is_noted(path, whole)
    damage(path, old_time=old_time)
    for act in (lambda: make_bank(tiny.manifest, tiny.root), lambda: opened(tiny)) * 2:
        with pytest.raises(DamagedError) as caught:
            act()
        assert str(caught.value) == (
            f"{path} is damaged: sha256 {sha256_file(path)}, expected {whole}. Delete it: the next build makes it "
            f"again. To check the raw files too, run: mamldata verify {tiny.manifest_path} --root {tiny.root}"
        )
    path.unlink()
    assert make_bank(tiny.manifest, tiny.root).sha256 == whole == sha256_file(path)


def test_hashed_once_while_it_stays_the_same(tiny: Any, hashed: list[Path]) -> None:
    """Not again by the next who opens it; again after a change of its time, its inode or its name."""
    path = tiny.folder.bank(8)
    for _ in range(3):
        opened(tiny)
    assert hashed == [path]
    os.utime(path, ns=(1, 1))
    for _ in range(2):
        opened(tiny)
    assert hashed == [path] * 2
    other = path.with_name("copy")
    other.write_bytes(path.read_bytes())
    other.replace(path)
    for _ in range(2):
        opened(tiny)
    assert hashed == [path] * 3
    tiny.root.rename(tiny.root.with_name("moved"))
    make_bank(tiny.manifest, tiny.root.with_name("moved"))
    assert len(hashed) == 4


def test_each_bank_has_its_note(tiny: Any, hashed: list[Path]) -> None:
    """Who opens two in turn hashes each once."""
    make_bank(tiny.manifest, tiny.root, 5)
    for size in (5, 8) * 2:
        make_bank(tiny.manifest, tiny.root, size)
    assert hashed == [tiny.folder.bank(5), tiny.folder.bank(8)]


def test_a_file_that_has_just_changed_is_not_noted(
    tiny: Any, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later change could leave the same time: it is hashed by each who opens it, until it has been still a while."""
    monkeypatch.setattr(atomic, "_TICK_NS", 3600 * 10**9)
    for _ in range(2):
        opened(tiny)
    assert len(hashed) == 2
    damage(tiny.folder.bank(8), old_time=False)
    with pytest.raises(DamagedError):
        opened(tiny)


def test_a_time_in_the_future_is_not_noted(tiny: Any, hashed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is one that a wrong clock wrote."""
    os.utime(tiny.folder.bank(8), ns=(1 << 62, 1 << 62))
    for _ in range(2):
        opened(tiny)
    assert len(hashed) == 2


def test_a_build_hashes_once(tiny: Any, hashed: list[Path], tmp_path: Path) -> None:
    """Whatever the number of shards: who writes one trusts the process that opened the bank."""
    build(tiny.manifest, make_bank(tiny.manifest, tiny.root), tmp_path / "out", REQUEST)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3
    assert hashed == [tiny.folder.bank(8)]


def test_a_live_source_in_another_process_hashes_nothing(tiny: Any, hashed: list[Path]) -> None:
    """As the workers of a DataLoader have it; what they map is the same file."""
    data = pickle.dumps(opened(tiny))
    hashed.clear()
    assert first_episode(pickle.loads(data)) == first_episode(opened(tiny))
    assert hashed == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:0],
        lambda data: data[:-1],
        lambda data: data + b"\n",
        lambda data: data.replace(b'"inode":', b'"inode":1'),
        lambda data: b"\xff" + data[1:],
        lambda data: b"[" * 100_000 + data,
    ],
)
def test_a_note_that_is_not_as_written_does_not_count(
    spoil: Callable[[bytes], bytes], tiny: Any, hashed: list[Path], cache: Path
) -> None:
    """The bank is hashed again, and the note mended."""
    made = opened(tiny)
    (note,) = cache.rglob("*.json")
    data = note.read_bytes()
    note.write_bytes(spoil(data))
    hashed.clear()
    assert opened(tiny).info == made.info
    assert len(hashed) == 1
    assert note.read_bytes() == data


def test_a_note_of_another_digest_does_not_count(tiny: Any, hashed: list[Path]) -> None:
    """It says what the file was found to be, not that it is right."""
    path = tiny.folder.bank(8)
    damage(path, old_time=False)
    assert hash_and_note(path, sha256_file(path)) == sha256_file(path)
    assert is_noted(path, sha256_file(path))
    with pytest.raises(DamagedError, match="is damaged: sha256"):
        opened(tiny)


@pytest.mark.parametrize("place", ["file/cache", "read-only/cache", "/proc/cache", "~nobody-of-this-name/cache"])
def test_where_no_note_can_be_written(
    place: str, tiny: Any, hashed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, permissions_count: None
) -> None:
    """No error: the bank is opened, and hashed again the next time. Nor is a folder called ~ made."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("read-only").mkdir(mode=0o555)
    monkeypatch.setenv("MAMLDATA_CACHE", place)
    for _ in range(2):
        opened(tiny)
    assert len(hashed) == 2
    assert not list(tmp_path.glob("~*"))


def test_a_folder_in_the_place_of_a_note(tiny: Any, hashed: list[Path], cache: Path) -> None:
    """It stays, and the bank is opened."""
    opened(tiny)
    (note,) = cache.rglob("*.json")
    note.unlink()
    note.mkdir()
    opened(tiny)
    opened(tiny)
    assert len(hashed) == 3


def test_verify_believes_no_note(tiny: Any) -> None:
    """Bits that rot on a disk change no time. Verify finds them, and after that nobody opens the bank."""
    path = tiny.folder.bank(8)
    whole = make_bank(tiny.manifest, tiny.root)
    damage(path, old_time=True)
    note = checked._place(path)
    note.write_bytes(checked._note(path, atomic.file_version(path.stat()), whole.sha256))  # as if no time had changed
    assert make_bank(tiny.manifest, tiny.root) == whole
    (problem,) = check_bank(tiny.folder.bank_json(8))
    assert f"{path} is damaged: sha256 {sha256_file(path)}, expected {whole.sha256}" in problem
    with pytest.raises(DamagedError, match="is damaged: sha256"):
        make_bank(tiny.manifest, tiny.root)


def test_a_disk_that_cannot_be_read(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's word and the file are told, by opening and by verify."""

    def broken(*_: Any) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checked, "sha256_file", broken)
    pattern = rf"{tiny.folder.bank(8)} cannot be read \(Input/output error\)\. Check its disk, or delete it: the next"
    with pytest.raises(DamagedError, match=pattern):
        make_bank(tiny.manifest, tiny.root)
    assert len(check_bank(tiny.folder.bank_json(8))) == 1


def test_opening_tells_its_progress(tiny: Any) -> None:
    """All bytes are counted while they are hashed; of a bank that is noted, none are."""
    seen: list[Any] = []

    class Bar:
        def __init__(self, *what: Any) -> None:
            seen.append(what)

        def __enter__(self) -> Callable[[int], object]:
            return seen.append

        def __exit__(self, *_: object) -> None:
            pass

    made: Bank = make_bank(tiny.manifest, tiny.root, progress=Bar)
    length = made.path.stat().st_size
    assert seen == [(made.path.name, length, "B"), length]
    make_bank(tiny.manifest, tiny.root, progress=Bar)
    assert len(seen) == 2
