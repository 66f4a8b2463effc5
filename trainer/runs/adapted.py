"""A trained network that adapts to a support set of one's own, and then answers images."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mamldata.bank.prepare import AnyImage, prepare_image
from mamldata.datasets.manifest import ImageRecipe
from mamldata.errors import RequestError
from mamldata.io.images import Images
from mamldata.sampling.normalization import Normalization
from mamldata.streaming.batch import scaled
from mamldata.words import counted
from trainer.maml.adapt import Method, adaptation
from trainer.maml.parameters import Episode, FastWeights, MetaParameters, with_outputs
from trainer.maml.variants import method_of
from trainer.networks.precision import arithmetic
from trainer.settings import TrainSettings

ManyImages: TypeAlias = Tensor | Images | Sequence[AnyImage]
_AT_ONCE = 64  # images beside the support set in a forward pass


@dataclass(frozen=True, eq=False, repr=False)
class AdaptedModel:
    """A network after its inner steps on a support set, see ``TrainedRun.adapt``. Call it with images.

    Attributes:
        classes: the distinct labels, sorted: column i of the logits is that of ``classes[i]``.
        network: that was trained.
        fast: its weights after the last inner step.
        support: the support set, as the network takes it.
        together: how query images are normalized together, as in evaluation.
        apart: how each is normalized without the others.
        network_input: makes the network's input of images.
    """

    classes: tuple[Any, ...]
    network: nn.Module
    fast: FastWeights
    support: Episode
    together: Method
    apart: Method
    network_input: Callable[[ManyImages], Tensor]

    def __call__(self, images: ManyImages, *, together: bool = False) -> Tensor:
        """The logits of images, float32 ``[N, classes]`` on the network's device; ``softmax(1)`` gives probabilities.

        Args:
            images: in the forms that ``TrainedRun.adapt`` takes.
            together: normalize by the statistics of all these images, as the evaluation of a run with transductive or
                per-step batch norm does: the answers then depend on which images are given together, and are good only
                if these show all classes about equally often. By default the statistics are those of the support set,
                and each image is answered as if it were alone. Without effect on a run whose ``bn`` is ``support`` or
                ``frozen``, where this is so in evaluation, too.

        Raises:
            RequestError: an image cannot be read, or is of another form.
        """
        x = self.network_input(images)
        method = self.together if together else self.apart
        episodes = [self.support._replace(query_x=part) for part in torch.split(x, len(x) if together else _AT_ONCE)]
        with torch.no_grad(), arithmetic(self.network, x.device):
            return torch.cat([method.query_logits(self.network, self.fast, one, method) for one in episodes])


def adapted_model(
    network: nn.Module,
    parameters: MetaParameters,
    settings: TrainSettings,
    data: dict[str, Any],
    recipe: Callable[[], ImageRecipe],
    images: ManyImages,
    labels: Iterable[Hashable],
) -> AdaptedModel:
    """See ``TrainedRun``, whose attributes these are, and its ``adapt``; ``recipe`` gives its ``image``."""
    given: list[Any] = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else list(labels)
    try:
        classes = tuple(sorted(set(given)))
    except TypeError as error:
        raise RequestError(f"The labels cannot be sorted ({error}). Give texts or numbers.") from error
    inner, ways = settings.inner_loop_at_test(), data["n_way"]
    if len(classes) < 2 or (inner.classifier == "head" and len(classes) > ways):
        raise RequestError(
            f"The support set has {counted(len(classes), 'class', 'classes')}, but this network tells 2 to {ways} "
            f"apart: its head has {ways} outputs. Give other classes, or train with another n_way."
        )
    inner = replace(inner, n_way=len(classes))
    for label in classes:
        inner.require_shots(given.count(label))

    def network_input(images: ManyImages) -> Tensor:
        x = scaled(_stored(images, data, recipe)[None], torch.float32, _normalization(settings, data))[0]
        return x.to(next(network.parameters()).device)

    x = network_input(images)
    if len(given) != len(x):
        raise RequestError(f"{counted(len(x), 'support image')} cannot have {counted(len(given), 'label')}.")
    y = torch.tensor([classes.index(label) for label in given], device=x.device)
    order = y.argsort(stable=True)  # images of one class are adjacent, as in episodes
    support, together = Episode(x[order], y[order], x[:0], y[:0]), method_of(network, inner)
    apart = together if inner.bn == "frozen" else method_of(network, replace(inner, bn="support"))
    narrow = with_outputs(network, parameters, inner, len(classes))
    with torch.no_grad(), arithmetic(network, x.device):
        *_, fast = adaptation(network, narrow, support, together)
    return AdaptedModel(classes, network, fast, support, together, apart, network_input)


def _stored(images: ManyImages, data: dict[str, Any], recipe: Callable[[], ImageRecipe]) -> Tensor:
    """Images as a bank holds them: uint8 ``[N, C, H, W]``, channels-last in memory."""
    shape = tuple(data["image_shape"])
    if isinstance(images, str | os.PathLike | bytes | Image.Image):
        raise RequestError("Give a list of images, also for a single one.")
    if isinstance(images, Tensor):
        stored = images.cpu().contiguous()
    elif isinstance(images, np.ndarray):
        stored = torch.from_numpy(np.array(images, order="C"))  # a copy, because torch warns of read-only memory
    else:
        prepared = [prepare_image(one, recipe()) for one in images]
        stored = torch.from_numpy(np.stack(prepared)) if prepared else torch.empty(0)
    if not len(stored) or stored.dtype != torch.uint8 or stored.shape[1:] != shape:
        raise RequestError(
            f"Images must be uint8 [N, {', '.join(map(str, shape))}] with N of at least 1, not "
            f"{str(stored.dtype).removeprefix('torch.')} {list(stored.shape)}; or give files or PIL images in a list."
        )
    return stored.permute(0, 3, 1, 2)


def _normalization(settings: TrainSettings, data: dict[str, Any]) -> Normalization | None:
    if not settings.normalize:
        return None
    if known := data.get("normalisation"):
        return Normalization(tuple(known["mean"]), tuple(known["std"]))
    raise RequestError("The run was trained on normalized images, but does not record their mean and deviation.")
