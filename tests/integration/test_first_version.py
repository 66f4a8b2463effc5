"""Files that the first version wrote are read, verified, resumed and evaluated. See tests/fixtures/first/README.md."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import mamldata
from cli.main import main

FIXTURES = Path(__file__).parents[1] / "fixtures" / "first"
DIGEST = "3bdd0f6bca59eab954c1774e780c5335305d8e339e1e23585a6a7fb4ddd3f1f3"
COUNTS = "--n-way 3 --k-query 2 --train 12 --val 4 --test 6 --episodes-per-shard 8"
COMMON = (
    "--steps 12 --filters 4 --meta-batch-size 4 --meta-lr 0.01 --seed 3 "
    "--eval-every 6 --eval-episodes 4 --log-every 1 --device cpu"
)
RUNS = {
    "maml": "--algorithm maml --inner-lr 0.1",
    "maml++": "--algorithm maml++ --inner-lr 0.1 --inner-steps 2 --meta-clip-norm 5 "
    "--msl-epochs 1 --epoch-steps 4 --first-order-epochs 1",
    "meta-sgd": "--algorithm meta-sgd --inner-lr 0.1 --normalise",
    "anil": "--algorithm anil --inner-lr 0.1 --inner-steps 2 --meta-optimizer sgd",
    "pretrain": "--algorithm pretrain --inner-lr 0.1",
    "frozen": "--algorithm maml --bn frozen --inner-lr 0.02 --network conv4-pool",
}


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, in the working directory, as they were when they were written."""
    folder = tmp_path / "first"
    shutil.copytree(FIXTURES, folder)
    monkeypatch.chdir(folder)
    return folder


def run(*arguments: str) -> str:
    """What a command prints on stdout; it must succeed."""
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


def expected(name: str) -> dict[str, Any]:
    """What the first version found for a run that was not stopped."""
    values: dict[str, Any] = json.loads((FIXTURES / "expected.json").read_text())[name]
    return values


def evaluated(checkpoint: Path) -> dict[str, Any]:
    """The evaluation of a checkpoint on the archive's test episodes."""
    values: dict[str, Any] = json.loads(run("eval", str(checkpoint), "archive", "--device", "cpu", "--json"))
    return values


def test_bank_and_archive_of_the_first_version_are_whole(there: Path) -> None:
    """``verify`` finds the raw file, the bank and the archive right."""
    run("verify", "tiny.toml", "--root", "root")
    run("verify", "archive")


def test_bank_of_the_first_version_is_used_and_gives_the_same_archive(there: Path) -> None:
    """A build reads the bank that is there, makes no new one, and gives the digest of the first version."""
    bank = there / "root" / "tiny" / "tiny-16.npy"
    before = bank.stat()
    run("build", "tiny.toml", "--root", "root", "--out", "again", *COUNTS.split())
    assert mamldata.read_archive(there / "again").digest == DIGEST
    after = bank.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    for shard in (there / "archive").glob("*.tar"):
        assert (there / "again" / shard.name).read_bytes() == shard.read_bytes()


def test_archive_of_the_first_version_streams(there: Path) -> None:
    """Every episode of every split comes once, with the same images as in the tar."""
    for split, episodes in {"train": 12, "val": 4, "test": 6}.items():
        stream = mamldata.EpisodeStream(
            "archive", split=split, batch_size=2, shuffle=False, verify=True, dtype=torch.uint8
        )
        assert [index for batch in stream for index in batch.index.tolist()] == list(range(episodes))
    assert mamldata.read_archive(there / "archive").digest == DIGEST


def test_finished_run_of_the_first_version_is_evaluated(there: Path) -> None:
    """The checkpoint of a finished run gives the accuracy and the loss that it gave then."""
    found = evaluated(there / "runs" / "maml-finished" / "maml_step12_acc0.6667.pt")
    assert found["loss"] == pytest.approx(expected("maml")["test_loss"], rel=1e-3)
    assert found["accuracy"] == pytest.approx(expected("maml")["test_accuracy"], abs=0.06)
    assert "is done" in CliRunner().invoke(main, [*command("maml", "runs/maml-finished")]).stderr


def command(name: str, out: str) -> list[str]:
    """The command that began a run, with ``--resume``."""
    return ["train", "archive", "--out", out, "--resume", *COMMON.split(), *RUNS[name].split()]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_stopped_run_of_the_first_version_is_resumed(there: Path, name: str) -> None:
    """A run that was stopped after step 9 goes on to the weights that it would have had without the stop."""
    folder = there / "runs" / f"{name}-midway"
    run(*command(name, str(folder)))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "train"] == list(range(1, 13))
    [last] = folder.glob("*_step12_*.pt")
    weights = torch.load(last, weights_only=True)["weights"]
    sums = {key: float(value.double().abs().sum()) for key, value in weights.items()}
    # Other processors round otherwise, and Adam makes much of little: three steps of it.
    assert sums == pytest.approx(expected(name)["weights"], rel=0.01, abs=0.01)
    found = evaluated(last)
    assert found["loss"] == pytest.approx(expected(name)["test_loss"], rel=0.02)
    assert np.isfinite(found["accuracy"])
