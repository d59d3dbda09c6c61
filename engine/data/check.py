"""Checks every clip once before training: one broken file costs NVIDIA DALI a whole batch, and a cut WAV comes back silently short.

Files are decoded to the end by worker processes (this file run as a script), which may crash, hang or run out of memory without
harm; the verdicts are kept in a cache. What DALI cannot decode, or not faithfully, is converted to a 16 kHz mono FLAC beside it.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import hashlib
import io
import itertools
import json
import math
import os
import resource
import selectors
import shutil
import signal
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile

if __name__ != "__main__":  # workers run this file as a script: they need neither, and the package would import torch
    from ssast.engine.data.manifest import CACHE_FILE, Entry
    from ssast.engine.errors import UserError

CHECK_VERSION = 1  # raise it when a verdict could differ from before: cached ones are then not used
COPY_RATE = 16_000  # Hz
MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz
MAX_PEAK = 1_000.0  # full scale is 1: beyond this, samples are finite but no audio

# What DALI's decoder (libsndfile without MP3) returns equal to libsndfile as int16. It also opens AIFF, AU, CAF and others, but
# there nothing would tell a cut file from a whole one; and one-channel float files come back as -1, 0 and 1, that is as silence.
_PCM = {"PCM_U8", "PCM_16", "PCM_24", "PCM_32", "ULAW", "ALAW"}
DALI_FORMATS = {"WAV": _PCM, "WAVEX": _PCM, "RF64": _PCM, "FLAC": {"PCM_S8", "PCM_16", "PCM_24"}, "OGG": {"VORBIS", "OPUS"}}

# FFmpeg's demuxers for audio files. The others are kept out: text and images are not audio, and playlists open other files.
_DEMUXERS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,gsm,iff,ircam,loas,matroska,mov,mp3,mpc,mpc8,mpeg,"
    "nistsphere,nut,ogg,oma,paf,pvf,rm,sds,shn,sox,tak,tta,voc,w64,wav,wv"
)
_GUESSED_DURATION = {"aac", "ac3", "amr", "dts", "eac3", "loas", "mp3", "mpeg"}  # from the bit rate of the beginning


@dataclass(frozen=True, eq=False)
class Clips:
    """The clips that passed, one array or list per column.

    `paths` is what to open: the original, or its converted copy; `sources` the original. `frames` int64 [N] counts samples per
    channel of `paths`, at its own `sample_rates` int32 [N] in Hz, with `channels` int32 [N]. `sizes` int64 [N] in bytes and
    `mtimes_ns` int64 [N] in ns are those of `paths` when they were checked.
    """

    paths: list[str]
    sources: list[str]
    labels: list[str]
    splits: list[str]
    frames: np.ndarray
    sample_rates: np.ndarray
    channels: np.ndarray
    sizes: np.ndarray
    mtimes_ns: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, index: np.ndarray) -> Clips:
        """The clips at `index` (numbers in any order, or a bool mask [N])."""
        index = np.arange(len(self))[index]
        texts = ([column[i] for i in index] for column in (self.paths, self.sources, self.labels, self.splits))
        return Clips(*texts, *(a[index] for a in (self.frames, self.sample_rates, self.channels, self.sizes, self.mtimes_ns)))

    @property
    def hours(self) -> float:
        return float((self.frames / self.sample_rates).sum() / 3600)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that training goes without, and why."""

    path: str
    reason: str


def check_clips(
    entries: Sequence[Entry],
    *,
    cache_dir: Path,
    min_seconds: float = 0.025,
    workers: int | None = None,
    timeout_s: float = 60.0,
    memory_limit_bytes: int = 4 << 30,
    progress: bool = True,
) -> tuple[Clips, list[Skipped]]:
    """Splits `entries` into clips that DALI decodes in full, and files skipped with a reason; both keep the order of `entries`.

    Each new or changed file is decoded once, by one of `workers` processes (default: one per CPU) of at most `memory_limit_bytes`
    of address space each, within `timeout_s` seconds. Clips shorter than `min_seconds` are skipped. Verdicts and converted copies
    are kept in `cache_dir`; without a usable cache file the check still works, with a warning. Timeouts, crashes and read errors
    are not cached, since they may be the machine's fault.

    Raises `UserError` if `cache_dir` cannot be written, for one if the disk is full, and `RuntimeError` if workers cannot start.
    """
    cache_dir = _writable(cache_dir)
    number = {path: i for i, path in enumerate(dict.fromkeys(entry.path for entry in entries))}
    paths = list(number)
    # Per path: size and mtime of the original; frames, rate, channels, size and mtime of the copy (size -1: there is none).
    table = np.zeros((len(paths), 7), dtype=np.int64)
    table[:, 5] = -1
    reasons: dict[int, str] = {}
    cache = _Cache(cache_dir / CACHE_FILE)
    try:
        todo = _look_up(paths, table, reasons, cache, cache_dir)
        config = {"cache": str(cache_dir), "memory": memory_limit_bytes}
        count = min(workers or len(os.sched_getaffinity(0)), len(todo))
        with _progress_bar(len(todo), progress) as advance, contextlib.closing(_decode_all(todo, config, count, timeout_s)) as news:
            for i, verdict in news:
                if reason := verdict.get("reason"):
                    reasons[i] = reason
                else:
                    table[i, 2:] = verdict["sound"]
                if not verdict.get("transient"):
                    cache.put(os.fsencode(paths[i]), [*table[i].tolist(), verdict.get("reason")])
                advance()
    finally:
        cache.close()

    needed = np.ceil(min_seconds * table[:, 3] - 1e-6).astype(np.int64)
    for i in np.flatnonzero(table[:, 2] < needed):
        reasons.setdefault(int(i), f"too short: {table[i, 2]} samples, one frame needs {needed[i]}")
    skipped = [Skipped(entry.path, reasons[number[entry.path]]) for entry in entries if number[entry.path] in reasons]
    kept = [entry for entry in entries if number[entry.path] not in reasons]
    rows = table[[number[entry.path] for entry in kept]]
    copied = rows[:, 5] >= 0
    opened = [_copy_path(cache_dir, e.path, *row[:2]) if copy else e.path for e, row, copy in zip(kept, rows, copied, strict=True)]
    columns = rows[:, 2].copy(), rows[:, 3].astype(np.int32), rows[:, 4].astype(np.int32)
    columns += np.where(copied, rows[:, 5], rows[:, 0]), np.where(copied, rows[:, 6], rows[:, 1])
    return Clips(opened, [e.path for e in kept], [e.label for e in kept], [e.split for e in kept], *columns), skipped


def write_skipped(path: Path, skipped: Sequence[Skipped]) -> None:
    """Writes a CSV of path and reason to `path`; it appears whole or not at all. Raises `OSError` if it cannot be written."""
    aside = f"{path}.{os.getpid()}.tmp"
    with open(aside, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file).writerows([("path", "reason"), *((item.path, item.reason) for item in skipped)])
    os.replace(aside, path)


def _writable(cache_dir: Path) -> Path:
    cache_dir = Path(os.path.abspath(cache_dir))
    try:
        (cache_dir / "converted").mkdir(parents=True, exist_ok=True)
        for folder in (cache_dir, cache_dir / "converted"):
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"the cache folder {cache_dir} cannot be written: {error.strerror}") from error
    return cache_dir


def _copy_path(cache_dir: Path | str, path: str, size: int, mtime_ns: int) -> str:
    name = hashlib.blake2b(os.fsencode(path) + f"\0{size}\0{mtime_ns}".encode(), digest_size=16).hexdigest()
    return f"{cache_dir}/converted/{name}.flac"


@contextlib.contextmanager
def _progress_bar(total: int, wanted: bool) -> Iterator[Callable[[], Any]]:
    if not (total and wanted and sys.stderr.isatty()):
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="checking clips", unit="file", smoothing=0.05) as bar:
        yield bar.update


def _look_up(paths: list[str], table: np.ndarray, reasons: dict[int, str], cache: _Cache, cache_dir: Path) -> deque[tuple]:
    """Fills in what the file system and the cache know; the rest comes back as jobs (number, path, size, mtime)."""
    todo: deque[tuple] = deque()
    for start in range(0, len(paths), 500):
        batch = paths[start : start + 500]
        cached = cache.get([os.fsencode(path) for path in batch])
        for i, path in enumerate(batch, start):
            status = _status(path)
            if isinstance(status, str):
                reasons[i] = status
                continue
            table[i, :2] = status
            row = cached.get(os.fsencode(path))
            if row is None or row[:2] != status or (row[5] >= 0 and _status(_copy_path(cache_dir, path, *status)) != row[5:7]):
                todo.append((i, path, *status))
            elif row[7] is not None:
                reasons[i] = row[7]
            else:
                table[i] = row[:7]
    return todo


def _status(path: str) -> tuple[int, int] | str:
    """(size, mtime in ns) of a file worth opening, or what is wrong with it."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return "broken symbolic link" if os.path.islink(path) else "no such file"
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        return f"unreadable: {getattr(error, 'strerror', error)}"
    if not stat.S_ISREG(status.st_mode):
        return "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
    return (status.st_size, status.st_mtime_ns) if status.st_size else "empty file"


class _Cache:
    """Verdicts by path. If SQLite fails, be it for a damaged or a locked file, it warns once and remembers nothing from then on."""

    _TABLE = f"checked_{CHECK_VERSION}"

    def __init__(self, path: Path) -> None:
        self._path, self._db, self._rows, self._committed = path, None, [], time.monotonic()
        with self._guard():
            self._db = sqlite3.connect(path, timeout=10)
            columns = "path BLOB PRIMARY KEY, size, mtime, frames, rate, channels, copy_size, copy_mtime, reason"
            self._db.execute(f"CREATE TABLE IF NOT EXISTS {self._TABLE} ({columns})")

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            self._db = None
            hint = "" if "locked" in str(error) else "; delete it to have it made anew"
            warnings.warn(f"the cache of checked clips {self._path} cannot be used ({error}): going on without{hint}", stacklevel=2)

    def get(self, paths: list[bytes]) -> dict[bytes, tuple]:
        """Rows (size, mtime, frames, rate, channels, copy size, copy mtime, reason) of at most 500 paths."""
        with self._guard():
            if self._db is not None:
                query = f"SELECT * FROM {self._TABLE} WHERE path IN ({','.join('?' * len(paths))})"
                return {row[0]: row[1:] for row in self._db.execute(query, paths)}
        return {}

    def put(self, path: bytes, row: list) -> None:
        self._rows.append((path, *row))
        if time.monotonic() - self._committed > 2:  # a kill loses no more than this
            self._commit()

    def _commit(self) -> None:
        with self._guard():
            if self._db is not None and self._rows:
                self._db.executemany(f"INSERT OR REPLACE INTO {self._TABLE} VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", self._rows)
                self._db.commit()
        self._rows, self._committed = [], time.monotonic()

    def close(self) -> None:
        self._commit()
        if self._db is not None:
            self._db.close()


# The parent's side of the workers. One line of JSON each way: a chunk of files there, one verdict per file back.


class _Worker:
    """One process, and the chunk of files it has been sent."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.jobs: deque[tuple] = deque()  # the first one is being decoded
        self.ready, self.since, self._partial = False, time.monotonic(), b""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        # The child finds the same packages as this process, but not what happens to lie in the current folder; one thread each.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-P", __file__, json.dumps(config)]
        # A session of its own: Ctrl-C reaches this process alone, which then ends the worker.
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._stderr}
        self.process = subprocess.Popen(command, **pipes, env=env, bufsize=0, start_new_session=True)

    def send(self, jobs: list[tuple]) -> None:
        # Only an idle worker is sent to, and it is reading: the pipe cannot fill up and block this process.
        self.jobs.extend(jobs)
        self.since = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # its end is seen by reading
            self.process.stdin.write(json.dumps([job[1:] for job in jobs]).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Verdicts that have come in; None when the worker has ended."""
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        if not data:
            return None
        self.since, self.ready = time.monotonic(), True
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [json.loads(line) for line in lines if line]

    def deadline(self, timeout_s: float) -> float:
        """When the file in hand has taken too long, in seconds of the monotonic clock; a minute at least is granted to start."""
        return self.since + (timeout_s if self.ready else max(60.0, timeout_s))

    def stop(self) -> str:
        """Ends the process; how it ended, and what it complained of."""
        self.process.kill()
        code = self.process.wait()
        self._stderr.seek(0)
        complaint = self._stderr.read()[-2000:].decode(errors="replace").strip()
        for pipe in (self.process.stdin, self.process.stdout, self._stderr):
            pipe.close()
        self.end = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return complaint


def _decode_all(todo: deque[tuple], config: dict[str, Any], count: int, timeout_s: float) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, verdict) of every job, as they come; closing the generator ends the workers."""
    pool: set[_Worker] = set()
    selector = selectors.DefaultSelector()

    def hire() -> None:
        worker = _Worker(config)
        pool.add(worker)
        selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def dismiss(worker: _Worker) -> str:
        selector.unregister(worker.process.stdout)
        pool.remove(worker)
        return worker.stop()

    def feed(worker: _Worker) -> None:
        # A file a time at the end, so that no worker sits on a pile while the others have none.
        size = min(16, -(-len(todo) // (4 * count)))
        if size:
            worker.send([todo.popleft() for _ in range(size)])
        else:
            dismiss(worker)

    def replace(worker: _Worker, reason: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """The file that ended a worker is given up, the rest of its chunk goes on to others."""
        complaint = dismiss(worker)
        if not worker.ready:
            raise RuntimeError(f"the process that checks clips did not start ({worker.end}): {complaint}")
        if worker.jobs:
            yield worker.jobs.popleft()[0], {"reason": reason.format(end=worker.end), "transient": True}
            todo.extendleft(reversed(worker.jobs))
        if todo:
            hire()

    try:
        for _ in range(count):
            hire()
        while pool:
            wait = min(worker.deadline(timeout_s) for worker in pool) - time.monotonic()
            heard = [key.data for key, _ in selector.select(max(0.0, wait))]
            for worker in heard:
                replies = worker.receive()
                if replies is None:
                    yield from replace(worker, "decoder crashed ({end})")
                    continue
                for reply in replies:
                    if "fatal" in reply:
                        raise UserError(reply["fatal"])
                    yield worker.jobs.popleft()[0], reply
                if worker.ready and not worker.jobs:
                    feed(worker)
            late = [worker for worker in pool if worker not in heard and worker.deadline(timeout_s) <= time.monotonic()]
            for worker in late:
                yield from replace(worker, f"took longer than {timeout_s:g} s")
    finally:
        for worker in pool:
            worker.stop()
        selector.close()


# The worker's side.


class _Reject(Exception):
    """The file cannot be used; the message is the reason that the user reads."""


class _CannotWriteError(Exception):
    """The copy cannot be written, which no other file would change."""


def _serve(config: dict[str, Any]) -> None:
    """Reads chunks of [path, size, mtime] from standard input until it ends, and answers every file by a line."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what decoders print must not get between the answers
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: dies with its parent, even in the middle of a file
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (config["memory"], config["memory"]))
    answers.write("\n")  # ready
    for line in sys.stdin.buffer:
        for path, size, mtime_ns in json.loads(line):
            answers.write(json.dumps(_verdict(path, size, mtime_ns, config)) + "\n")


def _verdict(path: str, size: int, mtime_ns: int, config: dict[str, Any]) -> dict[str, Any]:
    """`sound` (frames, rate, channels, size and mtime of the copy), or `reason`, `transient` if it may go away by itself."""
    try:
        sound = _inspect(path, size, _copy_path(config["cache"], path, size, mtime_ns))
        if _status(path) != (size, mtime_ns):
            return {"reason": "changed while it was being checked", "transient": True}
        return {"sound": sound}
    except _Reject as reject:
        return {"reason": str(reject)}
    except MemoryError:
        return {"reason": f"needs more than {config['memory'] / 2**30:.1f} GiB of memory to decode", "transient": True}
    except _CannotWriteError as error:
        return {"fatal": str(error)}
    except ImportError as error:
        return {"fatal": f"cannot import what decodes audio: {error}"}
    except OSError as error:
        return {"reason": f"unreadable: {error.strerror or error}", "transient": True}
    except Exception as error:  # decoders' bindings raise all kinds, and one file must not end the check
        return {"reason": f"cannot be decoded: {type(error).__name__}: {error}", "transient": True}


def _inspect(path: str, size: int, copy: str) -> list[int]:
    with open(path, "rb") as file:
        magic = file.read(4)
        unknown_length = magic in (b"RIFF", b"RIFX", b"RF64", b"BW64") and _check_riff(file, size)
        if magic == b"OggS":
            _check_ogg(file, size)
    problem = ""
    try:
        with soundfile.SoundFile(os.fsencode(path)) as sound:
            native = sound.subtype in DALI_FORMATS.get(sound.format, ()) and not unknown_length
            if native and sound.frames < 2**62:  # a FLAC written to a pipe knows no length, and DALI then decodes nothing
                _check_rate(sound.samplerate)
                frames, peak = _scan(sound)
                # One-channel Vorbis and Opus beyond full scale wrap around in the int16 that DALI asks libsndfile for.
                if peak <= 1 or sound.channels > 1:
                    return [frames, sound.samplerate, sound.channels, -1, 0]
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: named .raw
        known = magic in (b"RIFF", b"RF64", b"fLaC", b"OggS", b"FORM") and "not recognised" not in str(error)
        problem = _message(error) if known and isinstance(error, soundfile.LibsndfileError) else _UNKNOWN
    return _convert(path, copy, problem)


_UNKNOWN = "format not recognised"


def _message(error: soundfile.LibsndfileError) -> str:
    """libsndfile's message without "Error : " and the full stop."""
    return error.error_string.rpartition("rror : ")[2].rstrip(".")


def _check_rate(rate: int) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise _Reject(f"sample rate of {rate} Hz, outside {MIN_RATE} to {MAX_RATE}")


def _check_samples(samples: np.ndarray) -> tuple[float, int]:
    """Peak, and how many samples are not finite."""
    peak = float(np.abs(samples).max(initial=0.0))
    if math.isfinite(peak):
        if peak > MAX_PEAK:
            raise _Reject(f"absurd samples: peak {peak:.3g} where 1 is full scale")
        return peak, 0
    return 0.0, int(samples.size - np.count_nonzero(np.isfinite(samples)))


def _check_riff(file: BinaryIO, size: int) -> bool:
    """Rejects a WAV whose `data` chunk claims more than the file holds; True if the samples are there, but the chunk says none.

    Placeholders that writers to a pipe leave, all ones or about 2^31, mean that the length is unknown: what is there counts.
    """
    file.seek(0)
    header = file.read(12).ljust(12, b"\0")
    order = ">" if header.startswith(b"RIFX") else "<"
    align, tag, long_size = 0, 0, 0
    for _ in range(10_000):
        name, length = struct.unpack(f"{order}4sI", file.read(8).ljust(8, b"\0"))
        body = file.tell()
        if name == b"data" or body >= size:
            break
        content = file.read(min(length, 24))
        if name == b"fmt ":
            tag, channels, _, _, align, bits = struct.unpack(f"{order}HHIIHH", content[:16].ljust(16, b"\0"))
            if tag in (1, 3, 0xFFFE) and 0 < align < channels * -(-bits // 8):
                raise _Reject(f"contradictory header: {channels} channels of {bits} bits in {align} bytes")
        elif name == b"ds64":
            long_size = int.from_bytes(content[8:16], "little")
        file.seek(body + length + length % 2)
    if name != b"data":
        return False  # libsndfile says what is wrong
    held = size - body
    if header.startswith((b"RF64", b"BW64")) and length == 0xFFFFFFFF:
        length, unknown = long_size, long_size >= 2**63
    else:
        unknown = 0x7FFF0000 <= length <= 0x80000000 or length >= 0xFFFF0000
    align = max(align, 1)
    if length // align > held // align and not unknown:
        unit, per = ("samples", align) if tag in (1, 3, 6, 7, 0xFFFE) else ("bytes", 1)
        raise _Reject(f"truncated: header says {length // per} {unit}, file holds {held // per}")
    # Nothing claimed at the end of a RIFF that claims to end here, or anywhere: the writer never came back to fill in the sizes.
    riff_end = struct.unpack_from(f"{order}I", header, 4)[0] + 8
    return length == 0 and held >= align and (riff_end <= body or riff_end >= 0x7FFF0000)


def _check_ogg(file: BinaryIO, size: int) -> None:
    """Rejects an Ogg file without the page that ends the stream."""
    file.seek(max(0, size - 2 * 65_307))  # the largest page, twice
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    table = page[27 : 27 + page[26]] if len(page) > 26 else b""
    if len(page) < 27 + len(table) + sum(table) or not page[5] & 4:
        raise _Reject("truncated: the end of the Ogg stream is missing")


def _scan(sound: soundfile.SoundFile) -> tuple[int, float]:
    """Decodes all of a file: (frames, peak), the peak of integer formats being 1."""
    kind = "float32" if sound.format == "OGG" else "int16"
    block = np.empty((max(1, (1 << 18) // sound.channels), sound.channels), dtype=kind)
    frames, peak, bad = 0, 1.0 if kind == "int16" else 0.0, 0
    try:
        while got := sound.buffer_read_into(block, kind):
            frames += got
            if kind == "float32":
                block_peak, block_bad = _check_samples(block[:got])
                peak, bad = max(peak, block_peak), bad + block_bad
    except soundfile.LibsndfileError as error:
        raise _Reject(f"truncated or damaged: header says {sound.frames} samples, decoding failed ({_message(error)})") from error
    if bad:
        raise _Reject(f"NaN or infinite samples ({bad})")
    if frames != sound.frames:
        raise _Reject(f"truncated: header says {sound.frames} samples, {frames} can be decoded")
    if not frames:
        raise _Reject("no samples")
    return frames, peak


def _convert(path: str, copy: str, problem: str) -> list[int]:
    """Writes what FFmpeg decodes of the first audio stream to `copy`: 16 kHz, the mean of the channels, 16-bit FLAC.

    `problem` says why libsndfile could not open the file, "" if it could.
    """
    import av  # only some data sets need it

    content = io.BytesIO()
    try:
        options = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"}
        with av.open(path, container_options=options, metadata_errors="ignore") as container:
            if not container.streams.audio or container.streams.audio[0].codec_context is None:
                raise _Reject("no audio stream that can be decoded")
            sound = _Sound(container)
            with soundfile.SoundFile(content, "w", COPY_RATE, 1, "PCM_16", format="FLAC") as flac:
                for samples in _resampled(sound.mono()):
                    flac.write(samples)
            sound.require_whole(path, problem)
    except MemoryError:
        raise
    except av.FFmpegError as error:
        raise _Reject(f"not audio: {problem or error.strerror}") from error
    content.seek(0)
    with soundfile.SoundFile(content) as flac:  # what could not be written would not show otherwise
        frames, _ = _scan(flac)
    status = _write_copy(copy, content)
    return [frames, COPY_RATE, 1, status.st_size, status.st_mtime_ns]


def _write_copy(copy: str, content: io.BytesIO) -> os.stat_result:
    aside = f"{copy}.{os.getpid()}.tmp"
    try:
        try:
            with open(aside, "wb") as file:
                file.write(content.getbuffer())
            os.replace(aside, copy)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside)
        return os.stat(copy)
    except OSError as error:
        folder = os.path.dirname(copy)
        free = shutil.disk_usage(folder).free / 2**20
        raise _CannotWriteError(f"cannot write converted clips to {folder}: {error.strerror} ({free:.0f} MiB free)") from error


class _Sound:
    """The first audio stream of a container, decoded past errors as players do."""

    def __init__(self, container: Any) -> None:
        self._container, self._stream = container, container.streams.audio[0]
        self._seconds, self._errors, self._bad = 0.0, 0, 0

    def mono(self) -> Iterator[tuple[np.ndarray, int]]:
        """Blocks (mean of the channels [n], full scale 1; rate in Hz)."""
        for frame in self._frames():
            _check_rate(frame.sample_rate)
            samples = _to_float(frame)
            self._bad += _check_samples(samples)[1]
            self._seconds += frame.samples / frame.sample_rate
            if not self._bad:
                yield samples.mean(axis=0), frame.sample_rate

    def _frames(self) -> Iterator[Any]:
        import av

        packets = self._container.demux(self._stream)
        packet: Any = True
        while packet is not None:
            try:
                packet = next(packets, None)
                yield from packet.decode() if packet is not None else ()
            except MemoryError:
                raise
            except av.FFmpegError:
                self._errors += 1

    def require_whole(self, path: str, problem: str) -> None:
        """Rejects what was not decoded in full; called at the end."""
        if self._bad:
            raise _Reject(f"NaN or infinite samples ({self._bad})")
        claimed = self._claimed_seconds(path)
        if not self._seconds:
            empty = not problem or (problem == _UNKNOWN and claimed)
            raise _Reject("no samples" if empty else f"not audio: {problem}")
        if claimed - self._seconds > max(0.5, 0.1 * claimed):
            raise _Reject(f"truncated: header says {claimed:.1f} s, {self._seconds:.1f} s can be decoded")

    def _claimed_seconds(self, path: str) -> float:
        """Duration by the header; 0 where FFmpeg made it up from the bit rate, unless errors while decoding lend it weight."""
        if self._container.format.name in _GUESSED_DURATION and not self._errors:
            with open(path, "rb") as file:
                head = file.read(1 << 18)
            if b"Xing" not in head and b"Info" not in head:  # the frame count of an MP3
                return 0.0
        if self._stream.duration is not None:
            return float(self._stream.duration * self._stream.time_base)
        alone = len(self._container.streams) == 1  # otherwise it may be that of a longer video
        return (self._container.duration or 0) / 1e6 if alone else 0.0


def _to_float(frame: Any) -> np.ndarray:
    """Samples [channels, n], full scale 1."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "i":
        return samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    return samples


def _resampled(blocks: Iterator[tuple[np.ndarray, int]]) -> Iterator[np.ndarray]:
    """int16 [m] at 16 kHz, clipped, from mono blocks [n] at any rate, which may change where streams are chained."""
    import av

    resampler, before = None, 0
    for mono, rate in itertools.chain(blocks, [(np.empty(0), 0)]):
        frames = []
        if rate != before:
            frames = resampler.resample(None) if resampler else []
            resampler, before = av.AudioResampler("fltp", "mono", COPY_RATE), rate
        if mono.size:
            frame = av.AudioFrame.from_ndarray(mono[None].astype(np.float32), format="fltp", layout="mono")
            frame.sample_rate = rate
            frames += resampler.resample(frame)
        for frame in frames:
            yield np.clip(np.rint(frame.to_ndarray()[0] * 32768), -32768, 32767).astype(np.int16)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
