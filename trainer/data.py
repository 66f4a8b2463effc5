"""A run's episodes: those of an archive, or live ones from a dataset."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mamldata.batch import EpisodeBatch
from mamldata.device import DeviceStream
from mamldata.errors import RequestError
from mamldata.parallel import default_workers
from mamldata.sources import Source, live, open_archive
from mamldata.stream import EpisodeStream


class EpisodeData:
    """Episodes to train and to evaluate on, from sources of ``mamldata``.

    Args:
        place: where they come from, for people.
        open_source: gives the source of a split, limited to its first episodes if the number is not None.
        remix: whether to train on remixed episodes.
    """

    def __init__(self, place: str, open_source: Callable[[str, int | None], Source], *, remix: bool = False) -> None:
        self.place = place
        self.remix = remix
        self._open = open_source
        self._trained_on: Source | None = None

    def train(
        self,
        batch_size: int,
        seed: int,
        device: torch.device,
        *,
        normalise: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> DeviceStream:
        """Meta-batches of the train split on a device, remixed, or else shuffled if they have an end."""
        source = self._open("train", None)
        stream = EpisodeStream(
            source,
            batch_size=batch_size,
            seed=seed,
            remix=self.remix,
            normalise=normalise,
            rank=rank,
            ranks=ranks,
        )
        self._trained_on = stream.source
        return stream.to(device)

    def eval(
        self,
        split: str,
        episodes: int,
        batch_size: int,
        device: torch.device,
        *,
        normalise: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> Iterable[EpisodeBatch]:
        """The first ``episodes`` episodes of a split, once and in order.

        Raises:
            RequestError: there are not so many.
        """
        source = self._open(split, episodes)
        if source.episodes is None or source.episodes < episodes:
            raise RequestError(f"{self.place} has {source.episodes} {split} episodes, but {episodes} are asked for.")
        stream = EpisodeStream(
            source, batch_size=batch_size, shuffle=False, normalise=normalise, rank=rank, ranks=ranks
        )
        return stream.to(device)

    def describe(self) -> dict[str, Any]:
        """What the episodes are, whatever their split."""
        info = asdict(self._open("train", None).info)
        del info["split"], info["normalisation"]  # which follows from the rest
        digest = info["archive_sha256"] or info["bank_sha256"]
        shape = list(info["image_shape"])
        return {**info, "image_shape": shape, "digest": digest, "remix": self.remix, "source": self.place}

    def available(self, split: str) -> int | None:
        """How many episodes a split has; None if it never ends.

        Raises:
            RequestError: it has none.
        """
        return self._open(split, None).episodes

    def class_count(self) -> int:
        """How many classes the train split has, turned ones included."""
        return len((self._trained_on or self._open("train", None)).table)

    def classes(self, index: Tensor) -> Tensor:
        """The classes of the episodes that ``train`` gives: int64 ``[B, n_way]``, by label."""
        assert self._trained_on is not None, "which episodes an index means is known once training has begun"
        return torch.from_numpy(self._trained_on.classes(index.cpu().numpy()))


def archive_data(
    folder: str | os.PathLike[str],
    *,
    verify: bool = False,
    remix: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> EpisodeData:
    """The episodes of an archive.

    Args:
        folder: of the archive, or its address.
        verify: hash each shard when it is opened.
        remix: train on episodes formed anew in each epoch, see ``mamldata.remix``; evaluation never does.
        cache_dir: where the shards of an archive at an address are kept.
    """

    def open_source(split: str, episodes: int | None) -> Source:
        return open_archive(folder, split, verify=verify, episodes=episodes, cache_dir=cache_dir)

    return EpisodeData(str(folder), open_source, remix=remix)


def live_data(dataset: str, root: str | os.PathLike[str] | None, options: Mapping[str, Any]) -> EpisodeData:
    """Episodes drawn from a dataset as they are needed, so that training never sees one twice.

    Args:
        dataset: a built-in name, or a manifest's path.
        root: the data root.
        options: more arguments of ``mamldata.live``.
    """

    def open_source(split: str, episodes: int | None) -> Source:
        return live(dataset, split, root=root, episodes=episodes, workers=default_workers(), **options)

    return EpisodeData(dataset, open_source)
