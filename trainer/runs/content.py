"""What the content of a checkpoint must be, so that a changed file is an error in words wherever it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mamldata.datasets.manifest import FITS, UNKNOWN
from mamldata.datasets.toml import RESAMPLINGS

_MOST = 2**63  # beyond, numbers are none of NumPy's
_LARGEST_SIDE = 2**16  # pixels


def fault_in(content: Mapping[str, Any]) -> str | None:
    """The first field of a checkpoint that is not what this trainer writes, and what it must be; None if all are.

    Args:
        content: the fields of ``Checkpoint``.
    """
    for name, (fits, meaning) in _FIELDS.items():
        if not fits(content[name]):
            return f"its {name} must be {meaning}"
    data = content["data"]
    for name, (fits, meaning) in _DATA.items():
        if not fits(data.get(name)):
            return f"its data must have {name}, {meaning}"
    known = data.get("normalisation")
    if known is not None and not _normalizes(known, data["image_shape"][-1]):
        return "its data must have normalisation, a mean and a positive std for each channel"
    prepared = data.get("image", UNKNOWN)
    if prepared != UNKNOWN and not _prepares(prepared, list(data["image_shape"])):
        return "its data must have image, how images of its image_shape were prepared"
    return None


def _whole(value: object, least: int = 0) -> bool:
    return type(value) is int and least <= value < _MOST


def _share(value: object) -> bool:
    return type(value) in {int, float} and 0 <= value <= 1  # type: ignore[operator]


def _text(value: object) -> bool:
    return isinstance(value, str)


def _plain(value: object) -> bool:
    """As JSON has it, and tuples."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    if type(value) is int:
        return -_MOST < value < 2 * _MOST  # a seed has 64 bits
    return value is None or type(value) in {bool, float, str}


def _plain_dict(value: object) -> bool:
    return isinstance(value, dict) and _plain(value)


def _dense(value: object) -> bool:
    """A tensor of numbers with a fraction, whose memory is that of its elements."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    )


def _tensors(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) and _dense(part) for name, part in value.items())


def _window(value: object) -> bool:
    """See ``metrics.Window.state_dict``."""
    if not _tensors(value):
        return False
    shapes = {name: tuple(part.shape) for name, part in value.items()}  # type: ignore[attr-defined]
    steps = shapes.get("losses", (0,))[:1]
    return not shapes or (shapes == {"losses": steps, "accuracies": (*steps, 1)} and steps > (0,))


def _shape(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and 1 <= len(value) <= 4  # three of images; other examples have their own shape
        and all(_whole(side, 1) and side <= _LARGEST_SIDE for side in value)
    )


def _normalizes(value: object, channels: int) -> bool:
    def numbers(part: object, least: float) -> bool:
        return (
            isinstance(part, list | tuple)
            and len(part) == channels
            and all(type(one) in {int, float} and least < one < math.inf for one in part)
        )

    return isinstance(value, dict) and numbers(value.get("mean"), -math.inf) and numbers(value.get("std"), 0)


def _prepares(value: object, shape: list[int]) -> bool:
    """See ``ImageRecipe.to_json``."""
    return (
        isinstance(value, dict)
        and value.keys() - {"fit"} == {"size", "channels", "resampling", "invert", "upright"}
        and _text(fit := value.get("fit", "stretch"))
        and fit in FITS
        and all(type(value[key]) is bool for key in ("invert", "upright"))
        and value["resampling"] in RESAMPLINGS
        and [value["size"], value["size"], value["channels"]] == shape
    )


_Check = tuple[Callable[[Any], bool], str]
_FIELDS: dict[str, _Check] = {
    "step": (_whole, "a number of steps"),
    "accuracy": (lambda value: value is None or _share(value), "a number from 0 to 1, or none"),
    "best_step": (_whole, "a number of steps"),
    "best_accuracy": (lambda value: _share(value) or (type(value) is float and value == -1), "from 0 to 1, or -1"),
    "settings": (_plain_dict, "settings by name"),
    "data": (_plain_dict, "a description in plain values"),
    "weights": (_tensors, "tensors by name"),
    "optimizer": (lambda value: isinstance(value, dict), "the state of an optimizer"),
    "stream": (_plain_dict, "a position in plain values"),
    "window": (_window, "losses and accuracies of the same steps"),
}
_DATA: dict[str, _Check] = {
    "dataset": (_text, "a name"),
    "split_scheme": (_text, "a name"),
    "digest": (_text, "a text"),
    "n_way": (lambda value: _whole(value, 1), "a number of classes"),
    "k_shot": (lambda value: _whole(value, 1), "a number of images"),
    "image_shape": (_shape, "height, width and channels, or the shape of an example"),
}


def optimizer_state(saved: Mapping[str, Any], fresh: torch.optim.Optimizer) -> dict[str, Any] | None:
    """A saved state in the form that an optimizer loads; None if it is the state of another one.

    Of its groups only the rate is taken, which a checkpoint of the same step has; settings decide the rest.

    Args:
        saved: from ``state_dict`` of an optimizer of the same kind and parameters.
        fresh: the optimizer, before its first step.
    """
    groups, known = fresh.state_dict()["param_groups"], saved.get("param_groups")
    if not isinstance(known, list) or len(known) != len(groups) or not all(isinstance(one, dict) for one in known):
        return None
    groups = [{**group, "lr": one.get("lr")} for group, one in zip(groups, known, strict=True)]
    if not all(type(group["lr"]) in {int, float} and 0 <= group["lr"] < math.inf for group in groups):
        return None
    values = [value for group in fresh.param_groups for value in group["params"]]
    states = saved.get("state")
    wanted = {"step", "exp_avg", "exp_avg_sq"} if isinstance(fresh, torch.optim.Adam) else {"momentum_buffer"}
    if not isinstance(states, dict) or not set(states) <= set(range(len(values))):
        return None
    for place, state in states.items():
        if not isinstance(state, dict) or set(state) != wanted:
            return None
        for name, value in state.items():
            if name == "momentum_buffer" and value is None:
                continue
            if not _dense(value) or value.shape != (() if name == "step" else values[place].shape):
                return None
            if name == "step" and not value >= 0:
                return None
    return {"state": states, "param_groups": groups}
