"""Checks every clip once before training: one broken file costs NVIDIA DALI a whole batch, and a cut WAV comes back
silently short.

Files are decoded to the end by worker processes (probe.py), which may crash, hang or run out of memory without harm;
the verdicts are kept in a cache. What DALI cannot decode, or not faithfully, is converted to a 16 kHz mono FLAC beside
it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ssast.engine.errors import UserError
from ssast.engine.files import write_reasons

from . import probe
from .clips import Clips, Skipped
from .folder import CACHE_FILE
from .probe import file_status
from .record import Record
from .remarks import Remarks
from .workers import Pool

CHECK_VERSION = 3  # raise it when a verdict could differ from before: cached ones are then not used


def check_clips(
    entries: Sequence[Record],
    *,
    cache_dir: Path,
    min_seconds: float = 0.025,
    workers: int | None = None,
    timeout_s: float = 60.0,
    memory_limit_bytes: int = 4 << 30,
    progress: bool = True,
) -> tuple[Clips, list[Skipped]]:
    """Splits `entries` into clips that DALI decodes in full, and files skipped with a reason; both keep the order of
    `entries`.

    Each new or changed file is decoded once, by one of `workers` processes (default: one per CPU) of at most
    `memory_limit_bytes` of address space each, within `timeout_s` seconds. Clips shorter than `min_seconds` are
    skipped. Clips that are silent, or read otherwise than their header says, are kept and named on standard error, a
    line for each kind. Verdicts and converted copies are kept in `cache_dir`; without a usable cache file the check
    still works, with a warning. Timeouts, crashes and read errors are not cached, since they may be the machine's
    fault.

    Raises:
        UserError: `cache_dir` cannot be written, for one because the disk is full.
        RuntimeError: workers cannot start.
    """
    cache_dir = _writable(cache_dir)
    number = {path: i for i, path in enumerate(dict.fromkeys(entry.path for entry in entries))}
    paths = list(number)
    # Per path: size and mtime of the original; frames, rate, channels, size and mtime of the copy (size -1: there is
    # none).
    table = np.zeros((len(paths), 7), dtype=np.int64)
    reasons: dict[int, str] = {}
    remarks: dict[int, str] = {}
    todo: deque[int] = deque()

    def copy_path(i: int) -> str:
        size, mtime_ns = table[i, :2]
        name = hashlib.blake2b(os.fsencode(paths[i]) + f"\0{size}\0{mtime_ns}".encode(), digest_size=16).hexdigest()
        return f"{cache_dir}/converted/{name}.flac"

    def job(i: int) -> list[Any]:
        return [paths[i], *table[i, :2].tolist(), copy_path(i)]

    with contextlib.closing(_Cache(cache_dir / CACHE_FILE)) as cache:
        # What the file system and the cache know.
        for i, row in enumerate(cache.rows(paths)):
            status = file_status(paths[i])
            if isinstance(status, str):
                reasons[i] = status
                continue
            table[i] = *status, 0, 0, 0, -1, 0
            if row is None or row[:2] != status or (row[5] >= 0 and file_status(copy_path(i)) != row[5:7]):
                todo.append(i)
            elif row[7] is not None:
                reasons[i] = row[7]
            else:
                table[i] = row[:7]
                remarks[i] = row[8]

        # What is left to decode.
        bar = tqdm(
            total=len(todo),
            desc="checking clips",
            unit="file",
            smoothing=0.05,
            disable=None if progress and todo else True,
        )
        count = min(workers or len(os.sched_getaffinity(0)), len(todo))
        with bar, contextlib.closing(_probe_all(todo, job, count, timeout_s, memory_limit_bytes)) as verdicts:
            for i, verdict in verdicts:
                if "fatal" in verdict:
                    raise UserError(verdict["fatal"])
                if reason := verdict.get("reason"):
                    reasons[i] = reason
                else:
                    table[i, 2:] = verdict["sound"]
                    remarks[i] = verdict["remark"]
                if not verdict.get("transient"):
                    cache.put(paths[i], [*table[i].tolist(), reason, remarks.get(i, "")])
                bar.update()

    report = Remarks()
    for i in sorted(remarks.keys() - reasons.keys()):
        report.add(paths[i], filter(None, remarks[i].split("\n")))
    print(*report.lines("clips"), sep="\n", end="\n" if report.lines() else "", file=sys.stderr)

    # From paths to entries, which may name one path many times.
    size, _, frames, rate, channels, copy_size, _ = np.ascontiguousarray(table.T)
    needed = np.ceil(min_seconds * rate - 1e-6).astype(np.int64)
    for i in np.flatnonzero(frames < needed).tolist():
        reasons.setdefault(i, f"too short: {frames[i]} samples, one frame needs {needed[i]}")
    skipped = [Skipped(entry.path, reasons[number[entry.path]]) for entry in entries if number[entry.path] in reasons]
    usable = [entry for entry in entries if number[entry.path] not in reasons]
    rows = np.array([number[entry.path] for entry in usable], dtype=np.int64)
    copied = copy_size >= 0
    return Clips(
        paths=[copy_path(i) if copied[i] else paths[i] for i in rows.tolist()],
        sources=[entry.path for entry in usable],
        labels=[entry.label_text for entry in usable],
        splits=[entry.split for entry in usable],
        speakers=[entry.speaker for entry in usable],
        folds=[entry.fold for entry in usable],
        frames=frames[rows],
        sample_rates=rate[rows].astype(np.int32),
        channels=channels[rows].astype(np.int32),
        sizes=np.where(copied, copy_size, size)[rows],
    ), skipped


def write_skipped(path: Path, skipped: Sequence[Skipped]) -> None:
    """Write the skipped files and why as a CSV.

    Raises:
        OSError: it could not be written.
    """
    write_reasons(path, ((item.path, item.reason) for item in skipped))


def _writable(cache_dir: Path) -> Path:
    cache_dir = Path(os.path.abspath(cache_dir))
    try:
        (cache_dir / "converted").mkdir(parents=True, exist_ok=True)
        for folder in (cache_dir, cache_dir / "converted"):
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"the cache folder {cache_dir} cannot be written: {error.strerror}; data.cache_dir names another"
        ) from error
    return cache_dir


class _Cache:
    """Verdicts by path. If SQLite fails, be it for a damaged or a locked file, it warns once and remembers nothing from
    then on.
    """

    _TABLE = f"checked_{CHECK_VERSION}"

    def __init__(self, path: Path) -> None:
        self._path, self._committed = path, time.monotonic()
        self._db: sqlite3.Connection | None = None
        self._rows: list[tuple] = []
        with self._guard():
            self._db = sqlite3.connect(path, timeout=10)
            columns = "path BLOB PRIMARY KEY, size, mtime, frames, rate, channels, copy_size, copy_mtime, reason"
            columns += ", remark"
            self._db.execute(f"CREATE TABLE IF NOT EXISTS {self._TABLE} ({columns})")

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            self._db = None
            hint = "" if "locked" in str(error) else "; delete it to have it made anew"
            warnings.warn(
                f"the cache of checked clips {self._path} cannot be used ({error}): going on without{hint}",
                stacklevel=2,
            )

    def rows(self, paths: list[str]) -> Iterator[tuple | None]:
        """For each path (size, mtime, frames, rate, channels, copy size, copy mtime, reason, remark), or None if it is
        not known.
        """
        for start in range(0, len(paths), 500):
            batch, rows = [os.fsencode(path) for path in paths[start : start + 500]], {}
            with self._guard():
                if self._db is not None:
                    query = f"SELECT * FROM {self._TABLE} WHERE path IN ({','.join('?' * len(batch))})"
                    rows = {row[0]: row[1:] for row in self._db.execute(query, batch)}
            yield from map(rows.get, batch)

    def put(self, path: str, row: list) -> None:
        self._rows.append((os.fsencode(path), *row))
        if time.monotonic() - self._committed > 2:  # a kill loses no more than this
            self._commit()

    def _commit(self) -> None:
        with self._guard():
            if self._db is not None and self._rows:
                self._db.executemany(f"INSERT OR REPLACE INTO {self._TABLE} VALUES ({', '.join('?' * 10)})", self._rows)
                self._db.commit()
        self._rows, self._committed = [], time.monotonic()

    def close(self) -> None:
        self._commit()
        if self._db is not None:
            self._db.close()


def _probe_all(
    todo: deque[int], job: Callable[[int], list[Any]], count: int, timeout_s: float, memory_limit_bytes: int
) -> Generator[tuple[int, dict[str, Any]], None, None]:
    """(number, verdict) of all that is to do, as they come, from `count` workers; closing the generator ends them."""
    with contextlib.closing(Pool(probe.__file__, [str(memory_limit_bytes)], timeout_s)) as pool:
        while todo or pool.workers:
            while todo and len(pool.workers) < count:
                pool.start()
            for worker, answers, end in pool.wait():
                for verdict in answers:
                    yield worker.number, verdict
                if end:
                    yield worker.number, {"reason": end, "transient": True}
                elif todo:
                    number = todo.popleft()
                    worker.send(number, job(number))
                else:
                    pool.stop(worker)
