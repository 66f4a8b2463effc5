"""A run's episodes: those of an archive, or live ones from a dataset."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mamldata.batch import EpisodeBatch
from mamldata.device import DeviceStream
from mamldata.errors import RequestError
from mamldata.parallel import default_workers
from mamldata.sources import ArchiveSource, Source, live
from mamldata.stream import EpisodeStream


class EpisodeData:
    """Episodes to train and to evaluate on, from sources of ``mamldata``.

    Args:
        place: where they come from, for people.
        open_source: gives the source of a split, limited to its first episodes if the number is not None.
    """

    def __init__(self, place: str, open_source: Callable[[str, int | None], Source]) -> None:
        self.place = place
        self._open = open_source

    def train(self, batch_size: int, seed: int, device: torch.device) -> DeviceStream:
        """Meta-batches of the train split on a device, shuffled if they have an end."""
        return EpisodeStream(self._open("train", None), batch_size=batch_size, seed=seed).to(device)

    def eval(self, split: str, episodes: int, batch_size: int, device: torch.device) -> Iterable[EpisodeBatch]:
        """The first ``episodes`` episodes of a split, once and in order.

        Raises:
            RequestError: there are not so many.
        """
        source = self._open(split, episodes)
        if source.episodes is None or source.episodes < episodes:
            raise RequestError(f"{self.place} has {source.episodes} {split} episodes, but {episodes} are asked for.")
        return EpisodeStream(source, batch_size=batch_size, shuffle=False).to(device)

    def describe(self) -> dict[str, Any]:
        """What the episodes are, whatever their split."""
        info = asdict(self._open("train", None).info)
        del info["split"]
        digest = info["archive_sha256"] or info["bank_sha256"]
        return {**info, "image_shape": list(info["image_shape"]), "digest": digest, "source": self.place}

    def available(self, split: str) -> int | None:
        """How many episodes a split has; None if it never ends.

        Raises:
            RequestError: it has none.
        """
        return self._open(split, None).episodes

    def class_count(self) -> int:
        """How many classes the train split has, turned ones included."""
        return len(self._train_source.table)

    def classes(self, index: Tensor) -> Tensor:
        """The classes of training episodes: int64 ``[B, n_way]``, by label."""
        return torch.from_numpy(self._train_source.classes(index.cpu().numpy()))

    @cached_property
    def _train_source(self) -> Source:
        return self._open("train", None)


def archive_data(folder: str | os.PathLike[str], *, verify: bool = False) -> EpisodeData:
    """The episodes of an archive.

    Args:
        folder: of the archive.
        verify: hash each shard when it is opened.
    """

    def open_source(split: str, episodes: int | None) -> Source:
        return ArchiveSource(folder, split, verify=verify, episodes=episodes)

    return EpisodeData(str(folder), open_source)


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
