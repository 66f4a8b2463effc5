"""``mamldata cite``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from cli.options import json_option
from cli.output import print_json, say, show
from mamldata.archive.benchmarks import benchmarks
from mamldata.archive.index import is_archive
from mamldata.card import archive_title
from mamldata.citation import bibtex, dataset_of
from mamldata.errors import RequestError, did_you_mean
from mamldata.io.urls import is_remote
from mamldata.pipeline import read_archive


@click.command(
    epilog="\b\nExamples:\n  mamldata cite glyphs-5w1s\n  mamldata cite run",
)
@click.argument("target", metavar="ARCHIVE|RUN|BENCHMARK")
@click.option("--manifest", metavar="FILE.toml", help="Of your own dataset, with its citation.")
@json_option
def command(target: str, manifest: str | None, as_json: bool) -> None:
    """Print BibTeX: of an archive, a benchmark or a run, and of the papers that it rests on.

    These are the papers of the dataset, of the split scheme, and of a run's algorithm.
    """
    title, about, digest, trained = _cited(target)
    own = dataset_of(about, manifest)
    text = bibtex(title, about, digest, own, **trained)
    if as_json:
        print_json({"bibtex": text})
        return
    for line in text.splitlines():
        show(line)
    if own is None:
        say(f"The papers of the dataset {about['dataset']} are not known here: give --manifest.")


def _cited(target: str) -> tuple[str, Mapping[str, Any], str | None, dict[str, Any]]:
    """The title, what it is made from, the digest, and of a run its algorithm and version."""
    path = Path(target)
    if is_remote(target) or is_archive(path):
        archive = read_archive(target)
        return archive_title(archive), vars(archive), archive.digest, {}
    if path.exists():
        from trainer.runs.checkpoint import find_checkpoint
        from trainer.runs.folder import trained_with
        from trainer.settings import saved_settings

        file, checkpoint = find_checkpoint(path)
        data, algorithm = checkpoint.data, saved_settings(checkpoint.settings, file).algorithm
        title = f"A run of {algorithm} on {data['n_way']}-way {data['k_shot']}-shot episodes of {data['dataset']}"
        return title, data, data["digest"], {"algorithm": algorithm, "version": trained_with(file.parent)}
    if target not in benchmarks():
        raise RequestError(
            f"{target!r} is neither an archive, nor a run, nor a benchmark.{did_you_mean(target, benchmarks())} "
            f"The benchmarks are {', '.join(benchmarks())}."
        )
    known = benchmarks()[target]
    title = f"The benchmark {target}: {known.n_way}-way {known.k_shot}-shot episodes of {known.dataset}"
    return title, vars(known), known.sha256, {}
