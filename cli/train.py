"""``mamldata train``."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cli.common import (
    archive_folder,
    episode_data,
    episode_options,
    given,
    json_option,
    next_command,
    print_json,
    root_option,
    say,
)

ALGORITHMS = ("maml", "fomaml", "maml++", "anil", "meta-sgd", "reptile", "pretrain", "random")
ORDERS = ("first", "second")
LOSSES = ("final", "multi-step")
RATES = ("fixed", "layer-step", "parameter")
ADAPTS = ("all", "head")
OPTIMIZERS = ("adam", "sgd")
NETWORKS = ("conv4", "conv3-pool", "conv4-pool", "resnet18")
BN_MODES = ("transductive", "per-step", "support", "frozen")
ENGINES = ("auto", "loop", "vmap", "higher")
DEVICES = ("auto", "cpu", "cuda", "mps")
SCHEDULES = ("cosine", "constant")


@click.command(
    epilog="\b\nExamples:\n  mamldata train glyphs --steps 200 --out run\n"
    "  mamldata train glyphs-5w1s --algorithm fomaml --out run2\n"
    "  mamldata train glyphs-5w1s --recipe maml-omniglot-5w1s --steps 100 --out run3",
)
@click.argument("target", metavar="NAME|FOLDER|ARCHIVE")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="The run's folder.")
@click.option("--recipe", metavar="NAME|FILE.toml", help="Settings to begin with; see mamldata recipes.")
@click.option("--algorithm", type=click.Choice(ALGORITHMS), help="[default: maml]")
@click.option("--network", type=click.Choice(NETWORKS), help="[default: conv4]")
@click.option(
    "--normalise/--no-normalise", default=None, help="Images by the train split's mean and deviation.  [default: no]"
)
@click.option("--bn", type=click.Choice(BN_MODES), help="Batch norm.  [default: transductive; per-step for maml++]")
@click.option("--steps", type=int, help="Outer steps.  [default: 4000]")
@click.option("--inner-steps", type=int, help="Of adaptation, in training.  [default: 1]")
@click.option("--inner-lr", type=float, help="[default: 0.4]")
@click.option("--eval-inner-steps", type=int, help="In evaluation.  [default: 3, or --inner-steps if more]")
@click.option("--order", type=click.Choice(ORDERS), help="Of the meta-gradient.  [default: the algorithm's]")
@click.option("--loss", type=click.Choice(LOSSES), help="The outer loop's.  [default: the algorithm's]")
@click.option("--rates", type=click.Choice(RATES), help="Inner rates, fixed or learned.  [default: the algorithm's]")
@click.option("--adapts", type=click.Choice(ADAPTS), help="What the inner loop changes.  [default: the algorithm's]")
@click.option("--msl-epochs", type=int, help="In which the multi-step loss comes down.  [default: 10]")
@click.option("--first-order-epochs", type=int, help="Before the second order.  [default: 0]")
@click.option("--epoch-steps", type=int, help="Outer steps in an epoch, for these.  [default: 500]")
@click.option("--support-batches", type=int, help="Of which each inner step takes the next.  [default: 1]")
@click.option("--checkpoint-inner", is_flag=True, default=None, help="Take time in place of memory for inner steps.")
@click.option("--meta-clip-norm", type=float, help="Longest meta-gradient.  [default: any]")
@click.option("--meta-clip-value", type=float, help="Largest element of a meta-gradient.  [default: any]")
@click.option("--meta-lr", type=float, help="[default: 0.001]")
@click.option("--meta-optimizer", type=click.Choice(OPTIMIZERS), help="[default: adam]")
@click.option(
    "--meta-schedule", type=click.Choice(SCHEDULES), help="How --meta-lr goes on over --steps.  [default: cosine]"
)
@click.option("--meta-batch-size", type=int, help="Episodes in an outer step.  [default: 16]")
@click.option("--seed", type=int, help="Of weights and order.  [default: 0]")
@click.option("--eval-every", type=int, help="Outer steps between validations.  [default: 500]")
@click.option("--eval-episodes", type=int, help="For validation.  [default: 200, or all if fewer]")
@click.option("--log-every", type=int, help="Outer steps between progress lines.  [default: 50]")
@click.option("--device", type=click.Choice(DEVICES), help="[default: auto]")
@click.option(
    "--remix/--no-remix",
    default=None,
    help="Form an archive's episodes anew in each epoch from the ways of all.  [default: --remix]",
)
@click.option("--engine", type=click.Choice(ENGINES), help="What computes meta-gradients.  [default: auto]")
@click.option("--tensorboard", is_flag=True, default=None, help="Write metrics for TensorBoard, too.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, or start it.")
@episode_options(seed=False)
@root_option
@json_option
def command(
    target: str,
    out: Path,
    recipe: str | None,
    remix: bool | None,
    resume: bool,
    episodes: dict[str, Any],
    root: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train on the episodes of an archive, or on live episodes of a dataset, which never repeat.

    Writes config.json, metrics.jsonl and checkpoints (the best and the last) into the run's folder. SIGTERM and
    SIGUSR1 end it with a checkpoint after the step under way, and exit code 75.

    Several processes share each meta-batch: torchrun --nproc-per-node 4 --no-python mamldata train ...
    """
    from trainer.algorithms import ALGORITHMS as POINTS
    from trainer.distributed import joined
    from trainer.settings import TrainSettings
    from trainer.train import train

    world = click.get_current_context().with_resource(joined())
    with world.together():
        chosen = given(**settings)
        if recipe is not None:
            from trainer.recipe import load_recipe

            plan = load_recipe(recipe)
            chosen = {**plan.settings, **chosen}
            if archive_folder(target) is None:
                episodes = {**plan.episodes, **episodes}
        chosen.setdefault("bn", POINTS[chosen.get("algorithm", TrainSettings.algorithm)].bn)
        data = episode_data(target, root, episodes, remix=remix)
        if recipe is not None and world.first:
            for difference in plan.differences(data.describe()):
                say(f"Not as the recipe {plan.name} has it: {difference}")
        if "eval_episodes" not in chosen:
            there = data.available("val") or TrainSettings.eval_episodes
            chosen["eval_episodes"] = min(TrainSettings.eval_episodes, there)
        plain = TrainSettings(**chosen)
    start = time.monotonic()
    result = train(plain, data, out, resume=resume, report=say, world=world)
    if not world.first:
        return
    if as_json:
        print_json({key: str(value) if isinstance(value, Path) else value for key, value in asdict(result).items()})
        return
    click.echo(f"best {result.best}: val accuracy {100 * result.best_accuracy:.2f} % at step {result.best_step}")
    say(f"Done in {(time.monotonic() - start) / 60:.1f} min.")
    next_command(f"mamldata eval {result.best} {target}")
