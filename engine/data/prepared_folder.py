"""A prepared folder in the making: its lock, which of its shards are finished, and what is written when all are.

A run that was killed starts again with the shards that are not there: when a shard is whole, and on disk, what is in it
is written beside it, in `shards/.NNNNN.json`. `unfinished.json` says for which settings and recordings the folder is;
`dataset.json` takes its place at the end.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import soundfile
from filelock import FileLock, Timeout
from tqdm import tqdm

from ssast.engine.errors import UserError
from ssast.engine.files import write_reasons, write_whole

from .prepare_plan import Plan, Settings
from .remarks import Remarks
from .shards import DESCRIPTION, END_OF_TAR, FORMAT, NUMBERS, UNFINISHED, Index, clip_key, load_index, shard_name
from .statistics import NUM_MEL_BINS, evenly_picked, feature_statistics

LOCK_FILE = ".lock"
STATISTICS_CLIPS, STATISTICS_SECONDS = 2048, 10.24
HISTOGRAM_EDGES_S = (0, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 12.5, 15, 20, 30, 60, 120, 300, 600, 1800, 3600)


class Part(TypedDict):
    """What is written down of a finished shard."""

    clips: list[list[int]]  # [recording, piece, offset, size, samples, crc32] of each
    rejected: list[tuple[int, str]]  # (recording, reason)
    remarks: NotRequired[list[tuple[int, str]]]  # (recording, remark); older versions wrote none
    bytes: int
    sha256: str


@dataclass
class UnfinishedShard:
    """A shard in the making."""

    number: int
    first: int
    count: int
    clips: list[list[int]] = field(default_factory=list)
    rejected: list[tuple[int, str]] = field(default_factory=list)
    remarks: list[tuple[int, str]] = field(default_factory=list)
    done: int = 0
    end: int = 0
    failed: int = -1  # the recording that the process before ended with
    sha256: str = ""

    def take(self, answer: dict[str, Any]) -> None:
        """An answer of the process that writes it, as extract.py describes them: of the next recording, or the hash."""
        if "sha256" in answer:
            self.sha256 = answer["sha256"]
            return
        recording = self.first + self.done
        if "reason" in answer:
            self.rejected.append((recording, answer["reason"]))
        else:
            self.clips += [[recording, *clip] for clip in answer["clips"]]
            self.remarks += [(recording, text) for text in answer["remarks"]]
            self.end = answer["end"]
        self.done += 1

    def fail(self, end: str) -> None:
        """The process has ended, or was ended, with a recording in hand, which gets a second chance.

        Raises:
            UserError: it had no recording in hand, so that none is to blame.
        """
        if self.done == self.count:
            raise UserError(f"a process that writes shards has ended ({end}): run the same command again to resume")
        if self.failed == self.done:
            self.take({"reason": f"{end}, twice"})
        else:
            self.failed = self.done

    def part(self) -> Part:
        """What is written down of it once it is whole."""
        return {
            "clips": self.clips,
            "rejected": self.rejected,
            "remarks": self.remarks,
            "bytes": self.end + len(END_OF_TAR),
            "sha256": self.sha256,
        }


class Folder:
    """A prepared folder in the making, at `path`; no other run can begin on it until it is closed."""

    def __init__(self, path: Path, settings: Settings, plan: Plan) -> None:
        self.path, self.settings, self.plan = path, settings, plan
        self.shards = path / "shards"
        self._lock = FileLock(path / LOCK_FILE)  # the system lets go of it when the process ends, however it ends

    @property
    def count(self) -> int:
        """The number of shards."""
        return len(self.plan.starts) - 1

    def begin(self) -> bool:
        """Claims the folder for these settings and this plan; False if it is finished.

        Raises:
            UserError: it is something else, or another run is at work on it.
        """
        record = {"format": FORMAT, "settings": asdict(self.settings), "recordings": self.plan.summary()}
        if not self._is_finished(record):
            if not (self.path / UNFINISHED).is_file():
                self.path.mkdir(parents=True, exist_ok=True)
                foreign = [
                    path.name for path in self.path.iterdir() if path.suffix != ".tmp" and path.name != LOCK_FILE
                ]
                if foreign:
                    raise UserError(
                        f"{self.path} holds {min(foreign)}, which no ssast prepare has begun: choose a new or an empty "
                        "folder"
                    )
            self._acquire()
        if self._is_finished(record):  # asked again: another run may have begun or finished before the lock was had
            self._clean()
            return False
        if not (self.path / UNFINISHED).is_file():
            write_whole(self.path / UNFINISHED, json.dumps(record))
        self.shards.mkdir(exist_ok=True)
        for leftover in self.shards.glob(".*.tmp"):
            leftover.unlink()
        return True

    def _is_finished(self, record: dict[str, Any]) -> bool:
        """Whether the folder is finished. Raises `UserError` if it was begun or finished with another `record`."""
        for name in (DESCRIPTION, UNFINISHED):
            if (self.path / name).is_file():
                _require_same(self.path, _read_json(self.path / name), record)
        return (self.path / DESCRIPTION).is_file()

    def _acquire(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"another ssast prepare is at work on {self.path}: wait for its end") from error
        except OSError as error:
            if not (self.path / LOCK_FILE).exists():  # nothing can be written here
                raise
            # a file system without locks
            print(f"{self.path} cannot be locked ({error.strerror}): start no second run on it", file=sys.stderr)

    def close(self) -> None:
        """Let another run begin."""
        self._lock.release()

    def aside(self, number: int) -> Path:
        """Where a shard is written until it is whole."""
        return self.shards / f".{shard_name(number)}.tmp"

    def part_path(self, number: int) -> Path:
        """Where it is written what a shard holds."""
        return self.shards / f".{number:05d}.json"

    def part(self, number: int) -> Part | None:
        """What is in a finished shard; None if it is not finished."""
        try:
            part = self._recorded_part(number)
            return part if (self.shards / shard_name(number)).stat().st_size == part["bytes"] else None
        except FileNotFoundError:
            return None

    def _recorded_part(self, number: int) -> Part:
        return json.loads(self.part_path(number).read_bytes())

    def keep(self, shard: UnfinishedShard) -> None:
        """Puts a shard in its place, then what is in it: a shard without that is made again."""
        os.replace(self.aside(shard.number), self.shards / shard_name(shard.number))
        _sync(self.shards)
        write_whole(self.part_path(shard.number), json.dumps(shard.part()))

    def finish(self, progress: bool) -> dict[str, Any]:
        """Writes all but the shards; a summary.

        Raises:
            UserError: no recording can be used.
        """
        parts = map(self._recorded_part, range(self.count))
        index, described, rejected, sources = Index(self.path / "index"), [], [], 0
        remarks = Remarks()
        for number, part in enumerate(parts):
            clips = np.array(part["clips"], dtype=np.int64).reshape(-1, 6)
            recordings = [self.plan.recordings[row] for row in clips[:, 0]]
            keys = [clip_key(recording, piece) for recording, piece in clips[:, :2].tolist()]
            numbers = dict(zip(("offset", "size", "samples", "crc32"), clips[:, 2:].T, strict=True))
            texts = {
                "label": [r.label_text for r in recordings],
                "speaker": [r.speaker for r in recordings],
                "split": [r.split_text for r in recordings],
                "source": [r.source for r in recordings],
            }
            index.append({"shard": np.full(len(clips), number), **numbers}, {"key": keys, **texts})
            described.append(
                {"name": shard_name(number), "bytes": part["bytes"], "clips": len(clips), "sha256": part["sha256"]}
            )
            rejected += [(self.plan.recordings[recording].source, reason) for recording, reason in part["rejected"]]
            for recording, text in part.get("remarks", []):
                remarks.add(self.plan.recordings[recording].source, [text])
            sources += len(np.unique(clips[:, 0]))
        index.close()
        write_reasons(self.path / "rejected.csv", rejected)
        if not index.rows:
            first = "; the first: {}: {}".format(*rejected[0])
            raise UserError(f"none of {len(rejected)} recordings can be used, see {self.path / 'rejected.csv'}{first}")
        seconds = np.asarray(load_index(self.path)[0]["samples"]) / self.settings.sample_rate
        hours = round(float(seconds.sum()) / 3600, 4)
        stats = {
            "hours": hours,
            "clips": index.rows,
            "sources": sources,
            "rejected": len(rejected),
            "remarks": remarks.as_json(),
            **_lengths(seconds),
        }
        stats = _feature_statistics(self.path, self.settings, progress) | stats
        write_whole(self.path / "stats.json", json.dumps(stats, indent=1) + "\n")
        content = {
            "format": FORMAT,
            "sample_rate": self.settings.sample_rate,
            "codec": self.settings.codec,
            "clips": index.rows,
            "hours": hours,
            "shards": described,
            "settings": asdict(self.settings),
            "recordings": self.plan.summary(),
        }
        for folder in (self.shards, self.path / "index", self.path):
            _sync(folder)
        write_whole(self.path / DESCRIPTION, json.dumps(content, indent=1) + "\n")
        _sync(self.path)
        self._clean()
        return stats | {"shards": self.count, "reasons": Counter(_kind(reason) for _, reason in rejected)}

    def _clean(self) -> None:
        for leftover in (*self.shards.glob(".*"), self.path / UNFINISHED, self.path / LOCK_FILE):
            leftover.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Makes the names in a folder safe from a power cut; its files are already."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: delete its folder and run the command again, or choose another folder")
    return content


def _require_same(path: Path, there: dict[str, Any], record: dict[str, Any]) -> None:
    """Raises `UserError` naming what differs between what made a folder and what is asked for."""
    differing = [
        f"{name} {there.get('settings', {}).get(name)!r}, now {value!r}"
        for name, value in record["settings"].items()
        if there.get("settings", {}).get(name) != value
    ]
    was, now = there.get("recordings", {}), record["recordings"]
    if was != now and not differing:
        differing = [
            f"the recordings: {was.get('files')} files of {was.get('bytes')} bytes, now {now['files']} of "
            f"{now['bytes']}"
            + (
                " with other names or labels"
                if (was.get("files"), was.get("bytes")) == (now["files"], now["bytes"])
                else ""
            )
        ]
    if differing:
        raise UserError(f"{path} was made with {'; '.join(differing)}: choose another folder, or delete it")


def _kind(reason: str) -> str:
    """A reason without its particulars, to be counted by."""
    return re.sub(r"\d[\d.e+]*", "N", reason.partition(":")[0].partition(" (")[0])


def _lengths(seconds: np.ndarray) -> dict[str, Any]:
    quantiles = np.quantile(seconds, [0, 0.05, 0.5, 0.95, 1])
    edges = [*(edge for edge in HISTOGRAM_EDGES_S if edge < quantiles[-1]), float(quantiles[-1])]
    counts = np.histogram(seconds, edges)[0]
    return {
        "seconds": dict(zip(("min", "p5", "median", "p95", "max"), quantiles.round(4).tolist(), strict=True)),
        "histogram": {"edges_s": [round(edge, 4) for edge in edges], "clips": counts.tolist()},
    }


def _feature_statistics(folder: Path, settings: Settings, progress: bool) -> dict[str, Any]:
    """Mean and standard deviation of the log-mel features over up to 2048 clips, evenly picked, and the head of
    each.
    """
    numbers, _ = load_index(folder, names=tuple(NUMBERS))
    picked = evenly_picked(len(numbers["shard"]), STATISTICS_CLIPS)
    limit = round(STATISTICS_SECONDS * settings.sample_rate)

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rows_of_batches = np.array_split(picked, -(-len(picked) // 16))
        for rows in tqdm(rows_of_batches, desc="measuring features", disable=None if progress else True):
            clips = [_head(folder, {name: int(column[row]) for name, column in numbers.items()}, limit) for row in rows]
            lengths = np.array([len(clip) for clip in clips], dtype=np.int64)
            waveform = np.zeros((len(clips), int(lengths.max())), dtype=np.int16)
            for row, clip in zip(waveform, clips, strict=True):
                row[: len(clip)] = clip
            yield waveform, lengths

    mean, std = feature_statistics(batches(), settings.sample_rate, NUM_MEL_BINS)
    described = (
        f"Kaldi fbank of this engine, {NUM_MEL_BINS} mel bins, over {len(picked)} clips, of each the first "
        f"{STATISTICS_SECONDS} s at most"
    )
    return {"mean": mean, "std": std, "num_mel_bins": NUM_MEL_BINS, "features": described}


def _head(folder: Path, row: dict[str, int], limit: int) -> np.ndarray:
    with open(folder / "shards" / shard_name(row["shard"]), "rb") as file:
        file.seek(row["offset"])
        content = file.read(row["size"])
    with soundfile.SoundFile(io.BytesIO(content)) as sound:
        return sound.read(limit, dtype="int16")
