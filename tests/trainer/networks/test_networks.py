from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from torch import Tensor

from mamldata.errors import RequestError
from trainer.networks.networks import NETWORKS, build_network
from trainer.networks.norms import batch_statistics, leading_statistics, written_out

needs_torchvision = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")
EVERY = [pytest.param(name, marks=needs_torchvision) if name == "resnet18" else name for name in NETWORKS]


def images(count: int, size: int = 28, channels: int = 1) -> Tensor:
    shape = (count, size, size, channels)
    return torch.rand(shape, generator=torch.Generator().manual_seed(count)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("channels", "size", "n_way"), [(1, 28, 5), (3, 32, 20)])
def test_logits_have_one_column_per_class(name: str, channels: int, size: int, n_way: int) -> None:
    """Every network takes images of the size it was built for, and gives n_way logits each."""
    network = build_network(name, channels, size, n_way, seed=0)
    assert network(images(6, size, channels), batch_statistics).shape == (6, n_way)


def test_parameter_counts() -> None:
    """The networks have the published shapes: 64 filters, and 64 features for the head at 28x28."""
    convolutions = 9 * 64 * (1 + 3 * 64) + 4 * 2 * 64
    assert sum(p.numel() for p in build_network("conv4", 1, 28, 5, 0).parameters()) == convolutions + 64 * 5 + 5
    convolutions = 9 * 64 * (1 + 2 * 64) + 3 * 2 * 64
    assert sum(p.numel() for p in build_network("conv3-pool", 1, 28, 5, 0).parameters()) == convolutions + 64 * 5 + 5


def test_too_small_images_are_refused() -> None:
    """An image size of which nothing would be left is an error that says the least size."""
    with pytest.raises(RequestError, match=r"conv3-pool needs images of at least 22x22 pixels, but these have 21x21"):
        build_network("conv3-pool", 1, 21, 5, seed=0)
    assert build_network("conv3-pool", 1, 22, 5, seed=0)(images(2, 22)).shape == (2, 5)
    with pytest.raises(RequestError, match=r"conv4-pool needs images of at least 16x16 pixels, but these have 15x15"):
        build_network("conv4-pool", 1, 15, 5, seed=0)
    assert build_network("conv4-pool", 1, 16, 5, seed=0)(images(2, 16)).shape == (2, 5)


@pytest.mark.parametrize("name", ["conv4", "conv3-pool", "conv4-pool"])
def test_filters_can_be_chosen(name: str) -> None:
    """Every convolution and the head follow; the network's own number makes the same network."""
    network = build_network(name, 1, 28, 5, 0, filters=48)
    assert {block.kernel.shape[0] for block in network.blocks} == {48}
    assert network(images(2)).shape == (2, 5)
    own = {"conv4": 64, "conv3-pool": 64, "conv4-pool": 32}[name]
    plain, told = build_network(name, 1, 28, 5, 0).state_dict(), build_network(name, 1, 28, 5, 0, own).state_dict()
    assert all(torch.equal(plain[key], told[key]) for key in plain)


def test_the_mini_imagenet_network() -> None:
    """Four blocks of 32 filters on 84x84 RGB leave 5x5 places: 800 features."""
    network = build_network("conv4-pool", 3, 84, 5, seed=0)
    convolutions = 9 * 32 * (3 + 3 * 32) + 4 * 2 * 32
    assert sum(p.numel() for p in network.parameters()) == convolutions + 32 * 5 * 5 * 5 + 5
    assert network(torch.rand(2, 3, 84, 84)).shape == (2, 5)


@pytest.mark.parametrize("name", EVERY)
def test_initialisation_is_a_function_of_the_seed(name: str) -> None:
    """Equal seeds give equal parameters, others others, and no global generator is touched."""
    before = torch.get_rng_state()
    first, again, other = (build_network(name, 1, 28, 5, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head"], other["head"])


def test_initialisation_follows_glorot() -> None:
    """Weights are uniform within the Glorot bound; scales are one and shifts zero."""
    state = build_network("conv4", 1, 28, 5, 0).state_dict()
    bound = (6 / (64 * 9 + 64 * 9)) ** 0.5
    kernel = state["blocks.1.kernel"]
    assert 0.99 * bound < kernel.abs().max() <= bound
    assert kernel.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert torch.equal(state["blocks.1.scale"], torch.ones(64))
    assert torch.equal(state["blocks.1.shift"], torch.zeros(64))


@pytest.mark.parametrize("name", EVERY)
def test_networks_keep_nothing(name: str) -> None:
    """There are no buffers, and one forward pass does not change the next."""
    network = build_network(name, 1, 28, 5, seed=0)
    assert list(network.buffers()) == []
    x = images(8)
    before = network(x)
    network(images(20) * 100)
    assert torch.equal(before, network(x))


def test_parameters_are_channels_last() -> None:
    """Kernels lie channels-last in memory, and so does what comes out of a block."""
    network = build_network("conv4", 1, 28, 5, seed=0)
    assert network.blocks[1].kernel.is_contiguous(memory_format=torch.channels_last)
    assert network.blocks[0](images(4), batch_statistics).is_contiguous(memory_format=torch.channels_last)


def test_leading_statistics_of_all_are_batch_statistics() -> None:
    """When all images lead, the two normalisations agree to float64 rounding."""
    x, weight, bias = images(6, 5, 3).double(), torch.rand(3).double(), torch.rand(3).double()
    torch.testing.assert_close(
        leading_statistics(6)(x, weight, bias), batch_statistics(x, weight, bias), rtol=1e-12, atol=1e-12
    )


def test_leading_statistics_look_at_the_leading_images_only() -> None:
    """The others are normalised by the leading images, whatever they hold."""
    x, weight, bias = images(6, 5, 3).double(), torch.ones(3).double(), torch.zeros(3).double()
    normal = leading_statistics(4)(x, weight, bias)
    torch.testing.assert_close(normal[:4], batch_statistics(x[:4], weight, bias), rtol=1e-12, atol=1e-12)
    changed = torch.cat([x[:4], x[4:] * 50])
    assert torch.equal(leading_statistics(4)(changed, weight, bias)[:4], normal[:4])


def test_normalisation_works_under_vmap() -> None:
    """Both normalisations can run for many tasks at once."""
    x, weight, bias = torch.rand(3, 6, 2, 4, 4), torch.rand(3, 2), torch.rand(3, 2)
    for norm in (batch_statistics, written_out, leading_statistics(4)):
        together = torch.func.vmap(norm)(x, weight, bias)
        one_by_one = torch.stack([norm(*parts) for parts in zip(x, weight, bias, strict=True)])
        torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-5)


@needs_torchvision
def test_resnet18_is_torchvisions() -> None:
    """With torchvision's weights it gives what torchvision's network gives in training mode, and adapts like it."""
    from torchvision.models import resnet18

    network, theirs = build_network("resnet18", 3, 40, 7, seed=0), resnet18(num_classes=7)
    ours = dict(network.named_parameters())
    names = {"fc.weight": "head", "fc.bias": "head_bias"}
    assert len(ours) == len(list(theirs.parameters()))
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            layer = name.rpartition(".")[0]
            if isinstance(theirs.get_submodule(layer), torch.nn.BatchNorm2d):
                name = f"{layer}.{'scale' if name.endswith('weight') else 'shift'}"
            value.copy_(ours[names.get(name, f"body.{name}")])
    x = images(4, 40, 3)
    torch.testing.assert_close(network(x), theirs(x), rtol=1e-3, atol=1e-3)
    assert (network(x, leading_statistics(2)) - network(x)).abs().max() > 0.01


def test_resnet18_without_torchvision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install."""
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(RequestError, match="resnet18 needs torchvision: pip install torchvision torch=="):
        build_network("resnet18", 3, 40, 7, seed=0)
