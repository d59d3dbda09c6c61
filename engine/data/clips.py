"""The clips of a data set as columns: numbers in arrays, texts in one array of bytes, millions of either without a
Python object each.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from ssast.engine.errors import UserError, first_line

# What a prepared folder holds; the second as long as it is not finished.
DESCRIPTION, UNFINISHED, SHARDS, INDEX = "dataset.json", "unfinished.json", "shards", "index"
_CHUNK = 1 << 16


class Texts(Sequence[str]):
    """N texts, none of them a Python object until it is asked for.

    They are rows of a table of one or more blocks; `rows` int64 [N] numbers them across the blocks. Subsets and joins
    share the blocks. Bytes that are not UTF-8 come as surrogate escapes, as in `os.fsdecode`.
    """

    def __init__(self, blocks: Sequence[Block], rows: np.ndarray | None = None) -> None:
        self._blocks = tuple(blocks)
        self._starts = list(accumulate((len(block) for block in self._blocks), initial=0))
        self.rows = np.arange(self._starts[-1]) if rows is None else rows

    @classmethod
    def from_list(cls, texts: Sequence[str]) -> Texts:
        encoded = [_encode(text) for text in texts]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(text) for text in encoded], out=offsets[1:])
        return cls([Block(len(encoded), offsets, np.frombuffer(b"".join(encoded), dtype=np.uint8))])

    @classmethod
    def empty(cls, count: int) -> Texts:
        """`count` texts of no letters."""
        return cls.from_list([""]).subset(np.zeros(count, dtype=np.int64))

    @staticmethod
    def joined(parts: Sequence[Texts]) -> Texts:
        bases = accumulate((part._starts[-1] for part in parts), initial=0)
        rows = [part.rows + base for part, base in zip(parts, bases, strict=False)]
        return Texts([block for part in parts for block in part._blocks], np.concatenate(rows))

    def subset(self, index: np.ndarray | slice) -> Texts:
        return Texts(self._blocks, self.rows[index])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """The text at a number, or the Texts of a slice."""
        if isinstance(index, slice):
            return self.subset(index)
        return _decode(next(self._encoded(self.rows[[index]])))

    def __iter__(self) -> Iterator[str]:
        return map(_decode, self.encoded())

    def __eq__(self, other: object) -> bool:
        same_length = isinstance(other, Sequence) and not isinstance(other, str) and len(self) == len(other)
        return same_length and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # as of a list

    def __repr__(self) -> str:
        return f"Texts({list(self[:3])}{' ...' if len(self) > 3 else ''}, {len(self)} in all)"

    def encoded(self) -> Iterator[memoryview]:
        """UTF-8 of each."""
        return self._encoded(self.rows)

    def used(self) -> Texts:
        """The different rows of the table that there are, in its order."""
        return Texts(self._blocks, np.unique(self.rows))

    def hashes(self) -> np.ndarray:
        """uint64 [N], equal for equal texts, the same on every machine."""
        if not self._blocks:
            return np.zeros(0, dtype=np.uint64)
        return np.concatenate([block.hashes for block in self._blocks])[self.rows]

    def _encoded(self, rows: np.ndarray) -> Iterator[memoryview]:
        for start in range(
            0, len(rows), _CHUNK
        ):  # lists of all numbers would be the Python objects that this class does without
            part = rows[start : start + _CHUNK]
            blocks = np.searchsorted(self._starts, part, side="right") - 1
            edges = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(part)]
            for first, last in pairwise(edges):
                number = int(blocks[first])
                yield from self._blocks[number].encoded(part[first:last] - self._starts[number])


class Block:
    """Texts end to end: uint8 bytes, text i being bytes[offsets[i] : offsets[i + 1]] with int64 offsets [N + 1].

    Both are arrays, or names of .npy files, which are mapped when they are first used, here or in a process that the
    block is sent to.
    """

    def __init__(self, count: int, offsets: np.ndarray | str, utf8: np.ndarray | str) -> None:
        self._count, self._source = count, (offsets, utf8)

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return {"_count": self._count, "_source": self._source}

    @functools.cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(offsets, bytes)."""
        offsets, utf8 = (
            np.asarray(np.load(part, mmap_mode="r")) if isinstance(part, str) else part for part in self._source
        )
        return offsets, utf8

    def encoded(self, rows: np.ndarray) -> Iterator[memoryview]:
        offsets, utf8 = self.arrays
        view = memoryview(utf8)
        return (
            view[start:stop] for start, stop in zip(offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True)
        )

    @functools.cached_property
    def hashes(self) -> np.ndarray:
        offsets, utf8 = self.arrays
        found = np.empty(self._count, dtype=np.uint64)
        for start in range(0, self._count, _CHUNK):
            part = offsets[start : start + _CHUNK + 1]
            found[start : start + _CHUNK] = _hash(utf8[part[0] : part[-1]], part - part[0])
        return found


@dataclass(frozen=True, eq=False)
class Clips:
    """The clips that can be read, one column each for what is known of them.

    `paths` is what to open: the file itself, its converted copy, or a shard that holds many; `sources` what it was made
    from. From byte `offsets` int64 [N] on (0: the clip is the whole file; nothing in a shard begins there), `sizes`
    int64 [N] bytes are an audio file, of `frames` int64 [N] samples per channel at `sample_rates` int32 [N] Hz and
    `channels` int32 [N]. `mtimes_ns` int64 [N] is the time of a plain file when it was checked, 0 in shards. `datasets`
    int32 [N] numbers the entries of a list of data sets. Lists are taken for texts; offsets, speakers and data sets may
    be left out.
    """

    paths: Texts
    sources: Texts
    labels: Texts
    splits: Texts
    frames: np.ndarray
    sample_rates: np.ndarray
    channels: np.ndarray
    sizes: np.ndarray
    mtimes_ns: np.ndarray
    offsets: np.ndarray = field(default=None)  # type: ignore[assignment]
    speakers: Texts = field(default=None)  # type: ignore[assignment]
    datasets: np.ndarray = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        count = len(self.paths)
        for name in ("paths", "sources", "labels", "splits"):
            if not isinstance(getattr(self, name), Texts):
                object.__setattr__(self, name, Texts.from_list(getattr(self, name)))
        if self.offsets is None:
            object.__setattr__(self, "offsets", np.broadcast_to(np.int64(0), count))
        if self.speakers is None:
            object.__setattr__(self, "speakers", Texts.empty(count))
        elif not isinstance(self.speakers, Texts):
            object.__setattr__(self, "speakers", Texts.from_list(self.speakers))
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

    @property
    def hours(self) -> float:
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


class _Shard(BaseModel):
    name: str
    bytes: int
    clips: int


class _Description(BaseModel):
    """What is read of dataset.json."""

    format: Literal[1]
    sample_rate: Annotated[int, Field(ge=1)]
    clips: int
    shards: list[_Shard]


def is_prepared(folder: Path) -> bool:
    """Whether a folder is what `ssast prepare` writes, finished or not."""
    if (folder / UNFINISHED).is_file():
        return True
    return (folder / SHARDS).is_dir() and ((folder / DESCRIPTION).is_file() or any((folder / SHARDS).glob("*.tar")))


def open_shards(folder: Path) -> Clips:
    """The clips of a prepared folder, its index mapped into memory. No audio is read.

    Raises:
        UserError: the folder is not finished, of another format, or its shards or index are not what dataset.json says.
    """
    description = _describe(folder)
    count = description.clips
    for shard in description.shards:
        path = folder / SHARDS / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            found = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
            raise UserError(f"{path}: the shard {found}; copy it again, or run ssast prepare again")
    shard_of, offsets, sizes, samples = (
        np.asarray(_column(folder, name, dtype, count))
        for name, dtype in (("shard", np.int32), ("offset", np.int64), ("size", np.int64), ("samples", np.int64))
    )
    if count and (
        shard_of.min() < 0
        or shard_of.max() >= len(description.shards)
        or min(offsets.min(), sizes.min(), samples.min()) < 1
        or (offsets + sizes > np.array([shard.bytes for shard in description.shards])[shard_of]).any()
    ):
        raise UserError(f"{folder / INDEX}: names clips outside the shards; run ssast prepare again")
    shards = Texts.from_list([str(folder / SHARDS / shard.name) for shard in description.shards])
    rows = np.arange(count)
    texts = {name: Texts([_text_block(folder, name, count)], rows) for name in ("source", "label", "split", "speaker")}
    return Clips(
        paths=shards.subset(shard_of.astype(np.int64)),
        sources=texts["source"],
        labels=texts["label"],
        splits=texts["split"],
        speakers=texts["speaker"],
        frames=samples,
        sample_rates=np.broadcast_to(np.int32(description.sample_rate), count),
        channels=np.broadcast_to(np.int32(1), count),
        sizes=sizes,
        mtimes_ns=np.broadcast_to(np.int64(0), count),
        offsets=offsets,
    )


def _describe(folder: Path) -> _Description:
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(
            f"{folder}: is not finished, {DESCRIPTION} is missing; run the same ssast prepare again to finish it"
        )
    try:
        description = _Description.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "content"
        raise UserError(f"{path}: {where}: {problem['msg']}; not the format 1 that this version reads") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if sum(shard.clips for shard in description.shards) != description.clips or not description.clips:
        raise UserError(
            f"{path}: {description.clips} clips, {sum(shard.clips for shard in description.shards)} of them in shards"
        )
    return description


def _column(folder: Path, name: str, dtype: type, count: int | None) -> np.ndarray:
    """A column of the index, mapped; `count` rows if one is given."""
    path = folder / INDEX / f"{name}.npy"
    try:
        column = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: the index cannot be read ({first_line(error)}); run ssast prepare again") from None
    if column.dtype != dtype or column.ndim != 1 or (count is not None and len(column) != count):
        expected = f"{np.dtype(dtype)} [{'any' if count is None else count}]"
        raise UserError(f"{path}: {column.dtype} {list(column.shape)} instead of {expected}; run ssast prepare again")
    return column


def _text_block(folder: Path, name: str, count: int) -> Block:
    offsets = _column(folder, f"{name}.offsets", np.int64, count + 1)
    utf8 = _column(folder, f"{name}.utf8", np.uint8, None)
    if offsets[0] != 0 or offsets[-1] != len(utf8):
        raise UserError(
            f"{folder / INDEX / name}.utf8.npy: {len(utf8)} bytes instead of {offsets[-1]}; run ssast prepare again"
        )
    return Block(count, *(str(folder / INDEX / f"{name}.{part}.npy") for part in ("offsets", "utf8")))


def _encode(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return text.encode("utf-8", "replace")


def _decode(text: memoryview) -> str:
    return str(text, "utf-8", "surrogateescape")


def _hash(utf8: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """uint64 [N] of the texts of a block, eight bytes at a time."""
    starts, lengths = offsets[:-1], np.diff(offsets)
    padded = np.append(utf8, np.zeros(8, dtype=np.uint8))
    # the eight bytes from each byte on
    words = np.ndarray((len(padded) - 7,), dtype="<u8", buffer=padded, strides=(1,))
    hashes = lengths.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    rows = np.flatnonzero(lengths)
    for done in range(0, int(lengths.max(initial=0)), 8):
        rows = rows[lengths[rows] > done] if done else rows
        unused = np.maximum(8 - (lengths[rows] - done), 0).astype(np.uint64) * np.uint64(8)  # bits of the next text
        hashes[rows] = _mix(hashes[rows] ^ (words[starts[rows] + done] << unused))
    return hashes


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3: each bit of the result depends on each of the argument."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))
