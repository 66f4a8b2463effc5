"""The options of training that several verbs share, and how they become ``TrainSettings``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from cli.common import archive_folder, episode_data, options_as, say

if TYPE_CHECKING:
    from trainer.data import EpisodeData

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
PRECISIONS = ("fp32", "tf32", "bf16")
SCHEDULES = ("cosine", "constant")


_OPTIONS = {
    "algorithm": click.option("--algorithm", type=click.Choice(ALGORITHMS), help="[default: maml]"),
    "recipe": click.option("--recipe", metavar="NAME|FILE.toml", help="Settings to begin with; see mamldata recipes."),
    "network": click.option("--network", type=click.Choice(NETWORKS), help="[default: conv4]"),
    "filters": click.option("--filters", type=int, help="Of each convolution.  [default: the network's own]"),
    "normalise": click.option(
        "--normalise/--no-normalise",
        default=None,
        help="Images by the train split's mean and deviation.  [default: no]",
    ),
    "bn": click.option(
        "--bn", type=click.Choice(BN_MODES), help="Batch norm.  [default: transductive; per-step for maml++]"
    ),
    "steps": click.option("--steps", type=int, help="Outer steps.  [default: 4000]"),
    "inner_steps": click.option("--inner-steps", type=int, help="Of adaptation, in training.  [default: 1]"),
    "inner_lr": click.option("--inner-lr", type=float, help="[default: 0.4]"),
    "eval_inner_steps": click.option(
        "--eval-inner-steps", type=int, help="In evaluation.  [default: 3, or --inner-steps if more]"
    ),
    "order": click.option(
        "--order", type=click.Choice(ORDERS), help="Of the meta-gradient.  [default: the algorithm's]"
    ),
    "loss": click.option("--loss", type=click.Choice(LOSSES), help="The outer loop's.  [default: the algorithm's]"),
    "rates": click.option(
        "--rates", type=click.Choice(RATES), help="Inner rates, fixed or learned.  [default: the algorithm's]"
    ),
    "adapts": click.option(
        "--adapts", type=click.Choice(ADAPTS), help="What the inner loop changes.  [default: the algorithm's]"
    ),
    "msl_epochs": click.option(
        "--msl-epochs", type=int, help="In which the multi-step loss comes down.  [default: 10]"
    ),
    "first_order_epochs": click.option("--first-order-epochs", type=int, help="Before the second order.  [default: 0]"),
    "epoch_steps": click.option("--epoch-steps", type=int, help="Outer steps in an epoch, for these.  [default: 500]"),
    "support_batches": click.option(
        "--support-batches", type=int, help="Of which each inner step takes the next.  [default: 1]"
    ),
    "checkpoint_inner": click.option(
        "--checkpoint-inner", is_flag=True, default=None, help="Take time in place of memory for inner steps."
    ),
    "meta_clip_norm": click.option("--meta-clip-norm", type=float, help="Longest meta-gradient.  [default: any]"),
    "meta_clip_value": click.option(
        "--meta-clip-value", type=float, help="Largest element of a meta-gradient.  [default: any]"
    ),
    "meta_lr": click.option("--meta-lr", type=float, help="[default: 0.001]"),
    "meta_optimizer": click.option("--meta-optimizer", type=click.Choice(OPTIMIZERS), help="[default: adam]"),
    "meta_schedule": click.option(
        "--meta-schedule", type=click.Choice(SCHEDULES), help="How --meta-lr goes on over --steps.  [default: cosine]"
    ),
    "meta_batch_size": click.option("--meta-batch-size", type=int, help="Episodes in an outer step.  [default: 16]"),
    "seed": click.option("--seed", type=int, help="Of weights and order.  [default: 0]"),
    "eval_every": click.option("--eval-every", type=int, help="Outer steps between validations.  [default: 500]"),
    "eval_episodes": click.option("--eval-episodes", type=int, help="For validation.  [default: 200, or all if fewer]"),
    "log_every": click.option("--log-every", type=int, help="Outer steps between progress lines.  [default: 50]"),
    "device": click.option("--device", type=click.Choice(DEVICES), help="[default: auto]"),
    "remix": click.option(
        "--remix/--no-remix",
        default=None,
        help="Form an archive's episodes anew in each epoch from the ways of all.  [default: --remix]",
    ),
    "engine": click.option(
        "--engine", type=click.Choice(ENGINES), help="What computes meta-gradients.  [default: auto]"
    ),
    "precision": click.option(
        "--precision", type=click.Choice(PRECISIONS), help="Of the arithmetic.  [default: tf32 on CUDA, or fp32]"
    ),
    "tensorboard": click.option(
        "--tensorboard", is_flag=True, default=None, help="Write metrics for TensorBoard, too."
    ),
}


def setting_options(*, leave_out: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options that say how to train; the command gets those that were given as ``chosen``, a dict.

    Args:
        leave_out: those that make no sense for the command.
    """
    return options_as("chosen", {name: option for name, option in _OPTIONS.items() if name not in set(leave_out)})


def begin(
    target: str,
    root: str | None,
    episodes: dict[str, Any],
    chosen: dict[str, Any],
    tell: Callable[[str], object] = say,
) -> tuple[EpisodeData, dict[str, Any], dict[str, Any]]:
    """The episodes to train on, and what the recipe and over it the user say of them.

    Returns:
        The episodes, arguments for ``TrainSettings``, and options for live episodes.

    Args:
        target: an archive, or a dataset.
        root: the data root.
        episodes: the options for live episodes that the user gave.
        chosen: those of ``setting_options`` that the user gave.
        tell: told how the episodes differ from the recipe's.

    Raises:
        RequestError: no such recipe, or ``target`` is neither an archive nor a dataset.
        click.UsageError: options that do not go with ``target``.
    """
    from trainer.settings import TrainSettings

    values = dict(chosen)
    recipe, remix = values.pop("recipe", None), values.pop("remix", None)
    plan = None
    if recipe is not None:
        from trainer.runs.recipe import load_recipe

        plan = load_recipe(recipe)
        values = {**plan.settings, **values}
        if archive_folder(target) is None:
            episodes = {**plan.episodes, **episodes}
    data = episode_data(target, root, episodes, remix=remix)
    if plan is not None:
        for difference in plan.differences(data.describe()):
            tell(f"Not as the recipe {plan.name} has it: {difference}")
    most = data.available("val") or TrainSettings.eval_episodes
    values.setdefault("eval_episodes", min(TrainSettings.eval_episodes, most))
    return data, values, episodes
