"""Prototypical networks: against references that are written without the trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from problems import batch, direction, directional, dot, loop, perceptron, run, small_convnet
from synthetic import Synthetic
from torch import Tensor, nn
from torch.nn import functional as F

from mamldata.errors import RequestError
from mamldata.streaming.batch import EpisodeBatch
from trainer.evaluation import evaluate, measure
from trainer.loop import train
from trainer.maml.algorithms import InnerLoop
from trainer.maml.parameters import FastWeights, MetaParameters, episodes, meta_parameters
from trainer.maml.variants import method_of
from trainer.runs.checkpoint import load_checkpoint, load_run
from trainer.settings import TrainSettings, saved_settings

Array = npt.NDArray[np.float64]
INNER = InnerLoop(0, 0.0, "first", "transductive", classifier="prototypes", n_way=3)
RUN = TrainSettings(
    algorithm="protonet", steps=4, meta_batch_size=2, eval_every=2, eval_episodes=4, log_every=2, device="cpu"
)


def adapted(at: MetaParameters) -> FastWeights:
    """Without an inner loop, the weights themselves."""
    return FastWeights(at.weights)


def reference(support: Array, labels: Array, query: Array, truth: Array) -> tuple[float, float, Array, Array]:
    """Loss, accuracy, and the loss's slopes by support and query embeddings, by hand: Snell et al. 2017, eq. 1 and 2.

    With the probabilities p[q, k], d = p - onehot(truth) and the mean c[k] of class k over its s images:
    dL/dquery[q] = -2 / Q * sum_k d[q, k] (query[q] - c[k]), and dL/dsupport = 2 / Q / s * sum_q d[q, k] (query[q] -
    c[k]).
    """
    means = np.stack([support[labels == k].mean(0) for k in range(3)])
    by_query, by_support, losses, right = np.zeros_like(query), np.zeros_like(support), [], []
    for q, (one, answer) in enumerate(zip(query, truth, strict=True)):
        logits = np.array([-sum((a - b) ** 2 for a, b in zip(one, mean, strict=True)) for mean in means])
        chances = np.exp(logits - logits.max())
        chances /= chances.sum()
        losses.append(-np.log(chances[answer]))
        right.append(chances.argmax() == answer)
        for k, mean in enumerate(means):
            slope = 2 / len(query) * (chances[k] - (k == answer)) * (one - mean)
            by_query[q] -= slope
            by_support[labels == k] += slope / (labels == k).sum()
    return float(np.mean(losses)), float(np.mean(right)), by_support, by_query


def embeddings(network: nn.Module, episode, bn: str) -> Tensor:
    """Of support, then query images; the formula of batch norm, by the statistics that ``bn`` names."""
    x, support = torch.cat([episode.support_x, episode.query_x]), len(episode.support_x)
    for block in network.blocks:
        x = F.conv2d(x, block.kernel, stride=block.stride, padding=block.padding)
        source = x[:support] if bn == "support" else x
        mean, variance = (
            value[:, None, None] for value in (source.mean((0, 2, 3)), source.var((0, 2, 3), correction=0))
        )
        scale, shift = block.scale[:, None, None], block.shift[:, None, None]
        x = F.relu((x - mean) / (variance + 1e-5).sqrt() * scale + shift)
    return x.mean((2, 3))


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize("bn", ["transductive", "support"])
def test_loss_gradient_and_accuracy_are_those_of_the_paper(bn: str, engine: str) -> None:
    """In float64: distances, softmax and their slopes by hand in NumPy, the body in plain torch."""
    network, tasks, inner = small_convnet(), batch(), replace(INNER, bn=bn)
    at = meta_parameters(network, inner)
    outcome = run(engine, network, at, tasks, inner)
    names = [name for name, _ in network.named_parameters() if "head" not in name]
    losses, scores, slopes = [], [], []
    for episode in episodes(tasks):
        found, shots = embeddings(network, episode, bn), len(episode.support_x)
        parts = found[:shots], episode.support_y, found[shots:], episode.query_y
        loss, score, *by = reference(*(part.detach().numpy() for part in parts))
        losses.append(loss)
        scores.append(score)
        back = torch.from_numpy(np.concatenate(by))
        slopes.append(torch.autograd.grad(found, [at.weights[name] for name in names], back))
    assert outcome.loss.item() == pytest.approx(np.mean(losses), rel=1e-12)
    assert outcome.score.shape == (1,)
    assert outcome.score.item() == pytest.approx(np.mean(scores), abs=1e-7)
    for name, *parts in zip(names, *slopes, strict=True):
        torch.testing.assert_close(outcome.gradient.weights[name], torch.stack(parts).mean(0), rtol=1e-9, atol=1e-12)
    assert not outcome.gradient.weights["head"].any()


def test_the_gradient_is_the_slope_of_the_loss() -> None:
    """By finite differences of fourth order, in float64."""
    network, tasks = small_convnet(), batch()
    at = meta_parameters(network, INNER)
    along = direction(at, 0)

    def loss(point: MetaParameters) -> Tensor:
        return loop(network, point.like(value.requires_grad_() for value in point.tensors()), tasks, INNER).loss

    slope = directional(loss, at, along, width=1e-5)
    assert dot(loop(network, at, tasks, INNER).gradient, along) == pytest.approx(slope, rel=1e-6)


def test_the_order_of_support_images_makes_no_difference() -> None:
    """A prototype is the mean of the images with its label, wherever they are; the labels are counted if need be."""
    network, episode = small_convnet(), next(episodes(batch()))
    at, mixed = meta_parameters(network, INNER), torch.tensor([3, 0, 5, 1, 4, 2])
    other = episode._replace(support_x=episode.support_x[mixed], support_y=episode.support_y[mixed])
    method, counting = (method_of(network, inner) for inner in (INNER, replace(INNER, n_way=None)))
    expected = method.query_logits(network, adapted(at), episode, method)
    torch.testing.assert_close(method.query_logits(network, adapted(at), other, method), expected)
    torch.testing.assert_close(counting.query_logits(network, adapted(at), other, counting), expected)


def test_by_the_support_set_queries_are_independent() -> None:
    """With bn support an answer does not depend on the other queries; with transductive it does."""
    network, episode = small_convnet(), next(episodes(batch()))
    at = meta_parameters(network, INNER)
    other = episode._replace(query_x=torch.cat([episode.query_x[:2], 30 * episode.query_x[2:]]))
    for bn, same in (("support", True), ("transductive", False)):
        method = method_of(network, replace(INNER, bn=bn))
        pair = (method.query_logits(network, adapted(at), one, method)[:2] for one in (episode, other))
        assert torch.allclose(*pair, rtol=1e-10) == same


def test_a_network_without_features_is_refused() -> None:
    """Its embedding is unknown."""
    with pytest.raises(RequestError, match=r"the network has no method features\(x, norm\)"):
        method_of(perceptron(), INNER)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"inner_lr": 0.1}, "inner_lr has no effect with protonet, which has no inner loop"),
        ({"inner_steps": 5}, "inner_steps has no effect with protonet"),
        ({"eval_inner_steps": 5}, "eval_inner_steps has no effect with protonet"),
        ({"support_batches": 2}, "support_batches has no effect with protonet"),
        ({"order": "second"}, "order cannot be second with protonet: it has no inner loop"),
        ({"loss": "multi-step"}, "loss cannot be multi-step with protonet"),
        ({"rates": "parameter"}, "rates cannot be parameter with protonet"),
        ({"adapts": "head"}, "adapts cannot be head with protonet"),
        ({"inner_loss": "class-sum"}, "inner_loss cannot be class-sum with protonet"),
        ({"bn": "frozen"}, "bn cannot be frozen with protonet"),
        ({"bn": "per-step"}, "bn cannot be per-step with protonet"),
        ({"engine": "higher"}, "engine cannot be higher with protonet"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_of_the_inner_loop_are_refused(given: dict[str, object], why: str) -> None:
    """There is none, so each would do nothing."""
    with pytest.raises(RequestError, match=why):
        replace(RUN, **given)


def test_its_settings_are_read_back() -> None:
    """Resolved settings, as files hold them, are valid and equal."""
    assert saved_settings(RUN.resolved(), Path("config.json")).resolved() == RUN.resolved()
    assert RUN.resolved()["inner_lr"] is None


def test_another_run_is_told_as_such(tmp_path: Path) -> None:
    """In the folder of a run of MAML, whose inner rate has no place here, the difference is the algorithm."""
    train(replace(RUN, algorithm="maml"), Synthetic(), tmp_path)
    with pytest.raises(RequestError, match=r"holds another run:\n  algorithm: 'maml' there, 'protonet' here"):
        train(RUN, Synthetic(), tmp_path, resume=True)


def test_any_number_of_ways_at_test(tmp_path: Path) -> None:
    """Trained on 8-way episodes and evaluated on 3-way ones, which is said; accuracy is one number, without steps."""
    path = train(RUN, Synthetic(n_way=8), tmp_path).best
    result = evaluate(path, Synthetic(n_way=3), episodes=4, device="cpu")
    assert (result.n_way, result.inner_steps, len(result.accuracy_by_step)) == (3, 0, 1)
    assert result.accuracy_by_step == (result.accuracy,)
    assert result.trained_on == "synthetic, split scheme made-up, 8-way 1-shot"
    with pytest.raises(RequestError, match="inner_steps must be 0, not 3: protonet has no inner loop"):
        evaluate(path, Synthetic(n_way=3), episodes=4, inner_steps=3, device="cpu")


def test_a_head_has_its_number_of_ways(tmp_path: Path) -> None:
    """The other algorithms refuse episodes with other ways, as before."""
    path = train(replace(RUN, algorithm="fomaml"), Synthetic(n_way=4), tmp_path).best
    with pytest.raises(RequestError, match="was trained with n_way 4, but these episodes have 3"):
        evaluate(path, Synthetic(n_way=3), episodes=4, device="cpu")


def test_a_loaded_run_classifies(tmp_path: Path) -> None:
    """As the docs of ``load_run`` have it, with the accuracy that the evaluation gives this episode."""
    path, data = train(RUN, Synthetic(n_way=8), tmp_path).best, Synthetic(n_way=3)
    loaded = load_run(path)
    tasks: EpisodeBatch = data.batch("test", [0, 1])
    method = method_of(loaded.network, loaded.settings.inner_loop_at_test())
    with torch.no_grad():
        scores = [measure(loaded.network, loaded.parameters, one, method)[-1].item() for one in episodes(tasks)]
    result = evaluate(path, data, episodes=2, device="cpu")
    assert result.accuracy_by_episode == pytest.approx(scores)
    assert load_checkpoint(path).settings["algorithm"] == "protonet"
