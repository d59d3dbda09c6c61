"""What `ssast prepare` is to do: its settings, and the plan, which is all recordings in a fixed order, cut into shards
by their bytes. The plan depends on the recordings and the settings alone.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from ssast.engine.errors import UserError

from .extract import Extraction
from .probe import file_status
from .record import Record
from .sources import read_source

SHARDS_AIMED_AT = 64  # of a small data set, so that all cores have work
LEAST_SHARD = 16 << 20  # bytes


@dataclass(frozen=True)
class Settings:
    """The options that decide what a prepared folder holds. Lengths are in seconds; a `segment` of 0 keeps recordings
    whole.
    """

    sources: list[str]
    layout: str = "auto"
    sample_rate: int = 16_000
    codec: str = "wav"
    segment: float = 0.0
    hop: float = 0.0
    min_length: float = 0.025
    max_length: float = 0.0
    shard_size: int = 0

    def extraction(self, memory: int) -> Extraction:
        """The same for the processes, in samples; `memory` is in bytes of address space each."""

        def samples(seconds: float) -> int:
            return round(seconds * self.sample_rate)

        return Extraction(
            sample_rate=self.sample_rate,
            codec=self.codec,
            segment=samples(self.segment),
            hop=samples(self.hop),
            min_length=max(1, math.ceil(self.min_length * self.sample_rate - 1e-6)),
            max_length=samples(self.max_length),
            memory=memory,
        )


@dataclass
class Plan:
    """All recordings in their order; shard i is those from `starts[i]` up to `starts[i + 1]`."""

    recordings: list[Record]
    starts: list[int]

    def summary(self) -> dict[str, Any]:
        """What two runs on the same sources have in common."""
        digest = hashlib.sha256()
        for recording in self.recordings:
            digest.update("\0".join(map(str, _order(recording))).encode("utf-8", "surrogatepass") + b"\n")
        size = sum(max(0, recording.size) for recording in self.recordings)
        return {"files": len(self.recordings), "bytes": size, "sha256": digest.hexdigest()}

    def shard(self, number: int) -> list[Record]:
        """The recordings of one shard."""
        return self.recordings[self.starts[number] : self.starts[number + 1]]


def make_plan(settings: Settings) -> Plan:
    """Find all recordings, and write to standard error what each source holds.

    Raises:
        UserError: a source cannot be read.
    """
    records: list[Record] = []
    for source in settings.sources:
        part = read_source(source, settings.layout)
        count = f"{source}: {part.kind}, {len(part.records)} recordings"
        print(count, *part.remarks, *part.notes, sep="; ", file=sys.stderr)
        records += part.records
    sizes = _sizes([recording.path for recording in records if recording.offset < 0])
    recordings = sorted({replace(r, size=next(sizes)) if r.offset < 0 else r for r in records}, key=_order)
    if len(recordings) < len(records):
        print(f"{len(records) - len(recordings)} recordings were named twice", file=sys.stderr)
    total = sum(max(0, recording.size) for recording in recordings)
    limit = settings.shard_size or min(max(total // SHARDS_AIMED_AT, LEAST_SHARD), 1 << 30)
    starts, size = [0], 0
    for number, recording in enumerate(recordings):
        if size and size + recording.size > limit:
            starts.append(number)
            size = 0
        size += max(0, recording.size)
    return Plan(recordings, [*starts, len(recordings)])


def _order(record: Record) -> tuple[Any, ...]:
    """What recordings are sorted by, and what tells the sources of two runs apart."""
    names = (record.source, record.path, record.offset, record.size)
    part = (record.start, record.end) if record.is_segment else ()
    return *names, record.label_text, record.speaker, record.split_text, *part


def _sizes(paths: list[str]) -> Iterator[int]:
    """Bytes of each file, -1 where there is none; by threads, since disks elsewhere take their time to say."""

    def measure(start: int) -> list[int]:
        statuses = map(file_status, paths[start : start + 1000])
        return [-1 if isinstance(status, str) else status[0] for status in statuses]

    with ThreadPoolExecutor(16) as pool:
        chunks = list(pool.map(measure, range(0, len(paths), 1000)))
    return (size for chunk in chunks for size in chunk)


def require_sense(settings: Settings) -> None:
    """Refuses settings that contradict each other or that no recording can meet.

    Raises:
        UserError: naming the option.
    """
    least = 1 / settings.sample_rate if settings.sample_rate > 0 else 0
    for is_wrong, message in (
        (
            not 4_000 <= settings.sample_rate <= 192_000,
            f"--sample-rate {settings.sample_rate}: expected 4000 to 192000 Hz",
        ),
        (
            settings.segment and settings.segment < settings.min_length,
            "--segment is shorter than --min-length: nothing would be left",
        ),
        (settings.segment and settings.hop < least, f"--hop {settings.hop:g}: expected more than 0 s"),
        (
            settings.max_length < max(settings.min_length, least),
            f"--max-length {settings.max_length:g}: shorter than --min-length",
        ),
        (settings.min_length < 0, f"--min-length {settings.min_length:g}: expected 0 s or more"),
        (settings.shard_size < 0, f"--shard-size {settings.shard_size}: expected 1 byte or more"),
    ):
        if is_wrong:
            raise UserError(message)
