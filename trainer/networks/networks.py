"""The networks. Normalization is an argument of their forward pass, so no network keeps statistics of its own."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamldata.errors import RequestError
from mamldata.words import install_command
from trainer.networks.norms import Norm, batch_statistics


class Block(nn.Module):
    """3x3 convolution, batch norm, ReLU, and optional 2x2 max-pooling."""

    def __init__(self, inputs: int, filters: int, *, stride: int, padding: int, pool: bool) -> None:
        super().__init__()
        self.stride, self.padding, self.pool = stride, padding, pool
        # No bias: normalization cancels it, so its gradient is always zero.
        self.kernel = nn.Parameter(torch.empty(filters, inputs, 3, 3))
        self.scale = nn.Parameter(torch.ones(filters))
        self.shift = nn.Parameter(torch.zeros(filters))

    def forward(self, x: Tensor, norm: Norm) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, filters, H', W']``."""
        x = F.conv2d(x, self.kernel, stride=self.stride, padding=self.padding)
        x = F.relu_(norm(x, self.scale, self.shift))
        return F.max_pool2d(x, 2) if self.pool else x


class ConvNet(nn.Module):
    """Blocks, then the mean over space or a flattening, then a linear head."""

    def __init__(self, blocks: list[Block], features: int, n_way: int, *, mean_over_space: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.mean_over_space = mean_over_space
        self.head = nn.Parameter(torch.empty(n_way, features))
        self.head_bias = nn.Parameter(torch.zeros(n_way))

    def forward(self, x: Tensor, norm: Norm = batch_statistics) -> Tensor:
        """Images ``[N, C, H, W]`` to logits ``[N, n_way]``."""
        return F.linear(self.features(x, norm), self.head, self.head_bias)

    def features(self, x: Tensor, norm: Norm) -> Tensor:
        """Images ``[N, C, H, W]`` to the inputs of the head, ``[N, features]``."""
        for block in self.blocks:
            x = block(x, norm)
        return x.mean((2, 3)) if self.mean_over_space else x.flatten(1)


def conv4(image_channels: int, image_size: int, n_way: int, filters: int = 64) -> ConvNet:  # noqa: ARG001  # any size
    """The Omniglot network of Finn et al. 2017: four blocks of 64 filters with stride 2, and the mean over space.

    After https://github.com/cbfinn/maml, ``main.py`` and ``maml.py``, which pad an even side at one end only and draw
    the head from a normal distribution; here padding is 1 on all sides and initialization is Glorot's.
    """
    widths = [image_channels, *[filters] * 4]
    blocks = [Block(i, o, stride=2, padding=1, pool=False) for i, o in pairwise(widths)]
    return ConvNet(blocks, filters, n_way, mean_over_space=True)


def conv3_pool(image_channels: int, image_size: int, n_way: int, filters: int = 64) -> ConvNet:
    """Three blocks of 64 filters without padding, each with 2x2 max-pooling; 28x28 images end as 1x1.

    The network of the Omniglot examples of functorch and higher.

    Raises:
        RequestError: the images are too small.
    """
    side = image_size
    for _ in range(3):
        side = (side - 2) // 2
    if side < 1:
        raise RequestError(
            f"The network conv3-pool needs images of at least 22x22 pixels, but these have {image_size}x{image_size}. "
            "Use larger images, or conv4."
        )
    widths = [image_channels, *[filters] * 3]
    blocks = [Block(i, o, stride=1, padding=0, pool=True) for i, o in pairwise(widths)]
    return ConvNet(blocks, filters * side * side, n_way, mean_over_space=False)


def conv4_pool(image_channels: int, image_size: int, n_way: int, filters: int = 32) -> ConvNet:
    """The MiniImagenet network of Finn et al. 2017: four max-pooled blocks of 32 filters; 84x84 images end as 5x5.

    After Ravi and Larochelle 2017, who chose 32 filters instead of 64 to reduce overfitting.

    Raises:
        RequestError: the images are too small.
    """
    side = image_size // 16
    if side < 1:
        raise RequestError(
            f"The network conv4-pool needs images of at least 16x16 pixels, but these have {image_size}x{image_size}. "
            "Use larger images, or conv4."
        )
    widths = [image_channels, *[filters] * 4]
    blocks = [Block(i, o, stride=1, padding=1, pool=True) for i, o in pairwise(widths)]
    return ConvNet(blocks, filters * side * side, n_way, mean_over_space=False)


class ToldNorm(nn.Module):
    """Replaces torch's ``BatchNorm2d``, and normalizes by its attribute ``norm``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.norm: Norm = batch_statistics

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``[N, C, H, W]``."""
        return self.norm(x, self.scale, self.shift)


@contextmanager
def told(network: nn.Module, norm: Norm) -> Iterator[None]:
    """In this block, each ``ToldNorm`` of a network normalizes by ``norm``, since other layers pass on only x."""
    layers = [layer for layer in network.modules() if isinstance(layer, ToldNorm)]
    try:
        for layer in layers:
            layer.norm = norm
        yield
    finally:
        for layer in layers:
            layer.norm = batch_statistics  # a norm may keep an episode's graph alive


class MeanOverSpace(nn.Module):
    """Adaptive pooling to one pixel that also works under ``torch.func.vmap``."""

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, C]``."""
        return x.mean((2, 3))


class ResNet18(nn.Module):
    """torchvision's ResNet-18 up to its mean over space, then a linear head."""

    def __init__(self, body: nn.Module, n_way: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Parameter(torch.empty(n_way, 512))
        self.head_bias = nn.Parameter(torch.zeros(n_way))

    def forward(self, x: Tensor, norm: Norm = batch_statistics) -> Tensor:
        """Images ``[N, C, H, W]`` to logits ``[N, n_way]``."""
        return F.linear(self.features(x, norm), self.head, self.head_bias)

    def features(self, x: Tensor, norm: Norm) -> Tensor:
        """Images ``[N, C, H, W]`` to the inputs of the head, ``[N, 512]``."""
        with told(self.body, norm):
            features: Tensor = self.body(x)
            return features


def resnet18(image_channels: int, image_size: int, n_way: int) -> ResNet18:  # noqa: ARG001  # any size
    """He, Zhang, Ren, Sun 2016, https://arxiv.org/abs/1512.03385, 18 layers; each norm uses batch statistics.

    Raises:
        RequestError: torchvision is not installed.
    """
    try:
        models = importlib.import_module("torchvision.models")
    except ModuleNotFoundError as error:
        raise RequestError(f"The network resnet18 needs torchvision: {install_command('resnet')}.") from error
    with torch.random.fork_rng(devices=[]):  # torchvision draws weights, which build_network replaces
        body = models.resnet18(norm_layer=ToldNorm)
    body.conv1 = nn.Conv2d(image_channels, 64, 7, stride=2, padding=3, bias=False, device="meta").to_empty(device="cpu")
    body.avgpool, body.fc = MeanOverSpace(), nn.Identity()
    return ResNet18(body, n_way)


class Perceptron(nn.Module):
    """Two hidden layers with ReLU and a linear head, for points; without normalization."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first, self.first_bias = nn.Parameter(torch.empty(hidden, inputs)), nn.Parameter(torch.zeros(hidden))
        self.second, self.second_bias = nn.Parameter(torch.empty(hidden, hidden)), nn.Parameter(torch.zeros(hidden))
        self.head, self.head_bias = nn.Parameter(torch.empty(outputs, hidden)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, norm: Norm = batch_statistics) -> Tensor:  # noqa: ARG002  # the signature of all networks
        """Points ``[N, inputs]`` to answers ``[N, outputs]``."""
        x = F.relu(F.linear(x, self.first, self.first_bias))
        x = F.relu(F.linear(x, self.second, self.second_bias))
        return F.linear(x, self.head, self.head_bias)


def mlp(seed: int) -> Perceptron:
    """The sinusoid network of Finn et al. 2017, section 5.1: two hidden layers of 40, ``[N, 1]`` to ``[N, 1]``.

    The paper draws all weights with a deviation of 0.01; here they are drawn as in the other networks.
    """
    network = Perceptron(1, 40, 1)
    draw_weights(network, seed)
    return network


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "conv4": conv4,
    "conv3-pool": conv3_pool,
    "conv4-pool": conv4_pool,
    "resnet18": resnet18,
}


def head_names(network: nn.Module) -> list[str]:
    """The parameters of the last layer."""
    heads = getattr(network, "head_parameters", ("head", "head_bias"))  # those of an ``OwnNetwork``
    return [name for name, _ in network.named_parameters() if name in heads]


def norm_names(network: nn.Module) -> list[str]:
    """The scales and shifts of the norms."""
    names = [name for name, _ in network.named_parameters()]
    return getattr(network, "norm_parameters", [n for n in names if n.rpartition(".")[2] in {"scale", "shift"}])


def build_network(
    name: str, image_channels: int, image_size: int, n_way: int, seed: int, filters: int | None = None
) -> nn.Module:
    """A network with fresh float32 parameters on the CPU, channels-last; equal seeds give equal parameters.

    Args:
        name: one of ``NETWORKS``.
        image_channels: of the images.
        image_size: height and width of the images, in pixels.
        n_way: number of classes.
        seed: of the initialization; no global generator is touched.
        filters: number in each convolution; None is the network's own; not for ``resnet18``.

    Raises:
        RequestError: the network cannot take images of this size.
    """
    network = NETWORKS[name](image_channels, image_size, n_way, **({} if filters is None else {"filters": filters}))
    draw_weights(network, seed)
    return network.to(memory_format=torch.channels_last)


def draw_weights(network: nn.Module, seed: int) -> None:
    """Draw new weights for all layers; scales stay at one, shifts and biases at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1:
                _glorot_uniform(weight, generator)


def _glorot_uniform(weight: Tensor, generator: torch.Generator) -> None:
    """Glorot and Bengio 2010, equation 16."""
    fan_in, fan_out = weight[0].numel(), weight[:, 0].numel()
    bound = math.sqrt(6 / (fan_in + fan_out))
    weight.uniform_(-bound, bound, generator=generator)
