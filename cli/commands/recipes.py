"""``mamldata recipes``."""

from __future__ import annotations

from dataclasses import asdict

import click

from cli.options import json_option
from cli.output import next_command, print_json, show
from mamldata.datasets.toml import builtin_names
from trainer.runs.recipe import load_recipe, recipe_names


@click.command(
    epilog="\b\nExamples:\n  mamldata recipes\n  mamldata recipes maml-omniglot-5w1s",
)
@click.argument("name", required=False, metavar="[NAME|FILE.toml]")
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the recipes (settings of published experiments), or show one of them with its source."""
    recipes = [load_recipe(one) for one in ([name] if name else recipe_names())]
    if as_json:
        print_json([asdict(recipe) for recipe in recipes])
        return
    for recipe in recipes:
        show(f"{recipe.name}: {recipe.title}, published: {recipe.published}")
        if name:
            show(f"  source: {recipe.source}")
            if recipe.notes:
                show(f"  notes: {recipe.notes}")
            for key, value in {**recipe.episodes, **recipe.settings}.items():
                show(f"  {key} = {value}")
    if not name:
        next_command(["recipes", recipes[0].name])
    elif recipes[0].dataset in builtin_names():
        dataset = recipes[0].dataset
        next_command(["fetch", dataset], ["train", dataset, "--recipe", name, "--out", recipes[0].name])
