"""Pictures of benchmark rows: a bar chart for each operator, and where everything stands under the machine's two
ceilings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ssast.engine.errors import UserError
from ssast.engine.report.theme import LIGHT, PALETTE, style_axes

from .cases import CEILING, COPY, MATMUL, OPERATORS

Row = dict[str, Any]
COLOURS = {
    "triton": PALETTE["red"],
    "torch": PALETTE["navy"],
    "compiled": PALETTE["blue"],
    "official loop": PALETTE["grey"],
}
OTHERS = [colour for colour in PALETTE.values() if colour not in COLOURS.values()]  # for other providers


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw what the rows hold; returns the files.

    Raises:
        UserError: the folder cannot be written.
    """
    measured = [row for row in rows if row["operator"] != CEILING]
    ceilings = {row["shape"].split()[0]: row for row in rows if row["operator"] == CEILING}
    figures = {
        name: _bars(name, group)
        for name in OPERATORS
        if (group := [row for row in measured if row["operator"] == name])
    }
    if {COPY, MATMUL} <= set(ceilings) and any(row["tflop_per_s"] for row in measured):
        figures["roofline"] = _roofline([row for row in measured if row["tflop_per_s"]], ceilings)
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=160)
            files.append(folder / f"{name}.png")
    except OSError as error:
        raise UserError(f"--plot {folder}: cannot be written: {error.strerror}") from None
    return files


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """Of each provider, in the order of the rows."""
    names = dict.fromkeys(row["provider"] for row in rows)
    others = iter(OTHERS * 4)
    return {name: COLOURS.get(name) or next(others) for name in names}


def _machine(row: Row) -> str:
    size = f"{float(row['power_limit_w']):.0f} W" if row["power_limit_w"] else f"{row['cores']} cores"
    return (
        f"{row['device']}, {size}; torch {row['torch']}, triton {row['triton']}; commit {row['commit']}, {row['date']}"
    )


# ---- bars ------------------------------------------------------------------------------------------------------------

ROW_HEIGHT, GAP = 0.23, 0.7  # inches of a bar; bars between two modes


def _bars(operator: str, rows: Sequence[Row]) -> Figure:
    """A panel for each shape, in it a group for each mode, in it a bar for each provider."""
    panels = [[row for row in rows if row["shape"] == shape] for shape in dict.fromkeys(row["shape"] for row in rows)]
    across = 2 if len(panels) > 2 else 1
    down = math.ceil(len(panels) / across)
    units = [max(_units(panel) for panel in panels[i * across : (i + 1) * across]) for i in range(down)]
    height = ROW_HEIGHT * sum(units) + 0.6 * down + 1.0
    layout = ConstrainedLayoutEngine(h_pad=0.11, w_pad=0.12)
    figure = Figure((8.5 * across**0.6, height), facecolor="white", layout=layout)
    grid = figure.subplots(down, across, squeeze=False, height_ratios=units)
    colours = _colours(rows)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _panel(axes, panel, colours)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    return _captioned(
        figure,
        f"{operator}, {rows[0]['dtype']}: median time of a call on a logarithmic scale; thin line: 20th to 80th "
        "percentile",
        rows[0],
    )


def _captioned(figure: Figure, title: str, row: Row) -> Figure:
    """With a title above and the machine that it was measured on below."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=9.5, color=LIGHT.ink)
    figure.supxlabel(_machine(row), x=0.01, ha="left", fontsize=7, color=LIGHT.soft)
    return figure


def _units(panel: Sequence[Row]) -> float:
    return len(panel) + GAP * (len({row["mode"] for row in panel}) - 1) + 0.4


def _panel(axes: Axes, rows: Sequence[Row], colours: dict[str, str]) -> None:
    position, ticks = 0.0, []
    ends = [float(row[name]) for row in rows for name in ("p20_ms", "p80_ms")]
    left = min(ends) / 4  # a logarithmic bar has to start somewhere
    for mode in dict.fromkeys(row["mode"] for row in rows):
        for row in sorted((row for row in rows if row["mode"] == mode), key=lambda row: float(row["p50_ms"])):
            low, middle, high = (float(row[name]) for name in ("p20_ms", "p50_ms", "p80_ms"))
            axes.barh(position, middle - left, left=left, height=0.8, color=colours[row["provider"]])
            axes.plot([low, high], [position, position], color=LIGHT.ink, linewidth=1.1, solid_capstyle="butt")
            place: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8, "color": LIGHT.ink}
            axes.annotate(_duration(middle), (max(high, middle), position), (5, 0), **place)
            ticks.append((position, f"{row['provider']}  ·  {mode}"))
            position += 1
        position += GAP
    axes.set_xscale("log")
    span = max(ends) / left
    axes.set_xlim(left, max(ends) * span**0.16)  # room for the last number
    axes.set_ylim(position - GAP - 0.4, -0.6)
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if span < 100 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _duration(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(rows[0]["shape"], loc="left", fontsize=9, fontweight="bold", color=LIGHT.ink, pad=5)
    style_axes(axes, grid="x")


def _duration(milliseconds: float) -> str:
    for factor, unit in ((1e-3, "s"), (1, "ms")):
        if milliseconds * factor >= 1:
            return f"{milliseconds * factor:.3g} {unit}"
    return f"{milliseconds * 1e3:.3g} µs"


# ---- roofline --------------------------------------------------------------------------------------------------------


def _roofline(rows: Sequence[Row], ceilings: dict[str, Row]) -> Figure:
    """Rate over intensity, both of what is needed (formulas.py); operators without floating-point work are left out."""
    bandwidth, peak = float(ceilings[COPY]["gb_per_s"]) / 1e3, float(ceilings[MATMUL]["tflop_per_s"])  # TB/s, TFLOP/s
    points = [(int(row["needed_flop"]) / int(row["needed_bytes"]), float(row["tflop_per_s"]), row) for row in rows]
    ridge = peak / bandwidth
    left, right = min(ridge, *(x for x, _, _ in points)) / 2.5, max(ridge, *(x for x, _, _ in points)) * 2.5
    bottom, top = min(y for _, y, _ in points) / 8, peak * 2.2
    figure = Figure((8.5, 5.6), facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.plot([left, ridge, right], [left * bandwidth, peak, peak], color=LIGHT.ink, linewidth=1.6)
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    axes.annotate(
        f"matrix product {_si(peak, 'TFLOP/s')}",
        (right, peak),
        (-4, 4),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    slope: dict[str, Any] = {
        "rotation": math.degrees(math.atan(bandwidth)),
        "rotation_mode": "anchor",
        "transform_rotates_text": True,
        "va": "bottom",
        "fontsize": 8,
    }
    axes.text(left * 1.1, left * 1.1 * bandwidth * 1.06, f"copy {_si(bandwidth, 'TB/s')}", **slope)
    colours = _colours(rows)
    for x, y, row in sorted(points, key=lambda point: point[2]["provider"] == "triton"):  # ours on top
        axes.plot(
            x,
            y,
            "o",
            markersize=6.5,
            color=colours[row["provider"]],
            markeredgecolor="white",
            markeredgewidth=0.7,
            zorder=3,
        )
    for label, x, y in _labels(points):
        place: dict[str, Any] = {
            "textcoords": "offset points",
            "rotation": 90,
            "ha": "center",
            "va": "top",
            "fontsize": 7.5,
            "color": LIGHT.soft,
        }
        axes.annotate(label, (x, y), (0, -7), **place)
    handles = [Line2D([], [], marker="o", linestyle="", color=colour, label=name) for name, colour in colours.items()]
    axes.legend(handles=handles, frameon=False, fontsize=8, labelcolor=LIGHT.ink, loc="lower right", handletextpad=0.2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if axis is axes.xaxis else (1,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("needed FLOP a needed byte", fontsize=8.5, color=LIGHT.ink)
    axes.set_ylabel("needed TFLOP/s", fontsize=8.5, color=LIGHT.ink)
    style_axes(axes, grid="both")
    return _captioned(
        figure, f"Under the measured ceilings, {', '.join(dict.fromkeys(row['dtype'] for row in rows))}", rows[0]
    )


def _labels(points: Sequence[tuple[float, float, Row]]) -> list[tuple[str, float, float]]:
    """What stands where, below the lowest point there; modes of like intensity share a label."""
    groups: list[tuple[str, list[str], list[float], list[float]]] = []  # operator, modes, intensities, rates
    for x, y, row in points:
        for operator, modes, xs, ys in groups:
            if operator == row["operator"] and (row["mode"] in modes or abs(math.log(x / xs[0])) < 0.15):
                modes += [row["mode"]] * (row["mode"] not in modes)
                xs.append(x)
                ys.append(y)
                break
        else:
            groups.append((row["operator"], [row["mode"]], [x], [y]))
    every = {operator: {row["mode"] for _, _, row in points if row["operator"] == operator} for operator, *_ in groups}
    return [
        (
            operator if set(modes) == every[operator] else f"{operator} {', '.join(modes)}",
            math.sqrt(min(xs) * max(xs)),
            min(ys),
        )
        for operator, modes, xs, ys in groups
    ]


def _si(value: float, unit: str) -> str:
    """`unit` starts with T."""
    return f"{value:.3g} {unit}" if value >= 1 else f"{value * 1e3:.3g} G{unit[1:]}"
