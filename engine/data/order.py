"""Which clip is read when, and where it is cut: functions of (seed, position) alone.

Positions count clips from the start of training, across epochs. Unweighted, position p is place p mod n of epoch p div
n, and every epoch is a permutation of its own, so each clip comes exactly once an epoch however batches fall. With
weights, every block of 1000 positions holds exactly the fraction of each data set, and each data set goes through its
clips by permutations of its own. Nothing here knows of ranks or workers; a run's place in the data is one number.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch

from ssast.engine.mixture import BLOCK, block_shares
from ssast.engine.random_streams import Stream, key_of
from ssast.kernels.random import below, philox


class SampleOrder:
    """The order of `num_clips` clips under `seed`."""

    def __init__(self, num_clips: int, seed: int) -> None:
        if num_clips < 1:
            raise ValueError("an order needs at least one clip")
        self.num_clips, self.seed = num_clips, seed
        self._passes = _Passes(num_clips, seed)

    def clips_at(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(clip index [count], epoch [count]) at positions first ... first + count - 1."""
        return self._passes.at(np.arange(first, first + count, dtype=np.int64))

    def crop_starts(self, index: np.ndarray, epochs: np.ndarray, lengths: np.ndarray, window: int) -> np.ndarray:
        """First sample of a random window in clips of these lengths (int64 [B], all in samples); 0 where the clip is
        not longer.
        """
        clip, epoch = torch.from_numpy(index), torch.from_numpy(epochs)
        zero = torch.zeros_like(clip)
        word = philox(self.seed, clip & 0xFFFFFFFF, clip >> 32, epoch, zero + Stream.CROP)[0]
        return below(word, torch.from_numpy(np.maximum(lengths - window, 0)) + 1).numpy()


class MixedOrder(SampleOrder):
    """Data sets of `sizes` clips, numbered one after the other, mixed by `weights`; an epoch here is a pass through one
    data set.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        if min(sizes) < 1 or len(sizes) != len(weights):
            raise ValueError("each weight needs a data set of at least one clip")
        super().__init__(sum(sizes), seed)
        self.counts = block_shares(weights)
        self._first = np.cumsum([0, *sizes[:-1]])
        self._sets = [_Passes(size, seed, Stream.ORDER_SET + number) for number, size in enumerate(sizes)]

    def clips_at(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(clips int64 [count], passes int64 [count] over the clip's data set) of the positions from `first` on."""
        blocks, places = np.divmod(np.arange(first, first + count, dtype=np.int64), BLOCK)
        data_set, turn = np.empty_like(blocks), np.empty_like(blocks)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            sets, turns = _block(tuple(self.counts.tolist()), self.seed, block)
            data_set[here], turn[here] = sets[places[here]], turns[places[here]]
        turn += blocks * self.counts[data_set]
        clip, passes = np.empty_like(blocks), np.empty_like(blocks)
        for number in np.unique(data_set).tolist():
            here = data_set == number
            clip[here], passes[here] = self._sets[number].at(turn[here])
        return clip + self._first[data_set], passes


class WeightedOrder(SampleOrder):
    """Clips drawn with replacement, each in proportion to its weight; an epoch here is as many draws as there are
    clips.
    """

    def __init__(self, weights: np.ndarray, seed: int) -> None:
        """`weights`: [N], none negative, not all zero."""
        super().__init__(len(weights), seed)
        total = np.cumsum(weights, dtype=np.float64)
        if not np.isfinite(total[-1]) or total[-1] <= 0 or np.min(weights) < 0:
            raise ValueError("weights must be numbers of at least 0, not all of them 0")
        self._edges = total / total[-1]

    def clips_at(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(clips int64 [count], epochs int64 [count]) of the positions from `first` on."""
        place = torch.arange(first, first + count, dtype=torch.int64)
        zero = torch.zeros_like(place)
        high, low, *_ = philox(self.seed, place & 0xFFFFFFFF, place >> 32, zero, zero + Stream.DRAW)
        fraction = (high.numpy().astype(np.float64) * 2.0**32 + low.numpy()) * 2.0**-64
        # Rounding may take a fraction to 1, beyond the last clip
        index = np.minimum(np.searchsorted(self._edges, fraction, side="right"), self.num_clips - 1)
        return index, place.numpy() // self.num_clips


class _Passes:
    """Goes through `num_clips` clips again and again, in another order each time."""

    def __init__(self, num_clips: int, seed: int, stream: int = Stream.ORDER) -> None:
        self._num_clips = num_clips
        # two, since a batch may end one pass and begin the next; of many small ones none is worth keeping
        self._permutation = functools.lru_cache(maxsize=2)(
            lambda number: _generator(seed, number, stream).permutation(num_clips)
        )

    def at(self, turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(clip, pass) at turns int64 [B], counted from the start of training."""
        passes, places = np.divmod(turns, self._num_clips)
        index = np.empty_like(places)
        for number in np.unique(passes).tolist():
            here = passes == number
            index[here] = self._permutation(number)[places[here]]
        return index, passes


@functools.lru_cache(maxsize=16)
def _block(counts: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(data set, how many of its positions come before in the block) at each place of a block, int64 [1000]."""
    sets = _generator(seed, block, Stream.ORDER_BLOCK).permutation(np.repeat(np.arange(len(counts)), counts))
    turns = np.empty_like(sets)
    for number, count in enumerate(counts):
        turns[sets == number] = np.arange(count)
    return sets, turns


def _generator(seed: int, number: int, stream: int) -> np.random.Generator:
    """Streams lie above the seeds, which have 32 bits."""
    return np.random.Generator(np.random.Philox(key=[key_of(seed, stream), number]))
