"""Does pretraining help, and which? `python -m ssast.benchmarks.study AUDIO [--arms scratch all visible] [--scale
large]` pretrains a model for each arm on all clips that no task tests on, and then trains every task of configs/study
from scratch and from the pretrained weights, with equal budgets, few labels and all, several seeds.

Arms: "all" and "visible" are pretrained with that `model.encoder_tokens`, "visible-half" with a decoder of half the
width. `--equal clips` gives them the same steps, `--equal time` the same minutes.

AUDIO holds `manifests/NAME.csv` with columns path (relative to AUDIO), label, speaker and split; NAME of a task is in
TASKS. A row for each task, amount of labels and arm goes to results/study.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssast import configs
from ssast.engine.data.record import find_split
from ssast.engine.errors import UserError
from ssast.engine.finetune.results import RESULTS_FILE, read_results, scratch_of, summarise
from ssast.engine.training.runlog import read_rows as read_metrics

from .machine import environment_columns
from .rows import RESULTS, append_row

FILE = RESULTS / "study.csv"
CONFIGS = Path(configs.__path__[0]) / "study"
UNLABELED = ("esc10", "esc50_fold4", "fsdd", "nemo", "wakeword", "speech", "music_misc")
"""Manifests that are pretrained on, less the clips marked for validation or test."""
ARMS: dict[str, tuple[str, ...] | None] = {
    "scratch": None,
    "all": (),
    "visible": ("model.encoder_tokens=visible",),
    "visible-half": ("model.encoder_tokens=visible", "model.decoder_width=128"),
}
"""Settings of pretraining; None: there is none."""
PER_CLASS = 5
"""Training clips of each class where labels are few."""
# What --scale adds to (pretraining, tasks).
SCALES = {
    "small": ([], []),
    "large": (
        [
            "model.size=small",
            "model.depth=12",
            "train.steps=40000",
            "deepspeed.train_batch_size=128",
            "deepspeed.bf16.enabled=true",
        ],
        ["train.steps=1000", "train.warmup_steps=100", "deepspeed.bf16.enabled=true"],
    ),
}


@dataclass(frozen=True)
class Task:
    """`manifest`: whose clips it has; `column`: what is to be told."""

    name: str
    kind: str
    manifest: str
    column: str = "label"


TASKS = (
    Task("sounds", "audio events", "esc10"),
    Task("digits", "keyword spotting", "fsdd"),
    Task("wakewords", "keyword spotting", "wakeword"),
    Task("speakers", "speaker identification", "fsdd", "speaker"),
    Task("emotion", "emotion", "nemo"),
)


def main(argv: list[str] | None = None) -> int:
    """The command; exit status 0, 2 for a mistake on the command line, or that of a run that failed."""
    manifests = (
        f"tasks: {', '.join(f'{task.name} of {task.manifest}' for task in TASKS)}; pretrained on: "
        f"{', '.join(UNLABELED)}"
    )
    parser = argparse.ArgumentParser(prog="python -m ssast.benchmarks.study", description=__doc__, epilog=manifests)
    parser.add_argument("audio", type=Path)
    parser.add_argument("--scale", choices=SCALES, default="small", help="large: for a GPU")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["scratch", "all"])
    parser.add_argument(
        "--equal", choices=("clips", "time"), default="clips", help="what every arm's pretraining has as much of"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of pretraining, where time is equal")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1 if torch.cuda.is_available() else 2, help="comparisons at a time")
    parser.add_argument(
        "--tasks", nargs="+", choices=[task.name for task in TASKS], default=[task.name for task in TASKS]
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/study"),
        help="folder of the runs; what is finished there is not done again",
    )
    parser.add_argument("--out", type=Path, default=FILE, help="CSV to add the rows to")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="of the tasks")
    arguments = parser.parse_intermixed_args(argv)
    if "scratch" not in arguments.arms or len(set(arguments.arms)) < 2:
        parser.error("--arms: needs scratch, which gains are counted from, and another")
    try:
        run_study(arguments)
    except UserError as error:
        print(f"study: {error}", file=sys.stderr)
        return error.exit_code
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


def run_study(arguments: argparse.Namespace) -> None:
    """Pretrain each arm, train every task from each, and add the rows.

    Raises:
        UserError: manifests are missing, or a run is not finished.
        subprocess.CalledProcessError: a run failed.
    """
    work = arguments.work / arguments.scale / f"equal-{arguments.equal}"
    for_pretraining, for_tasks = SCALES[arguments.scale]
    if arguments.equal == "time":
        unset = (f"train.{key}=null" for key in ("steps", "warmup_steps", "valid_every", "checkpoint_every"))
        for_pretraining = [*for_pretraining, *unset, f"train.minutes={arguments.minutes}"]
    clips = write_manifests(arguments.audio.resolve(), work / "manifests")
    ranks = ["--ranks", str(arguments.ranks)]
    unlabeled = work / "manifests" / "unlabeled.txt"
    all_ranks = ["--ranks", str(arguments.ranks * arguments.jobs)]
    pretraining = {arm: keys for arm in arguments.arms if (keys := ARMS[arm]) is not None}
    pretrained = {arm: work / f"pretrain-{arm}" for arm in pretraining}
    for arm, folder in pretrained.items():
        common = [f"data.train={unlabeled}", f"run.folder={work}", f"run.name={folder.name}"]
        _ssast("pretrain", CONFIGS / "pretrain.yaml", *all_ranks, *common, *for_pretraining, *pretraining[arm])
    budgets = {arm: pretraining_budget(folder) for arm, folder in pretrained.items()}
    for arm, budget in budgets.items():
        print(f"{arm}: pretrained on {budget['pretraining_samples']} clips in {budget['pretraining_s'] / 60:.1f} min")
    jobs = [(task, labels) for task in TASKS if task.name in arguments.tasks for labels in ("few", "all")]

    def compare(job: tuple[Task, str]) -> list[dict[str, Any]]:
        task, labels = job
        folder = work / f"{task.name}-{labels}"
        settings = [f"data.train={work / 'manifests' / task.name}.csv", f"run.folder={work}", f"run.name={folder.name}"]
        settings += [f"task.per_class={PER_CLASS}"] if labels == "few" else []
        named = [f"{arm}={pretrained.get(arm, 'none')}" for arm in arguments.arms]
        arms = ["--seeds", str(arguments.seeds), "--compare", *named]
        _ssast("finetune", CONFIGS / f"{task.name}.yaml", *ranks, *settings, *for_tasks, *arguments.overrides, *arms)
        rows = list(measured(task, labels, folder))
        if [row["runs"] for row in rows] != [arguments.seeds] * len(arguments.arms):
            raise UserError(
                f"{folder}: is not finished, or holds other runs; run the same command again, or in another --work"
            )
        return rows

    with ThreadPoolExecutor(arguments.jobs) as pool:
        compared = list(pool.map(compare, jobs))
    seconds = sum(budget["pretraining_s"] for budget in budgets.values())
    minutes = (seconds + sum(trained_seconds(path.parent) for path in work.rglob(RESULTS_FILE)) / arguments.jobs) / 60
    first = next(iter(pretrained.values()))
    environment = json.loads((first / "environment.json").read_text(encoding="utf-8"))
    # that ran, not that reads
    commit = {"commit": (environment["git_commit"] or "")[:12] + ("+" if environment["git_dirty"] else "")}
    for row in (row for rows in compared for row in rows):
        settings = {
            "scale": arguments.scale,
            "equal": arguments.equal,
            "pretraining_clips": clips,
            **budgets.get(row["arm"], {"pretraining_samples": 0, "pretraining_s": 0}),
            "training_min": round(minutes, 1),
        }
        append_row(
            arguments.out,
            {**row, **settings, "overrides": " ".join(arguments.overrides), **environment_columns(), **commit},
        )
    print(f"{minutes:.1f} min of training; the rows are in {arguments.out}")


def pretraining_budget(run_dir: Path) -> dict[str, int]:
    """What a finished run spent: clips that it was shown, and seconds."""
    rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if row["kind"] == "train"]
    return {"pretraining_samples": rows[-1]["samples"], "pretraining_s": round(trained_seconds(run_dir))}


def trained_seconds(run_dir: Path) -> float:
    """Of a run, whose clock starts anew each time it is resumed."""
    seconds = [row["seconds"] for row in read_metrics(run_dir / "metrics.jsonl") if row["kind"] == "train"]
    return sum(now for now, following in zip(seconds, [*seconds[1:], 0.0], strict=True) if following < now)


def measured(task: Task, labels: str, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each arm of a finished comparison."""
    results = read_results(sorted(path.parent for path in folder.rglob(RESULTS_FILE)))
    arms = summarise(results)
    for arm in sorted(arms, key=lambda arm: arm.init_from is not None):
        of_arm = [result for result in results if result["arm"] == arm.arm]
        gain = arm.gain(scratch_of(arms))
        yield {
            "task": task.name,
            "kind": task.kind,
            "labels": labels,
            "arm": arm.arm,
            "metric": of_arm[0]["metric"],
            "mean": round(arm.mean, 5),
            "deviation": "" if arm.deviation is None else round(arm.deviation, 5),
            "runs": len(arm.values),
            "relative_gain": "" if gain is None else round(gain, 4),
            "train_clips": of_arm[0]["clips"]["train"],
            "test_clips": of_arm[0]["clips"]["test"],
            "classes": len(of_arm[0]["classes"]),
            "steps": of_arm[0]["steps"],
        }


def write_manifests(audio: Path, out: Path) -> int:
    """The tasks' manifests with whole paths, their marked clips for test, and a list of all others, whose number is
    returned.
    """
    out.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        clips = [
            (
                audio / row["path"],
                row[task.column],
                row["speaker"],
                "test" if find_split(row["split"]) in ("valid", "test") else "train",
            )
            for row in _read_manifest(audio, task.manifest)
        ]
        with open(out / f"{task.name}.csv", "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("path", "label", "speaker", "split"), *clips])
    rows = [row for name in UNLABELED for row in _read_manifest(audio, name)]
    untested = [str(audio / row["path"]) for row in rows if find_split(row["split"]) not in ("valid", "test")]
    (out / "unlabeled.txt").write_text("\n".join(untested) + "\n", encoding="utf-8")
    return len(untested)


def _read_manifest(audio: Path, name: str) -> list[dict[str, str]]:
    path = audio.resolve() / "manifests" / f"{name}.csv"
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; AUDIO must hold the manifests {', '.join(UNLABELED)}") from None


def _ssast(*words: Any) -> None:
    # small models: ranks and jobs use the cores better than threads do
    environment = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
    }
    subprocess.run([sys.executable, "-m", "ssast.engine.cli", *map(str, words)], check=True, env=environment)


if __name__ == "__main__":
    sys.exit(main())
