"""Plan an archive before any episode is drawn: its splits, classes and shards. Writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mamldata.archive.index import Archive, ArchiveSplit, Shard, shard_file, shard_sizes
from mamldata.archive.layout import MOST_EPISODES, EpisodeLayout
from mamldata.bank.format import Bank
from mamldata.datasets.manifest import Manifest
from mamldata.errors import RequestError
from mamldata.sampling.sampler import ROTATIONS, EpisodeSampler, class_table, quarter_turns
from mamldata.sampling.splits import SPLITS, divide, require_split

DEFAULT_EPISODES = {"train": 2000, "val": 200, "test": 600}
_SHARD_BYTES = 64 << 20  # a shard's default size: small enough to share out, large enough to stream


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        n_way, k_shot, k_query: classes; support and query images per class.
        episodes: how many for each split; a split with 0 is left out.
        seed: of the episodes.
        split_scheme, rotations: the manifest's own if None; rotations are ``all``, ``train`` or ``none``.
        episodes_per_shard: as many as fit into 64 MiB if None.
    """

    n_way: int = 5
    k_shot: int = 1
    k_query: int = 15
    episodes: Mapping[str, int] = field(default_factory=lambda: dict(DEFAULT_EPISODES))
    seed: int = 0
    split_scheme: str | None = None
    rotations: str | None = None
    episodes_per_shard: int | None = None

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


def plan_archive(manifest: Manifest, bank: Bank, request: BuildRequest) -> Archive:
    """The archive to build, its shards still without digests. Writes nothing.

    Raises:
        RequestError: more ways than classes, more shots than images, an unknown split scheme.
    """
    scheme = manifest.scheme(request.split_scheme)
    division = divide(scheme, bank.class_names, manifest.name, bank.class_splits)
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
                for number, (first, count) in enumerate(shard_sizes(episodes, per_shard))
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
    )
    for name, split_plan in archive.splits.items():
        EpisodeSampler(archive.spec(name), split_plan.classes)  # raises for impossible episodes, before any write
    return archive
