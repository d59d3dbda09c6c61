"""Draw the documentation's tables from the rows: `python -m ssast.benchmarks.tables [--check] [--step FILE]`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; `--check` only says whether each is what its rows
give. `--step` prints the table of other rows of ssast.benchmarks.step than the committed ones.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from .loader import aims
from .rows import RESULTS, read_rows

DOCUMENTS = ("README.md", "docs/data.md", "docs/kernels.md", "docs/performance.md", "docs/results.md")
UNMEASURED = "not measured yet"


def demo_table() -> str:
    """The last three rows of results/demo.csv, which differ in their seed."""
    file = RESULTS / "demo.csv"
    if not file.exists():
        return UNMEASURED
    rows = read_rows(file)[-3:]
    lines = [
        "| seed | pretext accuracy | x chance | InfoNCE | MSE | steps | clips/s | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        minutes = float(row["minutes"] or float(row["wall_s"]) / 60)
        lines.append(
            f"| {row['seed']} | {float(row['valid_accuracy']):.1%} | {float(row['times_chance']):.1f} "
            f"| {float(row['first_valid_nce']):.2f} -> {float(row['valid_nce']):.2f} "
            f"| {float(row['first_valid_mse']):.3f} -> {float(row['valid_mse']):.3f} "
            f"| {row['steps']} | {float(row['clips_per_s']):.0f} | {minutes:.1f} |"
        )
    times = [float(row["times_chance"]) for row in rows]
    first = rows[0]
    lines += [
        "",
        f"Mean {statistics.mean(times):.1f} x chance ({float(first['chance']):.2%}: one of {first['masked']} masked "
        "patches of "
        f"{first['patches']}), on {first['valid_clips']} clips held out; {first['ranks']} ranks on {first['cores']} "
        "cores of "
        f"{first['device']}, torch {first['torch']}, commit {first['commit']}, {first['date']}.",
    ]
    return "\n".join(lines)


def kernels_table() -> str:
    """What results/kernels.csv has from GPUs: of each GPU every case's last run. The Triton kernel leads, where it was
    measured; the others stand beside it with how many times as long they took.
    """
    file = RESULTS / "kernels.csv"
    rows = [row for row in read_rows(file) if row["kind"] == "cuda"] if file.exists() else []
    if not rows:
        return UNMEASURED
    tables = []
    for device in dict.fromkeys(row["device"] for row in rows):
        cases: dict[tuple[str, ...], list[Row]] = {}
        for row in (row for row in rows if row["device"] == device):
            cases.setdefault(tuple(row[name] for name in _CASE), []).append(row)
        last = {case: [row for row in group if _run(row) == _run(group[-1])] for case, group in cases.items()}
        lines = [
            "| operator | shape | mode | Triton kernel | of the copy | of the product | others |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [_case_line(case, group) for case, group in last.items() if case[0] != "ceiling"]
        tables.append(
            "\n".join(lines) + "\n\n" + _measured_on(device, [row for group in last.values() for row in group])
        )
    return "\n\n".join(tables)


_CASE = ("operator", "shape", "dtype", "mode")
Row = dict[str, str]


def _run(row: Row) -> tuple[str, ...]:
    """Rows that agree in this were measured under the same circumstances and may be compared."""
    return tuple(row[name] for name in ("date", "commit", "torch", "triton", "driver", "power_limit_w"))


def _case_line(case: tuple[str, ...], rows: list[Row]) -> str:
    """`case`: the values of _CASE."""
    operator, shape, dtype, mode = case
    times = {row["provider"]: float(row["p50_ms"]) for row in rows}
    ours, cells = next((row for row in reversed(rows) if row["provider"] == "triton"), None), ["", "", ""]
    if ours:
        cells = [f"**{_duration(ours['p50_ms'])}** [{_duration(ours['p20_ms'])}, {_duration(ours['p80_ms'])}]"]
        cells += [f"{float(ours[column]):.0%}" if ours[column] else "" for column in ("copy_share", "matmul_share")]
    others = [
        f"{name} {_duration(time)}" + (f" ({_times(time / times['triton'])})" if ours else "")
        for name, time in sorted(times.items(), key=lambda item: item[1])
        if name != "triton"
    ]
    return f"| {operator} | {shape}, {dtype} | {mode} | {' | '.join(cells)} | {', '.join(others)} |"


def _measured_on(device: str, rows: list[Row]) -> str:
    """The line under a table: what the fractions are of, and the environments of its rows, each named once."""
    ceilings = {row["shape"].split()[0]: row for row in rows if row["operator"] == "ceiling"}
    parts = ["Median [20th, 80th percentile]"]
    if {"copy", "matmul"} <= set(ceilings):
        copy, product = float(ceilings["copy"]["gb_per_s"]) / 1e3, ceilings["matmul"]
        parts[0] += (
            f"; needed bytes and operations against a large copy and a {product['dtype']} matrix product of the same "
            "run (last "
            f"{copy:.2f} TB/s and {float(product['tflop_per_s']):.0f} TFLOP/s)"
        )
    for name, text in (
        ("power_limit_w", "{} W"),
        ("driver", "driver {}"),
        ("torch", "torch {}"),
        ("triton", "triton {}"),
    ):
        parts.append(text.format(" and ".join(sorted({row[name] for row in rows}))))
    parts.append("commit " + " and ".join(dict.fromkeys(row["commit"] for row in rows)))
    return f"{device}. " + ", ".join([*parts, " and ".join(sorted({row["date"] for row in rows}))]) + "."


def _duration(milliseconds: str | float) -> str:
    value = float(milliseconds)
    return f"{value * 1e3:.3g} µs" if value < 1 else f"{value:.3g} ms"


def _times(ratio: float) -> str:
    return f"{ratio:.2g} x" if ratio < 10 else f"{ratio:.0f} x"


def step_table(file: Path = RESULTS / "step.csv") -> str:
    """The training step on GPUs: of each GPU the last run, every case with its throughput as a multiple of the official
    way's.
    """
    rows = [row for row in read_rows(file) if row["kind"] == "cuda"] if file.exists() else []
    return _step_lines(rows) or UNMEASURED


def _step_lines(rows: list[Row]) -> str:
    tables = []
    for device in dict.fromkeys(row["device"] for row in rows):
        group = [row for row in rows if row["device"] == device]
        group = [row for row in group if _run(row) == _run(group[-1])]
        official = [
            float(row["clips_per_s"]) for row in group if row["provider"] == "official way" and row["clips_per_s"]
        ]
        lines = [
            "| step | micro-batch | clips/s | x official way | TFLOP/s | MFU | p50 | peak memory |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in group:
            name = f"{row['provider']} {row['settings']}".strip()
            if not row["clips_per_s"]:
                lines.append(f"| {name} | {row['micro_batch']} | {row['note'] or 'no result'} | | | | | |")
                continue
            rate = float(row["clips_per_s"])
            ratio = _times(rate / official[-1]) if official else ""
            mfu = f"{float(row['mfu']):.1%}" if row["mfu"] else ""
            peak = f"{float(row['peak_gib']):.1f} GiB" if row["peak_gib"] else ""
            lines.append(
                f"| {name} | {row['micro_batch']} | {rate:,.0f} | {ratio} | {float(row['tflop_per_s']):.0f} | {mfu} "
                f"| {float(row['p50_ms']):.1f} ms | {peak} |"
            )
        last = group[-1]
        tables.append(
            "\n".join(lines)
            + f"\n\n{device}, {last['preset']}, {last['tflop_per_clip']} TFLOP a clip forward and backward, MFU of "
            + f"{last['peak_tflops']} TFLOP/s (dense bf16); steps fed from memory. {last['power_limit_w']} W, driver "
            f"{last['driver']}, "
            + f"torch {last['torch']}, triton {last['triton']}, commit {last['commit']}, {last['date']}."
        )
    return "\n\n".join(tables)


def compile_table() -> str:
    """results/compile.csv, a line for each kernel as compiled for each case that needs it anew, a column for each
    target.
    """
    file = RESULTS / "compile.csv"
    rows = read_rows(file) if file.exists() else []
    if not rows:
        return UNMEASURED
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = [
        f"| operator | kernel | first launched at | {' | '.join(targets)} |",
        "|---|---|---|" + "---|" * len(targets),
    ]
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in ("operator", "kernel", "variant", "case")), {})[row["target"]] = (
            row
        )
    for (operator, kernel, variant, case), group in groups.items():
        cells = [_compiled(group[target]) if target in group else "" for target in targets]
        lines.append(f"| {operator} | {kernel} {variant} | {case} | {' | '.join(cells)} |")
    spilling = sum(int(row["spills"]) > 0 for row in rows)
    lines += [
        "",
        f"Registers a thread, shared memory of a block, matrix instructions. {len(rows)} kernels, "
        f"{spilling if spilling else 'none'} of them spilling registers; triton "
        f"{' and '.join(sorted({row['triton'] for row in rows}))}.",
    ]
    return "\n".join(lines)


def _compiled(row: Row) -> str:
    matrix = [f"{row[name]} {name.upper()}" for name in ("hmma", "hgmma", "utchmma") if int(row[name])]
    spills = [f"{row['spills']} spills"] if int(row["spills"]) else []
    return ", ".join([f"{row['registers']} regs", f"{int(row['shared_bytes']) / 1024:.0f} KiB", *matrix, *spills])


def precision_table() -> str:
    """results/precision.csv, as it is."""
    file = RESULTS / "precision.csv"
    rows = read_rows(file) if file.exists() else []
    if not rows:
        return UNMEASURED
    lines = ["| arithmetic | largest error | 99.9th percentile | mean |", "|---|---|---|---|"]
    lines += [f"| {row['arithmetic']} | {row['max']} | {row['p999']} | {row['mean']} |" for row in rows]
    last = rows[-1]
    return "\n".join(
        [*lines, "", f"{last['clips']} clips; torch {last['torch']}, commit {last['commit']}, {last['date']}."]
    )


def loader_table() -> str:
    """Of each machine the last run of results/loader.csv: rates by codec and cores, then what was aimed at."""
    file = RESULTS / "loader.csv"
    rows = read_rows(file) if file.exists() else []
    tables = []
    for device in dict.fromkeys((row["device"], row["cores"]) for row in rows):
        group = [row for row in rows if (row["device"], row["cores"]) == device]
        tables.append(_loader_lines([row for row in group if row["run"] == group[-1]["run"]]))
    return "\n\n".join(tables) or UNMEASURED


def _loader_lines(rows: list[Row]) -> str:
    rates = [row for row in rows if row["metric"] == aims.RATE]
    workers = list(dict.fromkeys(row["workers"] for row in rates))
    heads = [f"{count} core{'s' * (count != '1')}" for count in workers]
    lines = [
        f"| codec | clips/s of | from | {' | '.join(heads)} | a CPU second |",
        "|---|---|---|" + "---|" * (len(heads) + 1),
    ]
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rates:
        groups.setdefault((row["codec"], row["contestant"], row["source"]), {})[row["workers"]] = row
    for (codec, contestant, source), group in groups.items():
        cells = [_loader_cell(group[n]) if n in group else "" for n in workers]
        first = next(iter(group.values()))
        cpu = f"{float(first['cpu_p50']):,.0f}" if first["cpu_p50"] else ""
        lines.append(f"| {codec} | {contestant} | {source} | {' | '.join(cells)} | {cpu} |")
    lines += ["", "| aim | measured | |", "|---|---|---|"]
    lines += [f"| {aim} | {text} | {'met' if met else '**missed**'} |" for aim, text, met in aims.verdicts(rows)]
    last = rates[-1]
    notes = "; ".join(dict.fromkeys(row["note"] for row in rates if row["note"]))
    lines += [
        "",
        f"Median [quartiles] of {last['rounds']} rounds in turn; {last['clips']} clips of {float(last['clip_s']):g} s "
        f"({last['audio']} audio), batches of {last['batch']}, page cache warm; on n cores n threads or worker "
        "processes. A CPU "
        f"second: with one core, of all processes. {notes}. {last['device']}, {last['cores']} cores, "
        f"torch {last['torch']}, commit {last['commit']}, {last['date']}.",
    ]
    return "\n".join(lines)


def _loader_cell(row: Row) -> str:
    if not row["p50"]:
        return "left out"
    middle, low, high = (f"{float(row[name]):,.0f}" for name in ("p50", "p25", "p75"))
    return f"{f'**{middle}**' if row['contestant'] == aims.OURS else middle} [{low}, {high}]"


def study_table() -> str:
    """The last study of each scale and kind of equal budget: every task, few labels and all, from scratch and from each
    kind of pretraining.
    """
    file = RESULTS / "study.csv"
    rows = read_rows(file) if file.exists() else []
    tables = []
    for kind in dict.fromkeys((row["scale"], row["equal"]) for row in rows):
        group = [row for row in rows if (row["scale"], row["equal"]) == kind]
        last = [
            row for row in group if (row["date"], row["training_min"]) == (group[-1]["date"], group[-1]["training_min"])
        ]
        tables.append(_study_lines(last))
    return "\n\n".join(tables) or UNMEASURED


def _study_lines(rows: list[Row]) -> str:
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != "scratch"]
    lines = [
        f"| task | kind | clips trained on | tested | from scratch | {' | '.join(arms)} | relative gains |",
        "|---|---|---:|---:|---:|" + "---:|" * len(arms) + "---:|",
    ]
    gains: dict[tuple[str, str], list[float]] = {}
    for labels in ("few", "all"):
        for task in dict.fromkeys(row["task"] for row in rows):
            of_arm = {row["arm"]: row for row in rows if (row["task"], row["labels"]) == (task, labels)}
            for arm in arms:
                gains.setdefault((labels, arm), []).append(float(of_arm[arm]["relative_gain"] or "nan"))
            scratch, cells = of_arm["scratch"], [_study_cell(of_arm[arm]) for arm in ("scratch", *arms)]
            counts = f"{scratch['train_clips']} ({labels}) | {scratch['test_clips']}"
            last = ", ".join(f"{gains[labels, arm][-1]:+.0%}" for arm in arms)
            lines.append(f"| {task} | {scratch['kind']} | {counts} | {' | '.join(cells)} | {last} |")
    first = rows[0]
    means = "; ".join(
        f"{arm} "
        + ", ".join(f"{statistics.mean(gains[labels, arm]):+.0%} with {labels} labels" for labels in ("few", "all"))
        for arm in arms
    )
    budgets = ", ".join(
        f"{arm} {int(row['pretraining_samples']):,} times in {float(row['pretraining_s']) / 60:.0f} min"
        for arm in arms
        for row in (next(row for row in rows if row["arm"] == arm),)
    )
    lines += [
        "",
        f"Accuracy, mean and deviation over {first['runs']} seeds; the mean of the relative gains is {means}. "
        f"Pretrained on {first['pretraining_clips']} clips with equal {first['equal']}: {budgets}. All training "
        f"together took {float(first['training_min']):.0f} min on {first['cores']} cores of {first['device']}; torch "
        f"{first['torch']}, commit {first['commit']}, {first['date']}.",
    ]
    return "\n".join(lines)


def _study_cell(row: Row) -> str:
    deviation = f" ± {100 * float(row['deviation']):.1f}" if row["deviation"] else ""
    return f"{100 * float(row['mean']):.1f}%{deviation}"


def encoder_tokens_table() -> str:
    """results/encoder_tokens.csv: of each size the last run, the variants beside SSAST's own encoder."""
    file = RESULTS / "encoder_tokens.csv"
    rows = read_rows(file) if file.exists() else []
    if not rows:
        return UNMEASURED
    lines = [
        "| model | encoder reads | decoder | clips a processor second | x `all`, processor time | on the clock "
        "| by operations | GFLOP/s | peak memory |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    shown: list[Row] = []
    for size in dict.fromkeys(row["size"] for row in rows):
        rows_of_size = [row for row in rows if row["size"] == size]
        rows_of_size = rows_of_size[max(number for number, row in enumerate(rows_of_size) if row["variant"] == "all") :]
        shown += rows_of_size
        for row in rows_of_size:
            clock, processor = (
                f"{float(row[name]):.2f} [{float(row[f'{name}_low']):.2f}, {float(row[f'{name}_high']):.2f}]"
                for name in ("times", "processor_times")
            )
            cells = (
                size,
                row["variant"].split(",")[0],
                row["decoder"] or "none",
                f"{float(row['clips_per_processor_s']):.3g}",
                f"**{processor.replace(' ', '** ', 1)}" if row["decoder"] else "1",
                clock if row["decoder"] else "1",
                f"{float(row['times_by_flop']):.2f}",
                f"{float(row['gflop_per_processor_s']):.0f}",
                f"{float(row['peak_gib']):.2f} GiB",
            )
            lines.append(f"| {' | '.join(cells)} |")
    last, turns = rows[-1], sorted({int(row["turns"]) for row in shown})
    lines += [
        "",
        f"Steps of {last['batch']} clips in fp32, {last['masked']} of {last['patches']} patches masked, "
        f"{last['objective']} objective, {last['threads']} thread(s), {' or '.join(map(str, turns))} turns; ratios are "
        "means over turns with their 95% intervals. A neighbour on the machine costs time on the clock, and "
        "processor time only by what the two share. Peak memory is what the process took beyond its libraries. "
        f"{last['cores']} cores of {last['device']}, torch {last['torch']}, commit {last['commit']}, {last['date']}.",
    ]
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo_table,
    "kernels": kernels_table,
    "compile": compile_table,
    "precision": precision_table,
    "step": step_table,
    "loader": loader_table,
    "study": study_table,
    "encoder_tokens": encoder_tokens_table,
}
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def render(text: str) -> str:
    """The document with every table drawn anew."""
    return _TABLE.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def main(argv: list[str] | None = None) -> int:
    """The command; exit status 1 if --check meets a table that its rows do not give."""
    parser = argparse.ArgumentParser(prog="python -m ssast.benchmarks.tables", description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--step", type=Path, metavar="FILE")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if arguments.step:
        print(step_table(arguments.step))
        return 0
    check = arguments.check
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
