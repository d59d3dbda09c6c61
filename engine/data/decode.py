"""From files and shards to windows of sound, on CPU threads.

Samples that lie there as they are wanted are read straight into the batch. Other files of the wanted sample rate are
decoded, downmixed, cut and padded by NVIDIA DALI, which has no audio decoder for the GPU. Files of other rates are
decoded by libsndfile, of long ones the part that a window needs, and resampled (resample.py): DALI's own resampler
aliases.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import soundfile
import torch

from .clips import Clips
from .resample import Span, as_float, mean_of_channels, resampled_length, rounded
from .wav import HEADER_BYTES, wav_header

if TYPE_CHECKING:
    from nvidia.dali import Pipeline
    from nvidia.dali.tensors import TensorListCPU

_BLOCK = 1 << 18  # samples of all channels that are decoded at a time


@dataclass(frozen=True)
class Decoded:
    """`waveform` int16 [B, S], zero past `lengths` int64 [B]; `broken` says for rows that hold nothing why."""

    waveform: np.ndarray
    lengths: np.ndarray
    broken: dict[int, str]


@dataclass(frozen=True)
class Pending:
    """A batch that is being read: of each row the bytes to decode, None where the window is in place, or a str of why
    it is broken.
    """

    index: np.ndarray
    start: np.ndarray
    waveform: np.ndarray
    reads: list[Future[list[np.ndarray | str | None]]]


class AudioDecoder:
    """Decodes windows of `num_samples` samples at `sample_rate` Hz out of checked clips.

    A clip that has broken since the check costs only itself: DALI gives up a whole batch for it, so the batch is then
    taken apart. `finish` and `decode` are for one thread at a time.
    With `pin_memory` the windows lie in page-locked memory, from where a GPU can fetch them by itself.
    """

    def __init__(
        self,
        clips: Clips,
        *,
        num_samples: int,
        sample_rate: int,
        batch_size: int,
        num_threads: int,
        pin_memory: bool = False,
    ) -> None:
        self.clips, self.num_samples, self.num_threads, self.pin_memory = clips, num_samples, num_threads, pin_memory
        self.sample_rate = sample_rate
        self.lengths = resampled_length(clips.frames, clips.sample_rates.astype(np.int64), sample_rate)  # [clips]
        # Of these sizes a clip may be the WAV header and mono int16 samples, and nothing else.
        self._maybe_bare = (clips.sizes == HEADER_BYTES + 2 * clips.frames) & (clips.channels == 1)
        self._build = lambda: _build_pipeline(num_samples, batch_size, num_threads)
        self._pipeline: Pipeline | None = None
        self._files = _Files(clips)
        self._readers = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="audio-read")

    def decode(self, index: np.ndarray, start: np.ndarray) -> Decoded:
        """Windows of the clips `index` [B] from the samples `start` [B] on."""
        return self.finish(self.begin(index, start))

    def begin(self, index: np.ndarray, start: np.ndarray) -> Pending:
        """Start reading what `finish` turns into windows; meanwhile another batch may be finished."""
        shape = (len(index), self.num_samples)
        waveform = torch.empty(shape, dtype=torch.int16, pin_memory=self.pin_memory).numpy()
        parts = np.array_split(np.arange(len(index)), min(self.num_threads, len(index)))
        reads = [
            self._readers.submit(self._read, index[part], start[part], waveform[part[0] : part[-1] + 1])
            for part in parts
        ]
        return Pending(index, start, waveform, reads)

    def finish(self, pending: Pending) -> Decoded:
        """The windows that `begin` began to read, once they are there."""
        index, start, waveform = pending.index, pending.start, pending.waveform
        contents = dict(enumerate(content for read in pending.reads for content in read.result()))
        broken = {row: content for row, content in contents.items() if isinstance(content, str)}
        encoded = {row: content for row, content in contents.items() if isinstance(content, np.ndarray)}
        for row, window, length, rate in self._decoded(encoded, start, broken):
            problem = self._changed(index[row], length, rate)
            if problem:
                broken[row] = problem
            else:
                waveform[row] = window
        lengths = np.clip(self.lengths[index] - start, 0, self.num_samples)
        rows = list(broken)
        lengths[rows], waveform[rows] = 0, 0
        return Decoded(waveform, lengths, {row: broken[row] + self._place(index[row]) for row in sorted(rows)})

    def close(self) -> None:
        """End the threads, close the files and free the pipeline."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._files.close()
        self._pipeline = None

    def _changed(self, clip: int, frames: int, rate: int) -> str:
        """What is wrong with a clip that has `frames` samples at `rate` Hz now, "" if nothing is."""
        before, rate_before = self.clips.frames[clip], self.clips.sample_rates[clip]
        if rate != rate_before:
            return f"broken since it was checked: {rate} Hz instead of {rate_before}"
        return "" if frames == before else f"broken since it was checked: {frames} samples instead of {before}"

    def _place(self, clip: int) -> str:
        offset = self.clips.offsets[clip]
        return f" (byte {offset} of {self.clips.paths[clip]})" if offset else ""

    def _read(self, index: np.ndarray, start: np.ndarray, windows: np.ndarray) -> list[np.ndarray | str | None]:
        return [self._read_clip(*row) for row in zip(index.tolist(), start.tolist(), windows, strict=True)]

    def _read_clip(self, clip: int, start: int, window: np.ndarray) -> np.ndarray | str | None:
        clips = self.clips
        offset, size = int(clips.offsets[clip]), int(clips.sizes[clip])
        is_resampled = clips.sample_rates[clip] != self.sample_rate
        try:
            with self._files.opened(clip) as file:
                there = size if offset else os.fstat(file).st_size
                if there != size:
                    return f"changed since it was checked: {there} bytes instead of {size}"
                if self._maybe_bare[clip] and self._is_bare(file, clip):
                    if is_resampled:
                        self._resample(clip, start, window, lambda first, last: self._bare(file, clip, first, last))
                    else:
                        self._read_bare(file, clip, start, window)
                    return None
                if is_resampled and not offset:
                    return self._read_resampled(file, clip, start, window)
                content = np.empty(size, dtype=np.uint8)
                num_bytes = _read_into(file, content.data, offset)
        except OSError as error:
            return f"cannot be read any more: {error.strerror or error}"
        if num_bytes != size:
            return f"changed since it was checked: {num_bytes} bytes instead of {size}"
        return self._read_resampled(io.BytesIO(content.data), clip, start, window) if is_resampled else content

    def _is_bare(self, file: int, clip: int) -> bool:
        """Whether a clip begins with the header of 44 bytes that says what is known of it."""
        header = bytearray(HEADER_BYTES)
        expected = wav_header(int(self.clips.frames[clip]), int(self.clips.sample_rates[clip]))
        return _read_into(file, header, int(self.clips.offsets[clip])) == HEADER_BYTES and header == expected

    def _read_bare(self, file: int, clip: int, start: int, window: np.ndarray) -> None:
        """Read a window of the samples that follow the header of 44 bytes into its place."""
        count = min(max(int(self.clips.frames[clip]) - start, 0), len(window))
        window[count:] = 0
        _read_samples(file, window[:count], int(self.clips.offsets[clip]) + HEADER_BYTES + 2 * start)

    def _bare(self, file: int, clip: int, first: int, last: int) -> np.ndarray:
        """Samples `first` to `last` that follow the header of 44 bytes, float32."""
        samples = np.empty(last - first, dtype=np.int16)
        _read_samples(file, samples, int(self.clips.offsets[clip]) + HEADER_BYTES + 2 * first)
        return as_float(samples)

    def _read_resampled(self, file: int | io.BytesIO, clip: int, start: int, window: np.ndarray) -> str | None:
        """Decode and resample a window into its place; a str of why that is not possible."""
        try:
            with soundfile.SoundFile(file, closefd=False) as sound:
                expected, actual = (
                    (self.clips.frames[clip], self.clips.sample_rates[clip]),
                    (sound.frames, sound.samplerate),
                )
                if actual != expected:
                    return (
                        f"broken since it was checked: {actual[0]} samples at {actual[1]} Hz instead of {expected[0]}"
                    )
                self._resample(clip, start, window, lambda first, last: _decode_span(sound, first, last))
        except soundfile.LibsndfileError as error:
            return f"broken since it was checked: {error.error_string.rstrip('.')}"
        except EOFError as error:
            return f"broken since it was checked: {error}"
        return None

    def _resample(
        self, clip: int, start: int, window: np.ndarray, samples_between: Callable[[int, int], np.ndarray]
    ) -> None:
        """Put a window of a clip into its place that is resampled from what `samples_between` returns of it."""
        count = min(max(int(self.lengths[clip]) - start, 0), len(window))
        window[count:] = 0
        if count:
            frames, rate = int(self.clips.frames[clip]), int(self.clips.sample_rates[clip])
            span = Span.of(start, start + count, frames, rate, self.sample_rate)
            window[:count] = rounded(span.resample(samples_between(span.first, span.last)))

    def _decoded(
        self, encoded: dict[int, np.ndarray], start: np.ndarray, broken: dict[int, str]
    ) -> Iterator[tuple[int, np.ndarray, int, int]]:
        """(row, window, samples of the whole clip, its rate in Hz) of all that DALI can decode; why it cannot do the
        others goes to `broken`.
        """
        if not encoded:
            return
        rows = list(encoded)
        try:
            yield from zip(rows, *self._run(list(encoded.values()), start[rows]), strict=True)
        except RuntimeError:
            for row in rows:
                try:
                    windows, lengths, rates = self._run([encoded[row]], start[[row]])
                except RuntimeError as error:
                    broken[row] = f"broken since it was checked: {_reason(error)}"
                else:
                    yield row, windows[0], lengths[0], rates[0]

    def _run(self, contents: list[np.ndarray], start: np.ndarray) -> tuple[np.ndarray, list[int], list[int]]:
        """(windows, samples of the whole clips, their rates in Hz), valid until the next call.

        Raises:
            RuntimeError: any cannot be decoded.
        """
        if self._pipeline is None:
            self._pipeline = self._build()
        try:
            self._pipeline.feed_input("encoded", contents)
            self._pipeline.feed_input("start", list(start.astype(np.int32)[:, None]))
            windows, shapes, rates = cast("tuple[TensorListCPU, ...]", self._pipeline.run())  # it has no GPU
            return (
                windows.as_array(),
                shapes.as_array()[:, 0].tolist(),
                rates.as_array().astype(np.int64).ravel().tolist(),
            )
        except RuntimeError:
            self._pipeline = None  # DALI: "Current pipeline object is no longer valid"
            raise


class _Files:
    """Handles to read from. Shards stay open, up to a quarter of the files that this process may have open; what is
    beyond that, and plain files, are opened for each read.
    """

    def __init__(self, clips: Clips) -> None:
        self._clips, self._in_shard = clips, clips.in_shards
        self._kept: dict[int, int] = {}
        self._limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def opened(self, clip: int) -> Iterator[int]:
        file = self._shard(clip) if self._in_shard[clip] else None
        if file is not None:
            yield file
            return
        file = os.open(self._clips.paths[clip], os.O_RDONLY)
        try:
            yield file
        finally:
            os.close(file)

    def _shard(self, clip: int) -> int | None:
        row = int(self._clips.paths.rows[clip])
        file = self._kept.get(row)
        if file is not None or len(self._kept) >= self._limit:
            return file
        with self._lock:  # another thread may have opened it meanwhile, or the last that may stay open
            if row not in self._kept and len(self._kept) < self._limit:
                self._kept[row] = os.open(self._clips.paths[clip], os.O_RDONLY)
            return self._kept.get(row)

    def close(self) -> None:
        for file in self._kept.values():
            os.close(file)
        self._kept.clear()


def _decode_span(sound: soundfile.SoundFile, first: int, last: int) -> np.ndarray:
    """Samples `first` to `last` of a file, the mean of its channels, float32 of full scale 1.

    Opus is decoded from its beginning: what its decoder returns after a jump depends on what it has decoded before.

    Raises:
        EOFError: it ends before them.
    """
    at = 0 if sound.subtype == "OPUS" else sound.seek(first)
    block = np.empty((max(1, _BLOCK // sound.channels), sound.channels), dtype=np.float32)
    samples = np.empty(last - first, dtype=np.float32)
    while at < last:
        count = sound.buffer_read_into(block[: last - at], "float32")
        if not count:
            raise EOFError(f"{at} samples can be decoded, not {last}")
        if at + count > first:
            samples[max(at - first, 0) : at + count - first] = mean_of_channels(block[max(first - at, 0) : count])
        at += count
    return samples


def _read_into(file: int, buffer: memoryview | bytearray, offset: int) -> int:
    """Bytes read at `offset`: fewer than the buffer holds only at the end of the file. One call reads no more than 2
    GiB.
    """
    view, done = memoryview(buffer), 0
    while done < len(view) and (count := os.preadv(file, [view[done:]], offset + done)):
        done += count
    return done


def _read_samples(file: int, samples: np.ndarray, offset: int) -> None:
    """Fill int16 [n] from the bytes at `offset`. Raises `OSError` where the file ends before."""
    if _read_into(file, samples.view(np.uint8).data, offset) < samples.nbytes:
        raise OSError(0, "ends too early")


def _build_pipeline(num_samples: int, batch_size: int, num_threads: int) -> Pipeline:
    from nvidia.dali import fn, pipeline_def, types  # steps that are fed from memory do without

    @pipeline_def(  # type: ignore[call-overload] # device_id None, for no GPU at all, is documented but not in the stub
        batch_size=batch_size, num_threads=num_threads, device_id=None, exec_pipelined=False, exec_async=False
    )
    def windows() -> tuple:
        encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1, no_copy=True)
        start = fn.external_source(name="start", dtype=types.DALIDataType.INT32, ndim=1)
        audio, rate = fn.decoders.audio(encoded, dtype=types.DALIDataType.INT16, downmix=True)
        window = fn.slice(audio, start, [num_samples], axes=[0], out_of_bounds_policy="pad", fill_values=0)
        return window, audio.shape(), rate

    pipeline = windows()
    pipeline.build()
    return pipeline


def _reason(error: RuntimeError) -> str:
    """The line of DALI's message that says what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith("Error") and "operator" not in line]
    return (telling or lines or ["unknown error"])[0]
