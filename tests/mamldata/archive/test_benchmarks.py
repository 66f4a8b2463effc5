"""Benchmarks: what the file defines can be built, has the pinned digests, and is never taken for something else."""

from __future__ import annotations

import re
import runpy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import mamldata
from mamldata.archive import benchmarks as module
from mamldata.archive.benchmarks import Benchmark, benchmark, benchmark_of, benchmarks, parse_benchmarks
from mamldata.archive.index import read_archive
from mamldata.datasets.load import load_manifest
from mamldata.datasets.toml import builtin_names
from mamldata.errors import DamagedError, DataMissingError, ManifestError, RequestError

DOCS = Path(__file__).parents[3] / "docs"
PHOTOGRAPHS = ("mini-imagenet", "cifar-fs", "fc100", "cub-200")
NAMES = {f"omniglot-{n}w{k}s{scheme}" for n in (5, 20) for k in (1, 5) for scheme in ("", "-vinyals")}
NAMES |= {f"{dataset}-5w{k}s" for dataset in PHOTOGRAPHS for k in (1, 5)} | {"glyphs-5w1s"}
GOOD = """\
format = "mamldata-benchmarks/1"
[mine]
dataset = "glyphs"
split_scheme = "seeded"
split = "test"
rotations = "all"
image_size = 28
n_way = 5
k_shot = 1
k_query = 15
episodes = 100
seed = 0
"""


def test_the_names() -> None:
    """Every dataset of the papers has its benchmarks; their file is not taken for a dataset."""
    assert set(benchmarks()) == NAMES
    assert "benchmarks" not in builtin_names()


@pytest.mark.parametrize("one", benchmarks().values(), ids=lambda one: one.name)
def test_a_benchmark_says_what_its_name_says(one: Benchmark) -> None:
    """Its dataset and split scheme exist, it has the dataset's image size, and a pinned bank is the manifest's."""
    manifest = load_manifest(one.dataset)
    suffix = "" if one.split_scheme == manifest.split_scheme else f"-{one.split_scheme}"
    assert one.name == f"{one.dataset}-{one.n_way}w{one.k_shot}s{suffix}"
    assert one.split_scheme in manifest.schemes
    assert (one.split, one.k_query, one.image_size) == ("test", 15, manifest.image.size)
    assert one.bank_sha256 == manifest.image.bank_sha256.get(one.image_size)
    assert (one.sha256 is None) == (one.bank_sha256 is None)


def test_no_two_benchmarks_are_the_same() -> None:
    """Neither their digests nor their definitions."""
    pinned = [one.sha256 for one in benchmarks().values() if one.sha256]
    assert len(set(pinned)) == len(pinned) == 9
    assert len({replace(one, name="", sha256=None) for one in benchmarks().values()}) == len(NAMES)


def test_the_table_in_the_docs_is_the_definition() -> None:
    """``python docs/benchmarks.py`` rewrites the table."""
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    rewritten = runpy.run_path(str(DOCS / "benchmarks.py"))["rewritten"](page)
    assert rewritten == page, "The table of benchmarks is out of date. Run: python docs/benchmarks.py"
    assert all(f"| `{name}` |" in page for name in benchmarks())


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("benchmarks/1", "benchmarks/2", "format: is 'mamldata-benchmarks/2'; this version reads"),
        ('"glyphs"', '"glyph"', "mine.dataset: 'glyph' is not one of"),
        ('"test"', '"tests"', "mine.split: 'tests' is not one of train, val, test. Did you mean 'test'?"),
        ("episodes = 100", "episodes = 1", "mine.episodes: must be at least 2, not 1"),
        ("seed = 0", "", "mine.seed: is missing"),
        ("seed = 0", "seed = 0\nsize = 3", "mine.size: is not known here."),
        ("seed = 0", f"seed = 0\nsha256 = '{'0' * 64}'", "mine.bank_sha256: is missing"),
        ("seed = 0", f"seed = 0\nbank_sha256 = '{'0' * 64}'", "mine.sha256: is missing"),
    ],
)
def test_each_fault_has_its_place(old: str, new: str, fault: str) -> None:
    """A definition that is incomplete or misspelt is refused as a whole."""
    assert list(parse_benchmarks(GOOD.encode(), "b.toml")) == ["mine"]
    with pytest.raises(ManifestError, match=r"b\.toml has 1 fault:\n  " + re.escape(fault)):
        parse_benchmarks(GOOD.replace(old, new).encode(), "b.toml")


def test_an_unknown_name() -> None:
    """The nearest one is named, and all."""
    with pytest.raises(
        RequestError, match=r"no benchmark 'omniglot-5w1'\. Did you mean 'omniglot-5w1s'\?.*cub-200-5w5s"
    ):
        benchmark("omniglot-5w1")


@pytest.fixture
def change(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Changes what is known of ``glyphs-5w1s``."""

    def change(**values: str | None) -> None:
        changed = {"glyphs-5w1s": replace(benchmark("glyphs-5w1s"), **values)}  # type: ignore[arg-type]
        monkeypatch.setattr(module, "benchmarks", lambda: changed)

    return change


@pytest.fixture(scope="module")
def built(glyphs_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of ``glyphs-5w1s``. Shared: do not write to it, copy it."""
    out = tmp_path_factory.mktemp("benchmarks") / "glyphs-5w1s"
    mamldata.build_benchmark("glyphs-5w1s", out, root=glyphs_root, workers=1)
    return out


def test_the_archive_has_the_pinned_digest(built: Path) -> None:
    """It is recognized by it, wherever it is."""
    archive = read_archive(built)
    assert archive.digest == benchmark("glyphs-5w1s").sha256
    assert benchmark_of(archive.digest) == benchmark("glyphs-5w1s")
    assert benchmark_of("0" * 64) is None


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("name", [name for name in benchmarks() if name.startswith("omniglot")])
def test_omniglot_has_the_pinned_digests(name: str, omniglot_root: Path, tmp_path: Path) -> None:
    """The real data give each Omniglot archive as it was pinned."""
    archive = mamldata.build_benchmark(name, tmp_path / name, root=omniglot_root, workers=1)
    assert archive.digest == benchmark(name).sha256


def test_a_whole_archive_needs_no_data(built: Path, tmp_path: Path) -> None:
    """An archive that was copied here is used as it is; if a shard of it is missing, the images are needed."""
    shutil.copytree(built, tmp_path / "copy")
    digest = benchmark("glyphs-5w1s").sha256
    assert mamldata.build_benchmark("glyphs-5w1s", tmp_path / "copy", root=tmp_path / "empty").digest == digest
    (tmp_path / "copy" / "test-00000.tar").unlink()
    with pytest.raises(DataMissingError, match="mamldata fetch glyphs"):
        mamldata.build_benchmark("glyphs-5w1s", tmp_path / "copy", root=tmp_path / "empty")


def test_other_images_are_refused_before_an_episode(
    change: Callable[..., None], glyphs_root: Path, tmp_path: Path
) -> None:
    """The error names both digests and says how to get and check the right images; nothing is written."""
    change(bank_sha256="1" * 64)
    with pytest.raises(DamagedError, match=rf"sha256 8d7d\w+, but .* has {'1' * 64}.*mamldata verify glyphs"):
        mamldata.build_benchmark("glyphs-5w1s", tmp_path / "out", root=glyphs_root)
    assert not (tmp_path / "out").exists()


def test_another_digest_is_refused(change: Callable[..., None], glyphs_root: Path, tmp_path: Path) -> None:
    """Of the same images: the error names both digests, the version, and what to do; also when it is built already."""
    change(sha256="1" * 64)
    text = (
        rf"out is not the benchmark glyphs-5w1s: its digest is c1c2\w+, but.*{'1' * 64}.*{mamldata.__version__}.*verify"
    )
    for _ in range(2):
        with pytest.raises(DamagedError, match=text):
            mamldata.build_benchmark("glyphs-5w1s", tmp_path / "out", root=glyphs_root, workers=1)


def test_one_that_is_not_pinned_is_built(change: Callable[..., None], glyphs_root: Path, tmp_path: Path) -> None:
    """Its archive is what the definition says, and has no name by its digest."""
    change(sha256=None, bank_sha256=None)
    archive = mamldata.build_benchmark("glyphs-5w1s", tmp_path / "out", root=glyphs_root, workers=1)
    assert {name: split.episodes for name, split in archive.splits.items()} == {"test": 100}
    assert benchmark_of(archive.digest) is None


def test_a_place_that_holds_something_else(glyphs_root: Path, tmp_path: Path) -> None:
    """Another archive there is never overwritten, nor taken for the benchmark."""
    episodes = {"test": 2}
    mamldata.build("glyphs", tmp_path / "a", episodes=episodes, root=glyphs_root, workers=1)
    with pytest.raises(RequestError, match=r"already holds another archive \(test 2 episodes there, 100 asked for\)"):
        mamldata.build_benchmark("glyphs-5w1s", tmp_path / "a", root=glyphs_root, workers=1)
