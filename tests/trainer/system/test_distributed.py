"""Real processes, started by the real torchrun, or by hand with its variables as Slurm's users do."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import job
import pytest
import torch
from synthetic import Synthetic

from mamldata.errors import LostPeerError, MamldataError, RequestError
from trainer.evaluation import Evaluation, evaluate
from trainer.loop import train
from trainer.results import read_result, result_of
from trainer.runs.checkpoint import find_last, load_checkpoint
from trainer.system.distributed import ALONE, World, joined, world_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes, signals and limits as on Linux")

TIMED = {"ms_per_step", "images_per_second", "data_wait_percent", "seconds"}
PATIENCE = 300  # seconds, on a machine with other things to do, before a job is taken for hung
CALM = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
PLACE = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.fixture
def float64() -> Iterator[None]:
    """What the processes of job.py compute in."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def torchrun(world_size: int, folder: Path, what: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    return subprocess.Popen(
        [*launcher, job.__file__, str(folder), what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=CALM,
    )


def by_hand(world_size: int, folder: Path, what: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**CALM, "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, job.__file__, str(folder), what],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world_size)
    ]


def finish(process: subprocess.Popen[str]) -> str:
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    return stderr


def wait_for(process: subprocess.Popen[str], start: str) -> None:
    """Read what a process says up to a line."""
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith(start):
        assert line, process.communicate()[1]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    last = find_last(run_dir)
    assert last is not None
    return load_checkpoint(last).weights


def rows(run_dir: Path) -> list[dict[str, object]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]


def timed(run_dir: Path) -> list[dict[str, float]]:
    """What a run says of its training steps."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["event"] == "train"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    torch.set_default_dtype(torch.float64)
    try:
        job.equal(folder, ALONE)
    finally:
        torch.set_default_dtype(torch.float32)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_as_with_one_process(tmp_path: Path, alone: Path, world_size: int) -> None:
    """Loss curve, validations and final weights are those of one process; and evaluations, to the bit."""
    finish(torchrun(world_size, tmp_path, "equal"))
    for name in job.EQUAL:
        ours, theirs = weights(tmp_path / name), weights(alone / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")
        for one, other in zip(rows(tmp_path / name), rows(alone / name), strict=True):
            assert one.keys() == other.keys()
            for key, value in one.items():
                # Accuracies are counted in float32.
                tolerance = 1e-9 if key == "loss" else 1e-6
                assert value == (other[key] if isinstance(value, str) else pytest.approx(other[key], rel=tolerance))
        for row in timed(tmp_path / name):
            # Each step's images are those of all processes: 5 episodes of 5 classes with 1 + 5 images.
            assert row["images_per_second"] * row["ms_per_step"] / 1000 == pytest.approx(5 * 5 * 6)
        told = {(tmp_path / f"{name}.{rank}.json").read_text() for rank in range(world_size)}
        evaluation = evaluate_in_float64(tmp_path / name)
        assert [json.loads(one) for one in told] == [json.loads(json.dumps(evaluation.to_json()))]
        [kept] = map(read_result, (tmp_path / name / "results").iterdir())
        assert kept.environment["processes"] == world_size
        here = result_of(evaluation)
        assert replace(kept, environment=here.environment) == here
        assert [episode.index for episode in kept.episodes] == list(range(14))


def evaluate_in_float64(run_dir: Path) -> Evaluation:
    torch.set_default_dtype(torch.float64)
    try:
        return evaluate(run_dir, Synthetic(size=8), episodes=14, device="cpu")
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_fewer_go_on(tmp_path: Path, float64: None) -> None:
    """One of two gets kill -9: torchrun ends with an error, the other one says what to do; one process goes on."""
    process = torchrun(2, tmp_path, "slow")
    wait_for(process, "step 12/")
    os.kill(int((tmp_path / "pid.1").read_text()), signal.SIGKILL)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "LostPeerError: A process of this job was killed, or cannot be reached. Start the job again" in stderr
    assert "Signal 9 (SIGKILL) received by PID" in stderr
    last = find_last(tmp_path / "run")
    assert last is not None
    assert load_checkpoint(last).step == 10

    train(job.SLOW, Synthetic(size=8), tmp_path / "run", resume=True)
    train(job.SLOW, Synthetic(size=8), tmp_path / "undisturbed")
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "undisturbed")
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-9, atol=1e-9)
    assert [row["step"] for row in rows(tmp_path / "run")] == [row["step"] for row in rows(tmp_path / "undisturbed")]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path: Path) -> None:
    """SIGUSR1 to one of two: both save at the same step and end with 75; resumed, they end the same to the bit."""
    processes = by_hand(2, tmp_path, "slow")
    wait_for(processes[0], "step 5/")
    processes[1].send_signal(signal.SIGUSR1)
    said = [process.communicate(timeout=PATIENCE)[0].splitlines()[-1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75]
    assert said[0] == said[1]
    last = find_last(tmp_path / "run")
    assert last is not None
    saved = load_checkpoint(last)
    assert 5 <= saved.step < 10
    assert said[0].startswith(f"Stopped by SIGUSR1: step {saved.step} of 20 is saved in ")

    for process in by_hand(2, tmp_path, "rest"):
        finish(process)
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "undisturbed")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert rows(tmp_path / "run") == rows(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_signal_to_one_process_breaks_a_validation_off_in_all(tmp_path: Path) -> None:
    """Amid a validation: both leave it at the same step, which is saved; resumed, they end the same to the bit."""
    processes = by_hand(2, tmp_path, "validating")
    said = [process.communicate(timeout=PATIENCE)[0].splitlines()[-1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75]
    place = tmp_path / "run"
    told = f"Stopped by SIGUSR1: step 10 of 20 is saved in {place}. It will be validated when the run is resumed."
    assert said == [told, told]
    assert [path.name for path in place.glob("*.pt")] == ["maml_step10.pt"]
    for process in by_hand(2, tmp_path, "rest"):
        finish(process)
    ours, theirs = weights(place), weights(tmp_path / "undisturbed")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert rows(place) == rows(tmp_path / "undisturbed")


@pytest.mark.slow
def test_torchrun_hands_sigterm_on(tmp_path: Path) -> None:
    """SIGTERM to torchrun stops its processes with a checkpoint between validations."""
    process = torchrun(2, tmp_path, "slow")
    wait_for(process, "step 3/")
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=PATIENCE)
    assert "Stopped by SIGTERM: step " in stdout
    last = find_last(tmp_path / "run")
    assert last is not None
    saved = load_checkpoint(last)
    assert 3 <= saved.step < 10
    assert saved.accuracy is None


@pytest.mark.slow
def test_what_fails_on_one_process_fails_on_all(tmp_path: Path) -> None:
    """A process that cannot go on ends the others, too, whenever that is; it says why, and they say who."""
    finish(torchrun(2, tmp_path, "failing"))
    first, second = (json.loads((tmp_path / f"told.{rank}.json").read_text()) for rank in range(2))
    expected: dict[str, tuple[int, str, str, int | None]] = {
        "too many": (0, "RequestError", "2 processes cannot share a meta-batch of 1: each needs an episode.", 2),
        "locked": (0, "RequestError", "Another process is training in ", 2),
        "full": (0, "WriteError", "No space left to write ", 1),
        "otherwise": (
            0,
            "RequestError",
            "Rank 1 of this job (here) has different settings or data from rank 0 (there):",
            2,
        ),
        "damaged": (1, "DamagedError", "train episode 1", 1),
        "damaged val": (1, "DamagedError", "val episode ", 1),
        "diverged": (0, "DivergedError", "The validation loss at step 2 is nan: training has diverged.", 1),
        "no checkpoint": (0, "RequestError", "There is no run folder, checkpoint or model ", 2),
        "bug": (1, "AssertionError", "a bug", None),
        "apart": (0, "MamldataError", "The weights at step 7 differ between rank 0 and 1: ", 1),
    }
    assert first.keys() == second.keys() == expected.keys()
    for name, (rank, kind, message, code) in expected.items():
        failed, other = (first, second)[rank][name], (first, second)[1 - rank][name]
        assert failed[0] == kind
        assert failed[1].startswith(message)
        assert failed[2] == code
        assert other == ["PeerError", f"The process of rank {rank} failed: {failed[1]}", code or 1]
    assert "  inner_lr: 0.1 there, 1.1 here\n" in first["otherwise"][1]
    assert find_last(tmp_path / "full") is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, r"WORLD_SIZE is 2, but not set: RANK, MASTER_ADDR, MASTER_PORT. Start several processes"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            r"are 2, 2 and 0, but must be numbers",
        ),
        (
            {"WORLD_SIZE": "x", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            r"are 0, x and 0, but must be numbers",
        ),
    ],
)
def test_variables_that_cannot_be(environment: dict[str, str], message: str) -> None:
    """What is wrong with the variables is said before anybody waits for anybody."""
    with pytest.raises(RequestError, match=message):
        world_of(environment)


def test_variables() -> None:
    """The world is what torchrun says; without it, or with one process, it is this one alone."""
    assert world_of({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", **PLACE}) == World(5, 8, 1)
    assert world_of({}) == world_of({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", **PLACE}) == ALONE


def test_devices() -> None:
    """Several processes share no device but the processor."""
    assert World(1, 2, 1).device(torch.device("cpu")) == torch.device("cpu")
    assert ALONE.device(torch.device("mps")) == torch.device("mps")
    with pytest.raises(RequestError, match=r"train on cpu or cuda, not on mps. Set device to cpu"):
        World(1, 2, 1).device(torch.device("mps"))
    with pytest.raises(RequestError, match=r"too few for the process of local rank 99. Start one process per GPU"):
        World(99, 100, 99).device(torch.device("cuda"))


def test_one_process_pays_nothing() -> None:
    """Alone, exchanges hand back what they were given, and errors are what they were."""
    tensors = [torch.ones(2), torch.zeros(3)]
    assert all(one is other for one, other in zip(ALONE.average(tensors, 1.0), tensors, strict=True))
    assert ALONE.gather("x") == ["x"]
    assert ALONE.from_first(lambda: 7) == 7
    fails: Callable[[], None] = lambda: (_ for _ in ()).throw(MamldataError("as it was"))  # noqa: E731
    with pytest.raises(MamldataError, match="as it was"), ALONE.together():
        fails()


def test_nccl_is_aborted_where_a_peer_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Destroying the group would wait for exchanges that never end; after a good end it waits for nothing."""
    calls: list[str] = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "0")
    monkeypatch.setenv("MASTER_ADDR", "a")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    dist = torch.distributed
    monkeypatch.setattr(dist, "init_process_group", lambda kind: calls.append(kind))
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroy"))

    def abort() -> None:
        calls.append("abort")
        raise RuntimeError("and this fails, too")

    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", abort)
    with pytest.raises(LostPeerError), joined():
        raise LostPeerError("gone")
    with joined():
        pass
    assert calls == ["cpu:gloo,cuda:nccl", "abort", "cpu:gloo,cuda:nccl", "destroy"]
