"""``mamldata export``."""

from __future__ import annotations

from pathlib import Path

import click

from cli.options import LocalPath, root_option
from cli.output import say, show


@click.command(epilog="\b\nExample:\n  mamldata export run --out glyphs-maml.safetensors")
@click.argument("run_dir", metavar="RUN", type=LocalPath(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=LocalPath(dir_okay=False, path_type=Path), required=True, help="The new NAME.safetensors.")
@click.option(
    "--checkpoint", type=LocalPath(exists=True, path_type=Path), help="A checkpoint of RUN.  [default: the best one]"
)
@root_option
def command(run_dir: Path, out: Path, checkpoint: Path | None, root: str | None) -> None:
    """Write a run's network as a safetensors file, with a card NAME.md beside it, to give away or to publish.

    The file has all that eval, predict and train --from need: the weights, the settings, how images are prepared, the
    data's digest and licence, and the run's results on test episodes. Evaluate the run first.
    """
    from trainer.reports.export import export_model

    card = export_model(run_dir, out, checkpoint=checkpoint, root=root)
    show(f"{out}: {out.stat().st_size:,} bytes")
    say(f"Its card: {card}")
