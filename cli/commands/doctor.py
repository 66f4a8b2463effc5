"""``mamldata doctor``."""

from __future__ import annotations

import click

from cli.options import json_option, root_option
from cli.output import print_json, show
from mamldata.datasets.paths import data_root
from mamldata.doctor import examine
from mamldata.words import size_text


@click.command(
    epilog="\b\nExample:\n  mamldata doctor",
)
@root_option
@json_option
def command(root: str | None, as_json: bool) -> None:
    """Print versions, devices, folders and free space: what a bug report needs."""
    from trainer.system.threads import choose_threads

    report = {**examine(data_root(root)), "threads": str(choose_threads())}
    if as_json:
        print_json(report)
        return
    for key, value in report.items():
        if key == "optional":
            show("optional packages:")
            for name, version in value.items():
                show(f"  {name}: {version}")
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        elif key.endswith("_free"):
            value = size_text(int(value))
        elif isinstance(value, list):
            value = "; ".join(value) or "none"
        show(f"{key.replace('_', ' ')}: {value}")
