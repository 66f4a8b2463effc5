"""The package as users install it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
PROJECT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout."""
    place = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(place), str(PROJECT)], check=True)
    return next(place.glob("mamldata-*.whl"))


def test_the_wheel_holds_manifests_and_types(wheel: Path):
    """Manifests and class lists are package data, and the packages are marked as typed; tests are left out."""
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"manifests/{path.name}" for path in (PROJECT / "manifests").glob("*.toml")} <= names
    assert {f"manifests/omniglot/{path.name}" for path in (PROJECT / "manifests/omniglot").iterdir()} <= names
    assert {f"mamldata/templates/{path.name}" for path in (PROJECT / "mamldata/templates").iterdir()} <= names
    assert "manifests/citations.bib" in names
    assert {"mamldata/py.typed", "trainer/py.typed", "cli/py.typed"} <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "docs/", "examples/")) for name in names)


def test_the_source_distribution_holds_the_examples(tmp_path: Path):
    """Programs and documents, with their pictures, come with the sources."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sources:
        names = {name.partition("/")[2] for name in sources.getnames()}
    for folder in ("docs", "docs/images", "examples"):
        expected = {f"{folder}/{path.name}" for path in (PROJECT / folder).iterdir() if path.is_file()}
        assert expected
        assert expected <= names


def fake_wheel(folder: Path, name: str, version: str, requires: str = "") -> Path:
    """A wheel without a module."""
    place = folder / f"{name}-{version}-py3-none-any.whl"
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    with zipfile.ZipFile(place, "w") as file:
        info = f"{name}-{version}.dist-info"
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return place


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("mamldata", []),
        ("mamldata[vision] torch==2.2.0", ["torchvision 0.17.0"]),  # as the hint says that a user gets
    ],
)
def test_an_older_torch_stays(wheel: Path, tmp_path: Path, asked: str, expected: list[str]):
    """Beside an older torch the wheel, and torchvision with it, are installed without exchanging that torch."""
    index = tmp_path / "index"
    index.mkdir()
    shutil.copy(wheel, index)
    (metadata,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA"))
    required = re.findall(
        r"^Requires-Dist: ([A-Za-z0-9_-]+)", zipfile.ZipFile(wheel).read(metadata).decode(), re.MULTILINE
    )
    assert "torch" in required
    for name in set(required) - {"torch", "torchvision"}:
        fake_wheel(index, name, "9999.0")
    old = fake_wheel(index, "torch", "2.2.0")
    fake_wheel(index, "torch", "2.9.0")
    fake_wheel(index, "torchvision", "0.17.0", "torch==2.2.0")
    fake_wheel(index, "torchvision", "0.24.0", "torch==2.9.0")
    place = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), "install", "--no-index", "--quiet"]
    subprocess.run([*pip, "--no-deps", str(old)], check=True)
    command = [*pip, "--dry-run", "--find-links", str(index), "--report", "-", *asked.split()]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    found = [f"{one['metadata']['name']} {one['metadata']['version']}" for one in report["install"]]
    assert [one for one in found if one.startswith("torch")] == expected
    assert any(one.startswith("mamldata") for one in found)


@pytest.fixture
def python(wheel: Path, tmp_path: Path) -> Path:
    """The interpreter of an environment with the wheel, and with the dependencies of the running one."""
    place = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    python = place / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*install, str(wheel)], check=True)
    # Not what is installed in editable mode: of a folder that a .pth file names, no .pth file is read.
    site = next(place.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def test_an_installed_wheel_works_from_any_folder(python: Path, tmp_path: Path):
    """In an environment with the wheel and its dependencies only, the command runs away from the checkout."""
    where = [str(python), "-c", "import mamldata, manifests; print(mamldata.__file__, manifests.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert all(Path(file).is_relative_to(python.parents[1]) for file in found)
    command = [str(python.with_name("mamldata"))]
    listed = subprocess.run([*command, "datasets"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "omniglot: Omniglot" in listed.stdout
    root = ["--root", str(tmp_path / "root")]
    subprocess.run([*command, "fetch", "glyphs", *root], cwd=tmp_path, capture_output=True, check=True)
    build = ["build", "glyphs", "--out", "archive", "--train", "4", "--val", "2", "--test", "2", *root]
    built = subprocess.run([*command, *build], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "digest sha256:" in built.stdout


@pytest.mark.parametrize("name", ["cli", "trainer", "manifests"])
def test_a_rival_of_our_names_is_named(python: Path, tmp_path: Path, name: str):
    """A module of the same name beside the script, or a package written over ours: the message says which."""
    (tmp_path / f"{name}.py").write_text("print('somebody else')\n")
    beside = subprocess.run([str(python), "-m", "mamldata", "datasets"], cwd=tmp_path, capture_output=True, text=True)
    assert (beside.returncode, beside.stdout) == (1, "")
    assert f"imports {name!r} from {tmp_path / name}.py, which is not part of mamldata" in beside.stderr
    (tmp_path / f"{name}.py").unlink()

    command = [str(python.with_name("mamldata"))]
    ours = next(python.parents[1].glob(f"lib/python*/site-packages/{name}/__init__.py"))
    ours.write_text("print('a package of the same name')\n")
    over = subprocess.run([*command, "datasets"], cwd=tmp_path, capture_output=True, text=True)
    assert (over.returncode, over.stdout) == (1, "")
    assert f"Another package has overwritten mamldata's {ours.resolve()}" in over.stderr
    if name != "cli":
        report = subprocess.run([*command, "doctor"], cwd=tmp_path, capture_output=True, text=True)
        assert f"name conflicts: Another package has overwritten mamldata's {ours.resolve()}" in report.stdout


SMALL = {  # what keeps a command of the README short here
    "build": ["--train", "6", "--val", "3", "--test", "3"],
    "train": ["--steps", "2", "--meta-batch-size", "2", "--eval-episodes", "2", "--filters", "2"],
    "eval": ["--episodes", "3"],
}


def test_the_readme_runs_from_the_wheel(python: Path, tmp_path: Path):
    """The commands and the loop of the README, in order, on the embedded data in place of Omniglot."""
    readme = (PROJECT / "README.md").read_text(encoding="utf-8").replace("omniglot", "glyphs")
    first: dict[str, list[str]] = {}  # command with each verb, in the README's order
    for line in re.findall(r"^    (mamldata .*)", readme, re.MULTILINE):
        first.setdefault(line.split()[1], line.split()[1:])
    environment = {**os.environ, "MAMLDATA_ROOT": str(tmp_path / "root"), "OMP_NUM_THREADS": "1"}
    for verb in ("fetch", "build", "verify", "preview", "train", "eval"):
        command = [
            str(python.with_name("mamldata")),
            *first[verb],
            *SMALL.get(verb, []),
        ]  # the last of an option counts
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
    (loop,) = re.findall(r"```python\n(import mamldata\n.*?)```", readme, re.DOTALL)
    loop = loop.replace('"cuda"', '"cpu"').replace("batch_size=32", "batch_size=2") + "    print(batch.query_x.shape)\n"
    ran = subprocess.run([str(python), "-c", loop], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.stdout.startswith("torch.Size([2, 75, 1, 28, 28])"), ran.stderr
