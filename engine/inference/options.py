"""What the commands that use a model on recordings have in common: their options, and how they open, refuse and report.

`ssast embed`, `predict` and `evaluate` are built from these.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ssast.engine.data.sound import default_workers
from ssast.engine.errors import UserError
from ssast.engine.files import expand_path, write_reasons
from ssast.engine.model.ssast import SSAST
from ssast.engine.model.weights import load_model

from .inference import BATCH_SIZE


def add_inputs(parser: argparse.ArgumentParser, checkpoint: str) -> None:
    """Which recordings, and which model; `checkpoint` is the kind that the command takes, for its help."""
    parser.add_argument(
        "audio",
        nargs="+",
        type=expand_path,
        metavar="AUDIO",
        help="an audio or video file, a folder, prepared or not, a tar, or a manifest",
    )
    parser.add_argument(
        "--model",
        required=True,
        type=expand_path,
        metavar="PATH",
        help=f"{checkpoint}, ours or official, or a run folder",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """How the work is done."""
    add = parser.add_argument
    add(
        "--batch-size", type=_positive, default=BATCH_SIZE, metavar="N", help="windows at a time (default: %(default)s)"
    )
    add("--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)")
    add(
        "--workers",
        type=_positive,
        default=default_workers(),
        metavar="N",
        help="processes that decode (default: %(default)s here)",
    )
    add("--strict", action="store_true", help="exit with status 1 if any recording is rejected")


def add_embedding_options(parser: argparse.ArgumentParser) -> None:
    """What an embedding is."""
    add = parser.add_argument
    add("--layer", type=int, metavar="N", help="after block N; 0: the embedded patches (default: after the final norm)")
    add(
        "--pool",
        choices=("mean", "cls"),
        help="of patches, or of cls and dist tokens (default: as the model was trained)",
    )
    add(
        "--hop",
        type=float,
        metavar="S",
        help="seconds from window to window of long recordings (default: half a window)",
    )
    add(
        "--window",
        type=float,
        metavar="S",
        help="fit the model to windows of so many seconds (default: what it was trained for)",
    )
    add("--padding", action="store_true", help="let the padding of short recordings count, as the official code does")


def embedding_options(options: argparse.Namespace) -> dict[str, Any]:
    """Of `embed_recordings`."""
    return {name: getattr(options, name) for name in ("layer", "pool", "hop", "padding", "batch_size", "workers")}


def open_model(path: str, device: str, window: float | None = None, labels: Path | None = None) -> SSAST:
    """A model on a device ("auto": a GPU if there is one), fitted to windows of so many seconds, with labels out of a
    file, if given.

    Raises:
        UserError: no such model or device, or a list of labels that is not as long as the model has classes.
    """
    if window is not None and not 0 < window < 3600:
        raise UserError(f"--window {window:g}: expected more than 0 and less than 3600 seconds")
    model = load_model(path, input_frames=None if window is None else round(window * 100))
    if labels is not None and model.config.num_classes is not None:
        from ssast.engine.finetune.labels import Vocabulary  # seldom needed, and brings much along

        names = Vocabulary.read(labels).labels
        if len(names) != model.config.num_classes:
            raise UserError(f"{labels}: names {len(names)} classes, the model has {model.config.num_classes}")
        model.card = dataclasses.replace(model.card, labels=names)
    try:
        return model.to(
            "cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device
        )
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: cannot be used: {str(error).splitlines()[0]}") from None


def require_new(path: Path) -> None:
    """A file to be written must not be there yet.

    Raises:
        UserError: it is there, or there is no folder for it.
    """
    if path.exists():
        raise UserError(f"{path} is there already: delete it, or choose another name")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.absolute().parent}")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report what goes wrong while `path` is written.

    Raises:
        UserError: for an OSError, a full disk for one.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror or error}") from None


def require_some(count: int, rejected: Sequence[tuple[str, str]], listed: Path | None = None) -> None:
    """Of `count` recordings at least one must be usable.

    Raises:
        UserError: all were rejected.
    """
    if len(rejected) == count:
        where = f", see {listed}" if listed else ""
        raise UserError(f"none of {count} recordings can be used{where}; the first: {rejected[0][0]}: {rejected[0][1]}")


def write_rejected(out: Path, rejected: Sequence[tuple[str, str]]) -> Path | None:
    """NAME.rejected.csv beside NAME.npz, of (path, reason); None if there is nothing to list."""
    if not rejected:
        return None
    path = out.with_suffix(".rejected.csv")
    write_reasons(path, rejected)
    return path


def to_stderr(line: str) -> None:
    """A line for people, beside what is printed as the result."""
    print(line, file=sys.stderr)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


_positive.__name__ = "number of at least 1"  # as argparse calls it
