from __future__ import annotations

import json
import pickle
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

import trainer
from mamldata.errors import DamagedError, MamldataError, RequestError
from trainer.runs import model as module
from trainer.runs.checkpoint import find_checkpoint, read_start
from trainer.runs.model import model_bytes, read_about, read_model


@pytest.fixture(scope="module")
def model(glyphs_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a run with learned rates and norms."""
    out = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    trainer.export_model(glyphs_run, out)
    return out


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].stride() == other[name].stride() for name in one
    )


def test_a_model_is_loaded_as_its_run_is(glyphs_run: Path, model: Path) -> None:
    """Weights, learned rates and norms to the bit and in their memory layout; settings, data and images."""
    of_run, of_model = trainer.load_run(glyphs_run), trainer.load_run(model)
    assert of_model.parameters.rates
    assert of_model.parameters.norms
    for one, other in zip(of_run.parameters, of_model.parameters, strict=True):
        assert same_tensors(one, other)
    assert same_tensors(of_run.network.state_dict(), of_model.network.state_dict())
    assert of_run.settings == of_model.settings
    assert of_model.image == of_run.image
    assert "source" not in of_model.data  # which may be a path
    assert {**of_model.data, "source": "glyphs"} == of_run.data


def test_any_tool_reads_the_weights(glyphs_run: Path, model: Path) -> None:
    """The file is plain safetensors, with the names and values of the checkpoint."""
    _, checkpoint = find_checkpoint(glyphs_run)
    tensors = load(model.read_bytes())
    assert tensors.keys() == checkpoint.weights.keys()
    assert all(torch.equal(tensors[name], value) for name, value in checkpoint.weights.items())


def test_a_run_can_start_from_a_model(glyphs_run: Path, model: Path) -> None:
    """With the weights and the digest of the run's data, and a digest of the file."""
    by_run, by_model = read_start(glyphs_run), read_start(model)
    assert by_model.record["digest"] == by_run.record["digest"]
    assert by_model.record["sha256"] != by_run.record["sha256"]
    assert by_model.checkpoint.weights.keys() == by_run.checkpoint.weights.keys()


def test_a_shipped_model_has_a_name(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no such path; a path goes before a name, and a near name is proposed."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.safetensors").write_bytes(model.read_bytes())
    monkeypatch.setattr(module, "SHIPPED", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint(Path("tiny"))[0] == tmp_path / "models" / "tiny.safetensors"
    with pytest.raises(
        RequestError, match=r"no run folder, checkpoint or model tin. Did you mean 'tiny'. Models: tiny."
    ):
        trainer.load_run("tin")
    with pytest.raises(RequestError, match="no run folder, checkpoint or model"):
        trainer.load_run("../models/tiny")
    (tmp_path / "tiny").mkdir()
    with pytest.raises(RequestError, match="tiny holds no checkpoint"):
        trainer.load_run("tiny")


def test_the_models_that_are_shipped_can_be_read() -> None:
    """Each has a card, and its file is whole; there may be none."""
    for path in module.shipped_models().values():
        assert trainer.load_run(path).image
        assert path.with_suffix(".md").is_file()


def test_a_changed_file_is_refused(model: Path, tmp_path: Path) -> None:
    """Cut anywhere, or with a flipped bit anywhere: an error of ours, in words, and never other weights."""
    content, chance, path = model.read_bytes(), random.Random(0), tmp_path / "x.safetensors"
    header = int.from_bytes(content[:8], "little")
    for cut in [0, 7, 8, 9, 8 + header - 1, 8 + header, len(content) - 1, *chance.sample(range(len(content)), 30)]:
        path.write_bytes(content[:cut])
        with pytest.raises((DamagedError, RequestError), match=r"x.safetensors is (damaged|cut|not a model)"):
            read_model(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(DamagedError, match=r"x.safetensors is damaged"):
        read_model(path)
    right = read_model(model)
    for place in [*range(0, 8 + header, 23), *chance.sample(range(8 + header, len(content)), 30)]:
        changed = bytearray(content)
        changed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        try:
            about, tensors = read_model(path)
        except MamldataError:
            continue
        assert about == right[0]  # a space was changed into another one
        assert same_tensors(tensors, right[1])


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise AssertionError('unpickled')",))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        pickle.dumps(Bomb()),
        b"PK\3\4 a zip",
        save({"a": torch.zeros(1)}),
        save({"a": torch.zeros(1)}, {"mamldata": "{}"}),
        save({"a": torch.zeros(1)}, {"mamldata": "[" * 100_000}),
        save({"a": torch.zeros(1)}, {"mamldata": '{"format": "mamldata-model/2"}'}),
        (2**63).to_bytes(8, "little") + b"{}",
        (2**22 + 1).to_bytes(8, "little") + b" " * 2**22,
    ],
)
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    """A pickle, a zip, the weights of another program, a header that says it is huge: none of them is read."""
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(RequestError, match=r"other.safetensors is not a model of this trainer \(mamldata-model/1\)"):
        trainer.load_run(path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_a_sparse_giant_is_not_read(model: Path, tmp_path: Path) -> None:
    """More bytes than any model has are refused before they are read."""
    path = tmp_path / "giant.safetensors"
    path.write_bytes(model.read_bytes())
    with path.open("r+b") as stream:
        stream.truncate(2**40)
    with pytest.raises(RequestError, match=r"giant.safetensors has 1,099,511,627,776 bytes, more than the limit"):
        trainer.load_run(path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"step": -1}, "its step must be a number of steps"),
        ({"accuracy": 2}, "its accuracy must be"),
        ({"settings": {"algorithm": "none"}}, "algorithm must be one of"),
        ({"settings": {"unheard": 1}}, "has unknown settings: unheard"),
        ({"settings": None}, "its settings must be settings by name"),
        ({"data": {}}, "its data must have dataset"),
        ({"data": {"n_way": 10**12}}, "not those of a network with its settings"),
        ({"data": {"image_shape": [10**6, 1, 1]}}, "its data must have image_shape"),
        ({"data": {"image": {"size": 1}}}, "its data must have image"),
    ],
)
def test_forged_facts_are_refused(model: Path, tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    """A whole file with a right digest, but with values that no export writes."""
    about, tensors = read_model(model)
    for key, value in changes.items():
        about[key] = {**about[key], **value} if key == "data" and value else value
    path = tmp_path / "forged.safetensors"
    path.write_bytes(model_bytes(about, tensors))
    with pytest.raises(RequestError, match=r"forged.safetensors") as caught:
        trainer.load_run(path)
    assert text in str(caught.value)


def test_forged_tensors_are_refused(model: Path, tmp_path: Path) -> None:
    """Whole numbers in place of fractions, other shapes, and a tensor too many."""
    about, tensors = read_model(model)
    name, path = next(iter(tensors)), tmp_path / "forged.safetensors"
    for value in (tensors[name].int(), tensors[name][:0], torch.zeros(0, 2**40)):
        path.write_bytes(model_bytes(about, {**tensors, name: value}))
        with pytest.raises(RequestError, match=r"its weights must be tensors|differ in shape"):
            trainer.load_run(path)
    path.write_bytes(model_bytes(about, {**tensors, "more": torch.zeros(1)}))
    with pytest.raises(RequestError, match="more differ"):
        trainer.load_run(path)


def test_what_it_says_is_read_without_the_weights(model: Path, tmp_path: Path) -> None:
    """The facts of the card, from the beginning of the file."""
    content = model.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content[: 8 + int.from_bytes(content[:8], "little")])
    about = read_about(path)
    assert about == json.loads(json.dumps(read_model(model)[0] | {"sha256": about["sha256"]}))
    assert replace(trainer.load_run(model).settings) == trainer.TrainSettings(**about["settings"])
