"""Pages on archives, runs and comparisons: what they say is so, whatever names say stays text, and browsers show it."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from PIL import Image

from cli.main import main
from mamldata.archive.index import index_sum, read_archive
from mamldata.bank.format import Bank, map_images
from mamldata.errors import DamagedError, RequestError
from mamldata.io.digest import canonical_json, sha256_bytes
from mamldata.pipeline import build
from mamldata.preview import episode
from mamldata.sources.open import open_archive
from trainer.data import archive_data
from trainer.evaluation import evaluate
from trainer.intervals import half_width
from trainer.loop import train
from trainer.reports.archive_page import archive_page
from trainer.reports.comparison_page import comparison_page
from trainer.reports.page import save_page
from trainer.reports.pictures import data_uri
from trainer.reports.run_page import run_page
from trainer.results import read_result, save_result, worst_episodes
from trainer.runs import metrics
from trainer.settings import TrainSettings

NOW = datetime(2020, 1, 2, 3, 4, tzinfo=UTC)
SETTINGS = TrainSettings(
    steps=4, eval_every=2, eval_episodes=4, meta_batch_size=2, log_every=1, filters=4, device="cpu", inner_lr=0.1
)
EVIL = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' style='x",
    "\u202eevil\u2066",
    "名" * 5000,
    "{{ 7 }}",
)


@pytest.fixture(scope="module")
def places(glyphs_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives ``full`` and ``thin`` of the same 3-way episodes, and ``run``, trained and evaluated on ``full``."""
    place = tmp_path_factory.mktemp("pages")
    for kind in ("full", "thin"):
        counts = {"train": 30, "val": 4, "test": 8}
        options: dict[str, Any] = {"n_way": 3, "k_query": 2, "episodes": counts, "seed": 3, "workers": 1}
        build("glyphs", place / kind, root=glyphs_root, thin=kind == "thin", **options)
    data = archive_data(place / "full")
    train(SETTINGS, data, place / "run")
    save_result(evaluate(place / "run", data, episodes=8, device="cpu"))
    return place


def decoded(address: str) -> npt.NDArray[np.uint8]:
    """The pixels of a picture in a page."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


class Elements(HTMLParser):
    """The elements of a page with the names of their attributes, and what they refer to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[tuple[str, ...]] = Counter()
        self.refers: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag, *(name for name, _ in attributes)] += 1
        self.refers += [value or "" for name, value in attributes if name in {"src", "href", "xlink:href", "action"}]

    def handle_data(self, data: str) -> None:
        self.text += data


def written(template: str, content: dict[str, Any], out: Path) -> Elements:
    """The elements of a page, which refers to nothing outside and is below 5 MB."""
    assert save_page(out, template, content) == out.stat().st_size < 5_000_000
    page = out.read_text(encoding="utf-8")
    elements = Elements(page)
    assert all(one.startswith(("data:image/", "#")) for one in elements.refers)
    assert all(one.startswith(("data:image/", "#")) for one in re.findall(r"url\(([^)]*)\)", page))
    assert "@import" not in page
    return elements


@pytest.mark.parametrize("kind", ["full", "thin"])
def test_an_archives_page_counts_right(places: Path, kind: str, tmp_path: Path) -> None:
    """Digest, verdict, classes and occurrences are those of the archive, counted over all its episodes."""
    archive = read_archive(places / kind)
    page = archive_page(places / kind, NOW)
    assert page["problems"] == []
    elements = written("archive", page, tmp_path / "page.html")
    assert f"sha256:{archive.digest}" in elements.text
    assert "Whole: every byte verified on 2020-01-02 03:04 UTC." in elements.text
    source = open_archive(places / "full", "train")
    table = source.table
    places_of = Counter(name for index in range(30) for name in source.class_labels(index))
    (split,) = (one for one in page["splits"] if one["name"] == "train")
    named = {one["name"]: one["episodes"] for one in split["listed"]}
    assert set(named) == set(table.names)
    for name, count in named.items():
        assert count == sum(times for label, times in places_of.items() if label.partition(", turned")[0] == name)
    drawn = source._sampler.sample(0, 30)[..., 1:]
    counts = Counter(Counter(drawn.reshape(-1).tolist()).values())
    assert (split["most"], split["images"] - split["never"]) == (max(counts), sum(counts.values()))
    assert split["mean"] == pytest.approx(drawn.size / split["images"])


@pytest.mark.parametrize("kind", ["full", "thin"])
def test_the_gallery_shows_each_class(places: Path, kind: str, glyphs_bank: Bank) -> None:
    """Each cell of the sheet is an image of its class, not turned; of a full archive, black if no episode has it."""
    images = np.asarray(map_images(glyphs_bank.path, glyphs_bank.shape))[..., 0]
    for split in archive_page(places / kind, NOW)["splits"]:
        table = read_archive(places / kind).splits[split["name"]].classes
        base = np.flatnonzero(table.quarter_turns == 0)
        sheet, black = decoded(split["sheet"]), 0
        for number, entry in enumerate(base.tolist()):
            row, column = divmod(number, split["columns"])
            cell = sheet[28 * row : 28 * row + 28, 28 * column : 28 * column + 28]
            own = images[table.first_row[entry] : table.first_row[entry] + table.images[entry]]
            black += (none := not split["listed"][number]["episodes"] and kind == "full")
            assert not cell.any() if none else (cell == own).all(axis=(1, 2)).any(), (split["name"], number)
        assert black < len(base)


def test_the_episodes_of_an_archive(places: Path) -> None:
    """Each class has its support and query images in a strip, under its name."""
    (split,) = (one for one in archive_page(places / "thin", NOW, verify=False)["splits"] if one["name"] == "test")
    assert len(split["shown"]) == 8
    for index, shown in enumerate(split["shown"]):
        support, query, names = episode(open_archive(places / "full", "test"), index)
        assert [row["name"] for row in shown["rows"]] == names
        for way, row in enumerate(shown["rows"]):
            assert np.array_equal(decoded(row["support"]), np.concatenate(list(support[way, ..., 0]), axis=1))
            assert np.array_equal(decoded(row["query"]), np.concatenate(list(query[way][..., 0]), axis=1))


def test_a_damaged_archive_shows_what_is_damaged(places: Path, tmp_path: Path) -> None:
    """A lost shard, a changed byte and a changed index are named; what they do not concern is shown."""
    folder = tmp_path / "damaged"
    shutil.copytree(places / "full", folder)
    (folder / "val-00000.tar").unlink()
    data = bytearray((folder / "test-00000.tar").read_bytes())
    data[2000] ^= 1
    (folder / "test-00000.tar").write_bytes(data)
    page = archive_page(folder, NOW)
    elements = written("archive", page, tmp_path / "page.html")
    assert "Damaged, as verified on 2020-01-02" in elements.text
    for file in ("val-00000.tar", "test-00000.tar"):
        assert any(file in problem for problem in page["problems"])
    shown = {split["name"]: (bool(split["shown"]), bool(split["sheet"])) for split in page["splits"]}
    assert (shown["train"], shown["val"]) == ((True, True), (False, False))
    (folder / "archive.json").write_bytes((folder / "archive.json").read_bytes()[:-9])
    page = archive_page(folder, NOW)
    assert [str(folder / "archive.json") in problem for problem in page["problems"]] == [True]
    assert "archive.json" in written("archive", page, tmp_path / "page.html").text


def renamed(archive: Path, out: Path, rename: Callable[[int], str]) -> Path:
    """A copy of an archive whose classes have other names."""
    shutil.copytree(archive, out)
    document = json.loads((out / "archive.json").read_bytes())
    for split in document["splits"].values():
        turned = 1 if "images" in document else 4
        for number, entry in enumerate(split["classes"]):
            entry["name"] = rename(number // (turned if "quarter_turns" in entry else 1))
    document["dataset"] = rename(0)
    data = canonical_json(document)
    (out / "archive.json").write_bytes(data)
    (out / "archive.json.sha256").write_bytes(index_sum(sha256_bytes(data)))
    return out


def test_hostile_names_stay_text(places: Path, tmp_path: Path) -> None:
    """Names with markup, quotes, marks of direction and any length make the same elements as harmless ones."""
    plain = archive_page(renamed(places / "thin", tmp_path / "plain", lambda n: f"class {n}"), NOW)
    evil = archive_page(renamed(places / "thin", tmp_path / "evil", lambda n: f"{EVIL[n % len(EVIL)]} {n}"), NOW)
    harmless = written("archive", plain, tmp_path / "plain.html")
    hostile = written("archive", evil, tmp_path / "evil.html")
    assert hostile.tags == harmless.tags
    assert "<script>alert(1)</script>" in hostile.text
    assert "\\u202eevil" in hostile.text
    assert not {"\u202e", "\u2066"} & set(hostile.text)
    assert "名" * 1000 not in hostile.text
    assert "{{ 7 }}" in hostile.text


def test_a_hostile_run_stays_text(places: Path, tmp_path: Path) -> None:
    """What a run's files say cannot add elements either."""
    pages = []
    for number, texts in enumerate((["plain"] * len(EVIL), EVIL)):
        folder = tmp_path / f"run{number}"
        shutil.copytree(places / "run", folder)
        (file,) = (folder / "results").iterdir()
        content = json.loads(file.read_text())
        content["class_names"] = [f"{texts[n % len(texts)]} {n}" for n in range(len(content["class_names"]))]
        content["environment"]["versions"] = {f"{text} {n}": text for n, text in enumerate(texts)}
        content["evaluation"] |= {"dataset": texts[0], "bn": texts[1]}
        content["target"]["source"] = texts[4] + "/none"
        content["checkpoint"]["file"] = texts[1]
        file.write_text(json.dumps(content))
        config = json.loads((folder / "config.json").read_text())
        config["data"] |= {"dataset": texts[0], "split_scheme": texts[2]}
        config["start"] = {"file": texts[3]}
        (folder / "config.json").write_text(json.dumps(config))
        page = run_page(folder, NOW) | {"eval_command": texts[1]}
        pages.append(written("run", page, tmp_path / "page.html"))
    assert pages[0].tags == pages[1].tags
    assert EVIL[0] in pages[1].text


def test_a_runs_page_shows_the_hardest_episodes(places: Path, tmp_path: Path) -> None:
    """Hardest first, with the pictures of those episodes and the answers that were given; then the easiest."""
    page = run_page(places / "run", NOW)
    assert page["problems"] == []
    (file,) = (places / "run" / "results").iterdir()
    result = read_result(file)
    ordered = worst_episodes(result, 8)
    shown = [*page["hardest"], *page["easiest"]]
    assert [one["title"].split(":")[0] for one in shown] == [
        f"episode {one.index}" for one in [*ordered[:6], *ordered[:5:-1]]
    ]
    for one, kept in zip(shown, [*ordered[:6], *ordered[:5:-1]], strict=True):
        assert f"{kept.right} of 6 right" in one["title"]
        assert [label for row in one["rows"] for label in row["given"]].count(0) == kept.right
        answers = [label or number for number, row in enumerate(one["rows"], 1) for label in row["given"]]
        assert answers == [label + 1 for label in kept.given]
        support, _, names = episode(open_archive(places / "full", "test"), kept.index)
        assert [row["name"] for row in one["rows"]] == names
        assert np.array_equal(decoded(one["rows"][2]["support"]), support[2, 0, ..., 0])
    elements = written("run", page | {"eval_command": ""}, tmp_path / "page.html")
    assert f"{100 * result.evaluation['accuracy']:.2f}" in elements.text
    marked = {one["name"] for one in page["table"] if one["value"] != one["default"]}
    assert {"steps", "filters", "inner_lr"} <= marked
    assert "seed" not in marked
    assert page["confusion"]["pairs"][0][2] == max(count for *_, count, _ in page["confusion"]["pairs"])


def test_a_run_whose_episodes_are_elsewhere(places: Path, tmp_path: Path) -> None:
    """Without its archive, or with another one, a run's page lacks the pictures and says why; a place can be given."""
    folder = tmp_path / "run"
    shutil.copytree(places / "run", folder)
    (file,) = (folder / "results").iterdir()
    for place, why in (
        ("gone", "gone is not an archive"),
        (str(places / "thin"), "archive_sha256 differs"),
        ("s3://b/a", "unasked"),
    ):
        content = json.loads(file.read_text())
        content["target"]["source"] = place
        file.write_text(json.dumps(content))
        page = run_page(folder, NOW)
        assert page["hardest"] == []
        assert [why in problem for problem in page["problems"]] == [True], page["problems"]
        elements = written("run", page | {"eval_command": ""}, tmp_path / "page.html")
        assert any(tag[0] == "svg" for tag in elements.tags)
    assert len(run_page(folder, NOW, data=places / "full")["hardest"]) == 6


def test_an_unfinished_run(places: Path, tmp_path: Path) -> None:
    """A run that a kill stopped has the curves so far, and the page says which command adds results."""
    folder = tmp_path / "run"
    shutil.copytree(places / "run", folder, ignore=shutil.ignore_patterns("results", "*.pt"))
    with (folder / metrics.NAME).open("a") as stream:
        stream.write('{"event": "train", "step": 5, "loss": 0.')
    page = run_page(folder, NOW) | {"eval_command": "mamldata eval run archive"}
    elements = written("run", page, tmp_path / "page.html")
    assert "mamldata eval run archive" in elements.text
    assert page["best"]["step"] in {2, 4}
    (folder / "config.json").write_text("[]")
    with pytest.raises(DamagedError, match=r"config.json is damaged"):
        run_page(folder, NOW)


@pytest.mark.parametrize("damage", [{"index": "0"}, {"loss": "x"}, None, "names"])
def test_a_damaged_result_is_named(places: Path, tmp_path: Path, damage: Any) -> None:
    """A result with a wrong index or loss, a class without a name, or no episodes is left out and named."""
    folder = tmp_path / "run"
    shutil.copytree(places / "run", folder)
    (file,) = (folder / "results").iterdir()
    content = json.loads(file.read_text())
    if damage == "names":
        content["class_names"][0] = 5
    else:
        content["episodes"] = [] if damage is None else [content["episodes"][0] | damage, *content["episodes"][1:]]
    file.write_text(json.dumps(content))
    page = run_page(folder, NOW)
    assert page["results"] == []
    assert [str(file) in problem for problem in page["problems"]] == [True]


def test_numbers_that_are_none(places: Path, tmp_path: Path) -> None:
    """Numbers of a result or of a log that are texts leave out a picture or a line; the page is written."""
    folder = tmp_path / "run"
    shutil.copytree(places / "run", folder)
    (file,) = (folder / "results").iterdir()
    content = json.loads(file.read_text())
    content |= {
        "right_by_step": ["a"],
        "environment": {**content["environment"], "versions": "none"},
        "checkpoint": {"file": {}},
    }
    content["evaluation"] |= {"interval": "wide", "bn": [1]}
    file.write_text(json.dumps(content))
    with (folder / metrics.NAME).open("a") as stream:
        stream.write('{"event": "val", "step": "9", "loss": 1, "accuracy": 1, "interval": 0}\n[7]\n')
    page = run_page(folder, NOW)
    assert page["step_accuracy"] == ""
    assert page["best"]["step"] in {2, 4}
    elements = written("run", page | {"eval_command": ""}, tmp_path / "page.html")
    assert "The numbers for this picture are missing." in elements.text


def compared(folder: Path, names: tuple[str, ...] = ("maml", "fomaml", "random")) -> Path:
    """A comparison of made-up numbers."""
    chance, entries = np.random.default_rng(0), []
    for number, name in enumerate(names):
        shares = (0.5 + 0.1 * number + 0.05 * chance.standard_normal(20)).tolist()
        measured = {"accuracy": statistics.fmean(shares), "interval": 0.01, "deviation": 0.05, "bn": "transductive"}
        measured |= {"accuracy_by_step": [0.2, 0.6], "inner_steps": 1, "split": "test", "episodes": 20}
        measured |= {"dataset": "d", "split_scheme": "s", "n_way": 5, "k_shot": 1, "k_query": 5}
        costs = {"milliseconds": 10.0 * (number + 1), "fastest": 1.0, "slowest": 99.0, "peak_mib": 2.0}
        settings = {**TrainSettings(algorithm=("maml", "fomaml", "random")[number]).resolved()}
        entries.append(
            {"name": name, "settings": settings, "evaluation": measured, "accuracy_by_episode": shares}
            | {"ahead": 0.1 * number, "ahead_interval": 0.02, "costs": costs if number < 2 else None}
        )
    document = {"reference": names[0], "verdict": "So it is.", "entries": entries}
    folder.mkdir(exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(document))
    return folder


def test_a_comparisons_page(tmp_path: Path) -> None:
    """Every two algorithms are compared episode by episode; a name of a folder elsewhere is refused."""
    page = comparison_page(compared(tmp_path / "compared"), NOW)
    shares = [
        one["accuracy_by_episode"] for one in json.loads((tmp_path / "compared/compare.json").read_text())["entries"]
    ]
    gaps = [a - b for a, b in zip(shares[2], shares[0], strict=True)]
    assert page["differences"][2][0] == (statistics.fmean(gaps), half_width(statistics.stdev(gaps), 20))
    assert page["differences"][0][2][0] == -page["differences"][2][0][0]
    assert page["differences"][1][1] is None
    elements = written("comparison", page, tmp_path / "page.html")
    assert "So it is." in elements.text
    assert page["trade"].count("fomaml") == 1
    for name in ("..", "../other", ""):
        with pytest.raises(DamagedError, match=r"compare.json is damaged"):
            comparison_page(compared(tmp_path / "compared", ("maml", name, "random")), NOW)
    document = json.loads((compared(tmp_path / "compared") / "compare.json").read_text())
    (tmp_path / "compared/compare.json").write_text(json.dumps({**document, "reference": "none"}))
    with pytest.raises(DamagedError, match=r"compare.json is damaged"):
        comparison_page(tmp_path / "compared", NOW)
    with pytest.raises(RequestError, match="no finished comparison"):
        comparison_page(tmp_path, NOW)


def test_a_hostile_comparison_stays_text(tmp_path: Path) -> None:
    """Names of algorithms are text in tables and in drawings, whatever letters they have."""
    plain = comparison_page(compared(tmp_path / "plain"), NOW)
    evil = comparison_page(compared(tmp_path / "evil", ("<b>$x_$<b>", "名\u202e", '"&amp;<script>')), NOW)
    tags = [
        written("comparison", page, tmp_path / "page.html").tags - Counter({("tspan", "x", "y"): 99})
        for page in (plain, evil)
    ]
    assert {tag[0] for tag in tags[0]} == {tag[0] for tag in tags[1]}
    assert tags[0]["script",] == tags[1]["script",] == 1


def test_pages_repeat(places: Path, tmp_path: Path) -> None:
    """The same input at the same time gives the same bytes, and drawings in a page share no identifier."""
    for name in ("a", "b"):
        save_page(tmp_path / f"{name}.html", "archive", archive_page(places / "full", NOW))
    page = (tmp_path / "a.html").read_text()
    assert page == (tmp_path / "b.html").read_text()
    identifiers = Counter(re.findall(r'\sid="([^"]*)"', page))
    assert len(identifiers) > 3
    assert max(identifiers.values()) == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_stay_small(channels: int) -> None:
    """A picture is shrunk until its address has the length that it may have; few small images stay as they are."""
    noise = np.random.default_rng(0).integers(0, 256, (50, 64, 64, channels), dtype=np.uint8)
    address = data_uri(noise, 10, 20_000)
    assert len(address) <= 20_000
    height, width = decoded(address).shape[:2]
    assert width == pytest.approx(2 * height, abs=2)
    assert decoded(data_uri(noise, 10, 10_000_000)).shape[:2] == (5 * 64, 10 * 64)


@pytest.fixture
def report() -> Callable[..., Any]:
    """Runs the command; the result is that of click's runner."""
    return lambda *words: CliRunner().invoke(main, ["report", *map(str, words)])


def test_the_command(places: Path, tmp_path: Path, report: Callable[..., Any]) -> None:
    """It tells the three kinds apart, adds the command that a run without results needs, and prints JSON."""
    compared(tmp_path / "compared")
    shutil.copytree(places / "run", tmp_path / "run", ignore=shutil.ignore_patterns("results"))
    for kind, place in (("archive", places / "thin"), ("comparison", tmp_path / "compared"), ("run", tmp_path / "run")):
        out = tmp_path / "new folder" / f"{kind}.html"
        done = report(place, "--out", out, "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["kind"] == kind
        assert str(place) in Elements(out.read_text()).text
    assert f"mamldata eval {tmp_path / 'run'} {places / 'full'}" in Elements(out.read_text()).text


def test_the_command_refuses(
    places: Path, tmp_path: Path, report: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another ending, options of another kind, what is none of the three, and a machine without matplotlib."""
    out = tmp_path / "page.html"
    for words, said in (
        ((places / "thin", "--out", tmp_path / "page.json"), "ends in .html"),
        ((places / "thin", "--out", out, "--data", "glyphs"), "--data is for a run"),
        ((places / "run", "--out", out, "--no-verify"), "--verify is for an archive"),
        ((tmp_path, "--out", out), "is not an archive"),
    ):
        done = report(*words)
        assert (done.exit_code, done.stdout) == (2, "")
        assert said in done.stderr
    monkeypatch.setattr("trainer.reports.plots.have_matplotlib", lambda: False)
    assert "pip install matplotlib" in report(places / "thin", "--out", out).stderr
    assert list(tmp_path.iterdir()) == []


def test_an_archives_page_needs_no_torch(places: Path, tmp_path: Path) -> None:
    """A page on an archive is written without importing torch."""
    code = (
        "import sys; from cli.main import main; "
        f"main(['report', {str(places / 'thin')!r}, '--out', {str(tmp_path / 'a.html')!r}], standalone_mode=False); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Put in place of a page's script: its width and the window's; how many pictures have not come, are hidden, are there.
LOOK = """<script>
addEventListener("load", () => {
  const pictures = [...document.images];
  const late = pictures.filter((image) => !image.naturalWidth).length;
  const hidden = pictures.filter((image) => !image.offsetWidth).length;
  parent.document.body.dataset.look = [document.documentElement.scrollWidth, innerWidth, late, hidden, pictures.length];
});
</script>"""


def browsed(page: Path, profile: Path, *options: str) -> str:
    """What a browser prints when it has loaded a page, without a word of complaint."""
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", *options]
    done = subprocess.run(
        [*command, "--enable-logging=stderr", "--v=0", page.as_uri()], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("kind", ["archive", "run", "comparison"])
def test_a_browser_shows_the_page(places: Path, tmp_path: Path, kind: str) -> None:
    """Its script turns the leaves; without it all pictures are there, and nothing is wider than a phone or a screen."""
    page = {
        "archive": lambda: archive_page(places / "full", NOW),
        "run": lambda: run_page(places / "run", NOW) | {"eval_command": ""},
        "comparison": lambda: comparison_page(compared(tmp_path / "compared"), NOW),
    }[kind]()
    out, plain, profile = tmp_path / "page.html", tmp_path / "plain.html", tmp_path / "profile"
    save_page(out, kind, page)
    text = out.read_text()
    leaves = text.count('class="leaves"')
    dom = browsed(out, profile, "--dump-dom")
    assert dom.count('class="leaves turned"') == dom.count('class="turner"') == leaves
    assert dom.count('class="episode now"') == leaves
    inside = html.escape(re.sub("<meta http-equiv[^>]*>", "", text).partition("<script>")[0] + LOOK)
    for width in (390, 1280):
        plain.write_text(f'<body><iframe width="{width}" height="2000" srcdoc="{inside}"></iframe></body>')
        (found,) = re.findall(r'data-look="([0-9,]+)"', browsed(plain, profile, "--dump-dom"))
        needed, inner, *missing, pictures = map(int, found.split(","))
        assert needed <= inner <= width
        assert missing == [0, 0]
        assert pictures == text.count("<img ")
