"""The header of an ``.npy`` file, the same bytes under every version of NumPy.

NumPy's own writer has changed its padding over the years; a digest over a file must not depend on that.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np

_MAGIC = b"\x93NUMPY\x01\x00"
_ALIGN = 128


def npy_header(dtype: str, shape: Sequence[int]) -> bytes:
    """The header of a C-ordered array in NPY format 1.0, padded with spaces to a multiple of 128 bytes.

    Args:
        dtype: NumPy's descriptor with its byte order, such as ``|u1`` or ``<i4``.
        shape: the array's shape.
    """
    sizes = ", ".join(str(int(size)) for size in shape) + ("," if len(shape) == 1 else "")
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({sizes}), }}"
    fixed = len(_MAGIC) + 2
    total = math.ceil((fixed + len(text) + 1) / _ALIGN) * _ALIGN
    text = text.ljust(total - fixed - 1) + "\n"
    return _MAGIC + struct.pack("<H", len(text)) + text.encode("ascii")


def npy_bytes(dtype: str, shape: Sequence[int]) -> int:
    """The length of the whole file in bytes."""
    return len(npy_header(dtype, shape)) + np.dtype(dtype).itemsize * math.prod(shape)
