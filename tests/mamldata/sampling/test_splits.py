"""Splits: Omniglot's schemes are exactly the published ones, and a class is never in two splits."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamldata.datasets.load import load_manifest
from mamldata.errors import RequestError
from mamldata.sampling.splits import SplitScheme, divide

HELD_OUT = {"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"}
GOLDEN = {
    "maml": "fb13906f945fdda4c4ee8a4374aea5d8d741e21ebf0a7e50566a5a5b2ff57491",
    "vinyals": "42338d8ccad07479499fb8b714e650fef5e2e2a9df8d8b3228ec567fec537181",
    "lake": "7458ebb70767fa2447ff4c2a3a2f286d7e4146e85769c1eb2eef32e6799a5a16",
}
GLYPHS_GOLDEN = "434fae84d494aa52c6bc3f32be5c10ead93f7f1f8f91802acaa601441b778b22"


def class_lists(dataset: str, scheme: str, class_names: list[str]) -> dict[str, list[str]]:
    division = divide(load_manifest(dataset).schemes[scheme], class_names, dataset)
    return {split: [class_names[c] for c in members] for split, members in division.items()}


def golden(lists: dict[str, list[str]]) -> str:
    lines = [f"{split} {name}\n" for split in ("train", "val", "test") for name in lists[split]]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def listed(**lists: tuple[str, ...]) -> SplitScheme:
    return SplitScheme("own", "mine", lists=lists, counts={})


def seeded(seed: int = 0, **counts: int) -> SplitScheme:
    return SplitScheme("own", "mine", lists={}, counts=counts, seed=seed)


@pytest.fixture(scope="module")
def characters(real_data: Path) -> dict[str, list[str]]:
    """Omniglot's characters in sorted order, of each zip, read here without the library."""
    found = {}
    for name in ("images_background", "images_evaluation"):
        with zipfile.ZipFile(real_data / "omniglot" / f"{name}.zip") as container:
            paths = [member.split("/") for member in container.namelist() if member.endswith(".png")]
        found[name] = sorted({f"{path[-3]}/{path[-2]}" for path in paths}, key=lambda name: name.split("/"))
    return found


@pytest.fixture(scope="module")
def omniglot_classes(characters: dict[str, list[str]]) -> list[str]:
    both = characters["images_background"] + characters["images_evaluation"]
    return sorted(both, key=lambda name: name.split("/"))


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("scheme", "sizes"), [("maml", (1100, 100, 423)), ("vinyals", (1028, 172, 423)), ("lake", (792, 172, 659))]
)
def test_omniglot_counts(scheme: str, sizes: tuple[int, ...], omniglot_classes: list[str]) -> None:
    """Each scheme has the published number of characters, together all 1,623, none twice; and a golden digest."""
    lists = class_lists("omniglot", scheme, omniglot_classes)
    assert tuple(len(lists[split]) for split in ("train", "val", "test")) == sizes
    assert sorted(name for names in lists.values() for name in names) == sorted(omniglot_classes)
    assert golden(lists) == GOLDEN[scheme]


@pytest.mark.real_data
def test_vinyals_is_its_one_sentence_definition(characters: dict[str, list[str]], omniglot_classes: list[str]) -> None:
    """val: five background alphabets; train: the rest and the first 236 evaluation characters; test: the others."""
    background, evaluation = characters["images_background"], characters["images_evaluation"]
    assert (len(background), len(evaluation)) == (964, 659)
    lists = class_lists("omniglot", "vinyals", omniglot_classes)
    held_out = {name for name in background if name.split("/")[0] in HELD_OUT}
    assert set(lists["val"]) == held_out
    assert set(lists["train"]) == (set(background) - held_out) | set(evaluation[:236])
    assert set(lists["test"]) == set(evaluation[236:])
    assert evaluation[235] == "Gurmukhi/character41"


@pytest.mark.real_data
def test_lake_is_background_and_evaluation(characters: dict[str, list[str]], omniglot_classes: list[str]) -> None:
    """test: the evaluation set; val: the five held-out background alphabets; train: the rest."""
    lists = class_lists("omniglot", "lake", omniglot_classes)
    held_out = {name for name in characters["images_background"] if name.split("/")[0] in HELD_OUT}
    assert set(lists["test"]) == set(characters["images_evaluation"])
    assert set(lists["val"]) == held_out
    assert set(lists["train"]) == set(characters["images_background"]) - held_out


def recomputed(class_names: list[str], seed: int, counts: tuple[int, int, int]) -> dict[str, list[str]]:
    """The documented rule in three lines: sort by sha256 of ``seed NUL name``, cut, sort each part."""
    order = sorted(class_names, key=lambda name: hashlib.sha256(str(seed).encode() + b"\0" + name.encode()).hexdigest())
    train, val, test = counts
    parts = order[:train], order[train : train + val], order[train + val : train + val + test]
    return dict(
        zip(("train", "val", "test"), ([n for n in class_names if n in set(part)] for part in parts), strict=True)
    )


@pytest.mark.real_data
def test_maml_is_the_documented_rule(omniglot_classes: list[str]) -> None:
    """The seeded division of Omniglot can be recomputed from the names alone."""
    lists = class_lists("omniglot", "maml", omniglot_classes)
    assert lists == recomputed(omniglot_classes, 1, (1100, 100, 423))


def test_glyphs_is_the_documented_rule() -> None:
    """The same for the embedded dataset, with its golden digest."""
    names = [f"alphabet{a:02d}/character{c:02d}" for a in range(1, 13) for c in range(1, 21)]
    lists = class_lists("glyphs", "seeded", names)
    assert lists == recomputed(names, 1, (160, 30, 50))
    assert golden(lists) == GLYPHS_GOLDEN


@given(
    names=st.lists(st.text(min_size=1, max_size=6), min_size=3, max_size=30, unique=True),
    seed=st.integers(0, 2**64),
    data=st.data(),
)
def test_seeded_splits_are_disjoint_sorted_and_deterministic(names: list[str], seed: int, data: st.DataObject) -> None:
    """Any names and any seed: the counts hold, no class is in two splits, and the rule is the documented one."""
    train = data.draw(st.integers(1, len(names) - 2))
    val = data.draw(st.integers(1, len(names) - train - 1))
    test = data.draw(st.integers(1, len(names) - train - val))
    division = divide(seeded(seed, train=train, val=val, test=test), names, "d")
    assert [len(division[split]) for split in ("train", "val", "test")] == [train, val, test]
    everyone = [c for members in division.values() for c in members]
    assert len(everyone) == len(set(everyone))
    assert all(list(members) == sorted(members) for members in division.values())
    assert {s: [names[c] for c in m] for s, m in division.items()} == recomputed(names, seed, (train, val, test))


def test_seeds_differ() -> None:
    """Another seed is another division."""
    names = [f"c{i}" for i in range(100)]
    assert divide(seeded(1, train=50, val=20, test=30), names, "d") != divide(
        seeded(2, train=50, val=20, test=30), names, "d"
    )


def test_lists_by_name_and_prefix() -> None:
    """``a/*`` is every class below ``a``, and not ``ab``; a class listed twice in one split is there once."""
    names = ["a/1", "a/2", "ab/1", "b/1", "c"]
    division = divide(listed(train=("a/*", "a/2"), val=("ab/1",), test=("c", "b/1")), names, "d")
    assert division == {"train": (0, 1), "val": (2,), "test": (3, 4)}


@pytest.mark.parametrize("entry", ["Greek/character3", "Greeek/*"])
def test_unknown_class(entry: str) -> None:
    """The error says where, which, and the nearest name."""
    scheme = listed(train=(entry,), val=("Greek/character01",), test=("Greek/character02",))
    names = ["Greek/character01", "Greek/character02", "Greek/character03"]
    with pytest.raises(RequestError, match=r"d, split scheme 'own', split 'train': there is no class 'Gre") as caught:
        divide(scheme, names, "d")
    if not entry.endswith("*"):
        assert "Did you mean 'Greek/character0" in str(caught.value)


def test_class_in_two_splits() -> None:
    """The error names the class and both splits."""
    with pytest.raises(RequestError, match=r"the class 'a/2' is in both 'train' and 'test'"):
        divide(listed(train=("a/*",), val=("b",), test=("a/2",)), ["a/1", "a/2", "b"], "d")


def test_more_classes_than_there_are() -> None:
    """The error says how many are needed and how many there are."""
    with pytest.raises(RequestError, match=r"d, split scheme 'own' needs 6 classes; the bank has 5"):
        divide(seeded(train=3, val=2, test=1), list("abcde"), "d")
    assert divide(seeded(train=3, val=1, test=1), list("abcde"), "d")
