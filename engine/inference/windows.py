"""How a model's windows lie on a recording of any length, and what of a recording is in each.

A window is what the model was built for: `input_frames` rows of features. A shorter clip is padded, as in training; a
longer one is cut into windows that overlap, the last of which ends with the clip.

Words: a frame is a row of features, 10 ms apart; a step is a column of patches, `stride[1]` frames apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ssast.engine.model.ssast import SSAST
from ssast.kernels.fbank import count_frames, frame_geometry, samples_of


@dataclass(frozen=True)
class Windows:
    """How a model's windows lie on a recording: `frames` long, every `hop` frames, the last moved back to a multiple of
    `align`.
    """

    sample_rate: int
    frames: int
    hop: int
    align: int

    @staticmethod
    def of(model: SSAST, hop: float | None, align: int, most: int) -> Windows:
        """`hop` in seconds, rounded down to a multiple of `align` frames, and `most` frames at most; None: half a
        window.

        Raises:
            ValueError: no such hop.
        """
        rate = model.card.sample_rate
        shift = frame_geometry(rate)[1]
        hop_frames = most / 2 if hop is None else hop * rate / shift
        if not 0 < hop_frames <= most:
            raise ValueError(f"hop must be more than 0 and at most a window of {most * shift / rate:g} s, not {hop:g}")
        return Windows(rate, model.config.input_frames, max(int(hop_frames / align + 1e-6), 1) * align, align)

    @property
    def shift(self) -> int:
        """Samples from frame to frame."""
        return frame_geometry(self.sample_rate)[1]

    @property
    def samples(self) -> int:
        """S of a whole window."""
        return samples_of(self.frames, self.sample_rate)

    def seconds(self, frame: int) -> float:
        """Where a frame begins."""
        return frame * self.shift / self.sample_rate

    def cut(self, blocks: Iterable[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        """A recording that comes in blocks [n] as (first frame, samples [S]); holds little more than a window and a
        block of it.

        Raises:
            ValueError: at the end, if there was not one whole frame.
        """
        # `samples` begin at the frame `origin`, and the next window at `start`.
        samples, origin, start = (
            np.zeros(0, dtype=np.int16),
            0,
            0,
        )
        for block in blocks:
            samples = np.concatenate((samples, block)) if len(samples) else block.copy()
            while len(samples) >= (start - origin) * self.shift + self.samples:
                samples = samples[(start - origin) * self.shift :]
                yield start, samples[: self.samples]
                origin, start = start, start + self.hop
        whole = count_frames(len(samples), self.sample_rate)
        if not whole:
            raise ValueError(
                f"too short: {len(samples)} samples at {self.sample_rate} Hz, one frame of 25 ms needs "
                f"{frame_geometry(self.sample_rate)[0]}"
            )
        if start == 0:
            yield 0, samples
        elif whole > self.frames:
            moved = -(-(origin + whole - self.frames) // self.align) * self.align
            yield moved, samples[(moved - origin) * self.shift :][: self.samples]


@dataclass(frozen=True)
class Window:
    """A window of the recording `clip`; `frames` of its rows are sound."""

    clip: int
    start: int  # in frames
    frames: int
    samples: np.ndarray


@dataclass(frozen=True)
class End:
    """All windows of `clip`, which has so many `samples`, have come. `error`: why there are no more, "" if it ended as
    it should.
    """

    clip: int
    samples: int
    error: str = ""


def read_windows(clip: int, blocks: Iterable[np.ndarray], windows: Windows) -> Iterator[Window | End]:
    """A recording's windows, and its end. What makes it unusable, a ValueError of `blocks` or of cutting them, becomes
    the end's error.
    """
    samples = 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal samples
        for block in blocks:
            samples += len(block)
            yield block

    try:
        for start, part in windows.cut(counted()):
            yield Window(clip, start, count_frames(len(part), windows.sample_rate), part)
    except ValueError as error:
        yield End(clip, samples, str(error))
    else:
        yield End(clip, samples)


def embedding_windows(model: SSAST, hop: float | None) -> Windows:
    """Windows whose steps fall on one another."""
    stride = model.config.stride[1]
    return Windows.of(model, hop, align=stride, most=model.config.grid[1] * stride)


def prediction_windows(model: SSAST, hop: float | None) -> Windows:
    """Windows for a classifier, which may begin at any frame."""
    return Windows.of(model, hop, align=1, most=model.config.input_frames)


def seconds_per_step(model: SSAST) -> float:
    """Time from one column of patches to the next."""
    rate = model.card.sample_rate
    return model.config.stride[1] * frame_geometry(rate)[1] / rate
