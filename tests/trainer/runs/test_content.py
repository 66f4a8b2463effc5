"""Checkpoints whose fields were changed: each is used as it is, or refused in words; none gives a traceback."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import Synthetic, SyntheticStream

from mamldata.datasets.manifest import ImageRecipe
from mamldata.errors import MamldataError, RequestError
from trainer.evaluation import evaluate
from trainer.loop import train
from trainer.runs.checkpoint import load_checkpoint, load_run
from trainer.runs.content import optimizer_state
from trainer.settings import TrainSettings

pytestmark = pytest.mark.filterwarnings("ignore:Validating sparse tensor")
SETTINGS = TrainSettings(
    steps=4, meta_batch_size=1, filters=1, inner_lr=0.1, eval_every=3, eval_episodes=2, eval_inner_steps=1, device="cpu"
)


class CarefulStream(SyntheticStream):
    """Checks a position, as streams of episodes do."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.keys() != {"next_batch", "seed"} or type(state["next_batch"]) is not int:
            raise RequestError("The saved state is of another stream.")
        if not 0 <= state["next_batch"] < 2**31:
            raise RequestError("The saved state is of no meta-batch.")
        super().load_state_dict(state)


class Careful(Synthetic):
    """Episodes in such a stream."""

    def train(self, batch_size: int, seed: int, *_: object, **__: object) -> CarefulStream:
        return CarefulStream(self, batch_size, seed)


DATA = Careful(size=4, n_way=2, k_query=1)


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Checkpoints of runs that differ in what they learn: with and without a validation, of Adam and of descent."""
    found = []
    for settings in (
        replace(SETTINGS, algorithm="maml++", inner_steps=2, steps=3),
        replace(SETTINGS, steps=3, meta_optimizer="sgd"),
    ):
        folder = tmp_path_factory.mktemp("run")
        found.append(torch.load(train(settings, DATA, folder).last, weights_only=True))
    window = {"losses": torch.tensor([1.0]), "accuracies": torch.tensor([[0.5]])}
    normalisation = {"mean": [0.5], "std": [0.5]}
    found.append({**found[0], "accuracy": None, "window": window})
    found.append({**found[1], "data": {**found[1]["data"], "normalisation": normalisation}})
    side = DATA.describe()["image_shape"][0]
    image = {"size": side, "channels": 1, "resampling": "lanczos", "invert": True, "upright": False}
    found[-1]["data"]["image"] = image
    found[-1]["settings"] = {**found[-1]["settings"], "normalize": True}
    return found


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value in a checkpoint."""
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*at, key))


ODD: list[Any] = [
    None, True, 0, -1, 1, 3, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.5, 0.5, 1e39, math.nan, math.inf, "", "maml", "x",
    [], [1], [1, 2, 3], [4, 4, 10**9], ["a"], {}, {"a": 1}, {1: 2}, (), (1, 2), b"bytes", {1, 2}, complex(1, 2),
    torch.zeros(()), torch.ones(3), torch.full((1,), math.nan), torch.zeros(2, dtype=torch.int64),
    torch.zeros(2, dtype=torch.complex64), torch.zeros(1).expand(10**12), torch.zeros(1).expand(10**6, 10**6),
    torch.zeros(2, 2).to_sparse(), torch.zeros(0), "maml++", "resnet18", "frozen", "per-step",
]  # fmt: skip


def changed(content: dict[str, Any], chance: random.Random) -> tuple[dict[str, Any], str]:
    """The content with one value replaced, removed or added, and which one."""
    mutant = {key: deepcopy(value) for key, value in content.items()}
    field = chance.choice(sorted(mutant))  # fields first: most values are weights
    *way, last = chance.choice([at for at in places(mutant) if at[0] == field])
    at = mutant
    for key in way:
        at = at[key]
    odd = chance.choice(ODD)
    kind = chance.choice(["replace"] * 6 + ["remove", "add"])
    if kind == "remove":
        del at[last]
    elif kind == "add" and isinstance(at, dict):
        at[chance.choice(["later", 7, "joint:x"])] = odd
    else:
        at[last] = odd
    return mutant, f"{kind} {[*way, last]}: {odd!r}"


@pytest.mark.parametrize("seed", range(4))
def test_no_changed_value_gives_a_traceback(
    contents: list[dict[str, Any]], tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of changes of single values: each is refused by an error that names the file, or has a harmless use."""
    monkeypatch.setattr("trainer.system.threads.default_workers", lambda: 1)
    chance, refused, path = random.Random(seed), 0, tmp_path / "changed.pt"
    for _ in range(100):
        mutant, what = changed(chance.choice(contents), chance)
        torch.save(mutant, path)
        try:
            load_run(path)
            evaluate(path, DATA, episodes=2, device="cpu")
        except MamldataError as error:
            refused += "changed.pt" in str(error)
        except Exception as error:
            raise AssertionError(what) from error
    assert 20 < refused < 100


@pytest.mark.parametrize("seed", range(2))
def test_a_run_resumes_or_says_why_not(contents: list[dict[str, Any]], tmp_path: Path, seed: int) -> None:
    """The same where a run goes on from such a file: also with changed optimizers, windows and positions."""
    chance, refused, whole = random.Random(seed), 0, 0
    for number in range(50):
        content = chance.choice(contents[:3])
        mutant, what = changed(content, chance)
        folder = tmp_path / str(number)
        folder.mkdir()
        config = {"settings": content["settings"], "data": content["data"], "versions": {}}
        (folder / "config.json").write_text(json.dumps(config))
        torch.save(mutant, folder / "maml_step3.pt")
        try:
            train(TrainSettings(**{**content["settings"], "steps": 4}), DATA, folder, resume=True)
            whole += 1
        except MamldataError:
            refused += 1
        except Exception as error:
            raise AssertionError(what) from error
    assert refused > 10
    assert whole > 2


def test_fields_are_named_in_the_message(contents: list[dict[str, Any]], tmp_path: Path) -> None:
    """What is missing or of another kind is said, not that something is wrong."""
    path = tmp_path / "a.pt"
    for change, message in (
        (
            {"accuracy": math.nan},
            r"a\.pt is not a checkpoint of this trainer: its accuracy must be a number from 0 to 1",
        ),
        ({"weights": {"head": [1.0]}}, "its weights must be tensors by name"),
        ({"data": {"n_way": 2}}, "its data must have dataset, a name"),
        (
            {"data": contents[0]["data"] | {"image_shape": None}},
            "its data must have image_shape, height, width and chan",
        ),
        ({"step": True}, "its step must be a number of steps"),
    ):
        torch.save({**contents[0], **change}, path)
        with pytest.raises(RequestError, match=message):
            load_checkpoint(path)


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_a_run_on_photographs_is_loaded_with_their_fit(
    contents: list[dict[str, Any]], tmp_path: Path, fit: str
) -> None:
    """As ``ImageRecipe.to_json`` has it; a fit that is none is refused."""
    content = deepcopy(contents[-1])
    recipe = replace(ImageRecipe(**content["data"]["image"], bank_sha256={}), fit=fit)
    content["data"]["image"] = recipe.to_json()
    torch.save(content, tmp_path / "a.pt")
    assert load_run(tmp_path / "a.pt").image == recipe
    for odd in ("squash", ["crop"], None):
        content["data"]["image"]["fit"] = odd
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(RequestError, match="its data must have image"):
            load_run(tmp_path / "a.pt")


def test_a_file_cannot_ask_for_memory(contents: list[dict[str, Any]], tmp_path: Path) -> None:
    """Settings of a network of terabytes are refused by the shapes of the weights, before it is made."""
    content = deepcopy(contents[0])
    content["settings"] |= {"filters": 4096, "inner_steps": 10**6}
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(RequestError, match=r"The weights in .*a\.pt are not those of a network with its settings"):
        load_run(tmp_path / "a.pt")


def test_an_optimizer_keeps_its_own_settings() -> None:
    """A saved state is loaded with its rate, but not the settings beside it; one of another shape is none."""
    value = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([value], lr=0.1)
    value.sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["betas"] = "fast"
    fresh = torch.optim.Adam([value], lr=0.2)
    state = optimizer_state(saved, fresh)
    assert state is not None
    assert (state["param_groups"][0]["lr"], state["param_groups"][0]["betas"]) == (0.1, (0.9, 0.999))
    assert state["state"] is saved["state"]
    assert optimizer_state({**saved, "param_groups": [{"lr": "fast"}]}, fresh) is None
    saved["state"][0]["exp_avg"] = torch.zeros(3)
    assert optimizer_state(saved, fresh) is None
