"""``mamldata train``."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cli.options import LocalPath, as_words, episode_options, given, json_option, root_option, target_argument
from cli.output import bars, next_command, print_json, say, show
from cli.own_network import own_network
from cli.train_options import begin, setting_options
from mamldata.words import install_command


def _weights(ctx: click.Context, param: click.Parameter, value: str | None) -> list[float] | None:
    """Numbers between commas; ``MixedData`` checks them."""
    try:
        return None if value is None else [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is not numbers with commas between, such as 0.7,0.3.", ctx, param
        ) from None


@click.command(
    epilog="\b\nExamples:\n  mamldata train glyphs --steps 200 --out run\n"
    "  mamldata train glyphs-5w1s --algorithm fomaml --out run2\n"
    "  mamldata train glyphs-5w1s --recipe maml-omniglot-5w1s --steps 100 --out run3",
)
@target_argument("targets", metavar="NAME|FOLDER|ARCHIVE...", nargs=-1, required=True)
@click.option(
    "--weights", callback=_weights, metavar="W,W…", help="Of several targets: how often each.  [default: equal]"
)
@click.option("--out", type=LocalPath(file_okay=False, path_type=Path), required=True, help="The run folder.")
@setting_options()
@click.option(
    "--from",
    "start",
    type=LocalPath(path_type=Path),
    metavar="RUN|CHECKPOINT|MODEL",
    help="Start from the weights of another run or of a model, in place of random ones.",
)
@click.option("--resume", is_flag=True, help="Resume the run in --out, or start it if there is none.")
@episode_options(seed=False)
@root_option
@json_option
def command(
    targets: tuple[str, ...],
    weights: list[float] | None,
    out: Path,
    start: Path | None,
    resume: bool,
    chosen: dict[str, Any],
    episodes: dict[str, Any],
    root: str | None,
    as_json: bool,
) -> None:
    """Train on the episodes of an archive, or on live episodes of a dataset, which never repeat.

    Writes config.json, metrics.jsonl and checkpoints (the best and the last) into the run folder, and curves.png if
    matplotlib is installed. Ctrl-C, SIGTERM and SIGUSR1 end it after the current step, or amid a validation, with a
    checkpoint and exit code 75; a second Ctrl-C ends it at once.

    Of several targets each meta-batch comes from one, as often as --weights says; validation takes episodes of all in
    the same proportions.

    To share each meta-batch among several processes: torchrun --nproc-per-node 4 --no-python mamldata train ...
    """
    from mamldata.errors import RunExistsError, StoppedError
    from trainer.loop import train
    from trainer.reports.plots import have_matplotlib, plot_run
    from trainer.settings import TrainSettings
    from trainer.system.distributed import joined
    from trainer.system.signals import stop_at_signals

    world = click.get_current_context().with_resource(joined())
    with world.together():
        data, values, episodes = begin(targets, root, episodes, chosen, say if world.first else lambda _: None, weights)
        settings = TrainSettings(**values)
        network = own_network(chosen.get("network"), data.describe(), settings.seed)
    begun = time.monotonic()
    try:
        with stop_at_signals(keyboard=world.world_size == 1, at_once=True):
            how: dict[str, Any] = {"network": network, "notify": say, "progress": bars, "world": world}
            result = train(settings, data, out, resume=resume, start=start, **how)
    except StoppedError as error:
        raise StoppedError(f"{error} The same command with --resume continues it.") from error
    except RunExistsError as error:
        raise RunExistsError(f"{error} The same command with --resume continues it.") from error
    if not world.first:
        return
    if have_matplotlib():
        plot_run(result.run_dir)
    else:
        say(f"For curves.png, install matplotlib: {install_command('plots')}")
    if as_json:
        print_json({key: str(value) if isinstance(value, Path) else value for key, value in asdict(result).items()})
        return
    show(f"best {result.best}: val accuracy {100 * result.best_accuracy:.2f} % at step {result.best_step}")
    say(f"Done in {(time.monotonic() - begun) / 60:.1f} min.")
    own = given(network=settings.network if network else None)
    next_command(["eval", result.best, *targets, *as_words(own | episodes)])
