import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssast.engine.data.loader import Shard
from ssast.engine.data.order import MixedOrder, SampleOrder, WeightedOrder
from ssast.engine.mixture import BLOCK, block_shares


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


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "accumulation"), [(1, 4, 3), (2, 2, 3), (3, 4, 1), (1, 12, 1), (6, 1, 2)]
)
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


# --- mixing -----------------------------------------------------------------------------------------------------------


SIZES, WEIGHTS = (1500, 7, 401), (0.6, 0.07, 0.333)  # of passes that never end with a block


def mixed(seed=5) -> MixedOrder:
    return MixedOrder(SIZES, WEIGHTS, seed)


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([1], [1000]),
        ([0.7, 0.3], [700, 300]),
        ([1, 1, 1], [334, 333, 333]),
        ([2, 998], [2, 998]),
        ([0.6, 0.07, 0.333], [598, 70, 332]),
    ],
)
def test_shares_of_a_block(weights, shares):
    assert block_shares(weights).tolist() == shares


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")], [1, 0.0009]])
def test_weights_that_are_none(weights):
    with pytest.raises(ValueError, match="weight"):
        block_shares(weights)


def test_every_block_holds_exactly_the_shares_in_an_order_of_its_own():
    index, _ = mixed().clips_at(0, 20 * BLOCK)
    sets = np.searchsorted(np.cumsum(SIZES), index, side="right").reshape(20, BLOCK)
    assert all(np.bincount(block, minlength=3).tolist() == [598, 70, 332] for block in sets)
    assert len({block.tobytes() for block in sets}) == 20
    third = sets[:, : BLOCK // 3] == 0
    assert abs(third.mean() - 0.598) < 0.02, "they are spread, not sorted"


def test_every_clip_once_a_pass_through_its_data_set():
    index, passes = mixed().clips_at(0, 12 * BLOCK)
    first = 0
    for size in SIZES:
        here = (index >= first) & (index < first + size)
        turns = index[here] - first
        whole = len(turns) // size
        assert whole >= 4
        each = turns[: whole * size].reshape(whole, size)
        assert (np.sort(each) == np.arange(size)).all() and len({order.tobytes() for order in each}) > 0.9 * whole
        assert np.array_equal(passes[here], np.arange(len(turns)) // size)
        first += size


@settings(max_examples=50, deadline=None)
@given(first=st.integers(0, 5000), count=st.integers(0, 2500))
def test_any_stretch_of_a_mix_is_a_part_of_the_whole(first, count):
    whole = WHOLE.clips_at(0, 7500)
    for part, values in zip(mixed().clips_at(first, count), whole, strict=True):
        assert np.array_equal(part, values[first : first + count])


WHOLE = mixed()


def test_the_seed_decides_all_of_a_mix():
    ours, again, other = (order.clips_at(3000, 500)[0] for order in (mixed(), mixed(), mixed(6)))
    assert np.array_equal(ours, again) and not np.array_equal(ours, other)
    alike = MixedOrder((100, 100), (1, 1), 0).clips_at(0, 400)[0]
    assert not np.array_equal(alike[alike < 100], alike[alike >= 100] - 100), (
        "data sets of one size have orders of their own"
    )


def test_a_place_far_out_in_a_mix_of_millions_is_found_at_once():
    order = MixedOrder((2_000_000, 281_000, 5), (0.7, 0.298, 0.002), 0)
    index, passes = order.clips_at(10**12, 64)
    assert index.shape == (64,) and index.max() < 2_281_005
    assert passes[index < 2_000_000].min() == 10**9 * 700 // 2_000_000


def test_weighted_draws_come_in_proportion_and_depend_on_the_position_alone():
    weights = np.array([0.0, 1.0, 3.0, 0.0, 4.0])
    order = WeightedOrder(weights, seed=3)
    index, epochs = order.clips_at(0, 80_000)
    shares = np.bincount(index, minlength=5) / len(index)
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.01)  # five standard deviations
    assert shares[0] == shares[3] == 0
    again = np.concatenate([order.clips_at(first, 7)[0] for first in range(0, 70, 7)])
    assert (again == index[:70]).all() and epochs[4] == 0 and epochs[5] == 1
    assert (WeightedOrder(weights, seed=4).clips_at(0, 100)[0] != index[:100]).any()
    for wrong in ([0.0, 0.0], [1.0, -1.0], [1.0, np.nan]):
        with pytest.raises(ValueError, match="weights"):
            WeightedOrder(np.array(wrong), 0)
