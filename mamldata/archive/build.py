"""Build an archive: the same bytes on every machine, with any number of workers, interrupted or not."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamldata.archive.index import BUILD, INDEX, INDEX_SUM, PLAN, Archive, check_archive, index_sum
from mamldata.archive.plan import BuildRequest, plan_archive
from mamldata.archive.store import OURS, Store, foreign_in_build, store_at
from mamldata.archive.write import ShardMade, ShardTask, make_shard, receipt
from mamldata.bank.format import Bank
from mamldata.datasets.manifest import Manifest
from mamldata.errors import RequestError, WriteError
from mamldata.io.digest import sha256_bytes
from mamldata.parallel import run_tasks
from mamldata.progress import Progress, silent
from mamldata.sampling.splits import SPLITS

_TRIES = 3  # a try fails only if another process clears up at that moment


@dataclass(frozen=True)
class Portion:
    """Which shards of a build one call writes: the ``number``-th of every ``of`` consecutive ones, counted from 1."""

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            last = max(self.of, 1)
            raise RequestError(f"There is no portion {self}: portions are counted from 1/{last} to {last}/{last}.")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True)
class PortionBuilt:
    """Counts of shards: in the portion, written by this call, and in the whole archive."""

    shards: int
    written: int
    of_shards: int


def build(
    manifest: Manifest,
    bank: Bank,
    out: Path | str,
    request: BuildRequest | None = None,
    *,
    workers: int = 1,
    executor: Executor | None = None,
    progress: Progress = silent,
) -> Archive:
    """Build an archive at ``out``, or continue one that was interrupted there.

    If the place already holds this archive, it is left as it is. If one of its shards is missing or has the wrong
    length, that shard is written again, and the others are hashed.

    Args:
        manifest: the dataset.
        bank: its images.
        out: the archive's folder, created if missing; or an address that fsspec can write to.
        request: what to build.
        workers: processes on this machine that write shards; ignored if there is an executor.
        executor: writes the shards, and is left open. Its workers, on any machine, must see the bank and ``out``
            under the same names as this process.
        progress: counts episodes, or images if the archive is thin.

    Raises:
        RequestError: the episodes cannot be made, the place holds something else, or its kind is read-only.
        WriteError: the place cannot be written to.
        MamldataError: a worker died, or does not see the same files.
    """
    plan = plan_archive(manifest, bank, request or BuildRequest())
    store = store_at(out)
    _refuse_other_content(store, plan)
    if (archive := finished(store)) is not None:
        return archive
    store.prepare()
    with store.alone():
        _refuse_other_content(store, plan)  # again: another process may have started meanwhile
        archive = _build(plan, bank, store, workers if executor is None else executor, progress)
        # Not before: a process that still waits for the removed lock must find nothing left to write.
        store.clear()
        return archive


def build_portion(
    manifest: Manifest,
    bank: Bank,
    out: Path | str,
    portion: Portion,
    request: BuildRequest | None = None,
    *,
    workers: int = 1,
    executor: Executor | None = None,
    progress: Progress = silent,
) -> PortionBuilt:
    """Write a portion of an archive's shards. A ``build`` that finds all of them closes the archive.

    Portions, even overlapping ones, may be built at the same time, on several machines, and alongside a ``build``.

    Args:
        manifest, bank, out, request, workers, executor, progress: as for ``build``.
        portion: which shards.

    Raises:
        RequestError, WriteError, MamldataError: as for ``build``.
    """
    plan = plan_archive(manifest, bank, request or BuildRequest())
    store = store_at(out)
    _refuse_other_content(store, plan)
    names = [shard.file for shard in plan.shards()]
    chosen = names[portion.number - 1 :: portion.of]
    if finished(store) is not None:
        return PortionBuilt(len(chosen), 0, len(names))
    _undisturbed(store, lambda: _begin(store, plan))
    made = _make(plan, bank, store, chosen, workers if executor is None else executor, progress)
    if store.size(INDEX) is not None:  # a build that also did our work has closed it meanwhile
        store.clear()
    return PortionBuilt(len(chosen), sum(shard.written for shard in made.values()), len(names))


def _refuse_other_content(store: Store, plan: Archive) -> None:
    """Never write an archive over another one, or among files that are not its own."""
    # In this order, so that files of a build that runs meanwhile are not taken for foreign ones.
    strangers = store.entries().keys() - OURS
    started = store.read(PLAN)
    there = _read_archive(store)
    if there is not None:
        if there.without_digests().to_json() != plan.to_json():
            raise RequestError(
                f"{store} already holds another archive ({_difference(there, plan)}). Choose another folder, or "
                "delete this one."
            )
    elif started is not None:
        if started != plan.to_json():
            other = _started_difference(started, plan, store)
            raise RequestError(
                f"{store} holds an unfinished build of another archive ({other}). Choose another folder, or delete "
                "this one."
            )
    elif strangers or foreign_in_build(store):
        raise RequestError(f"{store} is not empty and not an archive. Choose another folder.")


def _started_difference(started: bytes, plan: Archive, store: Store) -> str:
    try:
        return _difference(json.loads(started), plan)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{PLAN} in {store} is damaged"


def _difference(there: Archive | dict[str, Any], plan: Archive) -> str:
    """The first settings in which two archives differ, for a message."""
    old = json.loads(there.to_json()) if isinstance(there, Archive) else there
    new = json.loads(plan.to_json())
    simple = [key for key in new if key not in {"splits", "images"} and old.get(key) != new[key]]
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


def _read_archive(store: Store) -> Archive | None:
    """The finished archive at a place, if there is one.

    Raises:
        DamagedError: its ``archive.json`` is damaged.
    """
    data = store.read(INDEX)
    return None if data is None else check_archive(data, store.read(INDEX_SUM), f"{store}/{INDEX}")


def finished(store: Store) -> Archive | None:
    """The archive at a place, if it is finished: no shard is missing, and nothing is left to clear.

    Raises:
        DamagedError: its ``archive.json`` is damaged.
    """
    archive = _read_archive(store)
    return archive if archive and BUILD not in store.entries() and not _missing(store, archive) else None


def _missing(store: Store, archive: Archive) -> list[str]:
    """The shards that are missing or have the wrong length."""
    sizes = store.entries()
    doubtful = [shard for shard in archive.shards() if sizes.get(shard.file) != shard.bytes]
    # On a shared file system, a listing may not show yet what another machine has written.
    return [shard.file for shard in doubtful if store.size(shard.file) != shard.bytes]


def _build(plan: Archive, bank: Bank, store: Store, workers: int | Executor, progress: Progress) -> Archive:
    there = _read_archive(store)
    if there is not None and not _missing(store, there):
        return there
    _undisturbed(store, lambda: _begin(store, plan))
    made = _make(plan, bank, store, [shard.file for shard in plan.shards()], workers, progress)
    archive = plan.with_digests({file: shard.sha256 for file, shard in made.items()})
    if missing := _missing(store, archive):
        raise WriteError(
            f"Workers wrote {len(made)} shards, but {len(missing)} of them are not in {store} (first: {missing[0]}). "
            "All workers need the same file system, at the same path; or give an address that all of them reach, "
            "such as s3://bucket/folder."
        )
    _refuse_other_content(store, plan)  # again: at an address no lock keeps two builds apart
    _undisturbed(store, lambda: _close(store, archive))
    return archive


def _begin(store: Store, plan: Archive) -> None:
    """Make the place an unfinished build of this plan, even if it holds the finished archive without some shard."""
    store.write_new(PLAN, plan.to_json())
    _refuse_other_content(store, plan)  # another process may have been first
    there = _read_archive(store)
    if there is not None and _missing(store, there):
        # The digests in archive.json become the shards' receipts.
        for shard in there.shards():
            store.write(receipt(shard), [shard.sha256.encode()])
        store.remove(INDEX)


def _close(store: Store, archive: Archive) -> None:
    store.write(INDEX_SUM, [index_sum(archive.digest)])
    store.write(INDEX, [archive.to_json()])


def _undisturbed(store: Store, act: Callable[[], None]) -> None:
    """Do something that needs ``.build``; try again if another process has just closed the archive and removed it."""
    for _ in range(_TRIES):
        store.prepare()
        try:
            act()
            return
        except FileNotFoundError:
            continue
    raise WriteError(f"{store}/{BUILD} keeps being removed. Run one build at a time there.")


def _make(
    plan: Archive, bank: Bank, store: Store, files: Collection[str], workers: int | Executor, progress: Progress
) -> dict[str, ShardMade]:
    """Write the shards that are not there yet, in any order; returns all of them by file name."""
    chosen, digest, path = frozenset(files), sha256_bytes(plan.to_json()), bank.path.absolute()
    shards = {ShardTask(store, digest, path, shard.file): shard for shard in plan.shards() if shard.file in chosen}
    made = {}
    with progress("build", sum(shard.count for shard in shards.values()), plan.unit) as advance:
        for task, result in run_tasks(make_shard, shards, workers):
            made[shards[task].file] = result
            advance(shards[task].count)
    return made
