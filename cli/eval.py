"""``mamldata eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.common import (
    archive_folder,
    episode_options,
    given,
    json_option,
    print_json,
    refuse_with_archive,
    root_option,
    say,
)
from mamldata.manifest import SPLITS

LIVE_EPISODES = 600


@click.command(
    epilog="\b\nExample:\n  mamldata eval run glyphs-5w1s --split test",
)
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.argument("target", metavar="NAME|ARCHIVE")
@click.option("--split", type=click.Choice(SPLITS), default="test", show_default=True)
@click.option("--episodes", type=click.IntRange(2), help="[default: all of an archive, 600 live ones]")
@click.option("--inner-steps", type=click.IntRange(0), help="[default: as in the run's validation]")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda", "mps")), default="auto", show_default=True)
@click.option("--seed", type=click.IntRange(0), help="Of live episodes.  [default: 0]")
@episode_options
@root_option
@json_option
def command(
    checkpoint: Path,
    target: str,
    split: str,
    episodes: int | None,
    inner_steps: int | None,
    device: str,
    seed: int | None,
    n_way: int | None,
    k_shot: int | None,
    k_query: int | None,
    split_scheme: str | None,
    rotations: str | None,
    image_size: int | None,
    root: str | None,
    as_json: bool,
) -> None:
    """Evaluate a checkpoint, or the best one of a run's folder: accuracy with its 95 % interval over episodes."""
    from trainer.data import archive_data, live_data
    from trainer.evaluate import evaluate_checkpoint

    options: dict[str, Any] = given(
        seed=seed,
        n_way=n_way,
        k_shot=k_shot,
        k_query=k_query,
        split_scheme=split_scheme,
        rotations=rotations,
        image_size=image_size,
    )
    folder = archive_folder(target)
    if folder is None:
        data = live_data(target, root, options)
    else:
        refuse_with_archive(folder, options)
        data = archive_data(folder)
    count = episodes or data.available(split) or LIVE_EPISODES
    result = evaluate_checkpoint(checkpoint, data, split=split, episodes=count, inner_steps=inner_steps, device=device)
    if as_json:
        print_json(result.to_json())
        return
    click.echo(str(result))
    steps = " → ".join(f"{100 * value:.2f}" for value in result.accuracy_by_step)
    say(f"Accuracy before adaptation and after each inner step: {steps} %")
