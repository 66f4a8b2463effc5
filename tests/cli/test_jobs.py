"""Commands in processes of their own: started together by torchrun, and stopped by signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from cli.main import main
from mamldata.errors import LostPeerError, PeerError, StoppedError, WriteError
from trainer.runs.checkpoint import find_last, load_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes and signals as on Linux")

PATIENCE = 300  # seconds, on a machine with other things to do, before a command is taken for hung
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
OPTIONS = ("--steps", "12", "--meta-batch-size", "3", "--eval-every", "8", "--log-every", "1", "--device", "cpu")


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """As many as the processes have, so that bits can be compared."""


@pytest.fixture(scope="module")
def archive(glyphs_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small archive of small images."""
    out = tmp_path_factory.mktemp("jobs") / "archive"
    options = ("--train", "20", "--val", "5", "--test", "7", "--k-query", "2", "--image-size", "16", "--workers", "1")
    result = CliRunner().invoke(main, ["build", "glyphs", "--out", str(out), *options, "--root", str(glyphs_root)])
    assert result.exit_code == 0, result.output
    return out


def start(*command: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def run(*command: object) -> tuple[int, str, str]:
    process = start(*command)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    return process.returncode, stdout, stderr


def here(*arguments: object) -> str:
    """A command in this process; its output."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    last = find_last(run_dir)
    assert last is not None
    return load_checkpoint(last).weights


@pytest.mark.parametrize(
    ("error", "rank", "local_rank", "code", "shown"),
    [
        (WriteError("no space"), 5, 1, 1, "Error: no space"),
        (PeerError(3, "no space", 1), 0, 0, 1, ""),
        (PeerError(3, "no such way", 2), 4, 0, 2, ""),
        (LostPeerError("gone"), 0, 0, 1, "Error: gone"),
        (LostPeerError("gone"), 9, 1, 1, "Error: gone"),
        (LostPeerError("gone"), 2, 2, 1, ""),
        (StoppedError("saved"), 0, 0, 75, "saved"),
        (StoppedError("saved"), 8, 0, 75, ""),
        (click.UsageError("no such option"), 8, 0, 2, "Error: no such option"),
        (click.UsageError("no such option"), 1, 1, 2, ""),
        (KeyboardInterrupt(), 0, 0, 1, "Error: Interrupted."),
        (KeyboardInterrupt(), 8, 0, 1, ""),
    ],
)
def test_what_a_process_of_a_job_shows(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: BaseException,
    rank: int,
    local_rank: int,
    code: int,
    shown: str,
) -> None:
    """Of what all processes meet each line is shown once, of what one meets by that one; torchrun is told all."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("cli.commands.datasets.list_datasets", fail)
    monkeypatch.setattr("cli.main._PATIENCE", 0)
    told = tmp_path / "error.json"
    environment = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "TORCHELASTIC_ERROR_FILE": str(told)}
    result = CliRunner().invoke(main, ["datasets"], env=environment)
    assert result.exit_code == code
    lines = result.stderr.splitlines()
    assert (lines[-1] if lines else "").startswith(shown)
    assert bool(lines) == bool(shown)
    if not isinstance(error, KeyboardInterrupt):
        assert json.loads(told.read_text())["message"]["message"] == str(error)


LONG = ("--eval-inner-steps", "1000000", "--inner-lr", "0.001", "--filters", "4")


def told(process: subprocess.Popen[str], start: str) -> None:
    """Read what a process says up to a line."""
    assert process.stderr is not None
    while not (line := process.stderr.readline()).startswith(start):
        assert line


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_long_validation_is_broken_off(archive: Path, tmp_path: Path, number: signal.Signals) -> None:
    """One that would take hours ends at a signal, with its step saved; so does an evaluation."""
    out = tmp_path / "run"
    process = start(sys.executable, "-m", "mamldata", "train", archive, "--out", out, *OPTIONS, *LONG)
    told(process, "step 8/12")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75
    assert f"{number.name}: stopping as soon as the work so far is saved." in stderr
    assert stderr.splitlines()[-1] == (
        f"Stopped by {number.name}: step 8 of 12 is saved in {out}. It will be validated when the run is resumed. "
        "The same command with --resume continues it."
    )
    assert [path.name for path in out.glob("*.pt")] == ["maml_step8.pt"]
    checkpoint, question = out / "maml_step8.pt", ("--inner-steps", "1000000", "--device", "cpu")
    process = start(sys.executable, "-c", SIGNALLED, str(number.value), "eval", checkpoint, archive, *question)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, stderr
    assert stderr.splitlines()[-1].startswith(f"Stopped by {number.name} amid an evaluation")


# A command that gets a signal at its 50th inner step.
SIGNALLED = """
import signal, sys
from trainer.maml import adapt, variants
from cli.main import main
taken = []
def descend(*arguments):
    taken.append(1)
    if len(taken) == 50:
        signal.raise_signal(int(sys.argv[1]))
    return adapt.descend(*arguments)
variants.descend = descend
main(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(archive: Path, tmp_path: Path) -> None:
    """Amid an outer step that would take hours: by the system, so that no thread and no operation is waited for."""
    endless = ("--algorithm", "fomaml", "--inner-steps", "1000000", "--filters", "1", "--inner-lr", "0.001")
    process = start(sys.executable, "-m", "mamldata", "train", archive, "--out", tmp_path / "run", *OPTIONS, *endless)
    told(process, "Computing with")
    process.send_signal(signal.SIGINT)
    told(process, "SIGINT: stopping as soon as the work so far is saved. Interrupt again to stop at once")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGINT


@pytest.mark.slow
def test_torchrun(archive: Path, tmp_path: Path) -> None:
    """Train and eval share their work, and print once what one process prints."""
    # Plain descent, as Adam would make steps of rounding errors where there is next to no gradient.
    options = (*OPTIONS, "--meta-optimizer", "sgd", "--meta-lr", "0.1")
    code, stdout, stderr = run(*TORCHRUN, "-m", "mamldata", "train", archive, "--out", tmp_path / "run", *options)
    assert code == 0, stderr
    assert stdout.startswith(f"best {tmp_path / 'run'}/maml_step")
    for text in ("step 5/12  loss ", "step 8  val ", "Done in ", "Next: mamldata eval "):
        assert stderr.count(text) == 1
    here("train", archive, "--out", tmp_path / "alone", *options)
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "alone")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-3)  # test_distributed has it in float64

    question = ("eval", tmp_path / "run", archive, "--device", "cpu", "--json")
    code, stdout, stderr = run(*TORCHRUN, "-m", "mamldata", *question)
    assert code == 0, stderr
    assert json.loads(stdout) == json.loads(here(*question))


@pytest.mark.slow
def test_torchrun_shows_a_failure_once(archive: Path, tmp_path: Path) -> None:
    """What is wrong with a command is said once, before torchrun's report, whose cause it is, too."""
    code, stdout, stderr = run(*TORCHRUN, "-m", "mamldata", "train", tmp_path / "no-archive", "--out", tmp_path / "run")
    assert code != 0
    assert stdout == ""
    before, _, report = stderr.partition("Traceback")  # torchrun's own
    assert before.count("Error: ") == 1
    assert "is neither the folder of an archive nor a dataset" in before
    assert "cli/main.py" not in report
    assert "is neither the folder of an archive nor a dataset" in report.partition("Root Cause")[2]
    code, _, stderr = run(*TORCHRUN, "-m", "mamldata", "train", archive, "--out", tmp_path / "run", "--steps", "many")
    assert code != 0
    assert stderr.count("Error: Invalid value for '--steps'") == 1


@pytest.mark.slow
def test_compare_is_for_one_process(archive: Path, tmp_path: Path) -> None:
    """Several would train the same runs at the same time."""
    code, stdout, stderr = run(*TORCHRUN, "-m", "mamldata", "compare", archive, "--out", tmp_path / "out")
    assert code != 0
    assert stdout == ""
    assert stderr.partition("Traceback")[0].count("start it without torchrun") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stopped_run_is_saved_and_goes_on(archive: Path, tmp_path: Path, number: signal.Signals) -> None:
    """A signal ends training with exit code 75 and no traceback; resumed, it ends the same to the bit."""
    train = (sys.executable, "-m", "mamldata", "train", archive, "--out", tmp_path / "run", *OPTIONS, "--resume")
    process = start(*train)
    assert process.stderr is not None
    while not (line := process.stderr.readline()).startswith("step 2/"):
        assert line
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75
    assert stdout == ""
    assert "Traceback" not in stderr
    last = find_last(tmp_path / "run")
    assert last is not None
    step = load_checkpoint(last).step
    assert 2 <= step < 12
    said = f"Stopped by {number.name}: step {step} of 12 is saved in {tmp_path / 'run'}."
    assert stderr.splitlines()[-1] == f"{said} The same command with --resume continues it."
    code, _, stderr = run(*train)
    assert code == 0, stderr
    here("train", archive, "--out", tmp_path / "whole", *OPTIONS)
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
