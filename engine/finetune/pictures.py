"""Pictures of how a classifier does: what it takes for what, class by class, and on the way there."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ssast.engine.errors import UserError
from ssast.engine.report.theme import LIGHT, printable, style_axes

from .metrics import class_metrics, per_class

BLUES = LinearSegmentedColormap.from_list("fraction", ["#ffffff", "#d5e4f3", "#78aef0", LIGHT.train, "#153a63"])
DENSITY = 160  # dots per inch
NUMBERED_UP_TO = 12  # classes: the fraction is written into each cell
NAMED_UP_TO = 50  # classes: the rows and columns have names
ALL_UP_TO, BARS = 50, 30  # classes: beyond so many, the best and the worst half of so many
MOST_CONFUSED = 10
NAME_LETTERS = 24
CURVES = ("loss", "accuracy", "mAP", "lr")  # columns of metrics.jsonl that tell of fine-tuning


def write_pictures(
    folder: Path, scores: np.ndarray, targets: np.ndarray, labels: Sequence[str], multi_label: bool
) -> list[Path]:
    """Draw scores [N, C] against targets [N, C]: confusion.png where a clip has one label, and classes.png.

    Raises as `class_metrics`, and `UserError` if the folder cannot be written.
    """
    values = class_metrics(scores, targets, labels, multi_label)
    figures = {"classes": draw_classes(per_class(scores, targets, labels, multi_label), values, multi_label)}
    if not multi_label:
        figures = {"confusion": draw_confusion(np.asarray(scores), np.asarray(targets), labels)} | figures
    return [_save(figure, folder / f"{name}.png") for name, figure in figures.items()]


def write_learning_curve(
    path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], x: str = "epoch"
) -> Path:
    """Draw columns of metrics over `x`, a panel each: rows of kind "train" as a line, of "valid" as dots. Raises
    `UserError` as above.
    """
    return _save(draw_learning_curve(rows, columns, x), path)


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DENSITY)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


# ---- confusion -------------------------------------------------------------------------------------------------------


def confusion(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """int64 [C, C]: clips of the row's class that were taken for the column's."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(targets.argmax(axis=1), scores.argmax(axis=1), labels=np.arange(targets.shape[1]))


def most_confused(
    counts: np.ndarray, labels: Sequence[str], most: int = MOST_CONFUSED
) -> list[tuple[str, str, int, int]]:
    """(class, what it was taken for, how often, clips of the class) of the pairs of classes confused most often."""
    wrong = counts * ~np.eye(len(counts), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = (np.unravel_index(place, wrong.shape) for place in order)
    return [
        (labels[row], labels[at], int(wrong[row, at]), int(counts[row].sum())) for row, at in pairs if wrong[row, at]
    ]


def draw_confusion(scores: np.ndarray, targets: np.ndarray, labels: Sequence[str]) -> Figure:
    """A row for each class: the fraction of its clips taken for each. Beside it the pairs confused most often."""
    counts = confusion(scores, targets)
    size = len(labels)
    totals = counts.sum(axis=1, keepdims=True)
    fractions = np.where(totals > 0, counts / np.maximum(totals, 1), np.nan)
    named = size <= NAMED_UP_TO
    side = min(max(0.55 * size, 2.6), 7.0) if size <= NUMBERED_UP_TO else 7.0  # inches of the matrix
    points = 8.5 if size <= 20 else 6.5 if size <= 36 else 5.5  # of the letters of names
    margin = 0.35 + (0.0085 * points * min(max(map(len, labels)), NAME_LETTERS) if named else 0.2)
    beside, above, below = 3.9, 0.55, margin + 0.1
    width, height = margin + side + beside, max(above + side + below, 4.4)
    figure = Figure((width, height), facecolor="white")
    axes = figure.add_axes((margin / width, 1 - (above + side) / height, side / width, side / height))
    norm = PowerNorm(0.6, 0, 1)  # so that a few percent are seen
    axes.imshow(fractions, cmap=BLUES.with_extremes(bad=LIGHT.grid), norm=norm, interpolation="nearest", aspect="auto")
    if size <= NUMBERED_UP_TO:
        for (row, column), fraction in np.ndenumerate(fractions):
            if fraction > 0:
                axes.text(
                    column,
                    row,
                    f"{100 * fraction:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if fraction > 0.35 else LIGHT.ink,
                )
    style_axes(axes)
    axes.tick_params(labelcolor=LIGHT.ink, labelsize=8)
    axes.spines[:].set(visible=True, color=LIGHT.grid)
    if named:
        names = [_short(label, NAME_LETTERS) for label in labels]
        axes.set_xticks(range(size), names, rotation=90, fontsize=points)
        axes.set_yticks(range(size), names, fontsize=points)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("answered" if named else "answered, by number of the class", fontsize=9, color=LIGHT.soft)
    axes.set_ylabel("is" if named else "is, by number of the class", fontsize=9, color=LIGHT.soft)
    title = (
        f"Of the clips of each class (row), the fraction taken for each: {_percent(np.trace(counts) / counts.sum())} "
        "are right"
    )
    figure.text(0.12 / width, 1 - 0.32 / height, title, fontsize=10.5, fontweight="bold", color=LIGHT.ink)
    _list_confused(figure, most_confused(counts, labels), (margin + side + 0.35) / width, 1 - above / height, height)
    return figure


def _list_confused(
    figure: Figure, pairs: list[tuple[str, str, int, int]], left: float, top: float, height: float
) -> None:
    """From the place (left, top) of the figure downward."""
    figure.text(
        left, top, "Confused most often" if pairs else "Nothing was confused", fontsize=9, color=LIGHT.soft, va="top"
    )
    line = 0.17 / height
    place = top - 1.6 * line
    for one, other, count, total in pairs:
        text = textwrap.wrap(f"{_short(one, 40)} → {_short(other, 40)}", 44)
        if place - (len(text) + 1) * line < 0:
            return
        figure.text(left, place, "\n".join(text), fontsize=8, color=LIGHT.ink, va="top", linespacing=1.15)
        place -= len(text) * line
        figure.text(left, place, f"{count} of {total} clips", fontsize=7.5, color=LIGHT.soft, va="top")
        place -= 1.35 * line


# ---- class by class --------------------------------------------------------------------------------------------------


def draw_classes(rows: Sequence[Mapping[str, Any]], values: Mapping[str, float], multi_label: bool) -> Figure:
    """A bar for each class that has clips, best first; of many classes the best and the worst. The dashed line is the
    mean.
    """
    column = "average_precision" if multi_label else "recall"
    scored = sorted((row for row in rows if row[column] is not None), key=lambda row: -row[column])
    cut = len(scored) > ALL_UP_TO
    shown = [scored[: BARS // 2], scored[-BARS // 2 :]] if cut else [scored]
    bars = sum(map(len, shown)) + 1.2 * cut
    letters = max(min(max(len(row["label"]) for part in shown for row in part), 40), 6)
    margin, height = 0.3 + 0.075 * letters, 0.21 * bars + 1.15
    width = margin + 5.7
    figure = Figure((width, height), facecolor="white")
    axes = figure.add_axes((margin / width, 0.5 / height, 4.4 / width, 0.21 * bars / height))
    position, ticks = 0.0, []
    for part in shown:
        for row in part:
            axes.barh(position, row[column], height=0.78, color=LIGHT.train)
            note = f"{row[column]:.3f}" if multi_label else _percent(row[column])
            for x, text in ((44, note), (80, str(row["clips"]))):
                place: dict[str, Any] = {
                    "textcoords": "offset points",
                    "ha": "right",
                    "va": "center",
                    "fontsize": 7.5,
                    "color": LIGHT.ink,
                }
                axes.annotate(text, (1, position), (x, 0), **place)
            ticks.append((position, _short(row["label"], 40)))
            position += 1
        position += 1.2
    head: dict[str, Any] = {
        "textcoords": "offset points",
        "ha": "right",
        "va": "center",
        "fontsize": 7.5,
        "color": LIGHT.soft,
        "annotation_clip": False,
    }
    axes.annotate("clips", (1, -1), (80, 0), **head)
    axes.set_ylim(bars - 0.4, -0.6)
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.set_xlim(0, 1)
    mean = values["mAP" if multi_label else "balanced_accuracy"]
    axes.axvline(mean, color=LIGHT.soft, linewidth=1, linestyle=(0, (4, 3)))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if multi_label else f"{100 * value:.3g}%")
    )
    style_axes(axes, grid="x")
    axes.tick_params(labelcolor=LIGHT.ink, labelsize=8)
    what = "Average precision" if multi_label else "Recall"
    which = (
        f"the {BARS // 2} best and the {BARS // 2} worst of {len(scored)} classes" if cut else f"{len(scored)} classes"
    )
    without = int(values["classes_without_clips"])
    title = f"{what}: {which}, mean {f'{mean:.4f}' if multi_label else _percent(mean)}"
    figure.text(0.12 / width, 1 - 0.3 / height, title, fontsize=10.5, fontweight="bold", color=LIGHT.ink)
    if without:
        figure.text(
            0.12 / width,
            0.12 / height,
            f"{without} classes have no clips here and are left out",
            fontsize=8,
            color=LIGHT.soft,
        )
    return figure


# ---- on the way ------------------------------------------------------------------------------------------------------


def draw_learning_curve(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], x: str) -> Figure:
    """A panel for each column of which any row has a number."""
    columns = [column for column in columns if any(_is_number(row.get(column)) for row in rows)]
    across = min(len(columns), 3) or 1
    down = math.ceil(len(columns) / across) or 1
    figure = Figure((3.9 * across, 2.6 * down), facecolor="white", layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    for axes, column in zip(grid.flat, columns, strict=False):
        for kind, colour, style in (("train", LIGHT.train, "-"), ("valid", LIGHT.valid, "o-")):
            points = [
                (row[x], row[column])
                for row in rows
                if row.get("kind") == kind and _is_number(row.get(column)) and x in row
            ]
            if points:
                label = f"{kind} {points[-1][1]:.4g}"
                axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=1.6, markersize=3.5, label=label)
        style_axes(axes, grid="y")
        axes.set_title(column, loc="left", fontsize=10, fontweight="bold", color=LIGHT.ink)
        axes.set_xlabel(x, fontsize=8.5, color=LIGHT.soft, loc="right")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.legend(frameon=False, fontsize=8, labelcolor=LIGHT.soft, loc="best")
    for axes in grid.flat[len(columns) :]:
        axes.set_visible(False)
    return figure


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _short(label: str, most: int) -> str:
    """With a gap near the end where it is too long, since labels often differ there; dollars are no mathematics."""
    label = printable(label)
    short = label if len(label) <= most else f"{label[: most - 9].rstrip(' ,')}…{label[-8:]}"
    return short.replace("$", r"\$")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}%"
