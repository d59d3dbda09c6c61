"""The format of a prepared folder: WebDataset tar shards of 16-bit mono audio, and an index that finds every clip in
them.

dataset.json       what there is: sample rate, codec, shards with their sizes and hashes; written last
stats.json         mean and standard deviation of the log-mel features, hours, lengths
rejected.csv       path and reason of every file left out
shards/00000.tar   for each clip KEY.json (label, speaker, split, source, start_s, seconds), then KEY.wav or KEY.flac
index/NAME.npy     a row for each clip, in the order of shards and offsets: shard int32, offset int64 and size int64 (in
                   bytes, of the audio in its tar), samples int64, crc32 uint32 (of those bytes). Texts (key, label,
                   speaker, split, source): NAME.offsets.npy int64 [N + 1] into NAME.utf8.npy uint8
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
from tqdm import tqdm

from ssast.engine.errors import UserError, first_line

FORMAT = 1
CODECS = ("wav", "flac")
NUMBERS = {"shard": "<i4", "offset": "<i8", "size": "<i8", "samples": "<i8", "crc32": "<u4"}
NOTED = ("label", "speaker", "split", "source")  # in the .json beside each clip
TEXTS = ("key", *NOTED)
END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)
_WAV_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")
_NPY_HEADER = 128  # bytes, so that it can be written once the number of rows is known
_LISTED = 20  # faults of one shard that are told one by one


def shard_name(number: int) -> str:
    return f"{number:05d}.tar"


def clip_key(recording: int, piece: int) -> str:
    """Of piece number `piece` of a recording, or of a whole one where `piece` is -1."""
    return f"{recording:08d}" if piece < 0 else f"{recording:08d}_{piece:06d}"


def encode_audio(samples: np.ndarray, sample_rate: int, codec: str) -> bytes:
    """A WAV file with a header of 44 bytes, or a FLAC file, of int16 [S]."""
    if codec == "wav":
        data = samples.astype("<i2", copy=False).tobytes()
        size = len(data)
        parts = (b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16, b"data", size)
        return _WAV_HEADER.pack(*parts) + data
    file = io.BytesIO()
    soundfile.write(file, samples, sample_rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def count_samples(content: bytes, codec: str) -> int:
    """Samples that the header of an audio member promises; -1 for another header than `encode_audio` writes."""
    if codec == "wav":
        known = content.startswith(b"RIFF") and content[36:40] == b"data" and len(content) >= _WAV_HEADER.size
        return (len(content) - _WAV_HEADER.size) // 2 if known else -1
    return (
        int.from_bytes(content[21:26], "big") & (1 << 36) - 1
        if content.startswith(b"fLaC") and len(content) > 42
        else -1
    )


def tar_members(key: str, note: dict[str, Any], audio: bytes, codec: str) -> tuple[bytes, int]:
    """The two members of a clip as bytes of a tar, and where in them the audio begins."""
    before = _member(f"{key}.json", json.dumps(note).encode())
    return before + _member(f"{key}.{codec}", audio), len(before) + tarfile.BLOCKSIZE


def _member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


class Index:
    """Writes the columns of the index row by row; they are complete when it is closed, and none is held in memory."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.rows = 0
        self._numbers = {name: _Column(folder / f"{name}.npy", dtype) for name, dtype in NUMBERS.items()}
        self._ends = {name: _Column(folder / f"{name}.offsets.npy", "<i8") for name in TEXTS}
        self._texts = {name: _Column(folder / f"{name}.utf8.npy", "|u1") for name in TEXTS}
        for column in self._ends.values():
            column.append([0])

    def append(self, numbers: dict[str, Sequence[int]], texts: dict[str, Sequence[str]]) -> None:
        for name, column in self._numbers.items():
            column.append(numbers[name])
        for name in TEXTS:
            encoded = [encode_text(text) for text in texts[name]]
            ends = self._texts[name].rows + np.cumsum([len(text) for text in encoded], dtype=np.int64)
            self._ends[name].append(ends)
            self._texts[name].append(np.frombuffer(b"".join(encoded), dtype=np.uint8))
        self.rows += len(numbers["shard"])

    def close(self) -> None:
        for column in (*self._numbers.values(), *self._ends.values(), *self._texts.values()):
            column.close()


class _Column:
    """An .npy file of one dimension that grows."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.rows, self._dtype = 0, dtype
        self._file = open(path, "wb")  # noqa: SIM115
        self._file.write(bytes(_NPY_HEADER))

    def append(self, values: Sequence[int] | np.ndarray) -> None:
        self._file.write(np.asarray(values, dtype=self._dtype).tobytes())
        self.rows += len(values)

    def close(self) -> None:
        start = b"\x93NUMPY\x01\x00" + struct.pack("<H", _NPY_HEADER - 10)
        header = f"{{'descr': '{self._dtype}', 'fortran_order': False, 'shape': ({self.rows},), }}"
        self._file.seek(0)
        self._file.write(start + header.ljust(_NPY_HEADER - 11).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def encode_text(text: str) -> bytes:
    """UTF-8, with the bytes that were none in a file name as they were."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return text.encode("utf-8", "replace")


def load_index(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """(numbers by name, (offsets, bytes) of texts by name) of a prepared folder, mapped.

    Raises `UserError` if a file is missing or damaged, or the columns do not agree in length.
    """

    def load(name: str, dtype: str) -> np.ndarray:
        try:
            column = np.load(folder / "index" / name, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{folder / 'index' / name} cannot be read: {first_line(error)}") from error
        if column.dtype != dtype or column.ndim != 1:
            raise UserError(
                f"{folder / 'index' / name} holds {column.dtype} {list(column.shape)}, not a column of "
                f"{np.dtype(dtype)}"
            )
        return column

    numbers = {name: load(f"{name}.npy", dtype) for name, dtype in NUMBERS.items()}
    texts = {name: (load(f"{name}.offsets.npy", "<i8"), load(f"{name}.utf8.npy", "|u1")) for name in TEXTS}
    rows = len(numbers["shard"])
    for name, column in numbers.items():
        if len(column) != rows:
            raise UserError(f"{folder / 'index'}: {name} has {len(column)} rows, shard has {rows}")
    for name, (offsets, utf8) in texts.items():
        if len(offsets) != rows + 1 or offsets[0] != 0 or offsets[-1] != len(utf8) or (np.diff(offsets) < 0).any():
            raise UserError(f"{folder / 'index'}: the offsets of {name} do not fit {rows} rows and {len(utf8)} bytes")
    return numbers, texts


def verify(folder: Path, workers: int, progress: bool = True) -> tuple[int, list[str]]:
    """Reads every byte of a prepared folder: how many clips there are, and all that is wrong, in words.

    Raises `UserError` if there is no finished folder to verify.
    """
    try:
        described = json.loads((folder / "dataset.json").read_bytes())
        shards, codec, clips, rate = (
            described["shards"],
            described["codec"],
            described["clips"],
            described["sample_rate"],
        )
        if described["format"] != FORMAT:
            raise UserError(f"{folder} is of format {described['format']}; this version reads {FORMAT}")
        sizes = [(shard["name"], shard["bytes"], shard["clips"], shard["sha256"]) for shard in shards]
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no finished data set (no dataset.json): run ssast prepare to its end"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{folder / 'dataset.json'} cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from error
    try:
        numbers, texts = load_index(folder)
    except UserError as error:
        return clips, [str(error)]
    faults = []
    shard_of = numbers["shard"]
    if len(shard_of) != clips:
        faults.append(f"index: {len(shard_of)} rows, dataset.json counts {clips} clips")
    if (np.diff(shard_of) < 0).any() or (len(shard_of) and not 0 <= shard_of[0] <= shard_of[-1] < len(shards)):
        return clips, [*faults, "index: shard.npy does not name the shards of dataset.json in order"]
    names = {name for name, *_ in sizes}
    faults += [
        f"shards/{path.name}: not in dataset.json"
        for path in sorted((folder / "shards").glob("*.tar"))
        if path.name not in names
    ]

    def check(number: int) -> list[str]:
        first, last = np.searchsorted(shard_of, [number, number + 1])
        rows = [
            {name: int(column[row]) for name, column in numbers.items()}
            | {
                name: str(utf8[offsets[row] : offsets[row + 1]], "utf-8", "surrogateescape")
                for name, (offsets, utf8) in texts.items()
            }
            for row in range(first, last)
        ]
        return [
            f"shards/{sizes[number][0]}: {fault}"
            for fault in _shard_faults(folder / "shards", *sizes[number], rows, codec, rate, bar)
        ]

    total = sum(size for _, size, *_ in sizes)
    bar = tqdm(total=total, desc="verifying", unit="B", unit_scale=True, disable=None if progress else True)
    with bar, ThreadPoolExecutor(workers) as pool:
        for found in pool.map(check, range(len(sizes))):
            faults += found
    return clips, faults


def _shard_faults(
    folder: Path,
    name: str,
    size: int,
    clips: int,
    sha256: str,
    rows: list[dict[str, Any]],
    codec: str,
    rate: int,
    bar: tqdm,
) -> list[str]:
    """What is wrong with a shard, read once from end to end."""
    faults = [] if len(rows) == clips else [f"{len(rows)} rows in the index, dataset.json counts {clips} clips"]
    try:
        with open(folder / name, "rb", buffering=0) as file:
            held = os.fstat(file.fileno()).st_size
            if held != size:
                faults.append(f"{held} bytes instead of {size}")
            hashing = _Hashing(file, bar)
            found = _member_faults(hashing, rows, codec, rate)
            try:
                faults += _shortened(found)
            except tarfile.TarError as error:
                faults.append(f"damaged tar: {first_line(error)}")
            while hashing.read(1 << 20):
                pass
            if hashing.sha256.hexdigest() != sha256:
                faults.append("sha256 differs from dataset.json")
    except OSError as error:
        faults.append(f"cannot be read: {error.strerror or error}")
    return faults


def _member_faults(file: BinaryIO, rows: list[dict[str, Any]], codec: str, rate: int) -> Iterator[str]:
    """Compares the members of a tar with the rows of the index, one by one."""
    members = _members(file)
    for place, row in enumerate(rows):
        (note_name, _, note_bytes), (audio_name, offset, audio) = (next(members, ("the end", 0, b"")) for _ in range(2))
        key = row["key"]
        if (note_name, audio_name) != (f"{key}.json", f"{key}.{codec}"):
            yield (
                f"{note_name!r} and {audio_name!r} where the index has {key}, {len(rows) - place} clips before its end"
            )
            return
        measured = {
            "offset": offset,
            "size": len(audio),
            "crc32": zlib.crc32(audio),
            "samples": count_samples(audio, codec),
        }
        yield from (
            f"{key}: {name} is {value}, the index says {row[name]}"
            for name, value in measured.items()
            if value != row[name]
        )
        try:
            note = json.loads(note_bytes)
            told = {name: encode_text(note[name]) for name in NOTED} | {"seconds": round(note["seconds"] * rate)}
        except (ValueError, KeyError, TypeError, AttributeError):
            yield f"{key}.json is damaged"
            continue
        for name, value in {**{name: encode_text(row[name]) for name in NOTED}, "seconds": row["samples"]}.items():
            if told[name] != value:
                yield f"{key}.json: {name} is {told[name]!r}, the index says {value!r}"
    more = sum(1 for _ in members)
    if more:
        yield f"{more} members that are not in the index"


def _members(file: BinaryIO) -> Iterator[tuple[str, int, bytes]]:
    """(name, where its content begins, content) of each member of a tar."""
    with tarfile.open(fileobj=file, mode="r|", bufsize=1 << 20) as tar:
        for info in tar:
            yield info.name, info.offset_data, tar.extractfile(info).read() if info.isreg() else b""
            tar.members.clear()  # it would keep them all


def _shortened(faults: Iterable[str]) -> Iterator[str]:
    count = 0
    for fault in faults:
        count += 1
        if count <= _LISTED:
            yield fault
    if count > _LISTED:
        yield f"and {count - _LISTED} faults more"


class _Hashing(io.RawIOBase):
    """A file that is hashed as it is read."""

    def __init__(self, file: BinaryIO, bar: tqdm) -> None:
        self._file, self._bar, self.sha256 = file, bar, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.sha256.update(data)
        self._bar.update(len(data))
        return data
