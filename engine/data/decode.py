"""From files and shards to windows of sound: samples that lie there as int16 are read straight into the batch, all else
by NVIDIA DALI.

DALI decodes WAV, FLAC, OGG and Opus, downmixes, resamples, and cuts or pads, on CPU threads on every machine: it has no
audio decoder for the GPU.
"""

from __future__ import annotations

import contextlib
import os
import resource
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from .clips import Clips

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

HEADER_BYTES = 44


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
        # [clips] after resampling, rounded up
        self.lengths = -(-clips.frames * sample_rate // clips.sample_rates.astype(np.int64))
        # Of these sizes a clip may be the WAV header and the samples as they are wanted, and nothing else.
        bare = clips.sizes == HEADER_BYTES + 2 * clips.frames
        self._maybe_bare = bare & (clips.channels == 1) & (clips.sample_rates == sample_rate)
        self._build = lambda: _build_pipeline(num_samples, sample_rate, batch_size, num_threads)
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
        index, start, waveform = pending.index, pending.start, pending.waveform
        contents = dict(enumerate(content for read in pending.reads for content in read.result()))
        broken = {row: content for row, content in contents.items() if isinstance(content, str)}
        encoded = {row: content for row, content in contents.items() if isinstance(content, np.ndarray)}
        for row, window, length in self._decoded(encoded, start, broken):
            if length != self.lengths[index[row]]:
                broken[row] = f"broken since it was checked: {length} samples instead of {self.lengths[index[row]]}"
            else:
                waveform[row] = window
        lengths = np.clip(self.lengths[index] - start, 0, self.num_samples)
        rows = list(broken)
        lengths[rows], waveform[rows] = 0, 0
        return Decoded(waveform, lengths, {row: broken[row] + self._place(index[row]) for row in sorted(rows)})

    def close(self) -> None:
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._files.close()
        self._pipeline = None

    def _place(self, clip: int) -> str:
        offset = self.clips.offsets[clip]
        return f" (byte {offset} of {self.clips.paths[clip]})" if offset else ""

    def _read(self, index: np.ndarray, start: np.ndarray, windows: np.ndarray) -> list[np.ndarray | str | None]:
        return [self._read_clip(*row) for row in zip(index.tolist(), start.tolist(), windows, strict=True)]

    def _read_clip(self, clip: int, start: int, window: np.ndarray) -> np.ndarray | str | None:
        clips = self.clips
        offset, size = int(clips.offsets[clip]), int(clips.sizes[clip])
        try:
            with self._files.opened(clip) as file:
                found = size if offset else os.fstat(file).st_size
                if found != size:
                    return f"changed since it was checked: {found} bytes instead of {size}"
                if self._maybe_bare[clip] and self._read_bare(file, clip, start, window):
                    return None
                content = np.empty(size, dtype=np.uint8)
                got = _read_into(file, content, offset)
        except OSError as error:
            return f"cannot be read any more: {error.strerror or error}"
        return content if got == size else f"changed since it was checked: {got} bytes instead of {size}"

    def _read_bare(self, file: int, clip: int, start: int, window: np.ndarray) -> bool:
        """Read a window of samples that follow the header of 44 bytes into its place; False if there is another
        header.
        """
        frames, offset = int(self.clips.frames[clip]), int(self.clips.offsets[clip])
        header = bytearray(HEADER_BYTES)
        if _read_into(file, header, offset) < HEADER_BYTES or header != wav_header(
            frames, int(self.clips.sample_rates[clip])
        ):
            return False
        count = min(max(frames - start, 0), len(window))
        window[count:] = 0
        if _read_into(file, window[:count].view(np.uint8), offset + HEADER_BYTES + 2 * start) < 2 * count:
            raise OSError(0, "ends too early")
        return True

    def _decoded(
        self, encoded: dict[int, np.ndarray], start: np.ndarray, broken: dict[int, str]
    ) -> Iterator[tuple[int, np.ndarray, int]]:
        """(row, window, length of the whole clip) of all that DALI can decode; why it cannot do the others goes to
        `broken`.
        """
        if not encoded:
            return
        rows = list(encoded)
        try:
            yield from zip(rows, *self._run(list(encoded.values()), start[rows]), strict=True)
        except RuntimeError:
            for row in rows:
                try:
                    windows, lengths = self._run([encoded[row]], start[[row]])
                except RuntimeError as error:
                    broken[row] = f"broken since it was checked: {_reason(error)}"
                else:
                    yield row, windows[0], lengths[0]

    def _run(self, contents: list[np.ndarray], start: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """(windows, lengths of the whole clips), until the next call; RuntimeError if any cannot be decoded."""
        if self._pipeline is None:
            self._pipeline = self._build()
        try:
            self._pipeline.feed_input("encoded", contents)
            self._pipeline.feed_input("start", list(start.astype(np.int32)[:, None]))
            windows, shapes = self._pipeline.run()
            return windows.as_array(), shapes.as_array()[:, 0].tolist()
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


def wav_header(frames: int, sample_rate: int) -> bytes:
    """The 44 bytes before `frames` mono int16 samples: RIFF, fmt of 16 bytes, data; nothing else says the same in
    fewer.
    """
    data = 2 * frames
    return struct.pack(
        "<4sI8sIHHIIHH4sI",
        b"RIFF",
        36 + data,
        b"WAVEfmt ",
        16,
        1,
        1,
        sample_rate,
        2 * sample_rate,
        2,
        16,
        b"data",
        data,
    )


def _read_into(file: int, buffer: np.ndarray | bytearray, offset: int) -> int:
    """Bytes read at `offset`: fewer than the buffer holds only at the end of the file. One call reads no more than 2
    GiB.
    """
    view, done = memoryview(buffer), 0
    while done < len(view) and (got := os.preadv(file, [view[done:]], offset + done)):
        done += got
    return done


def _build_pipeline(num_samples: int, sample_rate: int, batch_size: int, num_threads: int) -> Pipeline:
    from nvidia.dali import fn, pipeline_def, types  # steps that are fed from memory do without

    @pipeline_def(
        batch_size=batch_size, num_threads=num_threads, device_id=None, exec_pipelined=False, exec_async=False
    )
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
