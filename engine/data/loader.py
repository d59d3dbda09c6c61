"""Batches for one rank, decoded ahead of the step in a thread of their own."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ssast.engine.errors import UserError

from .decode import AudioDecoder, Pending
from .order import SampleOrder


@dataclass(frozen=True)
class Batch:
    """A micro-batch on the device of the step."""

    waveform: torch.Tensor
    """[B, S] int16."""
    lengths: torch.Tensor
    """[B] int64, samples that are sound; the rest is padding."""
    position: int
    """Of the first clip in the order of training (or of validation); clip b stands at position + b."""
    clips: torch.Tensor
    """[B] int64, the number of each clip in its data set: after replacement, of the one that was read."""


@dataclass(frozen=True)
class BadClip:
    """A clip that could not be read any more, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Shard:
    """One rank's share. Micro-batches are dealt out in turn, so `world_size` ranks, or as many accumulation steps on
    one rank, see the same clips in the same optimizer step.
    """

    rank: int
    world_size: int
    micro_batch: int

    def position(self, micro_step: int) -> int:
        """Where in the order the micro-batch number `micro_step` of this rank begins."""
        return (micro_step * self.world_size + self.rank) * self.micro_batch


@dataclass(frozen=True)
class PendingBatch:
    """A batch that is being read."""

    position: int
    epochs: np.ndarray
    pending: Pending


class ClipReader:
    """Whole batches at positions of an order, with clips that break on the way replaced.

    The replacement of a clip is the next one by number that can be read, whatever rank or batch it falls in, so a
    broken file neither stops the run nor changes what any other clip of the batch contributes.
    """

    def __init__(
        self,
        decoder: AudioDecoder,
        order: SampleOrder | None,
        *,
        random_crop: bool = False,
        max_bad_fraction: float = 1.0,
        on_bad: Callable[[BadClip], None] = lambda bad: None,
    ) -> None:
        self.decoder, self.order, self.random_crop = decoder, order, random_crop
        self.max_bad_fraction, self.on_bad = max_bad_fraction, on_bad
        self.bad: dict[int, BadClip] = {}

    def read(self, position: int, count: int) -> Batch:
        """`count` clips from `position` on; without an order, clip number = position.

        Raises:
            UserError: more clips have broken than `max_bad_fraction` allows.
        """
        return self.finish(self.begin(position, count))

    def begin(self, position: int, count: int) -> PendingBatch:
        """Start reading what `finish` turns into a batch; meanwhile another may be finished."""
        if self.order is None:
            index, epochs = np.arange(position, position + count), np.zeros(count, dtype=np.int64)
        else:
            index, epochs = self.order.clips_at(position, count)
        return PendingBatch(position, epochs, self._begin(index, epochs))

    def finish(self, batch: PendingBatch) -> Batch:
        """As `read`."""
        pending = batch.pending
        while True:
            decoded = self.decoder.finish(pending)
            if not decoded.broken:
                arrays = (decoded.waveform, decoded.lengths, pending.index)
                waveform, lengths, clips = (torch.from_numpy(array) for array in arrays)
                return Batch(waveform, lengths, batch.position, clips)
            for row, reason in decoded.broken.items():
                self._record(int(pending.index[row]), reason)
            pending = self._begin(pending.index, batch.epochs)

    def _begin(self, index: np.ndarray, epochs: np.ndarray) -> Pending:
        index = np.array([self._readable(clip) for clip in index.tolist()])
        return self.decoder.begin(index, self._starts(index, epochs))

    def _starts(self, index: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        if not self.random_crop or self.order is None:
            return np.zeros(len(index), dtype=np.int64)
        return self.order.crop_starts(index, epochs, self.decoder.lengths[index], self.decoder.num_samples)

    def _readable(self, clip: int) -> int:
        while clip in self.bad:
            clip = (clip + 1) % len(self.decoder.clips)
        return clip

    def _record(self, clip: int, reason: str) -> None:
        if clip in self.bad:
            return
        self.bad[clip] = BadClip(self.decoder.clips.sources[clip], reason)
        self.on_bad(self.bad[clip])
        allowed = self.max_bad_fraction * len(self.decoder.clips)
        if len(self.bad) > max(allowed, 1) or len(self.bad) == len(self.decoder.clips):
            raise UserError(
                f"{len(self.bad)} of {len(self.decoder.clips)} clips have become unreadable since they were checked, "
                "the last one "
                f"{self.bad[clip].path} ({reason}); skipped.csv in the run folder lists them "
                f"(data.max_bad_fraction={self.max_bad_fraction})",
                every_rank=True,
            )


def batches_of_all(reader: ClipReader, count: int, shard: Shard) -> Iterator[tuple[Batch, int]]:
    """A rank's batches of clips 0 ... count - 1, and how many clips of each count. All ranks have as many batches: one
    with no clip left is given a clip that does not count, because under ZeRO 3 every rank takes part in every forward
    pass.
    """
    for round_ in range(-(-count // (shard.micro_batch * shard.world_size))):
        first = shard.position(round_)
        clips = max(0, min(shard.micro_batch, count - first))
        yield reader.read(min(first, count - 1), max(clips, 1)), clips


class Prefetcher:
    """Iterates over the micro-batches of a shard for ever, from `first_micro_step` on, up to `depth` of them ready
    ahead.

    While one is decoded, the next is read already; on a GPU it is copied there beside the step.
    """

    def __init__(
        self, reader: ClipReader, shard: Shard, first_micro_step: int, device: torch.device, depth: int
    ) -> None:
        self._reader, self._shard, self._device = reader, shard, device
        self._ready: queue.Queue[tuple[Batch, torch.cuda.Event | None] | Exception] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._copying: deque[tuple[Batch, torch.cuda.Event]] = deque()  # their memory must not be used again yet
        self._thread = threading.Thread(target=self._work, args=(first_micro_step,), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        item = self._ready.get()
        if isinstance(item, Exception):
            raise item
        batch, copied = item
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            for tensor in (batch.waveform, batch.lengths, batch.clips):
                tensor.record_stream(stream)
        return batch

    def close(self) -> None:
        """End the thread, whatever it is at, and close the decoder."""
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue
        self._reader.decoder.close()

    def _work(self, micro_step: int) -> None:
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        try:
            pending = self._begin(micro_step)
            while not self._stopped.is_set():
                micro_step += 1
                following = self._begin(micro_step)
                batch = self._reader.finish(pending)
                self._put((batch, None) if stream is None else self._copy(batch, stream))
                pending = following
        except Exception as error:  # handed to the step, which raises it
            self._put(error)

    def _begin(self, micro_step: int) -> PendingBatch:
        return self._reader.begin(self._shard.position(micro_step), self._shard.micro_batch)

    def _copy(self, batch: Batch, stream: torch.cuda.Stream) -> tuple[Batch, torch.cuda.Event]:
        """Copy from pinned memory on a stream of its own, beside the step; the event says when the copy is there."""
        pinned = Batch(
            batch.waveform.pin_memory(), batch.lengths.pin_memory(), batch.position, batch.clips.pin_memory()
        )
        with torch.cuda.stream(stream):
            tensors = (pinned.waveform, pinned.lengths, pinned.clips)
            waveform, lengths, clips = (tensor.to(self._device, non_blocking=True) for tensor in tensors)
            copied = torch.cuda.Event()
            copied.record(stream)
        self._copying.append((pinned, copied))
        while self._copying[0][1].query() and len(self._copying) > 1:
            self._copying.popleft()
        return Batch(waveform, lengths, batch.position, clips), copied

    def _put(self, item: tuple[Batch, torch.cuda.Event | None] | Exception) -> None:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
