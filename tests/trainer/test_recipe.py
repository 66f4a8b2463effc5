"""Recipes: data that is checked whole, with the numbers of the experiments and their sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from mamldata.errors import ManifestError, RequestError
from mamldata.manifest import builtin_names
from trainer.recipe import load_recipe, recipe_names
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
    settings = TrainSettings(**recipe.settings)
    decisive = {"algorithm", "network", "bn", "steps", "inner_steps", "inner_lr", "eval_inner_steps", "meta_lr"}
    assert decisive | {"meta_schedule", "meta_batch_size"} <= set(recipe.settings)
    assert settings.steps == 60_000


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


def test_ones_own(tmp_path: Path):
    """By path; what it does not say keeps its default."""
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    recipe = load_recipe(str(path))
    assert (recipe.name, recipe.title, recipe.settings) == ("mine", "Mine", {"steps": 10, "inner_lr": 0.1})
    data = {"dataset": "glyphs", "n_way": 5, "k_shot": 5, "k_query": 3}
    assert list(recipe.differences(data)) == ["k_shot is 5, not 1."]


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('title = "Mine"', 'titel = "Mine"', "titel: is not known here. Did you mean 'title'?"),
        ('title = "Mine"', 'titel = "Mine"', "title: must be a string"),
        ("n_way = 5", "n_way = 0", "episodes.n_way: must be a whole number from 1"),
        ("n_way = 5", "n_way = 5\nways = 5", "episodes.ways: is not known here."),
        ("inner_lr = 0.1", "inner_rl = 0.1", "settings.inner_rl: is not known here. Did you mean 'inner_lr'?"),
        ("inner_lr = 0.1", "inner_lr = -1.0", "inner_lr must be a positive number, not -1.0."),
        ("inner_lr = 0.1", 'inner_lr = "0.1"', "settings: a value of the wrong type"),
        ("[episodes]", "[episode]", "episodes, settings: must be tables"),
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
