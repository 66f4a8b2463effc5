"""A trained network that adapts to a support set of one's own, and then answers images."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mamldata.bank.prepare import AnyImage, prepare_image
from mamldata.errors import RequestError
from mamldata.io.images import Images
from mamldata.sampling.normalization import Normalization
from mamldata.streaming.batch import scaled
from mamldata.words import counted
from trainer.maml.adapt import Method, adaptation
from trainer.maml.parameters import Episode, FastWeights, with_outputs
from trainer.maml.variants import method_of, query_logits_by_support
from trainer.networks.precision import arithmetic

if TYPE_CHECKING:
    from trainer.runs.checkpoint import TrainedRun

ManyImages: TypeAlias = Tensor | Images | Sequence[AnyImage]
_AT_ONCE = 64  # images beside the support set in a forward pass


@dataclass(frozen=True, eq=False, repr=False)
class AdaptedModel:
    """A network after its inner steps on a support set, see ``TrainedRun.adapt``. Call it with images.

    Attributes:
        classes: the distinct labels, sorted: column i of the logits is that of ``classes[i]``.
        run: the trained network.
        support: the support set, as the network takes it.
        method: how it adapted.
        fast: its weights after the last inner step.
    """

    classes: tuple[Any, ...]
    run: TrainedRun
    support: Episode
    method: Method
    fast: FastWeights

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
        x = _input(self.run, images)
        query_logits = self.method.query_logits
        if not together and self.method.inner.bn != "frozen":
            query_logits = query_logits_by_support
        parts = [x] if together else torch.split(x, _AT_ONCE)
        with torch.no_grad(), arithmetic(self.run.network, x.device):
            episodes = [self.support._replace(query_x=part) for part in parts]
            return torch.cat([query_logits(self.run.network, self.fast, one, self.method) for one in episodes])


def adapted_model(run: TrainedRun, images: ManyImages, labels: Iterable[Hashable]) -> AdaptedModel:
    """See ``TrainedRun.adapt``."""
    given: list[Any] = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else list(labels)
    try:
        classes = tuple(sorted(set(given)))
    except TypeError as error:
        raise RequestError(f"The labels cannot be sorted ({error}). Give texts or numbers.") from error
    inner, ways = run.settings.inner_loop_at_test(), run.data["n_way"]
    if not 2 <= len(classes) <= ways:
        raise RequestError(
            f"The support set has {counted(len(classes), 'class', 'classes')}, but this network tells 2 to {ways} "
            f"apart: its head has {ways} outputs. Give other classes, or train with another n_way."
        )
    for label in classes:
        inner.require_shots(given.count(label))
    x = _input(run, images)
    if len(given) != len(x):
        raise RequestError(f"{counted(len(x), 'support image')} cannot have {counted(len(given), 'label')}.")
    y = torch.tensor([classes.index(label) for label in given], device=x.device)
    order = y.argsort(stable=True)  # images of one class are adjacent, as in episodes
    support, method = Episode(x[order], y[order], x[:0], y[:0]), method_of(run.network, inner)
    parameters = with_outputs(run.network, run.parameters, inner, len(classes))
    with torch.no_grad(), arithmetic(run.network, x.device):
        *_, fast = adaptation(run.network, parameters, support, method)
    return AdaptedModel(classes, run, support, method, fast)


def _input(run: TrainedRun, images: ManyImages) -> Tensor:
    """Images as the network takes them: float32 ``[N, C, H, W]``, in [0, 1] or normalized, on its device."""
    shape = tuple(run.data["image_shape"])
    if isinstance(images, str | os.PathLike | bytes | Image.Image):
        raise RequestError("Give a list of images, also for a single one.")
    if isinstance(images, Tensor):
        stored = images.cpu().contiguous()
    elif isinstance(images, np.ndarray):
        stored = torch.from_numpy(np.array(images, order="C"))  # a copy, because torch warns of read-only memory
    else:
        prepared = [prepare_image(one, run.image) for one in images]
        stored = torch.from_numpy(np.stack(prepared)) if prepared else torch.empty(0)
    if not len(stored) or stored.dtype != torch.uint8 or stored.shape[1:] != shape:
        raise RequestError(
            f"Images must be uint8 [N, {', '.join(map(str, shape))}] with N of at least 1, not "
            f"{str(stored.dtype).removeprefix('torch.')} {list(stored.shape)}; or give files or PIL images in a list."
        )
    by = run.data.get("normalisation") if run.settings.normalize else None
    if run.settings.normalize and not by:
        raise RequestError("The run was trained on normalized images, but does not record their mean and deviation.")
    normalize = Normalization(tuple(by["mean"]), tuple(by["std"])) if by else None
    x = scaled(stored.permute(0, 3, 1, 2)[None], torch.float32, normalize)[0]
    return x.to(next(run.network.parameters()).device)
