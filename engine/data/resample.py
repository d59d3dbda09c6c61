"""Sound of any rate and number of channels as mono int16 at one rate: the only resampler, used by every way in.

It is soxr at its very high quality. NVIDIA DALI's own (`decoders.audio(sample_rate=...)`, `audio_resample`) has no
low-pass filter: of a tone above the new Nyquist frequency it returns the alias at full level (docs/data.md).

Output sample k lies at the time k / target, sample 0 on sample 0 of the source, and a recording of n samples becomes
floor(n * target / source + 1/2). With g = gcd(source, target), every target/g-th output lies exactly on a source
sample. A part of a recording is resampled from such a point on, with `MARGIN` samples to either side that are then
dropped: its samples are those of the whole recording, whatever part was asked for, and no error of a clock adds up
over hours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import soxr

QUALITY = "VHQ"  # a pass band of 91% of the lower Nyquist frequency, and 28 bits: aliases below -150 dB
SOUND_VERSION = 2  # what runs note of the sound that they heard: 1, or nothing, is DALI's resampler
MARGIN = 256  # samples of the lower rate; beyond 160 of them the filter has no weight that float32 holds
FULL_SCALE = 32768.0  # of int16
_CHUNK_S = 16  # seconds that are resampled at a time: a whole number, so that chunks begin on the grid
_INT16 = np.iinfo(np.int16)
_Count = TypeVar("_Count", int, np.ndarray)


def resampled_length(frames: _Count, source: _Count, target: int) -> _Count:
    """Samples at `target` Hz of a recording of `frames` samples at `source` Hz; numbers, or int64 arrays [N]."""
    return (2 * frames * target + source) // (2 * source)


@dataclass(frozen=True)
class Span:
    """Samples `start` to `stop` of a recording at `target` Hz, and the samples `first` to `last` of it at `source` Hz
    that they are computed from. `first` lies on the output sample `origin`.
    """

    source: int
    target: int
    start: int
    stop: int
    first: int
    last: int
    origin: int

    @classmethod
    def of(cls, start: int, stop: int, frames: int, source: int, target: int) -> Span:
        """The span for output samples `start` to `stop` of a recording of `frames` source samples."""
        divisor = math.gcd(source, target)
        margin = -(-MARGIN * target // min(source, target))
        step = max(0, start - margin) * divisor // target
        last = min(frames, -(-(stop + margin) * source // target))
        return cls(source, target, start, stop, step * (source // divisor), last, step * (target // divisor))

    def resample(self, samples: np.ndarray) -> np.ndarray:
        """float32 [stop - start] at `target` Hz of float32 [last - first] at `source` Hz."""
        skip, count = self.start - self.origin, self.stop - self.start
        result = soxr.resample(samples, self.source, self.target, quality=QUALITY)[skip : skip + count]
        if len(result) < count:  # soxr rounds the length in floating point; silence follows the end for it as well
            silence = np.zeros(2 + 2 * self.source // self.target, dtype=np.float32)
            samples = np.concatenate([samples, silence])
            result = soxr.resample(samples, self.source, self.target, quality=QUALITY)[skip : skip + count]
        return result


def to_int16(blocks: Iterable[tuple[int, np.ndarray]], sample_rate: int) -> Iterator[np.ndarray]:
    """Blocks (rate, int16 or float32 [n]) as int16 [n] at `sample_rate` Hz: rounded without dither, saturated, and
    untouched if they are that already.

    The rate may change from block to block, where streams have been chained: each is resampled by itself.
    """
    for rate, group in itertools.groupby(blocks, key=lambda block: block[0]):
        samples = (block for _, block in group)
        yield from map(rounded, samples if rate == sample_rate else _resampled(samples, rate, sample_rate))


def _resampled(blocks: Iterable[np.ndarray], source: int, target: int) -> Iterator[np.ndarray]:
    """A recording in blocks at `source` Hz as chunks float32 at `target` Hz."""
    chunk = _CHUNK_S * target
    span = Span.of(0, chunk, 1 << 62, source, target)
    pending: list[np.ndarray] = []
    first, frames = 0, 0  # the source sample that `pending` begins with, and that it ends before
    for block in blocks:
        pending.append(as_float(block).copy())  # the decoder uses its memory again
        frames += len(block)
        while frames >= span.last:
            samples = np.concatenate(pending)
            yield span.resample(samples[span.first - first : span.last - first])
            span = Span.of(span.stop, span.stop + chunk, 1 << 62, source, target)
            pending, first = [samples[span.first - first :]], span.first
    length = resampled_length(frames, source, target)
    if length > span.start:
        span = Span.of(span.start, length, frames, source, target)
        yield span.resample(np.concatenate(pending)[span.first - first :])


def mean_of_channels(block: np.ndarray) -> np.ndarray:
    """The mean [n] of a block [n, channels]; int16 stays as it is where there is one channel."""
    if block.shape[1] == 1:
        return block[:, 0]
    mean = block[:, 0].copy()
    for channel in range(1, block.shape[1]):  # an order of magnitude faster than a mean over the short axis
        mean += block[:, channel]
    return mean / block.shape[1]


def as_float(samples: np.ndarray) -> np.ndarray:
    """float32 of full scale 1, of int16 or of that."""
    return samples.astype(np.float32) / FULL_SCALE if samples.dtype == np.int16 else samples


def rounded(samples: np.ndarray) -> np.ndarray:
    """int16, rounded to the nearest and saturated, of float32 of full scale 1 or of int16."""
    if samples.dtype == np.int16:
        return samples
    return np.clip(np.rint(samples * FULL_SCALE), _INT16.min, _INT16.max).astype(np.int16)
