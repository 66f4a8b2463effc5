"""Build an archive: the same bytes on every machine, with any number of workers, interrupted or not."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mamldata.archive import (
    END,
    INDEX,
    INDEX_SUM,
    MOST_EPISODES,
    Archive,
    ArchiveSplit,
    EpisodeLayout,
    Shard,
    check_size,
    index_sum,
    is_archive,
    quarter_turns,
    read_archive,
    shard_file,
    shard_sizes,
)
from mamldata.bank import Bank
from mamldata.digest import canonical_json, sha256_file
from mamldata.episodes import ClassTable, EpisodeSampler, EpisodeSpec, class_table, gather
from mamldata.errors import DamagedError, RequestError, WriteError
from mamldata.files import commit, locked, make_folder, temporary, write_atomic, writing
from mamldata.manifest import ROTATIONS, SPLITS, Manifest
from mamldata.parallel import run_tasks
from mamldata.progress import Progress, silent
from mamldata.splits import divide

DEFAULT_EPISODES = {"train": 2000, "val": 200, "test": 600}
_SHARD_BYTES = 64 << 20  # a shard's size unless it is chosen: small enough to share out, large enough to stream
_CHUNK_BYTES = 8 << 20  # made in memory at a time


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        n_way, k_shot, k_query: classes; support and query images per class.
        episodes: for each split, how many; a split of none is left out.
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
        unknown = set(self.episodes) - set(SPLITS)
        if unknown:
            raise RequestError(f"There is no split {sorted(unknown)[0]!r}; the splits are {', '.join(SPLITS)}.")
        for split, count in self.episodes.items():
            if not 0 <= count < MOST_EPISODES:
                raise RequestError(f"{split} must be from 0 to {MOST_EPISODES - 1:,} episodes, not {count:,}.")
        if not any(self.episodes.values()):
            raise RequestError("No split has an episode: there is nothing to build.")
        if self.rotations not in {None, *ROTATIONS}:
            raise RequestError(f"rotations must be one of {', '.join(ROTATIONS)}, not {self.rotations!r}.")
        if self.episodes_per_shard is not None and self.episodes_per_shard < 1:
            raise RequestError(f"episodes_per_shard must be at least 1, not {self.episodes_per_shard}.")


def build(
    manifest: Manifest,
    bank: Bank,
    out: Path,
    request: BuildRequest | None = None,
    *,
    workers: int = 1,
    progress: Progress = silent,
) -> Archive:
    """Build an archive in the folder ``out``, or go on with one that was interrupted there.

    A folder that already holds the very archive is left as it is; a shard that is missing there, or has not its
    length, is written again, and then the others are hashed too.

    Args:
        manifest: the dataset.
        bank: its images.
        out: the archive's folder; made if it is not there.
        request: what to build.
        workers: processes that write shards.
        progress: told of episodes.

    Raises:
        RequestError: episodes that cannot be made; or the folder holds something else.
        WriteError: the folder cannot be written to.
    """
    plan = plan_archive(manifest, bank, request or BuildRequest())
    _refuse_other_content(out, plan)
    if is_archive(out) and not (out / ".build").exists() and _has_all_shards(out, archive := read_archive(out)):
        return archive
    make_folder(out)
    with locked(out / ".lock"):
        _refuse_other_content(out, plan)  # again: another process may have begun meanwhile
        archive = _build(plan, bank, out, workers, progress)
        # Only now: whoever waits for a lock that is gone finds nothing left to write. And in this order: while .build
        # is there the next build clears up, should this process die here.
        (out / ".lock").unlink(missing_ok=True)
        shutil.rmtree(out / ".build", ignore_errors=True)
        return archive


def plan_archive(manifest: Manifest, bank: Bank, request: BuildRequest) -> Archive:
    """The archive as it will be, its shards still without digests. Touches nothing.

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
        normalisation=bank.normalisation(division["train"]),
        splits=splits,
    )
    for name, split_plan in archive.splits.items():
        EpisodeSampler(archive.spec(name), split_plan.classes)  # refuses what cannot be, before anything is written
    return archive


def _refuse_other_content(out: Path, plan: Archive) -> None:
    """An archive is never written over another one, nor among files that are not its own."""
    if out.exists() and not out.is_dir():
        raise WriteError(f"{out} is a file. Choose a folder for the archive.")
    if is_archive(out):
        there = read_archive(out)
        if _without_digests(there) != plan.to_json():
            raise RequestError(
                f"{out} already holds another archive ({_difference(there, plan)}). Choose another folder, or "
                "delete that one."
            )
    elif (out / ".build").is_dir():
        started = _plan_file(out)
        if started.is_file() and started.read_bytes() != plan.to_json():
            other = _started_difference(started, plan)
            raise RequestError(
                f"{out} holds an unfinished build of another archive ({other}). Choose another folder, or delete "
                "that one."
            )
    elif out.is_dir() and any(entry.name != ".lock" for entry in out.iterdir()):
        raise RequestError(f"{out} is not empty and not an archive. Choose another folder for the archive.")


def _started_difference(started: Path, plan: Archive) -> str:
    try:
        return _difference(json.loads(started.read_bytes()), plan)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{started} is damaged"


def _without_digests(archive: Archive) -> bytes:
    document = json.loads(archive.to_json())
    for split in document["splits"].values():
        for shard in split["shards"]:
            shard["sha256"] = ""
    return canonical_json(document)


def _difference(there: Archive | dict[str, Any], plan: Archive) -> str:
    """The first settings in which two archives differ, for a message."""
    old = json.loads(there.to_json()) if isinstance(there, Archive) else there
    new = json.loads(plan.to_json())
    simple = [key for key in new if key != "splits" and old.get(key) != new[key]]
    if simple:
        return ", ".join(f"{key} {old.get(key)!r} there, {new[key]!r} asked for" for key in simple)
    counts = {
        split: (
            old["splits"].get(split, {}).get("episodes", 0),
            new["splits"].get(split, {}).get("episodes", 0),
        )
        for split in SPLITS
    }
    parts = [f"{split} {a} episodes there, {b} asked for" for split, (a, b) in counts.items() if a != b]
    return ", ".join(parts) or "other shard sizes or classes"


def _plan_file(out: Path) -> Path:
    return out / ".build" / "plan.json"


def _build(plan: Archive, bank: Bank, out: Path, workers: int, progress: Progress) -> Archive:
    there = read_archive(out) if is_archive(out) else None
    if there is not None and _has_all_shards(out, there):
        return there
    make_folder(out / ".build")
    write_atomic(_plan_file(out), plan.to_json())
    if there is not None:
        _reopen(out, there)
    digests: dict[str, str] = {}
    todo = []
    total = sum(split.episodes for split in plan.splits.values())
    with progress("build", total, "episodes") as advance:
        for task in _tasks(plan, bank, out):
            digest = _finished(out, task.shard)
            if digest is None:
                todo.append(task)
            else:
                digests[task.shard.file] = digest
                advance(task.shard.episodes)
        for task, digest in run_tasks(write_shard, todo, workers):
            digests[task.shard.file] = digest
            advance(task.shard.episodes)
    archive = _with_digests(plan, digests)
    write_atomic(out / INDEX_SUM, index_sum(archive.digest))
    write_atomic(out / INDEX, archive.to_json())
    return archive


def _has_all_shards(out: Path, archive: Archive) -> bool:
    """Whether all shards of a finished archive are there and have their length."""
    try:
        for split in archive.splits.values():
            for shard in split.shards:
                check_size(out / shard.file, shard)
    except DamagedError:
        return False
    return True


def _reopen(out: Path, archive: Archive) -> None:
    """Make a finished archive an unfinished build again: what ``archive.json`` says becomes the shards' receipts."""
    for split in archive.splits.values():
        for shard in split.shards:
            write_atomic(_receipt(out, shard), shard.sha256.encode())
    (out / INDEX).unlink()


@dataclass(frozen=True)
class ShardTask:
    """All that a process needs to write one shard, and nothing that it could not be sent."""

    bank: Bank
    spec: EpisodeSpec
    table: ClassTable
    image_shape: tuple[int, int, int]
    shard: Shard
    out: Path


def _tasks(plan: Archive, bank: Bank, out: Path) -> Iterator[ShardTask]:
    for name, split in plan.splits.items():
        for shard in split.shards:
            yield ShardTask(bank, plan.spec(name), split.classes, plan.image_shape, shard, out)


def write_shard(task: ShardTask) -> str:
    """Write one shard and its receipt; gives the shard's sha256."""
    path = task.out / task.shard.file
    digest = hashlib.sha256()
    with writing(path):
        with temporary(path).open("wb") as stream:
            for piece in shard_pieces(task):
                digest.update(piece)
                stream.write(piece)
        commit(path)
        receipt = _receipt(task.out, task.shard)
        write_atomic(receipt, digest.hexdigest().encode())
    return digest.hexdigest()


def shard_pieces(task: ShardTask) -> Iterator[memoryview]:
    """The bytes of a shard, a few megabytes at a time."""
    spec, shard = task.spec, task.shard
    layout = EpisodeLayout(spec.n_way, spec.k_shot, spec.k_query, task.image_shape)
    sampler = EpisodeSampler(spec, task.table)
    images = task.bank.open_images()
    for start, count in shard_sizes(shard.episodes, max(1, _CHUNK_BYTES // layout.stride)):
        first = shard.first_episode + start
        block = layout.frame(first, count)
        source = sampler.sample(first, count)
        layout.view(block, layout.source)[...] = source
        gather(
            images,
            task.table,
            source,
            spec.k_shot,
            layout.view(block, layout.support),
            layout.view(block, layout.query),
        )
        yield block.reshape(-1).data
    yield memoryview(bytes(END))


def _receipt(out: Path, shard: Shard) -> Path:
    return out / ".build" / f"{shard.file}.sha256"


def _finished(out: Path, shard: Shard) -> str | None:
    """The digest of a shard that an interrupted build finished, if its bytes are still those."""
    path, receipt = out / shard.file, _receipt(out, shard)
    if not (path.is_file() and receipt.is_file() and path.stat().st_size == shard.bytes):
        return None
    digest = receipt.read_text(errors="replace")
    return digest if sha256_file(path) == digest else None


def _with_digests(plan: Archive, digests: Mapping[str, str]) -> Archive:
    splits = {
        name: replace(split, shards=tuple(replace(shard, sha256=digests[shard.file]) for shard in split.shards))
        for name, split in plan.splits.items()
    }
    return replace(plan, splits=splits)
