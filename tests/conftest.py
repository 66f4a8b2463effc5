"""What all tests share: data roots with the embedded and the real datasets, and tiny datasets made up on the spot."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import io
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import fsspec
import hypothesis
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from mamldata.bank.format import Bank
from mamldata.bank.make import make_bank
from mamldata.datasets import glyphs
from mamldata.datasets.load import load_manifest
from mamldata.datasets.manifest import Manifest
from mamldata.datasets.paths import DatasetFolder
from mamldata.fetching.act import fetch

REAL_DATA = "MAMLDATA_TEST_DATA"
MakeOnce = Callable[[str, Callable[[Path], object]], Path]
UNEQUAL = {"Ash/one": 4, "Ash/two": 7, "Birch/one": 5, "Birch/two": 12, "Cedar/one": 6, "Cedar/two": 9}

# Before torch is imported, here and in the processes that tests start: threads only wait for one another where the
# tensors are small and several processes share the processors.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Shells start what runs in the background with Ctrl-C ignored, and the processes that tests start would ignore it too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, and no folder of past failures beside the sources.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """Keep what is imported by now, with torch some 400,000 objects, out of every later garbage collection."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_user_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test may touch the datasets and notes of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAMLDATA_ROOT", str(tmp_path_factory.mktemp("default-root")))
        patch.setenv("MAMLDATA_CACHE", str(tmp_path_factory.mktemp("default-cache")))
        yield


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """``make_once(name, make)`` gives a folder that ``make(folder)`` fills, once for all processes of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make_once(name: str, make: Callable[[Path], object]) -> Path:
        folder = shared / name
        with filelock.FileLock(shared / f"{name}.lock"):
            if not folder.exists():
                part = shared / f"{name}.part"
                shutil.rmtree(part, ignore_errors=True)  # of a process where ``make`` failed
                part.mkdir()
                make(part)
                part.rename(folder)
        return folder

    return make_once


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch works with one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class FakeGpu:
    """What code asked of a GPU that is not there: its work is done at once, on the CPU.

    Attributes:
        gpus: how many there are.
        log: what was asked, in order: ``("record", event, stream)``, ``("wait", event, stream)`` where the CPU waits
            for an event, and ``("stream waits", event, stream)``; the default stream is 0.
        streams: how many CUDA streams were made.
        moved: shapes of the tensors that went to the GPU by ``to``, with whether the CPU waited for it.
    """

    def __init__(self) -> None:
        self.gpus = 1
        self.log: list[tuple[str, int, int]] = []
        self.streams = self.events = -1
        self.moved: list[tuple[tuple[int, ...], bool]] = []


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """``torch.cuda`` finds one GPU, whose tensors are in truth on the CPU."""
    import torch

    gpu = FakeGpu()

    class Stream:
        def __init__(self, *_: object) -> None:
            self.number = gpu.streams = gpu.streams + 1

        def wait_event(self, event: Event) -> None:
            gpu.log.append(("stream waits", event.number, self.number))

    class Event:
        def __init__(self, *, blocking: bool = False, enable_timing: bool = False) -> None:
            self.number = gpu.events = gpu.events + 1
            self.blocking, self.timed, self.at = blocking, enable_timing, 0.0

        def record(self, stream: object = None) -> None:
            self.at, self.stream = time.perf_counter(), stream or current()
            gpu.log.append(("record", self.number, self.stream.number))

        def synchronize(self) -> None:
            assert self.blocking, "the CPU spins while it waits"
            gpu.log.append(("wait", self.number, self.stream.number))

        def elapsed_time(self, later: Event) -> float:
            assert self.timed
            assert later.timed
            return 1000 * (later.at - self.at)

    default, here = Stream(), threading.local()

    def current(device: object = None) -> Stream:
        return getattr(here, "stream", default)

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, here.stream = current(), stream
        yield
        here.stream = before

    to, empty = torch.Tensor.to, torch.empty

    def fake_to(self: torch.Tensor, where: object, *more: Any, non_blocking: bool = False, **others: Any) -> Any:
        if isinstance(where, torch.device) and where.type == "cuda":
            gpu.moved.append((tuple(self.shape), not non_blocking))
            return self.clone()
        return to(self, where, *more, non_blocking=non_blocking, **others)

    def fake_empty(*shape: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        return empty(*shape, **more)

    fakes = {
        "is_available": lambda: gpu.gpus > 0,
        "device_count": lambda: gpu.gpus,
        "current_device": lambda: 0,
        "Stream": Stream,
        "Event": Event,
        "stream": on,
        "current_stream": current,
        "init": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.Tensor, "to", fake_to)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(torch, "empty", fake_empty)
    return gpu


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real datasets. Tests that use it carry ``@pytest.mark.real_data``."""
    place = os.environ.get(REAL_DATA)
    if not place:
        pytest.skip(f"{REAL_DATA} is not set: it names the folder of real datasets")
    return Path(place)


def add_raw(folder: DatasetFolder, file: Path) -> None:
    """Put a file where ``fetch`` would, with its receipt."""
    folder.raw.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, folder.raw / file.name)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    folder.receipt(file.name).write_text(f"{digest}  {file.name}\n")


@pytest.fixture(scope="session")
def glyphs_manifest() -> Manifest:
    """The manifest of the embedded dataset."""
    return load_manifest("glyphs")


@pytest.fixture(scope="session")
def glyphs_root(
    tmp_path_factory: pytest.TempPathFactory,
    glyphs_manifest: Manifest,
    make_once: MakeOnce,
) -> Path:
    """A data root with glyphs fetched and its bank of 28 pixels made. Shared: do not write to it, copy it."""

    def make(root: Path) -> None:
        archive = tmp_path_factory.mktemp("glyphs-drawn") / "glyphs.zip"
        glyphs.write_archive(archive)
        add_raw(DatasetFolder(root, "glyphs"), archive)
        make_bank(glyphs_manifest, root)

    return make_once("glyphs-root", make)


@pytest.fixture(scope="session")
def glyphs_bank(glyphs_manifest: Manifest, glyphs_root: Path) -> Bank:
    """The bank of glyphs."""
    return make_bank(glyphs_manifest, glyphs_root)


@pytest.fixture
def permissions_count() -> Iterator[None]:
    """Permissions bind the test as they bind any user, also where root runs it."""
    if os.geteuid() != 0:
        yield
        return
    if not sys.platform.startswith("linux"):
        pytest.skip("root passes by permissions here")
    libc = ctypes.CDLL(None)
    thread = (ctypes.c_uint32 * 2)(0x20080522, 0)  # the version of what follows, and this thread; see man 2 capset
    rights = (ctypes.c_uint32 * 6)()
    assert libc.capget(thread, rights) == 0
    effective = rights[0]
    rights[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(thread, rights) == 0
    yield
    rights[0] = effective
    assert libc.capset(thread, rights) == 0


@dataclass(frozen=True)
class Bucket:
    """A place on a real server on this machine: its address, and the folder that the server keeps it in.

    The server remembers what is in a folder: add and remove files through it.
    """

    url: str
    folder: Path


def _serve(kind: str, folder: Path, *options: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start ``rclone serve``; gives the process, and the host and port."""
    program = shutil.which("rclone", path=sysconfig.get_path("scripts"))
    if program is None:
        pytest.skip("rclone is not installed: it is the server of this test, and comes with the test group")
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = f"127.0.0.1:{free.getsockname()[1]}"
    command = [program, "serve", kind, str(folder), "--addr", place, "--config", os.devnull, *options]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder.with_name(f"{kind}-cache"))}
    log = folder.with_name(f"{kind}.log")
    with log.open("w") as stream:  # and no pipe, which nobody would empty
        server = subprocess.Popen(command, stderr=stream, env=environment)
    while server.poll() is None:
        if place in log.read_text():
            return server, place
        time.sleep(0.01)
    raise AssertionError(f"rclone does not serve {kind}: {log.read_text()}")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """An S3 server, a program of its own: its host and port, and the folder of its buckets."""
    pytest.importorskip("s3fs", reason="s3fs is not installed; the test group has it")
    folder = tmp_path_factory.mktemp("s3")
    server, place = _serve("s3", folder, "--auth-key", "anyone,opensesame")
    with server:
        yield place, folder
        server.kill()


@pytest.fixture
def s3(s3_server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A new bucket, and the environment that gives the right to use it; processes inherit it."""
    place, folder = s3_server
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{place}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "opensesame")
    name = f"bucket-{sum(1 for _ in folder.iterdir())}"
    fsspec.filesystem("s3").mkdir(name)
    return Bucket(f"s3://{name}", folder / name)


@pytest.fixture
def ftp(tmp_path: Path) -> Iterator[Bucket]:
    """An FTP server: a place where files can be seen while they grow."""
    folder = tmp_path / "ftp"
    folder.mkdir()
    options = ("--user", "anyone", "--pass", "opensesame", "--vfs-cache-mode", "writes", "--vfs-write-back", "0s")
    server, place = _serve("ftp", folder, *options)
    with server:
        yield Bucket(f"ftp://anyone:opensesame@{place}", folder)
        server.kill()


@dataclass(frozen=True)
class SmallDisk:
    """A file system of a size of its own, which fills up as a real disk does."""

    path: Path

    def grow(self, size: int) -> None:
        """Make it so many bytes."""
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.path)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """An empty disk of 64 KiB."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("only root on Linux may mount a small disk")
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={1 << 16}", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.decode().strip()}")
    yield SmallDisk(place)
    subprocess.run(["umount", "--lazy", str(place)], check=True)


# Runs a program as root without root's right to pass over permissions (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH), for
# which another user would do as well, were Python not often installed where others may not read.
OBEDIENT = """\
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
for capability in (1, 2):
    if os.geteuid() == 0 and libc.prctl(24, capability, 0, 0, 0):
        sys.exit(os.strerror(ctypes.get_errno()))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.fixture
def run_read_only() -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """``run(folder, *arguments)`` runs Python while nothing in ``folder`` can be written; to root neither."""
    folders: list[Path] = []

    def run(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        folders.append(folder)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        modules = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        command = [sys.executable, "-c", OBEDIENT, *map(str, arguments)]
        given = {**os.environ, "PYTHONPATH": modules, **environment}
        return subprocess.run(command, env=given, capture_output=True, text=True, check=False)

    yield run
    for folder in folders:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)


def _fill_omniglot(name: str, real_data: Path, root: Path) -> None:
    manifest = load_manifest(name)
    fetch(manifest, root, [str(real_data / "omniglot")], offline=True)
    make_bank(manifest, root, workers=2)


@pytest.fixture(scope="session")
def omniglot_root(real_data: Path, make_once: MakeOnce) -> Path:
    """A data root with the real Omniglot and its bank. Shared: do not write to it, copy it."""
    return make_once("omniglot-root", partial(_fill_omniglot, "omniglot", real_data))


@pytest.fixture(scope="session")
def omniglot_bank(omniglot_root: Path) -> Bank:
    """The bank of the real Omniglot."""
    return make_bank(load_manifest("omniglot"), omniglot_root)


@pytest.fixture(scope="session")
def omniglot_small_root(real_data: Path, make_once: MakeOnce) -> Path:
    """A data root with the real omniglot-small and its bank. Shared: do not write to it, copy it."""
    return make_once("omniglot-small-root", partial(_fill_omniglot, "omniglot-small", real_data))


@dataclass(frozen=True)
class TinyDataset:
    """A made-up dataset.

    Attributes:
        manifest_path: a user's own manifest, given by path.
        manifest: the same, loaded.
        archive: the zip that the manifest describes; its folder can be given to ``fetch`` as a place.
        root: a data root, where the zip is in ``raw/`` if the dataset was made as fetched.
        pixels: the raw pixels of each image, by ``(class, file name)``, ``[side, side]`` or ``[side, side, 3]``.
    """

    manifest_path: Path
    manifest: Manifest
    archive: Path
    root: Path
    pixels: Mapping[tuple[str, str], npt.NDArray[np.uint8]]

    @property
    def folder(self) -> DatasetFolder:
        """Where it stands under the root."""
        return DatasetFolder(self.root, self.manifest.name)


TINY_MANIFEST = """\
format = "mamldata-manifest/1"
name = "{name}"
title = "Made up for a test"
version = "1"
licence = "MIT"
homepage = "https://example.org"
citation = "None."
rotations = "all"
split_scheme = "own"

[[files]]
name = "{archive}"
urls = ["https://example.org/{archive}"]
bytes = {bytes}
sha256 = "{sha256}"

[reader]
type = "class-folders"
depth = 2

[image]
size = {size}
channels = {channels}
resampling = "lanczos"
invert = {invert}

[splits.own]
description = "made up"
train = {train}
val = {val}
test = {test}
"""


def make_tiny(
    place: Path,
    *,
    name: str = "tiny",
    sizes: Mapping[str, int] = UNEQUAL,
    side: int = 12,
    size: int = 8,
    channels: int = 1,
    invert: bool = True,
    fetched: bool = True,
) -> TinyDataset:
    """Make a tiny dataset below ``place``: PNGs of noise in a zip, with a manifest.

    Args:
        place: an existing folder.
        name: of the dataset.
        sizes: the number of images of each class (two folders deep). The first half of the classes is train, the next
            quarter val, the rest test.
        side, size: of the raw images, and of the bank's.
        channels, invert: as in manifests.
        fetched: whether the zip is in the root.
    """
    mirror = place / f"{name}-mirror"
    mirror.mkdir()
    archive = mirror / f"{name}.zip"
    chance = np.random.default_rng(0)
    shape = (side, side) if channels == 1 else (side, side, 3)
    pixels = {
        (class_name, f"{image:03d}.png"): chance.integers(0, 256, shape, dtype=np.uint8)
        for class_name, count in sizes.items()
        for image in range(count)
    }
    members = list(pixels.items())
    random.Random(0).shuffle(members)  # no container promises an order
    with zipfile.ZipFile(archive, "w") as container:
        for (class_name, file), image in members:
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, "PNG")
            container.writestr(zipfile.ZipInfo(f"{name}/{class_name}/{file}"), encoded.getvalue())
    classes = sorted(sizes)
    first, second = len(classes) // 2, len(classes) * 3 // 4
    data = archive.read_bytes()
    manifest_path = place / f"{name}.toml"
    manifest_path.write_text(
        TINY_MANIFEST.format(
            name=name,
            archive=archive.name,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            size=size,
            channels=channels,
            invert=str(invert).lower(),
            train=classes[:first],
            val=classes[first:second],
            test=classes[second:],
        )
    )
    root = place / "root"
    manifest = load_manifest(str(manifest_path))
    if fetched:
        add_raw(DatasetFolder(root, name), archive)
    return TinyDataset(manifest_path, manifest, archive, root, pixels)


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., TinyDataset]:
    """Makes a tiny dataset below ``tmp_path``; arguments by keyword, see ``make_tiny``."""
    return partial(make_tiny, tmp_path)
