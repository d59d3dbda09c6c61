"""Results as data: one CSV file a benchmark, one row a measurement, each with the environment it was measured in."""

from __future__ import annotations

import csv
import datetime
import os
import platform
from pathlib import Path
from typing import Any

from ssast.engine.environment import describe_environment

RESULTS = Path(__file__).parent / "results"


def environment_columns() -> dict[str, Any]:
    described = describe_environment()
    commit = described["git_commit"] or ""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit[:12] + ("+" if described["git_dirty"] else ""),
        "device": ", ".join(described["devices"]) if described["devices"] != ["cpu"] else _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        **{package: described.get(package, "") for package in ("torch", "triton", "deepspeed")},
    }


def append_row(file: Path, row: dict[str, Any]) -> None:
    """Add a row; the columns are those of the first one."""
    is_new = not file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = list(row) if is_new else read_columns(file)
    if set(columns) != set(row):
        raise ValueError(f"{file}: has columns {columns}, the row has {list(row)}")
    with open(file, "a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def read_columns(file: Path) -> list[str]:
    with open(file, newline="", encoding="utf-8") as stream:
        return next(csv.reader(stream))


def read_rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "cpu"
