"""How well the demo learns: `python -m ssast.benchmarks.demo [--seeds 0 1 2]` runs it once for each seed and adds rows
to results/demo.csv; overrides as `make demo` gives them have it train for minutes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ssast.engine.config import load_config
from ssast.engine.training.runlog import read_rows as read_metrics

from .machine import environment_columns
from .rows import RESULTS, append_row

FILE = RESULTS / "demo.csv"


def main(argv: list[str] | None = None) -> int:
    """Train, measure and add rows; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ssast.benchmarks.demo", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=FILE, help="CSV to add the rows to")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    arguments = parser.parse_intermixed_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "ssast.engine.cli", "synth", f"{folder}/corpus"], check=True)
        for seed in arguments.seeds:
            began = time.perf_counter()
            settings = [
                f"data.train={folder}/corpus/manifest.csv",
                f"run.folder={folder}",
                f"run.name=seed-{seed}",
                f"run.seed={seed}",
            ]
            settings += arguments.overrides
            command = [
                sys.executable,
                "-m",
                "ssast.engine.cli",
                "pretrain",
                "demo",
                "--ranks",
                str(arguments.ranks),
                *settings,
            ]
            subprocess.run(command, check=True)
            seconds = time.perf_counter() - began
            row = measure(Path(folder) / f"seed-{seed}", seed, arguments.ranks, seconds, arguments.overrides)
            append_row(arguments.out, row)
            print(
                f"seed {seed}: accuracy {row['valid_accuracy']} = {row['times_chance']} x chance in {row['wall_s']} s"
            )
    return 0


def measure(run_dir: Path, seed: int, ranks: int, seconds: float, overrides: list[str]) -> dict[str, Any]:
    """The row of a finished run."""
    config, rows = load_config(run_dir / "config.yaml"), read_metrics(run_dir / "metrics.jsonl")
    valid = [row for row in rows if row["kind"] == "valid"]
    train = [row for row in rows if row["kind"] == "train"]
    last, chance = valid[-1], 1 / config.valid_num_masked
    return {
        "seed": seed,
        "ranks": ranks,
        "minutes": config.train.minutes or "",
        "steps": last["step"],
        "clips": train[-1]["samples"],
        "masked": config.valid_num_masked,
        "patches": config.architecture.num_patches,
        "valid_clips": last["clips"],
        "chance": round(chance, 5),
        "valid_accuracy": round(last["accuracy"], 5),
        "times_chance": round(last["accuracy"] / chance, 2),
        "valid_nce": round(last["nce"], 4),
        "valid_mse": round(last["mse"], 4),
        "first_valid_nce": round(valid[0]["nce"], 4),
        "first_valid_mse": round(valid[0]["mse"], 4),
        "clips_per_s": round(statistics.median(row["clips_per_s"] for row in train), 1),
        "wall_s": round(seconds, 1),
        "overrides": " ".join(overrides),
        **environment_columns(),
    }


if __name__ == "__main__":
    sys.exit(main())
