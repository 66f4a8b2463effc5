"""What the outer loop learns, and one step of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mamldata.streaming.batch import EpisodeBatch
from trainer.maml.choice import engine_for
from trainer.maml.engines import Outcome
from trainer.maml.joint import joint, joint_parameters
from trainer.maml.parameters import MetaParameters, meta_parameters
from trainer.maml.variants import method_of
from trainer.networks.own import OwnNetwork
from trainer.networks.precision import arithmetic, pick_precision, set_precision
from trainer.protocol import ClassData
from trainer.runs.checkpoint import Start, all_weights, load_optimizer, load_weights, start_network, start_others
from trainer.runs.network import make_network
from trainer.settings import TrainSettings
from trainer.system.distributed import ALONE, World
from trainer.system.gpu import enough_memory

_LESS_MEMORY = "an outer step. Lower meta_batch_size, filters or inner_steps, or set the engine loop."


class Learner:
    """A network initialized from the settings, everything else that is learned, and the outer loop's optimizer.

    Args:
        settings: of the run.
        data: tells the classes of episodes, for joint training.
        about: the description by ``TrainData.describe``.
        device: of the network.
        start: the weights to start from; None: those that the seed gives, or those of the user's own network.
        network: the user's own, whose name the settings have; it is copied.

    Attributes:
        settings, device, start: as given.
        network: on the device.
        parameters: everything that the outer loop learns.
        optimizer: of the outer loop.

    Raises:
        RequestError: the network does not take these images, the device does not have this precision or engine, or the
            weights to start from do not fit.
    """

    def __init__(
        self,
        settings: TrainSettings,
        data: ClassData,
        about: dict[str, Any],
        device: torch.device,
        start: Start | None = None,
        network: nn.Module | None = None,
    ) -> None:
        self.settings = settings
        self.start = start
        self.device = device
        self._data, self._n_way = data, about["n_way"]
        self.network = make_network(settings, about, network).to(device)
        if start:
            start_network(self.network, settings, start)
        set_precision(self.network, pick_precision(settings.precision, device))
        self.parameters: MetaParameters
        self._engine = engine_for(
            settings.engine, device, compile=settings.compile, checkpoint=settings.checkpoint_inner
        )
        if settings.point.outer == "joint":
            count = data.class_count()
            if isinstance(self.network, OwnNetwork):
                wide: nn.Module = self.network.widened(count, settings.seed)
            else:
                wide = make_network(settings, {**about, "n_way": count}, None)
            self.parameters = joint_parameters(self.network, wide)
        else:
            self.parameters = meta_parameters(self.network, settings.inner_loop())
        if start:
            start_others(self.parameters, start)
        values = self.parameters.tensors()
        self.optimizer = _optimizer(settings, values, device)

    @property
    def learned(self) -> list[torch.Tensor]:
        """Every tensor that must be equal in all processes."""
        return list(self.weights().values())

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights for a checkpoint; no copies."""
        return all_weights(self.network, self.parameters)

    def load(self, weights: dict[str, torch.Tensor], optimizer: dict[str, Any], place: Path) -> None:
        """Restore weights and optimizer state from the checkpoint in the file ``place``.

        Raises:
            RequestError: the checkpoint is of another network or optimizer.
        """
        load_weights(self.network, self.parameters, weights, place)
        load_optimizer(self.optimizer, optimizer, place)

    def gradient(
        self, batch: EpisodeBatch, step: int, share: float = 1.0, world: World = ALONE, *, every_step: bool
    ) -> Outcome:
        """The meta-gradient of an outer step. Called by all processes of ``world``.

        Args:
            batch: this process's part of the meta-batch.
            step: counted from 0.
            share: this part's fraction of the meta-batch, in [0, 1].
            world: the processes that share the meta-batch.
            every_step: report the score before and after each inner step.

        Raises:
            RequestError: the GPU has too little memory, or the engine cannot be prepared.
        """
        settings = self.settings
        with arithmetic(self.network, self.device), enough_memory(_LESS_MEMORY):
            if settings.point.outer == "joint":
                classes = self._data.classes(batch.index)
                outcome = joint(self.network, self.parameters, batch, classes, world)
            else:
                inner = replace(settings.inner_loop(step), n_way=self._n_way)
                method = method_of(self.network, inner, settings.engine)
                objective = replace(settings.objective(step), every_step=every_step)
                outcome = self._engine(self.network, self.parameters, batch, method, objective)
        # All at once: each exchange has its cost.
        *slopes, loss, score = world.average([*outcome.gradient.tensors(), outcome.loss, outcome.score], share)
        return Outcome(self.parameters.like(slopes), loss, score)

    def descend(self, outcome: Outcome, step: int) -> None:
        """Apply the gradient of an outer step, counted from 0, to all that is learned."""
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


def _optimizer(settings: TrainSettings, values: list[torch.Tensor], device: torch.device) -> torch.optim.Optimizer:
    if settings.meta_optimizer == "sgd":
        return torch.optim.SGD(values, lr=settings.beta)
    # On CUDA all tensors in a few launches.
    return torch.optim.Adam(values, lr=settings.beta, fused=device.type == "cuda" or None)
