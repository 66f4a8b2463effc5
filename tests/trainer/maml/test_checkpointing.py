"""The checkpointed inner loop, support batches and clipping."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import adapt, batch, loop, named, perceptron, run, small_convnet
from synthetic import Synthetic
from torch import Tensor

from mamldata.errors import RequestError
from trainer.evaluation import evaluate
from trainer.loop import train
from trainer.maml.algorithms import ADAPTS, BN_MODES, RATES, InnerLoop
from trainer.maml.checkpointing import recomputed
from trainer.maml.engines import ENGINES, Outcome
from trainer.maml.objective import Objective
from trainer.maml.parameters import Episode, episodes, meta_parameters, support_of_step
from trainer.runs.checkpoint import load_checkpoint
from trainer.settings import TrainSettings

BASE = InnerLoop(steps=4, lr=0.1, order="second", bn="transductive")
SETTINGS = TrainSettings(
    steps=2, inner_lr=0.1, meta_lr=1e-3, meta_batch_size=2, eval_every=2, eval_episodes=2, device="cpu"
)


@pytest.mark.parametrize("weights", [(), (0.1, 0.2, 0.3, 0.4)], ids=["final", "multi-step"])
@pytest.mark.parametrize("adapts", ADAPTS)
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("bn", BN_MODES)
def test_a_checkpointed_inner_loop_has_the_same_gradient(bn, rates, adapts, weights) -> None:
    """Of weights, rates and norms, in all of the second-order space."""
    network, inner = small_convnet(), replace(BASE, bn=bn, rates=rates, adapts=adapts)
    at, objective = meta_parameters(network, inner), Objective("query", weights)
    expected = loop(network, at, batch(), inner, objective, every_step=True)
    outcome = loop(network, at, batch(), replace(inner, checkpoint=True), objective, every_step=True)
    for name, value in named(expected.gradient).items():
        torch.testing.assert_close(named(outcome.gradient)[name], value, rtol=1e-11, atol=1e-14)
    assert torch.equal(outcome.loss, expected.loss)
    assert torch.equal(outcome.score, expected.score)


def test_one_forward_pass_more_for_each_step() -> None:
    """Each inner step is computed twice, and the query set once."""
    network, passes = small_convnet(), []
    hook = network.register_forward_hook(lambda *_: passes.append(1))
    for checkpoint, expected in ((False, 4 + 1), (True, 2 * 4 + 1)):
        passes.clear()
        inner = replace(BASE, checkpoint=checkpoint)
        loop(network, meta_parameters(network, inner), batch(tasks=1), inner)
        assert len(passes) == expected
    hook.remove()


def test_recomputed_keeps_its_inputs_alone() -> None:
    """Nothing of the function's own graph is alive between value and gradient."""
    made: list[weakref.ref[Tensor]] = []

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        inside = (x * y).exp()
        made.append(weakref.ref(inside))
        return inside.sin(), inside * x

    x, y = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    outputs = recomputed(function, [x, y])
    gc.collect()
    assert made[0]() is None
    slopes = torch.autograd.grad(sum(value.square().sum() for value in outputs), [x, y])
    expected = torch.autograd.grad(sum(value.square().sum() for value in function(x, y)), [x, y])
    for slope, other in zip(slopes, expected, strict=True):
        torch.testing.assert_close(slope, other, rtol=1e-13, atol=0)


def test_recomputed_gives_no_gradient_where_none_is_asked_for() -> None:
    """Inputs that are constants stay so."""
    x, y = torch.ones(2, requires_grad=True), torch.ones(2)
    (product,) = recomputed(lambda a, b: (a * b,), [x, y])
    product.sum().backward()
    assert torch.equal(x.grad, y)
    assert y.grad is None


def test_support_batches_are_equal_shares_of_each_class() -> None:
    """Each step has the next batch, each batch every class equally often, and all of them are the support set."""
    labels = torch.arange(3).repeat_interleave(4)
    episode = Episode(torch.arange(12.0), labels, torch.zeros(1), torch.zeros(1))
    inner = replace(BASE, support_batches=2)
    parts = [support_of_step(episode, inner, step) for step in range(3)]
    assert [part.support_y.tolist() for part in parts] == [[0, 0, 1, 1, 2, 2]] * 3
    assert sorted(torch.cat([parts[0].support_x, parts[1].support_x]).tolist()) == list(range(12))
    assert torch.equal(parts[0].support_x, parts[2].support_x)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_each_step_descends_on_its_own_batch(engine: str) -> None:
    """Two steps on two batches are one step on each, and every engine takes them so."""
    network, episode = perceptron(), next(episodes(batch()))
    at = meta_parameters(network, BASE)
    inner = replace(BASE, steps=2, support_batches=2)
    path = adapt(network, at, episode, inner)
    middle = adapt(network, at, support_of_step(episode, inner, 0), replace(BASE, steps=1))[-1].weights
    again = support_of_step(episode, inner, 1)
    end = adapt(network, at._replace(weights=middle), again, replace(BASE, steps=1))[-1].weights
    assert all(torch.equal(path[-1].weights[name], end[name]) for name in end)
    one, other = (named(run(name, network, at, batch(), inner).gradient) for name in ("loop", engine))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-13)


def test_shots_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    """In training and in evaluation, before anything is written."""
    settings = replace(SETTINGS, inner_steps=2, support_batches=2)
    with pytest.raises(RequestError, match="k_shot is 3, which cannot be divided into 2 support batches"):
        train(settings, Synthetic(k_shot=3), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    path = train(settings, Synthetic(k_shot=2), tmp_path / "run").last
    with pytest.raises(RequestError, match="k_shot is 1, which cannot be divided into 2 support batches"):
        evaluate(path, Synthetic(k_shot=1), episodes=2, device="cpu")


def moved(tmp_path: Path, gradient: float, **more: float) -> Tensor:
    """How far plain descent with rate one goes, for a meta-gradient that is ``gradient`` everywhere."""
    settings = replace(SETTINGS, steps=1, meta_optimizer="sgd", meta_lr=1.0, meta_schedule="constant", engine="loop")

    def constant(network, parameters, *rest, **options) -> Outcome:
        slopes = [torch.full_like(value, gradient) for value in parameters.tensors()]
        return Outcome(parameters.like(slopes), torch.zeros(()), torch.zeros(2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENGINES, "loop", constant)
        ends = [
            load_checkpoint(train(replace(settings, seed=0, **one), Synthetic(), tmp_path / str(i)).last).weights
            for i, one in enumerate(({"meta_lr": 1e-30}, more))
        ]
    return torch.cat([(ends[1][name] - ends[0][name]).flatten() for name in ends[0]])


def test_meta_gradients_are_clipped(tmp_path: Path) -> None:
    """By their length together, or each element by itself; small ones are left as they are."""
    by_norm = moved(tmp_path / "a", 3.0, meta_clip_norm=0.5)
    assert by_norm.norm().item() == pytest.approx(0.5, rel=1e-3)
    by_value = moved(tmp_path / "b", 3.0, meta_clip_value=0.25)
    torch.testing.assert_close(by_value, torch.full_like(by_value, -0.25))
    small = moved(tmp_path / "c", 1e-3, meta_clip_value=0.25)
    torch.testing.assert_close(small, torch.full_like(small, -1e-3), rtol=1e-2, atol=1e-6)


def test_senseless_settings_are_refused_all_at_once() -> None:
    """Two ways of clipping, more batches than steps, and a checkpointed loop that has no graph."""
    with pytest.raises(RequestError) as caught:
        TrainSettings(
            algorithm="fomaml",
            support_batches=3,
            checkpoint_inner=True,
            engine="vmap",
            meta_clip_norm=1.0,
            meta_clip_value=-1.0,
        )
    assert str(caught.value).splitlines()[1:] == [
        "  meta_clip_value must be a positive number, not -1.0.",
        "  meta_clip_norm and meta_clip_value cannot both be set: use one of them.",
        "  support_batches must be at most inner_steps (1), not 3: the rest would never be used.",
        "  checkpoint_inner has no effect with order first, which keeps no graph of the inner loop.",
        "  checkpoint_inner is for the engine loop, not vmap.",
    ]


def test_a_checkpointed_run_ends_the_same(tmp_path: Path) -> None:
    """The setting reaches the inner loop, and training with it gives the same weights to rounding."""
    settings = replace(SETTINGS, inner_steps=2, meta_optimizer="sgd")
    assert replace(settings, checkpoint_inner=True).inner_loop().checkpoint
    ends = [
        load_checkpoint(train(replace(settings, checkpoint_inner=on), Synthetic(), tmp_path / str(on)).last).weights
        for on in (False, True)
    ]
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-4, atol=1e-6)
