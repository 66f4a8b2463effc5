"""From the name of a dataset to its archive in two calls, or to its images; and reading an archive, wherever it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from mamldata.archive import build as building
from mamldata.archive import index, remote
from mamldata.archive.benchmarks import benchmark
from mamldata.archive.index import Archive
from mamldata.archive.plan import DEFAULT_EPISODES, BuildRequest, require_classes
from mamldata.archive.store import store_at
from mamldata.bank.make import make_bank
from mamldata.datasets.image_folder import FolderOptions
from mamldata.datasets.load import load_manifest
from mamldata.datasets.paths import data_root
from mamldata.errors import RequestError
from mamldata.io.urls import is_remote, shown_place
from mamldata.parallel import default_workers
from mamldata.progress import Notify, Progress, silence, silent
from mamldata.sampling.sampler import class_table
from mamldata.sampling.splits import SPLITS, divide
from mamldata.words import install_command

if TYPE_CHECKING:
    from mamldata.fetching.act import Fetched
    from mamldata.streaming.images import BankImages

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
    """Fetch a dataset's raw files and verify them. Existing files are kept; interrupted downloads continue.

    Args:
        dataset: a built-in name, or the path of a manifest.
        root: the data root; see ``mamldata.datasets.paths.data_root``.
        sources: places to look in before the manifest's own: folders, http(s) addresses, fsspec URLs.
        offline: do not use the network.
        progress: counts bytes, with a bar for each file.
        notify: gets a line for each wait and each failed try.

    Returns:
        For each file: its name, how it was obtained, its length in bytes and its digest.

    Raises:
        RequestError: the name is unknown, or a place cannot be read.
        FetchError: files are not available or are wrong; the message names all of them, with every source tried.
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
    thin: bool = False,
    query_alpha: int | None = None,
    root: Place | None = None,
    workers: int | None = None,
    executor: Executor | None = None,
    progress: Progress = silent,
    **folder: Unpack[FolderOptions],
) -> Archive:
    """Build an archive of episodes: the same arguments give the same bytes on every machine.

    The bank of images is made first if it is missing; nothing is downloaded. After an interruption, the same call
    continues.

    Args:
        dataset: a built-in name, the path of a manifest, or a folder of images.
        out: the archive's folder, created if missing; or an address that fsspec can write to.
        n_way, k_shot, k_query: classes; support and query images per class.
        episodes: how many for each of ``train``, ``val`` and ``test``; a split that is not named is left out.
        seed: of the episodes.
        split_scheme, rotations, image_size: the manifest's own if None.
        episodes_per_shard: as many as fit into 64 MiB if None.
        thin: store each image once, and draw the same episodes when they are read.
        query_alpha: of a thin archive: share out the queries unequally, see ``mamldata.sampling.sampler.EpisodeSpec``.
        root: the data root; see ``mamldata.datasets.paths.data_root``.
        workers: number of processes; one for each processor if None.
        executor: writes the shards instead of processes on this machine; see ``mamldata.archive.build.build``.
        progress: counts images and episodes.
        folder: how a folder of images is read: ``min_images``, ``skip_damaged`` and ``fit``; see
            ``mamldata.datasets.image_folder.FolderOptions``.

    Raises:
        RequestError: the name is unknown, the episodes cannot be made, or the place holds something else.
        DataMissingError: the raw files are missing; the message names the command that fetches them.
        DamagedError: a raw file or the bank is damaged.
        WriteError: the place cannot be written to.
    """
    request = BuildRequest(
        n_way=n_way,
        k_shot=k_shot,
        k_query=k_query,
        episodes=episodes,
        seed=seed,
        split_scheme=split_scheme,
        rotations=rotations,
        episodes_per_shard=episodes_per_shard,
        thin=thin,
        query_alpha=query_alpha,
    )
    manifest = load_manifest(os.fspath(dataset), **folder)
    processes = workers or default_workers()
    bank = make_bank(manifest, data_root(root), image_size, workers=processes, progress=progress)
    place = str(out) if is_remote(out) else Path(out)
    return building.build(manifest, bank, place, request, workers=processes, executor=executor, progress=progress)


def build_benchmark(
    name: str,
    out: Place,
    *,
    root: Place | None = None,
    workers: int | None = None,
    executor: Executor | None = None,
    progress: Progress = silent,
) -> Archive:
    """Build the archive of a benchmark and check its digest; an archive that is there already is used.

    Args:
        name: of the benchmark, such as ``omniglot-5w1s``; ``mamldata benchmarks`` lists all.
        out, root, workers, executor, progress: as for ``build``.

    Raises:
        RequestError: there is no such benchmark, or the place holds something else.
        DataMissingError, WriteError: as for ``build``.
        DamagedError: the images or the archive are not the benchmark's, or are damaged.
    """
    wanted = benchmark(name)
    place = str(out) if is_remote(out) else Path(out)
    there = building.finished(store_at(place))
    if there is not None and there.digest == wanted.sha256:
        return there
    manifest = load_manifest(wanted.dataset)
    processes = workers or default_workers()
    bank = make_bank(manifest, data_root(root), wanted.image_size, workers=processes, progress=progress)
    wanted.require_bank(bank)
    how: dict[str, Any] = {"workers": processes, "executor": executor, "progress": progress}
    archive = building.build(manifest, bank, place, wanted.request, **how)
    wanted.require_digest(archive, shown_place(place))
    return archive


def read_archive(place: Place) -> Archive:
    """An archive's settings, classes, shards and digest, from ``archive.json``. Shards are not touched.

    Args:
        place: its folder or its address.

    Raises:
        RequestError: it is not an archive, or is an unfinished one.
        FetchError: a file at the address could not be fetched.
        DamagedError: ``archive.json`` is damaged.
    """
    return remote.read_remote_archive(str(place)) if is_remote(place) else index.read_archive(Path(place))


def images(
    dataset: Place,
    split: str = "train",
    *,
    split_scheme: str | None = None,
    rotations: bool = False,
    image_size: int | None = None,
    root: Place | None = None,
    transform: Callable[[Any], Any] | None = None,
    target_transform: Callable[[Any], Any] | None = None,
    workers: int = 1,
    **folder: Unpack[FolderOptions],
) -> BankImages:
    """The images of a split as a ``VisionDataset`` of torchvision: pairs of a PIL image and the index of its class.

    The bank is made first if it is missing; nothing is downloaded.

    Args:
        dataset: a built-in name, or the path of a manifest.
        split: ``train``, ``val`` or ``test``.
        split_scheme, image_size: the manifest's own if None.
        rotations: every class four times, turned by 0, 90, 180 and 270 degrees, whatever the manifest says of episodes.
        root: the data root; see ``mamldata.datasets.paths.data_root``.
        transform, target_transform: of the PIL image, ``L`` or ``RGB``, and of the index.
        workers: processes that decode images if the bank must be made.
        folder: how a folder of images is read, see ``build``.

    Raises:
        RequestError: the name, the split or the scheme is unknown; the split has no classes; or torchvision is missing.
        DataMissingError: the raw files are missing; the message names the command that fetches them.
        DamagedError: the bank is damaged, see ``mamldata.bank.make.make_bank``.
    """
    try:
        from mamldata.streaming.images import BankImages
    except ModuleNotFoundError as error:
        raise RequestError(f"mamldata.images needs torchvision: {install_command('vision')}") from error
    if split not in SPLITS:
        raise RequestError(f"There is no split {split!r}; the splits are {', '.join(SPLITS)}.")
    manifest = load_manifest(os.fspath(dataset), **folder)
    scheme = manifest.scheme(split_scheme)  # before the bank is made, which may take an hour
    bank = make_bank(manifest, data_root(root), image_size, workers=workers)
    division = divide(scheme, bank.class_names, manifest.name, bank.class_splits)
    require_classes(division, [split], scheme, manifest)
    table = class_table(bank.class_names, bank.class_offsets, division[split], 4 if rotations else 1)
    return BankImages(bank, table, split, transform, target_transform)
