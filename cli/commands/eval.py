"""``mamldata eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.options import LocalPath, benchmark_option, episode_options, given, json_option, root_option, target_argument
from cli.output import bars, print_json, say, show
from cli.targets import episode_data, evaluated_episodes, refuse_with_benchmark
from mamldata.archive.benchmarks import benchmark as benchmark_named
from mamldata.archive.benchmarks import benchmark_of
from mamldata.datasets.load import load_manifest
from mamldata.datasets.paths import data_root
from mamldata.errors import RequestError
from mamldata.pipeline import build_benchmark
from mamldata.sampling.splits import SPLITS
from trainer.settings import SETTINGS


@click.command(
    epilog="\b\nExamples:\n  mamldata eval run glyphs-5w1s --split test\n  mamldata eval run --benchmark glyphs-5w1s",
)
@click.argument("checkpoint", type=LocalPath(exists=True, path_type=Path))
@target_argument(metavar="[NAME|FOLDER|ARCHIVE]", required=False)
@benchmark_option
@click.option("--split", type=click.Choice(SPLITS), help="The split to evaluate on.  [default: test]")
@click.option("--episodes", "count", type=click.IntRange(2), help="Number to evaluate on.  [default: all, or 600 live]")
@click.option("--disjoint", is_flag=True, help="Draw live episodes that share no image: as many as the images allow.")
@click.option("--inner-steps", type=click.IntRange(0), help="Adaptation steps.  [default: as in the run's validation]")
@click.option("--device", type=click.Choice(SETTINGS["device"].choices), default="auto", show_default=True)
@episode_options()
@root_option
@json_option
def command(
    checkpoint: Path,
    target: str | None,
    benchmark: str | None,
    split: str | None,
    count: int | None,
    disjoint: bool,
    inner_steps: int | None,
    device: str,
    episodes: dict[str, Any],
    root: str | None,
    as_json: bool,
) -> None:
    """Evaluate a checkpoint, or the best one in a run folder: accuracy with its 95 % interval over episodes.

    Every answer is kept in a file in the folder results beside the checkpoint.

    With --benchmark, the episodes are all of that benchmark's, from its archive under the root, which is built if it is
    missing.
    """
    from trainer.evaluation import evaluate
    from trainer.results import class_interval, result_of, save_result
    from trainer.system.distributed import joined
    from trainer.system.signals import stop_at_signals

    world = click.get_current_context().with_resource(joined())
    with world.together():
        episodes |= given(disjoint=disjoint or None)
        if benchmark is not None:
            refuse_with_benchmark(benchmark, target, {**given(split=split, episodes=count), **episodes})
            target, split = _built(benchmark, checkpoint, root)
        elif target is None:
            raise click.UsageError("Missing the episodes: give NAME, FOLDER or ARCHIVE, or --benchmark.")
        data = episode_data(target, root, episodes)
        split = split or "test"
        number = evaluated_episodes(data, split, count)
    with stop_at_signals(keyboard=world.world_size == 1, at_once=True):
        how: dict[str, Any] = {"device": device, "progress": bars, "world": world}
        result = evaluate(checkpoint, data, split=split, episodes=number, inner_steps=inner_steps, **how)
    if not world.first:
        return
    digest = data.describe()["digest"]
    known = benchmark_named(benchmark) if benchmark else benchmark_of(digest)
    complete = known is not None and result.episodes == known.episodes
    other_classes: float | None = None
    try:
        other_classes = class_interval(result_of(result))
        about_classes = f"For other classes, of which these are a sample: ± {100 * other_classes:.2f} (95 % interval)"
    except RequestError as error:
        about_classes = f"No interval for other classes: {error}"
    if as_json:
        named = known.name if known and complete else None
        print_json({**result.to_json(), "class_interval": other_classes, "benchmark": named, "digest": digest})
    else:
        show(str(result))
        if known:
            part = (
                "benchmark"
                if complete
                else f"the first {result.episodes:,} of {known.episodes:,} episodes of benchmark"
            )
            show(f"{part} {known.name}{'' if known.sha256 else ' (not pinned yet)'}, digest sha256:{digest}")
        say(about_classes)
    if result.inner_steps and not as_json:
        steps = " → ".join(f"{100 * value:.2f}" for value in result.accuracy_by_step)
        say(f"Accuracy before adaptation and after each inner step: {steps} %")
        losses = result.answers.losses.mean(0).tolist() if result.answers else ()
        say(f"Loss before adaptation and after each inner step: {' → '.join(f'{loss:.3f}' for loss in losses)} nats")
    if result.doubt:
        say(result.doubt)
    say(f"Every answer: {save_result(result)}")


def _built(name: str, checkpoint: Path, root: str | None) -> tuple[str, str]:
    """The place and the split of a benchmark's archive, built if it is missing; but first, whether the network fits."""
    from trainer.evaluation import require_fit
    from trainer.runs.checkpoint import find_checkpoint

    wanted = benchmark_named(name)
    shape = [wanted.image_size, wanted.image_size, load_manifest(wanted.dataset).image.channels]
    require_fit(*find_checkpoint(checkpoint), {"n_way": wanted.n_way, "image_shape": shape})
    place = wanted.folder(data_root(root))
    build_benchmark(name, place, root=root, progress=bars)
    return str(place), wanted.split
