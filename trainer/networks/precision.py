"""The precision of the arithmetic: a name, what it means on a device, and where it takes effect."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from mamldata.errors import RequestError

Precision = Literal["fp32", "tf32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "bf16")


def pick_precision(name: Precision | None, device: torch.device) -> Precision:
    """The precision called ``name``; None is the device's own, tf32 on CUDA and fp32 elsewhere.

    Raises:
        RequestError: the device does not have it.
    """
    if name is None:
        return "tf32" if device.type == "cuda" else "fp32"
    if name == "tf32" and device.type != "cuda":
        raise RequestError(f"The precision tf32 is for CUDA devices alone, and this is {device.type}. Take fp32.")
    if name == "bf16" and device.type == "mps":
        raise RequestError("The precision bf16 is for CUDA and the CPU, and this is mps. Take fp32.")
    return name


def set_precision(network: nn.Module, precision: Precision) -> None:
    """Let a network compute in a precision, and this process multiply float32 on CUDA as it says.

    The network carries it, so that every engine and the evaluator have the same. Parameters stay in float32.
    """
    network.precision = precision  # type: ignore[assignment]  # a module's attributes are tensors to mypy
    form = "tf32" if precision == "tf32" else "ieee"
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and newer
        matmul.fp32_precision = cudnn.conv.fp32_precision = form  # type: ignore[attr-defined]  # not in its stubs
    else:
        matmul.allow_tf32 = cudnn.allow_tf32 = form == "tf32"


def precision_of(network: nn.Module) -> Precision:
    """What ``set_precision`` told a network, or else fp32."""
    precision: Precision = getattr(network, "precision", "fp32")
    return precision


def call(network: nn.Module, parameters: dict[str, Tensor], *inputs: object) -> Tensor:
    """``functional_call``, with bf16 in bfloat16 where autocast has it so. The result is float32."""
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
    """Convolutions of images that are one pixel wide or high are computed in float32, and so are their gradients.

    On a CPU with bfloat16 instructions, oneDNN's gradient of the weights reads memory that nothing has written if the
    image is narrower than the stride and padded (torch 2.15, oneDNN 3.13): it comes out as NaN, or as a wrong number.
    The networks' strides are 1 and 2. Such images are a small part of the work.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        narrow = func is torch.conv2d and 1 in args[0].shape[-2:]
        if narrow:
            args = tuple(value.float() if isinstance(value, Tensor) else value for value in args)
        with torch.autocast("cpu", enabled=False) if narrow else nullcontext():
            return func(*args, **(kwargs or {}))
