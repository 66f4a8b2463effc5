"""The kit for a GPU still runs: every part of it at a tiny size on the CPU, where its figures mean nothing."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PARTS = ["ceilings", "truth", "ring", "capture", "times", "stream", "evaluation", "headline"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Any:
    """The module of the kit."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("gpu", "common", "train", "jax_step"):  # those of other folders
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("gpu")


def numbers_of(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for one in value.values() for number in numbers_of(one)]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_runs(part: str, gpu: Any, glyphs_root: Path) -> None:
    """To its end, with rows of JSON; and what it proves is right on the CPU, too."""
    options = gpu.parser().parse_args(["--device", "cpu", "--tiny", "--root", str(glyphs_root)])
    rows = [json.loads(json.dumps(row)) for row in gpu.rows_of(part, options)]
    assert rows
    assert not [row for row in rows if "failed" in row or "error" in row]
    assert all(row["part"] == part and row.get("right", True) for row in rows), rows
    assert all(math.isfinite(number) for row in rows for number in numbers_of(row))


def test_parts_and_limits(gpu: Any) -> None:
    """The parts are those that are tried out here, and their limits are ten minutes together."""
    assert list(gpu.PARTS) == PARTS
    assert sum(limit for limit, _ in gpu.PARTS.values()) <= 600


def test_what_a_part_has_found_is_kept_when_it_is_cut_off(gpu: Any) -> None:
    """Its rows are handed on as they come; then its end is told, with the reason."""
    told: list[str] = []
    code = "import time; print('first', flush=True); time.sleep(600)"
    gpu.supervise([sys.executable, "-c", code], 1.0, "slow", told.append)
    assert told == ["first", json.dumps({"part": "slow", "failed": "cut off after 1 s"})]
    told.clear()
    gpu.supervise([sys.executable, "-c", "print('first'); raise SystemExit(3)"], 60.0, "bad", told.append)
    assert told == ["first", json.dumps({"part": "bad", "failed": "ended with exit code 3"})]


def test_a_failure_ends_a_part_with_its_reason(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the rows before it stay."""

    def part(_: Any) -> Any:
        yield {"x": 1}
        raise RuntimeError("CUDA error: no")

    monkeypatch.setitem(gpu.PARTS, "ring", (1, part))
    first, second = gpu.rows_of("ring", gpu.parser().parse_args(["--device", "cpu", "--tiny"]))
    assert first["x"] == 1
    assert second["failed"] == "RuntimeError: CUDA error: no"


def test_the_peer_takes_the_same_step(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where JAX is installed, its meta-gradient is ours."""
    pytest.importorskip("jax", reason="JAX is not installed")
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent / "tests" / "trainer"))
    from problems import of, run

    network = gpu.build_network("conv4", 1, 28, 5, 0, 4)
    inner = gpu.TrainSettings(inner_steps=2, inner_lr=0.1).inner_loop()
    batch = gpu.made_up(2, torch.device("cpu"), shots=(1, 3))
    found = gpu.jax_step(network, batch, 2, 0.1, repeats=1)
    expected = run("loop", network, of(network), batch, inner)
    assert found["loss"] == pytest.approx(float(expected.loss), rel=1e-4)
    for name, value in expected.gradient.weights.items():
        there = torch.tensor(found["gradient"][name].tolist())
        torch.testing.assert_close(there, value, rtol=1e-2, atol=1e-4)
