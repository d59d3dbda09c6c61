"""Embeddings as files, .npz or .parquet, written recording by recording.

Both writers are used alike: steps of the recording in hand are added as they come, then it is finished or forgotten;
`write` makes the file appear, and `close` without it leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ssast.engine.data.record import Record
from ssast.engine.errors import UserError
from ssast.engine.files import atomic_write
from ssast.engine.model.ssast import SSAST

from .windows import seconds_per_step

PARQUET_ROWS = 256  # recordings of a row group
TEXTS = ("path", "label", "split", "speaker")


class _Spool:
    """Rows of float32 on disk, in a nameless file."""

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self.shape, self.rows, self.kept = shape, 0, 0
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def add(self, rows: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(rows, dtype="<f4").data)
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


class NpzWriter:
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
        """Steps [k, f, D] of the recording in hand."""
        self._count += len(steps)
        if self._frames is not None:
            self._frames.add(steps.mean(dim=1).cpu().numpy())
        if self._tokens is not None:
            self._tokens.add(steps.cpu().numpy())

    def forget(self) -> None:
        """Drop the recording in hand."""
        self._count = self._offsets[-1]
        for spool in self._spools.values():
            spool.forget()

    def finish(self, recording: Record, seconds: float, clip: np.ndarray) -> None:
        """The recording in hand is whole; `clip` [D] is its embedding."""
        self._clip.add(clip[None])
        self._offsets.append(self._count)
        for name, value in zip(self._columns, (*_texts(recording), seconds), strict=True):
            self._columns[name].append(value)
        for spool in self._spools.values():
            spool.keep()

    def write(self) -> None:
        """Make the file appear."""
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
        """Let go of what lies on disk aside."""
        for spool in self._spools.values():
            spool.file.close()


class ParquetWriter:
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
        """Steps [k, f, D] of the recording in hand."""
        for name, parts in self._steps.items():
            parts.append((steps.mean(dim=1) if name == "frames" else steps.flatten(1)).cpu().numpy())

    def forget(self) -> None:
        """Drop the recording in hand."""
        for parts in self._steps.values():
            parts.clear()

    def finish(self, recording: Record, seconds: float, clip: np.ndarray) -> None:
        """The recording in hand is whole; `clip` [D] is its embedding."""
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
        """Make the file appear."""
        if self._rows:
            self._flush()
        self._stack.close()

    def close(self) -> None:
        """Without `write`, nothing is left."""
        self._stack.__exit__(_Unfinished, _Unfinished(), None)


class _Unfinished(Exception):
    """Thrown into what would put a file in its place."""


def _texts(recording: Record) -> tuple[str, ...]:
    return recording.source, recording.label_text, recording.split_text, recording.speaker
