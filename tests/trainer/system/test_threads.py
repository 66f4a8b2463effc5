from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from problems import batch, loop, small_convnet
from synthetic import Synthetic
from torch import nn

from mamldata.streaming.batch import EpisodeBatch
from trainer.evaluation import evaluate_network, measure
from trainer.maml.algorithms import ORDERS, InnerLoop
from trainer.maml.parameters import meta_parameters
from trainer.networks.networks import build_network
from trainer.system.threads import each_task

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_tasks() -> None:
    """Also when the last task is the first one to end, and each thread has its share of torch's threads."""
    torch.set_num_threads(4)
    turns = [threading.Event() for _ in range(2)]

    def work(network: nn.Module, task: int) -> tuple[int, int]:
        if task == 0:
            assert turns[1].wait(10)
        turns[task].set()
        return task, torch.get_num_threads()

    results = each_task(work, nn.Identity(), range(2), CPU)
    assert next(results) == (0, 2)
    assert torch.get_num_threads() == 1  # of whoever works on the results while the tasks have the processors
    assert list(results) == [(1, 2)]
    assert torch.get_num_threads() == 4


def test_threads_share_parameters_and_nothing_else() -> None:
    """Each has a network of its own, since ``functional_call`` changes it for a while."""
    torch.set_num_threads(2)
    network, meet = small_convnet(), threading.Barrier(2, timeout=10)
    weight = network.head

    def work(own: nn.Module, task: int) -> int:
        meet.wait()
        assert own.head is weight
        return id(own)

    found = set(each_task(work, network, range(2), CPU))
    assert len(found) == 2
    assert id(network) not in found


def test_an_error_in_a_task_is_the_callers() -> None:
    """And torch has its threads again."""
    torch.set_num_threads(2)

    def work(network: nn.Module, task: int) -> int:
        raise ValueError(f"task {task}")

    with pytest.raises(ValueError, match="task 0"):
        list(each_task(work, nn.Identity(), range(3), CPU))
    assert torch.get_num_threads() == 2


def test_no_tasks_give_nothing() -> None:
    """As where several processes share a batch that has fewer episodes than there are processes."""
    torch.set_num_threads(2)
    assert list(each_task(lambda _, task: task, nn.Identity(), [], CPU)) == []
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_the_number_of_threads_changes_no_bit(order, steps) -> None:
    """Meta-gradients are summed in the order of the tasks, on one core, on two and on three."""
    network, inner = build_network("conv4", 1, 6, 3, seed=0), InnerLoop(steps, 0.1, order, "transductive")
    tasks = EpisodeBatch(*(part.float() if part.is_floating_point() else part for part in batch(tasks=7)))
    at = meta_parameters(network, inner)
    outcomes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outcomes.append(loop(network, at, tasks, inner, every_step=True))
    for other in outcomes[1:]:
        assert all(map(torch.equal, outcomes[0].gradient.tensors(), other.gradient.tensors()))
        assert torch.equal(outcomes[0].loss, other.loss)
        assert torch.equal(outcomes[0].score, other.score)


def test_no_operation_is_divided_among_threads_that_have_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and in evaluation, with two threads, too: each episode has a thread with one of torch's."""
    found = []

    def noted(network: nn.Module, *_: object) -> None:
        found.append((threading.get_ident(), torch.get_num_threads()))

    torch.set_num_threads(2)
    network = build_network("conv4", 1, 8, 5, seed=0, filters=2)
    network.register_forward_pre_hook(noted)
    data, inner = Synthetic(size=8), InnerLoop(1, 0.1, "second", "transductive")
    tasks = data.batch("train", list(range(4)))
    loop(network, meta_parameters(network, inner), tasks, inner)
    evaluate_network(network, [tasks], inner, data.describe(), "train")
    assert {threads for _, threads in found} == {1}
    assert threading.get_ident() not in {thread for thread, _ in found}


def test_the_number_of_threads_changes_no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each episode is adapted to and measured by one thread, which keeps no graph of it."""

    def measured(*arguments: Any) -> torch.Tensor:
        row = measure(*arguments)
        assert not row.requires_grad
        return row

    monkeypatch.setattr("trainer.evaluation.measure", measured)
    network = build_network("conv4", 1, 8, 5, seed=0, filters=2)
    data, inner = Synthetic(size=8), InnerLoop(2, 0.1, "second", "transductive")
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        batches = (data.batch("val", [start, start + 1, start + 2]) for start in (0, 3))
        results.append(evaluate_network(network, batches, inner, data.describe(), "val"))
    assert results[0] == results[1] == results[2]
