"""The order of a stream is a pure function of numbers: every epoch a permutation, every meta-batch known."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamldata.errors import RequestError
from mamldata.sampling.order import Order, permutation, shard_runs

SEEDS = st.integers(0, 2**70)
EPOCHS = st.integers(0, 2**40)


class TestPermutation:
    @given(seed=SEEDS, epoch=EPOCHS, episodes=st.integers(1, 3000))
    def test_it_is_one(self, seed, epoch, episodes):
        """Every epoch of every seed holds every episode once."""
        order = permutation(seed, epoch, episodes)
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(episodes))

    @given(seed=SEEDS, epoch=EPOCHS)
    def test_it_differs_between_epochs_and_seeds(self, seed, epoch):
        """Neighbouring epochs and seeds have other orders, and (seed, epoch) is not their sum."""
        here = permutation(seed, epoch, 500)
        for other in ((seed, epoch + 1), (seed + 1, epoch), (seed + 1, epoch + 1)):
            assert not np.array_equal(here, permutation(*other, 500))
        assert not np.array_equal(permutation(seed + 1, epoch, 500), permutation(seed, epoch + 1, 500))

    def test_it_is_the_same_when_asked_again(self):
        """What the cache gives and what is computed anew are equal."""
        first = permutation(11, 2, 777).copy()
        permutation.cache_clear()
        assert np.array_equal(permutation(11, 2, 777), first)

    def test_the_golden_digest(self):
        """The orders that resumed runs and papers depend on, pinned."""
        digest = hashlib.sha256()
        for seed, epoch, episodes in [(0, 0, 1000), (0, 1, 1000), (7, 0, 60_000), (2**70, 12, 5)]:
            digest.update(permutation(seed, epoch, episodes).astype("<i8").tobytes())
        assert digest.hexdigest() == "2ef504d27c42937006cc4c9786008d0dae42132d06b1f0f10257cd5d8f3776fc"

    def test_it_cannot_be_written_to(self):
        """The cached order is read-only: nobody changes it for the others."""
        with pytest.raises(ValueError, match="read-only"):
            permutation(0, 0, 10)[0] = 3

    def test_every_place_is_as_likely(self):
        """Over many epochs each episode comes first about as often."""
        firsts = np.bincount([permutation(5, epoch, 8)[0] for epoch in range(4000)], minlength=8)
        assert firsts.min() > 400
        assert firsts.max() < 600


class TestShuffled:
    @given(episodes=st.integers(1, 400), batch=st.integers(1, 400), seed=SEEDS, epoch=st.integers(0, 50))
    def test_the_meta_batches_of_an_epoch_are_disjoint(self, episodes, batch, seed, epoch):
        """All have the full size, share no episode, and leave out less than one meta-batch."""
        batch = min(batch, episodes)
        order = Order(episodes, batch, True, seed)
        per_epoch = order.batches_per_epoch
        assert per_epoch == episodes // batch
        found = [order.indices(t) for t in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        assert {len(indices) for indices in found} == {batch}
        together = np.concatenate(found)
        assert len(set(together.tolist())) == len(together) > episodes - batch
        assert set(together.tolist()) <= set(range(episodes))

    def test_what_is_left_out_differs_from_epoch_to_epoch(self):
        """No episode is left out for good."""
        order = Order(10, 4, True, 0)
        seen = {int(i) for t in range(2 * 20) for i in order.indices(t)}
        assert seen == set(range(10))
        left_out = {
            frozenset(range(10)) - {int(i) for t in (2 * e, 2 * e + 1) for i in order.indices(t)} for e in range(9)
        }
        assert len(left_out) > 3

    def test_any_meta_batch_can_be_asked_for_at_once(self):
        """Meta-batch t does not depend on those before it."""
        order = Order(100, 7, True, 3)
        forwards = [order.indices(t).tolist() for t in range(60)]
        permutation.cache_clear()
        backwards = [order.indices(t).tolist() for t in reversed(range(60))]
        assert forwards == backwards[::-1]


class TestShardRuns:
    @given(
        shards=st.lists(st.integers(1, 40), min_size=1, max_size=12).map(tuple),
        batch=st.integers(1, 30),
        shuffle=st.booleans(),
        epoch=st.integers(0, 50),
    )
    def test_they_are_those_of_the_meta_batches(self, shards, batch, shuffle, epoch):
        """What is said to come is what comes: the shard of each place of an epoch."""
        batch = min(batch, sum(shards))
        order = Order(sum(shards), batch, shuffle, 3, shards=shards if shuffle else None)
        numbers, ends = shard_runs(order, epoch, shards)
        per_epoch = order.batches_per_epoch
        found = np.concatenate([order.indices(t) for t in range(epoch * per_epoch, (epoch + 1) * per_epoch)])
        of = np.searchsorted(np.cumsum(shards), found, side="right")
        assert of.tolist() == np.repeat(numbers, np.diff(ends, prepend=0))[: len(found)].tolist()


class TestPlain:
    @given(episodes=st.integers(1, 400), batch=st.integers(1, 500), epoch=st.integers(0, 50))
    def test_every_episode_once_and_in_order(self, episodes, batch, epoch):
        """None dropped, none twice; only the last meta-batch is smaller."""
        order = Order(episodes, batch, False, 0)
        per_epoch = order.batches_per_epoch
        assert per_epoch == math.ceil(episodes / batch)
        found = [order.indices(t) for t in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        assert np.concatenate(found).tolist() == list(range(episodes))
        assert all(len(indices) == batch for indices in found[:-1])
        assert 1 <= len(found[-1]) <= batch
        assert found[-1].dtype == np.int64

    @given(batch=st.integers(1, 500), t=st.integers(0, 2**40))
    def test_endless_episodes_are_counted_on(self, batch, t):
        """Episodes that never end come in order, and no meta-batch is smaller."""
        order = Order(None, batch, False, 0)
        assert order.batches_per_epoch is None
        assert order.indices(t).tolist() == list(range(t * batch, (t + 1) * batch))


class TestRefusals:
    @pytest.mark.parametrize("batch", [0, -1])
    def test_a_meta_batch_of_nothing(self, batch):
        """A meta-batch holds at least one episode."""
        with pytest.raises(RequestError, match=f"batch_size must be at least 1, not {batch}"):
            Order(10, batch, False, 0)

    def test_a_negative_seed(self):
        """Seeds count from 0."""
        with pytest.raises(RequestError, match="seed must be at least 0, not -1"):
            Order(10, 1, True, -1)

    def test_a_shuffled_meta_batch_larger_than_the_epoch(self):
        """An epoch without a single full meta-batch is refused with both numbers."""
        with pytest.raises(RequestError, match=r"batch_size is 11, but there are only 10 episodes. Lower it"):
            Order(10, 11, True, 0)
        assert Order(10, 11, False, 0).batches_per_epoch == 1
        assert Order(10, 10, True, 0).batches_per_epoch == 1


def test_several_orders_keep_their_epochs() -> None:
    """The orders of a mixture's sources do not push one another's permutations out; long runs keep two of each."""
    first = [permutation(3, 0, 50 + number) for number in range(6)]
    assert all(permutation(3, 0, 50 + number) is one for number, one in enumerate(first))
    for epoch in range(1, 4):
        permutation(3, epoch, 50)
    assert permutation(3, 0, 50) is not first[0]
    assert np.array_equal(permutation(3, 0, 50), first[0])
