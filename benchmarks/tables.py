"""Draw the documentation's tables from the rows: `python -m ssast.benchmarks.tables [--check]`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; `--check` only says whether each is what its rows give.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from .rows import RESULTS, read_rows

DOCUMENTS = ("README.md",)


def demo_table() -> str:
    """The last three rows of results/demo.csv, which differ in their seed."""
    file = RESULTS / "demo.csv"
    if not file.exists():
        return "not measured yet"
    rows = read_rows(file)[-3:]
    lines = ["| seed | pretext accuracy | x chance | InfoNCE | MSE | steps | clips/s | wall |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['seed']} | {float(row['valid_accuracy']):.1%} | {float(row['times_chance']):.1f} "
            f"| {float(row['first_valid_nce']):.2f} -> {float(row['valid_nce']):.2f} "
            f"| {float(row['first_valid_mse']):.3f} -> {float(row['valid_mse']):.3f} "
            f"| {row['steps']} | {float(row['clips_per_s']):.0f} | {float(row['wall_s']) / 60:.1f} min |"
        )
    times = [float(row["times_chance"]) for row in rows]
    first = rows[0]
    lines += [
        "",
        f"Mean {statistics.mean(times):.1f} x chance ({float(first['chance']):.2%}: one of {first['masked']} masked patches of "
        f"{first['patches']}), on {first['valid_clips']} clips held out; {first['ranks']} ranks on {first['cores']} cores of "
        f"{first['device']}, torch {first['torch']}, commit {first['commit']}, {first['date']}.",
    ]
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {"demo": demo_table}
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def render(text: str) -> str:
    """The document with every table drawn anew."""
    return _TABLE.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def main(argv: list[str] | None = None) -> int:
    check = "--check" in (sys.argv[1:] if argv is None else argv)
    root, stale = Path(__file__).parent.parent, []
    for name in DOCUMENTS:
        path = root / name
        if path.exists() and (drawn := render(text := path.read_text(encoding="utf-8"))) != text:
            stale.append(name)
            if not check:
                path.write_text(drawn, encoding="utf-8")
    print(f"{'stale' if check else 'drawn anew'}: {', '.join(stale) or 'none'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
