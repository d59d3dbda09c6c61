"""Classes of sound of any length: `predict` of waveforms, and the command `ssast predict`, of recordings.

Probabilities of a clip are the mean over its windows; the command shows those, or each window's. Its `--out` writes the
rows that are printed as .csv or .json.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ssast.engine.data.sound import find_recordings
from ssast.engine.errors import UserError
from ssast.engine.files import encode_text, path_argument, write_whole
from ssast.engine.model.ssast import SSAST

from .inference import BATCH_SIZE, Encoder, clip_events, encode_recordings, encode_windows, require_batch_size
from .options import (
    add_inputs,
    add_run_options,
    open_model,
    require_new,
    require_some,
    to_stderr,
    write_rejected,
    writing,
)
from .waveforms import Waveform, as_clips
from .windows import End, prediction_windows


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of B clips: `probabilities` [B, C], the mean over windows, of the classes `labels` [C].

    `windows[b]` [W, C] are those of each window of clip b, which covers the seconds `times[b]` [W, 2] from and to. All
    float32.
    """

    probabilities: torch.Tensor
    labels: tuple[str, ...]
    windows: list[torch.Tensor]
    times: list[torch.Tensor]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each clip the k most probable classes, the first one first."""
        values, classes = self.probabilities.topk(min(k, len(self.labels)))
        rows = zip(values.tolist(), classes.tolist(), strict=True)
        return [[(self.labels[c], value) for value, c in zip(*row, strict=True)] for row in rows]


def predict(
    model: SSAST,
    waveform: Waveform | Sequence[Waveform],
    sample_rate: int,
    *,
    hop: float | None = None,
    batch_size: int = BATCH_SIZE,
) -> Prediction:
    """Probabilities of the classes for clips of any length, pooled as the classifier was trained: over all tokens,
    padding too.

    Args:
        waveform, sample_rate: as `embed` takes them.
        hop: seconds from window to window in a clip longer than the model's input; None: half a window.
        batch_size: windows at a time.

    Raises:
        ValueError: a model without classifier, or what `embed` raises it for.
    """
    encode = class_encoder(model)
    clips = as_clips(waveform, sample_rate, model.card.sample_rate)
    windows = prediction_windows(model, hop)
    require_batch_size(batch_size)
    rows: list[list[torch.Tensor]] = [[] for _ in clips]
    times: list[list[tuple[float, float]]] = [[] for _ in clips]
    for event in encode_windows(model, clip_events(clips, windows), encode, batch_size):
        if not isinstance(event, End):
            window = event.window
            rows[window.clip].append(event.row)
            times[window.clip].append((windows.seconds(window.start), windows.seconds(window.start + window.frames)))
    stacked = [torch.stack(part) for part in rows]
    mean = torch.stack([part.mean(dim=0) for part in stacked])
    return Prediction(mean, class_names(model), stacked, [torch.tensor(part) for part in times])


def class_encoder(model: SSAST) -> Encoder:
    """[B, T, F] -> [B, C] probabilities.

    Raises:
        ValueError: a model without classifier.
    """
    if model.config.num_classes is None:
        raise ValueError("this model was pretrained, but has no classifier: fine-tune it first (ssast finetune)")

    def encode(features: torch.Tensor) -> torch.Tensor:
        logits = model.classify(features).float()
        return logits.sigmoid() if model.card.multi_label else logits.softmax(dim=1)

    return encode


def class_names(model: SSAST) -> tuple[str, ...]:
    """The model's labels; where they are not known, the numbers of its classes."""
    return model.card.labels or tuple(f"class {number}" for number in range(model.config.num_classes or 0))


# The command


class Row(NamedTuple):
    """From `start` to `end` seconds."""

    path: str
    start: float
    end: float
    label: str
    probability: float


def main(argv: list[str] | None = None) -> int:
    """The most probable classes of recordings."""
    parser = argparse.ArgumentParser(prog="ssast predict", description="The most probable classes of recordings.")
    add_inputs(parser, "a fine-tuned checkpoint")
    add = parser.add_argument
    add("--top", type=int, metavar="K", help="classes to show (default: 5; with --timeline 1)")
    add("--timeline", type=float, metavar="HOP", help="show each window, one every HOP seconds, instead of their mean")
    add("--out", type=path_argument, metavar="FILE", help="NAME.csv or NAME.json, of the same rows")
    add(
        "--labels",
        type=path_argument,
        metavar="FILE",
        help="names of the classes, where the model has none: a list, or AudioSet's CSV",
    )
    add_run_options(parser)
    options = parser.parse_args(argv)
    top = options.top or (1 if options.timeline else 5)
    if top < 1:
        raise UserError(f"--top {top}: expected at least 1")
    if options.out is not None:
        if options.out.suffix.lower() not in (".csv", ".json"):
            raise UserError(f"--out {options.out}: expected a name that ends in .csv or .json")
        require_new(options.out)
    recordings = find_recordings(options.audio, to_stderr)
    model = open_model(options.model, options.device, labels=options.labels)
    labels = class_names(model)
    rejected: list[tuple[str, str]] = []
    rows: list[Row] = []
    try:
        windows, encode = prediction_windows(model, options.timeline), class_encoder(model)
        probabilities: list[torch.Tensor] = []
        times: list[tuple[float, float]] = []
        events = encode_recordings(
            model, recordings, windows, encode, batch_size=options.batch_size, workers=options.workers
        )
        for event in events:
            if not isinstance(event, End):
                start = windows.seconds(event.window.start)
                probabilities.append(event.row)
                times.append((start, start + len(event.window.samples) / windows.sample_rate))
                continue
            path = recordings[event.clip].source
            if event.error:
                rejected.append((path, event.error))
                to_stderr(f"{path}: {event.error}")
            else:
                if not options.timeline:
                    probabilities, times = (
                        [torch.stack(probabilities).mean(dim=0)],
                        [(0.0, event.samples / windows.sample_rate)],
                    )
                predictions = list(_rows(path, probabilities, times, labels, top))
                tqdm.write(_shown(path, predictions, bool(options.timeline)))
                rows += predictions if options.out is not None else []
            probabilities, times = [], []
    except ValueError as error:
        raise UserError(f"{options.model}: {error}") from None
    if options.out is None:
        require_some(len(recordings), rejected)
    else:
        with writing(options.out):
            require_some(len(recordings), rejected, write_rejected(options.out, rejected))
            _write(options.out, rows)
    return 1 if rejected and options.strict else 0


def _rows(
    path: str, probabilities: list[torch.Tensor], times: list[tuple[float, float]], labels: tuple[str, ...], top: int
) -> Iterator[Row]:
    for row, (start, end) in zip(probabilities, times, strict=True):
        values, classes = row.topk(min(top, len(labels)))
        for value, number in zip(values.tolist(), classes.tolist(), strict=True):
            yield Row(path, start, end, labels[number], value)


def _shown(path: str, rows: list[Row], timeline: bool) -> str:
    lines = [path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")]
    for row in rows:
        time = f"{row.start:9.2f} {row.end:9.2f}  " if timeline else "  "
        lines.append(f"{time}{row.probability:6.1%}  {row.label}")
    return "\n".join(lines)


def _write(path: Path, rows: list[Row]) -> None:
    if path.suffix.lower() == ".csv":
        table = io.StringIO(newline="")
        csv.writer(table).writerows([Row._fields, *(_rounded(row) for row in rows)])
        write_whole(path, encode_text(table.getvalue()))
    else:
        content = [dict(zip(Row._fields, _rounded(row), strict=True)) for row in rows]
        write_whole(path, json.dumps(content, indent=1) + "\n")


def _rounded(row: Row) -> tuple[Any, ...]:
    return row.path, round(row.start, 4), round(row.end, 4), row.label, round(row.probability, 6)


if __name__ == "__main__":
    sys.exit(main())
