"""Augmentation of training episodes: each image gets parameters of its own, and all of an episode are changed at once.

Torchvision's transforms draw one set of parameters for each call, so they would take a call for each image. They
would also make torchvision a requirement of training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mamldata.errors import RequestError
from mamldata.streaming.transforms import Batched, batched
from mamldata.words import counted

_AREA, _LOG_RATIO = (0.08, 1.0), (math.log(3 / 4), math.log(4 / 3))  # torchvision's RandomResizedCrop
_COLOUR = (0.6, 1.4)
_ANGLE, _SCALE, _SHIFT = math.radians(10), 0.1, 0.1
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


def augmentation(name: str, image_shape: Sequence[int]) -> Batched | None:
    """The transform of training images for the setting ``augment``; None for none.

    Args:
        name: the setting.
        image_shape: of the episodes, ``(H, W, C)``.

    Raises:
        RequestError: it is not for images with this number of channels.
    """
    if name == "none":
        return None
    channels, transform = {"photo": (3, photo), "character": (1, character)}[name]
    if image_shape[-1] != channels:
        raise RequestError(
            f"augment {name} is for images with {counted(channels, 'channel')}, and these have {image_shape[-1]}."
        )
    return batched(transform)


def photo(images: Tensor) -> Tensor:
    """Crop, flip and jitter photographs, as in Chen et al. 2019, https://arxiv.org/abs/1904.04232, section 4.1.

    A crop of 8 to 100 % of the area is resized to the whole; half of the images are flipped; brightness, contrast and
    saturation are multiplied by 0.6 to 1.4, in this order.

    Args:
        images: ``[N, 3, H, W]`` in [0, 1], floating point; the result is likewise.
    """
    draws = _draws(images, 8)
    area, ratio = _between(_AREA, draws[0]), _between(_LOG_RATIO, draws[1]).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    mirror = 1 - 2 * (draws[4] < 0.5).to(images.dtype)
    x, y = (1 - width) * (2 * draws[2] - 1), (1 - height) * (2 * draws[3] - 1)
    zero = torch.zeros_like(x)
    images = _moved(images, [width * mirror, zero, x, zero, height, y])
    brightness, contrast, saturation = (_between(_COLOUR, one)[:, None, None, None] for one in draws[5:])
    images = (images * brightness).clamp(0, 1)
    images = torch.lerp(_grey(images).mean((-2, -1), keepdim=True), images, contrast).clamp(0, 1)
    return torch.lerp(_grey(images), images, saturation).clamp(0, 1)


def character(images: Tensor) -> Tensor:
    """Turn by up to 10 degrees, scale by 0.9 to 1.1 and shift by up to a twentieth of the side.

    Args:
        images: ``[N, 1, H, W]``, floating point; the result is likewise.
    """
    draws = 2 * _draws(images, 4) - 1
    angle, scale, (x, y) = _ANGLE * draws[0], 1 + _SCALE * draws[1], _SHIFT * draws[2:]
    sine, cosine = scale * angle.sin(), scale * angle.cos()
    return _moved(images, [cosine, -sine, x, sine, cosine, y])


def _draws(images: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1), ``[count, N]``; drawn on the CPU, so that all devices have the same."""
    draws = torch.rand(count, len(images), dtype=torch.float32)
    if images.is_cuda:
        draws = draws.pin_memory()  # or the copy would make the CPU wait for the GPU
    return draws.to(images, non_blocking=True)


def _between(bounds: tuple[float, float], draws: Tensor) -> Tensor:
    low, high = bounds
    return low + (high - low) * draws


def _moved(images: Tensor, matrix: list[Tensor]) -> Tensor:
    """Images under affine maps from the result's places to theirs, in units of half the side: six numbers, ``[N]``."""
    places = F.affine_grid(torch.stack(matrix, -1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, places, padding_mode="border", align_corners=False)


def _grey(images: Tensor) -> Tensor:
    """``[N, 1, H, W]`` for ``[N, 3, H, W]``."""
    return sum(weight * images[:, c : c + 1] for c, weight in enumerate(_GREY))  # type: ignore[return-value]
