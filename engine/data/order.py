"""Which clip is read when, and where it is cut: functions of (seed, position) alone.

Positions count clips from the start of training, across epochs: position p is place p mod n of epoch p div n, and every epoch is a
permutation of its own, so each clip comes exactly once an epoch however batches fall. Nothing here knows of ranks or workers; a run's
place in the data is one number.
"""

import functools

import numpy as np
import torch

from ssast.kernels.random import below, philox

_STREAM_CROP = 0x63726F70  # any constant that no other use of the seed shares


class SampleOrder:
    """The order of `num_clips` clips under `seed`."""

    def __init__(self, num_clips: int, seed: int) -> None:
        if num_clips < 1:
            raise ValueError("an order needs at least one clip")
        self.num_clips, self.seed = num_clips, seed

    def clips_at(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(clip index [count], epoch [count]) at positions first ... first + count - 1."""
        epochs, places = np.divmod(np.arange(first, first + count, dtype=np.int64), self.num_clips)
        index = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            index[here] = _permutation(self.num_clips, self.seed, int(epoch))[places[here]]
        return index, epochs

    def crop_starts(self, index: np.ndarray, epochs: np.ndarray, lengths: np.ndarray, window: int) -> np.ndarray:
        """First sample of a random window in clips of these lengths (int64 [B], all in samples); 0 where the clip is not longer."""
        clip, epoch = torch.from_numpy(index), torch.from_numpy(epochs)
        zero = torch.zeros_like(clip)
        word = philox(self.seed, clip & 0xFFFFFFFF, clip >> 32, epoch, zero + _STREAM_CROP)[0]
        return below(word, torch.from_numpy(np.maximum(lengths - window, 0)) + 1).numpy()


@functools.lru_cache(maxsize=4)
def _permutation(num_clips: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_clips)
