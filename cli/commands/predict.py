"""``mamldata predict``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from cli.options import LocalPath, json_option, root_option
from cli.output import print_json, say, show
from cli.own_network import own_network, own_network_option, seed_of_run
from mamldata.bank.prepare import prepare_image, recipe_of
from mamldata.datasets.load import load_manifest
from mamldata.datasets.manifest import UNKNOWN, ImageRecipe
from mamldata.errors import MamldataError, RequestError
from mamldata.io.containers import list_members
from mamldata.io.images import Images
from mamldata.readers.image import is_image
from mamldata.words import counted

if TYPE_CHECKING:
    from trainer.runs.checkpoint import TrainedRun


@click.command(
    epilog="\b\nExamples:\n  mamldata predict run --support my-classes unsorted\n"
    "  mamldata predict glyphs-maml.safetensors --support my-classes unsorted/1.png --json",
)
@click.argument("model", metavar="RUN|MODEL", type=LocalPath(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=LocalPath(exists=True, path_type=Path))
@click.option(
    "--support",
    type=LocalPath(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="A folder with a folder of images for each class.",
)
@click.option("--together", is_flag=True, help="Normalize all IMAGES together, as evaluation does.")
@click.option("--like", metavar="NAME|FILE.toml|FOLDER", help="The dataset of a run that does not record its images.")
@own_network_option
@root_option
@json_option
def command(
    model: Path,
    images: tuple[Path, ...],
    support: Path,
    together: bool,
    like: str | None,
    network: str | None,
    root: str | None,
    as_json: bool,
) -> None:
    """Adapt a trained network to the images in --support, and say to which of these classes IMAGES belong.

    IMAGES are files, or folders of them. They are prepared as the images that the network was trained on.

    Each image is normalized by the support images, so that its answer does not depend on the others. With --together,
    a network with transductive or per-step batch norm normalizes all IMAGES together, as in evaluation: slightly better
    if they show all classes about equally often, but no better than guessing for one image or images of one class.
    """
    from trainer.runs.checkpoint import find_checkpoint, load_run

    trained, seed = find_checkpoint(model)[1].data, seed_of_run(model, network)
    run = load_run(model, network=own_network(network, trained, seed))
    recipe = _recipe(run, like, root)
    known = {support / name: Path(name).parent.as_posix() for name in _images_in(support)}
    if loose := [path for path, label in known.items() if label == "."]:
        raise RequestError(f"{loose[0]} is in no class folder. Give a folder with a folder of images for each class.")
    prepared, faults = _prepared(known, recipe)
    if faults:
        raise MamldataError("\n".join(["Replace or remove these support images:", *faults.values()]))
    adapted = run.adapt(np.stack(list(prepared.values())), known.values())
    if len(adapted.classes) < run.data["n_way"]:
        say(f"The network has {run.data['n_way']} outputs, of which the first {len(adapted.classes)} are used.")
    asked = [path for one in images for path in ([one / name for name in _images_in(one)] if one.is_dir() else [one])]
    prepared, faults = _prepared(asked, recipe)
    rows = adapted(np.stack(list(prepared.values())), together=together).softmax(1).tolist() if prepared else []
    if not np.isfinite(rows).all():
        raise MamldataError(
            "The network's answers are not finite numbers: it diverges, in training or on these images."
        )
    shares = [dict(zip(adapted.classes, row, strict=True)) for row in rows]
    given = {str(path): max(one, key=one.__getitem__) for path, one in zip(prepared, shares, strict=True)}
    if as_json:
        answers = [
            {"image": path, "class": given[path], "probabilities": one} for path, one in zip(given, shares, strict=True)
        ]
        unread = [{"image": str(path), "error": error} for path, error in faults.items()]
        print_json({"classes": adapted.classes, "together": together, "images": answers, "unreadable": unread})
    else:
        widths = [max(map(len, column), default=0) for column in (given, given.values())]
        for (path, label), one in zip(given.items(), shares, strict=True):
            show(f"{path:{widths[0]}}  {label:{widths[1]}}  {100 * one[label]:5.1f} %")
    if faults:
        raise MamldataError("\n".join([f"{counted(len(faults), 'image')} without an answer:", *faults.values()]))


def _recipe(run: TrainedRun, like: str | None, root: str | None) -> ImageRecipe:
    """How images are prepared: as recorded, or as told by a bank or a manifest with the run's digest, or by --like."""
    size, _, channels = run.data["image_shape"]
    if run.data.get("image", UNKNOWN) != UNKNOWN:
        known: ImageRecipe | None = run.image
    else:
        known = recipe_of(run.data["dataset"], run.data.get("bank_sha256", ""), size, root)
    if like is None:
        if known is None:
            raise click.UsageError(
                "The run does not record how its images were prepared, and no bank of these images is under the data "
                "root. Give the root that has it with --root, or name the dataset that it was trained on with --like."
            )
        return known
    if known is not None:
        raise click.UsageError("--like: it is known how the run's images were prepared. Leave out this option.")
    recipe = replace(load_manifest(like).image, size=size)
    if recipe.channels != channels:
        raise RequestError(f"The images of {like} have channels {recipe.channels}, but the run's have {channels}.")
    return recipe


def _images_in(folder: Path) -> list[str]:
    names = [member.name for member in list_members(folder) if is_image(member.name)]
    if not names:
        raise RequestError(f"{folder} has no images.")
    return sorted(names)


def _prepared(paths: Iterable[Path], recipe: ImageRecipe) -> tuple[dict[Path, Images], dict[Path, str]]:
    """The images that can be read, and why others cannot."""
    found, faults = {}, {}
    for path in paths:
        try:
            found[path] = prepare_image(path, recipe)
        except RequestError as error:
            faults[path] = str(error)
    return found, faults
