"""What race.py runs in processes of their own, which answer in lines of JSON: `python -m ssast.benchmarks.loader.lane
race|first|memory JOB`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from ssast.engine.data.shards import open_shards
from ssast.engine.errors import first_line

from .contestants import CONTESTANTS, Case, prefetcher
from .corpus import SAMPLE_RATE, Corpus

Say = Callable[[dict[str, Any]], None]


def race(job: dict[str, Any], say: Say) -> None:
    """Says what there is to say of the contestant, then reads for as many seconds as each line of stdin says; between
    them the process may be stopped.
    """
    os.sched_setaffinity(0, job["cores"])
    case = Case(
        Corpus(Path(job["folder"]), job["num_samples"]), job["codec"], job["source"], job["batch"], job["workers"]
    )
    contestant = CONTESTANTS[job["contestant"]]
    try:
        note = contestant.note()
    except (ImportError, OSError, RuntimeError) as error:
        say({"left_out": first_line(error)[:200]})
        return
    stream = contestant.stream(case)
    next(stream)
    say({"note": note})
    for seconds in sys.stdin:
        say(measure_round(stream, float(seconds), case, contestant.ahead(case.workers)))


def measure_round(stream: Iterator[torch.Tensor], seconds: float, case: Case, ahead: int) -> dict[str, float]:
    """From one batch's arrival to another's: clips, wall and CPU seconds, child processes' among them. Whole turns of
    the workers.
    """
    for _ in range(ahead + 1):  # what was read before this round
        next(stream)
    batches, cpu, start = 0, _cpu_seconds(), time.perf_counter()
    while batches % case.workers or time.perf_counter() - start < seconds:
        next(stream)
        batches += 1
    wall = time.perf_counter() - start
    return {"clips": batches * case.batch, "wall_s": wall, "cpu_s": _cpu_seconds() - cpu}


def _cpu_seconds() -> float:
    children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(times.user + times.system for times in children)


def first(job: dict[str, Any], say: Say) -> None:
    """Opens a prepared folder and takes a batch."""
    start = time.monotonic()
    clips = open_shards(Path(job["folder"]))
    opened = time.monotonic()
    loader = prefetcher(clips, job["num_samples"], job["batch"], job["workers"])
    next(loader)
    end = time.monotonic()
    say(
        {
            "entries": len(clips),
            "open_s": opened - start,
            "first_s": end - start,
            "end": end,
            "rss_mib": _rss(),
            "peak_mib": _peak(),
        }
    )
    loader.close()


def memory(job: dict[str, Any], say: Say) -> None:
    """Says what memory is held after so many batches of random windows."""
    clips = open_shards(Path(job["folder"]))
    window = int(clips.frames.max()) // 2
    loader = prefetcher(clips, window, job["batch"], job["workers"], random_crop=True)
    done = 0
    for mark in job["marks"]:
        while done < mark:
            next(loader)
            done += 1
        say(
            {
                "batches": done,
                "rss_mib": _rss(),
                "peak_mib": _peak(),
                "files": len(os.listdir("/proc/self/fd")),
                "window_s": window / SAMPLE_RATE,
            }
        )
    loader.close()


def _rss() -> float:
    return psutil.Process().memory_info().rss / 2**20


def _peak() -> float:
    """Not ru_maxrss, which begins with the parent's."""
    status = Path("/proc/self/status").read_text()
    matched = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(matched[1]) / 2**10 if matched else float("nan")


def main() -> None:
    """A process of its own: answers in lines of JSON on stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=out, flush=True)

    torch.set_num_threads(1)
    {"race": race, "first": first, "memory": memory}[sys.argv[1]](json.loads(sys.argv[2]), say)


if __name__ == "__main__":
    main()
