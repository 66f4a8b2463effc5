"""The precision of the arithmetic: its choice for a device, and its effect on a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from mamldata.errors import RequestError

Precision = Literal["fp32", "tf32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "bf16")


def pick_precision(name: Precision | None, device: torch.device) -> Precision:
    """The precision called ``name``; None is fp32.

    Raises:
        RequestError: the device does not support it.
    """
    if name is None:
        return "fp32"
    if name == "tf32" and device.type != "cuda":
        raise RequestError(f"The precision tf32 is for CUDA devices only, and this is {device.type}. Use fp32.")
    if name == "bf16" and device.type == "mps":
        raise RequestError("The precision bf16 is for CUDA and the CPU, and this is mps. Use fp32.")
    return name


def set_precision(network: nn.Module, precision: Precision) -> None:
    """Set the precision of a network, which carries it, so that every engine and the evaluator use the same.

    Parameters stay in float32.
    """
    network.precision = precision  # type: ignore[assignment]  # a module's attributes are tensors to mypy


def precision_of(network: nn.Module) -> Precision:
    """The precision given by ``set_precision``, or else fp32."""
    precision: Precision = getattr(network, "precision", "fp32")
    return precision


@contextmanager
def arithmetic(network: nn.Module, device: torch.device) -> Iterator[None]:
    """In this block, compute on CUDA as the network's precision says, and let cuDNN time its convolutions.

    torch has one setting of each kind for the process, so each computation of a network sets them first and then
    restores them: those of the program, which may have other networks, do not change. cuDNN times its algorithms at
    the first call for each shape, which pays because shapes repeat.
    """
    if device.type != "cuda":
        yield
        return
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    tf32 = precision_of(network) == "tf32"
    settings: list[tuple[Any, str, Any]] = [(cudnn, "benchmark", True)]
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and newer
        settings += [(place, "fp32_precision", "tf32" if tf32 else "ieee") for place in (matmul, cudnn.conv)]
    else:
        settings += [(place, "allow_tf32", tf32) for place in (matmul, cudnn)]
    before = [getattr(place, key) for place, key, _ in settings]
    try:
        for place, key, wanted in settings:
            setattr(place, key, wanted)
        yield
    finally:
        for (place, key, _), old in zip(settings, before, strict=True):
            setattr(place, key, old)


def call(network: nn.Module, parameters: dict[str, Tensor], *inputs: object) -> Tensor:
    """``functional_call``; with bf16, under autocast to bfloat16. The result is float32."""
    result: Tensor
    if precision_of(network) != "bf16":
        result = functional_call(network, parameters, inputs)
        return result
    device = next(iter(parameters.values())).device.type
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device, dtype=torch.bfloat16))
        if device == "cpu":
            stack.enter_context(_NarrowInFloat32())
        result = functional_call(network, parameters, inputs)
    return result.float()


class _NarrowInFloat32(TorchFunctionMode):
    """Compute convolutions of images that are one pixel wide or high, and their gradients, in float32.

    On a CPU with bfloat16 instructions, oneDNN's gradient of the weights reads uninitialized memory if the image is
    padded and narrower than the stride (torch 2.15, oneDNN 3.13), and is then NaN or wrong.
    The networks' strides are 1 and 2. Such images are a small part of the work.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        narrow = func is torch.conv2d and 1 in args[0].shape[-2:]
        if narrow:
            args = tuple(value.float() if isinstance(value, Tensor) else value for value in args)
        with torch.autocast("cpu", enabled=False) if narrow else nullcontext():
            return func(*args, **(kwargs or {}))
