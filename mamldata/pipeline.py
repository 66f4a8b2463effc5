"""From the name of a dataset to its archive, in two calls; and an archive read back, wherever it is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING

from mamldata.archive import build as building
from mamldata.archive import index, remote
from mamldata.archive.index import Archive
from mamldata.archive.plan import DEFAULT_EPISODES, BuildRequest
from mamldata.bank.make import make_bank
from mamldata.datasets.load import load_manifest
from mamldata.datasets.paths import data_root
from mamldata.io.urls import is_remote
from mamldata.parallel import default_workers
from mamldata.progress import Notify, Progress, silence, silent

if TYPE_CHECKING:
    from mamldata.fetching.act import Fetched

Place = str | os.PathLike[str]


def fetch(
    dataset: Place,
    *,
    root: Place | None = None,
    sources: Sequence[str] = (),
    offline: bool = False,
    progress: Progress = silent,
    notify: Notify = silence,
) -> list[Fetched]:
    """Get a dataset's raw files and verify them. What is there is left alone; what was broken off goes on.

    Args:
        dataset: a built-in name, or the path of a manifest.
        root: the data root; see ``mamldata.datasets.paths.data_root``.
        sources: places to look in before the manifest's own: folders, http(s) addresses, fsspec URLs.
        offline: touch no network.
        progress: told of bytes, a bar for each file.
        notify: told of waiting and of failed tries, a line each.

    Returns:
        Each file: its name, how it got there, its length and digest.

    Raises:
        RequestError: an unknown name, or a place that cannot be read.
        FetchError: files that are not available, or are not the right ones; all are named, with every source tried.
        WriteError: the root cannot be written to.
    """
    from mamldata.fetching import act

    manifest = load_manifest(os.fspath(dataset))
    return act.fetch(manifest, data_root(root), sources, offline=offline, progress=progress, notify=notify)


def build(
    dataset: Place,
    out: Place,
    *,
    n_way: int = 5,
    k_shot: int = 1,
    k_query: int = 15,
    episodes: Mapping[str, int] = DEFAULT_EPISODES,
    seed: int = 0,
    split_scheme: str | None = None,
    rotations: str | None = None,
    image_size: int | None = None,
    episodes_per_shard: int | None = None,
    root: Place | None = None,
    workers: int | None = None,
    executor: Executor | None = None,
    progress: Progress = silent,
) -> Archive:
    """Build an archive of episodes: the same arguments give the same bytes on every machine.

    The bank of images is made first if it is not there; nothing is downloaded. Interrupted, the same call goes on.

    Args:
        dataset: a built-in name, the path of a manifest, or a folder of images.
        out: the archive's folder, made if it is not there; or an address that fsspec writes to.
        n_way, k_shot, k_query: classes; support and query images per class.
        episodes: how many for each of ``train``, ``val`` and ``test``; a split that is not named is left out.
        seed: of the episodes.
        split_scheme, rotations, image_size: the manifest's own if None.
        episodes_per_shard: as many as fit into 64 MiB if None.
        root: the data root; see ``mamldata.datasets.paths.data_root``.
        workers: processes; one for each processor if None.
        executor: writes the shards in place of processes on this machine; see ``mamldata.archive.build.build``.
        progress: told of images and of episodes.

    Raises:
        RequestError: an unknown name, episodes that cannot be made, or a place that holds something else.
        DataMissingError: the raw files are not there; the message names the command that gets them.
        DamagedError: a raw file or the bank is damaged.
        WriteError: the place cannot be written to.
    """
    request = BuildRequest(n_way, k_shot, k_query, episodes, seed, split_scheme, rotations, episodes_per_shard)
    manifest = load_manifest(os.fspath(dataset))
    processes = workers or default_workers()
    bank = make_bank(manifest, data_root(root), image_size, workers=processes, progress=progress)
    place = str(out) if is_remote(out) else Path(out)
    return building.build(manifest, bank, place, request, workers=processes, executor=executor, progress=progress)


def read_archive(place: Place) -> Archive:
    """What ``archive.json`` says of an archive: its settings, classes, shards and digest. The shards are not touched.

    Args:
        place: its folder or its address.

    Raises:
        RequestError: not an archive, or an unfinished one.
        FetchError: what is at the address is not available.
        DamagedError: ``archive.json`` is not what was written.
    """
    return remote.read_remote_archive(str(place)) if is_remote(place) else index.read_archive(Path(place))
