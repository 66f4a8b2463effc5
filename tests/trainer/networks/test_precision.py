from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import batch, loop, query_logits, run
from synthetic import Synthetic
from torch.utils._python_dispatch import TorchDispatchMode

from mamldata.errors import RequestError
from mamldata.streaming.batch import EpisodeBatch
from trainer.evaluation import evaluate, evaluate_network
from trainer.learner import Learner
from trainer.loop import train
from trainer.maml.algorithms import BN_MODES, ORDERS, InnerLoop
from trainer.maml.parameters import FastWeights, episodes, meta_parameters
from trainer.networks.networks import build_network
from trainer.networks.precision import PRECISIONS, arithmetic, pick_precision, precision_of, set_precision
from trainer.runs.checkpoint import load_checkpoint, save_checkpoint
from trainer.settings import TrainSettings

CPU = torch.device("cpu")
SETTINGS = TrainSettings(steps=2, inner_lr=0.1, meta_batch_size=2, eval_every=2, eval_episodes=2, device="cpu")


def test_each_device_has_its_own() -> None:
    """Unless another one is asked for; what a device does not have is refused."""
    assert [pick_precision(None, torch.device(kind)) for kind in ("cpu", "mps", "cuda")] == ["fp32"] * 3
    assert [pick_precision(name, torch.device("cuda")) for name in PRECISIONS] == list(PRECISIONS)
    with pytest.raises(RequestError, match=r"precision tf32 is for CUDA devices only, and this is cpu. Use fp32"):
        pick_precision("tf32", CPU)
    with pytest.raises(RequestError, match="precision bf16 is for CUDA and the CPU, and this is mps"):
        pick_precision("bf16", torch.device("mps"))


def test_settings_that_cannot_be_are_refused() -> None:
    """Unknown names, tf32 without CUDA, and an engine that computes by itself."""
    with pytest.raises(RequestError, match="precision must be one of fp32, tf32, bf16, not 'fp16'"):
        TrainSettings(precision="fp16")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="precision cannot be tf32 with device cpu: only CUDA devices have it"):
        TrainSettings(precision="tf32", device="cpu")
    with pytest.raises(RequestError, match=r"engine higher does not support precision bf16. Use the engine loop"):
        TrainSettings(precision="bf16", engine="higher")


def settings_of_the_process() -> list[object]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    new = [getattr(place, "fp32_precision", None) for place in (matmul, getattr(cudnn, "conv", None))]
    return [*new, cudnn.benchmark]


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="needs torch 2.9")
def test_each_network_computes_in_its_own_precision() -> None:
    """The last one's mode is not everybody's, and the program's own settings are as they were, and can be read."""
    before, cuda = settings_of_the_process(), torch.device("cuda")
    networks = {name: torch.nn.Identity() for name in PRECISIONS}
    for name, network in networks.items():
        set_precision(network, name)
    assert settings_of_the_process() == before
    for name, network in networks.items():
        form = "tf32" if name == "tf32" else "ieee"
        with arithmetic(network, cuda):
            assert settings_of_the_process() == [form, form, True]
        with pytest.raises(ZeroDivisionError), arithmetic(network, cuda):
            _ = 1 / 0
        with arithmetic(network, CPU):
            assert settings_of_the_process() == before
        assert settings_of_the_process() == before
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_steps_and_evaluations_compute_in_the_networks_precision(precision, monkeypatch) -> None:
    """A training step, joint training and an evaluation set it, for a CUDA device."""
    seen = []

    @contextmanager
    def watched(network: torch.nn.Module, device: torch.device) -> Iterator[None]:
        seen.append((precision_of(network), device.type))
        yield

    monkeypatch.setattr("trainer.learner.arithmetic", watched)
    monkeypatch.setattr("trainer.evaluation.arithmetic", watched)
    data = Synthetic()
    for algorithm in ("maml", "pretrain"):
        learner = Learner(replace(SETTINGS, algorithm=algorithm), data, data.describe(), CPU)
        set_precision(learner.network, precision)
        learner.gradient(data.batch("train", [0, 1]), 0, every_step=False)
    inner = learner.settings.inner_loop_at_test()
    evaluate_network(learner.network, [data.batch("val", [0, 1])], inner, data.describe(), "val")
    assert seen == [(precision, "cpu")] * 3


def in_float32() -> EpisodeBatch:
    return EpisodeBatch(*(part.float() if part.is_floating_point() else part for part in batch(k_shot=10, k_query=20)))


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize("bn", BN_MODES)
@pytest.mark.parametrize("order", ORDERS)
def test_bf16_is_near_to_fp32(order, bn, engine) -> None:
    """The meta-gradient is float32, not the one of fp32, and points its way."""
    inner, tasks = InnerLoop(2, 0.02, order, bn), in_float32()
    found = []
    for precision in ("fp32", "bf16"):
        network = build_network("conv4", 1, 6, 3, seed=0)
        set_precision(network, precision)
        at = meta_parameters(network, inner)
        outcome = run(engine, network, at, tasks, inner)
        assert {value.dtype for value in outcome.gradient.tensors()} == {torch.float32}
        assert outcome.loss.dtype == torch.float32
        found.append(torch.cat([outcome.gradient.weights[name].flatten() for name in ("head", "head_bias")]))
    assert not torch.equal(*found)
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.8


CONVOLUTIONS = {torch.ops.aten.convolution.default: 0, torch.ops.aten.convolution_backward.default: 1}  # place of x


class Convolutions(TorchDispatchMode):
    """Counts the convolutions of images, and their gradients, by dtype and by whether an image is narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[torch.dtype, bool]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in CONVOLUTIONS:
            image, transposed = args[CONVOLUTIONS[func]], args[CONVOLUTIONS[func] + 6]
            if not transposed:  # else it is a gradient that is enlarged to an image
                self.seen[image.dtype, 1 in image.shape[-2:]] += 1
        return func(*args, **(kwargs or {}))


RESNET = pytest.param(
    "resnet18",
    (8, 33),
    marks=pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision"),
)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("name", "sizes"), [("conv4", (8, 9, 13, 16, 17, 28)), RESNET])
def test_no_narrow_image_is_convolved_in_bfloat16(name, sizes, order, engine) -> None:
    """Where oneDNN reads memory that nobody wrote, on some processors, float32 takes its place: on any processor."""
    inner, seen = InnerLoop(1, 0.05, order, "transductive"), []
    for size in sizes:
        network = build_network(name, 1, size, 2, seed=0, **({"filters": 2} if name == "conv4" else {}))
        set_precision(network, "bf16")
        at, episodes = meta_parameters(network, inner), Synthetic(size=size, n_way=2, k_query=1).batch("train", [0])
        with Convolutions() as watched:
            run(engine, network, at, episodes, inner)
        seen.append(watched.seen)
        assert watched.seen[torch.bfloat16, False] > watched.seen[torch.bfloat16, True] == 0
    assert seen[0][torch.float32, True] > seen[-1][torch.float32, True] == 0


def test_bf16_computes_in_bfloat16() -> None:
    """Answers have the digits of bfloat16 only, in a thread of the engine, too."""
    network, inner = build_network("conv4", 1, 6, 3, seed=0), InnerLoop(1, 0.05, "first", "transductive")
    set_precision(network, "bf16")
    at, episode = meta_parameters(network, inner), next(episodes(in_float32()))
    logits = query_logits(network, FastWeights(at.weights), episode, inner)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, logits.bfloat16().float())
    before = torch.get_num_threads()
    try:
        losses = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            losses.append(loop(network, at, in_float32(), inner).loss)
        assert torch.equal(*losses)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("algorithm", ["maml", "maml++", "pretrain"])
def test_a_run_in_bf16(algorithm: str, tmp_path: Path) -> None:
    """It trains, keeps float32 weights, is evaluated as it was trained, and says so with each result."""
    settings = replace(SETTINGS, algorithm=algorithm, precision="bf16")
    ends = [train(replace(settings, precision=name), Synthetic(), tmp_path / name).last for name in ("fp32", "bf16")]
    one, other = (load_checkpoint(end) for end in ends)
    assert {value.dtype for value in other.weights.values()} == {torch.float32}
    assert any(not torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    assert other.settings["precision"] == "bf16"
    assert TrainSettings(**other.settings).resolved() == settings.for_images(Synthetic().describe()).resolved()
    result = evaluate(ends[1], Synthetic(), split="val", episodes=2, device="cpu")
    assert result.precision == "bf16"
    assert "bf16" in str(result)
    rows = [json.loads(line) for line in (tmp_path / "bf16" / "metrics.jsonl").read_text().splitlines()]
    (validation,) = [row for row in rows if row["event"] == "val"]
    assert (validation["precision"], validation["loss"]) == ("bf16", result.loss)


def test_runs_from_before_there_was_a_choice(tmp_path: Path) -> None:
    """Their checkpoints are evaluated in the device's own precision, and they can be resumed."""
    run = tmp_path / "run"
    checkpoint = load_checkpoint(train(SETTINGS, Synthetic(), run).last)
    old = {name: value for name, value in checkpoint.settings.items() if name != "precision"}
    old |= {"order": None, "loss": None, "rates": None, "adapts": None}
    save_checkpoint(run, replace(checkpoint, settings=old))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "settings": old}))
    assert evaluate(run, Synthetic(), split="val", episodes=2, device="cpu").precision == "fp32"
    assert train(replace(SETTINGS, steps=3), Synthetic(), run, resume=True).step == 3
    with pytest.raises(RequestError, match="precision: None there, 'bf16' here"):
        train(replace(SETTINGS, steps=4, precision="bf16"), Synthetic(), run, resume=True)
    tf32 = save_checkpoint(run, replace(checkpoint, settings={**old, "precision": "tf32", "device": "auto"}))
    assert evaluate(tf32, Synthetic(), split="val", episodes=2, device="cpu").precision == "fp32"
