"""Gradients that are prepared once: the road to CUDA graphs on a machine without a GPU, and the choice of an engine."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import batch, named, perceptron, run, small_convnet
from synthetic import Synthetic
from torch import Tensor, nn

from cli.main import main
from mamldata.errors import RequestError
from mamldata.streaming.batch import EpisodeBatch
from trainer.data import live_data
from trainer.learner import Learner
from trainer.loop import train
from trainer.maml import choice
from trainer.maml.algorithms import BN_MODES, ORDERS, RATES, InnerLoop
from trainer.maml.choice import FirstThatWorks, engine_for
from trainer.maml.engines import FINAL, Outcome
from trainer.maml.graphed import MOST_STEPS, WARM_UPS, CudaGraphs, PreparationError, Prepared, compiled
from trainer.maml.objective import Objective
from trainer.maml.parameters import MetaParameters, meta_parameters
from trainer.maml.variants import method_of
from trainer.runs.checkpoint import load_checkpoint
from trainer.settings import TrainSettings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BASE = InnerLoop(steps=2, lr=0.1, order="second", bn="transductive")
SETTINGS = TrainSettings(
    steps=6,
    inner_steps=2,
    inner_lr=0.1,
    meta_batch_size=2,
    eval_every=3,
    eval_episodes=2,
    log_every=2,
    device="cpu",
    filters=4,
)


class PlainGraphs(CudaGraphs):
    """A capture is a call, and so is each replay, which overwrites the results of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.captures = self.replays = 0

    def capture(self, work: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], Callable[[], object]]:
        self.captures += 1
        places = [value.clone() for value in work()]
        for place in places:
            place.zero_()  # a captured graph has not run yet

        def replay() -> None:
            self.replays += 1
            for place, value in zip(places, work(), strict=True):
                place.copy_(value)

        return places, replay


def graphed(
    engine: Prepared,
    network: nn.Module,
    at: MetaParameters,
    inner: InnerLoop,
    seed: int,
    objective: Objective = FINAL,
    *,
    every_step: bool = False,
) -> Outcome:
    method = method_of(network, inner, "graphed")
    return engine(network, at, batch(seed=seed), method, replace(objective, every_step=every_step))


def same(one: Outcome, other: Outcome) -> bool:
    """To the bit."""
    pairs = [(named(one.gradient), named(other.gradient)), ({"l": one.loss}, {"l": other.loss})]
    pairs.append(({"s": one.score}, {"s": other.score}))
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


@pytest.mark.parametrize("objective", [FINAL, Objective("query", (0.3, 0.7))], ids=["final", "multi-step"])
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("bn", BN_MODES)
@pytest.mark.parametrize("order", ORDERS)
def test_equal_to_vmap(order, bn, rates, objective) -> None:
    """To the bit, for new meta-batches and for parameters that have changed since the capture."""
    network, inner = small_convnet(), replace(BASE, order=order, bn=bn, rates=rates)
    at, graphs = meta_parameters(network, inner), PlainGraphs()
    engine = Prepared(graphs)
    for seed in range(3):
        outcome = graphed(engine, network, at, inner, seed, objective, every_step=True)
        assert same(outcome, run("vmap", network, at, batch(seed=seed), inner, objective, every_step=True))
        with torch.no_grad():
            for value in at.tensors():
                value.sub_(0.01)
    assert (graphs.captures, graphs.replays) == (1, 3)


def test_reptile_and_a_network_without_norms() -> None:
    """An outer loop without query gradients, and other parameter trees, come the same way."""
    for network, inner, objective in [
        (small_convnet(), replace(BASE, order="first"), Objective("reptile")),
        (perceptron(), BASE, FINAL),
    ]:
        at, engine = meta_parameters(network, inner), Prepared(PlainGraphs())
        for seed in range(2):
            assert same(
                graphed(engine, network, at, inner, seed, objective),
                run("vmap", network, at, batch(seed=seed), inner, objective),
            )


def test_loss_and_score_outlive_the_next_step() -> None:
    """The log keeps them by reference: they must not become those of the last step."""
    network, engine = small_convnet(), Prepared(PlainGraphs())
    at = meta_parameters(network, BASE)
    first = graphed(engine, network, at, BASE, 1)
    kept = first.loss.clone(), first.score.clone()
    second = graphed(engine, network, at, BASE, 2)
    assert torch.equal(first.loss, kept[0])
    assert torch.equal(first.score, kept[1])
    assert not torch.equal(first.loss, second.loss)


def test_captured_again_where_the_work_differs() -> None:
    """By inner loop, objective, scores, shapes and precision; the last few are kept, whatever the memory of more."""
    network, graphs = small_convnet(), PlainGraphs()
    at, engine = meta_parameters(network, BASE), Prepared(graphs)
    different: list[dict[str, Any]] = [
        {"inner": BASE},
        {"inner": replace(BASE, order="first")},
        {"inner": BASE, "objective": Objective("query", (0.5, 0.5))},
        {"inner": BASE, "every_step": True},
    ]
    assert len(different) == MOST_STEPS
    for more in different * 2:
        graphed(engine, network, at, seed=1, **more)
    assert graphs.captures == MOST_STEPS
    method = method_of(network, BASE, "graphed")
    for count in (2, 4, 2):
        outcome = engine(network, at, batch(tasks=count), method)
        assert same(outcome, run("vmap", network, at, batch(tasks=count), BASE))
    assert graphs.captures == MOST_STEPS + 2
    assert len(engine._steps) == MOST_STEPS


@pytest.mark.parametrize(
    "point",
    [
        {"algorithm": "maml++", "msl_epochs": 2, "epoch_steps": 2},
        {"first_order_epochs": 1, "epoch_steps": 2},
        {"algorithm": "meta-sgd"},
    ],
    ids=["multi-step", "annealing", "learned rates"],
)
def test_runs_equal_those_of_vmap(point, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across log lines, epochs that change weights or order, and a resume: the same weights and records, to the bit."""
    made: list[PlainGraphs] = []

    def engine(name: str, *_: object, **__: object) -> Prepared:
        made.append(PlainGraphs())
        return Prepared(made[-1])

    def rows(folder: Path) -> list[tuple[int, float, list[float]]]:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [(row["step"], row["loss"], row["accuracy_by_step"]) for row in lines]

    settings = replace(SETTINGS, **point)
    expected = load_checkpoint(train(replace(settings, engine="vmap"), Synthetic(), tmp_path / "vmap").last).weights
    monkeypatch.setattr("trainer.learner.engine_for", engine)
    settings = replace(settings, engine="graphed", device="auto")
    train(replace(settings, steps=3, meta_schedule="constant"), Synthetic(), tmp_path / "part")
    assert made[-1].captures >= 2
    weights = load_checkpoint(train(settings, Synthetic(), tmp_path / "whole").last).weights
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert rows(tmp_path / "whole") == rows(tmp_path / "vmap")
    constant = replace(settings, meta_schedule="constant")
    whole = load_checkpoint(train(constant, Synthetic(), tmp_path / "constant").last).weights
    resumed = load_checkpoint(train(constant, Synthetic(), tmp_path / "part", resume=True).last).weights
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


class FakeGraph:
    replays = 0

    def replay(self) -> None:
        self.replays += 1


def test_how_a_step_is_captured(fake_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-ups on the stream of the capture; one stream and one pool for all; other threads may allocate meanwhile."""
    captures: list[tuple[object, ...]] = []
    streams: list[int] = []

    @contextlib.contextmanager
    def graph(
        graph: FakeGraph, pool: object = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        captures.append((pool, stream.number, capture_error_mode))
        yield

    def work() -> list[Tensor]:
        streams.append(torch.cuda.current_stream().number)  # type: ignore[attr-defined]
        return [torch.zeros(())]

    stream_class = torch.cuda.Stream
    monkeypatch.setattr(stream_class, "wait_stream", lambda *_: fake_gpu.log.append(("order", 0, 0)), raising=False)
    for name, fake in {"CUDAGraph": FakeGraph, "graph": graph, "graph_pool_handle": lambda: (0, 7)}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    graphs = CudaGraphs()
    for _ in range(2):
        graphs.capture(work)
    (side,) = {number for number in streams if number}
    assert streams == ([side] * WARM_UPS + [0]) * 2  # the fake capture leaves its stream alone
    assert captures == [((0, 7), side, "thread_local")] * 2
    assert fake_gpu.log.count(("order", 0, 0)) == 4


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.9", reason="older compilers do not know all of torch.func")
def test_compiled_equals_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one graph of operators with all derivatives, to the bit; without Inductor's kernels, which take minutes."""
    compile_, calls = torch.compile, []

    def quick(step: object, *, fullgraph: bool, dynamic: bool) -> object:
        calls.append((fullgraph, dynamic))
        return compile_(step, fullgraph=fullgraph, dynamic=dynamic, backend="aot_eager")  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "compile", quick)
    network, inner = small_convnet(), replace(BASE, steps=1)
    at, engine = meta_parameters(network, inner), Prepared(compiled)
    for seed in range(2):
        assert same(graphed(engine, network, at, inner, seed), run("vmap", network, at, batch(seed=seed), inner))
    assert calls == [(True, False)]


@pytest.mark.parametrize("engine", ["auto", "vmap"])
def test_a_compiled_run_has_the_parts_of_vmap(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever engine the settings name; the compiler is left out here."""
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    data, outcomes = Synthetic(), []
    for settings in (replace(SETTINGS, engine=engine, compile=True), replace(SETTINGS, engine="vmap")):
        learner = Learner(settings, data, data.describe(), CPU)
        outcomes.append(learner.gradient(data.batch("train", [0, 1]), 0, every_step=True))
    assert same(*outcomes)


@pytest.mark.slow
def test_more_steps_are_compiled_than_share_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run compiles at every change of the multi-step weights; torch's compiler gives up after eight of one code."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **more: compile_(step, backend="eager", **more))

    def times(factor: float) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        return lambda values: [value * factor for value in values]

    for factor in range(12):
        (found,) = compiled(times(float(factor)), [])([torch.ones(())])
        assert found == factor


@pytest.mark.slow
def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason of torch's compiler in one line."""

    def fails(_: object) -> Tensor:
        torch._dynamo.graph_break()
        return torch.zeros(())

    with pytest.raises(PreparationError, match=r"torch cannot compile this meta-gradient: .*graph_break"):
        compiled(fails, [])([torch.zeros(())])  # type: ignore[arg-type]


class Failing:
    def __init__(self, error: Exception) -> None:
        self.error, self.calls = error, 0

    def __call__(self, *_: Any, **__: Any) -> Outcome:
        self.calls += 1
        raise self.error


def oom() -> torch.cuda.OutOfMemoryError:
    return torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nAnd advice.")


@pytest.mark.parametrize(
    ("error", "reason"),
    [(oom(), "the GPU's memory is too small"), (PreparationError("torch cannot capture it"), "cannot capture it")],
    ids=["memory", "capture"],
)
def test_auto_goes_on_with_the_next_engine(error, reason, monkeypatch: pytest.MonkeyPatch) -> None:
    """And tells why, once; with the parts of the inner loop that belong to that engine."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    first = Failing(error)
    network = small_convnet()
    at = meta_parameters(network, BASE)
    engine = FirstThatWorks({"graphed": first, "loop": choice.pick_engine("loop")})
    method = method_of(network, BASE, "auto")
    with pytest.warns(UserWarning, match=f"engine graphed does not work here, loop does: .*{reason}"):
        outcome = engine(network, at, batch(), method)
    assert same(outcome, run("loop", network, at, batch(), BASE))
    engine(network, at, batch(), method)
    assert first.calls == 1
    with pytest.raises(type(error)):
        FirstThatWorks({"graphed": first})(network, at, batch(), method)


def test_which_engine_a_device_gets() -> None:
    """Graphs on CUDA, unless inner steps are checkpointed; elsewhere the loop; compiled ones only where they exist."""

    def names(engine: Any) -> list[str]:
        return [name for name, _ in engine._left]

    assert names(engine_for("auto", CUDA)) == ["graphed", "vmap", "loop"]
    assert names(engine_for("auto", CUDA, compile=True)) == ["graphed", "vmap"]
    assert engine_for("auto", CUDA, checkpoint=True) is engine_for("auto", CPU) is choice.pick_engine("loop")
    assert engine_for("vmap", CUDA) is choice.pick_engine("vmap")
    assert isinstance(engine_for("auto", CPU, compile=True), Prepared)
    assert isinstance(engine_for("graphed", CUDA), Prepared)


def test_graphs_are_refused_without_a_gpu(glyphs_root: Path, tmp_path: Path, capsys) -> None:
    """With usage's exit code, before anything is written."""
    with pytest.raises(RequestError, match="engine cannot be graphed with device cpu: only CUDA devices have graphs"):
        TrainSettings(engine="graphed", device="cpu")
    with pytest.raises(RequestError, match=r"The engine graphed needs a CUDA device, and this is cpu. Use the engine"):
        Learner(replace(SETTINGS, device="auto", engine="graphed"), Synthetic(), Synthetic().describe(), CPU)
    place = ["--root", str(glyphs_root), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as end:
        main(["train", "glyphs", "--engine", "graphed", "--device", "cpu", *place])
    assert end.value.code == 2
    assert "only CUDA devices have graphs" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_compile_is_refused_where_it_has_no_effect() -> None:
    """Engines that take one task after the other, recomputed steps, bf16, and algorithms without an inner loop."""
    for more, message in [
        ({"engine": "loop"}, "compile is for the engines vmap and graphed, not loop"),
        ({"engine": "higher"}, "compile is for the engines vmap and graphed, not higher"),
        ({"checkpoint_inner": True}, "compile and checkpoint_inner cannot both be set"),
        ({"precision": "bf16"}, "compile does not support precision bf16"),
        ({"algorithm": "pretrain"}, "compile has no effect with pretrain"),
    ]:
        with pytest.raises(RequestError, match=message):
            TrainSettings(compile=True, **more)  # type: ignore[arg-type]


def test_too_little_memory_names_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is refused, with torch's figures."""
    learner = Learner(SETTINGS, Synthetic(), Synthetic().describe(), CPU)
    monkeypatch.setattr(learner, "_engine", Failing(oom()))
    message = r"too little memory for an outer step. Lower meta_batch_size.* torch: CUDA out of memory. Tried .* GiB\.$"
    with pytest.raises(RequestError, match=message):
        learner.gradient(Synthetic().batch("train", [0, 1]), 0, every_step=False)


def test_fused_adam_on_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint does not carry it: a run from a GPU goes on with the kernels of the present machine."""
    from trainer.learner import _optimizer

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "Adam", lambda *_, **more: more["fused"])  # older ones refuse it without a GPU
        assert [_optimizer(SETTINGS, [], device) for device in (CUDA, CPU)] == [True, None]
    learner = Learner(SETTINGS, Synthetic(), Synthetic().describe(), CPU)
    outcome = learner.gradient(Synthetic().batch("train", [0, 1]), 0, every_step=False)
    learner.descend(outcome, 0)
    saved = learner.optimizer.state_dict()
    saved["param_groups"][0] |= {"fused": True, "capturable": True}
    learner.load(learner.weights(), saved, Path("x"))
    assert learner.optimizer.param_groups[0]["fused"] is None
    assert learner.optimizer.param_groups[0]["capturable"] is False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
class TestGpu:
    @pytest.mark.parametrize("bn", BN_MODES)
    @pytest.mark.parametrize("order", ORDERS)
    def test_a_graph_equals_vmap(self, order, bn) -> None:
        """For new meta-batches and for parameters that have changed since the capture, and the host never waits."""
        network, inner = small_convnet().cuda(), replace(BASE, order=order, bn=bn)
        at, engine = meta_parameters(network, inner), Prepared(CudaGraphs())
        method = method_of(network, inner, "graphed")
        for seed in range(4):
            tasks = EpisodeBatch(*(part.cuda() for part in batch(seed=seed)))
            torch.cuda.set_sync_debug_mode("error" if seed else "default")
            try:
                outcome = engine(network, at, tasks, method, Objective(every_step=True))
            finally:
                torch.cuda.set_sync_debug_mode("default")
            expected = run("vmap", network, at, tasks, inner, every_step=True)
            torch.testing.assert_close(named(outcome.gradient), named(expected.gradient), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(outcome.loss, expected.loss)
            with torch.no_grad():
                for value in at.tensors():
                    value.sub_(0.01)

    def test_a_run(self, glyphs_root: Path, tmp_path: Path) -> None:
        """With captures while episodes are read ahead; the log has the memory, and a resume goes on."""
        data = live_data("glyphs", glyphs_root, {"k_query": 3})
        settings = replace(SETTINGS, device="auto", meta_schedule="constant", engine="graphed")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(replace(settings, steps=3), data, tmp_path / "run")
            assert train(settings, data, tmp_path / "run", resume=True).step == settings.steps
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert all(row["reserved_mib"] >= row["allocated_mib"] > 0 for row in rows if row["event"] == "train")
