"""Headers of ``.npy`` files: NumPy reads them, and their bytes are ours for ever."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mamldata.io.npy import npy_bytes, npy_header

SHAPES = st.lists(st.integers(0, 6), max_size=5).map(tuple)


def test_header_to_the_byte() -> None:
    """The bytes that every digest of a bank or a shard begins with."""
    header = npy_header("|u1", (32460, 28, 28, 1))
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': (32460, 28, 28, 1), }"
    assert header == b"\x93NUMPY\x01\x00\x76\x00" + text + b" " * (128 - 10 - len(text) - 1) + b"\n"
    assert npy_bytes("|u1", (32460, 28, 28, 1)) == 128 + 32460 * 28 * 28


@given(shape=SHAPES, dtype=st.sampled_from(["|u1", "<i4", "<i8", "<f4"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_numpy_reads_it(shape: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    """``np.load`` gives the array back, read and mapped; the length is as foretold."""
    array = np.arange(math.prod(shape)).astype(dtype).reshape(shape)
    path = tmp_path / "array.npy"
    path.write_bytes(npy_header(dtype, shape) + array.tobytes())
    assert path.stat().st_size == npy_bytes(dtype, shape)
    loaded = np.load(path, allow_pickle=False)
    assert loaded.dtype == np.dtype(dtype)
    assert loaded.shape == shape
    assert np.array_equal(loaded, array)
    if array.size:
        assert np.array_equal(np.load(path, mmap_mode="r"), array)


@pytest.mark.parametrize("digits", [1, 9, 18])
def test_long_shapes_keep_the_alignment(digits: int) -> None:
    """Whatever the shape, data begins at a multiple of 128 bytes, and the header ends with a newline."""
    for dimensions in range(9):
        header = npy_header("|u1", (10 ** (digits - 1),) * dimensions)
        assert len(header) % 128 == 0
        assert header.endswith(b"\n")
        assert int.from_bytes(header[8:10], "little") == len(header) - 10


def test_numpy_integers_are_written_as_numbers() -> None:
    """A shape of NumPy integers is not written as ``np.int64(3)``."""
    assert npy_header("|u1", tuple(np.array([3, 4]))) == npy_header("|u1", (3, 4))
