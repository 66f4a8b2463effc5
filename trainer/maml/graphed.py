"""The engine ``vmap``, with its work prepared once for all meta-batches of a shape: compiled, or as a CUDA graph."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from mamldata.errors import RequestError
from mamldata.streaming.batch import EpisodeBatch
from trainer.maml.adapt import Method
from trainer.maml.engines import FINAL, Outcome, vmap
from trainer.maml.objective import Objective
from trainer.maml.parameters import MetaParameters
from trainer.maml.variants import method_of
from trainer.networks.precision import precision_of

Step = Callable[[Sequence[Tensor]], Sequence[Tensor]]  # pure; the last two results are the loss and the score

MOST_STEPS = 4  # that are kept: with and without the scores of each inner step, before and after an epoch's change
WARM_UPS = 3  # calls before a capture, in which libraries choose algorithms and take their workspaces


class PreparationError(RequestError):
    """torch cannot compile or capture the meta-gradient of these settings."""


class Prepared:
    """The engine ``vmap``, prepared at the first meta-batch of each shape.

    Arguments and outcome are those of ``loop``; but the next call overwrites the gradient of a captured one.

    Args:
        prepare: turns a plain step into one that is compiled or captured for such inputs.
    """

    def __init__(self, prepare: Callable[[Step, Sequence[Tensor]], Step]) -> None:
        self._prepare = prepare
        self._steps: OrderedDict[Hashable, Step] = OrderedDict()  # the one used last at the end

    def __call__(
        self,
        network: nn.Module,
        parameters: MetaParameters,
        batch: EpisodeBatch,
        method: Method,
        objective: Objective = FINAL,
    ) -> Outcome:
        """See ``loop``; ``method`` only says how to adapt, its parts are those of ``vmap``.

        Raises:
            PreparationError: torch cannot compile or capture this.
        """
        count, index, method = len(parameters.tensors()), batch.index, method_of(network, method.inner, "vmap")
        inputs = [*(value.detach() for value in parameters.tensors()), *batch[:4]]
        forms = tuple((value.shape, value.dtype, value.device) for value in inputs)
        key = (network, precision_of(network), method.inner, objective, forms)

        def step(values: Sequence[Tensor]) -> list[Tensor]:
            support_x, support_y, query_x, query_y = values[count:]
            at, parts = parameters.like(values[:count]), EpisodeBatch(support_x, support_y, query_x, query_y, index)
            outcome = vmap(network, at, parts, method, objective)
            return [*outcome.gradient.tensors(), outcome.loss, outcome.score]

        if key not in self._steps:
            while len(self._steps) >= MOST_STEPS:
                self._steps.popitem(last=False)  # first, to free its memory
            self._steps[key] = self._prepare(step, inputs)
        self._steps.move_to_end(key)
        *slopes, loss, score = self._steps[key](inputs)
        return Outcome(parameters.like(slopes), loss, score)


def compiled(step: Any, _: Sequence[Tensor]) -> Step:
    """The step compiled by torch's Inductor, at its first call; takes minutes.

    Possible because ``torch.func`` takes all derivatives inside the step; Inductor has no second derivatives.
    """
    # A code object of its own: torch's compiler gives up at the ninth step that shares one, and a run with changing
    # weights of the multi-step loss has more.
    own = FunctionType(step.__code__.replace(), step.__globals__, closure=step.__closure__)
    fast: Step = torch.compile(own, fullgraph=True, dynamic=False)

    def call(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        try:
            return fast(inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise PreparationError(f"torch cannot compile this meta-gradient: {_first_line(error)}") from error

    return call


class CudaGraphs:
    """Captures steps in CUDA graphs, which share their memory.

    A graph launches all kernels of a step at once, where launching them one by one takes longer than computing them.

    Args:
        then: prepares the step itself before it is captured.
    """

    def __init__(self, then: Callable[[Step, Sequence[Tensor]], Step] | None = None) -> None:
        self._then = then
        # One stream and one pool for all: torch's allocator keeps the memory of each apart.
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __call__(self, step: Step, inputs: Sequence[Tensor]) -> Step:
        """The step as a graph.

        Raises:
            PreparationError: torch cannot capture it.
        """
        step = self._then(step, inputs) if self._then else step
        held = [value.clone() for value in inputs]  # where a graph reads its inputs, whatever they are
        outputs, replay = self.capture(lambda: step(held))

        def call(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            for place, value in zip(held, inputs, strict=True):
                place.copy_(value, non_blocking=True)
            replay()
            # Copies of what is kept longer than until the next call.
            return [*outputs[:-2], outputs[-2].clone(), outputs[-1].clone()]

        return call

    def capture(self, work: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], Callable[[], object]]:
        """Capture work whose tensors keep their places.

        Returns:
            Its results, in the memory that each replay overwrites; and the replay.

        Raises:
            PreparationError: torch cannot capture it.
        """
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                work()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Only of this thread: another one reads meta-batches ahead, and allocates memory meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                results = work()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise PreparationError(f"torch cannot capture this meta-gradient: {_first_line(error)}") from error
        return results, graph.replay


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
