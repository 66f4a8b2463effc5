"""The choice of the engine for a device."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from mamldata.errors import RequestError
from mamldata.streaming.batch import EpisodeBatch
from trainer.maml.adapt import Method
from trainer.maml.engines import FINAL, Engine, Outcome, pick_engine
from trainer.maml.graphed import CudaGraphs, PreparationError, Prepared, compiled
from trainer.maml.objective import Objective
from trainer.maml.parameters import MetaParameters
from trainer.maml.variants import method_of


def engine_for(name: str, device: torch.device, *, compile: bool = False, checkpoint: bool = False) -> Engine:  # noqa: A002
    """A new engine.

    ``auto`` is ``loop``; or ``vmap`` if it is to be compiled. On CUDA it is the first one of ``graphed``, ``vmap`` and
    ``loop`` that works: without a graph the launches of kernels take longer than their work, and ``loop`` needs the
    least memory. With checkpoints it is ``loop`` on every device.

    Args:
        name: one of the settings' choices.
        device: of the network.
        compile: whether the engine's work is compiled.
        checkpoint: whether inner steps are recomputed, which only ``loop`` can do.

    Raises:
        RequestError: the device cannot do this, or a package is not installed.
    """
    if name == "graphed" and device.type != "cuda":
        raise RequestError(f"The engine graphed needs a CUDA device, and this is {device.type}. Use the engine auto.")
    if name == "auto" and device.type == "cuda" and not checkpoint:
        rest = () if compile else ("loop",)
        return FirstThatWorks({one: _make(one, compile) for one in ("graphed", "vmap", *rest)})
    return _make("vmap" if name == "auto" and compile else name, compile)


def _make(name: str, compile: bool) -> Engine:  # noqa: A002
    if name == "graphed":
        return Prepared(CudaGraphs(compiled if compile else None))
    return Prepared(compiled) if compile else pick_engine(name)


class FirstThatWorks:
    """Engines, of which the first one computes; if it cannot, the next one takes its place for good.

    Args:
        engines: by their names, at least one.
    """

    def __init__(self, engines: dict[str, Engine]) -> None:
        self._left = list(engines.items())

    def __call__(
        self,
        network: nn.Module,
        parameters: MetaParameters,
        batch: EpisodeBatch,
        method: Method,
        objective: Objective = FINAL,
    ) -> Outcome:
        """See ``loop``; ``method`` only says how to adapt, because its parts depend on the engine.

        Raises:
            RuntimeError, PreparationError: of the last engine.
        """
        while True:
            name, engine = self._left[0]
            own = method_of(network, method.inner, name)
            try:
                return engine(network, parameters, batch, own, objective)
            except (RuntimeError, PreparationError) as error:  # memory, or an operation of the user's own network
                if len(self._left) == 1:
                    raise
                small = isinstance(error, torch.cuda.OutOfMemoryError)
                reason = "the GPU's memory is too small" if small else str(error)
            # Here, because the error holds on to the memory of what failed.
            self._left.pop(0)
            torch.cuda.empty_cache()
            warnings.warn(f"The engine {name} does not work here, {self._left[0][0]} does: {reason}", stacklevel=2)
