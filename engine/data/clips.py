"""The clips of a data set as columns: numbers in arrays, texts in one array of bytes, millions of either without a
Python object each.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from .record import Record, split_labels
from .texts import Texts


@dataclass(frozen=True, eq=False)
class Clips:
    """The clips that can be read, one column each for what is known of them.

    `paths` is what to open: the file itself, its converted copy, or a shard that holds many; `sources` what it was made
    from. From byte `offsets` int64 [N] on (0: the clip is the whole file; nothing in a shard begins there), `sizes`
    int64 [N] bytes are an audio file, of `frames` int64 [N] samples per channel at `sample_rates` int32 [N] Hz and
    `channels` int32 [N]. `datasets` int32 [N] numbers the entries of a list of data sets. `labels` are texts as
    `record.split_labels` reads them, `splits` train, valid, test or "". Lists are taken for texts; offsets, speakers,
    data sets and folds may be left out.
    """

    paths: Texts
    sources: Texts
    labels: Texts
    splits: Texts
    frames: np.ndarray
    sample_rates: np.ndarray
    channels: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray = field(default=None)  # type: ignore[assignment]
    speakers: Texts = field(default=None)  # type: ignore[assignment]
    datasets: np.ndarray = field(default=None)  # type: ignore[assignment]
    folds: Texts = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        count = len(self.paths)
        for name in ("paths", "sources", "labels", "splits"):
            if not isinstance(getattr(self, name), Texts):
                object.__setattr__(self, name, Texts.from_list(getattr(self, name)))
        if self.offsets is None:
            object.__setattr__(self, "offsets", np.broadcast_to(np.int64(0), count))
        for name in ("speakers", "folds"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, Texts.empty(count))
            elif not isinstance(getattr(self, name), Texts):
                object.__setattr__(self, name, Texts.from_list(getattr(self, name)))
        if self.datasets is None:
            object.__setattr__(self, "datasets", np.broadcast_to(np.int32(0), count))

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, index: np.ndarray) -> Clips:
        """The clips at `index` (numbers in any order, or a bool mask [N])."""
        index = np.flatnonzero(index) if index.dtype == bool else index
        taken: dict[int, np.ndarray] = {}  # texts of one index share their row numbers

        def take(column: np.ndarray) -> np.ndarray:
            if column.strides == (0,):
                return np.broadcast_to(column[:1].reshape(()), len(index)) if len(column) else column
            if id(column) not in taken:
                taken[id(column)] = column[index]
            return taken[id(column)]

        columns = (getattr(self, name) for name in self.__dataclass_fields__)
        return Clips(*(Texts(c._blocks, take(c.rows)) if isinstance(c, Texts) else take(c) for c in columns))

    @staticmethod
    def joined(parts: Sequence[Clips]) -> Clips:
        """One after the other; each part becomes a data set of its own by number."""
        if len(parts) == 1:
            return parts[0]
        columns = {}
        for name in Clips.__dataclass_fields__:
            values = [getattr(part, name) for part in parts]
            if name == "datasets":
                values = [np.broadcast_to(np.int32(number), len(part)) for number, part in enumerate(parts)]
            columns[name] = Texts.joined(values) if isinstance(values[0], Texts) else np.concatenate(values)
        return Clips(**columns)

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
            crc = zlib.crc32(np.ascontiguousarray(self.offsets), zlib.crc32(self.sources.hashes()))
        else:
            crc = zlib.crc32(b"\n".join(self.sources.encoded()))
        return [len(self), crc, int(self.sizes.sum())]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that training goes without, and why."""

    path: str
    reason: str
