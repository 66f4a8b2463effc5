"""``mamldata report``."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from cli.options import LocalPath, as_words, json_option, root_option
from cli.output import bars, print_json, say, show
from cli.targets import archive_cache
from mamldata.io.urls import is_remote
from mamldata.words import size_text


@click.command(
    epilog="\b\nExamples:\n  mamldata report glyphs-5w1s --out archive.html\n  mamldata report run --out run.html\n"
    "  mamldata report compared --out compared.html",
)
@click.argument("target", metavar="ARCHIVE|RUN|COMPARISON")
@click.option("--out", type=LocalPath(dir_okay=False, path_type=Path), required=True, help="The HTML file to write.")
@click.option("--verify/--no-verify", default=None, help="Hash an archive.  [default: yes, not at an address]")
@click.option("--data", metavar="NAME|FOLDER|ARCHIVE", help="A run's episodes, if its results name another place.")
@root_option
@json_option
def command(target: str, out: Path, verify: bool | None, data: str | None, root: str | None, as_json: bool) -> None:
    """Write a page on an archive, a run, or the folder of a comparison: one HTML file that needs no other."""
    from trainer.reports.page import require_page, save_page
    from trainer.reports.plots import require_matplotlib

    require_page(out)
    require_matplotlib()
    kind = _kind(target)
    for option, value, own, article in (("--verify", verify, "archive", "an"), ("--data", data, "run", "a")):
        if value is not None and kind != own:
            raise click.UsageError(f"{option} is for {article} {own}, and {target} is {kind}.")
    page = _page(kind, target, verify, data, root)
    size = save_page(out, kind, page)
    if as_json:
        print_json({"out": str(out), "kind": kind, "bytes": size, "problems": page["problems"]})
        return
    for problem in page["problems"]:
        say(problem)
    if kind == "run" and page["main"] and not page["hardest"]:
        say("Say where the evaluated episodes are with --data.")
    show(f"{out}: {kind} {page['title']}, {size_text(size)}")


def _kind(target: str) -> str:
    """``archive``, ``run`` or ``comparison``, by the file that identifies it."""
    for name, kind in (("config.json", "run"), ("compare.json", "comparison")):
        if not is_remote(target) and (Path(target) / name).is_file():
            return kind
    return "archive"  # or nothing: reading it says so


def _page(kind: str, target: str, verify: bool | None, data: str | None, root: str | None) -> dict[str, Any]:
    now = datetime.now(UTC)
    place = target if is_remote(target) else Path(target)
    cache = archive_cache(data or place, root)
    if kind == "archive":
        from trainer.reports.archive_page import archive_page

        verify = not is_remote(place) if verify is None else verify
        return archive_page(place, now, verify=verify, cache_dir=cache, progress=bars)
    if kind == "comparison":
        from trainer.reports.comparison_page import comparison_page

        return comparison_page(Path(target), now)
    from trainer.reports.run_page import run_page

    page = run_page(Path(target), now, data=data, root=root, cache_dir=cache)
    about = page["data"]
    shape = {} if about.get("archive_sha256") else {name: about[name] for name in ("n_way", "k_shot", "k_query")}
    words = ["mamldata", "eval", target, data or about.get("source", "ARCHIVE"), *as_words(shape)]
    return page | {"eval_command": shlex.join(map(str, words))}
