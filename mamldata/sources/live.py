"""Episodes drawn from a bank on demand, without an archive."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Unpack

from mamldata.archive.plan import BuildRequest, plan_archive
from mamldata.bank.format import map_images
from mamldata.bank.make import make_bank
from mamldata.datasets.image_folder import FolderOptions
from mamldata.datasets.load import load_manifest
from mamldata.datasets.paths import data_root
from mamldata.progress import Progress, silent
from mamldata.sampling.disjoint import DisjointSampler
from mamldata.sampling.sampler import EpisodeSampler
from mamldata.sources.drawn import DrawnSource
from mamldata.sources.pixels import Rows
from mamldata.sources.source import Images, at_most, episode_info, require_some


class LiveSource(DrawnSource):
    """Episodes drawn from a dataset's bank; the same ones that an archive of the same settings holds."""


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
    query_alpha: int | None = None,
    image_size: int | None = None,
    disjoint: bool = False,
    root: str | os.PathLike[str] | None = None,
    workers: int = 1,
    progress: Progress = silent,
    **folder: Unpack[FolderOptions],
) -> LiveSource:
    """Episodes without an archive, drawn from a dataset's bank on demand.

    The bank is made first if it is missing; nothing is downloaded.

    Args:
        dataset: a built-in name, or the path of a manifest.
        split: ``train``, ``val`` or ``test``.
        n_way, k_shot, k_query: classes; support and query images per class.
        seed: of the episodes; an archive built with the same seed holds the same ones.
        episodes: how many; None: they never end.
        query_alpha: share out the ``n_way * k_query`` query images unequally, by a Dirichlet distribution with this
            parameter; see ``mamldata.sampling.sampler.EpisodeSpec``.
        split_scheme, rotations, image_size: the manifest's own if None.
        disjoint: draw episodes that share no image, which end when the images do; see
            ``mamldata.sampling.disjoint.DisjointSampler``. They are others than those of an archive.
        root: the data root; see ``mamldata.datasets.paths.data_root``.
        workers: processes that decode images if the bank must be made.
        progress: counts its images, or the bytes that are hashed.
        folder: how a folder of images is read; see ``FolderOptions``.

    Raises:
        RequestError: the name is unknown, or the episodes cannot be made.
        DataMissingError: the raw files are missing; the message names the command that fetches them.
        DamagedError: the bank is damaged, see ``mamldata.bank.make.make_bank``.
    """
    request = BuildRequest(
        n_way, k_shot, k_query, {split: 1}, seed, split_scheme, rotations, thin=True, query_alpha=query_alpha
    )
    if episodes is not None:
        require_some(episodes)
    manifest = load_manifest(dataset, **folder)
    manifest.scheme(split_scheme)  # before the bank is made, which may take an hour
    bank = make_bank(manifest, data_root(root), image_size, workers=workers, progress=progress)
    plan = plan_archive(manifest, bank, request)
    sampler = (DisjointSampler if disjoint else EpisodeSampler)(plan.spec(split), plan.split(split).classes)
    if isinstance(sampler, DisjointSampler):
        episodes = at_most(episodes, sampler.episodes)
    rows = Rows([0], partial(_open_bank, bank.path, bank.shape))
    info = replace(episode_info(plan, split, None), disjoint=disjoint)
    return LiveSource(info, sampler, rows, episodes)


def _open_bank(path: Path, shape: tuple[int, int, int, int], _: int) -> Images:
    return map_images(path, shape).reshape(shape[0], -1)
