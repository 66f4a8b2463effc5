"""Episodes: a pure function of numbers, drawn evenly, as documented to the bit."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamldata.bank.format import Bank
from mamldata.datasets.load import load_manifest
from mamldata.datasets.manifest import Manifest
from mamldata.errors import RequestError
from mamldata.sampling import sampler as episodes
from mamldata.sampling.sampler import ClassTable, EpisodeSampler, EpisodeSpec, class_table, gather
from mamldata.sampling.splits import divide

SPEC = EpisodeSpec(
    bank_sha256="ab" * 32,
    split_scheme="own",
    split="train",
    n_way=5,
    k_shot=1,
    k_query=3,
    quarter_turns=1,
    seed=0,
)
UNEQUAL = (4, 9, 5, 30, 4, 7, 12, 4)


def table(sizes: tuple[int, ...] = UNEQUAL, quarter_turns: int = 1, first: int = 100) -> ClassTable:
    """Classes of these sizes, in a bank that has ``first`` images of another class before them."""
    offsets = np.cumsum([0, first, *sizes]).tolist()
    names = ["other", *(f"class{number}" for number in range(len(sizes)))]
    return class_table(names, offsets, range(1, len(sizes) + 1), quarter_turns)


# --- the documented algorithm, written again: Python's own integers, no NumPy


def philox(counter: int, key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x64-10 (Salmon et al., 2011): four 64-bit numbers of a 256-bit counter and a 128-bit key."""
    mask = 2**64 - 1
    a, b, c, d = (counter >> 64 * word & mask for word in range(4))
    k0, k1 = key
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = right >> 64 ^ b ^ k0, right & mask, left >> 64 ^ d ^ k1, left & mask
        k0, k1 = k0 + 0x9E3779B97F4A7C15 & mask, k1 + 0xBB67AE8584CAA73B & mask
    return a, b, c, d


def numbers(spec: EpisodeSpec, index: int) -> Iterator[int]:
    """The 64-bit numbers of one episode: those of its own blocks of the counter."""
    names = ("bank_sha256", "split_scheme", "split", "n_way", "k_shot", "k_query", "quarter_turns", "seed")
    text = json.dumps({name: getattr(spec, name) for name in names}, sort_keys=True, separators=(",", ":")) + "\n"
    digest = hashlib.sha256(text.encode()).digest()
    key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
    blocks = -(-spec.n_way * (1 + spec.k_shot + spec.k_query) // 4)
    for block in range(blocks):
        yield from philox(index * blocks + block + 1, key)  # NumPy counts up before its first block


def shuffle_start(raw: Iterator[int], size: int, draws: int) -> list[int]:
    """The first ``draws`` of a Fisher-Yates shuffle."""
    pool = list(range(size))
    for j in range(draws):
        pick = j + next(raw) % (size - j)
        pool[j], pool[pick] = pool[pick], pool[j]
    return pool[:draws]


def by_hand(spec: EpisodeSpec, classes: ClassTable, index: int) -> list[list[int]]:
    raw = numbers(spec, index)
    chosen = shuffle_start(raw, len(classes), spec.n_way)
    episode = []
    for c in chosen:
        images = shuffle_start(raw, int(classes.images[c]), spec.k_shot + spec.k_query)
        episode.append([c, *(int(classes.first_row[c]) + image for image in images)])
    return episode


@given(
    n_way=st.integers(2, 8),
    k_shot=st.integers(1, 3),
    k_query=st.integers(1, 3),
    turns=st.sampled_from([1, 4]),
    seed=st.integers(0, 2**70),
    split=st.sampled_from(["train", "val", "test"]),
    first=st.integers(0, 2**40),
)
@settings(max_examples=60)
def test_the_documented_algorithm(
    n_way: int, k_shot: int, k_query: int, turns: int, seed: int, split: str, first: int
) -> None:
    """Whoever writes the algorithm again, without NumPy, draws the same episodes."""
    sizes = tuple(max(size, 6) for size in UNEQUAL)
    spec = EpisodeSpec("cd" * 32, "own", split, n_way, k_shot, k_query, turns, seed)
    classes = table(sizes, turns)
    source = EpisodeSampler(spec, classes).sample(first, 3)
    assert source.dtype == np.int32
    assert source.shape == (3, n_way, 1 + k_shot + k_query)
    assert source.tolist() == [by_hand(spec, classes, first + i) for i in range(3)]


# --- golden digests


def digest(source: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(source, dtype="<i4").tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "fc1041705b8dc1e162f8d4f1b8a89bd163f5284e46f3c5664090d26084fc4f8c"),
        ({"seed": 1}, "cc5051958165ad0c710099b471f981272908976ac2d2ade7bfbcf6794c8fde3e"),
        ({"split": "test"}, "3945b183beee77ca4e8b9d8463455118dd6d342ceb7cb37a1fb824cadde62bc5"),
        ({"n_way": 8, "k_shot": 2, "k_query": 2}, "6fc56be62f56b23afe0a97d8c1ad480aaa807599a7f5bbadee0c8ac2e738efc1"),
        ({"quarter_turns": 4}, "e59e62cafd0d8306a11324fd47f5cade56f8df925c073c841a87a3c7856ad831"),
    ],
    ids=["plain", "seed", "split", "shape", "turned"],
)
def test_golden_digests(changes: dict[str, int | str], expected: str) -> None:
    """A thousand episodes of a made-up table, the same for ever. A change here is another format."""
    spec = replace(SPEC, **changes)
    assert digest(EpisodeSampler(spec, table(quarter_turns=spec.quarter_turns)).sample(0, 1000)) == expected


def bank_table(bank: Bank, manifest: Manifest, scheme: str, split: str, turns: int) -> ClassTable:
    members = divide(manifest.schemes[scheme], bank.class_names, manifest.name)[split]
    return class_table(bank.class_names, bank.class_offsets, members, turns)


def golden_of(bank: Bank, manifest: Manifest, scheme: str, split: str) -> str:
    classes = bank_table(bank, manifest, scheme, split, 4)
    spec = EpisodeSpec(bank.sha256, scheme, split, 5, 1, 15, 4, 0)
    return digest(EpisodeSampler(spec, classes).sample(0, 1000))


def test_golden_digest_of_glyphs(glyphs_bank: Bank, glyphs_manifest: Manifest) -> None:
    """The first thousand 5-way 1-shot test episodes of the embedded dataset."""
    assert (
        golden_of(glyphs_bank, glyphs_manifest, "seeded", "test")
        == "9aa8d6d8c85e5e934b3aa740a3678546dd01c1087cdf4da254e9e1d06e54a0f6"
    )


@pytest.mark.real_data
def test_golden_digest_of_omniglot(omniglot_bank: Bank) -> None:
    """The first thousand 5-way 1-shot test episodes of Omniglot, of each split scheme."""
    manifest = load_manifest("omniglot")
    assert {scheme: golden_of(omniglot_bank, manifest, scheme, "test") for scheme in manifest.schemes} == {
        "maml": "c8a9acb9a98287b0be4e0461c02e368177be7eda2f56d35396d18841e3dcaa9e",
        "vinyals": "fd1af45e6eedef5efedb21714764ff281d2481b9f62f8aa70589aa36e2607cd5",
        "lake": "5db495486a831a5992b7449e2840711cf3662f8a928c9136347b6e68f6b69f31",
    }


def test_another_environment_draws_the_same(tmp_path: Path) -> None:
    """Hash seed, locale and a used global generator change nothing."""
    script = (
        "import random, sys; import numpy as np; np.random.seed(7); random.seed(7)\n"
        "from mamldata.sampling.sampler import EpisodeSampler, EpisodeSpec, class_table\n"
        "spec = EpisodeSpec('ab' * 32, 'own', 'train', 5, 1, 3, 1, 0)\n"
        "classes = class_table([str(i) for i in range(9)], range(0, 100, 11), range(9), 1)\n"
        "print(EpisodeSampler(spec, classes).sample(3, 2).tolist())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "99", "LC_ALL": "C", "TZ": "Asia/Kathmandu"}
    environment["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, check=True, capture_output=True, text=True
    )
    classes = class_table([str(i) for i in range(9)], range(0, 100, 11), range(9), 1)
    assert json.loads(done.stdout) == EpisodeSampler(SPEC, classes).sample(3, 2).tolist()


# --- purity


@given(cuts=st.lists(st.integers(0, 60), max_size=6), first=st.integers(0, 1000))
def test_any_slicing_gives_the_same_episodes(cuts: list[int], first: int) -> None:
    """However a range of indices is cut up, and in whatever order it is asked for."""
    sampler = EpisodeSampler(SPEC, table())
    whole = sampler.sample(first, 60)
    edges = [0, *sorted(cuts), 60]
    parts = {
        start: sampler.sample(first + start, stop - start)
        for start, stop in zip(edges[::-1][1:], edges[::-1], strict=False)
    }
    for start, part in parts.items():
        assert np.array_equal(part, whole[start : start + len(part)])
    again = EpisodeSampler(SPEC, table())
    assert np.array_equal(np.concatenate([again.sample(first + i, 1) for i in range(59, -1, -1)])[::-1], whole)


@pytest.mark.parametrize("pool", [1, 50, 151, 1000])
def test_memory_bound_changes_nothing(pool: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Episodes drawn a few at a time, to bound memory, are the same."""
    expected = EpisodeSampler(SPEC, table()).sample(5, 200)
    calls: list[int] = []
    raw = EpisodeSampler._raw
    monkeypatch.setattr(episodes, "_MOST_POOL", pool)
    monkeypatch.setattr(EpisodeSampler, "_raw", lambda self, index: (calls.append(len(index)), raw(self, index))[1])
    assert np.array_equal(EpisodeSampler(SPEC, table()).sample(5, 200), expected)
    assert sum(calls) == 200
    assert max(calls) == max(1, pool // 150)  # 5 ways, each with a pool of up to 30 images


@given(rows=st.integers(1, 5), draws=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_without_a_pool_the_draws_are_the_same(rows: int, draws: int, seed: int) -> None:
    """Classes too large for a pool are shuffled by their changes alone, with the same result."""
    chance = np.random.default_rng(seed)
    sizes = chance.integers(1, 2 * draws + 3, rows)
    sizes[0] = max(sizes[0], draws)
    raw = chance.integers(0, 2**64, (rows, draws), dtype=np.uint64)
    assert np.array_equal(episodes._draw_from_many(raw, sizes), episodes._draw(raw, sizes))


def test_memory_does_not_grow_with_what_a_table_claims() -> None:
    """A forged table of classes with two thousand million images each costs no more than a true one."""
    claimed = replace(table(), images=np.full(len(table()), 2**31 - 1))
    sampler = EpisodeSampler(SPEC, claimed)
    tracemalloc.start()
    try:
        drawn = sampler.sample(3, 10)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert drawn.shape == (10, 5, 5)
    assert peak < 1 << 20


def test_global_generators_are_left_alone() -> None:
    """Drawing neither reads nor moves NumPy's global state."""
    before = np.random.get_state()[1].tobytes()  # type: ignore[index,union-attr]
    EpisodeSampler(SPEC, table()).sample(0, 10)
    assert np.random.get_state()[1].tobytes() == before  # type: ignore[index,union-attr]


def test_no_episode_at_all() -> None:
    """None asked for, none drawn."""
    assert EpisodeSampler(SPEC, table()).sample(7, 0).shape == (0, 5, 5)


# --- what an episode is


@given(
    sizes=st.lists(st.integers(4, 12), min_size=2, max_size=9).map(tuple),
    turns=st.sampled_from([1, 4]),
    seed=st.integers(0, 2**64 - 1),
    data=st.data(),
)
def test_classes_and_images_are_distinct(sizes: tuple[int, ...], turns: int, seed: int, data: st.DataObject) -> None:
    """No class twice in an episode, no image twice in a class, support and query apart, every row in its class."""
    classes = table(sizes, turns)
    n_way = data.draw(st.integers(2, len(classes)))
    k_shot = data.draw(st.integers(1, 3))
    spec = replace(SPEC, n_way=n_way, k_shot=k_shot, k_query=4 - k_shot, quarter_turns=turns, seed=seed)
    source = EpisodeSampler(spec, classes).sample(seed % 1000, 20)
    chosen, rows = source[..., 0], source[..., 1:]
    assert (np.diff(np.sort(chosen, axis=1), axis=1) > 0).all()
    assert ((chosen >= 0) & (chosen < len(classes))).all()
    assert (np.diff(np.sort(rows, axis=2), axis=2) > 0).all()
    first = classes.first_row[chosen][..., None]
    assert ((rows >= first) & (rows < first + classes.images[chosen][..., None])).all()


def test_all_there_is() -> None:
    """As many ways as classes and as many shots as images: each is there, once."""
    spec = replace(SPEC, n_way=3, k_shot=2, k_query=2)
    source = EpisodeSampler(spec, table((4, 4, 4), first=0)).sample(0, 50)
    assert (np.sort(source[..., 0], axis=1) == np.arange(3)).all()
    assert (np.sort(source[..., 1:].reshape(50, 12), axis=1) == np.arange(12)).all()


def test_class_table() -> None:
    """With rotations each class becomes four that stand together and share its images."""
    classes = class_table(["a", "b", "c"], [0, 3, 5, 9], [2, 0], 4)
    assert classes.names == ("c",) * 4 + ("a",) * 4
    assert classes.quarter_turns.tolist() == [0, 1, 2, 3] * 2
    assert classes.first_row.tolist() == [5] * 4 + [0] * 4
    assert classes.images.tolist() == [4] * 4 + [3] * 4
    assert (classes.label(4), classes.label(7)) == ("a", "a, turned 270")
    assert len(class_table(["a", "b", "c"], [0, 3, 5, 9], [1], 1)) == 1


# --- evenly drawn


def chi_square_limit(freedom: int) -> float:
    """What chi-square exceeds once in ten thousand times (Wilson and Hilferty's approximation)."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + 3.719 * part**0.5) ** 3


def is_even(counts: np.ndarray) -> bool:
    expected = counts.sum() / counts.size
    assert expected > 20
    return float(((counts - expected) ** 2 / expected).sum()) < chi_square_limit(counts.size - 1)


def test_the_test_of_evenness() -> None:
    """The limit is about the tables' (35.56 and 161.32), and a bias of 7 % is seen."""
    assert chi_square_limit(10) == pytest.approx(35.56, rel=0.02)
    assert chi_square_limit(100) == pytest.approx(161.32, rel=0.005)
    counts = np.full(10, 10_000)
    assert is_even(counts)
    counts[3] += 700
    assert not is_even(counts)


@pytest.fixture(scope="module")
def many() -> np.ndarray:
    """40,000 episodes of 8 classes of 11 images: classes, and images counted within their class."""
    classes = table((11,) * 8)
    source = EpisodeSampler(SPEC, classes).sample(0, 40_000)
    source[..., 1:] -= classes.first_row[source[..., :1]]
    return source


def test_classes_are_even(many: np.ndarray) -> None:
    """Every class comes as often as every other, at every position, and every pair of neighbours."""
    for position in range(5):
        assert is_even(np.bincount(many[:, position, 0], minlength=8))
    for left, right in ((0, 1), (1, 2), (3, 4), (0, 4)):
        pairs = np.bincount(many[:, left, 0] * 8 + many[:, right, 0], minlength=64).reshape(8, 8)
        assert (np.diag(pairs) == 0).all()
        assert is_even(pairs[~np.eye(8, dtype=bool)])


def test_images_are_even(many: np.ndarray) -> None:
    """Every image of a class comes as often as every other, at every position, support and query alike."""
    for way in range(5):
        for position in range(1, 5):
            assert is_even(np.bincount(many[:, way, position], minlength=11))
    for c in range(8):
        assert is_even(np.bincount(many[many[:, :, 0] == c][:, 1], minlength=11))
    pairs = np.bincount(many[:, 2, 1] * 11 + many[:, 2, 4], minlength=121).reshape(11, 11)
    assert is_even(pairs[~np.eye(11, dtype=bool)])


def test_sets_of_classes_are_even(many: np.ndarray) -> None:
    """Each of the 56 sets of five classes is as likely as another."""
    sets, counts = np.unique(np.sort(many[:, :, 0], axis=1), axis=0, return_counts=True)
    assert len(sets) == 56
    assert is_even(counts)


def test_unequal_classes_are_even() -> None:
    """A class of 30 images is drawn as often as a class of 4, and each of its images evenly."""
    classes = table()
    source = EpisodeSampler(SPEC, classes).sample(0, 40_000)
    assert is_even(np.bincount(source[:, 0, 0], minlength=len(UNEQUAL)))
    for c, size in enumerate(UNEQUAL):
        rows = source[source[..., 0] == c][:, 1] - classes.first_row[c]
        assert is_even(np.bincount(rows, minlength=size))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"split": "val"},
        {"split_scheme": "owm"},
        {"bank_sha256": "ab" * 31 + "ac"},
        {"k_query": 4},
        {"n_way": 6},
        {},
    ],
    ids=["seed", "split", "scheme", "bank", "k_query", "n_way", "index"],
)
def test_neighbours_have_nothing_in_common(changes: dict[str, int | str]) -> None:
    """Episodes of the next seed, split, scheme, bank or index are independent: all pairs are equally likely."""
    classes = table((11,) * 8)
    one = EpisodeSampler(SPEC, classes).sample(0, 20_000)
    shift = 0 if changes else 1
    other = EpisodeSampler(replace(SPEC, **changes), classes).sample(shift, 20_000)
    assert not np.array_equal(one[:, :, :2], other[:, :5, :2])
    for way in (0, 4):
        assert is_even(np.bincount(one[:, way, 0] * 8 + other[:, way, 0], minlength=64))
    images = [source[:, 0, 1] - classes.first_row[source[:, 0, 0]] for source in (one, other)]
    assert is_even(np.bincount(images[0] * 11 + images[1], minlength=121))


# --- what cannot be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_way": 1}, "n_way must be at least 2, not 1"),
        ({"k_shot": 0}, "k_shot must be at least 1, not 0"),
        ({"k_query": 0}, "k_query must be at least 1, not 0"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
    ],
)
def test_numbers_out_of_range(changes: dict[str, int], message: str) -> None:
    """The error names the number, its least value and what it is."""
    with pytest.raises(RequestError, match=message):
        replace(SPEC, **changes)


def test_more_ways_than_classes() -> None:
    """The error says where, how many there are, and how many are asked for."""
    with pytest.raises(
        RequestError, match=r"split 'train' of split scheme 'own' has 8 classes, but n_way is 9\. Lower"
    ):
        EpisodeSampler(replace(SPEC, n_way=9), table())
    assert EpisodeSampler(replace(SPEC, n_way=9), table(quarter_turns=4)).sample(0, 1).shape == (1, 9, 5)


def test_more_shots_than_images() -> None:
    """The error names the first class that is too small, what it has, what is needed, and how many more there are."""
    pattern = (
        r"split 'train' of split scheme 'own', class 'class0' \(and 3 more\): it has 4 images, but "
        r"k_shot \+ k_query = 2 \+ 4 = 6\. Lower k_shot or k_query; of a folder of images, min_images leaves"
    )
    with pytest.raises(RequestError, match=pattern):
        EpisodeSampler(replace(SPEC, k_shot=2, k_query=4), table())
    with pytest.raises(RequestError, match=r"class 'class1': it has 3 images"):
        EpisodeSampler(SPEC, table((4, 3, 4, 5, 6)))
    assert EpisodeSampler(replace(SPEC, k_shot=2, k_query=2), table()).sample(0, 1).shape == (1, 5, 5)


# --- pixels


@pytest.mark.parametrize("turns", [1, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_gather(turns: int, channels: int) -> None:
    """Every image is its row of the bank, turned counter-clockwise as its class says; the bank is left alone."""
    classes = table((9,) * 6, turns, first=2)
    images = np.random.default_rng(0).integers(0, 256, (56, 7, 7, channels), dtype=np.uint8)
    before = images.copy()
    spec = replace(SPEC, k_shot=2, quarter_turns=turns)
    source = EpisodeSampler(spec, classes).sample(0, 30)
    support = np.full((30, 5, 2, 7, 7, channels), 99, np.uint8)
    query = np.full((30, 5, 3, 7, 7, channels), 99, np.uint8)
    gather(images, classes, source, 2, support, query)
    drawn = np.concatenate([support, query], axis=2)
    turned = set()
    for episode, way in np.ndindex(30, 5):
        c, *rows = source[episode, way].tolist()
        turned.add(c % turns)
        for position, row in enumerate(rows):
            assert np.array_equal(drawn[episode, way, position], np.rot90(before[row], c % turns))
    assert len(turned) == turns
    assert np.array_equal(images, before)


def test_gather_turns_counter_clockwise() -> None:
    """The right-hand upper corner comes to the left-hand upper one with the first turn."""
    images = np.zeros((1, 2, 2, 1), np.uint8)
    images[0, 0, 1] = 1
    classes = class_table(["a"], [0, 1], [0], 4)
    source = np.array([[[0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0]]], np.int32)
    support, query = np.empty((1, 4, 1, 2, 2, 1), np.uint8), np.empty((1, 4, 1, 2, 2, 1), np.uint8)
    gather(images, classes, source, 1, support, query)
    corners = [np.argwhere(image)[0, :2].tolist() for image in support[0, :, 0]]
    assert corners == [[0, 1], [0, 0], [1, 0], [1, 1]]
    assert np.array_equal(support, query)


def test_gather_from_the_bank(glyphs_bank: Bank, glyphs_manifest: Manifest) -> None:
    """The same, from the memory-mapped bank of the embedded dataset."""
    classes = bank_table(glyphs_bank, glyphs_manifest, "seeded", "val", 4)
    source = EpisodeSampler(replace(SPEC, split="val", quarter_turns=4), classes).sample(11, 8)
    images = glyphs_bank.open_images()
    support, query = np.empty((8, 5, 1, 28, 28, 1), np.uint8), np.empty((8, 5, 3, 28, 28, 1), np.uint8)
    gather(images, classes, source, 1, support, query)
    for episode, way in np.ndindex(8, 5):
        c, row, *query_rows = source[episode, way].tolist()
        assert np.array_equal(support[episode, way, 0], np.rot90(images[row], c % 4))
        assert np.array_equal(query[episode, way], np.rot90(images[query_rows], c % 4, axes=(1, 2)))
        name = glyphs_bank.class_names[np.searchsorted(glyphs_bank.class_offsets, row, side="right") - 1]
        assert name == classes.names[c]
