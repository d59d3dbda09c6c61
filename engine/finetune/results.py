"""The table of a comparison: each arm over its seeds and folds, what it gains over training from scratch, the paper's
figures beside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class ArmSummary:
    """`values`: the metric of each run."""

    arm: str
    init_from: str | None
    values: list[float]

    @property
    def mean(self) -> float:
        """Of the metric, over seeds and folds."""
        return fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds and folds (n - 1); None of one run."""
        return stdev(self.values) if len(self.values) > 1 else None

    def gain(self, scratch: ArmSummary | None) -> float | None:
        """Relative, as the paper averages it: 0.609 is 60.9% more than from scratch."""
        return (
            self.mean / scratch.mean - 1 if scratch is not None and scratch is not self and scratch.mean > 0 else None
        )


def read_results(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """What runs have left; those without results are left out. Metrics that are not finite, which JSON cannot say, are
    NaN.
    """
    files = [folder / RESULTS_FILE for folder in folders]
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    for result in results:
        result["metrics"] = {name: math.nan if value is None else value for name, value in result["metrics"].items()}
    return results


def summarise(results: Sequence[dict[str, Any]]) -> list[ArmSummary]:
    """Arms in the order of their first run."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        arms.setdefault(result["arm"], []).append(result)
    return [
        ArmSummary(name, runs[0]["init_from"], [run["metrics"][run["metric"]] for run in runs])
        for name, runs in arms.items()
    ]


def scratch_of(arms: Sequence[ArmSummary]) -> ArmSummary | None:
    """The arm that started from no weights; None without one."""
    return next((arm for arm in arms if arm.init_from is None), None)


def table(arms: Sequence[ArmSummary], metric: str, paper: dict[str, float]) -> str:
    """Markdown. Our figures and the paper's stand in rows of their own: data and budgets are not the same."""
    scratch = scratch_of(arms)
    lines = [
        f"| arm | starts from | {metric} (%) | deviation | runs | relative gain |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for arm in arms:
        gain = arm.gain(scratch)
        cells = [
            arm.arm or "this run",
            f"`{arm.init_from}`" if arm.init_from else "scratch",
            f"{100 * arm.mean:.2f}",
            "" if arm.deviation is None else f"± {100 * arm.deviation:.2f}",
            str(len(arm.values)),
            "" if gain is None else f"{100 * gain:+.1f}%",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for name, value in paper.items():
        base = paper.get("scratch") if name != "scratch" else None
        gained = f"*{100 * (value / base - 1):+.1f}%*" if base else ""
        lines.append(f"| *the paper: {name}* | | *{value:.1f}* | | | {gained} |")
    return "\n".join(lines)


def print_summary(folder: Path, folders: Sequence[Path]) -> None:
    """Print a line for each arm: mean, deviation and gain."""
    results = read_results(folders)
    print(f"\n{folder}: test {results[0]['metric']}, mean and deviation over {_runs(len(results))}")
    for arm in (arms := summarise(results)):
        gain = arm.gain(scratch_of(arms))
        spread = "" if arm.deviation is None else f" ± {100 * arm.deviation:.2f}"
        gained = "" if gain is None else f"  {100 * gain:+.1f}% against scratch"
        print(f"  {arm.arm or 'this run':16} {100 * arm.mean:6.2f}%{spread}  ({_runs(len(arm.values))}){gained}")


def _runs(count: int) -> str:
    return f"{count} run{'s' if count != 1 else ''}"
