"""The examples that take an archive into other people's code."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mamldata import EpisodeStream, build
from mamldata.archive.index import read_archive
from mamldata.io.digest import sha256_bytes

Run = Callable[..., str]
pytestmark = pytest.mark.slow


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_the_plain_loop_learns(run_example: Run, archive: Path) -> None:
    """Three epochs, then a test accuracy with its interval, far above chance."""
    printed = run_example("plain_loop.py", archive)
    assert len(numbers(r"epoch \d, last meta-batch: loss (\S+),", printed)) == 3
    (accuracy,) = numbers(r"test accuracy (\S+) ± \S+ \(3 episodes\)", printed)
    assert accuracy > 0.5


def test_plain_maml_learns(run_example: Run, archive: Path) -> None:
    """A few outer steps, then a test accuracy with its interval, above chance."""
    printed = run_example("train_maml.py", archive, "--steps", 4)
    assert len(numbers(r"step 4: loss (\S+), accuracy \S+ %", printed)) == 1
    (accuracy,) = numbers(r"test accuracy (\S+) ± \S+ % \(3 episodes\)", printed)
    assert accuracy > 25


def test_the_data_loader_keeps_order_and_place(run_example: Run, archive: Path) -> None:
    """Each epoch has every episode once, in an order of its own; the parts of a broken one are that order."""
    printed = run_example("data_loader.py", archive)
    epochs: dict[str, list[int]] = {"0": [], "1": []}
    for epoch, indices in re.findall(r"epoch (\d): episodes (\[.*?\])", printed):
        epochs[epoch] += ast.literal_eval(indices)
    assert sorted(epochs["0"]) == sorted(epochs["1"]) == list(range(8))
    assert epochs["0"] != epochs["1"]
    assert f"epoch 0 in two parts: {epochs['0']}" in printed


@pytest.mark.skipif(importlib.util.find_spec("higher") is None, reason="needs the package higher")
def test_the_loop_of_higher_runs(run_example: Run, archive: Path) -> None:
    """Three epochs, and better than chance at their end."""
    accuracies = numbers(r"epoch \d: accuracy (\S+)", run_example("higher_loop.py", archive))
    assert len(accuracies) == 3
    assert sum(accuracies) / 3 > 0.25


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="needs the package lightning")
def test_lightning_trains_and_saves_the_streams_place(run_example: Run, archive: Path, tmp_path: Path) -> None:
    """Far above chance; and a checkpoint of its own holds the stream's state after three epochs of two meta-batches."""
    import torch

    printed = run_example("lightning_loop.py", archive, warnings="default")  # its own are many
    (accuracy,) = numbers(r"test_accuracy\s+(\S+)", printed)
    assert accuracy > 0.5
    (checkpoint,) = tmp_path.glob("**/*.ckpt")
    state = torch.load(checkpoint, weights_only=False)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert [one["next_batch"] for one in state] == [6]


def test_webdataset_alone_reads_it(run_example: Run, archive: Path) -> None:
    """Every training episode, without mamldata."""
    pytest.importorskip("webdataset")
    lines = run_example("read_webdataset.py", archive, missing=("mamldata",)).splitlines()
    same = "support (5, 28, 28, 1), labels [0, 1, 2, 3, 4], query (5, 3, 28, 28, 1)"
    assert lines == [f"episode {index:08d}: {same}" for index in range(8)]


@pytest.mark.parametrize("alpha", [None, 2])
def test_numpy_alone_draws_a_thin_archive(
    run_example: Run, glyphs_root: Path, tmp_path: Path, alpha: int | None
) -> None:
    """The images of its episodes, by a reader written from the page on the format alone; one flipped bit is found."""
    import torch

    thin, missing = tmp_path / "thin", ("mamldata", "torch", "webdataset")
    build("glyphs", thin, episodes={"train": 8, "test": 3}, k_query=4, thin=True, query_alpha=alpha, root=glyphs_root)
    first, *lines = run_example("read_thin.py", thin, "train", 0, 8, missing=missing).splitlines()
    assert first == f"archive {read_archive(thin).digest}"
    stream = EpisodeStream(thin, shuffle=False, dtype=torch.uint8)
    for line, batch in zip(lines, stream, strict=True):
        parts = [part.permute(0, 1, 3, 4, 2).numpy().tobytes() for part in (batch.support_x, batch.query_x)]
        assert line.split()[-2:] == [sha256_bytes(part) for part in parts]
    data = bytearray((thin / "images-00000.npy").read_bytes())
    data[5000] ^= 1
    (thin / "images-00000.npy").write_bytes(data)
    assert "images-00000.npy is damaged" in run_example("read_thin.py", thin, missing=missing, code=1)


def test_numpy_alone_reads_and_verifies_it(run_example: Run, archive: Path, tmp_path: Path) -> None:
    """Every episode of every split with its classes, and the digest; one flipped bit is found."""
    missing = ("mamldata", "torch", "webdataset")
    first, _, *lines = run_example("read_numpy.py", archive, missing=missing).splitlines()
    about = read_archive(archive)
    assert first == f"digest sha256:{about.digest}"
    assert [line.partition(":")[0] for line in lines] == [
        f"{split} episode {index}" for split, count in (("test", 3), ("train", 8), ("val", 2)) for index in range(count)
    ]
    assert all(line.count("alphabet") == 5 for line in lines)

    copy = tmp_path / "copy"
    shutil.copytree(archive, copy)
    data = bytearray((copy / "train-00000.tar").read_bytes())
    data[5000] ^= 1
    (copy / "train-00000.tar").write_bytes(data)
    assert "train-00000.tar is damaged" in run_example("read_numpy.py", copy, missing=missing, code=1)
