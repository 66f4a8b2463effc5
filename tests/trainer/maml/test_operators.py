"""What an engine asks of a device: how many operators, and none for which the host would have to wait."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from problems import of, small_convnet
from synthetic import Synthetic
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.evaluation import answers_by_step, measure, measure_together
from trainer.learner import Learner
from trainer.maml.algorithms import InnerLoop
from trainer.maml.engines import ENGINES
from trainer.maml.parameters import episodes
from trainer.maml.variants import method_of
from trainer.networks.networks import build_network
from trainer.networks.precision import set_precision
from trainer.settings import TrainSettings

CPU = torch.device("cpu")
VIEWS = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "detach",
    "alias",
}
VIEWS |= {"permute", "as_strided", "unbind", "split", "_reshape_alias", "movedim", "lift"}


class Operators(TorchDispatchMode):
    """Counts operators that do work, which would be about as many launches on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


# Upper bounds, some ten per cent above the counts of torch 2.15. A change that lowers a count may lower its bound.
BOUNDS = {
    ("loop", "second", 1): 1700,
    ("loop", "second", 5): 7500,
    ("loop", "first", 5): 1450,
    ("vmap", "second", 1): 840,
    ("vmap", "second", 5): 3250,
    ("vmap", "first", 5): 1220,
}


counted = pytest.mark.skipif(torch.__version__ < "2.9", reason="the bounds are those of newer operators")


@counted
@pytest.mark.parametrize(("engine", "order", "steps"), BOUNDS)
def test_operators_of_a_meta_gradient(engine, order, steps) -> None:
    """Of four tasks of conv4: on a GPU time goes with their number, so that no change may raise it unnoticed."""
    network = build_network("conv4", 1, 28, 5, seed=0, filters=2)
    inner, tasks = InnerLoop(steps, 0.1, order, "transductive"), Synthetic(size=28).batch("train", [0, 1, 2, 3])
    with Operators() as watched:
        ENGINES[engine](network, of(network), tasks, method_of(network, inner, engine))
    total = sum(watched.seen.values())
    assert total <= BOUNDS[engine, order, steps], (total, watched.seen.most_common(12))


@counted
def test_operators_of_an_evaluation() -> None:
    """A whole meta-batch at once takes no more than three or four episodes do one after the other."""
    network = build_network("conv4", 1, 28, 5, seed=0, filters=2)
    inner, tasks = InnerLoop(3, 0.1, "first", "transductive"), Synthetic(size=28).batch("train", [0, 1])
    with Operators() as watched, torch.no_grad():
        measure(network, of(network), next(episodes(tasks)), method_of(network, inner))
    alone = sum(watched.seen.values())
    with Operators() as watched:
        measure_together(network, of(network), tasks, inner)
    assert sum(watched.seen.values()) <= 3.5 * alone
    assert alone <= 275


# Reading a number, counting what is not zero, and tensors made of Python's numbers: the host waits for the device, or
# the device for a copy from ordinary memory.
WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "lift_fresh", "is_nonzero", "equal", "_unique2"}


class NoWaiting(TorchDispatchMode):
    """Fails on what would make the host wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in {"index", "index_put_"} and any(one is not None and one.dtype == torch.bool for one in args[1])
        waits = masked or name in WAITS
        assert not waits, f"{name} makes the host wait for the device"
        return func(*args, **(kwargs or {}))


ALGORITHMS = ["maml", "fomaml", "maml++", "anil", "meta-sgd", "reptile"]


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_gradient_makes_the_host_wait(algorithm, engine, precision, every_step) -> None:
    """Nor does the optimizer, nor the note of the outcome: a GPU can work on several steps, and a graph be captured."""
    data = Synthetic(size=8)
    settings = TrainSettings(
        algorithm=algorithm, engine=engine, precision=precision, inner_steps=2, filters=2, device="cpu", inner_lr=0.1
    )
    learner, tasks = Learner(settings, data, data.describe(), CPU), data.batch("train", [0, 1])
    with NoWaiting():
        learner.gradient(tasks, 0, every_step=every_step)


@pytest.mark.parametrize("bn", ["support", "frozen"])
@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_no_norm_makes_the_host_wait(engine, bn) -> None:
    """The norms that no algorithm has by default."""
    network, inner = small_convnet().float(), InnerLoop(2, 0.1, "second", bn)
    tasks = Synthetic(size=8, n_way=3).batch("train", [0, 1])
    with NoWaiting():
        ENGINES[engine](network, of(network), tasks, method_of(network, inner, engine))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_evaluation_makes_the_host_wait(algorithm) -> None:
    """Until the results of a meta-batch are read."""
    data = Synthetic(size=8)
    settings = TrainSettings(algorithm=algorithm, filters=2, device="cpu")
    learner, tasks = Learner(settings, data, data.describe(), CPU), data.batch("val", [0, 1])
    inner, network = settings.inner_loop_at_test(), learner.network
    set_precision(network, "fp32")
    with NoWaiting(), torch.no_grad():
        measure_together(network, learner.parameters, tasks, inner)
        for episode in episodes(tasks):
            list(answers_by_step(network, learner.parameters, episode, method_of(network, inner)))


def test_waiting_is_noticed() -> None:
    """Each of the ways in which code comes to wait by accident."""
    value = torch.ones(3)
    for accident in [
        lambda: value.sum().item(),
        lambda: value[value > 0],
        lambda: bool(value[0] > 0),
        lambda: value + torch.tensor([1.0]),
    ]:
        with pytest.raises(AssertionError, match="makes the host wait"), NoWaiting():
            accident()
