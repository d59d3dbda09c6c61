"""Columns of texts: one array of bytes for millions of them, without a Python object each."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from ssast.engine.files import encode_text

_CHUNK = 1 << 16  # texts that are Python objects at one time


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
        """One block of all texts."""
        encoded = [encode_text(text) for text in texts]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(text) for text in encoded], out=offsets[1:])
        return cls([Block(len(encoded), offsets, np.frombuffer(b"".join(encoded), dtype=np.uint8))])

    @classmethod
    def empty(cls, count: int) -> Texts:
        """`count` texts of no letters."""
        return cls.from_list([""]).subset(np.zeros(count, dtype=np.int64))

    @staticmethod
    def joined(parts: Sequence[Texts]) -> Texts:
        """One after the other; the blocks are not copied."""
        bases = accumulate((part._starts[-1] for part in parts), initial=0)
        rows = [part.rows + base for part, base in zip(parts, bases, strict=False)]
        return Texts([block for part in parts for block in part._blocks], np.concatenate(rows))

    def subset(self, index: np.ndarray | slice) -> Texts:
        """The texts at `index`; the blocks are not copied."""
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
        if not isinstance(other, Sequence) or isinstance(other, str) or len(self) != len(other):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

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
        """UTF-8 of the texts at `rows` int64 [N]."""
        offsets, utf8 = self.arrays
        view = utf8.data
        return (
            view[start:stop] for start, stop in zip(offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True)
        )

    @functools.cached_property
    def hashes(self) -> np.ndarray:
        """uint64, one for each text."""
        offsets, utf8 = self.arrays
        hashes = np.empty(self._count, dtype=np.uint64)
        for start in range(0, self._count, _CHUNK):
            part = offsets[start : start + _CHUNK + 1]
            hashes[start : start + _CHUNK] = _hash(utf8[part[0] : part[-1]], part - part[0])
        return hashes


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
