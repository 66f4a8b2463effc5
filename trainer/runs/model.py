"""Model files, trained networks in safetensors with all that their use needs; and those that come with the package.

Their metadata have one key, because safetensors writes several in no fixed order: ``mamldata``, canonical JSON with
``format``, what ``Checkpoint`` needs besides tensors, the facts of the card, and ``sha256``, the digest of the rest: of
canonical JSON of that and of the tensors' entries in the header, and then of their bytes. Nothing is ever unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mamldata.errors import DamagedError, RequestError, did_you_mean
from mamldata.io.atomic import open_regular
from mamldata.io.digest import canonical_json, parse_json, sha256_bytes
from mamldata.io.urls import shown_place

if TYPE_CHECKING:
    from torch import Tensor

FORMAT, SUFFIX = "mamldata-model/1", ".safetensors"
SHIPPED = Path(__file__).parents[1] / "models"
_KEY = "mamldata"
_MOST_HEADER = 1 << 22  # bytes; it describes 20,000 tensors
_MOST_BYTES = 1 << 32  # of a file, which takes twice its size of memory


def shipped_models() -> dict[str, Path]:
    """The files of the models that come with the package, by name, sorted."""
    return {path.stem: path for path in sorted(SHIPPED.glob(f"*{SUFFIX}"))}


def existing_place(place: Path) -> Path:
    """A path that exists, or else the file of a shipped model.

    Raises:
        RequestError: there is neither.
    """
    if place.exists():
        return place
    models = shipped_models()
    if str(place) not in models:
        shown, known = shown_place(str(place)), f" Models: {', '.join(models)}." if models else ""
        raise RequestError(
            f"There is no run folder, checkpoint or model {shown}.{did_you_mean(str(place), models)}{known}"
        )
    return models[str(place)]


def model_bytes(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a model file, a function of its arguments.

    Args:
        about: plain values for JSON.
        tensors: by name.
    """
    import torch
    from safetensors.torch import save

    plain = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    about = {"format": FORMAT, **about}
    bare = save(plain)
    end = 8 + int.from_bytes(bare[:8], "little")
    sha256 = _digest(about, parse_json(bare[8:end]), bare[end:])
    content: bytes = save(plain, {_KEY: canonical_json({**about, "sha256": sha256}).decode()})
    return content


def read_about(path: Path) -> dict[str, Any]:
    """What a model file says about itself; its tensors are neither read nor verified.

    Raises:
        RequestError: it is not a model file.
        DamagedError: it is cut.
    """
    with open_regular(path) as stream:
        return _parsed(path, _header(path, stream))[0]


def read_model(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a model file says about itself, and its tensors by name, on the CPU.

    Raises:
        RequestError: it is not a model file, or is larger than any.
        DamagedError: its content has changed since it was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    with open_regular(path) as stream:
        header = _header(path, stream)
        about, entries = _parsed(path, header)
        size = os.fstat(stream.fileno()).st_size
        if size > _MOST_BYTES:
            raise RequestError(f"{path} has {size:,} bytes, more than the limit of {_MOST_BYTES:,} for a model.")
        body = stream.read(size)
    try:
        right = about.pop("sha256") == _digest(about, entries, body)
        tensors: dict[str, Tensor] = load(len(header).to_bytes(8, "little") + header + body) if right else {}
    except (SafetensorError, LookupError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise DamagedError(f"{path} is damaged ({error}). Get or export it again.") from error
    if not right:
        raise DamagedError(f"{path} is damaged: its digest is not the one that it names. Get or export it again.")
    return about, tensors


def _digest(about: Mapping[str, Any], entries: Mapping[str, Any], body: bytes) -> str:
    return sha256_bytes(canonical_json([about, entries]) + body)


def _header(path: Path, stream: IO[bytes]) -> bytes:
    start = stream.read(8)
    length = int.from_bytes(start, "little")
    if length > _MOST_HEADER or len(start) < 8:
        raise RequestError(f"{path} is not a model of this trainer ({FORMAT}).")
    header = stream.read(length)
    if len(header) < length:
        raise DamagedError(f"{path} is cut: it ends within its header. Get or export it again.")
    return header


def _parsed(path: Path, header: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a header says of the model, and the entries of the tensors."""
    try:
        entries = parse_json(header)
        about = parse_json(entries.pop("__metadata__")[_KEY].encode())
        if about["format"] == FORMAT:
            return dict(about), entries
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise RequestError(f"{path} is not a model of this trainer ({FORMAT}).")
