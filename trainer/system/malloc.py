"""The C library's allocator, told to keep large buffers, or to give them back."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_large_buffers() -> bool:
    """Make freed tensors' memory be used again, instead of going back to the kernel; glibc on Linux only.

    By default glibc maps every large buffer afresh, and the kernel then hands out its pages one fault at a time:
    with the activations of a small network that is a large part of a training step on a CPU. In return the process
    keeps the most memory that it ever had. Does nothing where the C library is another one.

    Returns:
        Whether the allocator took the settings.
    """
    # Before 2.35 glibc refuses thresholds above 32 MiB.
    return (_set(_M_MMAP_THRESHOLD, 1 << 30) or _set(_M_MMAP_THRESHOLD, 1 << 25)) and _set(
        _M_TRIM_THRESHOLD, (1 << 31) - 1
    )


def return_large_buffers() -> bool:
    """The opposite, so that a process's memory is what its tensors take: for measuring it; glibc on Linux only.

    Returns:
        Whether the allocator took the settings.
    """
    return _set(_M_MMAP_THRESHOLD, 1 << 16) and _set(_M_TRIM_THRESHOLD, 1 << 16)


def _set(what: int, value: int) -> bool:
    return platform.libc_ver()[0] == "glibc" and bool(ctypes.CDLL(None).mallopt(what, value))
