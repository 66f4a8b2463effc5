"""Training on a mixture: what is recorded of it, its validation, and that a run resumes on the same one alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mamldata.archive.build import build
from mamldata.archive.index import read_archive
from mamldata.archive.plan import BuildRequest
from mamldata.errors import RequestError
from mamldata.sources.open import open_archive
from trainer.data import archive_data, live_data
from trainer.loop import train
from trainer.mixture import MixedData
from trainer.runs.checkpoint import find_last, load_checkpoint
from trainer.runs.folder import CONFIG
from trainer.settings import TrainSettings

CPU = torch.device("cpu")
SETTINGS = TrainSettings(
    steps=6, filters=4, inner_steps=1, meta_batch_size=2, eval_every=3, eval_episodes=5, normalize=True, device="cpu"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, glyphs_manifest, glyphs_bank) -> tuple[Path, Path]:
    """Two archives of different episodes, with 8 and 6 val episodes."""
    place = tmp_path_factory.mktemp("mixture")
    for name, seed, val in (("a", 1, 8), ("b", 2, 6)):
        request = BuildRequest(n_way=3, k_shot=1, k_query=2, episodes={"train": 9, "val": val}, seed=seed)
        build(glyphs_manifest, glyphs_bank, place / name, request)
    return place / "a", place / "b"


def mixed(folders, weights=(3.0, 2.0), *, remix=True) -> MixedData:
    return MixedData([archive_data(folders[0], remix=remix), archive_data(folders[1])], weights)


def test_a_stopped_run_goes_on_as_if_it_had_not(folders, tmp_path) -> None:
    """The weights are the same, bit for bit, with pretraining, which numbers the classes of both sources."""
    settings = replace(SETTINGS, algorithm="pretrain", meta_schedule="constant")
    train(settings, mixed(folders), tmp_path / "whole")
    train(replace(settings, steps=3), mixed(folders), tmp_path / "parts")
    train(settings, mixed(folders), tmp_path / "parts", resume=True)
    first, second = (load_checkpoint(find_last(tmp_path / name)) for name in ("whole", "parts"))
    assert first.accuracy == second.accuracy
    assert first.weights.keys() == second.weights.keys()
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


def test_the_run_names_its_sources_and_refuses_others(folders, tmp_path) -> None:
    """Config and checkpoint hold digest and weight of each source; other weights, sources or an order are refused."""
    run = tmp_path / "run"
    train(replace(SETTINGS, steps=1), mixed(folders), run)
    about = json.loads((run / CONFIG).read_text())["data"]
    assert (about["dataset"], about["image_shape"]) == ("glyphs", [28, 28, 1])
    digests = [read_archive(folder).digest for folder in folders]
    assert [(one["digest"], one["weight"], one["remix"]) for one in about["sources"]] == [
        (digests[0], 3.0, True),
        (digests[1], 2.0, True),
    ]
    assert all(str(folder) in about["source"] for folder in folders)
    assert about["digest"] not in digests
    assert load_checkpoint(next(run.glob("*.pt"))).data == about
    for other in (
        mixed(folders, (2.0, 3.0)),
        mixed(folders[::-1]),
        mixed(folders, remix=False),
        archive_data(folders[0]),
    ):
        with pytest.raises(RequestError, match=r"holds another run:\n(.*\n)*  sources: "):
            train(SETTINGS, other, run, resume=True)


def test_validation_takes_each_source_by_its_weight(folders) -> None:
    """Of 5 episodes the first 3 of one source and the first 2 of the other; at most as many as both can give."""
    data = mixed(folders)
    found = [index for batch in data.eval("val", 5, 2, CPU) for index in batch.index.tolist()]
    assert found == [0, 1, 2, 0, 1]
    assert data.available("val") == 14  # 8 and 6; of 15 the first source would have 9
    alone = [batch.query_x for batch in archive_data(folders[1]).eval("val", 2, 2, CPU)]
    assert torch.equal(list(data.eval("val", 5, 2, CPU))[-1].query_x, alone[0])
    with pytest.raises(RequestError, match=r"has 8 val episodes, but 12 were requested"):
        data.eval("val", 20, 2, CPU)
    ranks = [
        [batch.index.tolist() for batch in data.eval("val", 5, 2, CPU, rank=rank, world_size=2)] for rank in (0, 1)
    ]
    assert [one + other for one, other in zip(*ranks, strict=True)] == [[0, 1], [2], [0, 1]]


def test_live_episodes_never_end(folders, glyphs_root) -> None:
    """A source without end sets no bound to the validation, and one of weight 0 takes no part."""
    live = live_data("glyphs", glyphs_root, {"n_way": 3, "k_shot": 1, "k_query": 2})
    assert MixedData([live, live]).available("val") is None
    assert MixedData([live, archive_data(folders[1])], [9, 1]).available("val") in range(55, 65)
    only = MixedData([live, archive_data(folders[1])], [1, 0])
    assert only.available("val") is None
    assert len(list(only.eval("val", 4, 2, CPU))) == 2


def test_shapes_that_differ_are_refused_before_anything_is_written(folders, tmp_path) -> None:
    """The message says where they differ, and the folder stays as it was."""
    narrow = MixedData([archive_data(folders[0]), archive_data(folders[1], narrow={"n_way": 2})])
    with pytest.raises(RequestError, match=r"n_way is 3 in the first \(glyphs\), and 2 in number 2"):
        train(SETTINGS, narrow, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_classes_are_numbered_through_all_sources(folders) -> None:
    """The classes of the second source come after those of the first."""
    data = mixed(folders)
    stream = iter(data.train(2, 0, CPU))
    first = data.parts[0].class_count()
    assert data.class_count() == first + data.parts[1].class_count()
    source = open_archive(folders[0], "train")
    for _ in range(8):
        batch = next(stream)
        classes = data.classes(batch.index)
        assert ((classes >= first) == (batch.index % 2 == 1)[:, None]).all()
        assert (classes % first < len(source.table)).all()
