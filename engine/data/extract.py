"""Decodes recordings, makes them mono at one sample rate, cuts them up and writes them to shards: the worker of
prepare.py.

It runs as a script, `python -P extract.py SETTINGS`, with the fields of `Extraction` in JSON. A line of standard input
is a `Job` in JSON: a shard, or what is left of one. Each of its recordings is answered in turn by a line of standard
output: {"clips": [[piece, offset, size, samples, crc32], ...], "end": length of the shard after it, "remarks": lines
for people} or {"reason": why it is left out}. {"sha256": of the whole shard} comes last, or {"fatal": what no other
file would change} at any point.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, BinaryIO

import numpy as np

from ssast.engine.data.probe import Reject, decode, describe, file_status, serve
from ssast.engine.data.record import Record
from ssast.engine.data.remarks import Ear
from ssast.engine.data.resample import to_int16
from ssast.engine.data.shards import END_OF_TAR, clip_key, encode_audio, tar_members

END_TOLERANCE_S = 0.1  # by which the named end of a clip may lie behind the end of its file


@dataclass(frozen=True)
class Extraction:
    """What becomes of a recording. Lengths are in samples of the result; `segment` 0 keeps it in one piece. `memory` is
    in bytes.
    """

    sample_rate: int
    codec: str
    segment: int
    hop: int
    min_length: int
    max_length: int
    memory: int


@dataclass(frozen=True)
class Job:
    """Recordings, numbered in the data set from `first` on, that go to the file `tar` from the byte `start` on.

    Each is a `Record` as the tuple of its fields; where its offset is -1, its size is that of the file.
    """

    tar: str
    start: int
    first: int
    recordings: list[tuple[Any, ...]]


class _CannotWriteError(Exception):
    """The shard cannot be written, which no other recording would change."""


def extract(job: Job, settings: Extraction) -> Iterator[dict[str, Any]]:
    """Writes a shard; yields the answers for its recordings, and its hash."""
    try:
        with _writing(job.tar), open(job.tar, "ab", buffering=0) as tar:
            _cut_back(tar, job.start)
            for number, fields in enumerate(job.recordings, job.first):
                recording = Record(fields[0], tuple(fields[1]), *fields[2:])
                start = tar.tell()
                try:
                    ear = Ear()
                    clips = list(_write_clips(tar, number, recording, settings, ear))
                except (_CannotWriteError, ImportError):
                    raise
                except Exception as error:  # decoders' bindings raise all kinds, and one file must not end the run
                    _cut_back(tar, start)
                    yield {"reason": describe(error, settings.memory)}
                else:
                    yield {"clips": clips, "end": tar.tell(), "remarks": ear.remarks()}
            _write(tar, END_OF_TAR)
            os.fsync(tar.fileno())
            with open(job.tar, "rb") as written:
                yield {"sha256": hashlib.file_digest(written, "sha256").hexdigest()}
    except _CannotWriteError as error:
        yield {"fatal": str(error)}
    except ImportError as error:
        yield {"fatal": f"cannot import what decodes audio: {error}"}


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        folder = os.path.dirname(path)
        free = shutil.disk_usage(folder).free / 2**20
        raise _CannotWriteError(f"cannot write to {folder}: {error.strerror} ({free:.0f} MiB free)") from error


def _write(file: IO[bytes], content: bytes) -> None:
    with _writing(file.name), memoryview(content) as view:
        written = 0
        while written < len(view):  # a write without a buffer may be a partial one
            written += file.write(view[written:])


def _cut_back(file: BinaryIO, length: int) -> None:
    with _writing(file.name):
        file.truncate(length)
        file.seek(length)


def _write_clips(tar: BinaryIO, number: int, recording: Record, settings: Extraction, ear: Ear) -> Iterator[list[int]]:
    """Writes the clips of a recording; [piece, offset, size, samples, crc32] of each."""
    rate, size = settings.sample_rate, recording.size
    described = {"label": recording.label_text, "speaker": recording.speaker, "split": recording.split_text}
    described["source"] = recording.source
    with as_file(recording.path, recording.offset, size, folder=os.path.dirname(tar.name)) as file:
        blocks = segment(to_int16(decode(file, size, ear), rate), rate, recording.start, recording.end)
        for piece, start, samples in cut(blocks, settings):
            note = described | {"start_s": recording.start + start / rate, "seconds": len(samples) / rate}
            audio = encode_audio(samples, rate, settings.codec)
            members, audio_at = tar_members(clip_key(number, piece), note, audio, settings.codec)
            audio_at += tar.tell()
            _write(tar, members)
            yield [piece, audio_at, len(audio), len(samples), zlib.crc32(audio)]


@contextlib.contextmanager
def as_file(path: str, offset: int, size: int, folder: str) -> Iterator[str]:
    """The path of a recording that is `size` bytes long. A member of an archive is copied to a nameless file in
    `folder`.

    Raises `Reject` if it is not what it was when the run was planned, or changes meanwhile.
    """
    before = file_status(path)
    if isinstance(before, str):
        raise Reject(before)
    if offset < 0:
        if before[0] != size:
            raise Reject(f"changed while it was being read: {before[0]} bytes instead of {size}")
        yield path
    else:
        with contextlib.ExitStack() as stack:
            with _writing(f"{folder}/."):
                copy = stack.enter_context(
                    tempfile.NamedTemporaryFile(prefix=".", suffix=".tmp", dir=folder, buffering=0)
                )
            _copy_range(path, offset, size, copy)
            yield copy.name
    if file_status(path) != before:
        raise Reject("changed while it was being prepared")


def _copy_range(path: str, offset: int, size: int, copy: IO[bytes]) -> None:
    if not size:
        raise Reject("empty file")
    with open(path, "rb") as file:
        file.seek(offset)
        while size:
            data = file.read(min(size, 1 << 20))
            if not data:
                raise Reject("the archive ends before it")
            _write(copy, data)
            size -= len(data)


def segment(blocks: Iterable[np.ndarray], sample_rate: int, start: float, end: float) -> Iterator[np.ndarray]:
    """What lies between `start` and `end` seconds of a recording, which comes in blocks int16 [n]; it is read to its
    end, so that one that is not whole is noticed. An end up to 0.1 s beyond that of the recording is taken for it.

    Raises `Reject` if the recording is shorter.
    """
    first = round(start * sample_rate)
    last = sys.maxsize if end == math.inf else round(end * sample_rate)
    total = 0
    for block in blocks:
        part = block[max(first - total, 0) : max(last - total, 0)]
        total += len(block)
        if len(part):
            yield part
    if (end < math.inf and total < last - END_TOLERANCE_S * sample_rate) or (first and first >= total):
        named = f"from {start:g} s to " + ("its end" if end == math.inf else f"{end:g} s")
        raise Reject(f"the clip is named as {named}, but the file has {total / sample_rate:g} s")


def cut(blocks: Iterable[np.ndarray], settings: Extraction) -> Iterator[tuple[int, int, np.ndarray]]:
    """Pieces of a recording, which comes in blocks int16 [n]: (number, first sample, int16 [S]); number -1 for a whole
    one.

    Pieces of `segment` samples begin every `hop`. The last one is what is left, if that is `min_length` or more and not
    all in the piece before.

    Raises `Reject` for a recording shorter than `min_length` or longer than `max_length`.
    """
    segment, hop = settings.segment or sys.maxsize, settings.hop
    total, start, number = 0, 0, 0
    # the last of the `total` samples that have come, from `start` on or from where they were cut
    pending: list[np.ndarray] = []
    for block in blocks:
        total += len(block)
        if total > settings.max_length:
            advice = "raise --max-length" if settings.segment else "cut it up by --segment, or raise --max-length"
            raise Reject(f"longer than {settings.max_length / settings.sample_rate:g} s: {advice}")
        pending.append(block.copy())  # the decoder uses its memory again
        if total < start + segment:
            continue
        samples = np.concatenate(pending)
        origin = total - len(samples)
        while total >= start + segment:
            yield number, start, samples[start - origin : start - origin + segment]
            start, number = start + hop, number + 1
        pending = [samples[start - origin :]]
    if total < settings.min_length:
        raise Reject(f"too short: {total} samples at {settings.sample_rate} Hz, the least is {settings.min_length}")
    is_covered = number > 0 and total <= start - hop + segment
    if total - start >= settings.min_length and not is_covered:
        samples = np.concatenate(pending)
        yield number if settings.segment else -1, start, samples[start - (total - len(samples)) :]


def _main(settings: Extraction) -> None:
    serve(settings.memory, lambda job: extract(Job(**job), settings))


if __name__ == "__main__":
    _main(Extraction(**json.loads(sys.argv[1])))
