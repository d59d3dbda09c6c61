"""The clips of a data set as columns: numbers in arrays, texts in one array of bytes, millions of either without a
Python object each.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .record import Record, split_labels
from .texts import Texts


@dataclass(frozen=True, eq=False, init=False)
class Clips:
    """The clips that can be read, one column each for what is known of them.

    `paths` is what to open: the file itself, its converted copy, or a shard that holds many; `sources` what it was made
    from. From byte `offsets` int64 [N] on (0: the clip is the whole file; nothing in a shard begins there), `sizes`
    int64 [N] bytes are an audio file, of `frames` int64 [N] samples per channel at `sample_rates` int32 [N] Hz and
    `channels` int32 [N]. `datasets` int32 [N] numbers the entries of a list of data sets. `labels` are texts as
    `record.split_labels` reads them, `splits` train, valid, test or "". Columns of texts may be given as lists;
    offsets, speakers, data sets and folds may be left out.
    """

    paths: Texts
    sources: Texts
    labels: Texts
    splits: Texts
    frames: np.ndarray
    sample_rates: np.ndarray
    channels: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray
    speakers: Texts
    datasets: np.ndarray
    folds: Texts

    def __init__(
        self,
        paths: Sequence[str],
        sources: Sequence[str],
        labels: Sequence[str],
        splits: Sequence[str],
        frames: np.ndarray,
        sample_rates: np.ndarray,
        channels: np.ndarray,
        sizes: np.ndarray,
        offsets: np.ndarray | None = None,
        speakers: Sequence[str] | None = None,
        datasets: np.ndarray | None = None,
        folds: Sequence[str] | None = None,
    ) -> None:
        count = len(paths)
        self.__dict__.update(  # frozen: there are no attributes to set
            paths=_texts(paths),
            sources=_texts(sources),
            labels=_texts(labels),
            splits=_texts(splits),
            frames=frames,
            sample_rates=sample_rates,
            channels=channels,
            sizes=sizes,
            offsets=np.broadcast_to(np.int64(0), count) if offsets is None else offsets,
            speakers=Texts.empty(count) if speakers is None else _texts(speakers),
            datasets=np.broadcast_to(np.int32(0), count) if datasets is None else datasets,
            folds=Texts.empty(count) if folds is None else _texts(folds),
        )

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, index: np.ndarray) -> Clips:
        """The clips at `index` (numbers in any order, or a bool mask [N])."""
        index = np.flatnonzero(index) if index.dtype == bool else index
        rows_by_column: dict[int, np.ndarray] = {}  # texts of one index share their row numbers

        def take(column: np.ndarray) -> np.ndarray:
            if column.strides == (0,):
                return np.broadcast_to(column[:1].reshape(()), len(index)) if len(column) else column
            if id(column) not in rows_by_column:
                rows_by_column[id(column)] = column[index]
            return rows_by_column[id(column)]

        def texts(column: Texts) -> Texts:
            return Texts(column._blocks, take(column.rows))

        return Clips(
            paths=texts(self.paths),
            sources=texts(self.sources),
            labels=texts(self.labels),
            splits=texts(self.splits),
            frames=take(self.frames),
            sample_rates=take(self.sample_rates),
            channels=take(self.channels),
            sizes=take(self.sizes),
            offsets=take(self.offsets),
            speakers=texts(self.speakers),
            datasets=take(self.datasets),
            folds=texts(self.folds),
        )

    @staticmethod
    def joined(parts: Sequence[Clips]) -> Clips:
        """One after the other; each part becomes a data set of its own by number."""
        if len(parts) == 1:
            return parts[0]
        return Clips(
            paths=Texts.joined([part.paths for part in parts]),
            sources=Texts.joined([part.sources for part in parts]),
            labels=Texts.joined([part.labels for part in parts]),
            splits=Texts.joined([part.splits for part in parts]),
            frames=np.concatenate([part.frames for part in parts]),
            sample_rates=np.concatenate([part.sample_rates for part in parts]),
            channels=np.concatenate([part.channels for part in parts]),
            sizes=np.concatenate([part.sizes for part in parts]),
            offsets=np.concatenate([part.offsets for part in parts]),
            speakers=Texts.joined([part.speakers for part in parts]),
            datasets=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts]),
            folds=Texts.joined([part.folds for part in parts]),
        )

    def records(self) -> Iterator[Record]:
        """A row for each clip, whose path is what it was made from, unless it lies in a shard."""
        in_shards = self.in_shards.tolist()
        texts = (self.paths, self.sources, self.labels, self.splits, self.speakers, self.folds)
        places = zip(self.offsets.tolist(), self.sizes.tolist(), in_shards, strict=True)
        for row, (offset, size, in_shard) in zip(zip(*texts, strict=True), places, strict=True):
            path, source, labels, split, speaker, fold = row
            place = (path, offset, size) if in_shard else (source, -1, -1)
            yield Record(place[0], split_labels(labels), split, speaker, fold, source, *place[1:])

    @property
    def hours(self) -> float:
        """Of all clips together."""
        return float((self.frames / self.sample_rates).sum() / 3600)

    @property
    def in_shards(self) -> np.ndarray:
        """Bool [N]."""
        return self.offsets > 0

    @property
    def converted(self) -> np.ndarray:
        """Bool [N]: plain files of which a copy is read."""
        return ~self.in_shards & (self.paths.hashes() != self.sources.hashes())

    @functools.cached_property
    def fingerprint(self) -> list[int]:
        """Changes whenever the clips or their order do."""
        if self.in_shards.any():
            crc = zlib.crc32(np.ascontiguousarray(self.offsets).data, zlib.crc32(self.sources.hashes().data))
        else:
            crc = zlib.crc32(b"\n".join(self.sources.encoded()))
        return [len(self), crc, int(self.sizes.sum())]


def _texts(column: Sequence[str]) -> Texts:
    return column if isinstance(column, Texts) else Texts.from_list(column)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that training goes without, and why."""

    path: str
    reason: str
