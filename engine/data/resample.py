"""Sound at any rate to int16 at another, block by block."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import soxr

QUALITY = "VHQ"  # a pass band of 91% of the lower Nyquist frequency, and 28 bits: aliases below -150 dB
_INT16 = np.iinfo(np.int16)


def to_int16(blocks: Iterable[tuple[int, np.ndarray]], sample_rate: int) -> Iterator[np.ndarray]:
    """Blocks of `decode` as int16 [n] at `sample_rate` Hz: rounded without dither, saturated, and untouched if they are
    that already.

    The rate may change from block to block, where streams have been chained: each is resampled by itself.
    """
    for rate, group in itertools.groupby(blocks, key=lambda block: block[0]):
        samples = (block for _, block in group)
        if rate == sample_rate:
            yield from map(_rounded, samples)
            continue
        resampler = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32", quality=QUALITY)
        for block in samples:
            full_scale = block.astype(np.float32) / -float(_INT16.min) if block.dtype == np.int16 else block
            yield _rounded(resampler.resample_chunk(np.ascontiguousarray(full_scale)))
        yield _rounded(resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True))


def _rounded(samples: np.ndarray) -> np.ndarray:
    if samples.dtype == np.int16:
        return samples
    return np.clip(np.rint(samples * -float(_INT16.min)), _INT16.min, _INT16.max).astype(np.int16)
