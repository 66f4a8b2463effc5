"""Memory that is used again as soon as nobody looks at it any more.

A fresh tensor for each meta-batch costs several times the copy into it, because the kernel hands out its pages one
fault at a time. A buffer from a pool costs that once.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class BufferPool:
    """Memory for images of one shape and dtype, lent out again and again.

    A lent tensor, and everything that shares its memory, keeps its buffer from being lent again: holding on to
    meta-batches is safe, and costs memory only.

    Args:
        shape: ``(B, images, H, W, C)``, the order in memory.
        dtype: of the tensors.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self._word = np.dtype(f"i{dtype.itemsize}") if dtype.itemsize > 1 else np.dtype(np.uint8)
        self._free: list[npt.NDArray[Any]] = []

    def take(self) -> tuple[torch.Tensor, npt.NDArray[Any]]:
        """Memory with arbitrary content, twice: the tensor to give away, and an array to fill it through.

        Returns:
            A CPU tensor ``[B, images, C, H, W]``, channels-last in memory; and the same memory as an array of one
            dimension, which does not keep it lent.
        """
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = np.empty(self.shape, self._word)
        # The tensor's storage keeps the array alive that it was made from: a view of our own, so that the end of
        # the view says that nothing looks at the memory any more.
        view = buffer.transpose(0, 1, 4, 2, 3)
        weakref.finalize(view, self._free.append, buffer).atexit = False
        tensor = torch.from_numpy(view)
        return (tensor if tensor.dtype == self.dtype else tensor.view(self.dtype)), buffer.reshape(-1)
