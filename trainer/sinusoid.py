"""The sinusoid problem of Finn et al. 2017, section 5.1: few-shot regression on generated tasks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch

from mamldata.errors import RequestError
from mamldata.io.digest import canonical_json, sha256_bytes
from mamldata.streaming.batch import EpisodeBatch

AMPLITUDES, PHASES, INPUTS = (0.1, 5.0), (0.0, math.pi), (-5.0, 5.0)
_PER_BLOCK = 4  # Philox gives four numbers for each value of its counter


@dataclass(frozen=True)
class Sinusoids:
    """Endless tasks ``y = amplitude * sin(x - phase)`` without noise; all draws are uniform.

    Attributes:
        seed: any whole number from 0; the tasks of two seeds are independent.
        k_shot, k_query: points of the support and of the query set.

    Raises:
        RequestError: a number is below its minimum.
    """

    seed: int
    k_shot: int = 10
    k_query: int = 10

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("k_shot", 1), ("k_query", 1)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} must be at least {least}, not {getattr(self, name)}.")

    def batch(self, first: int, count: int) -> EpisodeBatch:
        """Tasks ``first`` to ``first + count - 1``, each a pure function of these settings and its index.

        Returns:
            float32 ``[count, k, 1]``: points in ``support_x`` and ``query_x``, their values in ``support_y`` and
            ``query_y``; and ``index``, int64 ``[count]``.
        """
        draws = self._uniform(first, count)
        amplitude, phase = _between(AMPLITUDES, draws[:, :1]), _between(PHASES, draws[:, 1:2])
        inputs = _between(INPUTS, draws[:, 2:])
        values = amplitude * np.sin(inputs - phase)
        x, y = (torch.from_numpy(part[..., None].astype(np.float32)) for part in (inputs, values))
        k = self.k_shot
        return EpisodeBatch(x[:, :k], y[:, :k], x[:, k:], y[:, k:], torch.arange(first, first + count))

    def _uniform(self, first: int, count: int) -> npt.NDArray[np.float64]:
        """``[count, 2 + k_shot + k_query]`` in [0, 1): the first numbers of each task's own blocks."""
        draws = 2 + self.k_shot + self.k_query
        blocks = math.ceil(draws / _PER_BLOCK)
        digest = bytes.fromhex(sha256_bytes(canonical_json({"problem": "sinusoid", **asdict(self)})))
        key = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
        raw = np.random.Philox(key=key, counter=first * blocks).random_raw(count * blocks * _PER_BLOCK)
        return (raw.reshape(count, -1)[:, :draws] >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _between(bounds: tuple[float, float], draws: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    low, high = bounds
    return low + (high - low) * draws
