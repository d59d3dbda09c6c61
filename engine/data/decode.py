"""From files to windows of sound: NVIDIA DALI reads WAV, FLAC, OGG and Opus, downmixes, resamples, and cuts or pads.

The audio decoder of DALI runs on CPU threads on every machine (there is none for the GPU), so one pipeline serves all.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .check import Clips

if TYPE_CHECKING:
    from nvidia.dali import Pipeline


@dataclass(frozen=True)
class Decoded:
    """`waveform` int16 [B, S], zero past `lengths` int64 [B]; `broken` says for rows that hold nothing why."""

    waveform: np.ndarray
    lengths: np.ndarray
    broken: dict[int, str]


class AudioDecoder:
    """Decodes windows of `num_samples` samples at `sample_rate` Hz out of checked clips.

    A file that has broken since the check costs only itself: DALI gives up a whole batch for it, so the batch is then taken apart.
    """

    def __init__(self, clips: Clips, *, num_samples: int, sample_rate: int, batch_size: int, num_threads: int) -> None:
        self.clips, self.num_samples = clips, num_samples
        self.lengths = -(-clips.frames * sample_rate // clips.sample_rates.astype(np.int64))  # [clips] after resampling, rounded up
        self._build = lambda: _build_pipeline(num_samples, sample_rate, batch_size, num_threads)
        self._pipeline: Pipeline | None = None
        self._readers = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="audio-read")

    def decode(self, index: np.ndarray, start: np.ndarray) -> Decoded:
        """Windows of the clips `index` [B] from the samples `start` [B] on."""
        contents, broken = self._read(index)
        whole = [row for row in range(len(index)) if row not in broken]
        waveform = np.zeros((len(index), self.num_samples), dtype=np.int16)
        try:
            decoded = self._run([contents[row] for row in whole], start[whole]) if whole else []
        except RuntimeError:
            decoded = []
            for row in whole:
                try:
                    decoded += self._run([contents[row]], start[[row]])
                except RuntimeError as error:
                    decoded.append((None, 0))
                    broken[row] = f"broken since it was checked: {_reason(error)}"
        for row, (window, length) in zip(whole, decoded, strict=True):
            if window is None:
                continue
            if length != self.lengths[index[row]]:
                broken[row] = f"broken since it was checked: {length} samples instead of {self.lengths[index[row]]}"
            else:
                waveform[row] = window
        lengths = np.clip(self.lengths[index] - start, 0, self.num_samples)
        lengths[list(broken)] = 0
        return Decoded(waveform, lengths, broken)

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._pipeline = None

    def _read(self, index: np.ndarray) -> tuple[dict[int, np.ndarray], dict[int, str]]:
        def read(clip: int) -> np.ndarray | str:
            try:
                content = np.fromfile(self.clips.paths[clip], dtype=np.uint8)
            except OSError as error:
                return f"cannot be read any more: {error.strerror or error}"
            if content.size != self.clips.sizes[clip]:
                return f"changed since it was checked: {content.size} bytes instead of {self.clips.sizes[clip]}"
            return content

        contents, broken = {}, {}
        for row, content in enumerate(self._readers.map(read, index.tolist())):
            if isinstance(content, str):
                broken[row] = content
            else:
                contents[row] = content
        return contents, broken

    def _run(self, contents: list[np.ndarray], start: np.ndarray) -> list[tuple[np.ndarray, int]]:
        """(window, length of the whole clip) for each; RuntimeError if any cannot be decoded."""
        if self._pipeline is None:
            self._pipeline = self._build()
        try:
            self._pipeline.feed_input("encoded", contents)
            self._pipeline.feed_input("start", list(start.astype(np.int32)[:, None]))
            windows, shapes = self._pipeline.run()
            windows, lengths = windows.as_array(), shapes.as_array()[:, 0]
            return [(window, int(length)) for window, length in zip(windows, lengths, strict=True)]
        except RuntimeError:
            self._pipeline = None  # DALI: "Current pipeline object is no longer valid"
            raise


def _build_pipeline(num_samples: int, sample_rate: int, batch_size: int, num_threads: int) -> Pipeline:
    from nvidia.dali import fn, pipeline_def, types  # steps that are fed from memory do without

    @pipeline_def(batch_size=batch_size, num_threads=num_threads, device_id=None, exec_pipelined=False, exec_async=False)
    def windows() -> tuple:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
        audio, _ = fn.decoders.audio(encoded, dtype=types.INT16, downmix=True, sample_rate=sample_rate)
        window = fn.slice(audio, start, [num_samples], axes=[0], out_of_bounds_policy="pad", fill_values=0)
        return window, audio.shape()

    pipeline = windows()
    pipeline.build()
    return pipeline


def _reason(error: RuntimeError) -> str:
    """The line of DALI's message that says what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith("Error") and "operator" not in line]
    return (telling or lines or ["unknown error"])[0]
