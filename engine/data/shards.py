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
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import soundfile
from pydantic import BaseModel, Field, ValidationError
from tqdm import tqdm

from ssast.engine.errors import UserError, first_line
from ssast.engine.files import encode_text

from .clips import Clips
from .record import split_and_fold
from .remarks import Remarks
from .tars import each_member
from .texts import Block, Texts
from .wav import HEADER_BYTES, wav_header

# What a prepared folder holds; the second as long as it is not finished.
DESCRIPTION, UNFINISHED, SHARDS, INDEX = "dataset.json", "unfinished.json", "shards", "index"

FORMAT = 1
CODECS = ("wav", "flac")
NUMBERS = {"shard": "<i4", "offset": "<i8", "size": "<i8", "samples": "<i8", "crc32": "<u4"}
NOTED = ("label", "speaker", "split", "source")  # in the .json beside each clip
TEXTS = ("key", *NOTED)
END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)
_NPY_HEADER = 128  # bytes, so that it can be written once the number of rows is known
_LISTED = 20  # faults of one shard that are told one by one


def shard_name(number: int) -> str:
    """The file's name."""
    return f"{number:05d}.tar"


def clip_key(recording: int, piece: int) -> str:
    """Of piece number `piece` of a recording, or of a whole one where `piece` is -1."""
    return f"{recording:08d}" if piece < 0 else f"{recording:08d}_{piece:06d}"


def encode_audio(samples: np.ndarray, sample_rate: int, codec: str) -> bytes:
    """A WAV file with a header of 44 bytes, or a FLAC file, of int16 [S]."""
    if codec == "wav":
        return wav_header(len(samples), sample_rate) + samples.astype("<i2", copy=False).tobytes()
    file = io.BytesIO()
    soundfile.write(file, samples, sample_rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def count_samples(content: bytes, codec: str) -> int:
    """Samples that the header of an audio member promises; -1 for another header than `encode_audio` writes."""
    if codec == "wav":
        is_own_header = content.startswith(b"RIFF") and content[36:40] == b"data" and len(content) >= HEADER_BYTES
        return (len(content) - HEADER_BYTES) // 2 if is_own_header else -1
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


class ShardDescription(BaseModel):
    """One shard, as dataset.json has it."""

    name: str
    bytes: int
    clips: int
    sha256: str = ""


class Description(BaseModel):
    """What is read of dataset.json."""

    format: Literal[1]
    sample_rate: Annotated[int, Field(ge=1)]
    codec: str = "wav"
    clips: int
    shards: list[ShardDescription]


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

    def append(self, numbers: Mapping[str, Sequence[int] | np.ndarray], texts: dict[str, Sequence[str]]) -> None:
        """Add rows: of each column of `NUMBERS` and of `TEXTS` as many values."""
        for name, column in self._numbers.items():
            column.append(numbers[name])
        for name in TEXTS:
            encoded = [encode_text(text) for text in texts[name]]
            ends = self._texts[name].rows + np.cumsum([len(text) for text in encoded], dtype=np.int64)
            self._ends[name].append(ends)
            self._texts[name].append(np.frombuffer(b"".join(encoded), dtype=np.uint8))
        self.rows += len(numbers["shard"])

    def close(self) -> None:
        """Complete the files."""
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


def is_prepared(folder: Path) -> bool:
    """Whether a folder is what `ssast prepare` writes, finished or not."""
    if (folder / UNFINISHED).is_file():
        return True
    return (folder / SHARDS).is_dir() and ((folder / DESCRIPTION).is_file() or any((folder / SHARDS).glob("*.tar")))


def print_remarks(folder: Path) -> None:
    """Say on standard error what `ssast prepare` had to remark on the recordings of a folder, a line for each kind."""
    remarks = Remarks()
    try:
        remarks.add_json(json.loads((folder / "stats.json").read_bytes()).get("remarks"))
    except (OSError, ValueError, AttributeError):
        return  # nothing that a run needs
    for line in remarks.lines():
        print(line, file=sys.stderr)


def open_shards(folder: Path) -> Clips:
    """The clips of a prepared folder, its index mapped into memory. No audio is read.

    Raises:
        UserError: the folder is not finished, of another format, or its shards or index are not what dataset.json says.
    """
    description = describe(folder)
    count = description.clips
    for shard in description.shards:
        path = folder / SHARDS / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            problem = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
            raise UserError(f"{path}: the shard {problem}; copy it again, or run ssast prepare again")
    names = ("shard", "offset", "size", "samples", "source", "label", "split", "speaker")
    numbers, blocks = load_index(folder, count, names)
    shard_of, offsets, sizes, samples = numbers.values()
    if count and (
        shard_of.min() < 0
        or shard_of.max() >= len(description.shards)
        or min(offsets.min(), sizes.min(), samples.min()) < 1
        or (offsets + sizes > np.array([shard.bytes for shard in description.shards])[shard_of]).any()
    ):
        raise UserError(f"{folder / INDEX}: names clips outside the shards; run ssast prepare again")
    shards = Texts.from_list([str(folder / SHARDS / shard.name) for shard in description.shards])
    rows = np.arange(count)
    texts = {name: Texts([block], rows) for name, block in blocks.items()}
    splits, folds = _splits_and_folds(texts["split"])
    return Clips(
        paths=shards.subset(shard_of.astype(np.int64)),
        sources=texts["source"],
        labels=texts["label"],
        splits=splits,
        speakers=texts["speaker"],
        frames=samples,
        sample_rates=np.broadcast_to(np.int32(description.sample_rate), count),
        channels=np.broadcast_to(np.int32(1), count),
        sizes=sizes,
        offsets=offsets,
        folds=folds,
    )


def _splits_and_folds(texts: Texts) -> tuple[Texts, Texts]:
    """(splits, folds) of clips, which have one column in the index. There are few different ones, each read once."""
    hashes = texts.hashes()
    values = np.unique(hashes)
    which = np.searchsorted(values, hashes)
    example = np.empty(len(values), dtype=np.int64)
    example[which] = np.arange(len(hashes))
    read = [split_and_fold(text) for text in texts.subset(example)]
    splits, folds = Texts.from_list([split for split, _ in read]), Texts.from_list([fold for _, fold in read])
    return splits.subset(which), folds.subset(which)


def describe(folder: Path) -> Description:
    """What dataset.json says of a prepared folder.

    Raises:
        UserError: it is not there yet, cannot be read or contradicts itself.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(
            f"{folder}: is not finished, {DESCRIPTION} is missing; run the same ssast prepare again to finish it"
        )
    try:
        description = Description.model_validate_json(path.read_bytes())
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


def load_index(
    folder: Path, count: int | None = None, names: Sequence[str] = (*NUMBERS, *TEXTS)
) -> tuple[dict[str, np.ndarray], dict[str, Block]]:
    """The columns `names` of a prepared folder's index, mapped: numbers by name, and texts by name.

    `count` is how many rows dataset.json promises; without it the first column says.

    Raises:
        UserError: a file is missing or damaged, or the columns do not agree in length.
    """
    numbers, texts = {}, {}
    for name in names:
        if name in NUMBERS:
            numbers[name] = _column(folder, name, np.dtype(NUMBERS[name]), count)
            count = len(numbers[name]) if count is None else count
        else:
            texts[name] = _text_block(folder, name, 0 if count is None else count)
    return numbers, texts


def _column(folder: Path, name: str, dtype: np.dtype, count: int | None) -> np.ndarray:
    """A column of the index, mapped; `count` rows if one is given."""
    path = folder / INDEX / f"{name}.npy"
    try:
        column = np.asarray(np.load(path, mmap_mode="r"))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: the index cannot be read ({first_line(error)}); run ssast prepare again") from None
    if column.dtype != dtype or column.ndim != 1 or (count is not None and len(column) != count):
        expected = f"{dtype} [{'any' if count is None else count}]"
        raise UserError(f"{path}: {column.dtype} {list(column.shape)} instead of {expected}; run ssast prepare again")
    return column


def _text_block(folder: Path, name: str, count: int) -> Block:
    offsets = _column(folder, f"{name}.offsets", np.dtype(np.int64), count + 1)
    utf8 = _column(folder, f"{name}.utf8", np.dtype(np.uint8), None)
    if offsets[0] != 0 or offsets[-1] != len(utf8):
        raise UserError(
            f"{folder / INDEX / name}.utf8.npy: {len(utf8)} bytes instead of {offsets[-1]}; run ssast prepare again"
        )
    return Block(count, *(str(folder / INDEX / f"{name}.{part}.npy") for part in ("offsets", "utf8")))


def verify(folder: Path, workers: int, progress: bool = True) -> tuple[int, list[str]]:
    """Reads every byte of a prepared folder: how many clips there are, and all that is wrong, in words.

    Raises `UserError` if there is no finished folder to verify.
    """
    description = describe(folder)
    clips, shards, codec, rate = description.clips, description.shards, description.codec, description.sample_rate
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
    for name, block in texts.items():
        if (np.diff(block.arrays[0]) < 0).any():
            return clips, [*faults, f"index: the offsets of {name} do not ascend"]
    names = {shard.name for shard in shards}
    faults += [
        f"shards/{path.name}: not in dataset.json"
        for path in sorted((folder / "shards").glob("*.tar"))
        if path.name not in names
    ]

    def check(number: int) -> list[str]:
        first, last = np.searchsorted(shard_of, [number, number + 1])
        rows = [
            {name: int(column[row]) for name, column in numbers.items()}
            | {name: Texts([block])[row] for name, block in texts.items()}
            for row in range(first, last)
        ]
        return [
            f"shards/{shards[number].name}: {fault}"
            for fault in _shard_faults(folder / "shards", shards[number], rows, codec, rate, bar)
        ]

    total = sum(shard.bytes for shard in shards)
    bar = tqdm(total=total, desc="verifying", unit="B", unit_scale=True, disable=None if progress else True)
    with bar, ThreadPoolExecutor(workers) as pool:
        for shard_faults in pool.map(check, range(len(shards))):
            faults += shard_faults
    return clips, faults


def _shard_faults(
    folder: Path,
    shard: ShardDescription,
    rows: list[dict[str, Any]],
    codec: str,
    rate: int,
    bar: tqdm,
) -> list[str]:
    """What is wrong with a shard, read once from end to end."""
    faults = (
        [] if len(rows) == shard.clips else [f"{len(rows)} rows in the index, dataset.json counts {shard.clips} clips"]
    )
    try:
        with open(folder / shard.name, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != shard.bytes:
                faults.append(f"{size} bytes instead of {shard.bytes}")
            hashing = _Hashing(file, bar)
            member_faults = _member_faults(hashing, rows, codec, rate)
            try:
                faults += _shortened(member_faults)
            except tarfile.TarError as error:
                faults.append(f"damaged tar: {first_line(error)}")
            while hashing.read(1 << 20):
                pass
            if hashing.sha256.hexdigest() != shard.sha256:
                faults.append("sha256 differs from dataset.json")
    except OSError as error:
        faults.append(f"cannot be read: {error.strerror or error}")
    return faults


def _member_faults(file: io.RawIOBase, rows: list[dict[str, Any]], codec: str, rate: int) -> Iterator[str]:
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
            values = {name: encode_text(note[name]) for name in NOTED} | {"seconds": round(note["seconds"] * rate)}
        except (ValueError, KeyError, TypeError, AttributeError):
            yield f"{key}.json is damaged"
            continue
        for name, value in {**{name: encode_text(row[name]) for name in NOTED}, "seconds": row["samples"]}.items():
            if values[name] != value:
                yield f"{key}.json: {name} is {values[name]!r}, the index says {value!r}"
    more = sum(1 for _ in members)
    if more:
        yield f"{more} members that are not in the index"


def _members(file: io.RawIOBase) -> Iterator[tuple[str, int, bytes]]:
    """(name, where its content begins, content) of each member of a tar."""
    with tarfile.open(fileobj=file, mode="r|", bufsize=1 << 20) as tar:
        for info in each_member(tar):
            content = tar.extractfile(info) if info.isreg() else None
            yield info.name, info.offset_data, b"" if content is None else content.read()


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
