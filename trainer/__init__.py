"""The lean trainer of mamldata, for MAML and its family, on ``torch.func``.

``train`` makes a run folder, ``evaluate`` measures its accuracy, ``save_result`` keeps every answer of an evaluation,
``load_run`` gives the trained network, ``export_model`` a file of it to give away:

    import trainer

    data = trainer.archive_data("omniglot-5w1s")
    trainer.train(trainer.TrainSettings(steps=1000), data, "runs/first", notify=print)
    print(trainer.evaluate("runs/first", data, split="test", episodes=600))

``data`` is anything with the methods of ``TrainData``, such as ``OwnData``; docs/guide.md shows more.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.data import archive_data, live_data
    from trainer.evaluation import Evaluation, evaluate
    from trainer.loop import train
    from trainer.mixture import MixedData
    from trainer.own_data import OwnData
    from trainer.protocol import TrainData
    from trainer.reports.export import export_model
    from trainer.results import (
        Result,
        class_interval,
        confusion,
        paired_difference,
        read_result,
        result_of,
        save_result,
        worst_episodes,
    )
    from trainer.runs.adapted import AdaptedModel
    from trainer.runs.callbacks import Callback
    from trainer.runs.checkpoint import TrainedRun, load_run
    from trainer.runs.folder import RunResult
    from trainer.settings import TrainSettings
    from trainer.system.distributed import joined

__all__ = [
    "AdaptedModel",
    "Callback",
    "Evaluation",
    "MixedData",
    "OwnData",
    "Result",
    "RunResult",
    "TrainData",
    "TrainSettings",
    "TrainedRun",
    "archive_data",
    "class_interval",
    "confusion",
    "evaluate",
    "export_model",
    "joined",
    "live_data",
    "load_run",
    "paired_difference",
    "read_result",
    "result_of",
    "save_result",
    "train",
    "worst_episodes",
]

_HOME = {
    "AdaptedModel": "runs.adapted",
    "Callback": "runs.callbacks",
    "Evaluation": "evaluation",
    "MixedData": "mixture",
    "OwnData": "own_data",
    "Result": "results",
    "RunResult": "runs.folder",
    "TrainData": "protocol",
    "TrainSettings": "settings",
    "TrainedRun": "runs.checkpoint",
    "archive_data": "data",
    "class_interval": "results",
    "confusion": "results",
    "evaluate": "evaluation",
    "export_model": "reports.export",
    "joined": "system.distributed",
    "live_data": "data",
    "load_run": "runs.checkpoint",
    "paired_difference": "results",
    "read_result": "results",
    "result_of": "results",
    "save_result": "results",
    "train": "loop",
    "worst_episodes": "results",
}


def __getattr__(name: str) -> Any:
    # On first use: torch takes seconds to import, and most commands do not need it.
    if name in _HOME:
        return getattr(import_module(f"trainer.{_HOME[name]}"), name)
    raise AttributeError(f"module 'trainer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
