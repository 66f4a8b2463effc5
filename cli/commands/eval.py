"""``mamldata eval``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import LocalPath, benchmark_option, episode_options, given, json_option, root_option, target_argument
from cli.output import bars, columns, print_json, say, show
from cli.own_network import own_network, own_network_option, seed_of_run
from cli.targets import as_trained, episode_data, evaluated_episodes, refuse_with_benchmark
from mamldata.archive.benchmarks import Benchmark, benchmark_of, benchmarks
from mamldata.archive.benchmarks import benchmark as benchmark_named
from mamldata.datasets.load import load_manifest
from mamldata.datasets.paths import data_root
from mamldata.errors import ImageShapeError, LostPeerError, MamldataError, PeerError, RequestError, StoppedError
from mamldata.io.urls import shown_place
from mamldata.pipeline import build_benchmark
from mamldata.sampling.splits import SPLITS
from mamldata.words import counted
from trainer.settings import SETTINGS

if TYPE_CHECKING:
    from trainer.evaluation import Evaluation
    from trainer.system.distributed import World


@click.command(
    epilog="\b\nExamples:\n  mamldata eval run glyphs-5w1s --split test\n  mamldata eval run --benchmark glyphs-5w1s\n"
    "  mamldata eval run glyphs-5w1s glyphs --fit-images",
)
@click.argument("checkpoint", metavar="RUN|CHECKPOINT|MODEL", type=LocalPath(path_type=Path))
@target_argument("targets", metavar="[NAME|FOLDER|ARCHIVE|BENCHMARK]...", nargs=-1)
@benchmark_option
@click.option("--split", type=click.Choice(SPLITS), help="The split to evaluate on.  [default: test]")
@click.option("--episodes", "count", type=click.IntRange(2), help="Number to evaluate on.  [default: all, or 600 live]")
@click.option("--disjoint", is_flag=True, help="Draw live episodes that share no image: as many as the images allow.")
@click.option("--fit-images", is_flag=True, help="Resize images, and make them grey or RGB, as the network takes them.")
@click.option("--inner-steps", type=click.IntRange(0), help="Adaptation steps.  [default: as in the run's validation]")
@click.option("--device", type=click.Choice(SETTINGS["device"].choices), default="auto", show_default=True)
@own_network_option
@episode_options()
@root_option
@json_option
def command(
    checkpoint: Path,
    targets: tuple[str, ...],
    benchmark: str | None,
    episodes: dict[str, Any],
    disjoint: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Evaluate a checkpoint, the best one in a run folder, or a model: accuracy with its 95 % interval over episodes.

    Live episodes have the ways, shots and queries of the run's training, unless options say otherwise.

    Every answer is kept in a file in the folder results beside the checkpoint; of a model that comes with the package,
    in the current folder's. Several targets give one table, which is kept in results/targets; if some of them fail, the
    others are still evaluated.

    With --benchmark, the episodes are all of that benchmark's, from its archive under the root, which is built if it is
    missing.
    """
    from trainer.system.distributed import joined

    world = click.get_current_context().with_resource(joined())
    how |= {"episodes": {**episodes, **given(disjoint=disjoint or None)}, "world": world}
    if len(targets) < 2:
        found = _evaluated(checkpoint, targets[0] if targets else None, benchmark, **how)
        if world.first:
            _tell(*found, as_json=as_json)
        return
    if benchmark is not None:
        refuse_with_benchmark(benchmark, targets[0], {})
    _table(checkpoint, targets, how, as_json)


@contextmanager
def _naming_fit() -> Iterator[None]:
    """Name the option that helps where images do not fit the network."""
    try:
        yield
    except ImageShapeError as error:
        raise ImageShapeError(f"{error} Or fit these images to the network with --fit-images.") from error


@_naming_fit()
def _evaluated(
    checkpoint: Path,
    target: str | None,
    benchmark: str | None,
    *,
    split: str | None,
    count: int | None,
    fit_images: bool,
    inner_steps: int | None,
    device: str,
    network: str | None,
    episodes: dict[str, Any],
    root: str | None,
    world: World,
) -> tuple[Evaluation, str, Benchmark | None]:
    """The evaluation on one target, the digest of its data, and their benchmark if that is known."""
    from trainer.evaluation import evaluate
    from trainer.runs.checkpoint import find_checkpoint
    from trainer.system.signals import stop_at_signals

    if target is not None and benchmark is None and target in benchmarks() and not Path(target).exists():
        target, benchmark = None, target
    trained = world.from_first(lambda: find_checkpoint(checkpoint)[1].data)
    with world.together():
        if benchmark is not None:
            refuse_with_benchmark(benchmark, target, {**given(split=split, episodes=count), **episodes})
            target, split = _built(benchmark, checkpoint, root, fit=fit_images)
        elif target is None:
            raise click.UsageError("Missing the episodes: give NAME, FOLDER or ARCHIVE, or --benchmark.")
        episodes = as_trained(target, episodes, trained, say if world.first else lambda _: None)
        data = episode_data(target, root, episodes)
        split = split or "test"
        number = evaluated_episodes(data, split, count)
    seed = world.from_first(lambda: seed_of_run(checkpoint, network))
    with world.together():
        own = own_network(network, trained, seed)
    with stop_at_signals(keyboard=world.world_size == 1, at_once=True):
        how: dict[str, Any] = {"inner_steps": inner_steps, "fit": fit_images, "device": device, "world": world}
        result = evaluate(checkpoint, data, split=split, episodes=number, network=own, progress=bars, **how)
    digest = data.describe()["digest"]
    return result, digest, benchmark_named(benchmark) if benchmark else benchmark_of(digest)


def _tell(result: Evaluation, digest: str, known: Benchmark | None, *, as_json: bool) -> None:
    """Print the result of one target, and keep every answer."""
    from trainer.results import class_interval, result_of, save_result

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
            part = "" if complete else f"the first {result.episodes:,} of {known.episodes:,} episodes of "
            show(f"{part}benchmark {known.name}{'' if known.sha256 else ' (not pinned yet)'}, digest sha256:{digest}")
        say(about_classes)
    if result.inner_steps and not as_json:
        steps = " → ".join(f"{100 * value:.2f}" for value in result.accuracy_by_step)
        say(f"Accuracy before adaptation and after each inner step: {steps} %")
        losses = result.answers.losses.mean(0).tolist() if result.answers else ()
        say(f"Loss before adaptation and after each inner step: {' → '.join(f'{loss:.3f}' for loss in losses)} nats")
    if result.doubt:
        say(result.doubt)
    say(f"Every answer: {save_result(result)}")


def _table(checkpoint: Path, targets: Sequence[str], how: dict[str, Any], as_json: bool) -> None:
    """Evaluate on each target in turn, and show and keep all results in one table.

    Raises:
        MamldataError: a target failed.
    """
    from trainer.results import save_result, save_targets
    from trainer.runs.checkpoint import find_checkpoint

    world = how["world"]
    path = world.from_first(lambda: find_checkpoint(checkpoint)[0])
    file: Path | None = None
    rows: list[dict[str, Any]] = []
    for target in map(str, targets):
        row: dict[str, Any] = {"target": shown_place(target)}
        try:
            result, digest, _ = _evaluated(checkpoint, target, None, **how)
            with world.together():
                if world.first:
                    say(f"{row['target']}: {result}")
                    file = save_result(result)
                    row |= {**result.to_json(), "digest": digest, "file": file.name}
        except (StoppedError, LostPeerError):
            raise
        except (MamldataError, click.UsageError) as error:
            row["error"] = error.message if isinstance(error, click.UsageError) else str(error)
        rows.append(row)
    failed = [f"  {row['target']}: {row['error']}" for row in rows if "error" in row]
    if world.first:
        if file:
            say(f"The table: {save_targets(file.parent, path, rows)}")
        if as_json:
            print_json({"targets": rows})
        else:
            for line in columns([("target", "split scheme", "split", "accuracy", "digest"), *map(_cells, rows)]):
                show(line)
    if failed:
        what = f"{counted(len(failed), 'target')} of {len(rows)} failed:\n" + "\n".join(failed)
        raise MamldataError(what) if world.first else PeerError(0, what)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "error" in row:
        return row["target"], "", "", "failed", ""
    accuracy = f"{100 * row['accuracy']:.2f} % ± {100 * row['interval']:.2f}"
    fitted = f", images fitted from {'x'.join(map(str, row['fitted_from']))}" if "fitted_from" in row else ""
    return row["target"], row["split_scheme"], row["split"], accuracy, f"sha256:{row['digest'][:12]}…{fitted}"


def _built(name: str, checkpoint: Path, root: str | None, *, fit: bool) -> tuple[str, str]:
    """The place and the split of a benchmark's archive, built if it is missing; but first, whether the network fits."""
    from trainer.evaluation import require_fit
    from trainer.runs.checkpoint import find_checkpoint

    wanted = benchmark_named(name)
    path, trained = find_checkpoint(checkpoint)
    shape = [wanted.image_size, wanted.image_size, load_manifest(wanted.dataset).image.channels]
    shape = trained.data["image_shape"] if fit else shape
    require_fit(path, trained, {"n_way": wanted.n_way, "image_shape": shape})
    place = wanted.folder(data_root(root))
    build_benchmark(name, place, root=root, progress=bars)
    return str(place), wanted.split
