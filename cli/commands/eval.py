"""``mamldata eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.options import LocalPath, episode_options, json_option, root_option
from cli.output import print_json, say, show
from cli.targets import episode_data, evaluated_episodes
from mamldata.sampling.splits import SPLITS
from trainer.settings import SETTINGS


@click.command(
    epilog="\b\nExample:\n  mamldata eval run glyphs-5w1s --split test",
)
@click.argument("checkpoint", type=LocalPath(exists=True, path_type=Path))
@click.argument("target", metavar="NAME|FOLDER|ARCHIVE")
@click.option("--split", type=click.Choice(SPLITS), default="test", show_default=True, help="The split to evaluate on.")
@click.option("--episodes", "count", type=click.IntRange(2), help="Number to evaluate on.  [default: all, or 600 live]")
@click.option("--inner-steps", type=click.IntRange(0), help="Adaptation steps.  [default: as in the run's validation]")
@click.option("--device", type=click.Choice(SETTINGS["device"].choices), default="auto", show_default=True)
@episode_options()
@root_option
@json_option
def command(
    checkpoint: Path,
    target: str,
    split: str,
    count: int | None,
    inner_steps: int | None,
    device: str,
    episodes: dict[str, Any],
    root: str | None,
    as_json: bool,
) -> None:
    """Evaluate a checkpoint, or the best one in a run folder: accuracy with its 95 % interval over episodes."""
    from trainer.evaluation import evaluate
    from trainer.system.distributed import joined

    world = click.get_current_context().with_resource(joined())
    with world.together():
        data = episode_data(target, root, episodes)
        number = evaluated_episodes(data, split, count)
    result = evaluate(
        checkpoint, data, split=split, episodes=number, inner_steps=inner_steps, device=device, world=world
    )
    if not world.first:
        return
    if as_json:
        print_json(result.to_json())
        return
    show(str(result))
    steps = " → ".join(f"{100 * value:.2f}" for value in result.accuracy_by_step)
    say(f"Accuracy before adaptation and after each inner step: {steps} %")
