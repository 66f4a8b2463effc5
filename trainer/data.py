"""A run's episodes: those of an archive, or live ones from a dataset."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mamldata.bank.prepare import recipe_of
from mamldata.datasets.manifest import UNKNOWN
from mamldata.errors import DamagedError, RequestError
from mamldata.io.urls import is_remote, shown_place
from mamldata.parallel import default_workers
from mamldata.sampling.order import Indices
from mamldata.sampling.splits import SPLITS
from mamldata.sources.live import live
from mamldata.sources.open import open_archive
from mamldata.sources.source import EpisodeInfo, Source, SplitSource
from mamldata.streaming.batch import EpisodeBatch
from mamldata.streaming.device import DeviceStream
from mamldata.streaming.stream import EpisodeStream
from mamldata.words import counted

OpenSource = Callable[[str], SplitSource]


class EpisodeData:
    """Episodes to train and to evaluate on, from sources of ``mamldata``.

    A split is opened on first use and then kept, so that later changes at its place do not affect a run in progress.
    Streams can be read at the same time; each keeps its own source.

    Args:
        place: where they come from, in a form that is safe to show and store.
        open_source: gives the source of a split.
        remix: whether to train on remixed episodes.
        root: the data root, whose banks tell how images were prepared.

    Raises:
        DamagedError: from any method that opens a split: the data have changed since another split was opened.
    """

    def __init__(
        self,
        place: str,
        open_source: OpenSource,
        *,
        remix: bool = False,
        root: str | os.PathLike[str] | None = None,
    ) -> None:
        self.place = place
        self._root = root
        self._image: dict[str, Any] | str = ""
        self.remix = remix
        self._open = open_source
        self._sources: dict[str, SplitSource] = {}
        self._trained_on: Source | None = None

    def train(self, batch_size: int, seed: int, device: torch.device, **options: Any) -> DeviceStream:
        """See ``TrainData.train``: remixed, or else shuffled if the split is finite."""
        stream = self.stream(batch_size, seed, **options)
        self._trained_on = stream.source
        return stream.to(device)

    def stream(self, batch_size: int, seed: int, **options: Any) -> EpisodeStream:
        """What ``train`` puts on a device; ``options`` are those of ``EpisodeStream``."""
        return EpisodeStream(
            self._source("train").view(), batch_size=batch_size, seed=seed, remix=self.remix, **options
        )

    @property
    def info(self) -> EpisodeInfo:
        """What the training episodes are."""
        return self._source("train").info

    def eval(
        self, split: str, episodes: int, batch_size: int, device: torch.device, **options: Any
    ) -> Iterable[EpisodeBatch]:
        """The first ``episodes`` episodes of a split, once and in order.

        Raises:
            RequestError: the split has fewer episodes.
        """
        source = self._source(split)
        if source.episodes is not None and source.episodes < episodes:
            raise RequestError(
                f"{self.place} has {counted(source.episodes, f'{split} episode')}, but {episodes} were requested."
            )
        whole = source.view(episodes)
        return EpisodeStream(whole, batch_size=batch_size, shuffle=False, **options).to(device)

    def describe(self) -> dict[str, Any]:
        """A description of the episodes, the same for all splits.

        Raises:
            RequestError: no split has episodes.
        """
        if not self._sources:
            self._open_one()
        return self._describe(next(iter(self._sources.values())))

    def available(self, split: str) -> int | None:
        """How many episodes a split has; None if it never ends.

        Raises:
            RequestError: it has no episodes.
        """
        return self._source(split).episodes

    def class_names(self, split: str, index: Indices) -> list[list[str]]:
        """The names of the classes of the episodes that ``eval`` gives, by label.

        Args:
            split: of the episodes.
            index: their indices in it, int64 ``[E]``.
        """
        source = self._source(split)
        return [[source.table.label(one) for one in classes] for classes in source.classes(index).tolist()]

    def class_count(self) -> int:
        """The number of classes in the train split, rotated ones included."""
        return len(self._source("train").table)

    def classes(self, index: Tensor) -> Tensor:
        """The classes of the episodes that ``train`` gives: int64 ``[B, n_way]``, by label."""
        assert self._trained_on is not None, "call train first: it decides which episodes an index stands for"
        return torch.from_numpy(self._trained_on.classes(index.cpu().numpy()))

    def _source(self, split: str) -> SplitSource:
        if split not in self._sources:
            source = self._open(split)
            if self._sources:
                self._require_same(source)
            self._sources[split] = source
        return self._sources[split]

    def _open_one(self) -> None:
        """Open any split: some have episodes only to test on."""
        faults = []
        for split in SPLITS:
            try:
                self._source(split)
                return
            except RequestError as error:
                faults.append(error)
        raise faults[0]

    def _require_same(self, source: Source) -> None:
        before, now = self.describe(), self._describe(source)
        if different := [key for key in before if before[key] != now[key]]:
            raise DamagedError(
                f"{self.place} changed while it was in use: its {source.info.split} split differs from those opened "
                f"before in {', '.join(different)}. Run the same command again."
            )

    def _describe(self, source: Source) -> dict[str, Any]:
        info = source.info.identity()
        del info["split"]
        digest = info["archive_sha256"] or info["bank_sha256"]
        own = {"digest": digest, "remix": self.remix, "source": self.place, "image": self._image_of(source)}
        return {**info, "normalisation": source.info.normalization.to_json(), **own}

    def _image_of(self, source: Source) -> dict[str, Any] | str:
        """How the images were prepared, looked up once: see ``ImageRecipe``; or ``unknown``."""
        if not self._image:
            info = source.info
            recipe = recipe_of(info.dataset, info.bank_sha256, info.image_shape[0], self._root)
            self._image = recipe.to_json() if recipe else UNKNOWN
        return self._image


def archive_data(
    folder: str | os.PathLike[str],
    *,
    verify: bool = True,
    remix: bool = True,
    narrow: Mapping[str, int] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
) -> EpisodeData:
    """The episodes of an archive.

    Args:
        folder: of the archive, or its address.
        verify: hash each shard of a folder when it is first read; shards from an address are always hashed.
        remix: train on new episodes in each epoch, see ``mamldata.sources.remixed``; evaluation never does.
        narrow: ``n_way``, ``k_shot`` and ``k_query``, if episodes with fewer than are stored are wanted.
        cache_dir: where to keep the shards of an archive at an address.
        root: the data root, where a bank of the same images tells how they were prepared.
    """

    def open_source(split: str) -> SplitSource:
        whole = open_archive(folder, split, verify=verify and not is_remote(folder), cache_dir=cache_dir)
        return whole.narrowed(**narrow) if narrow else whole

    return EpisodeData(shown_place(folder), open_source, remix=remix, root=root)


def live_data(dataset: str, root: str | os.PathLike[str] | None, options: Mapping[str, Any]) -> EpisodeData:
    """Episodes drawn from a dataset as they are needed, so that training never sees one twice.

    Args:
        dataset: a built-in name, or a manifest's path.
        root: the data root.
        options: more arguments of ``mamldata.live``.
    """

    def open_source(split: str) -> SplitSource:
        return live(dataset, split, root=root, workers=default_workers(), **options)

    return EpisodeData(dataset, open_source, root=root)
