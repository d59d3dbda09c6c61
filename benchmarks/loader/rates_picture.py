"""A picture of the rates: a panel for each codec, in it a group for each number of cores, in it a bar for each
contestant.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ssast.engine.errors import UserError
from ssast.engine.report.theme import LIGHT, PALETTE, style_axes

from .aims import ALONE, OURS, RATE

Row = dict[str, Any]
COLOURS = {
    OURS: PALETTE["red"],
    ALONE: LIGHT.ink,
    "official way": PALETTE["grey"],
    "soundfile, DataLoader": PALETTE["navy"],
    "webdataset, DataLoader": PALETTE["blue"],
}
BAR, GAP = 0.21, 0.7  # inches of a bar; bars between two groups


def draw(rows: Sequence[Row], file: Path) -> Path:
    """The rates of one run.

    Raises:
        UserError: the file cannot be written.
    """
    rates = [row for row in rows if row["metric"] == RATE and row["p50"] not in ("", None)]
    panels = [[row for row in rates if row["codec"] == codec] for codec in dict.fromkeys(row["codec"] for row in rates)]
    units = [len(panel) + GAP * len({row["workers"] for row in panel}) for panel in panels]
    figure = Figure((8.5, BAR * sum(units) + 0.5 * len(panels) + 0.8), facecolor="white", layout="constrained")
    for axes, panel in zip(
        figure.subplots(len(panels), 1, squeeze=False, height_ratios=units).flat, panels, strict=True
    ):
        _panel(axes, panel)
    first = rates[0]
    what = f"Clips of {float(first['clip_s']):g} s read a second, batches of {first['batch']}"
    title = f"{what}; thin line: quartiles of {first['rounds']} rounds"
    figure.suptitle(title, x=0.01, ha="left", fontsize=9.5, color=LIGHT.ink)
    machine = f"{first['device']}, {first['cores']} cores, page cache warm; torch {first['torch']}"
    figure.supxlabel(
        f"{machine}; commit {first['commit']}, {first['date']}", x=0.01, ha="left", fontsize=7, color=LIGHT.soft
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=160)
    except OSError as error:
        raise UserError(f"--plot {file}: cannot be written: {error.strerror}") from None
    except ValueError as error:  # a format that there is not
        raise UserError(f"--plot {file}: {error}") from None
    return file


def _panel(axes: Axes, rows: Sequence[Row]) -> None:
    position, ticks, longest = 0.0, [], max(float(row["p75"]) for row in rows)
    for workers in dict.fromkeys(row["workers"] for row in rows):
        group = [row for row in rows if row["workers"] == workers]
        for row in sorted(group, key=lambda row: -float(row["p50"])):
            low, middle, high = (float(row[name]) for name in ("p25", "p50", "p75"))
            axes.barh(position, middle, height=0.8, color=COLOURS.get(row["contestant"], PALETTE["green"]))
            axes.plot([low, high], [position, position], color=LIGHT.soft, linewidth=1.1, solid_capstyle="butt")
            place: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8, "color": LIGHT.ink}
            axes.annotate(f"{middle:,.0f}", (high, position), (4, 0), **place)
            ticks.append(
                (position, f"{row['contestant']}, {row['source']}  ·  {workers} core{'s' * (int(workers) > 1)}")
            )
            position += 1
        position += GAP
    axes.set_xlim(0, longest * 1.1)
    axes.set_ylim(position - GAP - 0.4, -0.6)
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_title(rows[0]["codec"], loc="left", fontsize=9, fontweight="bold", color=LIGHT.ink, pad=5)
    style_axes(axes, grid="x")
