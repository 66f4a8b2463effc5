"""Cards, Croissant metadata and citations: what is published beside an archive."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from cli.main import main
from mamldata.archive.benchmarks import benchmarks
from mamldata.archive.index import read_archive
from mamldata.archive.verify import verify_archive
from mamldata.card import write_cards
from mamldata.citation import bibtex, known_dataset, papers
from mamldata.datasets.load import load_manifest
from mamldata.datasets.toml import builtin_names
from mamldata.errors import RequestError
from mamldata.io.digest import sha256_file
from mamldata.sources.open import open_archive
from mamldata.version import __version__
from trainer.maml.algorithms import ALGORITHMS

PROJECT = Path(__file__).parents[2]
COUNTS = ["--train", "8", "--val", "2", "--test", "3", "--k-query", "2", "--workers", "1"]
needs = {
    name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} of the group publish is missing")
    for name in ("mlcroissant", "datasets")
}


def run(*arguments: object) -> Result:
    """A command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module", params=["full", "thin"])
def built(request: pytest.FixtureRequest, glyphs_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small archive of each kind. Shared: do not write to it, copy it."""
    out = tmp_path_factory.mktemp("published") / "glyphs-5w1s"
    thin = ["--thin"] if request.param == "thin" else []
    done = run("build", "glyphs", "--out", out, *COUNTS, *thin, "--root", glyphs_root)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture
def archive(built: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(built, tmp_path / "archive"))


@pytest.fixture
def published(archive: Path) -> Path:
    """A copy of it, with its card and its metadata."""
    assert run("card", archive).exit_code == 0
    return archive


def entries(text: str) -> dict[str, dict[str, str]]:
    """BibTeX entries by key, read by BibTeX's own rules: values in balanced braces, separated by commas."""
    found: dict[str, dict[str, str]] = {}
    place = 0
    while begun := re.compile(r"\s*@([a-z]+)\{([A-Za-z0-9+-]+)").match(text, place):
        fields, place = {}, begun.end()
        while field := re.compile(r"\s*,\s*([a-z]+)\s*=\s*\{").match(text, place):
            start = place = field.end()
            depth = 1
            while depth:
                depth += {"{": 1, "}": -1}.get(text[place], 0)
                depth *= text[place] != "\\" or text[place + 1] not in "{}"
                place += 1
            fields[field[1]] = text[start : place - 1]
        closed = re.compile(r"\s*\}").match(text, place)
        assert closed, text[place : place + 80]
        assert begun[2] not in found, f"{begun[2]} comes twice"
        found[begun[2]], place = {"type": begun[1], **fields}, closed.end()
    assert not text[place:].strip(), text[place : place + 80]
    return found


def test_a_card_leaves_the_archive_as_it_is(archive: Path, glyphs_root: Path) -> None:
    """The digest, verify, streams and a repeated or repairing build take the folder as before."""
    digest = read_archive(archive).digest
    before = {path.name: path.read_bytes() for path in archive.iterdir()}
    assert run("card", archive).exit_code == 0
    assert read_archive(archive).digest == digest
    assert verify_archive(archive) == []
    assert open_archive(archive, "test").episodes == 3
    files = {path.name: path.read_bytes() for path in archive.iterdir()}
    assert {name: files.pop(name) for name in ("README.md", "croissant.json")}
    assert files == before
    next(path for path in archive.iterdir() if path.suffix in {".tar", ".npy"}).unlink()
    thin = ["--thin"] if read_archive(archive).thin else []
    again = run("build", "glyphs", "--out", archive, *COUNTS, *thin, "--root", glyphs_root)
    assert again.exit_code == 0, again.output
    assert verify_archive(archive, digest=digest) == []
    assert {"README.md", "croissant.json"} <= {path.name for path in archive.iterdir()}


def test_the_same_archive_gets_the_same_cards(published: Path, tmp_path: Path) -> None:
    """Byte for byte, elsewhere and again; the second time nothing is asked."""
    assert run("card", published).exit_code == 0
    assert run("card", published, "--out", tmp_path / "site").exit_code == 0
    for name in ("README.md", "croissant.json"):
        assert (tmp_path / "site" / name).read_bytes() == (published / name).read_bytes()


@pytest.mark.parametrize("name", ["README.md", "croissant.json"])
def test_a_users_file_is_kept(archive: Path, name: str) -> None:
    """It is replaced only if that is asked for; until then neither of the two files is written."""
    (archive / name).write_text("mine")
    files = set(archive.iterdir())
    refused = run("card", archive)
    assert refused.exit_code == 2
    assert f"{name} exists and holds something else" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert (archive / name).read_text() == "mine"
    assert set(archive.iterdir()) == files
    assert run("card", archive, "--overwrite").exit_code == 0
    assert (archive / name).read_text() != "mine"


def test_the_library_names_no_option(archive: Path) -> None:
    """What is in the way is said without the command line's words."""
    (archive / "README.md").mkdir()
    with pytest.raises(RequestError, match="exists and holds something else") as caught:
        write_cards(read_archive(archive), archive, None)
    assert "--" not in str(caught.value)


def test_a_card_of_an_archive_at_an_address_needs_a_folder() -> None:
    """Wrong usage is told before anything is fetched."""
    refused = run("card", "https://example.org/archive")
    assert refused.exit_code == 2
    assert "'--out'" in refused.stderr


def test_croissant_names_every_file(published: Path) -> None:
    """With its length and SHA-256; and licence, citation and specification; the date is the user's or left out."""
    about = json.loads((published / "croissant.json").read_text())
    objects = [one for one in about["distribution"] if one["@type"] == "cr:FileObject"]
    named = {one["contentUrl"]: (one["contentSize"], one["sha256"]) for one in objects}
    shards = [path for path in published.iterdir() if path.suffix in {".tar", ".npy"}]
    expected = {path.name: (f"{path.stat().st_size} B", sha256_file(path)) for path in shards}
    index = published / "archive.json"
    assert named == {**expected, "archive.json": (f"{index.stat().st_size} B", read_archive(published).digest)}
    assert about["conformsTo"][0] == "http://mlcommons.org/croissant/1.1"
    assert about["license"] == "https://spdx.org/licenses/MIT.html"
    assert read_archive(published).digest in about["citeAs"]
    assert "datePublished" not in about
    assert run("card", published, "--date", "2026-02-03", "--overwrite").exit_code == 0
    assert json.loads((published / "croissant.json").read_text())["datePublished"] == "2026-02-03"


def test_a_card_of_an_unknown_dataset(archive: Path, tmp_path: Path) -> None:
    """Without its manifest the licence is unknown and no paper is named; with it, they are the manifest's."""
    document = json.loads((archive / "archive.json").read_text())
    document["dataset"] = "my-letters"
    text = json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n"
    (archive / "archive.json").write_text(text)
    (archive / "archive.json.sha256").unlink()
    alone = run("card", archive)
    assert alone.exit_code == 0, alone.output
    assert "--manifest" in alone.stderr
    assert "\nlicense: unknown\n" in (archive / "README.md").read_text()
    assert "license" not in json.loads((archive / "croissant.json").read_text())
    source = (PROJECT / "manifests/glyphs.toml").read_text().replace('name = "glyphs"', 'name = "my-letters"')
    source = source.replace('"MIT"', '"Ask me & see 100 %"').replace("The embedded", "{My} 50 % \\\\of")
    (tmp_path / "my.toml").write_text(source)
    assert run("card", archive, "--manifest", tmp_path / "my.toml", "--overwrite").exit_code == 0
    assert "\nlicense: other\nlicense_name: my-letters-terms\n" in (archive / "README.md").read_text()
    cited = run("cite", archive, "--manifest", tmp_path / "my.toml")
    other = run("cite", archive, "--manifest", "glyphs")
    assert other.exit_code == 2
    assert "glyphs is of the dataset glyphs, but these episodes are of my-letters" in other.stderr
    assert r"(My) 50 \% \textbackslash{}of" in entries(cited.stdout)["my-letters"]["note"]


def test_an_archive_cannot_write_into_the_card(archive: Path, tmp_path: Path) -> None:
    """A name with ends of lines, braces or commands stays a name."""
    document = json.loads((archive / "archive.json").read_text())
    document["dataset"] = 'x"\n---\nlicense: mit}\n@misc{evil, \\input{x}'
    (archive / "archive.json").write_text(json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n")
    (archive / "archive.json.sha256").unlink()
    assert run("card", archive).exit_code == 0
    text = (archive / "README.md").read_text()
    assert text.count("\n---\n") == 1
    assert "license: mit" not in text.splitlines()
    assert "\\input" not in run("cite", archive).stdout.replace("textbackslash{}input", "")
    assert len(entries(run("cite", archive).stdout)) == 2


@pytest.mark.parametrize("name", builtin_names())
def test_every_dataset_has_its_papers(name: str) -> None:
    """Each dataset and each of its split schemes, by name."""
    assert papers(f"dataset {name}")
    for scheme in load_manifest(name).schemes:
        assert papers(f"split-scheme {name}/{scheme}") or scheme == "seeded", scheme


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_its_paper(name: str) -> None:
    """Baselines without one are cited as this software's."""
    assert papers(f"algorithm {name}")


def test_the_papers_are_bibtex() -> None:
    """Each has an author, a title and, but for this software, a year; and no keyword names what is not here."""
    everything = (PROJECT / "manifests/citations.bib").read_text()
    found = entries("\n".join(line for line in everything.splitlines() if not line.startswith("%")))
    assert all({"author", "title", "keywords"} <= fields.keys() for fields in found.values())
    assert [key for key, fields in found.items() if "year" not in fields] == ["mamldata"]
    known = {f"dataset {name}" for name in builtin_names()} | {
        f"algorithm {name}" for name in [*ALGORITHMS, "protonet"]
    }
    known |= {f"split-scheme {name}/{scheme}" for name in builtin_names() for scheme in load_manifest(name).schemes}
    named = {word for fields in found.values() for word in fields["keywords"].split(", ")}
    assert named - known <= {"software", "query_alpha", "algorithm protonet"}
    cff = (PROJECT / "CITATION.cff").read_text()
    assert found["mamldata"]["title"].replace("{MAML}", "MAML") in cff


@pytest.mark.parametrize("name", benchmarks())
def test_every_benchmark_can_be_cited(name: str) -> None:
    """Its digest, if pinned, its split scheme and the papers of its dataset."""
    wanted = benchmarks()[name]
    own, *others = entries(run("cite", name).stdout).values()
    assert f"split scheme {wanted.split_scheme}" in own["note"]
    assert wanted.sha256 is None or wanted.sha256 in own["note"]
    assert [other["title"] for other in others]


def test_an_archive_is_cited_by_its_digest(built: Path) -> None:
    """With dataset, version, split scheme and mamldata's version."""
    done = run("cite", built)
    archive = read_archive(built)
    (own,) = (fields for key, fields in entries(done.stdout).items() if archive.digest[:12] in key)
    for fact in ("dataset glyphs", "version 1", "split scheme seeded", archive.digest, f"mamldata {__version__}"):
        assert fact in own["note"]
    assert json.loads(run("cite", built, "--json").stdout)["bibtex"] == done.stdout


def test_a_namesake_of_a_dataset_gets_none_of_its_papers() -> None:
    """Other images or another version are another dataset; unequal queries have a paper of their own."""
    about = {"dataset": "omniglot", "split_scheme": "maml", "n_way": 5, "k_shot": 1, "image_shape": [28, 28, 1]}
    pinned = load_manifest("omniglot").image.bank_sha256[28]
    assert known_dataset({**about, "bank_sha256": pinned})
    assert known_dataset({**about, "bank_sha256": "0" * 64}) is None
    assert known_dataset({**about, "bank_sha256": []}) is None  # of a forged checkpoint
    assert known_dataset({**about, "bank_sha256": pinned, "dataset_version": "2"}) is None
    assert "lake2015human" not in entries(bibtex("x", about, None, None))
    assert "veilleux2021realistic" in entries(bibtex("x", {**about, "query_alpha": 2}, None, None))


@pytest.mark.slow
def test_a_run_is_cited_with_its_algorithm(built: Path, tmp_path: Path) -> None:
    """By folder and by checkpoint, with the version that trained it."""
    quick = [
        "--steps",
        "1",
        "--meta-batch-size",
        "2",
        "--eval-episodes",
        "2",
        "--filters",
        "4",
        "--device",
        "cpu",
        "--algorithm",
        "reptile",
    ]
    assert run("train", built, "--out", tmp_path / "run", *quick).exit_code == 0
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace(f'"mamldata": "{__version__}"', '"mamldata": "0.0.7"'))
    by_folder = run("cite", tmp_path / "run").stdout
    found = entries(by_folder)
    assert "nichol2018first" in found
    assert any("mamldata 0.0.7" in fields.get("note", "") for fields in found.values())
    (checkpoint,) = (tmp_path / "run").glob("*.pt")
    assert run("cite", checkpoint).stdout == by_folder
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "settings": {**content["settings"], "algorithm": 3}}, checkpoint)
    assert "algorithm must be one of" in run("cite", checkpoint).stderr


def test_a_misspelt_benchmark() -> None:
    """The likely one is suggested."""
    refused = run("cite", "omniglot-5w1")
    assert refused.exit_code == 2
    assert "Did you mean 'omniglot-5w1s'?" in refused.stderr


@needs["mlcroissant"]
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_mlcroissant_accepts_the_metadata(
    published: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No errors, no warning but the date's; it reads the classes and, from tars, each episode's arrays."""
    # It reads this when it is imported. It knows what it has unpacked by the name of the tar alone.
    monkeypatch.setenv("CROISSANT_CACHE", str(tmp_path_factory.mktemp("croissant")))
    import mlcroissant

    dataset = mlcroissant.Dataset(published / "croissant.json")
    assert not dataset.metadata.ctx.issues.errors
    assert all("datePublished" in warning for warning in dataset.metadata.ctx.issues.warnings)
    archive = read_archive(published)
    rows = list(dataset.records("test-classes"))
    table = archive.split("test").classes
    names = dict.fromkeys(table.names) if archive.thin else table.names
    assert [row["test-classes/name"].decode() for row in rows] == list(names)
    if archive.thin:
        return
    source = open_archive(published, "test")
    for row in dataset.records("test-query"):
        array = np.load(io.BytesIO(row["test-query/npy"]))
        support, query = np.empty((5, 1, 28, 28, 1), np.uint8), np.empty((5, 2, 28, 28, 1), np.uint8)
        source.read(np.array([row["test-query/episode"]]), support.reshape(-1), query.reshape(-1))
        assert np.array_equal(array, query)


@needs["datasets"]
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("card", [True, False], ids=["card", "no card"])
def test_hugging_face_opens_the_folder(archive: Path, card: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a card and without one: three splits, and the arrays of each episode."""
    if read_archive(archive).thin:
        pytest.skip("datasets has no reader for the arrays of a thin archive")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    from datasets import load_dataset

    if card:
        assert run("card", archive).exit_code == 0
    found = load_dataset(str(archive), streaming=True, cache_dir=str(tmp_path / "hf"))
    assert {name: len(list(rows)) for name, rows in found.items()} == {"train": 8, "validation": 2, "test": 3}
    first = next(iter(found["test"].with_format("numpy")))
    support, query = np.empty((5, 1, 28, 28, 1), np.uint8), np.empty((5, 2, 28, 28, 1), np.uint8)
    open_archive(archive, "test").read(np.array([0]), support.reshape(-1), query.reshape(-1))
    assert np.array_equal(first["support.npy"], support)
    assert np.array_equal(first["query.npy"], query)
    assert first["source.npy"].shape == (5, 4)
