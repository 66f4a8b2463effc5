"""The bank: the right pixels, made once, made whole whatever happens, and no changed byte unnoticed."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from mamldata.bank import make as bank
from mamldata.bank.format import Bank, check_bank, described, open_bank
from mamldata.bank.make import make_bank
from mamldata.datasets.load import load_manifest
from mamldata.datasets.manifest import Manifest
from mamldata.datasets.paths import DatasetFolder
from mamldata.errors import DamagedError, DataMissingError, RequestError, WriteError
from mamldata.fetching.act import fetch
from mamldata.io.atomic import temporary, write_atomic

Make = Callable[..., Any]

GLYPHS = "8d7dfa1b621e550e7f291530c5939053e2fb94cddd9e409721aa628ba70cbb50"
OMNIGLOT = "9b234514d3c4ea224297ca9a58f0e83f6027c755657cba44cbccce6c0b88d0ba"
OMNIGLOT_SMALL = "351ad170b9a872cb7187664e2103a82564c541f27cb9a87db7ee82088d0a17b1"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files(folder: DatasetFolder) -> set[str]:
    """What stands beside the raw files."""
    return {path.name for path in folder.path.iterdir()} - {"raw", ".lock"}


def with_image(manifest: Manifest, **changes: Any) -> Manifest:
    return dataclasses.replace(manifest, image=dataclasses.replace(manifest.image, **changes))


def described_anew(manifest: Manifest, archive: Path) -> Manifest:
    """The manifest of a new version of its only file."""
    file = dataclasses.replace(manifest.files[0], bytes=archive.stat().st_size, sha256=sha256(archive))
    return dataclasses.replace(manifest, files=(file,))


def by_pillow(pixels: np.ndarray, size: int, channels: int, invert: bool) -> np.ndarray:
    """One image of the bank, by Pillow alone."""
    image = Image.fromarray(pixels).convert("L" if channels == 1 else "RGB").resize((size, size), Image.LANCZOS)
    array = np.array(image).reshape(size, size, channels)
    return 255 - array if invert else array


# --- what is in it


def test_glyphs(glyphs_bank: Bank) -> None:
    """The embedded bank has the golden digest, which is that of the file, and NumPy alone reads it."""
    assert glyphs_bank.sha256 == GLYPHS == sha256(glyphs_bank.path)
    array = np.load(glyphs_bank.path, mmap_mode="r", allow_pickle=False)
    assert array.dtype == np.uint8
    assert array.shape == glyphs_bank.shape == (4800, 28, 28, 1)
    assert np.array_equal(array, glyphs_bank.open_images())
    assert glyphs_bank.class_offsets == tuple(range(0, 4801, 20))
    assert glyphs_bank.class_names[:2] == ("alphabet01/character01", "alphabet01/character02")


@pytest.mark.real_data
def test_omniglot(omniglot_bank: Bank) -> None:
    """Omniglot's bank has the golden digest and the published shape."""
    assert omniglot_bank.sha256 == OMNIGLOT == sha256(omniglot_bank.path)
    assert omniglot_bank.shape == (32460, 28, 28, 1)
    assert len(omniglot_bank.class_names) == 1623
    assert omniglot_bank.class_offsets == tuple(range(0, 32461, 20))


@pytest.mark.real_data
def test_omniglot_small(omniglot_small_root: Path) -> None:
    """The two small sets have the golden digest; what they share is there once."""
    small = open_bank(DatasetFolder(omniglot_small_root, "omniglot-small"), 28)
    assert small.sha256 == OMNIGLOT_SMALL == sha256(small.path)
    assert small.shape == (4840, 28, 28, 1)
    assert len(set(small.class_names)) == len(small.class_names) == 242


@pytest.mark.real_data
def test_omniglot_pixels(omniglot_bank: Bank, omniglot_root: Path) -> None:
    """Images taken from all over are what Pillow alone makes of the PNG: Lanczos, ink 255, paper 0."""
    images = omniglot_bank.open_images()
    for archive, part in (("images_background", "Greek"), ("images_evaluation", "Tibetan")):
        with zipfile.ZipFile(DatasetFolder(omniglot_root, "omniglot").raw / f"{archive}.zip") as container:
            for character in ("character01", "character17"):
                first = omniglot_bank.class_offsets[omniglot_bank.class_names.index(f"{part}/{character}")]
                members = sorted(n for n in container.namelist() if f"/{part}/{character}/" in n and n.endswith(".png"))
                assert len(members) == 20
                for row, member in enumerate(members, first):
                    image = Image.open(io.BytesIO(container.read(member))).convert("L").resize((28, 28), Image.LANCZOS)
                    assert np.array_equal(images[row, :, :, 0], 255 - np.array(image))
                    assert images[row, 0, 0, 0] < 64  # paper


def test_glyphs_pixels(glyphs_bank: Bank, glyphs_root: Path) -> None:
    """Every hundredth image is what Pillow alone makes of the PBM."""
    images = glyphs_bank.open_images()
    with zipfile.ZipFile(DatasetFolder(glyphs_root, "glyphs").raw / "glyphs.zip") as container:
        for row, member in enumerate(sorted(container.namelist())):
            if row % 100 == 7:
                raw = np.array(Image.open(io.BytesIO(container.read(member))).convert("L"))
                assert np.array_equal(images[row], by_pillow(raw, 28, 1, invert=True))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("invert", [True, False])
def test_every_pixel_of_a_made_up_dataset(channels: int, invert: bool, make_dataset: Make) -> None:
    """Grey and RGB, inverted or not, classes of unequal sizes: every row is its image."""
    tiny = make_dataset(channels=channels, invert=invert)
    made = make_bank(tiny.manifest, tiny.root)
    names = sorted(tiny.pixels, key=lambda key: (key[0].split("/"), key[1]))
    sizes = [sum(key[0] == name for key in names) for name in made.class_names]
    assert made.class_names == tuple(dict.fromkeys(key[0] for key in names))
    assert sizes == [4, 7, 5, 12, 6, 9]
    assert made.class_offsets == tuple(np.cumsum([0, *sizes]))
    assert made.shape == (43, 8, 8, channels)
    expected = np.stack([by_pillow(tiny.pixels[key], 8, channels, invert) for key in names])
    assert np.array_equal(made.open_images(), expected)
    assert files(tiny.folder) == {"tiny-8.npy", "tiny-8.json"}


def test_images_are_read_only(glyphs_bank: Bank) -> None:
    """A trainer that writes to the bank is stopped."""
    with pytest.raises(ValueError, match="read-only"):
        glyphs_bank.open_images()[0] = 0


def test_sizes(make_dataset: Make) -> None:
    """Other sizes stand beside the manifest's own; impossible ones are refused."""
    tiny = make_dataset()
    assert make_bank(tiny.manifest, tiny.root, 5).shape == (43, 5, 5, 1)
    assert make_bank(tiny.manifest, tiny.root).shape == (43, 8, 8, 1)
    assert files(tiny.folder) == {"tiny-5.npy", "tiny-5.json", "tiny-8.npy", "tiny-8.json"}
    for size in (0, -1, 4097):
        with pytest.raises(RequestError, match=f"image size of {size} is not between 1 and 4096"):
            make_bank(tiny.manifest, tiny.root, size)


def test_workers_change_nothing(make_dataset: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes make the same bytes as one."""
    monkeypatch.setattr(bank, "_TASK_IMAGES", 10)
    tiny = make_dataset()
    alone = make_bank(tiny.manifest, tiny.root, workers=1)
    before = sha256(alone.path), alone.path.with_suffix(".json").read_bytes()
    shutil.rmtree(tiny.root / "tiny")
    tiny.folder.raw.mkdir(parents=True)
    shutil.copy(tiny.archive, tiny.folder.raw)
    tiny.folder.receipt(tiny.archive.name).write_text(f"{sha256(tiny.archive)}  {tiny.archive.name}\n")
    together = make_bank(tiny.manifest, tiny.root, workers=2)
    assert (sha256(together.path), together.path.with_suffix(".json").read_bytes()) == before


def test_progress(make_dataset: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images, then bytes, are counted to the end."""
    monkeypatch.setattr(bank, "_TASK_IMAGES", 10)
    tiny = make_dataset()
    seen: dict[str, list[Any]] = {}

    class Bar:
        def __init__(self, label: str, total: int | None, unit: str, /) -> None:
            self.counts = seen.setdefault(label, [total, unit, 0])

        def __enter__(self) -> Callable[[int], object]:
            return lambda n: self.counts.__setitem__(2, self.counts[2] + n)

        def __exit__(self, *_: object) -> None:
            pass

    made = make_bank(tiny.manifest, tiny.root, progress=Bar)
    length = made.path.stat().st_size
    raw = tiny.archive.stat().st_size
    assert seen == {"tiny.zip": [raw, "B", raw], "preprocess": [43, "images", 43], "hash": [length, "B", length]}


# --- made once


def test_made_once(make_dataset: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call touches nothing and decodes nothing, with any number of workers."""
    tiny = make_dataset()
    first = make_bank(tiny.manifest, tiny.root)
    stats = [(path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(tiny.folder.path.glob("tiny-8.*"))]
    monkeypatch.delattr(bank, "_write_piece")
    monkeypatch.delattr(bank, "index_images")
    assert make_bank(tiny.manifest, tiny.root, workers=2) == first
    assert stats == [
        (path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(tiny.folder.path.glob("tiny-8.*"))
    ]


def test_made_anew_when_the_recipe_changes(make_dataset: Make) -> None:
    """Another resampling, inversion or channels is another bank under the same name."""
    tiny = make_dataset()
    digests = {make_bank(tiny.manifest, tiny.root).sha256}
    for changes in ({"invert": False}, {"resampling": "nearest"}, {"channels": 3}):
        changed = with_image(tiny.manifest, **changes)
        digests.add(make_bank(changed, tiny.root).sha256)
        assert sha256(tiny.folder.bank(8)) in digests
    assert len(digests) == 4
    reader = dataclasses.replace(tiny.manifest.reader, depth=3)
    assert make_bank(dataclasses.replace(tiny.manifest, reader=reader), tiny.root).class_names[0] == "tiny/Ash/one"


def test_made_anew_when_a_source_changes(make_dataset: Make) -> None:
    """Another raw file, that the manifest wants and fetch has verified, is another bank; until then there is none."""
    tiny = make_dataset()
    before = make_bank(tiny.manifest, tiny.root)
    with zipfile.ZipFile(tiny.archive, "a") as container:
        container.writestr("tiny/Zelkova/one/1.png", container.read(container.namelist()[0]))
    manifest = described_anew(tiny.manifest, tiny.archive)
    pattern = r"tiny\.zip \(exists, but is not verified for this manifest\)\. Run: mamldata fetch .*/tiny\.toml "
    with pytest.raises(DataMissingError, match=pattern):
        make_bank(manifest, tiny.root)
    (tiny.folder.raw / tiny.archive.name).unlink()
    fetch(manifest, tiny.root, [str(tiny.archive.parent)], offline=True)
    after = make_bank(manifest, tiny.root)
    assert after.class_names == (*before.class_names, "Zelkova/one")
    assert after.shape[0] == 44


@pytest.mark.parametrize("receipt", ["", "anything", "{other}  tiny.zip\n", "{right}  other.zip\n"])
def test_a_file_that_nobody_verified(receipt: str, make_dataset: Make) -> None:
    """A receipt put there by hand does not stand for the manifest's digest, nor does one for a file cut short."""
    tiny = make_dataset()
    path = tiny.folder.receipt(tiny.archive.name)
    whole = path.read_text()
    path.write_text(receipt.format(other="0" * 64, right=sha256(tiny.archive)))
    with pytest.raises(DataMissingError, match="not verified for this manifest"):
        make_bank(tiny.manifest, tiny.root)
    path.write_text(whole)
    os.truncate(tiny.folder.raw / tiny.archive.name, 1000)
    with pytest.raises(DataMissingError, match="not verified for this manifest"):
        make_bank(tiny.manifest, tiny.root)


def test_a_finished_bank_waits_for_nobody(make_dataset: Make) -> None:
    """Another process is at work on the dataset: what is finished is opened meanwhile."""
    tiny = make_dataset()
    made = make_bank(tiny.manifest, tiny.root)
    with ThreadPoolExecutor() as pool, FileLock(tiny.folder.lock):
        assert pool.submit(make_bank, tiny.manifest, tiny.root).result(timeout=20) == made


OPEN = """\
import sys
from pathlib import Path
from mamldata.bank.make import make_bank
from mamldata.datasets.load import load_manifest
manifest = load_manifest(sys.argv[1])
print("ready", flush=True)
for root in sys.stdin:
    print(make_bank(manifest, Path(root.strip())).sha256, flush=True)
"""


@pytest.mark.slow
def test_many_processes_open_a_folder_at_once(tmp_path: Path) -> None:
    """As the processes of one job do: all get the bank, whoever is the first to hash the folder and to make it."""
    for position in range(9):
        image = tmp_path / "pictures" / f"class{position // 3}" / f"{position}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (position, 0, 0)).save(image)
    manifest = load_manifest(str(tmp_path / "pictures"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    command = [sys.executable, "-c", OPEN, str(tmp_path / "pictures")]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                    env=environment,
                )
            )
            for _ in range(4)
        ]  # fmt: skip
        for root in [None, *(tmp_path / str(number) for number in range(20))]:
            for process in processes if root else ():
                print(root, file=process.stdin, flush=True)
            told = {process.stdout.readline() for process in processes if process.stdout}
            assert told == ({f"{make_bank(manifest, root).sha256}\n"} if root else {"ready\n"})
        assert [process.communicate(timeout=60)[1] for process in processes] == [""] * 4


READ = """\
import sys
from pathlib import Path
from mamldata.bank.make import make_bank
from mamldata.errors import WriteError
from mamldata.datasets.load import load_manifest
for target in sys.argv[2:]:
    manifest = load_manifest(target)
    bank = make_bank(manifest, Path(sys.argv[1]))
    print(bank.sha256, int(bank.open_images().sum()))
try:
    make_bank(manifest, Path(sys.argv[1]), 5)
except WriteError as error:
    print(error)
"""


def test_a_root_of_others(make_dataset: Make, tmp_path: Path, run_read_only: Callable[..., Any]) -> None:
    """A bank that is complete is opened where nothing can be written; one that must be made is refused."""
    tiny = make_dataset()
    pictures = tmp_path / "pictures"
    for position in range(3):
        (pictures / f"class{position}").mkdir(parents=True)
        Image.new("RGB", (4, 4), (position, 0, 0)).save(pictures / f"class{position}" / "0.png")
    targets = [str(tiny.manifest_path), str(pictures)]
    banks = [make_bank(load_manifest(target), tiny.root) for target in targets]
    for lock in tiny.root.rglob("*.lock"):
        lock.unlink()
    wanted = [f"{made.sha256} {made.open_images().sum()}" for made in banks]
    for _ in range(2):
        done = run_read_only(tiny.root, "-c", READ, tiny.root, *targets)
        assert done.stderr == ""
        *found, refusal = done.stdout.splitlines()
        assert found == wanted
        assert re.search(r"Cannot write .*/pictures-.*\.lock \(Permission denied\)\. Make the folder writable", refusal)
        # The second time the note of what the folder holds is out of date, and no newer one can be written.
        os.utime(pictures / "class0" / "0.png", ns=(1, 1))
    assert not list(tiny.root.rglob("*.lock"))


PRIVATE = """\
import sys
from pathlib import Path
from mamldata.bank.format import check_bank
from mamldata.bank.make import make_bank
from mamldata.errors import DataMissingError
from mamldata.datasets.load import load_manifest
for name in ("tiny-8.json", "tiny-8.npy"):
    path = Path(sys.argv[1]) / "tiny" / name
    path.chmod(0)
    try:
        make_bank(load_manifest(sys.argv[2]), Path(sys.argv[1]))
    except DataMissingError as error:
        print(error)
    print(*check_bank(path.with_suffix(".json")))
    path.chmod(0o444)
"""


def test_a_private_bank_of_others(make_dataset: Make, run_read_only: Callable[..., Any]) -> None:
    """A bank that may not be read is named, and what to do; it is not tried to make another one."""
    tiny = make_dataset()
    make_bank(tiny.manifest, tiny.root)
    done = run_read_only(tiny.root, "-c", PRIVATE, tiny.root, tiny.manifest_path)
    assert done.stderr == ""
    for name in ("tiny-8.json", "tiny-8.npy"):
        assert done.stdout.count(f"{tiny.folder.path / name} exists but is not readable. Ask its owner") == 2


def test_a_known_digest_changes_no_bank(make_dataset: Make) -> None:
    """A manifest that comes to know a size's digest goes on with the bank that is there."""
    tiny = make_dataset()
    made = make_bank(tiny.manifest, tiny.root)
    before = made.path.stat().st_ino
    assert make_bank(with_image(tiny.manifest, bank_sha256={8: made.sha256}), tiny.root) == made
    assert made.path.stat().st_ino == before


def test_another_digest_than_the_known_one_is_refused(make_dataset: Make) -> None:
    """A machine that makes other pixels is told so, with both digests; nothing is kept."""
    tiny = make_dataset()
    wrong = with_image(tiny.manifest, bank_sha256={8: "0" * 64})
    pattern = (
        r"tiny at 8 pixels has sha256 [0-9a-f]{64}, but the known digest is 0{64}.*mamldata verify .*tiny\.toml.*Pillow"
    )
    for _ in range(2):
        with pytest.raises(DamagedError, match=pattern):
            make_bank(wrong, tiny.root)
        assert not any(name.endswith((".npy", ".part", ".json")) for name in files(tiny.folder))
    assert make_bank(with_image(tiny.manifest, bank_sha256={9: "0" * 64}), tiny.root)
    with pytest.raises(DamagedError, match=pattern):
        make_bank(wrong, tiny.root)


# --- made whole


# Makes the bank of a manifest in pieces of 4 images, and kills itself at the named moment.
KILLED = """\
import contextlib, os, signal, sys
from pathlib import Path
from mamldata.bank import make as bank
from mamldata.datasets.load import load_manifest
manifest, root, moment = sys.argv[1:]
bank._TASK_IMAGES = 4

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

class Bar:
    def __init__(self, label, total, unit, /):
        self.label, self.calls = label, 0
    def __enter__(self):
        return self.advance
    def __exit__(self, *_):
        pass
    def advance(self, count):
        self.calls += 1
        if moment == f"{self.label} {self.calls}":
            die()

if moment == "within piece 3":
    decode, left = bank.decode_image, [9]
    def decode_image(*arguments):
        left[0] -= 1
        return decode(*arguments) if left[0] else die()
    bank.decode_image = decode_image
if moment == "before rename":
    bank.commit = die
if moment == "before description":
    bank.described = die
bank.make_bank(load_manifest(manifest), Path(root), progress=Bar)
"""


@pytest.mark.parametrize(
    ("moment", "pieces_done"),
    [
        ("preprocess 1", 0),  # before any piece
        ("within piece 3", 2),
        ("preprocess 5", 4),  # the first call tells what was there before
        ("preprocess 12", 11),
        ("hash 1", 11),
        ("before rename", 11),
        ("before description", None),  # the array has its name, but nothing vouches for it
    ],
)
def test_killed_and_called_again(
    moment: str, pieces_done: int | None, make_dataset: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After kill -9 at any moment the same call ends with the same bytes, and does no finished piece again."""
    tiny = make_dataset()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    command = [sys.executable, "-c", KILLED, str(tiny.manifest_path), str(tiny.root), moment]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert not tiny.folder.bank_json(8).exists(), "the description is written last"
    with pytest.raises(DataMissingError, match="There is no bank"):
        open_bank(tiny.folder, 8)

    monkeypatch.setattr(bank, "_TASK_IMAGES", 4)
    rows: list[int] = []
    write = bank._write_piece
    monkeypatch.setattr(bank, "_write_piece", lambda piece: (rows.append(piece.first_row), write(piece))[1])
    again = make_bank(tiny.manifest, tiny.root)
    assert rows == list(range(4 * (pieces_done or 0), 43, 4))
    assert files(tiny.folder) == {"tiny-8.npy", "tiny-8.json"}

    fresh = tmp_path / "fresh"
    shutil.copytree(tiny.folder.raw, fresh / "tiny" / "raw")
    whole = make_bank(tiny.manifest, fresh)
    assert whole.sha256 == again.sha256 == sha256(again.path)
    assert whole.path.with_suffix(".json").read_bytes() == again.path.with_suffix(".json").read_bytes()


@pytest.mark.parametrize("tail", ["[4", "", "[8, {}]", "garbage"])
def test_half_a_line_in_the_journal(tail: str, make_dataset: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal whose last line was cut off: its piece is done again, and the next line is not joined to it."""
    monkeypatch.setattr(bank, "_TASK_IMAGES", 4)
    tiny = make_dataset()
    expected = make_bank(tiny.manifest, tiny.root).sha256
    tiny.folder.bank_json(8).unlink()

    lines: list[str] = []
    journal = bank._journal(tiny.folder.bank(8))
    write, left = bank._write_piece, [3]

    def failing(piece: Any) -> int:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return write(piece)

    for _ in range(2):  # once to begin, once to go on behind the half line
        left[0] = 3
        with monkeypatch.context() as patch:
            patch.setattr(bank, "_write_piece", failing)
            with pytest.raises(KeyboardInterrupt):
                make_bank(tiny.manifest, tiny.root)
        lines = journal.read_text().splitlines()
        with journal.open("a") as stream:
            stream.write(tail)
    assert lines[1:] == ["[0, {}]", "[4, {}]", "[8, {}]", "[12, {}]"]
    assert make_bank(tiny.manifest, tiny.root).sha256 == expected


@pytest.mark.parametrize(
    "lines",
    [
        b"\xff\xfe\n",
        b"garbage\n",
        b"[]\n",
        b"0\n",
        b"[0, []]\n",
        b'[0, {"x": ""}]\n',
        b'[0, {"43": "beyond"}]\n',
        b"[" * 100_000 + b"\n",
    ],
    ids=["bytes", "word", "list", "number", "lists", "row", "beyond", "deep"],
)
def test_a_damaged_journal_is_no_journal(lines: bytes, make_dataset: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a journal says, the bank is made, from the beginning if need be."""
    tiny = make_dataset()
    expected = make_bank(tiny.manifest, tiny.root)
    array = expected.path.read_bytes()
    tiny.folder.bank_json(8).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(bank, "_measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_bank(tiny.manifest, tiny.root)
    with bank._journal(tiny.folder.bank(8)).open("ab") as stream:
        stream.write(lines)
    assert make_bank(tiny.manifest, tiny.root).sha256 == expected.sha256
    assert expected.path.read_bytes() == array


def test_a_kill_after_the_description_leaves_no_journal(make_dataset: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a bank has its description, no later build would look for its journal."""
    tiny = make_dataset()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    write = bank.write_atomic
    with monkeypatch.context() as patch:
        patch.setattr(bank, "write_atomic", lambda *given: (write(*given), given[0].suffix == ".json" and killed()))
        with pytest.raises(KeyboardInterrupt):
            make_bank(tiny.manifest, tiny.root)
    make_bank(tiny.manifest, tiny.root)
    assert files(tiny.folder) == {"tiny-8.npy", "tiny-8.json"}


def test_a_raw_file_that_changed_makes_no_bank(make_dataset: Make) -> None:
    """A flipped bit where no check sum of the container looks, such as in a member's name, is noticed all the same."""
    tiny = make_dataset()
    raw = tiny.folder.raw / tiny.archive.name
    data = raw.read_bytes()
    at = data.rindex(b"Ash/one/003.png")
    raw.write_bytes(data[:at] + b"Ash/one/00b.png" + data[at + 15 :])
    message = r"tiny\.zip has changed since it was fetched: sha256 .* Delete it, and run: mamldata fetch "
    with pytest.raises(DamagedError, match=message):
        make_bank(tiny.manifest, tiny.root)
    raw.write_bytes(data)
    assert make_bank(tiny.manifest, tiny.root)


def test_a_link_in_a_circle_is_a_damaged_bank(make_dataset: Make) -> None:
    """An array that cannot be looked at is made again, as a damaged one is."""
    tiny = make_dataset()
    made = make_bank(tiny.manifest, tiny.root)
    made.path.unlink()
    made.path.symlink_to(made.path.name)
    with pytest.raises(DamagedError, match="cannot be read"):
        bank.described_bank(made.path, bank.read_description(tiny.folder.bank_json(8)))
    assert make_bank(tiny.manifest, tiny.root).sha256 == made.sha256


def test_an_unfinished_bank_of_another_recipe_is_not_gone_on_with(
    make_dataset: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of an interrupted bank is used only for the very same bank."""
    monkeypatch.setattr(bank, "_TASK_IMAGES", 4)
    tiny = make_dataset()
    with monkeypatch.context() as patch:
        patch.setattr(bank, "_measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_bank(tiny.manifest, tiny.root)
    assert files(tiny.folder) == {"tiny-8.npy.part", "tiny-8.npy.journal"}
    plain = make_bank(with_image(tiny.manifest, invert=False), tiny.root).open_images().copy()
    assert np.array_equal(plain, 255 - make_bank(tiny.manifest, tiny.root).open_images())


def test_an_unfinished_bank_of_another_version_is_not_gone_on_with(
    make_dataset: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces that were decoded in another way are not mixed with those of today."""
    monkeypatch.setattr(bank, "_TASK_IMAGES", 4)
    tiny = make_dataset()
    expected = make_bank(tiny.manifest, tiny.root).sha256
    tiny.folder.bank_json(8).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(bank, "FORMAT", "mamldata-bank/2")
        patch.setattr(bank, "decode_image", lambda *_: np.zeros((8, 8, 1), np.uint8))
        patch.setattr(bank, "_measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_bank(tiny.manifest, tiny.root)
    assert make_bank(tiny.manifest, tiny.root).sha256 == expected


def test_an_old_description_never_vouches_for_a_new_array(make_dataset: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bank replaced by another and interrupted before its description: none, rather than a wrong one."""
    tiny = make_dataset()
    make_bank(tiny.manifest, tiny.root)

    def interrupted(path: Path, data: bytes) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write_atomic(path, data)

    monkeypatch.setattr(bank, "write_atomic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_bank(with_image(tiny.manifest, invert=False), tiny.root)
    assert tiny.folder.bank(8).exists()
    assert not tiny.folder.bank_json(8).exists()


# --- what stands in the way


def replace_member(tiny: Any, member: str, data: bytes) -> Manifest:
    """Another image in the raw zip, which is whole as a zip; gives the manifest that wants it."""
    path = tiny.folder.raw / tiny.archive.name
    with zipfile.ZipFile(path) as container:
        members = {name: container.read(name) for name in container.namelist()}
    members[member] = data
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as container:
        for name, content in members.items():
            container.writestr(name, content)
    manifest = described_anew(tiny.manifest, path)
    fetch(manifest, tiny.root, offline=True)
    return manifest


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_image(workers: int, make_dataset: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the file and the member, from another process too; no bank appears."""
    monkeypatch.setattr(bank, "_TASK_IMAGES", 20)
    tiny = make_dataset()
    whole = io.BytesIO()
    Image.new("L", (64, 64), 7).save(whole, "PNG")
    manifest = replace_member(tiny, "tiny/Birch/two/003.png", whole.getvalue()[:60])
    with pytest.raises(DamagedError, match=r"raw/tiny\.zip, tiny/Birch/two/003\.png: image file is trunc"):
        make_bank(manifest, tiny.root, workers=workers)
    assert not tiny.folder.bank_json(8).exists()


def test_missing_raw_files_name_the_command(make_dataset: Make) -> None:
    """Nothing is downloaded silently: the error is the command to run. A file without its receipt counts as missing."""
    tiny = make_dataset(fetched=False)
    pattern = r"The raw files of tiny are not in .*raw: tiny\.zip{}\. Run: mamldata fetch .*/tiny\.toml --root .*/root$"
    with pytest.raises(DataMissingError, match=pattern.format("")):
        make_bank(tiny.manifest, tiny.root)
    assert not tiny.root.exists(), "asking leaves no trace"
    tiny.folder.raw.mkdir(parents=True)
    shutil.copy(tiny.archive, tiny.folder.raw)
    with pytest.raises(DataMissingError, match=pattern.format(r" \(exists, but is not verified .*\)")):
        make_bank(tiny.manifest, tiny.root)


def test_a_folder_in_the_way(make_dataset: Make) -> None:
    """A place that cannot be written to is named."""
    tiny = make_dataset()
    temporary(tiny.folder.bank(8)).mkdir()
    with pytest.raises(
        WriteError, match=r"Cannot write .*tiny-8\.npy\.part \(Is a directory\)\. Make the folder writable"
    ):
        make_bank(tiny.manifest, tiny.root)


def test_the_lock_cannot_be_made(make_dataset: Make) -> None:
    """Nor can a bank be made where no lock can be."""
    tiny = make_dataset()
    tiny.folder.lock.mkdir()
    with pytest.raises(WriteError, match=r"Cannot write .*\.lock \(Is a directory\)"):
        make_bank(tiny.manifest, tiny.root)


FULL = """\
import resource, sys
from pathlib import Path
from mamldata.bank.make import make_bank
from mamldata.errors import WriteError
from mamldata.datasets.load import load_manifest
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    make_bank(load_manifest(sys.argv[1]), Path(sys.argv[2]))
except WriteError as error:
    print(error)
"""


def test_a_full_disk(make_dataset: Make) -> None:
    """No space: said before the work, not by a dead process, and the same call then goes through."""
    tiny = make_dataset()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    command = [sys.executable, "-c", FULL, str(tiny.manifest_path), str(tiny.root)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "No space left to write" in done.stdout
    assert "tiny-8.npy.part (File too large). Free some space" in done.stdout
    assert make_bank(tiny.manifest, tiny.root).shape[0] == 43


def test_a_disk_that_is_too_small(make_dataset: Make, small_disk: Any) -> None:
    """What does not fit is not begun, and leaves the disk as it was; with room the same call goes through."""
    tiny = make_dataset()
    root = small_disk.path / "root"
    shutil.copytree(tiny.root, root)
    before = shutil.disk_usage(root).free
    with pytest.raises(WriteError, match=r"-900\.npy needs [\d,]+ more bytes in .*, where [\d,]+ are free"):
        make_bank(tiny.manifest, root, 900)
    assert before - shutil.disk_usage(root).free < 1 << 14
    small_disk.grow(1 << 28)
    assert make_bank(tiny.manifest, root, 900).shape[1] == 900


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot claim blocks")
def test_space_is_claimed_before_the_work(make_dataset: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up later would end a process without a word, so all blocks are claimed first."""

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    tiny = make_dataset()
    with pytest.raises(WriteError, match=r"No space left to write .*tiny-8\.npy\.part"):
        make_bank(tiny.manifest, tiny.root)


# --- no changed byte unnoticed


def test_every_changed_byte_of_the_description_is_found(make_dataset: Make) -> None:
    """Each byte, with a bit flipped or replaced by one that could pass for it, and each truncation."""
    tiny = make_dataset()
    make_bank(tiny.manifest, tiny.root)
    path = tiny.folder.bank_json(8)
    whole = path.read_bytes()
    assert check_bank(path) == []
    damaged = [whole[:length] for length in range(len(whole))] + [whole + b"\n", whole + b" "]
    for position in range(len(whole)):
        for value in (whole[position] ^ (1 << position % 8), *b"0 "):
            if value != whole[position]:
                damaged.append(whole[:position] + bytes([value]) + whole[position + 1 :])
    for data in damaged:
        path.write_bytes(data)
        (problem,) = check_bank(path)
        assert f"{path} is damaged, or of another version" in problem
    with pytest.raises(DamagedError, match="Delete it and run the command again"):
        open_bank(tiny.folder, 8)
    assert make_bank(tiny.manifest, tiny.root)
    assert path.read_bytes() == whole, "a damaged description is as none: the bank is made anew"


def test_a_description_made_up_to_fit_is_of_another_version(make_dataset: Make) -> None:
    """A description with another format, and a right digest of itself, is not read."""
    tiny = make_dataset()
    make_bank(tiny.manifest, tiny.root)
    path = tiny.folder.bank_json(8)
    description = json.loads(path.read_bytes())
    del description["description_sha256"]
    path.write_bytes(described({**description, "format": "mamldata-bank/1"}))
    with pytest.raises(DamagedError, match="or of another version"):
        open_bank(tiny.folder, 8)


def test_every_changed_byte_of_the_array_is_found(make_dataset: Make) -> None:
    """Header and pixels, byte by byte; the problem names the file and both digests."""
    tiny = make_dataset()
    made = make_bank(tiny.manifest, tiny.root)
    whole = made.path.read_bytes()
    for position in range(len(whole)):
        with made.path.open("rb+") as stream:
            stream.seek(position)
            stream.write(bytes([whole[position] ^ (1 << position % 8)]))
        (problem,) = check_bank(tiny.folder.bank_json(8))
        assert problem.startswith(f"{made.path} is damaged: sha256 ")
        assert f"expected {made.sha256}" in problem
        with made.path.open("rb+") as stream:
            stream.seek(position)
            stream.write(whole[position : position + 1])
    assert check_bank(tiny.folder.bank_json(8)) == []


def test_every_truncation_of_the_array_is_found(make_dataset: Make) -> None:
    """A bank of another length is not opened, and not whole; the next call makes it anew."""
    tiny = make_dataset()
    made = make_bank(tiny.manifest, tiny.root)
    whole = made.path.read_bytes()
    for data in [*(whole[:length] for length in range(0, len(whole), 61)), whole[:-1], whole + b"\0"]:
        made.path.write_bytes(data)
        with pytest.raises(DamagedError, match=rf"tiny-8\.npy has {len(data):,} bytes, expected {len(whole):,}\."):
            open_bank(tiny.folder, 8)
        assert len(check_bank(tiny.folder.bank_json(8))) == 1
    assert make_bank(tiny.manifest, tiny.root) == made
    assert made.path.read_bytes() == whole


def test_a_missing_half(make_dataset: Make) -> None:
    """An array without its description, or the other way round, is no bank."""
    tiny = make_dataset()
    made = make_bank(tiny.manifest, tiny.root)
    made.path.unlink()
    assert check_bank(tiny.folder.bank_json(8)) == [f"{made.path} is missing. Delete tiny-8.json and build again."]
    with pytest.raises(DataMissingError, match=r"There is no bank .*tiny-8\.npy: mamldata build makes it"):
        open_bank(tiny.folder, 8)
    assert make_bank(tiny.manifest, tiny.root) == made
    tiny.folder.bank_json(8).unlink()
    with pytest.raises(DataMissingError, match=r"There is no bank .*tiny-8\.npy: mamldata build makes it"):
        open_bank(tiny.folder, 8)


def test_builtin_banks_are_known() -> None:
    """The manifests hold the golden digests, so that other machines are held to them."""
    known = {name: load_manifest(name).image.bank_sha256[28] for name in ("glyphs", "omniglot", "omniglot-small")}
    assert known == {"glyphs": GLYPHS, "omniglot": OMNIGLOT, "omniglot-small": OMNIGLOT_SMALL}
