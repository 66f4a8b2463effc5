"""Plan an archive before any episode is drawn: its splits, classes and shards. Writes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mamldata.archive.index import Archive, ArchiveSplit, ImageShard, Shard, image_shards, shard_file, shard_sizes
from mamldata.archive.layout import MOST_EPISODES, EpisodeLayout
from mamldata.bank.format import Bank
from mamldata.datasets.manifest import Manifest
from mamldata.errors import RequestError
from mamldata.sampling.sampler import ROTATIONS, EpisodeSampler, class_table, quarter_turns
from mamldata.sampling.splits import SPLITS, Division, SplitScheme, divide, require_split

DEFAULT_EPISODES = {"train": 2000, "val": 200, "test": 600}
_SHARD_BYTES = 64 << 20  # a shard's default size: small enough to share out, large enough to stream
_MOST_IMAGE_SHARDS = 64  # of a thin archive: all of them are mapped at once


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        n_way, k_shot, k_query: classes; support and query images per class.
        episodes: how many for each split; a split with 0 is left out.
        seed: of the episodes.
        split_scheme, rotations: the manifest's own if None; rotations are ``all``, ``train`` or ``none``.
        episodes_per_shard: as many as fit into 64 MiB if None.
        thin: store the bank's images once, and no copies of them for each episode.
        query_alpha: of a thin archive: how unequal the numbers of queries are, see
            ``mamldata.sampling.sampler.EpisodeSpec``; None: each class has ``k_query``.
    """

    n_way: int = 5
    k_shot: int = 1
    k_query: int = 15
    episodes: Mapping[str, int] = field(default_factory=lambda: dict(DEFAULT_EPISODES))
    seed: int = 0
    split_scheme: str | None = None
    rotations: str | None = None
    episodes_per_shard: int | None = None
    thin: bool = False
    query_alpha: int | None = None

    def __post_init__(self) -> None:
        for split, count in self.episodes.items():
            require_split(split)
            if not 0 <= count < MOST_EPISODES:
                raise RequestError(f"{split} must have from 0 to {MOST_EPISODES - 1:,} episodes, not {count:,}.")
        if not any(self.episodes.values()):
            raise RequestError("No split has any episodes, so there is nothing to build.")
        if self.rotations not in {None, *ROTATIONS}:
            raise RequestError(f"rotations must be one of {', '.join(ROTATIONS)}, not {self.rotations!r}.")
        if self.episodes_per_shard is not None and self.episodes_per_shard < 1:
            raise RequestError(f"episodes_per_shard must be at least 1, not {self.episodes_per_shard}.")
        if self.query_alpha is not None and not self.thin:
            raise RequestError(
                "query_alpha: a full archive stores equally many queries of each class. Build a thin one, or take live "
                "episodes."
            )
        if self.thin and self.episodes_per_shard is not None:
            raise RequestError("A thin archive has no shards of episodes. Leave out episodes_per_shard.")


def plan_archive(manifest: Manifest, bank: Bank, request: BuildRequest) -> Archive:
    """The archive to build, its shards still without digests. Writes nothing.

    Shards have about 64 MiB; those of a thin archive are larger if there would be more than 64 of them.

    Raises:
        RequestError: a split without classes, more ways than classes, more shots than images, an unknown split scheme.
    """
    scheme = manifest.scheme(request.split_scheme)
    division = divide(scheme, bank.class_names, manifest.name, bank.class_splits)
    require_classes(division, [split for split in SPLITS if request.episodes.get(split)], scheme, manifest)
    rotations = request.rotations or manifest.rotations
    image_shape = bank.shape[1:]
    layout = EpisodeLayout(request.n_way, request.k_shot, request.k_query, image_shape)
    per_shard = request.episodes_per_shard or max(1, _SHARD_BYTES // layout.stride)
    splits = {}
    for split in SPLITS:
        if episodes := request.episodes.get(split, 0):
            table = class_table(bank.class_names, bank.class_offsets, division[split], quarter_turns(rotations, split))
            shards = tuple(
                Shard(shard_file(split, number), first, count, layout.shard_bytes(count), "")
                for number, (first, count) in enumerate(shard_sizes(0 if request.thin else episodes, per_shard))
            )
            splits[split] = ArchiveSplit(table, episodes, shards)
    archive = Archive(
        dataset=manifest.name,
        dataset_version=manifest.version,
        bank_sha256=bank.sha256,
        split_scheme=scheme.name,
        rotations=rotations,
        seed=request.seed,
        n_way=request.n_way,
        k_shot=request.k_shot,
        k_query=request.k_query,
        image_shape=image_shape,
        normalization=bank.normalization(division["train"]),
        splits=splits,
        images=_image_shards(bank) if request.thin else (),
        query_alpha=request.query_alpha,
    )
    for name, split_plan in archive.splits.items():
        EpisodeSampler(archive.spec(name), split_plan.classes)  # raises for impossible episodes, before any write
    return archive


def _image_shards(bank: Bank) -> tuple[ImageShard, ...]:
    rows, *image_shape = bank.shape
    per_shard = max(1, _SHARD_BYTES // math.prod(image_shape), math.ceil(rows / _MOST_IMAGE_SHARDS))
    return image_shards(rows, per_shard, image_shape)


def require_classes(division: Division, splits: Sequence[str], scheme: SplitScheme, manifest: Manifest) -> None:
    """Check that splits have classes.

    Raises:
        RequestError: one has none; the message says which have.
    """
    if empty := [split for split in splits if not division[split]]:
        those, full = " and ".join(empty), [split for split in SPLITS if division[split]]
        raise RequestError(
            f"{manifest.name}, split scheme {scheme.name!r}, has no classes in {those}; it has classes in "
            f"{', '.join(full) or 'no split'}. Request no episodes of {those}, or put classes there."
        )
