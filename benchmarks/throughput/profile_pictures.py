"""Pictures of a throughput report, each for a light or a dark page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ssast.engine.report.theme import DENSITY, PALETTE, WIDTH, Theme, style_axes

from .summary import significant

LEFT, RIGHT = 0.14, WIDTH - 0.14  # inches of what needs no axis
CUT = 2.5  # a bar longer than so many times the first one is cut short
COLOURS = {
    "data wait": PALETTE["red"],
    "copy": PALETTE["orange"],
    "fbank": PALETTE["yellow"],
    "mask + embed": PALETTE["olive"],
    "encoder forward": PALETTE["blue"],
    "decoder forward": PALETTE["brown"],
    "heads + loss": PALETTE["cyan"],
    "backward": PALETTE["navy"],
    "communication": PALETTE["violet"],
    "optimizer": PALETTE["green"],
    "host gaps": PALETTE["grey"],
    "parameters": PALETTE["blue"],
    "gradients": PALETTE["violet"],
    "optimizer state": PALETTE["green"],
    "activations": PALETTE["yellow"],
    "other": PALETTE["grey"],
}
UNKNOWN = PALETTE["grey"]  # a part of another name


class Bar(NamedTuple):
    """`text` stands at its right; `mark` is a value on its scale, drawn as a line; `colour` is a colour, or names one
    of the theme.
    """

    label: str
    value: float
    text: str
    colour: str
    mark: float | None = None


def draw_stack(
    title: str, bars: Mapping[str, Mapping[str, float]], show: Callable[[float], str], theme: Theme
) -> Figure:
    """One stacked bar for each entry of `bars` ({name of the bar: {part: value}}), all on one scale, and a legend with
    every value.
    """
    parts = list(dict.fromkeys(part for values in bars.values() for part in values))
    columns = 2 if len(bars) == 1 else 1
    rows = math.ceil(len(parts) / columns)
    named = 0.2 * (len(bars) > 1)  # above each bar
    height = 0.42 + len(bars) * (0.52 + named) + 0.14 + named + 0.21 * rows + 0.06
    figure, axes = _sheet(height, title, theme)
    longest = max(sum(values.values()) for values in bars.values()) or 1.0
    top = 0.42
    for name, values in bars.items():
        if named:
            _label(axes, LEFT, top + 0.1, name, RIGHT - LEFT - 0.9, fontsize=8.5, color=theme.ink)
            axes.text(
                RIGHT, top + 0.1, show(sum(values.values())), fontsize=8.5, color=theme.ink, va="center", ha="right"
            )
        _stack(axes, values, top + named, (RIGHT - LEFT) / longest, theme)
        top += 0.52 + named
    top += 0.14
    ends = [RIGHT - 0.85 * (len(bars) - 1 - i) for i in range(len(bars))]
    if named:
        for name, end in zip(bars, ends, strict=True):
            _label(axes, end, top + 0.1, name, 0.75, fontsize=8, color=theme.soft, ha="right")
    middle = (LEFT + RIGHT) / 2
    for i, part in enumerate(parts):
        column, row = divmod(i, rows)
        left, y = (LEFT, middle + 0.1)[column], top + named + 0.1 + 0.21 * row
        axes.fill(
            [left, left + 0.11, left + 0.11, left],
            [y - 0.055, y - 0.055, y + 0.055, y + 0.055],
            _colour(part),
            linewidth=0,
        )
        axes.text(left + 0.18, y, part, fontsize=8, color=theme.ink, va="center")
        for values, end in zip(bars.values(), [(middle - 0.1, RIGHT)[column]] if columns == 2 else ends, strict=True):
            text = show(values[part]) if part in values else "–"
            axes.text(end, y, text, fontsize=8, color=theme.soft, va="center", ha="right")
    return figure


def _stack(axes: Axes, values: Mapping[str, float], top: float, scale: float, theme: Theme) -> None:
    """Parts side by side; the name and share of each stand in it where they fit."""
    renderer, total, left = _renderer(axes), sum(values.values()) or 1.0, LEFT
    for part, value in values.items():
        width, colour = value * scale, _colour(part)
        axes.barh(top + 0.25, width, 0.46, left, color=colour, edgecolor=theme.paper, linewidth=0.6)
        look: dict[str, Any] = {
            "fontsize": 7.5,
            "ha": "center",
            "va": "center",
            "color": _on(colour),
            "linespacing": 1.15,
        }
        percentage = f"{value / total:.0%}"
        for text in (f"{part}\n{percentage}", part.replace(" ", "\n", 1) + f"\n{percentage}", percentage):
            label = axes.text(left + width / 2, top + 0.25, text, **look)
            box = label.get_window_extent(renderer)
            if box.width / DENSITY < width - 0.06 and box.height / DENSITY < 0.46:
                break
            label.remove()
        left += width


def draw_bars(title: str, bars: Sequence[Bar], theme: Theme, note: str = "") -> Figure:
    """A bar for each entry under its label and text, from 0; one that is CUT times the first is cut short, with a gap
    to show it.
    """
    height = 0.42 + 0.38 * len(bars) + (0.24 if note else 0.06)
    figure, axes = _sheet(height, title, theme)
    reach = min(max(max(bar.value, bar.mark or 0) for bar in bars), CUT * bars[0].value) or 1.0
    scale = (RIGHT - LEFT) / reach
    for i, bar in enumerate(bars):
        y = 0.42 + 0.38 * i
        text = axes.text(RIGHT, y + 0.09, bar.text, fontsize=8, color=theme.ink, va="center", ha="right")
        left = text.get_window_extent(_renderer(axes)).x0 / DENSITY - 0.1
        _label(axes, LEFT, y + 0.09, bar.label, left - LEFT, fontsize=8, color=theme.soft)
        colour = getattr(theme, bar.colour, bar.colour)
        axes.barh(y + 0.25, min(bar.value, reach) * scale, 0.12, LEFT, color=colour, linewidth=0)
        if bar.value > reach:
            gap = RIGHT - 0.3
            axes.plot([gap - 0.03, gap + 0.03], [y + 0.34, y + 0.16], color=theme.paper, linewidth=2.5)
        if bar.mark is not None and bar.mark <= reach:
            axes.plot([LEFT + bar.mark * scale] * 2, [y + 0.165, y + 0.335], color=theme.ink, linewidth=1.6)
    if note:
        axes.text(LEFT, height - 0.13, note, fontsize=8, color=theme.soft, va="center")
    return figure


def draw_steps(seconds: Sequence[float], percentiles: Mapping[str, float], theme: Theme) -> Figure:
    """Each timed step in order, and beside it how often each time occurs; `percentiles` (in ms) as lines across
    both.
    """
    figure = Figure((WIDTH, 2.5), DENSITY, facecolor=theme.paper)
    series, counts = figure.subplots(
        1,
        2,
        sharey=True,
        gridspec_kw={"width_ratios": (3, 1), "wspace": 0.06, "left": 0.125, "right": 0.97, "bottom": 0.16, "top": 0.8},
    )
    milliseconds = 1e3 * np.asarray(seconds)
    series.plot(
        range(1, milliseconds.size + 1),
        milliseconds,
        "o",
        color=theme.train,
        markersize=3,
        markeredgewidth=0,
        clip_on=False,
    )
    bins = np.histogram_bin_edges(milliseconds, min(max(milliseconds.size // 4, 8), 40))
    counts.hist(milliseconds, bins, orientation="horizontal", color=theme.train, linewidth=0)
    styles = ("-", (0, (4, 2)), (0, (1, 1.5)))
    for (name, value), style in zip(percentiles.items(), styles, strict=True):
        series.axhline(value, color=theme.valid, linewidth=1.1, linestyle=style, label=f"{name} {significant(value)}")
        counts.axhline(value, color=theme.valid, linewidth=1.1, linestyle=style)
    for axes in (series, counts):
        style_axes(axes, theme, grid="y")
        axes.xaxis.set_major_locator(
            MaxNLocator(5 if axes is series else 2, integer=True, prune=None if axes is series else "lower")
        )
    series.set_xlabel("timed step", fontsize=9, color=theme.soft, loc="right", labelpad=1)
    counts.set_xlabel("steps", fontsize=9, color=theme.soft, loc="right", labelpad=1)
    _title(figure, "Step time, ms", theme)
    place: dict[str, Any] = {
        "loc": "lower right",
        "bbox_to_anchor": (0.99, 0.8),
        "borderaxespad": 0.2,
        "frameon": False,
        "labelcolor": theme.soft,
    }
    figure.legend(
        *series.get_legend_handles_labels(),
        ncols=3,
        handlelength=1.6,
        columnspacing=1,
        handletextpad=0.5,
        fontsize=8.5,
        **place,
    )
    return figure


def draw_device(samples: Sequence[Mapping[str, float]], power_limit: float | None, theme: Theme) -> Figure:
    """Clock and power over the seconds of the measurement, the power limit as a dashed line."""
    figure = Figure((WIDTH, 3.1), DENSITY, facecolor=theme.paper)
    panels = figure.subplots(
        2, sharex=True, gridspec_kw={"hspace": 0.42, "left": 0.125, "right": 0.97, "bottom": 0.13, "top": 0.82}
    )
    seconds = [sample["seconds"] for sample in samples]
    kinds = (("clock_mhz", "Clock, MHz", theme.train), ("power_w", "Power, W", theme.valid))
    for axes, (key, title, colour) in zip(panels, kinds, strict=True):
        values = [sample[key] for sample in samples]
        axes.plot(seconds, values, color=colour, linewidth=1.4, marker="." if len(values) < 3 else None)
        style_axes(axes, theme, grid="y")
        axes.set_title(title, loc="left", fontsize=9, color=theme.soft, pad=4)
        if key == "power_w" and power_limit:
            axes.axhline(power_limit, color=theme.soft, linewidth=1, linestyle=(0, (4, 3)))
            axes.set_title(
                f"dashed: limit {significant(power_limit)} W", loc="right", fontsize=8.5, color=theme.soft, pad=4
            )
        axes.set_ylim(0, 1.08 * max(*values, (power_limit or 0) if key == "power_w" else 0, 1))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    panels[-1].set_xlabel("seconds", fontsize=9, color=theme.soft, loc="right", labelpad=1)
    _title(figure, "The device while it was measured", theme)
    return figure


def draw_scaling(rows: Sequence[Mapping[str, Any]], theme: Theme) -> Figure:
    """Clips/s over ranks, with the efficiency of each, against a line of as much a rank as the first row has."""
    figure = Figure((WIDTH, 2.6), DENSITY, facecolor=theme.paper)
    axes = figure.add_axes((0.15, 0.16, 0.8, 0.66))
    ranks, rates = ([row[key] for row in rows] for key in ("ranks", "clips_per_s"))
    ideal = [rates[0] / ranks[0] * count for count in (0, max(ranks))]
    axes.plot([0, max(ranks)], ideal, color=theme.soft, linewidth=1, linestyle=(0, (4, 3)))
    axes.plot(ranks, rates, "o-", color=theme.train, linewidth=1.6, markersize=4.5)
    for row in rows:
        place: dict[str, Any] = {
            "textcoords": "offset points",
            "xytext": (-6, 4),
            "fontsize": 8.5,
            "color": theme.ink,
            "ha": "right",
        }
        axes.annotate(f"{row['efficiency']:.0%}", (row["ranks"], row["clips_per_s"]), **place)
    style_axes(axes, theme, grid="y")
    axes.set_xlim(0, 1.06 * max(ranks))
    axes.set_ylim(0, 1.08 * max(*rates, *ideal))
    axes.set_xticks(ranks)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}" if value < 1000 else f"{value:,.0f}")
    axes.set_xlabel("ranks", fontsize=9, color=theme.soft, loc="right", labelpad=1)
    axes.set_title("dashed: in proportion to the ranks", loc="right", fontsize=8.5, color=theme.soft, pad=5)
    _title(figure, "Clips/s over ranks", theme)
    return figure


def _sheet(height: float, title: str, theme: Theme) -> tuple[Figure, Axes]:
    """A figure to draw on in inches from its upper left corner."""
    figure = Figure((WIDTH, height), DENSITY, facecolor=theme.paper)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_autoscale_on(False)
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    _title(figure, title, theme)
    return figure, axes


def _title(figure: Figure, title: str, theme: Theme) -> None:
    place = (LEFT / WIDTH, 1 - 0.2 / figure.get_figheight())
    figure.text(*place, title, fontsize=10.5, fontweight="bold", color=theme.ink, va="center", parse_math=False)


def _colour(part: str) -> str:
    return COLOURS.get(part, UNKNOWN)


def _on(colour: str) -> str:
    """Black or white, whichever is easier to read on the colour."""
    return "#111113" if np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)) > 0.42 else "#ffffff"


def _label(axes: Axes, x: float, y: float, text: str, width: float, **look: Any) -> None:
    """A text of at most so many inches, cut at its end where it is longer."""
    label = axes.text(x, y, text, va="center", parse_math=False, **look)
    while text and label.get_window_extent(_renderer(axes)).width / DENSITY > width:
        text = text[:-1]
        label.set_text(f"{text}…")


def _renderer(axes: Axes) -> RendererAgg:
    """What measures texts."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    canvas = figure.canvas
    return (canvas if isinstance(canvas, FigureCanvasAgg) else FigureCanvasAgg(figure)).get_renderer()
