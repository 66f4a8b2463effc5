"""The layout of a shard, which is a tar and a strided array at the same time.

Every episode takes the same number of bytes, so episode i of a shard starts at ``i * stride``: any tool can read a
shard as a tar, and it can be memory-mapped and indexed. ``docs/format.md`` describes it byte by byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mamldata.errors import RequestError
from mamldata.io.npy import npy_header

BLOCK = 512  # a tar's unit, in bytes
END = 2 * BLOCK  # two empty blocks close a tar
MOST_EPISODES = 10**8  # the member names have eight digits
_MOST_MEMBER = 8**11  # a tar header has eleven octal digits for a member's length
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Member:
    """One file of an episode: offsets of its tar header and of its data, in bytes from the episode's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    header: int
    data: int
    bytes: int


class EpisodeLayout:
    """Where each part of an episode is; the same for all episodes of an archive.

    Args:
        n_way, k_shot, k_query: classes; support and query images per class.
        image_shape: ``(H, W, C)``.

    Attributes:
        support, query, source: the three members.
        stride: bytes from one episode to the next.
    """

    def __init__(self, n_way: int, k_shot: int, k_query: int, image_shape: Sequence[int]) -> None:
        shapes = {
            "support": ("|u1", (n_way, k_shot, *image_shape)),
            "query": ("|u1", (n_way, k_query, *image_shape)),
            "source": ("<i4", (n_way, 1 + k_shot + k_query)),
        }
        start = 0
        members = []
        for name, (dtype, shape) in shapes.items():
            data = start + BLOCK + len(npy_header(dtype, shape))
            size = math.prod(shape) * np.dtype(dtype).itemsize
            if data - start + size >= _MOST_MEMBER:
                raise RequestError(f"An episode's {name} file would be {size:,} bytes; tar allows less than 8 GiB.")
            members.append(Member(name, dtype, shape, start, data, size))
            start = -(-(data + size) // BLOCK) * BLOCK
        self.support, self.query, self.source = self.members = tuple(members)
        self.stride = start

    def shard_bytes(self, episodes: int) -> int:
        """The length of a shard's file."""
        return episodes * self.stride + END

    def headers(self, first: int, count: int) -> Bytes:
        """The tar headers of ``count`` episodes from ``first`` on: uint8 ``[count, 3, 512]``."""
        digits = np.array([list(f"{index:08d}".encode()) for index in range(first, first + count)], dtype=np.uint8)
        headers = np.empty((count, len(self.members), BLOCK), dtype=np.uint8)
        for position, member in enumerate(self.members):
            size = member.data - member.header - BLOCK + member.bytes
            template = np.frombuffer(_tar_header(f"00000000.{member.name}.npy", size), dtype=np.uint8)
            headers[:, position] = template
            headers[:, position, :8] = digits
            # Only the digits of the name differ from the template, so the checksum grows by their sum.
            checksum = int(template[148:154].tobytes(), 8) + (digits.astype(np.int64) - ord("0")).sum(axis=1)
            headers[:, position, 148:154] = [list(f"{value:06o}".encode()) for value in checksum.tolist()]
        return headers

    def frame(self, first: int, count: int) -> Bytes:
        """Episodes with headers, and zeros for data: uint8 ``[count, stride]``."""
        block = np.zeros((count, self.stride), dtype=np.uint8)
        headers = self.headers(first, count)
        for position, member in enumerate(self.members):
            block[:, member.header : member.header + BLOCK] = headers[:, position]
            npy = npy_header(member.dtype, member.shape)
            block[:, member.header + BLOCK : member.data] = np.frombuffer(npy, dtype=np.uint8)
        return block

    def view(self, block: Bytes, member: Member) -> npt.NDArray[Any]:
        """One member of every episode of a block: ``[count, *member.shape]``, a view of the same memory.

        Args:
            block: uint8, contiguous, ``count * stride`` bytes (a tar's two closing blocks may follow).
            member: one of ``members``.
        """
        count = block.size // self.stride
        strides = (self.stride, *_contiguous_strides(member))
        return np.ndarray((count, *member.shape), member.dtype, block, member.data, strides)


def _contiguous_strides(member: Member) -> tuple[int, ...]:
    strides = [np.dtype(member.dtype).itemsize]
    for size in reversed(member.shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def _tar_header(name: str, size: int) -> bytes:
    """A ustar header that does not depend on writer or time: mtime 0, uid and gid 0, mode 0644, no owners."""
    header = bytearray(BLOCK)
    fields = {
        0: name.encode("ascii"),
        100: b"0000644\0",
        108: b"0000000\0",
        116: b"0000000\0",
        124: f"{size:011o}\0".encode(),
        136: b"00000000000\0",
        148: b" " * 8,
        156: b"0",
        257: b"ustar\x0000",
    }
    for offset, value in fields.items():
        header[offset : offset + len(value)] = value
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)
