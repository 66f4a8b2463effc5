"""Recipes: the settings of published experiments, as data, each number with its source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from mamldata.errors import ManifestError, RequestError
from mamldata.files import MOST_NOTE, read_whole
from mamldata.manifest import did_you_mean, read_toml, toml_names

_TEXTS = ("title", "dataset", "source", "published")
_EPISODES = ("n_way", "k_shot", "k_query")


@dataclass(frozen=True)
class Recipe:
    """How an experiment was made.

    Attributes:
        name: of the file, without its suffix.
        title: what the experiment is.
        dataset: what it was made on.
        source: where every number stands.
        published: the accuracy that was reported.
        episodes: ``n_way``, ``k_shot``, ``k_query``.
        settings: fields of ``TrainSettings``; the others keep their defaults.
        notes: in what the experiment differs from what these settings make, and what to know about it; may be empty.
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
        """In what the episodes at hand are not those of the experiment, in words."""
        for key, value in {"dataset": self.dataset, **self.episodes}.items():
            if data[key] != value:
                yield f"{key} is {data[key]}, not {value}."


def recipe_names() -> list[str]:
    """The recipes that come with the package, sorted."""
    return toml_names(resources.files("trainer") / "recipes")


def load_recipe(name_or_path: str) -> Recipe:
    """A recipe that comes with the package, or one's own TOML file.

    Args:
        name_or_path: a name such as ``maml-omniglot-5w1s``, or a path that ends in ``.toml``.

    Raises:
        RequestError: no recipe of that name, or no such file.
        ManifestError: the file has faults; all of them are listed.
    """
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if not path.is_file():
            raise RequestError(f"There is no recipe file {path}.")
        return _parse(path.stem, read_whole(path, MOST_NOTE), str(path))
    if name_or_path not in (names := recipe_names()):
        raise RequestError(
            f"There is no recipe {name_or_path!r}.{did_you_mean(name_or_path, names)} There are {', '.join(names)}; "
            "your own is given by the path of its .toml file."
        )
    file = f"{name_or_path}.toml"
    return _parse(name_or_path, (resources.files("trainer") / "recipes" / file).read_bytes(), file)


def _parse(name: str, data: bytes, source: str) -> Recipe:
    document = read_toml(data, source)
    if faults := list(_faults(document)):
        raise ManifestError(source, faults)
    texts = {key: " ".join(document[key].split()) for key in (*_TEXTS, "notes") if key in document}
    return Recipe(name, episodes=document["episodes"], settings=document["settings"], **texts)


def _faults(document: dict[str, Any]) -> Iterator[str]:
    # Here, because torch takes seconds to import and a list of recipes does not need it.
    from trainer.settings import TrainSettings

    known = [*_TEXTS, "notes", "episodes", "settings"]
    for key in document.keys() - set(known):
        yield f"{key}: is not known here.{did_you_mean(key, known)}"
    for key in _TEXTS:
        if not isinstance(document.get(key), str):
            yield f"{key}: must be a string"
    if not isinstance(document.get("notes", ""), str):
        yield "notes: must be a string"
    episodes, settings = document.get("episodes"), document.get("settings")
    if not isinstance(episodes, dict) or not isinstance(settings, dict):
        yield "episodes, settings: must be tables"
        return
    for key in _EPISODES:
        if type(episodes.get(key)) is not int or episodes[key] < 1:
            yield f"episodes.{key}: must be a whole number from 1"
    for key in episodes.keys() - set(_EPISODES):
        yield f"episodes.{key}: is not known here.{did_you_mean(key, _EPISODES)}"
    types = {field.name: field.type for field in fields(TrainSettings)}
    unknown = sorted(settings.keys() - types.keys())
    yield from (f"settings.{key}: is not known here.{did_you_mean(key, types)}" for key in unknown)
    try:
        TrainSettings(**{key: value for key, value in settings.items() if key in types})
    except RequestError as error:
        yield f"settings: {error}"
