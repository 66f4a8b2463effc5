"""Checkpoints: ``maml_step{step}_acc{accuracy}.pt``. The best one and the last one are kept.

One that a signal asked for between two validations is ``maml_step{step}.pt``, and only ever the last one.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor, nn

from mamldata.errors import DamagedError, RequestError
from mamldata.io.atomic import open_regular, write_atomic
from mamldata.io.containers import reading_container
from trainer.maml.parameters import MetaParameters, Parameters, meta_parameters
from trainer.networks.networks import build_network
from trainer.settings import TrainSettings, pick_device, saved_settings

_FORMAT = "mamldata-checkpoint/1"
# What is learned beside the network stands among its parameters, under their names with these in front.
_PREFIXES = {"rates": "inner_lr:", "norms": "per_step:", "joint": "joint:"}
_NAME = re.compile(r"[a-z0-9+-]+_step(?P<step>\d+)(_acc\d\.\d{4})?\.pt(?P<part>\.part)?")


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on, and all that an evaluation needs to know.

    Attributes:
        step: outer steps done.
        accuracy: of the validation at this step, in [0, 1]; None if there was none.
        best_step, best_accuracy: the best validation so far; the earliest among equals. 0 and -1 before the first.
        settings: the fields of ``TrainSettings``.
        data: the description of the data.
        weights: all that was learned: the network's parameters, and what stands beside them in ``MetaParameters``.
        optimizer: its state.
        stream: where the training data stood.
        window: what the next line of the metrics sums up, see ``metrics.Window``; empty right after a line.
    """

    step: int
    accuracy: float | None
    best_step: int
    best_accuracy: float
    settings: dict[str, Any]
    data: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    stream: dict[str, Any]
    window: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its file."""
        measured = "" if self.accuracy is None else f"_acc{self.accuracy:.4f}"
        return f"{self.settings['algorithm']}_step{self.step}{measured}.pt"

    def restored(self, place: Path, device: torch.device | None = None) -> tuple[nn.Module, MetaParameters]:
        """The trained network, and all that an evaluation needs of what was learned.

        Args:
            place: the checkpoint's file.
            device: to put them on; None is the CPU.

        Raises:
            RequestError: its settings or weights are not such as this trainer makes.
        """
        settings = saved_settings(self.settings, place)
        height, _, channels = self.data["image_shape"]
        network = build_network(settings.network, channels, height, self.data["n_way"], settings.seed, settings.filters)
        network.to(device)
        parameters = meta_parameters(network, settings.inner_loop())
        load_weights(network, parameters, self.weights, place)
        return network, parameters


def all_weights(network: nn.Module, parameters: MetaParameters) -> Parameters:
    """The network's parameters, and those learned beside them; no copies."""
    beside = {
        prefix + name: value.detach()
        for part, prefix in _PREFIXES.items()
        for name, value in getattr(parameters, part).items()
    }
    return {**network.state_dict(), **beside}


def load_weights(network: nn.Module, parameters: MetaParameters, weights: Parameters, place: Path) -> None:
    """Put back what ``all_weights`` gave; of what was learned beside the network, no more than ``parameters`` has.

    Args:
        network, parameters: to put it into.
        weights: what it gave.
        place: the checkpoint's file.

    Raises:
        RequestError: they are those of another network.
    """
    wanted = all_weights(network, parameters)
    here = {name: value.shape for name, value in weights.items() if name in wanted or ":" not in name}
    need = {name: value.shape for name, value in wanted.items()}
    if wrong := sorted(name for name in here.keys() | need.keys() if here.get(name) != need.get(name)):
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise RequestError(
            f"The weights in {place} are not those of a network with its settings: {', '.join(wrong[:3])}{more} differ "
            "in shape, or are in one of the two alone. Another version of this trainer wrote it, or somebody changed "
            "it; use that version, or another checkpoint."
        )
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(weights[name])


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint whole or not at all, then remove those that are neither the best nor the last.

    Raises:
        WriteError: the folder cannot be written to.
    """
    content = io.BytesIO()
    # Not asdict, which would copy every tensor.
    values = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    torch.save({"format": _FORMAT, **values}, content)
    path = run_dir / checkpoint.name
    write_atomic(path, content.getvalue())
    for step, other in _files(run_dir, unfinished=True):
        best = step == checkpoint.best_step and step != checkpoint.step
        if other != path and (not best or other.suffix == ".part"):
            other.unlink()
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU. No code of the file is run (``weights_only``).

    Raises:
        RequestError: there is no such file, or it is something else.
        DamagedError: the file is not what was written.
    """
    if not path.is_file():
        raise RequestError(f"There is no checkpoint {path}.")
    with open_regular(path) as stream:
        _check_container(path, stream)
        stream.seek(0)
        try:
            content = torch.load(stream, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
            raise RequestError(f"{path} is not a checkpoint of this trainer: it holds more than plain data.") from error
    known = {field.name for field in fields(Checkpoint)}
    if isinstance(content, dict):
        content.setdefault("window", {})  # which the first ones did not have
    if (
        not isinstance(content, dict)
        or content.pop("format", None) != _FORMAT
        or content.keys() != known
        or not all(isinstance(content[name], dict) for name in ("settings", "data", "weights"))
    ):
        raise RequestError(f"{path} is not a checkpoint of this trainer ({_FORMAT}).")
    return Checkpoint(**content)


def _check_container(path: Path, stream: IO[bytes]) -> None:
    """A checkpoint is a zip; torch reads its members without looking at their CRC-32, and unpacks compressed ones."""
    if stream.read(2) != b"PK":
        raise RequestError(f"{path} is not a checkpoint of this trainer: it is no zip container.")
    try:
        with reading_container(path), zipfile.ZipFile(stream) as container:
            _require_stored(path, container.infolist())
            bad = container.testzip()
    except DamagedError as error:
        raise DamagedError(f"{error} {_REMEDY}") from error
    if bad:
        raise DamagedError(f"{path}: a damaged container ({bad} is not what was written). {_REMEDY}")


def _require_stored(path: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    """Check that a checkpoint takes no more memory than its file is long, and a pickle that is small.

    Raises:
        RequestError: a member is compressed or too large, which ``torch.save`` makes none.
    """
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            why = f"its member {member.filename!r} is compressed"
        elif member.filename.endswith("data.pkl") and member.file_size > _MOST_PICKLE:
            why = f"its member {member.filename!r} has {member.file_size:,} bytes, more than {_MOST_PICKLE:,}"
        else:
            continue
        raise RequestError(f"{path} is not a checkpoint of this trainer: {why}.")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise RequestError(f"{path} is not a checkpoint of this trainer: its members are longer than the file.")


_MOST_PICKLE = 1 << 22  # bytes; it describes 20,000 tensors, and each byte of it may take 64 of memory
_REMEDY = "Remove it: a run that is resumed goes on from the checkpoint before it."


class TrainedRun(NamedTuple):
    """What a run has learned.

    Attributes:
        network: with its weights, on the device.
        parameters: those of the network, and the learned rates and norms that belong to them.
        settings: of the run; ``settings.inner_loop_at_test()`` is how it adapts in evaluation.
        data: what the episodes were, see ``TrainData.describe``.
    """

    network: nn.Module
    parameters: MetaParameters
    settings: TrainSettings
    data: dict[str, Any]


def load_run(place: Path | str, device: str = "cpu") -> TrainedRun:
    """What the best checkpoint of a run folder holds, or the one in a file; to adapt with, or to look at.

        run = trainer.load_run("runs/first")
        method = method_of(run.network, run.settings.inner_loop_at_test())
        adapted = adapt(run.network, run.parameters, episode, method)[-1]

    Its images must be what they were in training, see ``settings.normalize``; it computes in fp32.

    Args:
        place: folder or file.
        device: for network and parameters; see ``TrainSettings``.

    Raises:
        RequestError: no checkpoint of this trainer, or no such device.
        DamagedError: the checkpoint is damaged.
    """
    path, checkpoint = find_checkpoint(Path(place))
    settings = saved_settings(checkpoint.settings, path)
    return TrainedRun(*checkpoint.restored(path, pick_device(device)), settings, checkpoint.data)


def find_checkpoint(place: Path) -> tuple[Path, Checkpoint]:
    """The checkpoint in a file, or the best one of a run folder, with its path.

    Raises:
        RequestError: no checkpoint of this trainer.
        DamagedError: it is damaged.
    """
    path = find_best(place) if place.is_dir() else place
    return path, load_checkpoint(path)


def find_last(run_dir: Path) -> Path | None:
    """The run's newest checkpoint; None if it has none yet."""
    files = _files(run_dir)
    return max(files)[1] if files else None


def find_best(run_dir: Path) -> Path:
    """The run's checkpoint with the best validation accuracy.

    Raises:
        RequestError: there is none.
        DamagedError: the newest checkpoint, which says which one is the best, is damaged.
    """
    last = find_last(run_dir)
    if last is None:
        raise RequestError(f"{run_dir} holds no checkpoint. Give a run folder, or the file of a checkpoint.")
    best_step = load_checkpoint(last).best_step
    for step, path in _files(run_dir):
        if step == best_step:
            return path
    if not best_step:
        raise RequestError(f"{run_dir} was stopped before its first validation. Go on with it, or evaluate {last}.")
    raise RequestError(f"{run_dir} holds no checkpoint of its best step, {best_step}. Evaluate {last} instead.")


def _files(run_dir: Path, *, unfinished: bool = False) -> list[tuple[int, Path]]:
    """The checkpoints of a run with their steps; files with other names are nobody's business."""
    found = [(_NAME.fullmatch(path.name), path) for path in run_dir.iterdir()] if run_dir.is_dir() else []
    return [(int(match["step"]), path) for match, path in found if match and (unfinished or not match["part"])]
