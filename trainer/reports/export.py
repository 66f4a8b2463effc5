"""A run as a model file to give away, with its card: ``trainer/runs/model.py`` has the format of the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from importlib import resources
from pathlib import Path
from string import Template
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

_MARKER = "<!-- Written by mamldata export, which replaces this file. Without this line it does not. -->"
_HUB_LICENCES = {"apache-2.0", "cc-by-4.0", "cc0-1.0", "mit"}  # as https://huggingface.co/docs/hub spells them
_OF_PLACE = {"source", "normalisation", "image"}  # of a target's description: not what tells its episodes
_OWN = ("n_way", "k_shot", "k_query", "split_scheme", "rotations")  # options of live episodes
_TOGETHER = (
    "the accuracy is that of all query images of an episode, normalized together. `predict` normalizes each image "
)
_TOGETHER += "by the support images instead, so that it may be alone, unless told otherwise."
_APART = "query images do not affect one another."


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
    if card.exists() and _MARKER.encode() not in read_whole(card, MOST_NOTE):
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
    usual = {**TrainSettings(algorithm=settings.algorithm).resolved(), "algorithm": TrainSettings.algorithm}
    options = {name: value for name, value in settings.resolved().items() if value != usual[name]}
    live = "archive_sha256" in data and data["archive_sha256"] is None
    if live:
        options = {
            **{name: data[name] for name in _OWN if name in data},
            "image_size": data["image_shape"][0],
            **options,
        }
    words = [
        word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value) if word is not True
    ]
    begun = ["--from", "WEIGHTS"] if start else []
    plain = [] if live or data.get("remix", True) else ["--no-remix"]
    return mamldata_command("train", data["dataset"] if live else "ARCHIVE", *words, *plain, *begun, "--out", "run")


def _card(name: str, about: dict[str, Any], sha256: str) -> str:
    data, settings, image = about["data"], about["settings"], about["data"]["image"]
    ways = f"{data['n_way']}-way {data['k_shot']}-shot"
    validated = "" if about["accuracy"] is None else f", validation accuracy {100 * about['accuracy']:.2f} %"
    trained = (
        f"On {data['dataset']}, split scheme {data['split_scheme']}, {ways}, digest `{data['digest']}`: "
        f"{about['step']} outer steps{validated}."
    )
    if about["start"]:
        trained += f" It started from the weights with SHA-256 `{about['start']['sha256']}`."
    prepared = "not recorded" if image == UNKNOWN else ", ".join(f"{key} {value}" for key, value in image.items())
    text = resources.files("trainer.reports").joinpath("card.md").read_text(encoding="utf-8")
    return Template(text).substitute(
        front="\n".join(f"{key}: {json.dumps(value)}" for key, value in _front(name, about).items()),
        marker=_MARKER,
        name=name,
        what=f"{settings['algorithm']} with the network {settings['network']}, trained for {ways} episodes of {data['dataset']}.",
        accuracy="\n".join(_accuracy_rows(about)),
        batch_norm=_APART if settings["bn"] in {"support", "frozen"} else _TOGETHER,
        ways=data["n_way"],
        image=prepared,
        trained=trained,
        command=about["command"],
        versions="With " + ", ".join(f"{key} {value}" for key, value in sorted(about["versions"].items())) + ".",
        licence=about["licence"],
        sha256=sha256,
    )


def _accuracy_rows(about: dict[str, Any]) -> Iterator[str]:
    if not about["results"]:
        yield "No evaluation on test episodes is recorded."
        return
    yield "| test episodes | accuracy, 95 % interval | for other classes | digest |"
    yield "|---|---|---|---|"
    for one in about["results"]:
        episodes = (
            f"{one['episodes']} of {one['dataset']}, {one['n_way']}-way {one['k_shot']}-shot, {one['k_query']} queries"
        )
        wider = "" if one["class_interval"] is None else f"± {100 * one['class_interval']:.2f}"
        yield f"| {episodes} | {100 * one['accuracy']:.2f} ± {100 * one['interval']:.2f} % | {wider} | `{one['target']['digest']}` |"


def _front(name: str, about: dict[str, Any]) -> dict[str, Any]:
    """The front matter of a model card on Hugging Face; each value is JSON, which is YAML, too."""
    data, licence = about["data"], about["licence"]
    hub = licence.lower() in _HUB_LICENCES
    results = [
        {
            "task": {"type": "image-classification", "name": f"{one['n_way']}-way {one['k_shot']}-shot classification"},
            "dataset": {
                "name": one["dataset"],
                "type": one["dataset"],
                "split": "test",
                "revision": one["target"]["digest"],
            },
            "metrics": [{"type": "accuracy", "value": one["accuracy"], "name": f"accuracy ± {one['interval']:.4f}"}],
        }
        for one in about["results"]
    ]
    return {
        "license": licence.lower() if hub else "other",
        **({} if hub else {"license_name": licence}),
        "library_name": "mamldata",
        "tags": ["few-shot-learning", "meta-learning", "image-classification", about["settings"]["algorithm"]],
        "datasets": [data["dataset"]],
        "metrics": ["accuracy"],
        **({"model-index": [{"name": name, "results": results}]} if results else {}),
    }
