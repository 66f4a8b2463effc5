"""Checkpoints: ``maml_step{step}_acc{accuracy}.pt``. The best one and the last one are kept.

One saved on a signal between two validations is ``maml_step{step}.pt``; it is kept only while it is the last one.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Hashable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor, nn

from mamldata.datasets.manifest import UNKNOWN, ImageRecipe
from mamldata.errors import DamagedError, RequestError
from mamldata.io.atomic import open_regular, write_atomic
from mamldata.io.containers import reading_container
from mamldata.io.digest import sha256_file
from trainer.maml.anil import features_of
from trainer.maml.parameters import MetaParameters, Parameters, meta_parameters
from trainer.networks.norms import batch_statistics
from trainer.runs.adapted import AdaptedModel, ManyImages, adapted_model
from trainer.runs.content import fault_in, optimizer_state
from trainer.runs.model import SUFFIX, existing_place, read_model
from trainer.runs.network import make_network
from trainer.settings import TrainSettings, pick_device, saved_settings

_FORMAT = "mamldata-checkpoint/1"
# Prefixes for the names of what is learned besides the network, among whose parameters it is saved.
_PREFIXES = {"rates": "inner_lr:", "norms": "per_step:", "joint": "joint:"}
_NAME = re.compile(r"[a-z0-9+-]+_step(?P<step>\d+)(_acc\d\.\d{4})?\.pt(?P<part>\.part)?")


@dataclass(frozen=True)
class Checkpoint:
    """Everything needed to resume or to evaluate a run.

    Attributes:
        step: outer steps done.
        accuracy: of the validation at this step, in [0, 1]; None if there was none.
        best_step, best_accuracy: the best validation so far; the earliest among equals. 0 and -1 before the first.
        settings: the fields of ``TrainSettings``.
        data: the description of the data.
        weights: all that was learned: the network's parameters, and the other tensors of ``MetaParameters``.
        optimizer: its state.
        stream: the position in the training data.
        window: the steps that the next line of the metrics covers, see ``metrics.Window``; empty right after a line.
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
        """The name of its file."""
        measured = "" if self.accuracy is None else f"_acc{self.accuracy:.4f}"
        return f"{self.settings['algorithm']}_step{self.step}{measured}.pt"

    def restored(
        self, place: Path, device: torch.device | None = None, network: nn.Module | None = None
    ) -> tuple[nn.Module, MetaParameters]:
        """The trained network, and the learned parameters that evaluation uses.

        Args:
            place: the checkpoint's file.
            device: of the network and parameters; None is the CPU.
            network: the user's own, for a run that was trained with one; it is copied.

        Raises:
            RequestError: its settings or weights are not those of this trainer or of this network.
        """
        settings = saved_settings(self.settings, place)

        def fresh(device: torch.device | None) -> tuple[nn.Module, MetaParameters]:
            made = make_network(settings, self.data, network).to(device)
            return made, meta_parameters(made, settings.inner_loop())

        meta = torch.device("meta")  # the numbers in the file may ask for more memory than there is
        with meta if network is None else nullcontext():
            wanted = all_weights(*fresh(meta))
        _require_shapes(wanted, self.weights, place)
        made, parameters = fresh(device)
        load_weights(made, parameters, self.weights, place)
        return made, parameters


def all_weights(network: nn.Module, parameters: MetaParameters) -> Parameters:
    """The network's parameters and everything else that is learned; no copies."""
    beside = {
        prefix + name: value.detach()
        for part, prefix in _PREFIXES.items()
        for name, value in getattr(parameters, part).items()
    }
    return {**_numbers_of(network), **beside}


def _numbers_of(network: nn.Module) -> Parameters:
    """Parameters and buffers, without the whole numbers that a network of the user's own may keep, such as indices."""
    return {name: value for name, value in network.state_dict().items() if value.is_floating_point()}


class Start(NamedTuple):
    """The weights that a run starts from.

    Attributes:
        place: the checkpoint's file.
        checkpoint: that it holds.
        record: for ``config.json``: ``file``, its ``sha256``, ``step``, and the ``digest`` of the data trained on.
    """

    place: Path
    checkpoint: Checkpoint
    record: dict[str, Any]


def read_start(place: Path | str) -> Start:
    """What ``find_checkpoint`` finds, to start another run from.

    Raises:
        RequestError: not a checkpoint or model of this trainer.
        DamagedError: the file is damaged.
    """
    path, checkpoint = find_checkpoint(Path(place))
    digest, step = checkpoint.data["digest"], checkpoint.step
    return Start(path, checkpoint, {"file": str(path), "sha256": sha256_file(path), "step": step, "digest": digest})


def start_network(network: nn.Module, settings: TrainSettings, start: Start) -> None:
    """Give a fresh network the weights of another run.

    Raises:
        RequestError: they are those of another network, or learned on images that were scaled otherwise.
    """
    theirs = saved_settings(start.checkpoint.settings, start.place)
    if theirs.normalize != settings.normalize:
        raise RequestError(
            f"{start.place} cannot start this run: it was trained with normalize {theirs.normalize}, not "
            f"{settings.normalize}. Choose the same, or another checkpoint."
        )
    own, given = _numbers_of(network), {name: v for name, v in start.checkpoint.weights.items() if ":" not in name}
    if wrong := sorted(
        n for n in own.keys() | given.keys() if n not in own or n not in given or own[n].shape != given[n].shape
    ):
        raise RequestError(
            f"{start.place} cannot start this run: its network is {theirs.network}, and "
            f"{wrong[0]} differs in shape or is missing. Choose the same network and filters, or another checkpoint."
        )
    network.load_state_dict(given, strict=False)


def start_others(parameters: MetaParameters, start: Start) -> None:
    """Give the rates and per-step norms of another run to one that learns them, too; what it lacks starts fresh.

    Raises:
        RequestError: the other run learned rates or norms that this one has no place for.
    """
    own = all_weights(nn.Module(), parameters)
    given = {name: value for name, value in start.checkpoint.weights.items() if ":" in name}
    fits = {name for name in given if name in own and own[name].shape == given[name].shape}
    if lost := sorted(name for name in given.keys() - fits if not name.startswith(_PREFIXES["joint"])):
        raise RequestError(
            f"{start.place} cannot start this run: {lost[0]} was learned there, and has no place here. Choose the same "
            "bn, rates, adapts and inner_steps, or another checkpoint."
        )
    with torch.no_grad():
        for name in fits:
            own[name].copy_(given[name])


def load_weights(network: nn.Module, parameters: MetaParameters, weights: Parameters, place: Path) -> None:
    """Restore weights from ``all_weights``; those besides the network that ``parameters`` lacks are ignored.

    Args:
        network, parameters: to load into.
        weights: from ``all_weights``.
        place: the checkpoint's file.

    Raises:
        RequestError: the weights are those of another network.
    """
    wanted = all_weights(network, parameters)
    _require_shapes(wanted, weights, place)
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(weights[name])


def _require_shapes(wanted: Parameters, weights: Parameters, place: Path) -> None:
    here = {name: value.shape for name, value in weights.items() if name in wanted or ":" not in name}
    need = {name: value.shape for name, value in wanted.items()}
    if wrong := sorted(name for name in here.keys() | need.keys() if here.get(name) != need.get(name)):
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise RequestError(
            f"The weights in {place} are not those of a network with its settings: {', '.join(wrong[:3])}{more} differ "
            "in shape, are missing or are unexpected. A network of your own must be the one that was trained; "
            "otherwise the file is from another version of this trainer, or was changed: use that version, or another "
            "checkpoint."
        )


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], place: Path) -> None:
    """Restore the state of a fresh optimizer.

    Args:
        optimizer: of the same parameters.
        saved: from ``state_dict``.
        place: the checkpoint's file.

    Raises:
        RequestError: the state is that of another optimizer.
    """
    state = optimizer_state(saved, optimizer)
    if state is None:
        raise RequestError(
            f"The optimizer in {place} is not that of a run with its settings. The file is from another version of "
            "this trainer, or was changed; use that version, or remove the file: the run then resumes from the "
            "checkpoint before it."
        )
    optimizer.load_state_dict(state)


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint atomically, then remove those that are neither the best nor the last.

    Raises:
        WriteError: the folder cannot be written to.
    """
    content = io.BytesIO()
    torch.save({"format": _FORMAT, **vars(checkpoint)}, content)  # not asdict, which would copy every tensor
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
        RequestError: there is no such file, or it is not a checkpoint.
        DamagedError: the file has changed since it was written.
    """
    if not path.is_file():
        raise RequestError(f"There is no checkpoint {path}.")
    with open_regular(path) as stream:
        _check_container(path, stream)
        stream.seek(0)
        try:
            content = torch.load(stream, map_location="cpu", weights_only=True)
        except _UNPICKLING as error:
            raise RequestError(f"{path} is not a checkpoint of this trainer: it holds more than plain data.") from error
    known = {field.name for field in fields(Checkpoint)}
    if isinstance(content, dict):
        content.setdefault("window", {})  # missing from the first ones
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT or content.keys() != known:
        raise RequestError(f"{path} is not a checkpoint of this trainer ({_FORMAT}).")
    return _checked(path, content)


def _from_model(path: Path) -> Checkpoint:
    """A model file as a checkpoint, which has no state to resume a run with."""
    about, weights = read_model(path)
    content = {name: about.get(name) for name in ("step", "accuracy", "settings", "data")}
    best = -1.0 if content["accuracy"] is None else content["accuracy"]
    rest: dict[str, Any] = {"optimizer": {}, "stream": {}, "window": {}}
    return _checked(path, {**content, "best_step": content["step"], "best_accuracy": best, "weights": weights, **rest})


def _checked(path: Path, content: dict[str, Any]) -> Checkpoint:
    try:
        fault = fault_in(content)
    except RecursionError:
        fault = "its values are nested too deep"
    if fault:
        raise RequestError(f"{path} is not a checkpoint of this trainer: {fault}.")
    return Checkpoint(**content)


def _check_container(path: Path, stream: IO[bytes]) -> None:
    """Check the zip container: torch does not check the CRC-32 of its members, and unpacks compressed ones."""
    if stream.read(2) != b"PK":
        raise RequestError(f"{path} is not a checkpoint of this trainer: it is not a zip container.")
    try:
        with reading_container(path), zipfile.ZipFile(stream) as container:
            _require_stored(path, container.infolist())
            bad = container.testzip()
    except DamagedError as error:
        raise DamagedError(f"{error} {_REMEDY}") from error
    if bad:
        raise DamagedError(f"{path}: a damaged container (the checksum of {bad} is wrong). {_REMEDY}")


def _require_stored(path: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    """Check that a checkpoint takes no more memory than the size of its file, and that its pickle is small.

    Raises:
        RequestError: a member is compressed or too large, unlike those that ``torch.save`` writes.
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
# What torch raises for a file that no torch.save wrote.
_UNPICKLING = (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError)
_REMEDY = "Remove it: the run then resumes from the checkpoint before it."


class TrainedRun(NamedTuple):
    """A trained network, with the settings and data of its run.

    Attributes:
        network: with its trained weights, on the device.
        parameters: those of the network, and the learned rates and norms.
        settings: of the run; ``settings.inner_loop_at_test()`` is how it adapts in evaluation.
        data: describes the training episodes, see ``TrainData.describe``.
    """

    network: nn.Module
    parameters: MetaParameters
    settings: TrainSettings
    data: dict[str, Any]

    @property
    def image(self) -> ImageRecipe:
        """How the training images were prepared, for ``mamldata.prepare_image``.

        Raises:
            RequestError: the run does not record it.
        """
        recorded = self.data.get("image", UNKNOWN)
        if recorded == UNKNOWN:
            *size, channels = self.data["image_shape"]
            raise RequestError(
                f"The run does not record how its images of {'x'.join(map(str, size)) or 1} pixels in {channels} "
                f"channel{'s' if channels > 1 else ''} were prepared. Give an ImageRecipe of your own with their "
                "resampling, inversion and turning."
            )
        return ImageRecipe(**recorded, bank_sha256={})

    def adapt(self, images: ManyImages, labels: Iterable[Hashable]) -> AdaptedModel:
        """Adapt to a support set, as evaluation does.

        Args:
            images: uint8 ``[N, H, W, C]`` as the bank holds them, NumPy's or torch's; or a list of files, of PIL's
                images or of pixels uint8 ``[H, W, 3]``, each of which is prepared as the bank's were.
            labels: of each image, any values that can be sorted, such as class names. Shots may differ.

        Raises:
            RequestError: an image cannot be read or is of another form, the run does not record how images were
                prepared, or there are too many or too few classes or shots.
        """
        return adapted_model(*self, lambda: self.image, images, labels)

    def embed(self, images: Tensor) -> Tensor:
        """The inputs of the head before any adaptation, float32 ``[N, features]``.

        Batch norms use the statistics of all images of the call, whatever the setting ``bn``: call it with many.

        Args:
            images: float32 ``[N, C, H, W]`` on the network's device, normalized if those in training were.
        """
        weights = self.parameters.weights | self.parameters.norms_of(0)
        with torch.no_grad():
            return features_of(self.network, weights, images, batch_statistics)


def load_run(place: Path | str, device: str = "cpu", *, network: nn.Module | None = None) -> TrainedRun:
    """Load a model file, a checkpoint, or the best one of a run folder, to adapt with or to inspect.

        run = trainer.load_run("runs/first")
        adapted = run.adapt(["ant-1.png", "bee-1.png"], ["ant", "bee"])
        adapted(["unknown.png"]).softmax(1)

    The network computes in fp32.

    Args:
        place: folder or file; or the name of a model that comes with the package, if there is no such path.
        device: for network and parameters; see ``TrainSettings``.
        network: of a run with a network of your own: one as it was trained with; its weights do not matter.

    Raises:
        RequestError: not a checkpoint or model of this trainer, or the device is not available.
        DamagedError: the file is damaged.
    """
    path, checkpoint = find_checkpoint(Path(place))
    settings = saved_settings(checkpoint.settings, path)
    return TrainedRun(*checkpoint.restored(path, pick_device(device), network), settings, checkpoint.data)


def find_checkpoint(place: Path) -> tuple[Path, Checkpoint]:
    """The checkpoint or model in a file, the best checkpoint of a run folder, or a shipped model; with its path.

    Raises:
        RequestError: not a checkpoint or model of this trainer.
        DamagedError: the file is damaged.
    """
    place = existing_place(place)
    path = find_best(place) if place.is_dir() else place
    return path, _from_model(path) if path.suffix == SUFFIX else load_checkpoint(path)


def find_last(run_dir: Path) -> Path | None:
    """The run's newest checkpoint; None if it has none yet."""
    files = _files(run_dir)
    return max(files)[1] if files else None


def find_best(run_dir: Path) -> Path:
    """The run's checkpoint with the best validation accuracy.

    Raises:
        RequestError: there is none.
        DamagedError: the newest checkpoint, which names the best one, is damaged.
    """
    last = find_last(run_dir)
    if last is None:
        raise RequestError(f"{run_dir} holds no checkpoint. Give a run folder or a checkpoint file.")
    best_step = load_checkpoint(last).best_step
    for step, path in _files(run_dir):
        if step == best_step:
            return path
    if not best_step:
        raise RequestError(f"{run_dir} was stopped before its first validation. Resume it, or evaluate {last}.")
    raise RequestError(f"{run_dir} holds no checkpoint of its best step, {best_step}. Evaluate {last} instead.")


def _files(run_dir: Path, *, unfinished: bool = False) -> list[tuple[int, Path]]:
    """The checkpoints of a run with their steps; files with other names are ignored."""
    found = [(_NAME.fullmatch(path.name), path) for path in run_dir.iterdir()] if run_dir.is_dir() else []
    return [(int(match["step"]), path) for match, path in found if match and (unfinished or not match["part"])]
