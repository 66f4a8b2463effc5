"""``mamldata models``."""

from __future__ import annotations

from typing import Any

import click

from cli.options import json_option
from cli.output import print_json, say, show
from mamldata.io.digest import sha256_file
from trainer.runs.model import read_about, shipped_models


@click.command(epilog="\b\nExample:\n  mamldata models")
@json_option
def command(as_json: bool) -> None:
    """List the models that come with the package. Commands that take a run take such a name, too."""
    found: list[dict[str, Any]] = []
    for name, path in shipped_models().items():
        about = read_about(path)
        data, settings = about["data"], about["settings"]
        what = f"{settings['algorithm']}, {data['dataset']} {data['n_way']}-way {data['k_shot']}-shot"
        keys = ("accuracy", "interval", "episodes", "dataset", "n_way", "k_shot", "k_query")
        results = [{key: one[key] for key in keys} for one in about["results"]]
        found.append({"name": name, "what": what, "results": results, "sha256": sha256_file(path)})
    if as_json:
        print_json(found)
        return
    for one in found:
        measured = [f"{100 * r['accuracy']:.2f} ± {100 * r['interval']:.2f} %" for r in one["results"]]
        show(f"{one['name']}: {one['what']}, {', '.join(measured) or 'not evaluated'}, sha256:{one['sha256']}")
    if not found:
        say("No model comes with this version. mamldata export makes one of a run.")
