"""Verified, bit-reproducible episode archives for few-shot learning, streamed into PyTorch.

``fetch`` and ``build`` make an archive; ``EpisodeStream`` reads it:

    mamldata.fetch("omniglot")
    mamldata.build("omniglot", "omniglot-5w1s")
    for batch in mamldata.EpisodeStream("omniglot-5w1s", split="train", batch_size=32, seed=0).to("cuda"):
        ...
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mamldata.version import __version__

if TYPE_CHECKING:
    from mamldata.archive.index import Archive
    from mamldata.bank.prepare import prepare_image
    from mamldata.datasets.load import load_manifest
    from mamldata.datasets.manifest import ImageRecipe, Manifest
    from mamldata.errors import MamldataError
    from mamldata.pipeline import build, build_benchmark, fetch, images, read_archive
    from mamldata.sources.live import live
    from mamldata.sources.source import EpisodeInfo
    from mamldata.streaming.batch import EpisodeBatch
    from mamldata.streaming.stream import EpisodeStream
    from mamldata.streaming.transforms import batched
    from mamldata.streaming.webdataset import decode_episodes

_HOME = {
    "Archive": "archive.index",
    "EpisodeBatch": "streaming.batch",
    "EpisodeInfo": "sources.source",
    "EpisodeStream": "streaming.stream",
    "ImageRecipe": "datasets.manifest",
    "Manifest": "datasets.manifest",
    "MamldataError": "errors",
    "batched": "streaming.transforms",
    "build": "pipeline",
    "build_benchmark": "pipeline",
    "decode_episodes": "streaming.webdataset",
    "fetch": "pipeline",
    "images": "pipeline",
    "live": "sources.live",
    "load_manifest": "datasets.load",
    "prepare_image": "bank.prepare",
    "read_archive": "pipeline",
}

__all__ = [
    "Archive",
    "EpisodeBatch",
    "EpisodeInfo",
    "EpisodeStream",
    "ImageRecipe",
    "MamldataError",
    "Manifest",
    "__version__",
    "batched",
    "build",
    "build_benchmark",
    "decode_episodes",
    "fetch",
    "images",
    "live",
    "load_manifest",
    "prepare_image",
    "read_archive",
]


def __getattr__(name: str) -> Any:
    # On first use, because torch alone takes seconds to import and most commands do without it.
    if name in _HOME:
        return getattr(import_module(f"mamldata.{_HOME[name]}"), name)
    raise AttributeError(f"module 'mamldata' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
