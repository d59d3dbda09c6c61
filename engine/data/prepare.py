"""`ssast prepare`: from recordings of any kind to a folder of shards, which training reads at any place without
decoding anew.

What is to be done is planned first (prepare_plan.py). Processes (extract.py) make a shard each, and the folder keeps
those that are whole (prepared_folder.py), so that a run that was killed starts again with the others. The result
depends on the recordings and the options alone, not on processes, interruptions or time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import sys
from collections import deque
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ssast.engine.errors import UserError
from ssast.engine.files import expand_path, path_argument

from . import extract
from .extract import Job
from .layouts import LAYOUTS
from .prepare_plan import Settings, make_plan, require_sense
from .prepared_folder import Folder, UnfinishedShard
from .remarks import FLAT, Remarks
from .shards import CODECS, verify
from .workers import Pool


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
    require_sense(settings)
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
    plan, waiting, rejected = folder.plan, deque[UnfinishedShard](), 0
    bar = tqdm(
        total=len(plan.recordings), desc="preparing", unit="file", smoothing=0.05, disable=None if progress else True
    )
    for number in range(folder.count):
        part, count = folder.part(number), len(plan.shard(number))
        if part is None:
            waiting.append(UnfinishedShard(number, plan.starts[number], count))
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
                shard: UnfinishedShard | None = worker.number  # None: it has just started
                if shard is not None:
                    for answer in answers:
                        if "fatal" in answer:
                            raise UserError(
                                f"{answer['fatal']}: finished shards are kept, run the same command again to resume"
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
        print("ssast: interrupted; the same command resumes from the last finished shard", file=sys.stderr)
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
