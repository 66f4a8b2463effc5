"""The lean trainer of mamldata, for MAML and its family, on ``torch.func``.

``train`` makes a run folder, ``evaluate`` measures its accuracy, ``load_run`` gives its trained network:

    import trainer

    data = trainer.archive_data("omniglot-5w1s")
    trainer.train(trainer.TrainSettings(steps=1000), data, "runs/first", notify=print)
    print(trainer.evaluate("runs/first", data, split="test", episodes=600))

``data`` is anything with the methods of ``TrainData``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.data import archive_data, live_data
    from trainer.evaluation import Evaluation, evaluate
    from trainer.loop import train
    from trainer.protocol import TrainData
    from trainer.runs.checkpoint import TrainedRun, load_run
    from trainer.runs.folder import RunResult
    from trainer.settings import TrainSettings
    from trainer.system.distributed import joined

__all__ = [
    "Evaluation",
    "RunResult",
    "TrainData",
    "TrainSettings",
    "TrainedRun",
    "archive_data",
    "evaluate",
    "joined",
    "live_data",
    "load_run",
    "train",
]

_HOME = {
    "Evaluation": "evaluation",
    "RunResult": "runs.folder",
    "TrainData": "protocol",
    "TrainSettings": "settings",
    "TrainedRun": "runs.checkpoint",
    "archive_data": "data",
    "evaluate": "evaluation",
    "joined": "system.distributed",
    "live_data": "data",
    "load_run": "runs.checkpoint",
    "train": "loop",
}


def __getattr__(name: str) -> Any:
    # On first use: torch takes seconds to import, and most commands do not need it.
    if name in _HOME:
        return getattr(import_module(f"trainer.{_HOME[name]}"), name)
    raise AttributeError(f"module 'trainer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
