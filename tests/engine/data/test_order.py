import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssast.engine.data.loader import Shard
from ssast.engine.data.order import SampleOrder


@settings(max_examples=50, deadline=None)
@given(clips=st.integers(1, 50), first=st.integers(0, 200), count=st.integers(0, 200), seed=st.integers(0, 2**32))
def test_any_stretch_is_a_part_of_the_whole(clips, first, count, seed):
    order = SampleOrder(clips, seed)
    index, epochs = order.clips_at(first, count)
    whole, whole_epochs = order.clips_at(0, first + count)
    assert np.array_equal(index, whole[first:]) and np.array_equal(epochs, whole_epochs[first:])


def test_every_clip_once_an_epoch_in_another_order_each():
    order = SampleOrder(100, 3)
    epochs = order.clips_at(0, 300)[0].reshape(3, 100)
    assert all(np.array_equal(np.sort(epoch), np.arange(100)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[0], np.arange(100))
    assert not np.array_equal(epochs[0], SampleOrder(100, 4).clips_at(0, 100)[0])


@pytest.mark.parametrize(("world_size", "micro_batch", "accumulation"), [(1, 4, 3), (2, 2, 3), (3, 4, 1), (1, 12, 1), (6, 1, 2)])
def test_ranks_share_a_step_and_leave_nothing_out(world_size, micro_batch, accumulation):
    """Twelve clips a step however they are dealt out."""
    for step in range(4):
        positions = [
            Shard(rank, world_size, micro_batch).position(step * accumulation + micro) + clip
            for micro in range(accumulation)
            for rank in range(world_size)
            for clip in range(micro_batch)
        ]
        assert sorted(positions) == list(range(12 * step, 12 * step + 12))


def test_crops_stay_inside_and_reach_both_ends():
    order = SampleOrder(10, 0)
    index, epochs = order.clips_at(0, 5000)
    lengths = np.full(5000, 103)
    starts = order.crop_starts(index, epochs, lengths, 100)
    assert set(starts) == {0, 1, 2, 3}
    assert (order.crop_starts(index, epochs, np.full(5000, 99), 100) == 0).all()
    again = order.crop_starts(index[7:9], epochs[7:9], lengths[7:9], 100)
    assert np.array_equal(again, starts[7:9])


def test_two_million_clips_are_no_burden():
    index, _ = SampleOrder(2_200_000, 0).clips_at(3_300_000, 24)
    assert len(set(index)) == 24
