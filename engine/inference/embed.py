"""`ssast embed AUDIO... --model PATH --out FILE`: embeddings of recordings, as .npz or .parquet.

A recording of any length is read, encoded and written window by window. What cannot be read is listed beside FILE, in
NAME.rejected.csv. docs/use.md describes the files.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import io
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch

from ssast.engine.data.layouts import Recording
from ssast.engine.data.sound import default_workers, find_recordings
from ssast.engine.errors import UserError
from ssast.engine.files import atomic_write, encode_text, expand_path, path_argument, write_whole
from ssast.engine.model.ssast import SSAST
from ssast.engine.model.weights import load_model

from .inference import BATCH_SIZE, embed_recordings, seconds_per_step

PARQUET_ROWS = 256  # recordings of a row group
TEXTS = ("path", "label", "split", "speaker")


def main(argv: list[str] | None = None) -> int:
    """Embeddings of recordings, as .npz or .parquet."""
    parser = argparse.ArgumentParser(
        prog="ssast embed",
        description="Embeddings of recordings of any kind and length. What cannot be read is listed in "
        "NAME.rejected.csv.",
    )
    add_audio(parser)
    parser.add_argument(
        "--model",
        required=True,
        type=expand_path,
        metavar="PATH",
        help="a checkpoint, ours or official, or a run folder",
    )
    parser.add_argument("--out", required=True, type=path_argument, metavar="FILE", help="NAME.npz or NAME.parquet")
    parser.add_argument("--frames", action="store_true", help="embeddings of each time step, too")
    parser.add_argument("--tokens", action="store_true", help="embeddings of each patch, too")
    add_embedding_options(parser)
    add_run_options(parser)
    options = parser.parse_args(argv)
    writer_type = {".npz": _Npz, ".parquet": _Parquet}.get(options.out.suffix.lower())
    if writer_type is None:
        raise UserError(f"--out {options.out}: expected a name that ends in .npz or .parquet")
    require_new(options.out)
    recordings = find_recordings(options.audio, to_stderr)
    model = open_model(options.model, options.device, options.window)
    about = {"model": str(options.model), "layer": "final" if options.layer is None else str(options.layer)}
    rejected: list[tuple[str, str]] = []
    seconds = 0.0
    try:
        with (
            writing(options.out),
            contextlib.closing(writer_type(options.out, model, about, options.frames, options.tokens)) as writer,
        ):
            for end, clip in embed_recordings(
                model, recordings, **embedding_options(options), on_steps=writer.add_steps
            ):
                recording = recordings[end.clip]
                if clip is None:
                    rejected.append((recording.source, end.error))
                    writer.forget()
                else:
                    seconds += end.samples / model.card.sample_rate
                    writer.finish(recording, end.samples / model.card.sample_rate, clip.cpu().numpy())
            listed = write_rejected(options.out, rejected)
            require_some(len(recordings), rejected, listed)
            writer.write()
    except ValueError as error:
        raise UserError(str(error)) from None
    print(
        f"{options.out}: {len(recordings) - len(rejected)} recordings, {seconds / 60:.1f} minutes, "
        f"{model.config.width} values each"
    )
    if rejected:
        print(f"{len(rejected)} recordings rejected: {listed}")
    return 1 if rejected and options.strict else 0


# What the commands that use a model on recordings have in common


def add_audio(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "audio",
        nargs="+",
        type=expand_path,
        metavar="AUDIO",
        help="an audio or video file, a folder, prepared or not, a tar, or a manifest",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
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
        from ssast.engine.finetune.labels import Vocabulary

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
    """Raises UserError for a file that is there already, or for which there is no folder."""
    if path.exists():
        raise UserError(f"{path} is there already: delete it, or choose another name")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.absolute().parent}")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises UserError for an OSError, a full disk for one."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror or error}") from None


def require_some(count: int, rejected: Sequence[tuple[str, str]], listed: Path | None = None) -> None:
    """Raises UserError if all of `count` recordings were rejected."""
    if len(rejected) == count:
        where = f", see {listed}" if listed else ""
        raise UserError(f"none of {count} recordings can be used{where}; the first: {rejected[0][0]}: {rejected[0][1]}")


def write_rejected(out: Path, rejected: Sequence[tuple[str, str]]) -> Path | None:
    """NAME.rejected.csv beside NAME.npz, of (path, reason); None if there is nothing to list."""
    if not rejected:
        return None
    path = out.with_suffix(".rejected.csv")
    rows = io.StringIO(newline="")
    csv.writer(rows).writerows([("path", "reason"), *rejected])
    write_whole(path, encode_text(rows.getvalue()))
    return path


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


_positive.__name__ = "number of at least 1"  # as argparse calls it


# Files of embeddings


class _Writer(Protocol):
    """Steps of the recording in hand are added as they come; then it is finished or forgotten. `write` makes the file
    appear.
    """

    def add_steps(self, steps: torch.Tensor) -> None: ...
    def forget(self) -> None: ...
    def finish(self, recording: Recording, seconds: float, clip: np.ndarray) -> None: ...
    def write(self) -> None: ...
    def close(self) -> None: ...


class _Spool:
    """Rows of float32 on disk, in a nameless file."""

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self.shape, self.rows, self.kept = shape, 0, 0
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def add(self, rows: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(rows, dtype="<f4"))
        self.rows += len(rows)

    def keep(self) -> None:
        self.kept = self.rows

    def forget(self) -> None:
        """All rows since `keep`."""
        self.file.seek(self.kept * 4 * int(np.prod(self.shape)))
        self.file.truncate()
        self.rows = self.kept

    def write_npy(self, out: IO[bytes]) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.rows, *self.shape)}
        np.lib.format.write_array_header_2_0(out, header)
        self.file.seek(0)
        shutil.copyfileobj(self.file, out, 1 << 20)


class _Npz:
    """Columns; what grows with the length of the recordings is kept on disk until the end."""

    def __init__(self, path: Path, model: SSAST, about: dict[str, str], frames: bool, tokens: bool) -> None:
        width, rows = model.config.width, model.config.grid[0]
        self._path, self._about = path, about | {"seconds_per_frame": seconds_per_step(model)}
        self._columns: dict[str, list[Any]] = {name: [] for name in (*TEXTS, "seconds")}
        folder = path.absolute().parent
        self._clip = _Spool(folder, (width,))
        self._frames = _Spool(folder, (width,)) if frames else None
        self._tokens = _Spool(folder, (rows, width)) if tokens else None
        self._offsets, self._count = [0], 0

    @property
    def _spools(self) -> dict[str, _Spool]:
        spools = {"clip": self._clip, "frames": self._frames, "tokens": self._tokens}
        return {name: spool for name, spool in spools.items() if spool is not None}

    def add_steps(self, steps: torch.Tensor) -> None:
        self._count += len(steps)
        if self._frames is not None:
            self._frames.add(steps.mean(dim=1).cpu().numpy())
        if self._tokens is not None:
            self._tokens.add(steps.cpu().numpy())

    def forget(self) -> None:
        self._count = self._offsets[-1]
        for spool in self._spools.values():
            spool.forget()

    def finish(self, recording: Recording, seconds: float, clip: np.ndarray) -> None:
        self._clip.add(clip[None])
        self._offsets.append(self._count)
        for name, value in zip(self._columns, (*_texts(recording), seconds), strict=True):
            self._columns[name].append(value)
        for spool in self._spools.values():
            spool.keep()

    def write(self) -> None:
        arrays = {name: np.array(values) for name, values in (self._columns | self._about).items()}
        if self._frames is not None or self._tokens is not None:
            arrays["offsets"] = np.array(self._offsets)
        with atomic_write(self._path) as aside, zipfile.ZipFile(aside, "w") as file:
            for name, array in arrays.items():
                with file.open(f"{name}.npy", "w", force_zip64=True) as out:
                    np.lib.format.write_array(out, array, allow_pickle=False)
            for name, spool in self._spools.items():
                with file.open(f"{name}.npy", "w", force_zip64=True) as out:
                    spool.write_npy(out)

    def close(self) -> None:
        for spool in self._spools.values():
            spool.file.close()


class _Parquet:
    """A row a recording, written in groups; steps of the recording in hand are held in memory."""

    def __init__(self, path: Path, model: SSAST, about: dict[str, str], frames: bool, tokens: bool) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise UserError("writing .parquet needs pyarrow: pip install pyarrow, or write .npz") from None
        width, rows = model.config.width, model.config.grid[0]
        fields = [(name, pa.string()) for name in TEXTS] + [
            ("seconds", pa.float64()),
            ("clip", pa.list_(pa.float32(), width)),
        ]
        fields += [("frames", pa.list_(pa.list_(pa.float32(), width)))] if frames else []
        fields += [("tokens", pa.list_(pa.list_(pa.float32(), rows * width)))] if tokens else []
        metadata = about | {"seconds_per_frame": str(seconds_per_step(model)), "frequencies": str(rows)}
        self._pa, self._schema = pa, pa.schema(fields, metadata=metadata)
        self._stack = contextlib.ExitStack()
        aside = self._stack.enter_context(atomic_write(path))
        self._file = self._stack.enter_context(pq.ParquetWriter(aside, self._schema))
        self._steps: dict[str, list[np.ndarray]] = {
            name: [] for name in ("frames", "tokens") if name in self._schema.names
        }
        self._rows: list[tuple[Any, ...]] = []

    def add_steps(self, steps: torch.Tensor) -> None:
        for name, parts in self._steps.items():
            parts.append((steps.mean(dim=1) if name == "frames" else steps.flatten(1)).cpu().numpy())

    def forget(self) -> None:
        for parts in self._steps.values():
            parts.clear()

    def finish(self, recording: Recording, seconds: float, clip: np.ndarray) -> None:
        texts = [
            text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for text in _texts(recording)
        ]
        self._rows.append((*texts, seconds, clip, *(np.concatenate(parts) for parts in self._steps.values())))
        self.forget()
        if len(self._rows) == PARQUET_ROWS or self._steps:
            self._flush()

    def _flush(self) -> None:
        columns = [
            self._array(field.type, values)
            for field, values in zip(self._schema, zip(*self._rows, strict=True), strict=True)
        ]
        self._file.write_table(self._pa.table(columns, schema=self._schema))
        self._rows = []

    def _array(self, kind: Any, values: Sequence[Any]) -> Any:
        """An Arrow array; lists are made of whole NumPy arrays, value by value would take hours."""
        pa = self._pa
        if pa.types.is_fixed_size_list(kind):
            return pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(values)), kind.list_size)
        if pa.types.is_list(kind):
            offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
            return pa.ListArray.from_arrays(
                pa.array(offsets), self._array(kind.value_type, [value.ravel() for value in values])
            )
        return pa.array(values, kind)

    def write(self) -> None:
        if self._rows:
            self._flush()
        self._stack.close()

    def close(self) -> None:
        """Without `write`, nothing is left."""
        self._stack.__exit__(_Unfinished, _Unfinished(), None)


class _Unfinished(Exception):
    """Thrown into what would put a file in its place."""


def _texts(recording: Recording) -> tuple[str, ...]:
    return recording.source, recording.label, recording.split, recording.speaker


if __name__ == "__main__":
    sys.exit(main())
