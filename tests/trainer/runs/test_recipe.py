"""Recipes: data that is checked whole, with the numbers of the experiments and their sources."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import CLASSES, Synthetic

from mamldata.datasets.toml import builtin_names
from mamldata.errors import ManifestError, RequestError
from trainer.loop import train
from trainer.runs.checkpoint import load_checkpoint
from trainer.runs.recipe import load_recipe, recipe_names
from trainer.settings import TrainSettings

GOOD = """\
title = "Mine"
dataset = "glyphs"
source = "a paper"
published = "99 %"
[episodes]
n_way = 5
k_shot = 1
k_query = 3
[settings]
steps = 10
inner_lr = 0.1
"""


@pytest.mark.parametrize("name", recipe_names())
def test_every_builtin_is_whole(name: str):
    """Each loads, is of a dataset that there is, and says every setting that decides the result."""
    recipe = load_recipe(name)
    assert recipe.dataset in builtin_names()
    assert all((recipe.title, recipe.source, recipe.published))
    decisive = {"algorithm", "network", "bn", "steps", "meta_lr", "meta_schedule", "meta_batch_size"}
    if recipe.settings["algorithm"] != "protonet":
        decisive |= {"inner_steps", "inner_lr", "eval_inner_steps"}
    assert decisive <= set(recipe.settings)
    if recipe.settings["algorithm"] == "maml++":
        assert {"msl_epochs", "epoch_steps", "filters"} <= set(recipe.settings)


@pytest.mark.parametrize("name", recipe_names())
def test_every_builtin_trains(name: str, tmp_path: Path):
    """On episodes of its own shape, two steps of its settings run, and end in a checkpoint that tells them."""
    recipe = load_recipe(name)
    quick = {"steps": 2, "filters": 4, "meta_batch_size": 1, "eval_every": 2, "eval_episodes": 2, "device": "cpu"}
    settings = TrainSettings(**{**recipe.settings, **quick})
    size = {"conv4": 8, "conv3-pool": 22, "conv4-pool": 16}[settings.network]  # the least, to be quick
    ways = min(recipe.episodes["n_way"], CLASSES)
    result = train(settings, Synthetic(size, **{**recipe.episodes, "n_way": ways}), tmp_path)
    saved = load_checkpoint(result.last)
    assert saved.step == 2
    assert {key: saved.settings[key] for key in recipe.settings} == {
        **recipe.settings,
        **{key: value for key, value in quick.items() if key in recipe.settings},
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("maml-omniglot-5w1s", (5, 1, 1, "conv4", 1, 0.4, 3, 32)),
        ("maml-omniglot-5w5s", (5, 5, 5, "conv4", 1, 0.4, 3, 32)),
        ("maml-omniglot-20w1s", (20, 1, 1, "conv4", 5, 0.1, 5, 16)),
        ("maml-omniglot-20w5s", (20, 5, 5, "conv4", 5, 0.1, 5, 16)),
        ("maml-mini-imagenet-5w1s", (5, 1, 15, "conv4-pool", 5, 0.01, 10, 4)),
        ("maml-mini-imagenet-5w5s", (5, 5, 15, "conv4-pool", 5, 0.01, 10, 2)),
    ],
)
def test_the_numbers_of_the_maml_paper(name: str, expected: tuple[object, ...]):
    """Appendix A.1 of Finn et al. 2017."""
    recipe = load_recipe(name)
    keys = ("network", "inner_steps", "inner_lr", "eval_inner_steps", "meta_batch_size")
    found = (*(recipe.episodes[key] for key in ("n_way", "k_shot", "k_query")), *(recipe.settings[key] for key in keys))
    assert found == expected


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("maml-")])
def test_the_scales_of_the_released_maml_code(name: str):
    """Its losses are sums over the images divided by the shots: of the inner loop, and of the clipped meta-gradient."""
    recipe = load_recipe(name)
    settings, (n_way, k_shot, k_query) = TrainSettings(**recipe.settings), recipe.episodes.values()
    assert (settings.inner_loss, settings.adapts) == ("class-sum", "all-but-norms")
    clip = 10 * k_shot / (n_way * k_query) if "mini" in name else None
    assert settings.meta_clip_value == (clip and pytest.approx(clip, abs=1e-4))
    assert "no scale" in recipe.notes
    assert "last weights" in recipe.notes


OMNIGLOT = ("maml++", "conv4-pool", 64, "per-step", 50_000, 5, 0.1, 5, 10, 500, "cosine", None, 8)
MINI = ("maml++", "conv4-pool", 48, "per-step", 50_000, 5, 0.01, 5, 15, 500, "constant", 10.0, 2)


@pytest.mark.parametrize(
    ("name", "episodes", "expected"),
    [
        ("maml++-omniglot-5w1s", (5, 1, 1), OMNIGLOT),
        ("maml++-omniglot-5w5s", (5, 5, 1), OMNIGLOT),
        ("maml++-omniglot-20w1s", (20, 1, 1), OMNIGLOT),
        ("maml++-omniglot-20w5s", (20, 5, 1), OMNIGLOT),
        ("maml++-mini-imagenet-5w1s", (5, 1, 15), MINI),
        ("maml++-mini-imagenet-5w5s", (5, 5, 15), MINI),
    ],
)
def test_the_numbers_of_mamlpp(name: str, episodes: tuple[int, ...], expected: tuple[object, ...]):
    """The released configurations: the meta learning rate falls to a hundredth on Omniglot, and stays on the other."""
    recipe = load_recipe(name)
    settings = TrainSettings(**recipe.settings)
    keys = ("algorithm", "network", "filters", "bn", "steps", "inner_steps", "inner_lr", "eval_inner_steps")
    keys += ("msl_epochs", "epoch_steps", "meta_schedule", "meta_clip_value", "meta_batch_size")
    assert tuple(recipe.episodes[key] for key in ("n_way", "k_shot", "k_query")) == episodes
    assert tuple(getattr(settings, key) for key in keys) == expected
    assert (settings.rates, settings.order, settings.first_order_epochs) == (None, None, 0)
    last = settings.meta_lr_at(settings.steps)
    assert last == pytest.approx(1e-3 if "mini" in name else 1e-5)
    assert "Derivative-order annealing" in recipe.notes


@pytest.mark.parametrize(
    ("name", "episodes", "published"),
    [
        ("protonet-omniglot-60w1s", (60, 1, 5), "98.8 % (5-way), 96.0 % (20-way)"),
        ("protonet-omniglot-60w5s", (60, 5, 5), "99.7 % (5-way), 98.9 % (20-way)"),
        ("protonet-mini-imagenet-16w1s", (16, 1, 15), "49.42 ± 0.78 % (5-way, trained on 30 ways)"),
        ("protonet-mini-imagenet-16w5s", (16, 5, 15), "68.20 ± 0.66 % (5-way, trained on 20 ways)"),
    ],
)
def test_the_numbers_of_prototypical_networks(name: str, episodes: tuple[int, ...], published: str):
    """One episode a step, four pooled blocks of 64 filters, Adam at 0.001: Snell et al. 2017, section 3."""
    recipe = load_recipe(name)
    settings = TrainSettings(**recipe.settings)
    assert (tuple(recipe.episodes.values()), recipe.published) == (episodes, published)
    found = (settings.algorithm, settings.network, settings.filters, settings.meta_lr, settings.meta_batch_size)
    assert found == ("protonet", "conv4-pool", 64, 1e-3, 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("functional-omniglot-5w5s", (5, 5, 15, "maml", "conv3-pool", 3_700, 5, 0.1, 5, 32)),
        ("pytorch-2018-omniglot-5w1s", (5, 1, 15, "fomaml", "conv4", 40_000, 5, 0.4, 10, 32)),
    ],
)
def test_the_numbers_of_well_known_examples(name: str, expected: tuple[object, ...]):
    """Their own defaults, with the constant rate of 0.001."""
    recipe = load_recipe(name)
    keys = ("algorithm", "network", "steps", "inner_steps", "inner_lr", "eval_inner_steps", "meta_batch_size")
    found = (*(recipe.episodes[key] for key in ("n_way", "k_shot", "k_query")), *(recipe.settings[key] for key in keys))
    assert found == expected
    assert (recipe.settings["meta_lr"], recipe.settings["meta_schedule"]) == (1e-3, "constant")


def test_ones_own(tmp_path: Path):
    """By path; what it does not say keeps its default."""
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    recipe = load_recipe(str(path))
    assert (recipe.name, recipe.title, recipe.settings) == ("mine", "Mine", {"steps": 10, "inner_lr": 0.1})
    data = {"dataset": "glyphs", "n_way": 5, "k_shot": 5, "k_query": 3}
    assert list(recipe.differences(data)) == ["k_shot is 5, not 1."]
    assert recipe.notes == ""
    path.write_text('notes = "of   note"\n' + GOOD)
    assert load_recipe(str(path)) == replace(recipe, notes="of note")


def test_former_names_are_read(tmp_path: Path):
    """A recipe that says ``normalize`` sets ``normalize``."""
    path = tmp_path / "mine.toml"
    path.write_text(GOOD + "normalise = true\n")
    assert load_recipe(str(path)).settings == {"steps": 10, "inner_lr": 0.1, "normalize": True}


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('title = "Mine"', 'titel = "Mine"', "titel: is not known here. Did you mean 'title'?"),
        ('title = "Mine"', 'titel = "Mine"', "title: is missing"),
        ('title = "Mine"', 'title = "Mine"\nnotes = 1', "notes: must be a string"),
        ("n_way = 5", "n_way = 0", "episodes.n_way: must be at least 1, not 0"),
        ("n_way = 5", "n_way = 5\nways = 5", "episodes.ways: is not known here."),
        ("inner_lr = 0.1", "inner_rl = 0.1", "settings.inner_rl: is not known here. Did you mean 'inner_lr'?"),
        ("inner_lr = 0.1", "inner_lr = -1.0", "inner_lr must be a positive number, not -1.0."),
        ("inner_lr = 0.1", 'inner_lr = "0.1"', "inner_lr must be a number, not"),
        (
            "inner_lr = 0.1",
            'network = ["conv4"]',
            "network must be one of conv4, conv3-pool, conv4-pool, resnet18, not ['conv4'].",
        ),
        ("[episodes]", "[episode]", "episodes: is missing"),
        ("[episodes]", "[episodes", "not valid TOML"),
    ],
)
def test_faults(old: str, new: str, fault: str, tmp_path: Path):
    """Each with its place, all at once."""
    assert GOOD.count(old) == 1
    path = tmp_path / "mine.toml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ManifestError) as caught:
        load_recipe(str(path))
    assert fault in str(caught.value)


def test_no_such_recipe(tmp_path: Path):
    """The nearest one is named."""
    with pytest.raises(RequestError, match=r"Did you mean 'maml-omniglot-5w1s'\?"):
        load_recipe("maml-omniglot-5w1")
    with pytest.raises(RequestError, match="There is no recipe file"):
        load_recipe(str(tmp_path / "none.toml"))
