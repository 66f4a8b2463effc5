"""The pretrained baseline: the network trained as a plain classifier of all training classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamldata.streaming.batch import EpisodeBatch
from trainer.maml.engines import Outcome
from trainer.maml.losses import accuracy
from trainer.maml.parameters import MetaParameters, Parameters, learnable
from trainer.networks.networks import head_names
from trainer.networks.norms import Norm, Statistics, batch_statistics, given_statistics
from trainer.networks.precision import call
from trainer.system.distributed import ALONE, World, sum_over_ranks


def joint_parameters(network: nn.Module, wide: nn.Module) -> MetaParameters:
    """The network's parameters, with a head for all classes in place of its own, which keeps its initial values.

    Args:
        network: with a head for the classes of an episode.
        wide: the same network with a head for all classes; only the head is used.
    """
    heads = head_names(network)
    own: Parameters = {name: value for name, value in learnable(network).items() if name not in heads}
    device = next(iter(own.values())).device
    values = {name: value.detach().to(device) for name, value in wide.named_parameters() if name in heads}
    return MetaParameters(own, joint={name: value.requires_grad_() for name, value in values.items()})


def joint(
    network: nn.Module, parameters: MetaParameters, batch: EpisodeBatch, classes: Tensor, world: World = ALONE
) -> Outcome:
    """The gradient of one step of plain classification, with the signature and the outcome of an engine.

    Args:
        network: with a ``forward(x, norm)``.
        parameters: those of ``joint_parameters``.
        batch: B episodes, whose images are all treated as one batch.
        classes: int64 ``[B, n_way]``, the training class of each label of an episode.
        world: the processes whose images are normalized as one batch. The mean of their outcomes, each weighted by
            its number of images, is that of the whole batch.
    """
    x = torch.cat([batch.support_x.flatten(0, 1), batch.query_x.flatten(0, 1)])
    labels = [classes.to(part.device).gather(1, part).flatten() for part in (batch.support_y, batch.query_y)]
    y = torch.cat(labels)
    norm = batch_statistics if world.world_size == 1 else statistics_of_all(len(x))
    logits = call(network, parameters.weights | parameters.joint, x, norm)
    loss = F.cross_entropy(logits, y)
    gradient = parameters.like(torch.autograd.grad(loss, parameters.tensors()))
    return Outcome(gradient, loss.detach(), accuracy(logits.detach(), y)[None])


def statistics_of_all(count: int) -> Norm:
    """Batch norm by the mean and variance of the images of all ranks.

    Args:
        count: the number of images of this rank.
    """

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        values = x.new_tensor([x.numel() / x.shape[1]])  # of one channel
        sums = sum_over_ranks(torch.cat([x.sum((0, 2, 3)), values]), count)
        mean, total = sums[:-1] / sums[-1], sums[-1].detach()
        variance = sum_over_ranks((x - mean[:, None, None]).square().sum((0, 2, 3)), count) / total
        return given_statistics([Statistics(mean, variance)])(x, weight, bias)

    return norm
