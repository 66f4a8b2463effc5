from __future__ import annotations

import gc
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import Synthetic
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mamldata.errors import ImageShapeError, RequestError
from mamldata.streaming.batch import EpisodeBatch
from trainer.evaluation import Evaluation, evaluate, evaluate_network, fit_images
from trainer.learner import Learner
from trainer.loop import train
from trainer.maml.algorithms import InnerLoop
from trainer.networks.networks import build_network
from trainer.networks.norms import Norm
from trainer.runs.checkpoint import load_checkpoint, save_checkpoint
from trainer.runs.folder import RunResult
from trainer.settings import TrainSettings

CPU = torch.device("cpu")
INNER = InnerLoop(steps=2, lr=0.1, order="first", bn="transductive")


class Constant(nn.Module):
    """Always says class 2, whatever it is taught."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, norm: Norm) -> Tensor:  # noqa: ARG002
        logits = torch.zeros(len(x), 5)
        logits[:, 2] = 100.0
        return logits + 0 * self.weight


class Brightness(nn.Module):
    """Says the class that the first pixel of an image names."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, norm: Norm) -> Tensor:  # noqa: ARG002
        return 100 * torch.nn.functional.one_hot(x[:, 0, 0, 0].long(), 5) + 0 * self.weight


def told(right: list[int]) -> tuple[list[EpisodeBatch], dict[str, object]]:
    """Episodes of 10 query images, of which ``Brightness`` gets so many right."""
    labels = torch.arange(5).repeat_interleave(2)
    batches = []
    for index, count in enumerate(right):
        pixel = torch.where(torch.arange(10) < count, labels, (labels + 1) % 5).float()
        query = pixel[None, :, None, None, None].expand(1, 10, 1, 2, 2)
        support = torch.zeros(1, 5, 1, 2, 2)
        batches.append(EpisodeBatch(support, torch.arange(5)[None], query, labels[None], torch.tensor([index])))
    return batches, Synthetic(k_query=2).describe()


def test_a_constant_predictor_is_at_chance() -> None:
    """One answer for all gives 1 / n_way after every inner step, with no spread at all."""
    data = Synthetic()
    result = evaluate_network(Constant(), data.eval("val", 10, 4, CPU), INNER, data.describe(), "val")
    assert result.accuracy == pytest.approx(0.2)
    assert result.accuracy_by_step == pytest.approx((0.2, 0.2, 0.2))
    assert result.interval == pytest.approx(0, abs=1e-7)
    assert result.episodes == 10


def test_interval_is_that_of_the_formula() -> None:
    """Student's, from the sample standard deviation: with seven episodes t is 2.447."""
    right = [3, 7, 10, 4, 9, 6, 8]
    result = evaluate_network(Brightness(), *_with_inner(told(right)))
    shares = np.array(right) / 10
    assert result.accuracy == pytest.approx(shares.mean(), abs=1e-6)
    assert result.interval == pytest.approx(2.447 * shares.std(ddof=1) / np.sqrt(7), rel=2e-4)


def _with_inner(episodes: tuple[list[EpisodeBatch], dict[str, object]]) -> tuple[object, ...]:
    batches, about = episodes
    return batches, INNER, about, "test"


def test_one_episode_gives_no_interval() -> None:
    """A result without an interval is refused."""
    with pytest.raises(RequestError, match="takes at least 2 episodes, not 1"):
        evaluate_network(Brightness(), *_with_inner(told([3])))


def test_meta_batches_make_no_difference() -> None:
    """Episodes are evaluated one by one: how they are batched does not show in the result."""
    data, network = Synthetic(), build_network("conv4", 1, 12, 5, 0)
    results = [
        evaluate_network(network, data.eval("val", 12, size, CPU), INNER, data.describe(), "val") for size in (1, 5, 12)
    ]
    assert results[0] == results[1] == results[2]


def test_accuracy_is_given_for_each_step() -> None:
    """Step k of a long adaptation is the result of an adaptation of k steps."""
    data, network = Synthetic(), build_network("conv4", 1, 12, 5, 0)
    batches = list(data.eval("val", 6, 3, CPU))
    longest = evaluate_network(network, batches, replace(INNER, steps=3), data.describe(), "val")
    assert len(longest.accuracy_by_step) == 4
    for steps in (1, 2, 3):
        shorter = evaluate_network(network, batches, replace(INNER, steps=steps), data.describe(), "val")
        assert shorter.accuracy == longest.accuracy_by_step[steps]


def test_text_always_says_the_conditions() -> None:
    """Nobody can quote an accuracy without what it takes to compare it."""
    result = evaluate_network(Brightness(), *_with_inner(told([10, 10, 5, 5])))
    assert str(result) == (
        "75.00 % ± 45.93 (95 % interval, 4 episodes): synthetic, split scheme made-up, test, 5-way 1-shot, "
        "2 inner steps, batch norm transductive, fp32, single model"
    )
    assert result.to_json()["bn"] == "transductive"
    assert result.to_json()["inner_lr"] == 0.1


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize("order", ["first", "second"])
def test_memory_is_flat_over_episodes(order: str) -> None:
    """200 episodes leave no tensor behind, whatever the order, and the process does not grow."""
    data, network = Synthetic(size=16), build_network("conv4", 1, 16, 5, 0)
    inner = InnerLoop(2, 0.1, order, "transductive")
    seen = []
    batch = data.batch("val", [0, 1])

    def batches():
        for i in range(100):
            yield batch
            if i in (19, 99):
                seen.append((tensors_alive(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))

    evaluate_network(network, batches(), inner, data.describe(), "val")
    (count, size), (count_after, size_after) = seen
    assert count_after == count
    assert size_after - size < 8 * 2**10  # KiB, of the most memory that the process ever had


def test_network_is_not_changed() -> None:
    """Evaluation leaves weights, gradients and modes alone."""
    data, network = Synthetic(), build_network("conv4", 1, 12, 5, 0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    evaluate_network(network, data.eval("val", 4, 2, CPU), INNER, data.describe(), "val")
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(value.requires_grad and value.grad is None for value in network.parameters())


SETTINGS = TrainSettings(steps=2, eval_every=1, eval_episodes=4, meta_batch_size=2, bn="support", device="cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(SETTINGS, Synthetic(), tmp_path_factory.mktemp("run"))


def test_a_run_folder_stands_for_its_best_checkpoint(run: RunResult) -> None:
    """Folder and file give the same result, in the batch-norm mode of the training and on the split asked for."""
    of_folder = evaluate(run.run_dir, Synthetic(), episodes=5, device="cpu")
    assert of_folder == evaluate(run.best, Synthetic(), episodes=5, device="cpu")
    assert (of_folder.bn, of_folder.split, of_folder.episodes, of_folder.inner_steps) == ("support", "test", 5, 3)
    longer = evaluate(run.run_dir, Synthetic(), split="val", episodes=4, inner_steps=6, device="cpu")
    assert (longer.split, longer.inner_steps, len(longer.accuracy_by_step)) == ("val", 6, 7)


def test_a_checkpoint_is_refused_for_other_episodes(run: RunResult) -> None:
    """A head for 5 classes cannot tell 3 apart, and the message says so; nor do other image sizes pass."""
    with pytest.raises(RequestError, match="was trained with n_way 5, but these episodes have 3"):
        evaluate(run.run_dir, Synthetic(n_way=3), device="cpu")
    with pytest.raises(RequestError, match=r"was trained with image_shape \(12, 12, 1\), but these episodes have \(8"):
        evaluate(run.run_dir, Synthetic(size=8), device="cpu")


def test_training_on_something_else_is_told(run: RunResult) -> None:
    """Whoever reads a result on other data, or with more shots, sees where the network comes from."""
    same = evaluate(run.run_dir, Synthetic(), episodes=2, device="cpu")
    assert same.trained_on is None
    assert "trained on" not in str(same)
    assert "trained_on" not in same.to_json()
    other = evaluate(run.run_dir, Synthetic(k_shot=2), episodes=2, device="cpu")
    assert str(other).endswith(", trained on synthetic, split scheme made-up, 5-way 1-shot")
    assert other.to_json()["trained_on"] == "synthetic, split scheme made-up, 5-way 1-shot"


def test_an_evaluation_without_inner_steps_is_possible(run: RunResult) -> None:
    """No inner step measures the initialisation itself, which knows nothing of an episode's classes."""
    result = evaluate(run.run_dir, Synthetic(), episodes=20, inner_steps=0, device="cpu")
    assert result.accuracy_by_step == (result.accuracy,)
    with pytest.raises(RequestError, match="inner_steps must be at least 0, not -1"):
        evaluate(run.run_dir, Synthetic(), inner_steps=-1, device="cpu")


@pytest.mark.parametrize("episodes", [-3, 0, 1])
def test_too_few_episodes_are_refused_before_any_is_read(run: RunResult, episodes: int) -> None:
    """An interval takes two."""
    with pytest.raises(RequestError, match=f"episodes must be at least 2, not {episodes}"):
        evaluate(run.run_dir, Synthetic(), episodes=episodes, device="cpu")


def lacks_a_weight(content: dict[str, Any]) -> None:
    del content["weights"]["blocks.3.shift"]


def has_one_more(content: dict[str, Any]) -> None:
    content["weights"]["later"] = torch.ones(1)


def has_other_shapes(content: dict[str, Any]) -> None:
    content["weights"] = {name: value[:1] for name, value in content["weights"].items()}


def has_a_later_setting(content: dict[str, Any]) -> None:
    content["settings"]["later"] = 1


def has_another_setting(content: dict[str, Any]) -> None:
    content["settings"]["rates"] = "layer-step"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacks_a_weight, r"weights in .*\.pt are not those of a network with its settings: blocks.3.shift differ in"),
        (has_one_more, r"weights in .*\.pt are not those of a network with its settings: later differ in"),
        (has_other_shapes, r"settings: blocks.0.kernel, blocks.0.scale, blocks.0.shift and 11 more differ in"),
        (has_a_later_setting, r"\.pt has unknown settings: later. Another version of this trainer"),
        (has_another_setting, r"settings: inner_lr:blocks.0.kernel, inner_lr:.* and 11 more differ in"),
    ],
)
def test_a_checkpoint_of_another_version(
    run: RunResult, change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    """What it has and this trainer does not, or the reverse, is named."""
    content = torch.load(run.last, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "changed.pt")
    with pytest.raises(RequestError, match=message):
        evaluate(tmp_path / "changed.pt", Synthetic(), episodes=4, device="cpu")


class Watched(TorchDispatchMode):
    """Counts operators."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        Watched.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("algorithm", ["maml", "maml++", "anil", "meta-sgd"])
def test_all_episodes_of_a_meta_batch_at_once(algorithm, monkeypatch) -> None:
    """As on a GPU: the same answers, in far fewer operations; one after the other where memory is too small."""
    data = Synthetic(size=8, k_query=3)
    settings = TrainSettings(algorithm=algorithm, device="cpu", inner_lr=0.1, filters=4)
    learner = Learner(settings, data, data.describe(), torch.device("cpu"))
    inner, network = settings.inner_loop_at_test(), learner.network.double()
    parameters = learner.parameters.like(value.detach().double() for value in learner.parameters.tensors())

    def found() -> Evaluation:
        batches = [data.batch("val", [*range(16)]), data.batch("val", [16, 17])]
        batches = [EpisodeBatch(*(x.double() if x.is_floating_point() else x for x in batch)) for batch in batches]
        Watched.count = 0
        with Watched():
            return evaluate_network(network, batches, inner, data.describe(), "val", parameters)

    expected, operators = found(), Watched.count
    monkeypatch.setattr("trainer.evaluation.AT_ONCE", {"cpu"})
    together = found()
    assert 2 * Watched.count < operators
    assert together.to_json() == {**expected.to_json(), "loss": pytest.approx(expected.loss, rel=1e-9)}
    assert (together.answers.given == expected.answers.given).all()

    def too_large(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("too large")

    monkeypatch.setattr(torch.func, "vmap", too_large)
    assert found() == expected
    monkeypatch.setattr("trainer.evaluation.each_task", too_large)
    with pytest.raises(RequestError, match="The GPU has too little memory for adapting to an episode"):
        found()


@pytest.mark.parametrize("size", [5, 12, 31])
@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (1, 1), (3, 3)])
def test_fitted_images_are_those_of_pillow(before: int, after: int, size: int) -> None:
    """Grey to three equal channels, colours to their luma, and resized as Pillow's bilinear filter does."""
    images = torch.rand(2, 3, before, 12, 12)
    found = fit_images(images, (size, size, after))
    assert found.shape == (2, 3, after, size, size)
    image = images[1, 2]
    if (before, after) == (3, 1):
        image = 0.299 * image[:1] + 0.587 * image[1:2] + 0.114 * image[2:]
    for channel, mine in zip(found[1, 2], image.expand(after, -1, -1), strict=True):
        pillow = Image.fromarray(mine.numpy(), "F").resize((size, size), Image.Resampling.BILINEAR)
        assert np.allclose(channel.numpy(), np.asarray(pillow), atol=1e-5)


def test_fitted_images_are_evaluated_as_if_they_had_fitted(tmp_path: Path) -> None:
    """Images with three equal channels become the grey ones again, and are then normalized as in training."""

    class Tripled(Synthetic):
        def describe(self) -> dict[str, Any]:
            return {**super().describe(), "image_shape": [12, 12, 3]}

        def eval(self, *args: Any, **options: Any) -> Any:
            mean, std = 0.25, 0.5
            assert options.pop("normalize") is False
            for batch in super().eval(*args, **options, normalize=False):
                images = [part.expand(-1, -1, 3, -1, -1) * std + mean for part in (batch.support_x, batch.query_x)]
                yield batch._replace(support_x=images[0], query_x=images[1])

    run = train(replace(SETTINGS, normalize=True), Synthetic(), tmp_path / "run")
    checkpoint = load_checkpoint(run.best)
    known = {"mean": [0.25], "std": [0.5]}
    (tmp_path / "other").mkdir()
    save_checkpoint(tmp_path / "other", replace(checkpoint, data={**checkpoint.data, "normalisation": known}))
    plain = evaluate(run.best, Synthetic(), episodes=6, device="cpu")
    with pytest.raises(ImageShapeError, match=r"image_shape .12, 12, 1., but these episodes have .12, 12, 3.\. Choose"):
        evaluate(tmp_path / "other", Tripled(), episodes=6, device="cpu")
    fitted = evaluate(tmp_path / "other", Tripled(), episodes=6, fit=True, device="cpu")
    assert fitted.accuracy_by_episode == plain.accuracy_by_episode
    assert fitted.loss == pytest.approx(plain.loss, rel=1e-4)
    assert str(fitted).endswith("images fitted from 12x12x3")
    assert (fitted.fitted_from, plain.fitted_from) == ((12, 12, 3), None)
    assert evaluate(run.best, Synthetic(), episodes=6, fit=True, device="cpu").fitted_from is None
