"""Transforms: each image by itself, the same pixels on every way, and the user's random numbers untouched."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import mamldata
from mamldata import EpisodeStream
from mamldata.archive.build import build
from mamldata.archive.plan import BuildRequest
from mamldata.errors import RequestError

REQUEST = BuildRequest(n_way=3, k_shot=2, k_query=4, episodes={"train": 9, "val": 5}, seed=9, episodes_per_shard=5)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, glyphs_manifest, glyphs_bank) -> Path:
    """A small archive, which tests only read."""
    out = tmp_path_factory.mktemp("transforms") / "archive"
    build(glyphs_manifest, glyphs_bank, out, REQUEST)
    return out


def noisy(images: torch.Tensor) -> torch.Tensor:
    """Draws from all three global generators."""
    return images + torch.rand(()) + np.random.rand() + random.random()


def kept(batches) -> list[tuple[torch.Tensor, ...]]:
    return [tuple(tensor.cpu().clone() for tensor in batch) for batch in batches]


def same(one, other) -> bool:
    one, other = kept(one), kept(other)
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


def generator_states() -> list[object]:
    return [torch.get_rng_state().tolist(), repr(np.random.get_state(legacy=False)), random.getstate()]


TRANSFORMS = [noisy, mamldata.batched(noisy)]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["each", "batched"])
class TestTheSamePixels:
    """All of these compare with one plain pass over the stream."""

    def test_again_and_read_ahead(self, folder, transform):
        """A second stream, one that reads ahead, and the user's seeds change nothing; another seed does."""
        first = kept(EpisodeStream(folder, batch_size=4, transform=transform))
        torch.manual_seed(5)
        random.seed(5)
        assert same(first, EpisodeStream(folder, batch_size=4, transform=transform))
        assert same(first, EpisodeStream(folder, batch_size=4, transform=transform).to("cpu"))
        assert not same(first, EpisodeStream(folder, batch_size=4, transform=transform, seed=1))

    def test_resumed(self, folder, transform):
        """A stream that continues in its second epoch gives what was left of it."""
        stream = EpisodeStream(folder, batch_size=4, transform=transform)
        first, second = kept(stream), kept(stream)
        assert not same(first, second)
        again = EpisodeStream(folder, batch_size=4, transform=transform)
        again.load_state_dict(stream.state_dict() | {"next_batch": len(first) + 1})
        assert same(second[1:], again)

    def test_ranks(self, folder, transform):
        """The parts of three ranks together are the batches of one."""
        whole = kept(EpisodeStream(folder, batch_size=4, transform=transform))
        parts = [kept(EpisodeStream(folder, batch_size=4, transform=transform, rank=r, world_size=3)) for r in range(3)]
        joined = [tuple(map(torch.cat, zip(*shares, strict=True))) for shares in zip(*parts, strict=True)]
        assert same(whole, joined)

    @pytest.mark.slow
    def test_workers(self, folder, transform):
        """Worker processes, whose generators have other states, give the same."""
        stream = EpisodeStream(folder, batch_size=4, transform=transform)
        loader = DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context="fork")
        assert same(EpisodeStream(folder, batch_size=4, transform=transform), loader)

    def test_the_users_generators(self, folder, transform):
        """The states of the generators of torch, NumPy and Python are as before, on both ways to a batch."""
        before = generator_states()
        for stream in (lambda s: s, lambda s: s.to("cpu")):
            list(stream(EpisodeStream(folder, batch_size=4, transform=transform)))
            assert generator_states() == before

    def test_the_users_generators_after_an_error(self, folder, transform):
        """They are also as before if the transform fails, and its own error arrives."""

        def failing(images: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError(str(noisy(images).shape))

        failing = mamldata.batched(failing) if transform is not noisy else failing
        before = generator_states()
        with pytest.raises(ZeroDivisionError):
            next(iter(EpisodeStream(folder, batch_size=4, transform=failing)))
        assert generator_states() == before


class TestWhatIsTransformed:
    def test_each_image_draws_its_own_numbers(self, folder):
        """Torchvision's flip, which decides once for each call, turns some images of an episode and not others."""
        v2 = pytest.importorskip("torchvision.transforms.v2")
        plain = next(iter(EpisodeStream(folder, batch_size=4)))
        flipped = next(iter(EpisodeStream(folder, batch_size=4, transform=v2.RandomHorizontalFlip())))
        turned = (flipped.query_x != plain.query_x).flatten(2).any(2)
        assert turned.any(1).all()
        assert not turned.all(1).any()
        assert torch.equal(
            flipped.query_x, torch.where(turned[..., None, None, None], plain.query_x.flip(-1), plain.query_x)
        )
        together = mamldata.batched(v2.RandomHorizontalFlip())
        turned = next(iter(EpisodeStream(folder, batch_size=4, transform=together))).query_x != plain.query_x
        assert (turned.flatten(2).any(2).sum(1) % 12 == 0).all()  # all 12 images of an episode, or none

    def test_support_and_query(self, folder):
        """The query images get the transform of the support images, unless they have one of their own, or None."""
        plain, whole, only, other = (
            next(iter(EpisodeStream(folder, batch_size=4, shuffle=False, **options)))
            for options in (
                {},
                {"transform": torch.neg},
                {"transform": torch.neg, "query_transform": None},
                {"query_transform": torch.neg},
            )
        )
        assert torch.equal(whole.support_x, -plain.support_x)
        assert torch.equal(whole.query_x, -plain.query_x)
        assert torch.equal(only.support_x, -plain.support_x)
        assert torch.equal(only.query_x, plain.query_x)
        assert torch.equal(other.support_x, plain.support_x)
        assert torch.equal(other.query_x, -plain.query_x)

    def test_support_and_query_draw_apart(self, folder):
        """The first support image and the first query image of an episode get different numbers."""
        level = mamldata.batched(lambda images: torch.zeros_like(images) + torch.rand(()))
        batch = next(iter(EpisodeStream(folder, batch_size=4, transform=level)))
        assert (
            len({*batch.support_x[:, 0].flatten(1)[:, 0].tolist(), *batch.query_x[:, 0].flatten(1)[:, 0].tolist()}) == 8
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
    def test_images_before_they_are_normalized(self, folder, dtype):
        """A transform sees the dtype of the stream and values that are not normalized; normalization follows."""
        seen: list[torch.Tensor] = []

        def look(image: torch.Tensor) -> torch.Tensor:
            seen.append(image.clone())
            return image

        normalize = dtype != torch.uint8
        batch = next(iter(EpisodeStream(folder, batch_size=4, dtype=dtype, normalize=normalize, transform=look)))
        images = torch.stack(seen)
        assert images.shape == (4 * 18, 1, 28, 28)
        assert images.dtype == dtype
        assert images.min() == 0
        assert images.max() == (255 if dtype == torch.uint8 else 1)
        plain = next(iter(EpisodeStream(folder, batch_size=4, dtype=dtype, normalize=normalize)))
        torch.testing.assert_close(batch.support_x, plain.support_x)
        torch.testing.assert_close(batch.query_x, plain.query_x)

    def test_another_size(self, folder):
        """Images may change their shape; they stay channels-last in memory, and labels and indices stay."""
        plain = next(iter(EpisodeStream(folder, batch_size=4)))
        for transform in (crop, mamldata.batched(crop), mamldata.batched(crop, random=False)):
            batch = next(iter(EpisodeStream(folder, batch_size=4, transform=transform)))
            assert torch.equal(batch.support_x, crop(plain.support_x))
            assert batch.query_x.shape == (4, 12, 3, 20, 24)
            assert batch.query_x.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(batch.query_y, plain.query_y)
            assert torch.equal(batch.index, plain.index)

    def test_a_fixed_transform_gets_a_whole_batch(self, folder):
        """One that draws nothing is called once for all support images and once for all query images."""
        seen = []
        fixed = mamldata.batched(lambda images: seen.append(tuple(images.shape)) or images, random=False)
        next(iter(EpisodeStream(folder, batch_size=4, transform=fixed)))
        assert seen == [(24, 1, 28, 28), (48, 1, 28, 28)]

    @pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
    def test_on_a_gpu(self, folder, device):
        """Transforms get images on the GPU, and its generator is seeded and restored, too."""
        draw = mamldata.batched(lambda images: images + torch.rand(len(images), 1, 1, 1, device=images.device))
        before = torch.cuda.get_rng_state()
        first = kept(EpisodeStream(folder, batch_size=4, transform=draw).to(device))
        assert torch.equal(torch.cuda.get_rng_state(), before)
        torch.cuda.manual_seed(5)
        assert same(first, EpisodeStream(folder, batch_size=4, transform=draw).to(device))


def crop(images: torch.Tensor) -> torch.Tensor:
    """The middle, in three channels."""
    return images[..., 4:24, 2:26].repeat_interleave(3, dim=-3)


class TestFaults:
    @pytest.mark.parametrize(
        ("transform", "message"),
        [
            (lambda image: image.numpy(), r"must return a tensor \[C, H, W\], but it returned a ndarray"),
            (lambda image: image[0], r"gets images \[1, 28, 28\] .* but it returned a tensor \[28, 28\]"),
            (
                mamldata.batched(lambda images: images[1:]),
                r"tensor \[6, C, H, W\], but it returned a tensor \[5, 1, 28",
            ),
            (mamldata.batched(lambda _: None, random=False), r"\[24, C, H, W\], but it returned a NoneType"),
            (lambda image: image[:, : 20 + int(torch.rand(()) * 8)], "different shapes or dtypes"),
        ],
    )
    def test_what_is_not_images(self, folder, transform, message):
        """A transform that returns something else is told what it must return."""
        with pytest.raises(RequestError, match=message):
            next(iter(EpisodeStream(folder, batch_size=4, transform=transform)))

    @pytest.mark.parametrize("options", [{"transform": "flip"}, {"query_transform": 3}])
    def test_no_callable(self, folder, options):
        """What cannot be called is refused when the stream is made."""
        ((name, value),) = options.items()
        with pytest.raises(
            RequestError, match=f"{name} must be a callable that takes and returns images, not {value!r}"
        ):
            EpisodeStream(folder, **options)

    @pytest.mark.parametrize("transform", [crop, lambda image: (image * 255).to(torch.uint8)])
    def test_what_cannot_be_normalized(self, folder, transform):
        """Another number of channels, or whole numbers, are refused where they are to be normalized."""
        with pytest.raises(RequestError, match="cannot be normalized: that needs 1 channels of floating-point"):
            next(iter(EpisodeStream(folder, batch_size=4, normalize=True, transform=transform)))

    def test_after_an_error_the_stream_stands_where_it_was(self, folder):
        """The state after a failed transform is that before the meta-batch."""
        stream = EpisodeStream(folder, batch_size=4, transform=lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(stream.to("cpu"))
        assert stream.state_dict()["next_batch"] == 0
