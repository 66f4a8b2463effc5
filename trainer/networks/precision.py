"""The precision of the arithmetic: its choice for a device, and its effect on a network."""

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
        RequestError: the device does not support it.
    """
    if name is None:
        return "tf32" if device.type == "cuda" else "fp32"
    if name == "tf32" and device.type != "cuda":
        raise RequestError(f"The precision tf32 is for CUDA devices only, and this is {device.type}. Use fp32.")
    if name == "bf16" and device.type == "mps":
        raise RequestError("The precision bf16 is for CUDA and the CPU, and this is mps. Use fp32.")
    return name


def set_precision(network: nn.Module, precision: Precision) -> None:
    """Set the precision of a network, and of this process's float32 products on CUDA.

    The network carries it, so that every engine and the evaluator use the same. Parameters stay in float32.
    """
    network.precision = precision  # type: ignore[assignment]  # a module's attributes are tensors to mypy
    form = "tf32" if precision == "tf32" else "ieee"
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and newer
        matmul.fp32_precision = cudnn.conv.fp32_precision = form  # type: ignore[attr-defined]  # not in its stubs
    else:
        matmul.allow_tf32 = cudnn.allow_tf32 = form == "tf32"


def precision_of(network: nn.Module) -> Precision:
    """The precision given by ``set_precision``, or else fp32."""
    precision: Precision = getattr(network, "precision", "fp32")
    return precision


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
