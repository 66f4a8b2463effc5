"""Recipes: the settings of published experiments, with the source of each number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mamldata.errors import ManifestError, RequestError, did_you_mean
from mamldata.io.atomic import MOST_NOTE, read_whole
from mamldata.io.toml import Table, read_toml, toml_names
from mamldata.io.urls import shown_place
from trainer.settings import SETTINGS, TrainSettings, renamed

_TEXTS = ("title", "dataset", "source", "published")
_EPISODES = ("n_way", "k_shot", "k_query")


@dataclass(frozen=True)
class Recipe:
    """The settings of a published experiment.

    Attributes:
        name: of the file, without its suffix.
        title: of the experiment.
        dataset: that it used.
        source: where the numbers are published.
        published: the reported accuracy.
        episodes: ``n_way``, ``k_shot``, ``k_query``.
        settings: fields of ``TrainSettings``; the others keep their defaults.
        notes: differences between the experiment and these settings, and other remarks; may be empty.
    """

    name: str
    title: str
    dataset: str
    source: str
    published: str
    episodes: Mapping[str, int]
    settings: Mapping[str, Any]
    notes: str = ""

    def differences(self, data: Mapping[str, Any]) -> Iterator[str]:
        """The differences between these data and the experiment's, a sentence each."""
        for key, value in {"dataset": self.dataset, **self.episodes}.items():
            if data[key] != value:
                yield f"{key} is {data[key]}, not {value}."


def recipe_names() -> list[str]:
    """The recipes that come with the package, sorted."""
    return toml_names(resources.files("trainer") / "recipes")


def load_recipe(name_or_path: str) -> Recipe:
    """A recipe that comes with the package, or a TOML file of your own.

    Args:
        name_or_path: a name such as ``maml-omniglot-5w1s``, or a path that ends in ``.toml``.

    Raises:
        RequestError: there is no recipe of that name, or no such file.
        ManifestError: the file has faults; all of them are listed.
    """
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if not path.is_file():
            raise RequestError(f"There is no recipe file {shown_place(name_or_path)}.")
        return _parse(path.stem, read_whole(path, MOST_NOTE), str(path))
    if name_or_path not in (names := recipe_names()):
        raise RequestError(
            f"There is no recipe {shown_place(name_or_path)!r}.{did_you_mean(name_or_path, names)} "
            f"Choose from {', '.join(names)}, "
            "or give the path of your own .toml file."
        )
    file = f"{name_or_path}.toml"
    return _parse(name_or_path, (resources.files("trainer") / "recipes" / file).read_bytes(), file)


def _parse(name: str, data: bytes, source: str) -> Recipe:
    faults: list[str] = []
    top = Table(read_toml(data, source), "", faults)
    texts = {key: top.text(key) for key in _TEXTS}
    texts["notes"] = top.text("notes", required=False)
    episodes = top.table("episodes")
    counts = {key: episodes.whole(key, 1) for key in _EPISODES}
    episodes.finish()
    settings = renamed(top.take("settings", dict, {}))
    top.finish()
    faults += _wrong_settings(settings)
    if faults:
        raise ManifestError(source, faults)
    return Recipe(
        name, episodes=counts, settings=settings, **{key: " ".join(text.split()) for key, text in texts.items()}
    )


def _wrong_settings(settings: dict[str, Any]) -> Iterator[str]:
    for key in sorted(settings.keys() - SETTINGS.keys()):
        yield f"settings.{key}: is not known here.{did_you_mean(key, SETTINGS)}"
    try:
        TrainSettings(**{key: value for key, value in settings.items() if key in SETTINGS})
    except RequestError as error:
        yield f"settings: {error}"
