"""Episodes drawn from a bank on demand, without an archive."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from mamldata.archive.plan import BuildRequest, plan_archive
from mamldata.bank.make import make_bank
from mamldata.datasets.load import load_manifest
from mamldata.datasets.paths import data_root
from mamldata.sampling.order import Indices
from mamldata.sampling.sampler import ClassTable, EpisodeSampler, gather
from mamldata.sources.source import AllHere, EpisodeInfo, Images, at_most, draw, episode_info, require_some


@dataclass(frozen=True, eq=False)  # arrays do not compare to one truth
class LiveSource(AllHere):
    """Episodes drawn from a bank on demand; the same ones that an archive would hold.

    Attributes:
        info: what the episodes are.
        images: the bank, uint8 ``[images, H, W, C]``.
        sampler: draws the episodes.
        episodes: how many; None: they never end.
    """

    info: EpisodeInfo
    bank_path: Path
    images: Images = field(repr=False)
    sampler: EpisodeSampler = field(repr=False)
    episodes: int | None = None

    @property
    def table(self) -> ClassTable:
        """The split's classes."""
        return self.sampler.table

    def read(self, index: Indices, support: Images, query: Images) -> None:
        """Draw episodes and copy their images out of the bank."""
        source = draw(self.sampler, index)
        info = self.info
        shapes = [(len(index), info.n_way, k, *info.image_shape) for k in (info.k_shot, info.k_query)]
        parts = [part[: math.prod(shape)].reshape(shape) for part, shape in zip((support, query), shapes, strict=True)]
        gather(self.images, self.table, source, info.k_shot, *parts)

    def class_labels(self, index: int) -> list[str]:
        """The names of an episode's classes, one for each way."""
        return [self.table.label(int(way[0])) for way in self.sampler.sample(index, 1)[0]]

    def classes(self, index: Indices) -> Indices:
        """The classes of episodes, as indices into the table: int64 ``[B, n_way]``, by label."""
        return draw(self.sampler, index)[..., 0].astype(np.int64)

    def view(self, episodes: int | None = None) -> Self:
        """The same episodes, at most the first ``episodes``; see ``ArchiveSource.view``."""
        return self if episodes is None else replace(self, episodes=at_most(self.episodes, require_some(episodes)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "images": self.images.shape}

    def __setstate__(self, state: dict[str, Any]) -> None:
        images = state.pop("images")
        self.__dict__.update(state)
        start = self.bank_path.stat().st_size - int(np.prod(images))
        self.__dict__["images"] = np.asarray(np.memmap(self.bank_path, np.uint8, "r", start, images))


def live(
    dataset: str,
    split: str = "train",
    *,
    n_way: int = 5,
    k_shot: int = 1,
    k_query: int = 15,
    seed: int = 0,
    episodes: int | None = None,
    split_scheme: str | None = None,
    rotations: str | None = None,
    image_size: int | None = None,
    root: str | os.PathLike[str] | None = None,
    workers: int = 1,
) -> LiveSource:
    """Episodes without an archive, drawn from a dataset's bank on demand.

    The bank is made first if it is missing; nothing is downloaded.

    Args:
        dataset: a built-in name, or the path of a manifest.
        split: ``train``, ``val`` or ``test``.
        n_way, k_shot, k_query: classes; support and query images per class.
        seed: of the episodes; an archive built with the same seed holds the same ones.
        episodes: how many; None: they never end.
        split_scheme, rotations, image_size: the manifest's own if None.
        root: the data root; see ``mamldata.datasets.paths.data_root``.
        workers: processes that decode images if the bank must be made.

    Raises:
        RequestError: the name is unknown, or the episodes cannot be made.
        DataMissingError: the raw files are missing; the message names the command that fetches them.
        DamagedError: the bank is damaged, see ``mamldata.bank.make.make_bank``.
    """
    request = BuildRequest(n_way, k_shot, k_query, {split: 1}, seed, split_scheme, rotations)
    if episodes is not None:
        require_some(episodes)
    manifest = load_manifest(dataset)
    manifest.scheme(split_scheme)  # before the bank is made, which may take an hour
    bank = make_bank(manifest, data_root(root), image_size, workers=workers)
    plan = plan_archive(manifest, bank, request)
    sampler = EpisodeSampler(plan.spec(split), plan.split(split).classes)
    return LiveSource(episode_info(plan, split, None), bank.path, bank.open_images(), sampler, episodes)
