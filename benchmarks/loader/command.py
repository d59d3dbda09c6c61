"""`ssast bench loader`: the loader beside what users would otherwise run on the same cores."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssast.benchmarks.machine import environment_columns
from ssast.benchmarks.rows import RESULTS, Row, Sink
from ssast.engine.errors import UserError

from .aims import FIRST, MEMORY, OPEN, OURS, PEAK, RATE, table, verdicts
from .contestants import CONTESTANTS
from .corpus import FORMATS, IN_SHARDS, Corpus, make_corpus, repeat_index
from .race import run_alone, run_race

FILE = RESULTS / "loader.csv"
COLD_STARTS = 3
MEMORY_BATCH = 2
MARKS = (1_000, 10_000, 100_000)
DESCRIPTION = """Measure how many clips a second are read, without training, and how long the first batch and what
memory it takes. The same clips lie in WAV, FLAC and Opus, as files and as shards of `ssast prepare`. With one thread
or worker process on one core, then more of both, every contestant reads batches of them: this engine's loader,
soundfile, webdataset and torchcodec in torch's DataLoader, the official way (filter banks clip by clip in the workers
of DataLoader), and libsndfile alone. All of one codec and number of cores run in turn, in short rounds, each in a
process of its own that is stopped while others are measured. Files are in the page cache. Wall time and CPU time (of
all its processes) are taken; what cannot run here is named."""


def say(text: str) -> None:
    """To stderr: stdout is for rows."""
    print(text, file=sys.stderr, flush=True)


class Bench:
    """All that one call measures."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.cores = sorted(os.sched_getaffinity(0))
        self.sink = Sink(arguments.out)
        started = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")
        self.environment = {"run": started, **environment_columns()}
        self.corpus: Corpus

    def run(self) -> None:
        """Make the corpus and measure all that was asked for.

        Raises:
            UserError: a contestant ended instead of answering, or rows cannot be written.
        """
        options = self.arguments
        say(f"writing {options.clips} clips of {options.length:g} s as {', '.join(options.codecs)}, files and shards")
        self.corpus = make_corpus(
            self.folder,
            options.codecs,
            clips=options.clips,
            seconds=options.length,
            audio=options.audio,
            workers=len(self.cores),
        )
        for codec in options.codecs:
            for workers in options.workers:
                self._race(codec, workers)
        for codec in (codec for codec in options.codecs if codec in IN_SHARDS):
            self._first_batch(codec, self.corpus.shards(codec))
            self._memory(codec)
        if "wav" in options.codecs and options.entries:
            say(f"an index of {options.entries:,} entries")
            repeat_index(self.corpus.shards("wav"), self.folder / "many", options.entries)
            self._first_batch("wav", self.folder / "many")

    def _race(self, codec: str, workers: int) -> None:
        options = self.arguments
        pairs = [
            (name, source)
            for name, contestant in CONTESTANTS.items()
            for source in ("shards", "files")
            if contestant.enters(codec, source, workers)
        ]
        common = {
            "folder": str(self.folder),
            "num_samples": self.corpus.num_samples,
            "codec": codec,
            "batch": options.batch,
        }
        jobs = [common | {"contestant": name, "source": source, "workers": workers} for name, source in pairs]
        cores = self.cores[-workers:]
        rows = []
        for (name, source), (said, rounds) in zip(
            pairs, run_race(jobs, cores, rounds=options.rounds, seconds=options.seconds), strict=True
        ):
            note = f"left out: {said['left_out']}" if "left_out" in said else said["note"]
            case = {"contestant": name, "codec": codec, "source": source, "workers": workers, "batch": options.batch}
            wall = [each["clips"] / each["wall_s"] for each in rounds]
            cpu = [each["clips"] / max(each["cpu_s"], 1e-9) for each in rounds]
            rows.append(self._row(RATE, wall, cpu=cpu, note=note, cores=cores, **case))
        self._add(rows)
        for line in table(rows)[0 if len(self.sink.rows) == len(rows) else 1 :]:
            say(line)

    def _first_batch(self, codec: str, folder: Path) -> None:
        options, workers = self.arguments, max(self.arguments.workers)
        cores = self.cores[-workers:]
        job = {
            "folder": str(folder),
            "num_samples": self.corpus.num_samples,
            "batch": options.batch,
            "workers": workers,
        }
        starts = [next(run_alone("first", job, cores)) for _ in range(COLD_STARTS)]
        case = {
            "contestant": OURS,
            "codec": codec,
            "source": "shards",
            "workers": workers,
            "batch": options.batch,
            "cores": cores,
        }
        case["entries"] = starts[0]["entries"]
        self._add(
            [
                self._row(OPEN, [each["open_s"] for each in starts], note="the index", **case),
                self._row(FIRST, [each["first_s"] for each in starts], note="from opening to the first batch", **case),
                self._row(
                    "process_s",
                    [each["end"] - each["started"] for each in starts],
                    note="with Python's imports",
                    **case,
                ),
                self._row(
                    PEAK, [each["peak_mib"] for each in starts], note="of the process, torch and DALI among it", **case
                ),
            ]
        )
        say(
            f"{codec}, {case['entries']:,} entries: "
            + ", ".join(f"{row['metric']} {row['p50']}" for row in self.sink.rows[-4:])
        )

    def _memory(self, codec: str) -> None:
        """Of short clips, so that many batches take little time; a mark that is beyond --batches is left out."""
        batches, workers = self.arguments.batches, self.arguments.workers[0]
        marks = [mark for mark in MARKS if mark < batches] + [batches] * (batches > 0)
        if not marks:
            return
        cores = self.cores[-workers:]
        job = {"folder": str(self.corpus.short(codec)), "batch": MEMORY_BATCH, "workers": workers, "marks": marks}
        case = {
            "contestant": OURS,
            "codec": codec,
            "source": "shards",
            "workers": workers,
            "batch": MEMORY_BATCH,
            "cores": cores,
        }
        answers = []
        for answer in run_alone("memory", job, cores):
            answers.append(answer)
            case |= {"batches": answer["batches"], "clip_s": answer["window_s"]}
            self._add([self._row(MEMORY, [answer["rss_mib"]], note=f"{answer['files']} files open", **case)])
        self._add([self._row(PEAK, [answers[-1]["peak_mib"]], note="highest on the way", **case)])
        say(
            f"{codec}, memory in MiB: "
            + ", ".join(f"{each['rss_mib']:.0f} after {each['batches']:,}" for each in answers)
        )

    def _row(
        self, metric: str, values: Sequence[float], *, cores: Sequence[int], cpu: Sequence[float] = (), **case: Any
    ) -> Row:
        """Quartiles of the values, and of those by CPU time."""
        return {
            "metric": metric,
            **{name: case[name] for name in ("contestant", "codec", "source", "workers")},
            "pinned_to": " ".join(map(str, cores)),
            "batch": case["batch"],
            "clip_s": case.get("clip_s", self.arguments.length),
            "bytes_a_clip": self.corpus.bytes_a_clip(case["codec"]) if metric == RATE else "",
            "clips": self.arguments.clips,
            "audio": "synthetic" if self.arguments.audio is None else "given",
            "entries": case.get("entries", ""),
            "batches": case.get("batches", ""),
            **dict(zip(("p25", "p50", "p75"), _quartiles(values), strict=True)),
            **dict(zip(("cpu_p25", "cpu_p50", "cpu_p75"), _quartiles(cpu), strict=True)),
            "rounds": len(values),
            "note": case["note"],
            **self.environment,
        }

    def _add(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.sink.add(row)


def _quartiles(values: Sequence[float]) -> Iterator[float | str]:
    if not len(values):
        return iter(("", "", ""))
    return (float(f"{value:.4g}") for value in np.quantile(values, (0.25, 0.5, 0.75)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    doubling = [workers for workers in (1, 2, 4, 8, 16, 32, 64) if workers < cores]
    parser = argparse.ArgumentParser(
        prog="ssast bench loader", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--audio",
        type=Path,
        metavar="FOLDER",
        help="recordings to cut the clips from (default: synthetic sound events)",
    )
    add("--codecs", nargs="+", choices=FORMATS, default=list(FORMATS))
    add(
        "--workers",
        type=int,
        nargs="+",
        default=[*doubling, cores],
        metavar="N",
        help="threads or processes, each on as many cores",
    )
    add("--clips", type=int, default=256, help="different clips (default: %(default)s)")
    add("--length", type=float, default=10.0, metavar="S", help="of a clip (default: %(default)s s)")
    add("--batch", type=int, default=32, help="clips (default: %(default)s)")
    add("--rounds", type=int, default=5, help="of each contestant (default: %(default)s)")
    add("--seconds", type=float, default=2.0, metavar="S", help="of a round (default: %(default)s)")
    add("--batches", type=int, default=MARKS[-1], help="while memory is watched; 0: not at all (default: %(default)s)")
    add("--entries", type=int, default=2_200_000, help="of a large index; 0: none (default: %(default)s)")
    add("--plot", type=Path, metavar="FILE", help="draw the rates into this PNG")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--save", action="store_const", dest="out", const=FILE, help="add the rows to benchmarks/results/loader.csv"
    )
    group.add_argument("--out", type=Path, metavar="FILE", help="CSV to add the rows to (default: to stdout)")
    arguments = parser.parse_args(argv)
    for option, least in (("clips", 1), ("batch", 1), ("rounds", 1), ("batches", 0), ("entries", 0)):
        if getattr(arguments, option) < least:
            raise UserError(f"--{option} {getattr(arguments, option)}: at least {least}")
    for option in ("seconds", "length"):
        if not getattr(arguments, option) > 0:
            raise UserError(f"--{option} {getattr(arguments, option):g}: must be above 0")
    for workers in arguments.workers:
        if not 1 <= workers <= cores:
            raise UserError(f"--workers {workers}: from 1 to the {cores} cores that there are")
    arguments.workers.sort()
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 for a mistake on the command line."""
    try:
        arguments = _parse(argv)
        with tempfile.TemporaryDirectory(prefix="ssast-bench-") as folder:
            bench = Bench(arguments, Path(folder))
            say(", ".join(f"{name} {value}" for name, value in bench.environment.items() if value != ""))
            bench.run()
        say("")
        for verdict in verdicts(bench.sink.rows):
            say(str(verdict))
        if arguments.plot:
            from .rates_picture import draw

            say(f"drawn: {draw(bench.sink.rows, arguments.plot)}")
    except UserError as error:
        say(f"ssast: {error}")
        return error.exit_code
    bench.sink.close()
    return 0
