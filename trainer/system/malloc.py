"""Settings of the C library's allocator: keep large buffers, or give them back."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_large_buffers() -> bool:
    """Reuse the memory of freed tensors instead of returning it to the kernel; glibc on Linux only.

    By default glibc maps every large buffer again, and the kernel then provides its pages one fault at a time: with
    the activations of a small network, a large part of a training step on a CPU. In return the process keeps its
    peak memory. Does nothing with another C library.

    Returns:
        Whether the allocator took the settings.
    """
    # Before 2.35 glibc refuses thresholds above 32 MiB.
    return (_set(_M_MMAP_THRESHOLD, 1 << 30) or _set(_M_MMAP_THRESHOLD, 1 << 25)) and _set(
        _M_TRIM_THRESHOLD, (1 << 31) - 1
    )


def return_large_buffers() -> bool:
    """The opposite, for measurements: a process's memory is then that of its tensors; glibc on Linux only.

    Returns:
        Whether the allocator took the settings.
    """
    return _set(_M_MMAP_THRESHOLD, 1 << 16) and _set(_M_TRIM_THRESHOLD, 1 << 16)


def _set(what: int, value: int) -> bool:
    return platform.libc_ver()[0] == "glibc" and bool(ctypes.CDLL(None).mallopt(what, value))
