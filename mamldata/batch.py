"""What a stream gives: a meta-batch of episodes as tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch


class EpisodeBatch(NamedTuple):
    """A meta-batch of B episodes.

    Attributes:
        support_x: images ``[B, n_way * k_shot, C, H, W]``, channels-last in memory; floating point in [0, 1] or
            uint8, as the stream was asked for. Images of one class stand together.
        support_y: labels in ``range(n_way)``, int64 ``[B, n_way * k_shot]``.
        query_x: images ``[B, n_way * k_query, C, H, W]``, as ``support_x``.
        query_y: labels, int64 ``[B, n_way * k_query]``.
        index: each episode's index in its split, int64 ``[B]``.

    The labels are the same for every meta-batch and may share their memory: do not write into them.
    """

    support_x: torch.Tensor
    support_y: torch.Tensor
    query_x: torch.Tensor
    query_y: torch.Tensor
    index: torch.Tensor
