"""What was aimed at, resident against the rows; and the rows as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
RATE, FIRST, OPEN, MEMORY, PEAK = "clips_per_s", "first_batch_s", "open_s", "rss_mib", "peak_rss_mib"
OURS, ALONE = "this engine", "libsndfile alone"
WAV_A_CORE, OF_FLAC, TIMES_OTHERS = 5000.0, 0.9, 3.0
MANY, OPEN_S, FIRST_S, MANY_MIB, GROWTH = 1_000_000, 1.0, 5.0, 1024.0, 1.05


class Verdict(NamedTuple):
    """What was aimed at, what was measured, and whether that is enough."""

    aim: str
    measured: str
    met: bool

    def __str__(self) -> str:
        return f"{'met   ' if self.met else 'MISSED'}  {self.aim}: {self.measured}"


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Of one run. What was not measured has none."""
    rates = [row for row in rows if row["metric"] == RATE and row["p50"] not in ("", None)]
    results = []
    for row in _where(rates, contestant=OURS, codec="wav", source="shards", workers=1):
        rate = float(row["p50"])
        text = f"{rate:,.0f} clips/s ({float(row['cpu_p50']):,.0f} a CPU second)"
        results.append(Verdict(f"WAV shards, at least {WAV_A_CORE:,.0f} clips/s a core", text, rate >= WAV_A_CORE))
    for alone in _where(rates, contestant=ALONE, codec="flac", workers=1):
        for row in _where(rates, contestant=OURS, codec="flac", workers=1):
            fraction, cpu = _over(row, alone)
            aim = f"FLAC {row['source']}, at least {OF_FLAC:.0%} of libFLAC alone on the core"
            results.append(Verdict(aim, f"{fraction:.0%} ({cpu:.0%} by CPU time)", fraction >= OF_FLAC))
    for codec, workers in dict.fromkeys((row["codec"], int(row["workers"])) for row in rates):
        group = _where(rates, codec=codec, workers=workers)
        peers = [row for row in group if is_peer(row)]
        ours = [row for row in group if row["contestant"] == OURS]
        if peers and ours:
            best, mine = (max(rows, key=lambda row: float(row["p50"])) for rows in (peers, ours))
            ratio, cpu = _over(mine, best)
            cores = f"{workers} core{'s' * (workers > 1)}"
            aim = f"{codec}, {cores}, at least {TIMES_OTHERS:g} x the best of the others"
            text = f"{ratio:.2g} x {best['contestant']} ({cpu:.2g} x by CPU time)"
            results.append(Verdict(aim, text, ratio >= TIMES_OTHERS))
    return results + _time_and_memory(rows)


def _time_and_memory(rows: Sequence[Row]) -> list[Verdict]:
    results = []
    many = [row for row in rows if row["entries"] not in ("", None) and int(row["entries"]) >= MANY]
    limits = (
        (OPEN, "index opened", "s", OPEN_S),
        (FIRST, "first batch", "s", FIRST_S),
        (PEAK, "memory", "MiB", MANY_MIB),
    )
    for metric, what, unit, limit in limits:
        for row in _where(many, metric=metric):
            value = float(row["p50"])
            aim = f"{int(row['entries']):,} entries, {what} under {limit:g} {unit}"
            results.append(Verdict(aim, f"{value:.3g} {unit}" if unit == "s" else f"{value:.0f} {unit}", value < limit))
    resident = [row for row in rows if row["metric"] == MEMORY]
    for codec in dict.fromkeys(row["codec"] for row in resident):
        marks = sorted(_where(resident, codec=codec), key=lambda row: int(row["batches"]))
        if len(marks) > 1:
            (early, before), (late, after) = ((int(row["batches"]), float(row["p50"])) for row in (marks[0], marks[-1]))
            aim = f"{codec}, memory after {late:,} batches at most {GROWTH - 1:.0%} above that after {early:,}"
            results.append(Verdict(aim, f"{before:.0f} -> {after:.0f} MiB", after <= before * GROWTH))
    return results


def is_peer(row: Row) -> bool:
    """Whether users would run it instead."""
    return row["contestant"] not in (OURS, ALONE)


def _where(rows: Sequence[Row], **values: Any) -> list[Row]:
    return [row for row in rows if all(str(row[name]) == str(value) for name, value in values.items())]


def _over(row: Row, other: Row) -> tuple[float, float]:
    """By wall time and by CPU time."""
    return float(row["p50"]) / float(other["p50"]), float(row["cpu_p50"]) / float(other["cpu_p50"])


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of text: the rates of one run, each as a multiple of the best peer's of its codec and cores."""
    lines = [
        f"{'codec':6}{'cores':>5}  {'contestant':24}{'source':8}{'clips/s':>9}  {'quartiles':>15}{'a CPU s':>9}  of "
        "best other"
    ]
    rates = [row for row in rows if row["metric"] == RATE]
    for row in rates:
        head = f"{row['codec']:6}{row['workers']:>5}  {row['contestant']:24}{row['source']:8}"
        if row["p50"] in ("", None):
            lines.append(f"{head} {row['note']}")
            continue
        low, middle, high, cpu = (float(row[name]) for name in ("p25", "p50", "p75", "cpu_p50"))
        group = [
            other
            for other in _where(rates, codec=row["codec"], workers=row["workers"])
            if is_peer(other) and other["p50"]
        ]
        best = max((float(other["p50"]) for other in group), default=0.0)
        ratio = f"{middle / best:.2f} x" if best else ""
        lines.append(f"{head}{middle:9,.0f}  {f'{low:,.0f} to {high:,.0f}':>15}{cpu:9,.0f}  {ratio}")
    return lines
