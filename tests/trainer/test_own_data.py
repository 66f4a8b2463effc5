"""Episodes of one's own, of images or of anything else, train, resume and evaluate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import trainer
from mamldata.errors import RequestError
from trainer.runs.checkpoint import find_last, load_checkpoint

CPU = torch.device("cpu")
SETTINGS = trainer.TrainSettings(
    steps=4, meta_batch_size=3, eval_every=2, eval_episodes=3, log_every=2, device="cpu", inner_lr=0.1
)


def features(split: str, index: int, rng: np.random.Generator) -> tuple[Any, ...]:
    """Three classes around points of their own, two shots and four queries, in a random order."""
    centres = 3 * rng.normal(size=(3, 7))
    parts: list[Any] = []
    for k in (2, 4):
        labels = rng.permutation(np.repeat(np.arange(3), k))
        parts += [centres[labels] + rng.normal(size=(len(labels), 7)), labels]
    return tuple(parts)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))


def test_features_train_and_resume_bit_for_bit(tmp_path: Path) -> None:
    """Examples of shape [N, F], with a network of one's own; a part of a run and its rest are the whole."""
    data, settings = trainer.OwnData(features, name="points"), replace(SETTINGS, meta_schedule="constant")
    trainer.train(settings, data, tmp_path / "whole", network=network())
    trainer.train(replace(settings, steps=2), data, tmp_path / "part", network=network())
    trainer.train(settings, trainer.OwnData(features, name="points"), tmp_path / "part", network=network(), resume=True)
    one, other = (load_checkpoint(find_last(tmp_path / name)).weights for name in ("whole", "part"))
    assert all(map(torch.equal, one.values(), other.values()))
    evaluation = trainer.evaluate(tmp_path / "whole", data, episodes=20, network=network(), device="cpu")
    assert evaluation.accuracy > 0.8
    assert evaluation.dataset == "points"
    assert trainer.save_result(evaluation).exists()
    with pytest.raises(RequestError, match="does not record how its images of 1 pixels in 7 channels"):
        trainer.load_run(tmp_path / "whole", network=network()).image  # noqa: B018
    with pytest.raises(RequestError, match="dataset: 'points' there, 'others' here"):
        trainer.train(
            settings, trainer.OwnData(features, name="others"), tmp_path / "part", network=network(), resume=True
        )


def test_an_episode_is_a_function_of_seed_split_and_index() -> None:
    """Not of what was read before; several processes share a meta-batch, of which a part can be empty."""
    data = trainer.OwnData(features)
    whole = list(islice(data.train(4, 5, CPU), 3))
    later = data.train(4, 5, CPU)
    later.load_state_dict({"next_batch": 2})
    assert torch.equal(next(iter(later)).support_x, whole[2].support_x)
    assert later.state_dict() == {"next_batch": 3}
    halves = [next(iter(data.train(4, 5, CPU, rank=rank, world_size=2))) for rank in (0, 1)]
    assert torch.equal(torch.cat([half.query_x for half in halves]), whole[0].query_x)
    assert not torch.equal(next(iter(data.train(4, 6, CPU))).support_x, whole[0].support_x)
    val, test = (next(iter(data.eval(split, 2, 2, CPU))) for split in ("val", "test"))
    assert not torch.equal(val.support_x, test.support_x)
    empty = list(data.eval("val", 5, 4, CPU, rank=0, world_size=2))[1]
    assert empty.query_x.shape == (0, 12, 7)
    assert empty.query_y.dtype == torch.int64


def test_examples_stand_in_the_order_of_their_labels() -> None:
    """With their labels, as in every other data; from NumPy, torch or lists; a list of episodes can be given, too."""
    kept = [features("train", 0, np.random.default_rng(seed)) for seed in range(4)]
    data = trainer.OwnData(lambda split, index, _: kept[index % len(kept)])  # noqa: ARG005
    (batch,) = data.eval("test", 4, 4, CPU)
    assert batch.support_y.tolist() == 4 * [[0, 0, 1, 1, 2, 2]]
    for x, y, found in zip(kept[3][2], kept[3][3], range(12), strict=True):
        assert x.astype("float32").tolist() in batch.query_x[3][4 * y : 4 * y + 4].tolist(), found
    assert batch.support_x.dtype == torch.float32


def test_images_go_into_the_trainers_networks(tmp_path: Path) -> None:
    """As [N, C, H, W]; other shapes are refused with the reason."""

    def images(split: str, index: int, rng: np.random.Generator) -> tuple[Any, ...]:
        return tuple(
            part if part.ndim == 1 else torch.rand(len(part), 3, 16, 16)
            for part in map(torch.as_tensor, features(split, index, rng))
        )

    data = trainer.OwnData(images)
    assert data.describe()["image_shape"] == [16, 16, 3]
    assert trainer.train(replace(SETTINGS, filters=4), data, tmp_path / "run").step == 4
    with pytest.raises(RequestError, match=r"conv4 takes images, but these examples have the shape \(7,\)"):
        trainer.train(SETTINGS, trainer.OwnData(features), tmp_path / "other")


def drawn(changes: Callable[[list[Any]], object], only: int = 0) -> Callable[..., list[Any]]:
    def draw(split: str, index: int, rng: np.random.Generator) -> list[Any]:
        episode = list(features(split, index, rng))
        if index >= only:
            changes(episode)
        return episode

    return draw


WRONG = {
    "of label 0 to 2|each label from 0 to 2; this one has .1, 2, 3. support": lambda e: e.__setitem__(
        1, [0, 1, 1, 2, 2, 2]
    ),
    r"examples \[6, 7\] and \[4, 4, 4\] query examples \[12, 8\]": lambda e: e.__setitem__(2, np.zeros((12, 8))),
    "must be floating point, such as images in .0, 1., .* not torch.uint8": lambda e: e.__setitem__(
        0, np.zeros((6, 7), np.uint8)
    ),
    r"a label for each example, .* not examples \[6, 7\] with labels \[3\]: \[0, 1, 2\]": lambda e: e.__setitem__(
        1, [0, 1, 2]
    ),
    r"an example for each label from 0, .*1000000000000": lambda e: e.__setitem__(1, np.arange(6) * 10**12),
    r"with labels \[0\]": lambda e: e.__setitem__(1, np.zeros(0, int)),
    r"with labels \[6\]: \[-1, ": lambda e: e.__setitem__(1, np.full(6, -1)),
    r"with labels \[\]: 3": lambda e: e.__setitem__(1, 3),
    r"An episode must be .support_x, support_y, query_x, query_y., all arrays": lambda e: e.pop(),
    "all arrays: .*NoneType": lambda e: e.__setitem__(0, None),
}


@pytest.mark.parametrize("reason", WRONG)
def test_other_forms_are_refused(reason: str) -> None:
    """Uneven classes, differing shapes, whole numbers in place of images, labels that do not fit, and no episodes."""
    with pytest.raises(RequestError, match=reason):
        trainer.OwnData(drawn(WRONG[reason]))


def test_any_memory_will_do() -> None:
    """Arrays of any stride and byte order, read-only ones, and tensors with a graph give the same episodes."""
    forms: tuple[Callable[[Any], Any], ...] = (
        lambda x: np.flip(np.flip(x).copy()),
        lambda x: x.astype(x.dtype.newbyteorder(">")),
        lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
        lambda x: torch.tensor(x, requires_grad=x.dtype == np.float32),
    )
    (plain,) = trainer.OwnData(features).eval("val", 1, 1, CPU)
    for form in forms:
        (batch,) = trainer.OwnData(lambda *given, form=form: [form(np.asarray(x)) for x in features(*given)]).eval(
            "val", 1, 1, CPU
        )
        assert all(map(torch.equal, plain, batch))
        assert not batch.support_x.requires_grad


def test_what_does_not_apply_is_refused(tmp_path: Path) -> None:
    """Episodes unlike the first one, normalization, augmentation and joint training."""

    def fewer(episode: list[Any]) -> None:
        episode[2:] = episode[:2]

    data = trainer.OwnData(drawn(fewer, only=5))
    with pytest.raises(RequestError, match=r"val episode 5 has .*k_query=2.* but the first one has .*k_query=4"):
        list(data.eval("val", 6, 3, CPU))
    cases = {
        "normalize is not for episodes of your own": {"normalize": True},
        "Joint training needs the classes": {"algorithm": "pretrain"},
        "augment photo is for images with 3 channels, and these have 7": {"augment": "photo"},
    }
    for reason, changes in cases.items():
        with pytest.raises(RequestError, match=reason):
            trainer.train(replace(SETTINGS, **changes), trainer.OwnData(features), tmp_path, network=network())
    with pytest.raises(RequestError, match="augment is not for episodes of your own"):
        trainer.OwnData(features).train(2, 0, CPU, transform=lambda images: images)
