"""What a Python user takes from ``trainer``, and in which order its modules stand."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from synthetic import Synthetic

import trainer
from trainer.maml import engines, objective
from trainer.maml.adapt import adapt
from trainer.maml.engines import Outcome
from trainer.maml.parameters import Episode, FastWeights, MetaParameters, episodes
from trainer.maml.variants import method_of

ROOMS = Path(trainer.__file__).parent


def test_it_offers_what_it_lists() -> None:
    """Each name of ``__all__`` is there, in ``dir`` too, and hides no module; another one is an error."""
    for name in trainer.__all__:
        assert not isinstance(getattr(trainer, name), ModuleType)
        assert name in dir(trainer)
        assert not (ROOMS / name).exists()
        assert not (ROOMS / f"{name}.py").exists()
    with pytest.raises(AttributeError, match="module 'trainer' has no attribute 'nothing'"):
        trainer.nothing  # noqa: B018


def test_importing_it_imports_no_torch() -> None:
    """Names are looked up when they are used."""
    code = "import sys, trainer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOMS.parent, check=False).returncode == 0


def test_a_run_is_loaded_to_adapt_with(tmp_path: Path) -> None:
    """By its folder or its file: network, learned rates and norms, and settings, which adapt as the evaluation does."""
    settings = trainer.TrainSettings(
        steps=2, algorithm="maml++", inner_steps=2, meta_batch_size=2, eval_every=2, eval_episodes=2, device="cpu"
    )
    result = trainer.train(settings, Synthetic(size=8), tmp_path)
    loaded, same = trainer.load_run(tmp_path), trainer.load_run(result.best)
    assert loaded.settings == settings.__class__(**settings.for_images(loaded.data).resolved())
    assert loaded.data["dataset"] == "synthetic"
    assert all(map(torch.equal, loaded.parameters.tensors(), same.parameters.tensors()))
    data, method = Synthetic(size=8), method_of(loaded.network, loaded.settings.inner_loop_at_test())
    right = []
    for episode in episodes(data.batch("test", [0, 1, 2])):
        last = adapt(loaded.network, loaded.parameters, episode, method)[-1]
        logits = method.query_logits(loaded.network, last, episode, method)
        right.append((logits.argmax(1) == episode.query_y).float().mean().item())
    evaluated = trainer.evaluate(tmp_path, data, episodes=3, device="cpu")
    assert list(evaluated.accuracy_by_episode) == pytest.approx(right)


def imports() -> dict[str, set[str]]:
    """The modules of ``trainer`` that each of them imports when it is imported itself."""
    found = {}
    for path in ROOMS.rglob("*.py"):
        name = ".".join(path.relative_to(ROOMS.parent).with_suffix("").parts)
        nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
        modules = {node.module for node in nodes} | {
            f"{node.module}.{alias.name}" for node in nodes for alias in node.names
        }
        found[name] = {module for module in modules if module and module.startswith("trainer.")}
    return {name: {module for module in modules if module in found} for name, modules in found.items()}


def test_modules_import_downwards_only() -> None:
    """No circles; and a room imports those before it, ``settings`` only where this says so, and nothing else."""
    below = {"system": "", "networks": "", "maml": "networks system", "runs": "maml networks system settings"}
    below["reports"] = "runs maml networks system settings protocol learner evaluation intervals loop results"
    arrows = imports()
    for name, modules in arrows.items():
        room = name.split(".")[1]
        if room in below:
            assert {module.split(".")[1] for module in modules} <= {room, *below[room].split()}, name
    while arrows:
        ready = {name for name, modules in arrows.items() if not modules & arrows.keys()}
        assert ready, f"a circle among {sorted(arrows)}"
        arrows = {name: modules for name, modules in arrows.items() if name not in ready}


@pytest.mark.parametrize("room", ["maml", "networks", "runs", "system", "reports"])
def test_a_room_says_what_it_is_for(room: str) -> None:
    """And holds nothing but its modules."""
    assert import_module(f"trainer.{room}").__doc__
    assert len(ast.parse((ROOMS / room / "__init__.py").read_text()).body) == 1


def test_the_maml_step_can_be_read_in_one_sitting() -> None:
    """What docs/architecture.md names is there, and is under 350 lines, of which adapt.py has at most 120."""
    whole = inspect.getsource(sys.modules["trainer.maml.adapt"]).splitlines()
    parts = [MetaParameters, FastWeights, Episode, objective.meta_loss, Outcome, engines.loop]
    parts += [engines._gradient, engines._mean]
    assert len(whole) <= 120
    assert len(whole) + sum(len(inspect.getsourcelines(part)[0]) for part in parts) < 350
