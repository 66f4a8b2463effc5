"""Memory that is reused as soon as nothing refers to it.

A fresh tensor for each meta-batch costs several times as much as the copy into it, because the kernel provides its
pages one fault at a time. A pooled buffer costs that once.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class BufferPool:
    """Reusable memory for images of one shape and dtype.

    A buffer is not reused while its tensor, or anything that shares the tensor's memory, exists: holding on to
    meta-batches is safe, and only costs memory.

    Args:
        shape: ``(B, images, H, W, C)``, as in memory.
        dtype: of the tensors.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self._word = np.dtype(f"i{dtype.itemsize}") if dtype.itemsize > 1 else np.dtype(np.uint8)
        self._free: list[npt.NDArray[Any]] = []

    def take(self) -> tuple[torch.Tensor, npt.NDArray[Any]]:
        """Memory with arbitrary content, as a tensor to give away and as an array to fill it with.

        Returns:
            A CPU tensor ``[B, images, C, H, W]``, channels-last in memory; and the same memory as an array of one
            dimension, which does not keep the buffer from being reused.
        """
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = np.empty(self.shape, self._word)
        # The tensor's storage keeps alive the array that it was made from. That is a view of our own, so the view's end
        # means that nothing refers to the memory any more.
        view = buffer.transpose(0, 1, 4, 2, 3)
        weakref.finalize(view, self._free.append, buffer).atexit = False
        tensor = torch.from_numpy(view)
        return (tensor if tensor.dtype == self.dtype else tensor.view(self.dtype)), buffer.reshape(-1)
