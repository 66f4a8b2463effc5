"""The network of a run: one of the trainer's, by the name in the settings, or the user's own, given as a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mamldata.errors import RequestError
from trainer.networks.networks import build_network
from trainer.networks.own import OwnNetwork
from trainer.settings import TrainSettings, is_own


def named(settings: TrainSettings, own: nn.Module | None) -> TrainSettings:
    """The settings of a run with the user's own network, by the name of its class if they do not name it."""
    if own is None or is_own(settings.network):
        return settings
    return replace(settings, network=f"{type(own).__module__}:{type(own).__qualname__}")


def called(function: Callable[..., Any], about: Mapping[str, Any], seed: int) -> nn.Module:
    """The user's own network, from their function; equal seeds give equal weights.

    Args:
        function: takes ``channels``, ``image_size`` and ``n_way``.
        about: describes the episodes: at least their ``n_way`` and ``image_shape``.
        seed: of torch's generator during the call.

    Raises:
        RequestError: the function fails or gives no network.
    """
    size, _, channels = about["image_shape"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            made = function(channels=channels, image_size=size, n_way=about["n_way"])
        except Exception as error:
            raise RequestError(f"The function for the network fails: {error!r}") from error
    if not isinstance(made, nn.Module):
        raise RequestError(f"The function for the network must return a torch.nn.Module, not {type(made).__name__}.")
    return made


def make_network(settings: TrainSettings, about: Mapping[str, Any], own: nn.Module | None) -> nn.Module:
    """The network of a run on the CPU: with fresh weights, or with those that the user's own has.

    Args:
        settings: of the run.
        about: describes the episodes: at least their ``n_way`` and ``image_shape``.
        own: the user's network, which the settings name as ``module:function``; no code is imported by that name.

    Raises:
        RequestError: the user's own network is missing or not asked for, or the network cannot take these examples.
    """
    shape, n_way = about["image_shape"], about["n_way"]
    if own is not None:
        if not is_own(settings.network):
            raise RequestError(f"The network of this run is {settings.network}. Leave out the network of your own.")
        return OwnNetwork(own).tried([shape[-1], *shape[:-1]] if len(shape) == 3 else shape, n_way)
    if is_own(settings.network):
        raise RequestError(
            f"The network of this run, {settings.network}, is code of the user's, which is never loaded by its name. "
            "Give the module itself: network=…, or on the command line --network MODULE:FUNCTION."
        )
    if len(shape) != 3:
        raise RequestError(
            f"The network {settings.network} takes images, but these examples have the shape {tuple(shape)}. Give a "
            "network of your own: network=…"
        )
    height, width, channels = shape
    if height != width:
        raise RequestError(f"The networks take square images, but these have {height}x{width} pixels.")
    return build_network(settings.network or "conv4", channels, height, n_way, settings.seed, settings.filters)
