from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mamldata
import trainer
from mamldata.errors import RequestError
from mamldata.sources.live import live
from trainer.data import EpisodeData, live_data
from trainer.maml.parameters import MetaParameters, episodes, with_outputs
from trainer.maml.variants import method_of
from trainer.networks.networks import build_network
from trainer.runs.checkpoint import TrainedRun

OPTIONS = {"n_way": 3, "k_shot": 2, "k_query": 2}
SETTINGS = {"steps": 1, "eval_every": 1, "eval_episodes": 2, "meta_batch_size": 1, "filters": 4, "device": "cpu"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(glyphs_root: Path) -> EpisodeData:
    return live_data("glyphs", glyphs_root, OPTIONS)


@pytest.fixture(scope="module")
def stored(glyphs_root: Path) -> list[tuple[np.ndarray[Any, Any], ...]]:
    """The first test episodes as a bank holds them: support and query images uint8 ``[N, H, W, C]``, with labels."""
    source = live("glyphs", "test", root=glyphs_root, **OPTIONS)
    stream = mamldata.EpisodeStream(source.view(3), batch_size=3, shuffle=False, dtype=torch.uint8)
    (batch,) = list(stream)

    def rows() -> Iterator[tuple[np.ndarray[Any, Any], ...]]:
        for support_x, support_y, query_x, query_y in zip(*batch[:4], strict=True):
            yield (
                support_x.permute(0, 2, 3, 1).numpy().copy(),
                support_y.numpy().copy(),
                query_x.permute(0, 2, 3, 1).numpy().copy(),
                query_y.numpy().copy(),
            )

    return list(rows())


@pytest.fixture(scope="module")
def run(glyphs_run: Path) -> TrainedRun:
    return trainer.load_run(glyphs_run)


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"normalize": True},
        {"bn": "support"},
        {"bn": "frozen"},
        {"algorithm": "maml++", "inner_steps": 3},
        {"algorithm": "meta-sgd"},
        {"algorithm": "anil"},
        {"algorithm": "protonet"},
        {"algorithm": "protonet", "bn": "support"},
        {"algorithm": "maml", "support_batches": 2, "inner_steps": 2, "inner_loss": "class-sum"},
    ],
    ids=str,
)
def test_it_answers_as_the_evaluation_does(
    own: dict[str, Any], data: EpisodeData, stored: list[Any], tmp_path: Path
) -> None:
    """Of the same episodes, given together, the same logits to the bit and so the same answers to every image."""
    result = trainer.train(trainer.TrainSettings(**{**SETTINGS, **own}), data, tmp_path)
    run, found = trainer.load_run(tmp_path), trainer.evaluate(result.best, data, episodes=3, device="cpu")
    method = method_of(run.network, run.settings.inner_loop_at_test())
    (batch,) = data.eval("test", 3, 3, CPU, normalize=run.settings.normalize)
    assert found.answers is not None
    for (support, labels, query, _), episode, given in zip(stored, episodes(batch), found.answers.given, strict=True):
        adapted = run.adapt(support, labels)
        logits = adapted(query, together=True)
        assert (logits.dtype, logits.shape) == (torch.float32, (6, 3))
        assert logits.argmax(1).tolist() == given.tolist()
        problem = method.shortcut(run.network, run.parameters, episode, method)
        with torch.no_grad():
            fast = trainer.maml.adapt.adapt(*problem, method)[-1]
            expected = method.query_logits(problem[0], fast, problem[2], method)
        assert torch.equal(logits, expected)
        alone = torch.cat([adapted(query[i : i + 1]) for i in range(6)])
        torch.testing.assert_close(adapted(query), alone)
        if run.settings.point.bn in {"support", "frozen"}:
            torch.testing.assert_close(adapted(query), logits)
        else:
            assert not torch.allclose(adapted(query), logits, atol=1e-3)


def test_prototypes_tell_any_number_of_classes_apart(run: TrainedRun, stored: list[Any]) -> None:
    """More than in training, too, since they have no head."""
    free = run._replace(settings=trainer.TrainSettings(algorithm="protonet", filters=4))
    support, query = np.concatenate([stored[0][0], stored[1][0]]), stored[0][2]
    labels = np.concatenate([stored[0][1], stored[1][1] + 3])
    assert free.adapt(support, labels)(query).shape == (6, 6)


def test_many_images_are_answered_in_parts(run: TrainedRun, stored: list[Any]) -> None:
    """The answers do not depend on how many come at once, and memory does not grow with them."""
    support, labels, query, _ = stored[0]
    adapted = run.adapt(support, labels)
    torch.testing.assert_close(adapted(np.tile(query, (25, 1, 1, 1))), adapted(query).repeat(25, 1))


@pytest.mark.parametrize("algorithm", ["maml", "maml++", "meta-sgd", "anil"])
def test_fewer_classes_use_the_first_outputs(
    algorithm: str, data: EpisodeData, stored: list[Any], tmp_path: Path
) -> None:
    """The same answers as of a network that has no other outputs, also with as many steps as outputs."""
    settings = trainer.TrainSettings(**SETTINGS, algorithm=algorithm, inner_steps=3)
    trainer.train(settings, data, tmp_path)
    run = trainer.load_run(tmp_path)
    support, labels, query, _ = stored[0]
    mine = labels < 2
    small = build_network("conv4", 1, 28, 2, 0, 4)

    def cut(part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = dict(small.named_parameters())
        return {n: v[:2] if v.shape[1:] == own[n].shape[1:] and len(v) != len(own[n]) else v for n, v in part.items()}

    rates = cut(run.parameters.rates) if settings.point.rates == "parameter" else run.parameters.rates
    parameters = MetaParameters(cut(run.parameters.weights), rates, run.parameters.norms)
    narrowed = with_outputs(run.network, run.parameters, settings.inner_loop_at_test(), 2)
    for part, expected in zip(narrowed, parameters, strict=True):
        assert part.keys() == expected.keys()
        assert all(torch.equal(part[name], expected[name]) for name in part)
    narrow = run._replace(network=small, parameters=parameters, data={**run.data, "n_way": 2})
    one, other = (model.adapt(support[mine], labels[mine]) for model in (run, narrow))
    assert one(query).shape == (6, 2)
    assert torch.equal(one(query), other(query))


def test_the_order_of_images_and_the_names_make_no_difference(run: TrainedRun, stored: list[Any]) -> None:
    """Columns are in the order of the sorted labels."""
    support, labels, query, _ = stored[0]
    names, order = np.array(["ant", "bee", "cat"]), [5, 0, 3, 1, 4, 2]
    adapted = run.adapt(support, labels)
    named = run.adapt(support[order], names[labels][order])
    assert (adapted.classes, named.classes) == ((0, 1, 2), ("ant", "bee", "cat"))
    torch.testing.assert_close(adapted(query), named(query))
    turned = run.adapt(torch.from_numpy(support), torch.from_numpy(2 - labels))
    assert turned.classes == (0, 1, 2)
    assert not torch.allclose(adapted(query), turned(query))


def test_shots_may_differ(run: TrainedRun, stored: list[Any], data: EpisodeData) -> None:
    """Between classes; where the support set is divided into batches, each class must be divisible."""
    support, labels, query, _ = stored[0]
    few = [0, 2, 3, 4]
    assert run.adapt(support[few], labels[few])(query).isfinite().all()
    divided = run._replace(settings=replace(run.settings, support_batches=2))
    mixed = [5, 0, 3, 1, 4, 2]  # each batch still has a shot of each class
    order = sorted(mixed, key=lambda place: labels[place])
    torch.testing.assert_close(
        divided.adapt(support[mixed], labels[mixed])(query), divided.adapt(support[order], labels[order])(query)
    )
    with pytest.raises(RequestError, match="k_shot is 1, which cannot be divided into 2 support batches"):
        divided.adapt(support[few], labels[few])


def test_images_are_prepared_as_the_banks_were(run: TrainedRun, tmp_path: Path) -> None:
    """Files, bytes and PIL's images, which are not changed, become the pixels that ``prepare_image`` gives."""
    chance, files = np.random.default_rng(0), []
    for number in range(4):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(chance.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(files[-1])
    prepared = np.stack([mamldata.prepare_image(file, run.image) for file in files])
    expected = run.adapt(prepared[:2], ["a", "b"])(prepared)
    pictures = [Image.open(file) for file in files]
    before = [picture.tobytes() for picture in pictures]
    for some in (files, [str(file) for file in files], [file.read_bytes() for file in files], pictures):
        assert torch.equal(run.adapt(some[:2], ["a", "b"])(some), expected)
    assert [picture.tobytes() for picture in pictures] == before
    assert run.adapt(files[:2], ["a", "b"])(pictures[:1]).shape == (1, 2)


def test_a_photograph_of_pil_is_turned_upright(tmp_path: Path) -> None:
    """As its file is; 16-bit greys, too, keep their upper bits."""
    recipe = mamldata.ImageRecipe(4, 1, "lanczos", invert=False, bank_sha256={}, upright=True)
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for name in ("turned", "deep"):
        file = tmp_path / f"{name}.png"
        with Image.open(file) as picture:
            before = picture.tobytes()
            assert np.array_equal(mamldata.prepare_image(picture, recipe), mamldata.prepare_image(file, recipe))
            assert picture.tobytes() == before


UINT8 = np.zeros((2, 28, 28, 1), np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "text"),
    [
        (UINT8, ["a", "a"], "has 1 class, but this network tells 2 to 3 apart: its head has 3 outputs"),
        (np.zeros((4, 28, 28, 1), np.uint8), list("abcd"), "has 4 classes, but this network tells 2 to 3 apart"),
        (UINT8, ["a", 1], "The labels cannot be sorted"),
        (UINT8, ["a", ["b"]], "The labels cannot be sorted"),
        (UINT8, ["a", "b", "c"], "2 support images cannot have 3 labels"),
        (UINT8.astype(np.float32), ["a", "b"], r"must be uint8 \[N, 28, 28, 1\] .* not float32 \[2, 28, 28, 1\]"),
        (UINT8[:, :20], ["a", "b"], r"not uint8 \[2, 20, 28, 1\]"),
        (UINT8[:, :, :, 0], ["a", "b"], r"not uint8 \[2, 28, 28\]"),
        ([], ["a", "b"], "with N of at least 1"),
        ("a.png", ["a", "b"], "Give a list of images"),
        (["nowhere.png", "b.png"], ["a", "b"], r"nowhere.png cannot be read \(No such file"),
        ([b"no image", b""], ["a", "b"], "The image cannot be prepared: not an image"),
    ],
)
def test_what_cannot_be_adapted_to_is_refused(run: TrainedRun, images: Any, labels: Any, text: str) -> None:
    """In words, before anything is computed."""
    with pytest.raises(RequestError, match=text):
        run.adapt(images, labels)


def test_nothing_is_guessed(run: TrainedRun, tmp_path: Path) -> None:
    """Without a record of how images were prepared no file is taken; without statistics to normalize by, nothing."""
    file = tmp_path / "x.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(file)
    old = run._replace(data={**run.data, "image": "unknown"})
    assert old.adapt(UINT8, ["a", "b"])(UINT8).shape == (2, 2)
    with pytest.raises(RequestError, match="does not record how its images"):
        old.adapt([file, file], ["a", "b"])
    older = run._replace(
        data={key: value for key, value in run.data.items() if key != "normalisation"},
        settings=replace(run.settings, normalize=True),
    )
    with pytest.raises(RequestError, match="does not record their mean and deviation"):
        older.adapt(UINT8, ["a", "b"])
