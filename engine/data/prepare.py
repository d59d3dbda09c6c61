"""`ssast prepare`: from recordings of any kind to a folder of shards, which training reads at any place without
decoding anew.

What is to be done is planned first: all recordings in a fixed order, cut into shards by their bytes. Processes
(extract.py) make a shard each; when it is whole, and on disk, what is in it is written beside it. A run that was killed
starts again with the shards that are not there. The result depends on the recordings and the options alone, not on
processes, interruptions or time.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NotRequired, TypedDict

import numpy as np
import soundfile
from tqdm import tqdm

from ssast.engine.errors import UserError
from ssast.engine.files import expand_path, path_argument, write_reasons, write_whole

from . import extract
from .extract import Extraction, Job
from .layouts import LAYOUTS
from .probe import file_status
from .record import Record
from .remarks import FLAT, Remarks
from .shards import CODECS, END_OF_TAR, FORMAT, NUMBERS, Index, clip_key, load_index, shard_name, verify
from .sources import read_source
from .statistics import NUM_MEL_BINS, evenly_picked, feature_statistics
from .workers import Pool

BEGUN, FINISHED = "unfinished.json", "dataset.json"
SHARDS_AIMED_AT = 64  # of a small data set, so that all cores have work
LEAST_SHARD = 16 << 20  # bytes
STATISTICS_CLIPS, STATISTICS_SECONDS = 2048, 10.24
HISTOGRAM_EDGES_S = (0, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 12.5, 15, 20, 30, 60, 120, 300, 600, 1800, 3600)


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
    """Finds all recordings; what it finds, and does not, goes to standard error.

    Raises:
        UserError: a source cannot be read.
    """
    found: list[Record] = []
    for source in settings.sources:
        part = read_source(source, settings.layout)
        records = part.records
        told = (*part.remarks, *part.notes)
        print(f"{source}: {part.kind}, {len(records)} recordings", *told, sep="; ", file=sys.stderr)
        found += records
    sizes = _sizes([recording.path for recording in found if recording.offset < 0])
    recordings = sorted({replace(r, size=next(sizes)) if r.offset < 0 else r for r in found}, key=_order)
    if len(recordings) < len(found):
        print(f"{len(found) - len(recordings)} recordings were named twice", file=sys.stderr)
    total = sum(max(0, recording.size) for recording in recordings)
    limit = settings.shard_size or min(max(total // SHARDS_AIMED_AT, LEAST_SHARD), 1 << 30)
    starts, held = [0], 0
    for number, recording in enumerate(recordings):
        if held and held + recording.size > limit:
            starts.append(number)
            held = 0
        held += max(0, recording.size)
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


class Part(TypedDict):
    """What is written down of a finished shard."""

    clips: list[list[int]]  # [recording, piece, offset, size, samples, crc32] of each
    rejected: list[tuple[int, str]]  # (recording, reason)
    remarks: NotRequired[list[tuple[int, str]]]  # (recording, remark); older versions wrote none
    bytes: int
    sha256: str


@dataclass
class _Shard:
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
        """The process has ended, or was ended, with a recording in hand, which gets a second chance."""
        if self.done == self.count:
            raise UserError(f"a process that writes shards has ended ({end}): run the same command again to go on")
        if self.failed == self.done:
            self.take({"reason": f"{end}, twice"})
        else:
            self.failed = self.done

    def part(self) -> Part:
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
        self._lock: IO | None = None

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
        for name in (FINISHED, BEGUN):
            if (self.path / name).is_file():
                _require_same(self.path, _read_json(self.path / name), record)
        if (self.path / FINISHED).is_file():
            self._clean()
            return False
        if not (self.path / BEGUN).is_file():
            self.path.mkdir(parents=True, exist_ok=True)
            foreign = [path.name for path in self.path.iterdir() if path.suffix != ".tmp"]
            if foreign:
                raise UserError(
                    f"{self.path} holds {min(foreign)}, which no ssast prepare has begun: choose a new or an empty "
                    "folder"
                )
            write_whole(self.path / BEGUN, json.dumps(record))
        self.shards.mkdir(exist_ok=True)
        self._lock = open(self.path / BEGUN)  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another ssast prepare is at work on {self.path}: wait for its end") from error
        except OSError as error:  # a file system without locks
            print(f"{self.path} cannot be locked ({error.strerror}): start no second run on it", file=sys.stderr)
        for leftover in self.shards.glob(".*.tmp"):
            leftover.unlink()
        return True

    def close(self) -> None:
        """Let another run begin."""
        if self._lock is not None:
            self._lock.close()

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

    def keep(self, shard: _Shard) -> None:
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
        write_whole(self.path / FINISHED, json.dumps(content, indent=1) + "\n")
        _sync(self.path)
        self._clean()
        return stats | {"shards": self.count, "reasons": Counter(_kind(reason) for _, reason in rejected)}

    def _clean(self) -> None:
        for leftover in (*self.shards.glob(".*"), self.path / BEGUN):
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


def prepare(
    settings: Settings,
    out: Path,
    *,
    workers: int,
    timeout_s: float = 300.0,
    memory: int = 4 << 30,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Prepares a folder, or what is missing of it; a summary, or None if it was finished before.

    Each of `workers` processes may take `timeout_s` seconds and `memory` bytes of address space for a recording.

    Raises:
        UserError: the settings make no sense, a source cannot be read, the folder is something else or cannot be
            written to, or no recording can be used.
    """
    _require_sense(settings)
    plan = make_plan(settings)
    out = Path(os.path.abspath(out))
    try:
        with contextlib.closing(Folder(out, settings, plan)) as folder:
            if not folder.begin():
                return None
            _make_shards(folder, workers, timeout_s, memory, progress)
            return folder.finish(progress)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from error


def _make_shards(folder: Folder, workers: int, timeout_s: float, memory: int, progress: bool) -> None:
    plan, waiting, rejected = folder.plan, deque[_Shard](), 0
    bar = tqdm(
        total=len(plan.recordings), desc="preparing", unit="file", smoothing=0.05, disable=None if progress else True
    )
    for number in range(folder.count):
        part, count = folder.part(number), len(plan.shard(number))
        if part is None:
            waiting.append(_Shard(number, plan.starts[number], count))
        else:
            rejected += len(part["rejected"])
            bar.update(count)
    bar.unpause()
    arguments = [json.dumps(asdict(folder.settings.extraction(memory)))]
    workers = min(workers, len(waiting))
    with bar, contextlib.closing(Pool(extract.__file__, arguments, timeout_s)) as pool:
        while waiting or pool.workers:
            while waiting and len(pool.workers) < workers:
                pool.start()
            for worker, answers, end in pool.wait():
                shard: _Shard | None = worker.number  # None: it has just started
                if shard is not None:
                    for answer in answers:
                        if "fatal" in answer:
                            raise UserError(
                                f"{answer['fatal']}: finished shards are kept, run the same command again to go on"
                            )
                        before = shard.done
                        shard.take(answer)
                        bar.update(shard.done - before)
                        rejected += "reason" in answer
                        bar.set_postfix(rejected=rejected, refresh=False)
                if shard is not None and end:
                    shard.fail(end)
                    waiting.appendleft(shard)
                elif shard is None or shard.sha256:
                    if shard is not None:
                        folder.keep(shard)
                    if not waiting:
                        pool.stop(worker)
                        continue
                    shard = waiting.popleft()
                    first = shard.first + shard.done
                    job = Job(
                        str(folder.aside(shard.number)),
                        shard.end,
                        first,
                        [astuple(r) for r in plan.recordings[first : shard.first + shard.count]],
                    )
                    worker.send(shard, vars(job))
                if shard.done == shard.count:
                    worker.deadline = math.inf  # what is left is to write to the disk, whose time is no fault of a file


def _require_sense(settings: Settings) -> None:
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


def _seconds(text: str) -> float:
    seconds = float(text)
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError
    return seconds


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMGT]?)(I?B)?", text.upper())
    if match is None:
        raise ValueError
    return int(match[1]) << 10 * " KMGT".index(match[2] or " ")


_seconds.__name__, _bytes.__name__ = "number of seconds", "size, such as 256M or 1G,"  # as argparse calls them


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssast prepare",
        usage="ssast prepare SRC... --out DIR [options]\n       ssast prepare --verify DIR",
        description="Turn recordings of any kind into a folder of shards to train on: mono, 16-bit, one sample rate, "
        "with labels, speakers "
        "and splits. A run that was interrupted is finished by running the same command again.",
    )
    add = parser.add_argument
    add(
        "sources",
        nargs="*",
        type=expand_path,
        metavar="SRC",
        help="an audio or video file, a folder, a tar, or a manifest (.json, .csv, .tsv, .txt, .lst)",
    )
    add(
        "--out",
        type=path_argument,
        metavar="DIR",
        help="a new or empty folder, or one that an earlier run left unfinished",
    )
    add("--verify", type=path_argument, metavar="DIR", help="check every byte of a prepared folder instead")
    layouts = ("auto", "plain", *LAYOUTS)
    add(
        "--layout",
        choices=layouts,
        default="auto",
        metavar="NAME",
        help=f"how folders are laid out: {', '.join(layouts)} (default: auto)",
    )
    add(
        "--codec",
        choices=CODECS,
        default="wav",
        help="wav is read fastest, flac takes about half the space (default: %(default)s)",
    )
    add("--sample-rate", type=int, default=16_000, metavar="HZ", help="of the result (default: %(default)s)")
    add(
        "--segment",
        type=_seconds,
        default=0.0,
        metavar="S",
        help="cut recordings into pieces of so many seconds (default: keep them whole)",
    )
    add(
        "--hop",
        type=_seconds,
        metavar="S",
        help="from the beginning of a piece to that of the next (default: as long as a piece)",
    )
    add(
        "--min-length",
        type=_seconds,
        default=0.025,
        metavar="S",
        help="shorter recordings and last pieces are left out (default: %(default)s)",
    )
    add(
        "--max-length",
        type=_seconds,
        metavar="S",
        help="longer recordings are rejected (default: 3600; with --segment 172800)",
    )
    add(
        "--shard-size",
        type=_bytes,
        default=0,
        metavar="SIZE",
        help="of the sources in a shard (default: a 64th of all, 16M to 1G)",
    )
    add(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: one a core, %(default)s here)",
    )
    add(
        "--timeout",
        type=_seconds,
        default=300.0,
        metavar="S",
        help="for one recording, after which it is rejected (default: %(default)g)",
    )
    add("--memory-limit", type=_bytes, default=4 << 30, metavar="SIZE", help="address space of a process (default: 4G)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Turn recordings of any kind into a folder of shards to train on."""
    parser = _parser()
    options = parser.parse_args(argv)
    if (options.verify is None) == (options.out is None) or bool(options.sources) != (options.out is not None):
        parser.error("either SRC... and --out DIR, or --verify DIR alone")
    if options.workers < 1:
        parser.error("--workers: expected at least 1")
    if options.verify is not None:
        return _verify(options.verify, options.workers)
    if options.hop is not None and not options.segment:
        parser.error("--hop is for --segment")
    settings = Settings(
        sources=[os.path.abspath(source) for source in options.sources],
        layout=options.layout,
        sample_rate=options.sample_rate,
        codec=options.codec,
        segment=options.segment,
        hop=options.segment if options.hop is None else options.hop,
        min_length=options.min_length,
        max_length=options.max_length or (172_800.0 if options.segment else 3600.0),
        shard_size=options.shard_size,
    )
    try:
        summary = prepare(
            settings, options.out, workers=options.workers, timeout_s=options.timeout, memory=options.memory_limit
        )
    except KeyboardInterrupt:
        print("ssast: interrupted; the same command goes on from the last finished shard", file=sys.stderr)
        return 130
    if summary is None:
        print(f"{options.out} is finished: nothing to do")
        return 0
    print(
        f"{options.out}: {summary['clips']} clips of {summary['sources']} recordings, {summary['hours']:.2f} hours",
        end="",
    )
    print(f", {summary['shards']} shards; log-mel mean {summary['mean']}, std {summary['std']}")
    remarks = Remarks()
    remarks.add_json(summary["remarks"])
    print(*remarks.lines(), sep="\n", end="\n" if summary["remarks"] else "", file=sys.stderr)
    if not summary["std"]:
        print(f"warning: {FLAT}", file=sys.stderr)
    print(f"{summary['rejected']} recordings rejected: {options.out / 'rejected.csv'}")
    for reason, count in summary["reasons"].most_common():
        print(f"  {count:8} {reason}")
    return 0


def _verify(folder: Path, workers: int) -> int:
    clips, faults = verify(folder, workers)
    print(*faults, sep="\n", end="\n" if faults else "")
    print(f"{folder}: {len(faults)} faults" if faults else f"{folder}: {clips} clips, all as they were written")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
