"""A lean trainer for MAML and its family, on ``torch.func``.

``train`` makes a run folder, ``evaluate_checkpoint`` measures what is in it:

    result = trainer.train(trainer.TrainSettings(steps=1000), data, "runs/first")
    print(trainer.evaluate_checkpoint("runs/first", data, split="test", episodes=600))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.evaluate import Evaluation, evaluate_checkpoint
    from trainer.protocol import TrainData, TrainStream
    from trainer.settings import TrainSettings
    from trainer.train import RunResult, train

__all__ = ["Evaluation", "RunResult", "TrainData", "TrainSettings", "TrainStream", "evaluate_checkpoint", "train"]

_HOME = {
    "Evaluation": "evaluate",
    "RunResult": "train",
    "TrainData": "protocol",
    "TrainSettings": "settings",
    "TrainStream": "protocol",
    "evaluate_checkpoint": "evaluate",
    "train": "train",
}


def __getattr__(name: str) -> Any:
    # On first use, because torch alone takes seconds to import and the command line's help does without it.
    if name in _HOME:
        return getattr(import_module(f"trainer.{_HOME[name]}"), name)
    raise AttributeError(f"module 'trainer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
