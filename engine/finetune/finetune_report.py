"""The page of a fine-tuning command: its table, and for each arm the pictures of one run. Self-contained, readable on a
phone.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from ssast.engine.files import write_whole
from ssast.engine.report.page import render

from .config import FinetuneConfig
from .results import RESULTS_FILE, read_results, scratch_of, summarise, table

MOST_RUNS = 60  # rows of the table of runs


def write_report(config: FinetuneConfig, folders: Sequence[Path]) -> Path:
    """Write `report.html` into the folder of the command; runs without results are left out."""
    results = read_results(folders)
    done = [folder for folder in folders if (folder / RESULTS_FILE).is_file()]
    arms = summarise(results)
    shown = []
    for arm in arms:
        index = next(number for number, result in enumerate(results) if result["arm"] == arm.arm)
        shown.append({"arm": arm, "result": results[index], "folder": done[index], "pictures": _pictures(done[index])})
    environment = json.loads((done[0] / "environment.json").read_text(encoding="utf-8"))
    page = render(
        Path(__file__).with_name("finetune_report.html.j2"),
        name=config.run.name,
        metric=config.metric,
        arms=arms,
        scratch=scratch_of(arms),
        paper=config.paper,
        runs=list(zip(done, results, strict=True))[:MOST_RUNS],
        more=max(0, len(results) - MOST_RUNS),
        shown=shown,
        environment=environment,
        settings=yaml.safe_dump(_settings(done[0]), sort_keys=False, allow_unicode=True),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    path = config.run_dir / "report.html"
    write_whole(path, page)
    return path


def _pictures(folder: Path) -> list[tuple[str, str]]:
    """(what it shows, PNG as text) of a run."""
    names = {"learning.png": "Training", "confusion.png": "Confusion", "classes.png": "Classes"}
    files = [(title, folder / name) for name, title in names.items()]
    return [(title, base64.b64encode(file.read_bytes()).decode()) for title, file in files if file.is_file()]


def _settings(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))


def write_summary(config: FinetuneConfig, folders: Sequence[Path]) -> Path:
    """results.csv, results.md and report.html of all runs of a command; the path of the report."""
    results = read_results(folders)
    rows = io.StringIO(newline="")
    columns = ("arm", "seed", "fold", "init_from", "steps", "weights")
    metrics = list(results[0]["metrics"])
    writer = csv.writer(rows)
    writer.writerow([*columns, "train_clips", "valid_clips", "test_clips", *metrics])
    for result in results:
        counts = [result["clips"][part] for part in ("train", "valid", "test")]
        writer.writerow(
            [*(result[name] for name in columns), *counts, *(result["metrics"].get(name) for name in metrics)]
        )
    write_whole(config.run_dir / "results.csv", rows.getvalue())
    write_whole(config.run_dir / "results.md", table(summarise(results), config.metric, config.paper) + "\n")
    return write_report(config, folders)
