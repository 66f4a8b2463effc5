"""Makes ``synthetic`` and ``problems`` importable by the tests and by the processes that they start."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MakeOnce = Callable[[str, Callable[[Path], object]], Path]

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The problems are so small that threads would only wait for one another, longest on a busy machine."""


@pytest.fixture(scope="session")
def glyphs_run(glyphs_root: Path, make_once: MakeOnce) -> Path:
    """A short run of maml++ on 3-way 2-shot glyphs, evaluated on its test split. Shared: copy it."""
    from trainer.data import live_data
    from trainer.evaluation import evaluate
    from trainer.loop import train
    from trainer.results import save_result
    from trainer.settings import TrainSettings

    def make(folder: Path) -> None:
        data = live_data("glyphs", glyphs_root, {"n_way": 3, "k_shot": 2, "k_query": 2})
        settings = TrainSettings(
            algorithm="maml++",
            steps=2,
            inner_steps=3,
            eval_every=2,
            eval_episodes=2,
            meta_batch_size=2,
            filters=4,
            device="cpu",
        )
        result = train(settings, data, folder)
        save_result(evaluate(result.best, data, episodes=4, device="cpu"))

    return make_once("glyphs-run", make)
