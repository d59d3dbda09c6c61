"""The throughput report: what profile.json holds, as a page and as figures in JSON.

Its words are here. Figures that are not in profile.json itself come from `summarise`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ssast.engine.errors import UserError, first_line
from ssast.engine.files import write_whole
from ssast.engine.report.page import Code, Page, Picture, Section, Table, Tile, write_page

from .profile_pictures import COLOURS, UNKNOWN, Bar, draw_bars, draw_device, draw_scaling, draw_stack, draw_steps
from .summary import FILE, Summary, read_profile, significant, summarise

MOST_KERNELS, DRAWN_KERNELS = 20, 10
UNEXPLAINED = 0.01  # of a whole: if the parts miss or exceed it by more, the report says so


# ---- the report ------------------------------------------------------------------------------------------------------


def write_throughput_report(folder: Path) -> Path:
    """Write report.html, report.json and pictures/ from profile.json in the same folder; the path of the page.

    Raises:
        UserError: profile.json is missing or damaged, or the folder cannot be written.
    """
    profile = read_profile(folder)
    try:
        summary = summarise(profile)
        page = _report(profile, summary, folder)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{folder / FILE} is damaged: {what}. `ssast profile` writes it anew.") from error
    try:
        path = write_page(page, folder, "report")
        write_whole(folder / "report.json", json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written: {error.strerror}") from None
    return path


def _report(profile: Mapping[str, Any], summary: Summary, folder: Path) -> Page:
    setup = profile["setup"]
    sections = [
        _throughput(profile, summary),
        _step(profile, summary),
        _ceilings(summary),
        _kernel_section(profile, summary),
        _memory_section(summary),
        _scaling_section(summary),
        _device_section(profile, summary),
        Section("Notes", profile["notes"]) if profile["notes"] else None,
        _setup_section(profile),
    ]
    return Page(
        title=f"Throughput of {_name(summary, folder)}",
        kind=f"{setup['precision']} · {setup['engine']} · {_devices(summary)}",
        lead=(
            f"{setup['model']}, {setup['parameters']:,} parameters: {summary['steps']['timed']} training steps of "
            f"{setup['clips_per_step']:,} clips, timed after {summary['steps']['warmup']} of warm-up."
        ),
        tiles=_tiles(summary),
        sections=[section for section in sections if section],
        footer=f"Measured {profile['written']}. Every figure comes from profile.json beside this file.",
    )


def _tiles(summary: Summary) -> list[Tile]:
    steps, mfu = summary["steps"], summary["mfu"]
    rates = {
        "Clips a second": ("clips_per_s", _large),
        "Audio a second": ("audio_hours_per_s", lambda value: f"{significant(value)} h"),
        "Tokens a second": ("tokens_per_s", _large),
        "Model TFLOP/s": ("model_tflops", _large),
    }
    each = f"{{}} per {_device_word(summary)}" if summary["device"]["count"] > 1 else ""
    return [
        *(
            Tile(label, show(summary["total"][key]), each.format(show(summary["per_device"][key])))
            for label, (key, show) in rates.items()
        ),
        Tile(
            mfu["label"],
            _percent(mfu["value"]),
            f"of {mfu['peak_tflops']:g} TFLOP/s" if mfu["value"] else mfu["formula"],
        ),
        Tile("Median step", _ms(steps["p50_ms"]), f"99th percentile {_ms(steps['p99_ms'])}"),
        Tile("Data stall", _percent(summary["data_stall"]), "waits for data over the time of the timed steps"),
        *([Tile("Peak memory", _bytes(peak), "of one device")] if (peak := summary["memory"]["peak_bytes"]) else []),
    ]


def _throughput(profile: Mapping[str, Any], summary: Summary) -> Section:
    setup, flops, steps, mfu = profile["setup"], profile["flops"], summary["steps"], summary["mfu"]
    clips = steps["timed"] * steps["clips_per_step"]
    rows = [
        ("clips/s", "clips_per_s", f"{clips:,} clips in {significant(steps['seconds'])} s"),
        ("hours of audio/s", "audio_hours_per_s", f"{setup['seconds_per_clip']:g} s a clip"),
        ("tokens/s", "tokens_per_s", f"{setup['tokens']:,} tokens a clip"),
        (
            "model TFLOP/s",
            "model_tflops",
            f"{significant(flops['train_per_clip'] / 1e9, 4)} GFLOP a clip, forward and backward",
        ),
    ]
    several = summary["device"]["count"] > 1
    table = Table(
        ("", "total", f"per {_device_word(summary)}", "from") if several else ("", "measured", "from"),
        "lrrl" if several else "lrl",
        [
            (label, _large(summary["total"][key]), *([_large(summary["per_device"][key])] if several else []), source)
            for label, key, source in rows
        ]
        + [(mfu["label"], *[_percent(mfu["value"])] * (1 + several), mfu["formula"])],
    )
    return Section(
        "Throughput",
        [
            f"All {steps['timed']} timed steps together, waits for data included; {steps['warmup']} steps of warm-up "
            "before them are "
            "left out."
        ],
        tables=[table],
        after=[
            f"FLOP: {flops['formula']}. Here {significant(flops['forward_per_clip'] / 1e9, 4)} GFLOP a clip forward, "
            f"{significant(flops['train_per_clip'] / 1e9, 4)} to train."
        ]
        + ([f"Peak of one device: {mfu['peak_tflops']:g} TFLOP/s ({mfu['peak_source']})."] if mfu["value"] else [])
        + (
            ["The MLPs compute in FP8; their work is compared with the bf16 peak all the same."]
            if setup["fp8_mlp"]
            else []
        ),
    )


def _step(profile: Mapping[str, Any], summary: Summary) -> Section:
    steps, parts = summary["steps"], summary["parts"]
    shown = {part["name"]: part["ms"] for part in parts["parts"]}
    percentiles = {name: steps[f"{name}_ms"] for name in ("p50", "p95", "p99")}
    after = [
        f"Parts are means of {parts['traced_steps']} traced steps. Such a step takes {parts['traced_over_timed']:.2f} "
        "times as long as "
        f"the timed ones, which are not traced ({_ms(steps['mean_ms'])} on average). Their trace is "
        f"{profile['trace']}, for Perfetto or "
        "chrome://tracing."
    ]
    if abs(parts["unexplained"]) > UNEXPLAINED:
        after.append(
            f"The parts do not add up to the step: together they are {_ms(abs(parts['unexplained_ms']))} "
            f"({_percent(abs(parts['unexplained']))}) {'below' if parts['unexplained'] > 0 else 'above'} it."
        )
    if steps["timed"] < 100:
        after.append(f"Of {steps['timed']} steps, the 99th percentile is little else than the slowest.")
    return Section(
        "The step",
        pictures=[
            Picture(
                "step",
                "The step as a stacked bar of its parts",
                partial(draw_stack, f"A step of {_ms(parts['step_ms'])}", {"step": shown}, _ms),
            ),
            Picture(
                "step-times",
                "Each timed step, with percentiles",
                partial(draw_steps, profile["steps"]["seconds"], percentiles),
            ),
        ],
        tables=[
            Table(
                ("part", "time", "of the step"),
                "lrr",
                [(part["name"], _ms(part["ms"]), _percent(part["share"])) for part in parts["parts"]],
            ),
            Table(
                ("step", "time", "clips/s at it"),
                "lrr",
                [
                    (label, _ms(steps[key]), significant(1e3 * steps["clips_per_step"] / steps[key]))
                    for label, key in (
                        ("median (p50)", "p50_ms"),
                        ("95th percentile (p95)", "p95_ms"),
                        ("99th percentile (p99)", "p99_ms"),
                        ("slowest", "slowest_ms"),
                        ("mean", "mean_ms"),
                    )
                ],
            ),
        ],
        after=after,
    )


def _ceilings(summary: Summary) -> Section | None:
    """All of one device, as the baselines are. The picture and the table have the same rows: (what, clips/s, how this
    run stands to it, colour).
    """
    count, word = summary["device"]["count"], _device_word(summary)
    ours = summary["per_device"]["clips_per_s"]
    ceilings, variants = summary["ceilings"], summary["variants"]
    rows = [
        (f"ceiling: {row['name']}", row["clips_per_s"] / count, _percent(row["reached"]), "hidden") for row in ceilings
    ]
    rows += [
        (f"baseline: {row['name']}", row["clips_per_s"], _times(row["ratio"]), "valid") for row in summary["baselines"]
    ]
    rows += [
        (f"variant: {row['name']}", row["clips_per_s"] / count, _times(1 / row["ratio"]), "found") for row in variants
    ]
    if not rows:
        return None
    title = f"Clips a second per {word}" if count > 1 else "Clips a second"
    bars = [Bar(name, rate, f"{significant(rate)} · this run {stands}", colour) for name, rate, stands, colour in rows]
    text, closest = [], summary["closest_ceiling"]
    if closest:
        text = [
            f"Closest ceiling: {closest['name']}; this run reaches {_percent(closest['reached'])} of it. A ceiling is "
            "the same work with "
            "the rest left out: the model on batches that are there already, or the loader without a model."
        ]
        if closest["reached"] > 1:
            text.append("More than 100%: the machine was not equally fast in the two measurements.")
    after = [f"{row['name']}: {row['what']}; {_baseline_size(row)}." for row in summary["baselines"]]
    if after:
        after.append(
            f"Baselines were measured on one {word}, in turns with this run's own step there; how this run stands to "
            "them is the ratio of "
            "those turns."
        )
    return Section(
        "Ceilings and comparisons",
        text,
        [
            Picture(
                "comparison",
                f"{title}: this run, ceilings and others",
                partial(draw_bars, title, [Bar("this run", ours, significant(ours), "train"), *bars]),
            )
        ],
        [
            Table(
                ("", f"clips/s per {word}" if count > 1 else "clips/s", "this run"),
                "lrr",
                [
                    ("this run", significant(ours), ""),
                    *((name, significant(rate), stands) for name, rate, stands, _ in rows),
                ],
            )
        ],
        after,
    )


def _baseline_size(baseline: Mapping[str, Any]) -> str:
    peak = baseline["peak_bytes"]
    return f"{baseline['clips']:,} clips a step" + (f", {_bytes(peak)} at the peak" if peak is not None else "")


def _kernel_section(profile: Mapping[str, Any], summary: Summary) -> Section | None:
    kernels, rates = summary["kernels"], profile["ceiling_rates"]
    if not kernels:
        return None
    word = "Kernels" if summary["device"]["kind"] == "cuda" else "Operators"
    top = kernels[:MOST_KERNELS]
    bars = [
        Bar(
            kernel["name"],
            kernel["ms"],
            f"{_ms(kernel['ms'])}, {_percent(kernel['share'])}",
            COLOURS.get(kernel["part"], UNKNOWN),
            kernel["floor_ms"],
        )
        for kernel in kernels[:DRAWN_KERNELS]
    ]
    any_floor = any(kernel["floor_ms"] is not None for kernel in top)
    floors = (
        "The floor is the time that the work needs at least, at rates measured on this device: "
        f"{significant(rates['matmul_tflops'])} "
        f"TFLOP/s in {rates['dtype']} products, {significant(rates['copy_gb_per_s'])} GB/s in copies. "
        "It is left out where the work is not known."
    )
    return Section(
        word,
        [
            f"The {len(top)} that take longest in a step, together {_percent(sum(kernel['share'] for kernel in top))} "
            "of it."
        ],
        [
            Picture(
                "kernels",
                f"{word} by time",
                partial(
                    draw_bars,
                    f"{word} by time in a step",
                    bars,
                    note="colours as in the step" + "; line: the roofline's floor" * any_floor,
                ),
            )
        ],
        [
            Table(
                ("name", "part", "calls", "time", "of the step", "x floor"),
                "llrrrr",
                [
                    (
                        kernel["name"],
                        kernel["part"],
                        f"{round(kernel['calls'], 1):,g}",
                        _ms(kernel["ms"]),
                        _percent(kernel["share"]),
                        significant(kernel["times_floor"]) if kernel["times_floor"] else "",
                    )
                    for kernel in top
                ],
                code=True,
            )
        ],
        [floors] if any_floor else ["The work of none of them is known, so that none is compared with the roofline."],
    )


def _memory_section(summary: Summary) -> Section | None:
    memory = summary["memory"]
    peak, missing = memory["peak_bytes"], memory["unexplained_bytes"]
    if not peak:
        return None
    after = [f"Source: {memory['source']}."]
    if abs(missing) > UNEXPLAINED * peak:
        after.append(
            f"The parts do not add up to the peak: together they are {_bytes(abs(missing))} "
            f"{'below' if missing > 0 else 'above'} it."
        )
    shown = {part["name"]: part["bytes"] for part in memory["parts"]}
    return Section(
        "Memory",
        [f"{_bytes(peak)} at the peak, on one device."],
        [
            Picture(
                "memory",
                "Peak memory as a stacked bar of its parts",
                partial(draw_stack, f"Memory at its peak, {_bytes(peak)}", {"memory": shown}, _bytes),
            )
        ],
        [
            Table(
                ("part", "size", "of the peak"),
                "lrr",
                [(part["name"], _bytes(part["bytes"]), _percent(part["share"])) for part in memory["parts"]],
            )
        ],
        after,
    )


def _scaling_section(summary: Summary) -> Section | None:
    rows = summary["scaling"]
    if len(rows) < 2:
        return None
    table = [(f"{row['ranks']}", significant(row["clips_per_s"]), _percent(row["efficiency"])) for row in rows]
    return Section(
        "Scaling",
        [f"Efficiency: clips/s a rank, over those of {rows[0]['ranks']} rank{'' if rows[0]['ranks'] == 1 else 's'}."],
        [Picture("scaling", "Clips a second over ranks", partial(draw_scaling, rows))],
        [Table(("ranks", "clips/s", "efficiency"), "lrr", table)],
    )


def _device_section(profile: Mapping[str, Any], summary: Summary) -> Section | None:
    state = summary["device_state"]
    if state is None:
        return None
    limit = (profile["environment"].get("gpu") or {}).get("power_limit_w")
    kinds = {
        "clock_mhz": "clock, MHz",
        "power_w": "power, W",
        "temperature_c": "temperature, °C",
        "utilisation": "utilisation, %",
    }
    rows = [
        (label, *(significant(state[key][of]) for of in ("lowest", "median", "highest")))
        for key, label in kinds.items()
    ]
    return Section(
        "The device",
        [
            f"{state['samples']} samples while it was measured"
            + (f"; the power limit is {limit:g} W." if limit else ".")
        ],
        [Picture("device", "Clock and power over time", partial(draw_device, profile["device_state"], limit))],
        [Table(("", "lowest", "median", "highest"), "lrrr", rows)],
    )


def _setup_section(profile: Mapping[str, Any]) -> Section:
    auto = profile["auto_batch"]
    environment = {key: value for key, value in profile["environment"].items() if key != "command"}
    rows = [*_flat(profile["setup"]), *_flat(environment)]
    if auto:
        rows.append(("micro-batch that fits", f"{auto['used']:,}, of at most {auto['largest']:,} that fit"))
    return Section(
        "Setup",
        tables=[Table(("", ""), "ll", rows)],
        code=[
            Code("Measured by", profile["command"]),
            Code(
                "Configuration",
                yaml.safe_dump(profile["config"], sort_keys=False, allow_unicode=True).rstrip(),
                folded=True,
            ),
        ],
    )


# ---- words and numbers -----------------------------------------------------------------------------------------------


def _name(summary: Summary, folder: Path) -> str:
    return summary["name"] or folder.resolve().name


def _devices(summary: Summary) -> str:
    device = summary["device"]
    return (
        f"{device['count']} x {device['name']}"
        if device["kind"] == "cuda"
        else f"{device['name']}, {_ranks(device['count'])}"
    )


def _ranks(count: int) -> str:
    return f"{count} rank{'' if count == 1 else 's'}"


def _device_word(summary: Summary) -> str:
    return "GPU" if summary["device"]["kind"] == "cuda" else "rank"


def _ms(milliseconds: float) -> str:
    return f"{significant(milliseconds)} ms"


def _bytes(size: float) -> str:
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= factor:
            return f"{significant(size / factor)} {unit}"
    return f"{size:g} B"


def _percent(fraction: float | None) -> str:
    return (
        "not known" if fraction is None else f"{fraction:.1%}" if fraction == 0 or abs(fraction) >= 0.0005 else "< 0.1%"
    )


def _large(value: float) -> str:
    return f"{significant(value / 1e6)} million" if value >= 1e6 else significant(value)


def _times(ratio: float) -> str:
    return f"{significant(ratio)} x"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {_text(item)}" for key, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if value is None:
        return "not set"
    return f"{value:,}" if isinstance(value, int) else f"{value}"


def _flat(values: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    return ((key.replace("_", " "), _text(value)) for key, value in values.items() if value is not None)
