"""``mamldata cite``."""

from __future__ import annotations

from pathlib import Path

import click

from cli.options import json_option
from cli.output import print_json, say, show
from mamldata.archive.benchmarks import benchmarks
from mamldata.archive.index import is_archive
from mamldata.card import citation
from mamldata.citation import bibtex, known_dataset
from mamldata.datasets.load import load_manifest
from mamldata.datasets.manifest import Manifest
from mamldata.errors import RequestError, did_you_mean
from mamldata.io.urls import is_remote
from mamldata.pipeline import read_archive


@click.command(
    epilog="\b\nExamples:\n  mamldata cite glyphs-5w1s\n  mamldata cite run >> paper.bib",
)
@click.argument("target", metavar="ARCHIVE|RUN|BENCHMARK")
@click.option("--manifest", metavar="FILE.toml", help="Of your own dataset, with its citation.")
@json_option
def command(target: str, manifest: str | None, as_json: bool) -> None:
    """Print BibTeX: of an archive, a benchmark or a run, and of the papers that it rests on.

    These are the papers of the dataset, of the split scheme, and of a run's algorithm.
    """
    text, dataset, known = _citation(target, load_manifest(manifest) if manifest else None)
    if as_json:
        print_json({"bibtex": text})
        return
    for line in text.splitlines():
        show(line)
    if not known:
        say(f"The papers of the dataset {dataset} are not known here: give --manifest.")


def _citation(target: str, own: Manifest | None) -> tuple[str, str, bool]:
    """BibTeX, the dataset's name, and whether the dataset is known."""
    path = Path(target)
    if is_remote(target) or is_archive(path):
        archive = read_archive(target)
        manifest = own or known_dataset(vars(archive))
        return citation(archive, manifest), archive.dataset, manifest is not None
    if path.exists():
        return _of_run(path, own)
    if target not in benchmarks():
        raise RequestError(
            f"{target!r} is neither an archive, nor a run, nor a benchmark.{did_you_mean(target, benchmarks())} "
            f"The benchmarks are {', '.join(benchmarks())}."
        )
    benchmark = benchmarks()[target]
    title = f"The benchmark {target}: {benchmark.n_way}-way {benchmark.k_shot}-shot episodes of {benchmark.dataset}"
    known = known_dataset(vars(benchmark))
    return bibtex(title, vars(benchmark), benchmark.sha256, known), benchmark.dataset, known is not None


def _of_run(path: Path, own: Manifest | None) -> tuple[str, str, bool]:
    from trainer.runs.checkpoint import find_checkpoint
    from trainer.runs.folder import trained_with

    file, checkpoint = find_checkpoint(path)
    data, algorithm = checkpoint.data, checkpoint.settings["algorithm"]
    manifest = own or known_dataset(data)
    title = f"A run of {algorithm} on {data['n_way']}-way {data['k_shot']}-shot episodes of {data['dataset']}"
    text = bibtex(title, data, data["digest"], manifest, algorithm=algorithm, version=trained_with(file.parent))
    return text, data["dataset"], manifest is not None
