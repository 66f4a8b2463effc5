"""The rule of the rooms, read from the imports: which may import which, and where torch is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
# Each room may import those after it in the list, and the modules at the top of mamldata that TOP names.
ROOMS = ["streaming", "sources", "archive", "bank", "fetching", "datasets", "readers", "sampling", "io"]
TOP = {"errors", "progress", "parallel", "version", "siblings", "words", "pictures"}
ABOVE = {
    "pipeline",
    "preview",
    "card",
    "citation",
    "doctor",
    "__main__",
    "__init__",
}  # of mamldata: what stands above all rooms
EXCEPTION = "mamldata/__main__.py"  # starts cli, and says so


def modules() -> list[Path]:
    """Every module of the three packages, as paths from the project's folder."""
    found = [path for package in ("mamldata", "trainer", "cli") for path in (PROJECT / package).rglob("*.py")]
    return sorted(path.relative_to(PROJECT) for path in found)


def imported(module: Path) -> Iterator[str]:
    """What a module imports, wherever in it: dotted names, with those of ``from a import b`` as ``a.b``."""
    for node in ast.walk(ast.parse((PROJECT / module).read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports by a relative path"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_imported(module: Path) -> set[Path]:
    """The project's own modules among them; of ``from a import b`` the module ``a.b`` if there is one, else ``a``."""
    found = set()
    for name in imported(module):
        whole = Path(*name.split("."))
        candidates = [
            file
            for path in (whole, whole.parent)
            if path.name
            for file in (path.with_suffix(".py"), path / "__init__.py")
        ]
        found.update([file for file in candidates if (PROJECT / file).is_file()][:1])
    return found - {module}


def room(module: Path) -> str:
    """The room of a module of mamldata; of a module at the top its own name."""
    return module.parts[1] if len(module.parts) > 2 else module.stem


@pytest.mark.parametrize("module", modules(), ids=str)
def test_imports_go_down(module: Path) -> None:
    """Cli imports trainer and mamldata, trainer mamldata; in mamldata each room those below it, and no other."""
    order = {"cli": {"cli", "trainer", "mamldata"}, "trainer": {"trainer", "mamldata"}, "mamldata": {"mamldata"}}
    package = module.parts[0]
    for other in modules_imported(module):
        if module.as_posix() != EXCEPTION:
            assert other.parts[0] in order[package], f"{module} imports {other}"
        if package == "mamldata" and other.parts[0] == "mamldata" and room(module) not in ABOVE:
            here, there = room(module), room(other)
            if there in TOP or there == here:
                continue
            assert here in ROOMS, f"{module} imports {other}: what stands at the top imports no room"
            assert there in ROOMS[ROOMS.index(here) :], f"{module} imports {other}, which stands above it"


def test_no_circles() -> None:
    """No module imports itself by way of others."""
    arrows = {module: modules_imported(module) for module in modules()}
    # The __init__ of mamldata and of trainer hands out names of all rooms, each on first use.
    faces = {Path(package, "__init__.py") for package in ("mamldata", "trainer")}
    for start in arrows:
        seen: set[Path] = set()
        todo = list(arrows[start] - faces)
        while todo:
            module = todo.pop()
            assert module != start, f"{start} imports itself by way of others"
            if module not in seen:
                seen.add(module)
                todo.extend(arrows.get(module, set()) - faces)


def test_torch_is_in_streaming_and_the_trainer() -> None:
    """No other room of mamldata imports torch; doctor asks it for its devices when it is called."""
    users = {
        module.as_posix()
        for module in modules()
        if any(name.split(".")[0] in {"torch", "torchvision"} for name in imported(module))
    }
    allowed = {user for user in users if user.startswith(("mamldata/streaming/", "trainer/"))}
    assert users - allowed == {"mamldata/doctor.py"}


def test_every_room_says_what_it_is_for() -> None:
    """A room's __init__ is a docstring and nothing else."""
    for folder in [*(PROJECT / "mamldata" / name for name in ROOMS), *(PROJECT / "trainer").glob("*/")]:
        init = folder / "__init__.py"
        if not any(folder.glob("*.py")):
            continue  # data, such as recipes
        tree = ast.parse(init.read_bytes())
        assert ast.get_docstring(tree), init
        assert len(tree.body) == 1, init


def test_no_room_has_the_name_of_a_public_function() -> None:
    """Importing ``mamldata.archive.build`` as a module would hide the function of the name; so there is none."""
    for package in ("mamldata", "trainer"):
        tree = ast.parse((PROJECT / package / "__init__.py").read_bytes())
        names = next(
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        )
        there = {path.stem for path in (PROJECT / package).iterdir()}
        assert not there & set(names), package
