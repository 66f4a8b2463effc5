"""A run as a model file to give away, with its card: ``trainer/runs/model.py`` has the format of the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mamldata.bank.prepare import recipe_of
from mamldata.datasets.load import load_manifest
from mamldata.datasets.manifest import UNKNOWN
from mamldata.datasets.toml import builtin_names
from mamldata.errors import DamagedError, RequestError
from mamldata.io.atomic import MOST_NOTE, make_folder, read_whole, write_atomic
from mamldata.io.digest import parse_json, sha256_bytes
from mamldata.words import mamldata_command
from trainer.results import FOLDER, Result, class_interval, read_result
from trainer.runs.checkpoint import Checkpoint, find_best, load_checkpoint
from trainer.runs.folder import CONFIG
from trainer.runs.model import SUFFIX, model_bytes, read_about
from trainer.settings import TrainSettings, saved_settings

_TEMPLATE = Path(__file__).with_name("card.md")
_MARKER = b"<!-- Written by mamldata export"  # in the template
_HUB_LICENCES = {"apache-2.0", "cc-by-4.0", "cc0-1.0", "mit"}  # as Hugging Face spells them
_OF_PLACE = {"source", "normalisation", "image"}  # of a target's description: not what tells its episodes
_OF_LIVE = ("n_way", "k_shot", "k_query", "split_scheme", "rotations")


def export_model(
    run_dir: Path | str, out: Path | str, *, checkpoint: Path | str | None = None, root: Path | str | None = None
) -> Path:
    """Write a run's network as a model file, and a card in Markdown beside it. The same run gives the same bytes.

    Args:
        run_dir: with ``config.json``, and the ``results`` of its evaluations on the test split, if there are any.
        out: the file, which ends in ``.safetensors``; an earlier model there is replaced.
        checkpoint: another one of the run than the best.
        root: the data root, where a bank of the same digest tells how images were prepared, if the run does not.

    Returns:
        The card.

    Raises:
        RequestError: it is no run, or ``out`` or its card holds something else.
        DamagedError: a file of the run is damaged.
        WriteError: ``out`` cannot be written.
    """
    run_dir, out = Path(run_dir), Path(out)
    card = out.with_suffix(".md")
    _refuse_others(out, card)
    path = Path(checkpoint) if checkpoint else find_best(run_dir)
    saved = load_checkpoint(path)
    about = _about(run_dir, path, saved, root)
    content = model_bytes(about, saved.weights)
    make_folder(out.parent)
    write_atomic(out, content)
    write_atomic(card, _card(out.stem, about, sha256_bytes(content)).encode())
    return card


def _refuse_others(out: Path, card: Path) -> None:
    if out.suffix != SUFFIX:
        raise RequestError(f"{out} must end in {SUFFIX}.")
    if out.exists():
        read_about(out)  # raises if it is not a model
    if card.exists() and _MARKER not in read_whole(card, MOST_NOTE):
        raise RequestError(f"{card} is not a card that an export wrote. Move it, or choose another name.")


def _about(run_dir: Path, path: Path, saved: Checkpoint, root: Path | str | None) -> dict[str, Any]:
    config = run_dir / CONFIG
    try:
        noted = parse_json(read_whole(config, MOST_NOTE))
        versions, start = dict(noted["versions"]), noted.get("start")
        start = start and {key: start[key] for key in ("sha256", "step", "digest")}
    except FileNotFoundError as error:
        raise RequestError(f"{run_dir} is not a run folder: it has no {CONFIG}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{config} is damaged ({error!r}).") from error
    data = {key: value for key, value in saved.data.items() if key != "source"}  # a place on a machine
    if data.get("image", UNKNOWN) == UNKNOWN:
        recipe = recipe_of(data["dataset"], data.get("bank_sha256", ""), data["image_shape"][0], root)
        data["image"] = recipe.to_json() if recipe else UNKNOWN
    known = data["dataset"] in builtin_names()
    settings = saved_settings(saved.settings, path)
    return {
        "step": saved.step,
        "accuracy": saved.accuracy,
        "settings": settings.resolved(),
        "data": data,
        "results": list(_results(run_dir, {"file": path.name, "step": saved.step})),
        "command": _command(settings, data, start),
        "start": start,
        "versions": versions,
        "licence": load_manifest(data["dataset"]).licence if known else "not recorded",
    }


def _results(run_dir: Path, checkpoint: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The results of a checkpoint on the test split, sorted by the names of their files."""
    for path in sorted((run_dir / FOLDER).glob("*.json")):
        result = read_result(path)
        if result.checkpoint == checkpoint and result.evaluation["split"] == "test":
            target = {key: value for key, value in result.target.items() if key not in _OF_PLACE}
            yield {**result.evaluation, "class_interval": _class_interval(result), "target": target}


def _class_interval(result: Result) -> float | None:
    with suppress(RequestError):
        return class_interval(result)
    return None


def _command(settings: TrainSettings, data: dict[str, Any], start: dict[str, Any] | None) -> str:
    """A command line that trains the same; of an archive and of weights to start from, only the digest is known."""
    usual = TrainSettings(algorithm=settings.algorithm).for_images(data).resolved()
    usual["algorithm"] = TrainSettings.algorithm
    options = {name: value for name, value in settings.resolved().items() if value != usual[name]}
    live = data.get("archive_sha256", "") is None
    if live:
        options |= {name: data[name] for name in _OF_LIVE} | {"image_size": data["image_shape"][0]}
    words = [word for name, value in options.items() for word in _option(name.replace("_", "-"), value)]
    begun = ["--from", "WEIGHTS"] if start else []
    plain = [] if live or data.get("remix", True) else ["--no-remix"]
    return mamldata_command("train", data["dataset"] if live else "ARCHIVE", *words, *plain, *begun, "--out", "run")


def _option(name: str, value: object) -> list[object]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", value]


def _card(name: str, about: dict[str, Any], sha256: str) -> str:
    licence, prepared, start = about["licence"], about["data"]["image"], about["start"]
    hub = licence.lower() in _HUB_LICENCES
    facts = {
        "name": name,
        "sha256": sha256,
        "validated": "unknown" if about["accuracy"] is None else f"{100 * about['accuracy']:.2f} %",
        "image": ", ".join(f"{k} {v}" for k, v in prepared.items()) if prepared != UNKNOWN else "this is not recorded",
        "begun": f"those with SHA-256 `{start['sha256']}`" if start else "those that the seed gives",
        "written_by": ", ".join(f"{key} {value}" for key, value in sorted(about["versions"].items())),
        "rows": "\n".join(map(_row, about["results"])) or "| none is recorded | | | |",
        # JSON is YAML, too.
        "hub_licence": licence.lower() if hub else f"other\nlicense_name: {json.dumps(licence)}",
        "hub_dataset": json.dumps(about["data"]["dataset"]),
        "hub_index": json.dumps([{"name": name, "results": [*map(_hub_result, about["results"])]}]),
    }
    return _TEMPLATE.read_text(encoding="utf-8").format_map({**about, **facts})


def _row(result: dict[str, Any]) -> str:
    episodes = "{episodes} of {dataset}, {n_way}-way {k_shot}-shot, {k_query} queries each".format_map(result)
    accuracy = f"{100 * result['accuracy']:.2f} ± {100 * result['interval']:.2f} %"
    wider = "" if result["class_interval"] is None else f"± {100 * result['class_interval']:.2f} %"
    return f"| {episodes} | {accuracy} | {wider} | `{result['target']['digest']}` |"


def _hub_result(result: dict[str, Any]) -> dict[str, Any]:
    """See ``model-index`` in https://huggingface.co/docs/hub/model-cards."""
    task = "{n_way}-way {k_shot}-shot classification".format_map(result)
    data = {"name": result["dataset"], "type": result["dataset"], "revision": result["target"]["digest"]}
    return {
        "task": {"type": "image-classification", "name": task},
        "dataset": {**data, "split": result["split"]},
        "metrics": [{"type": "accuracy", "value": result["accuracy"]}],
    }
