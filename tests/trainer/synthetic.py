"""Made-up episodes that can be learnt: each class is a pattern, each image that pattern with noise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mamldata.streaming.batch import EpisodeBatch

FIRST_CLASS = {"train": 0, "val": 1000, "test": 2000}
CLASSES = 40


def generator(*key: int) -> torch.Generator:
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def pattern(label: int, size: int) -> torch.Tensor:
    coarse = torch.rand(1, 1, 4, 4, generator=generator(7, label))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="nearest")[0]


class Synthetic:
    """``TrainData`` in memory."""

    def __init__(self, size: int = 12, n_way: int = 5, k_shot: int = 1, k_query: int = 5, noise: float = 0.3) -> None:
        self.size, self.n_way, self.k_shot, self.k_query, self.noise = size, n_way, k_shot, k_query, noise
        self.digest = "sha256:synthetic"

    def episode(self, split: str, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Support and query images ``[n_way * k, 1, size, size]``, a pure function of its arguments."""
        chance = generator(FIRST_CLASS[split], index)
        labels = self.labels(chance) + FIRST_CLASS[split]
        parts = []
        for k in (self.k_shot, self.k_query):
            clean = torch.stack([pattern(int(label), self.size) for label in labels for _ in range(k)])
            parts.append(clean + self.noise * torch.randn(clean.shape, generator=chance))
        return parts[0], parts[1]

    def labels(self, chance: torch.Generator) -> torch.Tensor:
        return torch.randperm(CLASSES, generator=chance)[: self.n_way]

    def class_count(self) -> int:
        return CLASSES

    def classes(self, index: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.labels(generator(FIRST_CLASS["train"], i)) for i in index.tolist()])

    def batch(self, split: str, indices: list[int]) -> EpisodeBatch:
        support, query = zip(*(self.episode(split, index) for index in indices), strict=True)
        labels = [torch.arange(self.n_way).repeat_interleave(k) for k in (self.k_shot, self.k_query)]
        support_y, query_y = (label.repeat(len(indices), 1) for label in labels)
        return EpisodeBatch(torch.stack(support), support_y, torch.stack(query), query_y, torch.tensor(indices))

    def train(
        self,
        batch_size: int,
        seed: int,
        device: torch.device,  # noqa: ARG002
        *,
        normalize: bool = False,  # noqa: ARG002
        transform: object = None,  # noqa: ARG002
        rank: int = 0,
        world_size: int = 1,
    ) -> SyntheticStream:
        return SyntheticStream(self, batch_size, seed, rank, world_size)

    def eval(
        self,
        split: str,
        episodes: int,
        batch_size: int,
        device: torch.device,  # noqa: ARG002
        *,
        normalize: bool = False,  # noqa: ARG002
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[EpisodeBatch]:
        for start in range(0, episodes, batch_size):
            if mine := part(range(start, min(start + batch_size, episodes)), rank, world_size):
                yield self.batch(split, mine)

    def describe(self) -> dict[str, Any]:
        return {
            "dataset": "synthetic",
            "split_scheme": "made-up",
            "n_way": self.n_way,
            "k_shot": self.k_shot,
            "k_query": self.k_query,
            "image_shape": (self.size, self.size, 1),
            "digest": self.digest,
            "source": "memory",
        }


def part(indices: range, rank: int, world_size: int) -> list[int]:
    """Those of one of several processes."""
    return list(indices[len(indices) * rank // world_size : len(indices) * (rank + 1) // world_size])


class SyntheticStream:
    """Epochs of seven meta-batches; the state is that of the consumer."""

    EPOCH = 7

    def __init__(self, data: Synthetic, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.next_batch = 0

    def __iter__(self) -> Iterator[EpisodeBatch]:
        for t in range(self.next_batch, (self.next_batch // self.EPOCH + 1) * self.EPOCH):
            first = (self.seed * 100_000 + t) * self.batch_size
            self.next_batch = t + 1
            yield self.data.batch("train", part(range(first, first + self.batch_size), self.rank, self.world_size))

    def state_dict(self) -> dict[str, Any]:
        return {"next_batch": self.next_batch, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next_batch = state["next_batch"]
