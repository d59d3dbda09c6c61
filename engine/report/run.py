"""Writes the report of a run: one self-contained HTML page, and each of its pictures as a PNG file."""

import base64
import csv
import io
import json
import math
import re
import shlex
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from statistics import median_low
from typing import Any, NamedTuple

import numpy as np
import yaml
from jinja2 import ChainableUndefined
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ssast.engine.errors import UserError
from ssast.engine.files import PROFILE_FOLDER, write_whole

from .page import render, save_picture
from .theme import DENSITY, SPECTROGRAM, WIDTH, Theme, style_axes

FRAME_SECONDS = 0.01
MOST_CLIPS = 3
SMOOTH_FROM = 60  # points; shorter curves are drawn as they are


class Curve(NamedTuple):
    """One picture: a column of metrics.jsonl over the steps. The scale is "" (as the data ask), "zero" (from 0) or
    "log".
    """

    column: str
    file: str
    title: str
    percent: bool = False
    scale: str = ""


CURVES = (
    Curve("loss", "loss", "Total loss"),
    Curve("nce", "infonce", "InfoNCE"),
    Curve("mse", "mse", "Reconstruction"),
    Curve("accuracy", "accuracy", "Pretext accuracy", percent=True, scale="zero"),
    Curve("lr", "learning-rate", "Learning rate", scale="zero"),
    Curve("grad_norm", "gradient-norm", "Gradient norm", scale="log"),
    Curve("clips_per_s", "throughput", "Clips per second", scale="zero"),
    Curve("data_stall", "data-stall", "Data stall", percent=True, scale="zero"),
)


# What a run folder holds


class Clip(NamedTuple):
    """A validation clip: its spectrogram [T, F], the hidden patches, what was drawn into them, and which of them were
    found.
    """

    name: str
    features: np.ndarray
    mask: np.ndarray
    recon: np.ndarray
    found: np.ndarray | None  # where finding them was part of the task
    patch_shape: tuple[int, int]

    def errors(self) -> tuple[float, float] | None:
        """The mean squared error in the hidden patches, and that of answering their average everywhere."""
        place = np.isfinite(self.recon)
        if not place.any():
            return None
        return float(np.mean((self.recon - self.features)[place] ** 2)), float(self.features[place].var())


@dataclass(frozen=True)
class Run:
    """The log of a run, its settings and its example clips."""

    folder: Path
    config: dict[str, Any]
    train: list[dict]
    valid: list[dict]
    events: list[dict]
    unreadable: int
    examples: dict[str, np.ndarray]

    def records(self, column: str) -> bool:
        """Whether any row has a number in this column."""
        return bool(_points(self.train + self.valid, column)[0].size)

    @cached_property
    def last_step(self) -> int:
        """The last step that any row tells of."""
        return max((row["step"] for row in self.train + self.valid + self.events), default=0)

    @cached_property
    def hidden(self) -> dict[str, int]:
        """How many patches of a clip are hidden in training, and in validation where its rows name another number."""
        hidden = (self.config.get("mask") or {}).get("num_masked")
        return {"train": hidden, "valid": (self.valid or [{}])[-1].get("num_masked", hidden)} if hidden else {}

    @cached_property
    def guides(self) -> dict[str, dict[str, float]]:
        """What a model that has learned nothing would reach, by column and kind of row, where the files of the run tell
        it.
        """
        guides = {"nce": {kind: math.log(hidden) for kind, hidden in self.hidden.items()}}
        guides["accuracy"] = {kind: 1 / hidden for kind, hidden in self.hidden.items()}
        errors = [errors[1] for clip in self.clips if (errors := clip.errors())]
        guides["mse"] = {"valid": float(np.mean(errors))} if errors else {}
        return guides

    @cached_property
    def clips(self) -> list[Clip]:
        """The first example clips. What a head made that was not trained says nothing, and is left out."""
        height, width = self.examples.get("patch_shape", (0, 0))
        matches, draws = self.records("accuracy"), self.records("mse")
        rows = zip(
            *(self.examples.get(key, ()) for key in ("names", "features", "mask", "recon", "found")), strict=True
        )
        clips = [
            Clip(name, features, mask, recon, found, (height, width)) for name, features, mask, recon, found in rows
        ][:MOST_CLIPS]
        clips = clips if matches else [clip._replace(found=None) for clip in clips]
        return clips if draws else [clip._replace(recon=np.full_like(clip.recon, np.nan)) for clip in clips]


def read_run(folder: Path) -> Run:
    """Read a run folder, which need not be finished.

    Raises:
        UserError: the folder holds no run.
    """
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} is not a run folder: it has no {name}. Name the folder that a pretraining run wrote."
            )
    config = _read(folder / "config.yaml", lambda path: dict(yaml.safe_load(path.read_text("utf-8")) or {}))
    examples = _read(folder / "reconstruction.npz", lambda path: dict(np.load(path)))
    return Run(folder, config, *rows_by_kind(folder / "metrics.jsonl"), examples)


def rows_by_kind(path: Path) -> tuple[list[dict], list[dict], list[dict], int]:
    """The train, valid and event rows in order, and how many lines could not be read (a crash cuts a line in half)."""
    rows_of: dict[str, dict[int, dict]] = {"train": {}, "valid": {}}
    events, unreadable = [], 0
    for line in filter(str.strip, path.read_text("utf-8", "replace").split("\n")):
        try:
            row = json.loads(line)
            kind, step = row["kind"], row["step"] + 0
        except (ValueError, TypeError, KeyError):
            unreadable += 1
            continue
        if kind in rows_of:
            rows_of[kind][step] = row
        elif kind == "event":
            events.append(row)
            if row.get("event") == "resume":  # the steps after the checkpoint are done again
                rows_of = {name: {s: r for s, r in rows.items() if s <= step} for name, rows in rows_of.items()}
    train, valid = ([rows[step] for step in sorted(rows)] for rows in rows_of.values())
    return train, valid, events, unreadable


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    """What a file of the run holds; one that a young run does not have yet is empty."""
    try:
        return (reader(path) if path.is_file() else None) or {}
    except (ValueError, TypeError, OSError, zipfile.BadZipFile, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged: put it right or move it away, then write the report again.") from error


def _number(value: Any) -> float | None:
    """The value if it is a finite number: null and NaN cannot be drawn."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _points(rows: list[dict], column: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], value) for row in rows if (value := _number(row.get(column))) is not None]
    steps, values = np.array(points, float).reshape(-1, 2).T
    return steps, values


def audio_seconds(train: list[dict]) -> float:
    """Audio trained on: clips times the seconds per clip that the log gives (its two rates, one over the other)."""
    columns = ("samples", "clips_per_s", "audio_s_per_s")
    rows = [numbers for row in train if all(numbers := [_number(row.get(column)) for column in columns])]
    samples, clips, audio = np.array(rows, float).reshape(-1, 3).T
    return float(np.diff(samples, prepend=0) @ (audio / clips))


def wall_seconds(train: list[dict]) -> float:
    """Time spent on the steps of the log. The clock of a resumed run may start again at zero."""
    seconds = _points(train, "seconds")[1]
    passed = np.diff(seconds, prepend=0)
    return float(np.where(passed < 0, seconds, passed).sum())


# Pictures


def expand_mask(patches: np.ndarray, shape: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Patch numbers as a bool picture of `size` [T, F], for patches of `shape` (mel bins, frames)."""
    mask = np.zeros(size, bool)
    for t, f in patch_corners(patches, shape, size[0]):
        mask[t : t + shape[1], f : f + shape[0]] = True
    return mask


def patch_corners(patches: np.ndarray, shape: tuple[int, int], frames: int) -> np.ndarray:
    """The first frame and the lowest mel bin of each patch [M, 2]: patches are numbered along time first, then
    upward.
    """
    f_index, t_index = np.divmod(patches, frames // shape[1])
    return np.stack([t_index * shape[1], f_index * shape[0]], axis=1)


def draw_curve(curve: Curve, run: Run, theme: Theme) -> Figure:
    """Training as a line, validation as dots, resumes as thin vertical lines, and a dashed guide."""
    figure = Figure((WIDTH, 2.5), DENSITY, facecolor=theme.paper)
    axes = figure.add_axes((0.125, 0.15, 0.845, 0.68))
    show = (lambda value, _=None: f"{100 * value:.3g}%") if curve.percent else (lambda value, _=None: f"{value:.4g}")
    for row in run.events:
        if row.get("event") == "resume":
            axes.axvline(row["step"], color=theme.soft, linewidth=0.6, alpha=0.7, zorder=1)
    guides = run.guides.get(curve.column, {})
    for kind, guide in guides.items():
        colour = theme.soft if len(set(guides.values())) == 1 else getattr(theme, kind)
        axes.axhline(guide, color=colour, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    steps, values = _points(run.train, curve.column)
    if steps.size:
        label = f"train {show(values[-1])}"
        if steps.size >= SMOOTH_FROM:
            axes.plot(steps, values, color=theme.train, linewidth=0.7, alpha=0.3)
            values = _running_mean(values)
        axes.plot(steps, values, color=theme.train, linewidth=1.6, marker="." if steps.size == 1 else None, label=label)
    steps, values = _points(run.valid, curve.column)
    if steps.size:
        style: dict[str, Any] = {"markersize": 4.5, "markeredgecolor": theme.paper, "clip_on": False, "zorder": 4}
        axes.plot(steps, values, "o", color=theme.valid, label=f"valid {show(values[-1])}", **style)
    style_axes(axes, theme, grid="y")
    axes.set_title(curve.title, loc="left", fontsize=10.5, fontweight="bold", color=theme.ink, pad=9)
    place: dict[str, Any] = {
        "loc": "lower right",
        "bbox_to_anchor": (1.02, 1.0),
        "borderaxespad": 0.3,
        "frameon": False,
    }
    axes.legend(ncols=2, handlelength=1, columnspacing=1, handletextpad=0.5, fontsize=9, labelcolor=theme.soft, **place)
    axes.set_xlim(0, max(run.last_step, 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("step", fontsize=9, color=theme.soft, loc="right", labelpad=1)
    if curve.scale == "log" and min(axes.dataLim.intervaly) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif curve.scale == "zero":
        axes.set_ylim(0, (axes.dataLim.y1 or 0.01) * 1.08)
    axes.yaxis.set_major_formatter(FuncFormatter(show))
    return figure


def _running_mean(values: np.ndarray) -> np.ndarray:
    window = np.ones(values.size // 25)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def draw_clip(number: int, clip: Clip, theme: Theme) -> Figure:
    """The spectrogram, what the model was shown, what it drew, and which patches it found, one below the other."""
    frames, bins = clip.features.shape
    hidden = expand_mask(clip.mask, clip.patch_shape, clip.features.shape)
    panels = {"The spectrogram": clip.features, "What the model was shown": np.where(hidden, np.nan, clip.features)}
    if np.isfinite(clip.recon).any():
        panels["Hidden patches as the model drew them"] = np.where(np.isnan(clip.recon), clip.features, clip.recon)
    ratios = [1] * len(panels) + [0.6] * (clip.found is not None)
    height = 0.6 + 1.3 * sum(ratios)
    figure = Figure((WIDTH, height), DENSITY, facecolor=theme.paper)
    figure.text(0.125, 1 - 0.22 / height, f"Clip {number}", fontsize=10.5, fontweight="bold", color=theme.ink)
    rows = figure.subplots(len(ratios), sharex=True, sharey=True, gridspec_kw={"hspace": 0.35, "height_ratios": ratios})
    figure.subplots_adjust(left=0.125, right=0.97, bottom=0.36 / height, top=1 - 0.52 / height)
    look: dict[str, Any] = {
        "cmap": SPECTROGRAM.with_extremes(bad=theme.hidden),
        "interpolation": "nearest",
        "aspect": "auto",
        "origin": "lower",
    }
    look |= dict(zip(("vmin", "vmax"), np.percentile(clip.features, (1, 99)), strict=True))
    for axes, (title, picture) in zip(rows, panels.items(), strict=False):
        axes.imshow(picture.T, extent=(0, frames * FRAME_SECONDS, 0, bins), **look)
        axes.set_title(title, loc="left", fontsize=9, color=theme.soft, pad=4)
    if clip.found is not None:
        _draw_matches(rows[-1], clip, clip.found, theme)
    for axes in rows:
        style_axes(axes, theme)
    rows[0].set_yticks([0, bins // 2, bins])
    rows[0].set_ylabel("mel bin", fontsize=9, color=theme.soft, labelpad=1)
    rows[-1].set_xlabel("seconds", fontsize=9, color=theme.soft, loc="right", labelpad=1)
    return figure


def _draw_matches(axes: Axes, clip: Clip, matches: np.ndarray, theme: Theme) -> None:
    """Found patches are filled and missed ones outlined, unless they are too narrow for an outline."""
    height, width = clip.patch_shape
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)])
    boxes = (patch_corners(clip.mask, clip.patch_shape, len(clip.features))[:, None] + corners) * (FRAME_SECONDS, 1)
    narrow = width < len(clip.features) / 100
    missed = (
        {"facecolor": theme.missed} if narrow else {"facecolor": "none", "edgecolor": theme.missed, "linewidth": 0.8}
    )
    axes.add_collection(PolyCollection(boxes[matches], facecolor=theme.found, linewidth=0))
    axes.add_collection(PolyCollection(boxes[~matches], clip_on=False, **missed))
    title = f"Found {matches.sum()} (green), missed {(~matches).sum()} (red{'' if narrow else ' outline'})"
    axes.set_title(title, loc="left", fontsize=9, color=theme.soft, pad=4)


# The page


def write_report(run_dir: Path) -> Path:
    """Write `report.html` and `pictures/*.png` into a run folder, finished or not, and return the path of the page."""
    run = read_run(Path(run_dir))
    folder = run.folder / "pictures"
    folder.mkdir(exist_ok=True)
    curves, clips = [], []
    for curve in filter(lambda curve: run.records(curve.column), CURVES):
        curves.append((curve, save_picture(folder / f"{curve.file}.png", partial(draw_curve, curve, run))))
    for number, clip in enumerate(run.clips, 1):
        clips.append((clip, save_picture(folder / f"clip-{number}.png", partial(draw_clip, number, clip))))
    for number in range(len(clips) + 1, MOST_CLIPS + 1):  # of an earlier report
        (folder / f"clip-{number}.png").unlink(missing_ok=True)
    page = run.folder / "report.html"
    values = {"run": run, "curves": curves, "clips": clips, "all_curves": CURVES, **_facts(run)}
    # a young run, or one of an earlier version, lacks some of what the page would tell
    html = render(Path(__file__).with_name("run.html.j2"), undefined=ChainableUndefined, **values)
    write_whole(page, html)
    return page


def _throughput(folder: Path) -> dict[str, Any]:
    """The main figures of the throughput report and its picture of the step, where `ssast profile` measured this
    config.
    """
    summary = _read(folder / "report.json", lambda path: dict(json.loads(path.read_text("utf-8"))))
    picture = folder / "pictures" / "report-step.png"
    if summary and picture.is_file():
        summary["picture"] = base64.b64encode(picture.read_bytes()).decode()
    return summary


def _facts(run: Run) -> dict[str, Any]:
    """What the page tells besides the pictures. Its words are in the template."""
    last = (run.valid or run.train or [{}])[-1]
    skipped = _read(
        run.folder / "skipped.csv", lambda path: list(csv.DictReader(io.StringIO(path.read_text("utf-8", "replace"))))
    )
    environment, data, *best = (
        _read(run.folder / name, lambda path: dict(json.loads(path.read_text("utf-8"))))
        for name in ("environment.json", "data.json", "checkpoints/best.json", "checkpoints/best/best.json")
    )
    return {
        "state": next(
            (row for row in reversed(run.events) if row.get("event") in ("start", "resume", "stop", "done")), {}
        ),
        "last": {column: _number(last.get(column)) for column in ("step", "accuracy", "nce", "mse")},
        "clips_per_s": median_low(_points(run.train, "clips_per_s")[1].tolist() or [0]),
        "audio_seconds": audio_seconds(run.train),
        "wall_seconds": wall_seconds(run.train),
        "not_finite": sum("loss" in row and _number(row["loss"]) is None for row in run.train),
        "resumed": [row["step"] for row in run.events if row.get("event") == "resume"],
        "data": data,
        "skipped": skipped,
        "skipped_kinds": Counter(
            re.split("[:(]", row.get("reason") or "no reason given")[0].strip() for row in skipped
        ).most_common(),
        "checkpoints": sorted(
            (path.name for path in run.folder.glob("checkpoints/step-*")), key=lambda name: (len(name), name)
        ),
        "best": best[0] or best[1],
        "environment": environment,
        "throughput": _throughput(run.folder / PROFILE_FOLDER),
        "command": shlex.join(["ssast", "pretrain", str(run.folder / "config.yaml")]),
        "config_text": (run.folder / "config.yaml").read_text("utf-8"),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
