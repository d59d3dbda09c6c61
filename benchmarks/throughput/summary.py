"""The figures of a throughput report that are not in profile.json itself: all are worked out here, once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssast.engine.errors import UserError, first_line

from .timeline import PARTS

FILE, FORMAT = "profile.json", 1
Summary = dict[str, Any]


def read_profile(folder: Path) -> dict[str, Any]:
    """What `ssast profile` wrote into profile.json in the folder.

    Raises:
        UserError: there is none, or it is damaged or of another format.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"holds {constant}, which is no measurement")

    path = folder / FILE
    try:
        profile = json.loads(path.read_bytes(), parse_constant=refuse)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Name a folder that `ssast profile` wrote.") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {first_line(error)}. `ssast profile` writes it anew.") from None
    if not isinstance(profile, dict) or profile.get("format") != FORMAT:
        raise UserError(f"{path} is not of format {FORMAT}, which this version reads. `ssast profile` writes it anew.")
    return profile


def summarise(profile: Mapping[str, Any]) -> Summary:
    """Every figure of the report, as plain values for a JSON file, from what `read_profile` gives.

    Rates are of all timed steps together, their waits included. `total` is of all devices, `per_device` that divided by
    their number. A `share` and an efficiency are fractions of 1; `ms` are milliseconds a step. What cannot be known is
    None.
    """
    setup, flops, peak, timed = (profile[key] for key in ("setup", "flops", "peak", "steps"))
    seconds, devices = np.array(timed["seconds"]), setup["world_size"]
    clips_per_s = seconds.size * setup["clips_per_step"] / seconds.sum()
    total = {
        "clips_per_s": clips_per_s,
        "audio_hours_per_s": clips_per_s * setup["seconds_per_clip"] / 3600,
        "tokens_per_s": clips_per_s * setup["tokens"],
        "model_tflops": clips_per_s * flops["train_per_clip"] / 1e12,
    }
    per_device = {key: value / devices for key, value in total.items()}
    equivalent = setup["fp8_mlp"]
    median, late, last = (1e3 * np.quantile(seconds, level) for level in (0.5, 0.95, 0.99))
    summary = {
        "format": 1,
        "name": (profile["config"].get("run") or {}).get("name"),
        "written": profile["written"],
        "command": profile["command"],
        "device": {"kind": setup["device"], "name": setup["device_name"], "count": devices},
        "steps": {
            "timed": seconds.size,
            "warmup": timed["warmup"],
            "clips_per_step": setup["clips_per_step"],
            "seconds": seconds.sum(),
            "mean_ms": 1e3 * seconds.mean(),
            "p50_ms": median,
            "p95_ms": late,
            "p99_ms": last,
            "slowest_ms": 1e3 * seconds.max(),
        },
        "total": total,
        "per_device": per_device,
        "mfu": {
            "label": "MFU (bf16-equivalent)" if equivalent else "MFU",
            "value": per_device["model_tflops"] / peak["tflops"] if peak else None,
            "formula": _mfu_formula(flops["train_per_clip"], clips_per_s, devices, peak),
            "peak_tflops": peak["tflops"] if peak else None,
            "peak_source": peak["source"] if peak else None,
        },
        "data_stall": sum(timed["data_wait_seconds"]) / seconds.sum(),
        "parts": _parts(profile, seconds.mean()),
        "kernels": _kernels(profile),
        "memory": _memory(profile["memory"]),
        "ceilings": [
            {"name": name, "clips_per_s": ceiling["clips_per_s"], "reached": clips_per_s / ceiling["clips_per_s"]}
            for name, ceiling in profile["ceilings"].items()
        ],
        "baselines": profile["baselines"],
        "variants": profile["variants"],
        "scaling": _scaling(profile["scaling"]),
        "device_state": _device_state(profile["device_state"]),
    }
    summary["closest_ceiling"] = max(summary["ceilings"], key=lambda ceiling: ceiling["reached"], default=None)
    return _plain(summary)


def _mfu_formula(train_flop: int, clips_per_s: float, devices: int, peak: Mapping[str, Any] | None) -> str:
    """With its numbers, all devices together."""
    if peak is None:
        return "no peak is known for this device"
    below = f"{peak['tflops']:g} TFLOP/s" if devices == 1 else f"({devices} x {peak['tflops']:g} TFLOP/s)"
    return f"{significant(train_flop / 1e12, 4)} TFLOP/clip x {significant(clips_per_s)} clips/s / {below}"


def _parts(profile: Mapping[str, Any], mean_seconds: float) -> dict[str, Any]:
    parts = profile["parts"]
    step, seconds = parts["step_seconds"], parts["seconds"]
    names = [name for name in PARTS if name in seconds] + [name for name in seconds if name not in PARTS]
    unexplained = step - sum(seconds.values())
    return {
        "traced_steps": parts["steps"],
        "step_ms": 1e3 * step,
        "parts": [{"name": name, "ms": 1e3 * seconds[name], "share": seconds[name] / step} for name in names],
        "unexplained_ms": 1e3 * unexplained,
        "unexplained": unexplained / step,
        "traced_over_timed": step / mean_seconds,
    }


def _kernels(profile: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Longest first. `share`: of the traced step. `times_floor`: how many times what the roofline allows."""
    return [
        {
            "name": kernel["name"],
            "part": kernel["part"],
            "calls": kernel["calls"],
            "ms": 1e3 * kernel["seconds"],
            "share": kernel["seconds"] / profile["parts"]["step_seconds"],
            "floor_ms": 1e3 * kernel["floor_seconds"] if kernel["floor_seconds"] is not None else None,
            "times_floor": kernel["seconds"] / kernel["floor_seconds"] if kernel["floor_seconds"] else None,
        }
        for kernel in sorted(profile["kernels"], key=lambda kernel: -kernel["seconds"])
    ]


def _memory(memory: Mapping[str, Any]) -> dict[str, Any]:
    parts = {name: memory[name] for name in ("parameters", "gradients", "optimizer state", "activations", "other")}
    peak = memory["peak"]
    return {
        "source": memory["source"],
        "peak_bytes": peak,
        "parts": [
            {"name": name, "bytes": size, "share": size / peak if peak else None} for name, size in parts.items()
        ],
        "unexplained_bytes": peak - sum(parts.values()),
    }


def _scaling(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Efficiency: clips/s a rank over those of the row with the fewest ranks."""
    rows = sorted(rows, key=lambda row: row["ranks"])
    return [
        {
            "ranks": row["ranks"],
            "clips_per_s": row["clips_per_s"],
            "efficiency": row["clips_per_s"] / row["ranks"] / (rows[0]["clips_per_s"] / rows[0]["ranks"]),
        }
        for row in rows
    ]


def _device_state(samples: Sequence[Mapping[str, float]]) -> dict[str, Any] | None:
    if not samples:
        return None
    columns = {
        key: [sample[key] for sample in samples] for key in ("clock_mhz", "power_w", "temperature_c", "utilisation")
    }
    ranges = {
        key: {"lowest": min(values), "median": np.median(values), "highest": max(values)}
        for key, values in columns.items()
    }
    return {"samples": len(samples), **ranges}


def _plain(value: Any) -> Any:
    """Without numpy's types."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def significant(value: float, digits: int = 3) -> str:
    """With so many significant digits, but never fewer than the integer part has, and with commas: 2,031, 45.3,
    0.0123.
    """
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value
    return f"{value:,.{max(0, digits - 1 - exponent)}f}" if value else "0"
