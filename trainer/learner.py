"""What the outer loop learns, and one step of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mamldata.errors import RequestError
from mamldata.streaming.batch import EpisodeBatch
from trainer.maml.engines import Outcome, pick_engine
from trainer.maml.joint import joint, joint_parameters
from trainer.maml.parameters import MetaParameters, meta_parameters
from trainer.maml.variants import method_of
from trainer.networks.networks import build_network
from trainer.networks.precision import pick_precision, set_precision
from trainer.protocol import ClassData
from trainer.runs.checkpoint import all_weights, load_weights
from trainer.settings import TrainSettings
from trainer.system.distributed import ALONE, World


class Learner:
    """A network as the settings draw it, all else that is learned beside it, and the outer loop's optimizer.

    Args:
        settings: what to do.
        data: which classes episodes show, for joint training.
        about: what ``TrainData.describe`` says of them.
        device: where the network is.

    Attributes:
        settings, device: as given.
        network: on the device.
        parameters: all that the outer loop learns.
        optimizer: of the outer loop.

    Raises:
        RequestError: the network does not take such images, or the device not such arithmetic.
    """

    def __init__(self, settings: TrainSettings, data: ClassData, about: dict[str, Any], device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self._data = data
        self.network = _fresh_network(settings, about).to(device)
        set_precision(self.network, pick_precision(settings.precision, device))
        self.parameters: MetaParameters
        self._engine = pick_engine(settings.engine)
        if settings.point.outer == "joint":
            wide = _fresh_network(settings, {**about, "n_way": data.class_count()})
            self.parameters = joint_parameters(self.network, wide)
        else:
            self.parameters = meta_parameters(self.network, settings.inner_loop())
        values = self.parameters.tensors()
        self.optimizer: torch.optim.Optimizer
        if settings.meta_optimizer == "sgd":
            self.optimizer = torch.optim.SGD(values, lr=settings.meta_lr)
        else:
            self.optimizer = torch.optim.Adam(values, lr=settings.meta_lr)

    @property
    def learned(self) -> list[torch.Tensor]:
        """Every tensor that several processes must hold alike."""
        return [*self.network.parameters(), *self.parameters.tensors()]

    def weights(self) -> dict[str, torch.Tensor]:
        """For a checkpoint; no copies."""
        return all_weights(self.network, self.parameters)

    def load(self, weights: dict[str, torch.Tensor], optimizer: dict[str, Any], place: Path) -> None:
        """Put back what the checkpoint in the file ``place`` holds.

        Raises:
            RequestError: it is of another network.
        """
        load_weights(self.network, self.parameters, weights, place)
        self.optimizer.load_state_dict(optimizer)

    def gradient(
        self, batch: EpisodeBatch, step: int, share: float = 1.0, world: World = ALONE, *, every_step: bool
    ) -> Outcome:
        """What the meta-batch of an outer step, counted from 0, teaches. Called by all processes of ``world``.

        Args:
            batch: this process's part of it.
            step: which one.
            share: how large that part is, in [0, 1].
            world: the processes that have the others.
            every_step: report the score before and after each inner step.
        """
        settings = self.settings
        if settings.point.outer == "joint":
            classes = self._data.classes(batch.index)
            outcome = joint(self.network, self.parameters, batch, classes, world)
        else:
            method = method_of(self.network, settings.inner_loop(step), settings.engine)
            outcome = self._engine(
                self.network, self.parameters, batch, method, settings.objective(step), every_step=every_step
            )
        # All at once, since each exchange has its price.
        *slopes, loss, score = world.average([*outcome.gradient.tensors(), outcome.loss, outcome.score], share)
        return Outcome(self.parameters.like(slopes), loss, score)

    def descend(self, outcome: Outcome, step: int) -> None:
        """Change all that is learned by what the outer step, counted from 0, has taught."""
        settings, values = self.settings, self.parameters.tensors()
        for value, slope in zip(values, outcome.gradient.tensors(), strict=True):
            value.grad = slope
        if settings.meta_clip_norm is not None:
            nn.utils.clip_grad_norm_(values, settings.meta_clip_norm)
        if settings.meta_clip_value is not None:
            nn.utils.clip_grad_value_(values, settings.meta_clip_value)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.meta_lr_at(step)
        self.optimizer.step()


def _fresh_network(settings: TrainSettings, about: dict[str, Any]) -> nn.Module:
    height, width, channels = about["image_shape"]
    if height != width:
        raise RequestError(f"The networks take square images, and these have {height}x{width} pixels.")
    return build_network(settings.network, channels, height, about["n_way"], settings.seed, settings.filters)
