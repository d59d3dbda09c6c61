"""Manifests: the official SSAST JSON, JSON lines, CSV and TSV with a header, and plain lists of paths."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from ssast.engine.errors import UserError
from ssast.engine.twins import unicode_twin

from .names import is_hidden
from .record import Record, find_fold, find_split, labels_of, split_and_fold
from .table import open_text, read_table

EXTENSIONS = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".lst")
_PATH_COLUMNS = "path wav file filename audio audio_path file_name filepath file_path audio_filepath slice_file_name"
PATH_COLUMNS = tuple(_PATH_COLUMNS.split())
LABEL_COLUMNS = ("label", "labels", "category")
SPLIT_COLUMNS = ("subset", "set", "partition", "phase")
"""What may say the split where no column `split` does: only if all that stands in it are names of splits or folds."""
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
START_COLUMNS = ("start", "start_s", "start_time", "start_sec", "start_seconds", "begin", "onset")
END_COLUMNS = ("end", "end_s", "end_time", "end_sec", "end_seconds", "stop")
DURATION_COLUMNS = ("duration", "duration_s", "duration_sec", "duration_seconds", "dur")
_IN_OTHER_UNITS = re.compile(
    r"(start|end|stop|begin|onset|offset|duration)[_ ]?(ms|msec|milliseconds|frames?|samples?|idx|index)"
    r"|(frame|sample)[_ ]?(offset|start|end)|num[_ ]?(frames|samples)"
)


_MAY_SAY_SPLIT = re.compile(rf'"\s*({"|".join(SPLIT_COLUMNS)})\s*"', re.IGNORECASE)


@dataclass
class Manifest:
    """What a manifest says: its clips, columns, those of them that are not read, and remarks for people."""

    records: list[Record] = field(default_factory=list)
    columns: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    remarks: list[str] = field(default_factory=list)


def read_manifest(path: str) -> Manifest:
    """The clips named by a .json, .jsonl, .csv, .tsv, .txt or .lst file.

    Relative paths start at the manifest's folder; whether the files exist is not looked at, except that a name which
    is there in another Unicode form is read in that form. Bytes that are not UTF-8 become surrogate escapes, as in
    `os.fsdecode`.

    Raises:
        UserError: it cannot be read or understood, or names no clip.
    """
    readers: dict[str, Callable[[str, TextIO, Manifest], Iterator[Record]]] = {
        ".json": _read_json,
        ".jsonl": _read_json_lines,
        ".csv": _read_table,
        ".tsv": _read_table,
        ".txt": _read_list,
        ".lst": _read_list,
    }
    manifest = Manifest()
    hidden, base = 0, os.path.dirname(path)
    try:
        with open_text(path) as file:
            for record in readers[os.path.splitext(path)[1].lower()](path, file, manifest):
                if _is_hidden_entry(record.path, base):
                    hidden += 1
                else:
                    manifest.records.append(record)
    except OSError as error:
        raise UserError(f"cannot read the manifest {path}: {error.strerror}") from error
    except UnicodeError as error:
        raise UserError(f"cannot read the manifest {path}: {error}") from error
    if hidden:
        manifest.remarks.append(f"{hidden} hidden or system files passed over")
    if not manifest.records:
        raise UserError(f"the manifest {path} is empty: it lists no audio file")
    return manifest


def _is_hidden_entry(path: str, base: str) -> bool:
    """Whether a clip of a manifest is none: by its own name, or that of a folder between it and the manifest."""
    folder, _, name = path.rpartition("/")
    return is_hidden(name.rpartition("\\")[2]) or _is_hidden_folder(folder, base)


@functools.lru_cache(maxsize=1 << 12)
def _is_hidden_folder(folder: str, base: str) -> bool:
    return folder.startswith(f"{base}/") and any(map(is_hidden, folder[len(base) + 1 :].replace("\\", "/").split("/")))


class Columns:
    """Which of the columns of a table, or fields of an object, say what of a clip.

    `splits` are those of `SPLIT_COLUMNS` that say the split (`split_columns`).

    Raises:
        UserError: two columns of one name that is read, or a part of a file that is not given in seconds.
    """

    def __init__(self, names: Iterable[str], where: str, splits: Iterable[str] = ()) -> None:
        given = list(names)
        lowered = [name.strip().lower() for name in given]
        first = dict(zip(reversed(lowered), reversed(given), strict=True))
        has_onset = "onset" in first
        choices = {
            "path": PATH_COLUMNS,
            "label": LABEL_COLUMNS,
            "split": ("split", *splits),
            "speaker": SPEAKER_COLUMNS,
            "fold": ("fold",),
            # as in lists of sound events; elsewhere an offset is where a part begins
            "start": START_COLUMNS if has_onset else (*START_COLUMNS, "offset"),
            "end": (*END_COLUMNS, "offset") if has_onset else END_COLUMNS,
        }
        self._of = {}
        for role, known in choices.items():
            name = next((name for name in known if name in first), None)
            if name is not None:
                self._of[role] = first[name]
                if lowered.count(name) > 1:
                    raise UserError(f"{where}: the column {name} is there twice; keep one")
        if first.get("slice_file_name", "") == self._of.get("path"):  # as UrbanSound8K has it: the part is cut already
            self._of = {role: name for role, name in self._of.items() if role not in ("start", "end")}
        if "start" in self._of and "end" not in self._of:
            name = next((name for name in DURATION_COLUMNS if name in first), None)
            if name is not None:
                self._of["duration"] = first[name]
        for name in lowered:
            if _IN_OTHER_UNITS.fullmatch(name):
                raise UserError(
                    f"{where}: the column {first[name]} is not read: parts of files are named in seconds, by columns "
                    "start and end, or offset and duration; convert it, or rename it if it says something else"
                )
        self._has_spans = not self._of.keys().isdisjoint(("start", "end", "duration"))
        self.has_path = "path" in self._of
        self.has_label = "label" in self._of
        self.unread = [name for name in given if name not in self._of.values()]

    def record(self, row: Mapping[str, Any], base: str, where: str) -> Record:
        """The clip of a row.

        Raises:
            UserError: it has no path, or says what means nothing.
        """
        values = {role: row.get(name) for role, name in self._of.items()}
        path = values.get("path")
        if not isinstance(path, str) or not path:
            raise UserError(f"{where}: the path is missing")
        split, fold = split_and_fold(_text(values.get("split")))
        named = _text(values.get("fold"))
        fold = re.sub(r"(?i)^fold[ _-]?", "", named) if named else fold
        start, end = _segment(values, where) if self._has_spans else (0.0, math.inf)
        labels, speaker = labels_of(values.get("label"), where), _text(values.get("speaker"))
        return Record(clip_path(base, path), labels, split, speaker, fold, start=start, end=end)


def split_columns(rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Those of `SPLIT_COLUMNS` in whose place nothing but names of splits and folds stands, blanks aside; none where a
    row has a `split`.
    """
    is_split: dict[str, bool] = {}
    for row in rows:
        for field_name, value in row.items():
            name = field_name.strip().lower()
            if name == "split":
                return ()
            if name in SPLIT_COLUMNS and is_split.get(name, True) and (text := _text(value)):
                is_split[name] = find_split(text) is not None or bool(find_fold(text))
    return tuple(name for name in SPLIT_COLUMNS if is_split.get(name))


def open_table(path: str, file: TextIO) -> tuple[Columns, list[str], Iterator[tuple[str, dict[str, str]]]]:
    """(columns, header, (where it stands, row) of each row) of a table at its beginning.

    Raises:
        UserError: as `Columns`; while rows are read, as `read_table`.
    """
    header, rows = read_table(path, file)
    splits: tuple[str, ...] = ()
    if any(name.lower() in SPLIT_COLUMNS for name in header):  # all its values decide
        splits = split_columns(dict(zip(header, row, strict=True)) for _, row in rows)
        file.seek(0)
        header, rows = read_table(path, file)
    named = ((f"{path}, line {number}", dict(zip(header, row, strict=True))) for number, row in rows)
    return Columns(header, path, splits), header, named


def json_lines_splits(path: str, file: TextIO) -> tuple[str, ...]:
    """`split_columns` of JSON lines; the file is at its beginning, before and after.

    Raises:
        UserError: as `json_lines`.
    """
    splits: tuple[str, ...] = ()
    if any(_MAY_SAY_SPLIT.search(line) for line in file):
        file.seek(0)
        splits = split_columns(row for _, row in json_lines(path, file))
    file.seek(0)
    return splits


def clip_path(base: str, name: str) -> str:
    """The absolute path of a clip that a manifest in the folder `base` names; in the Unicode form that is there."""
    path = name if name.startswith("/") else f"{base}/{name}"
    if "//" in path or "/./" in path:
        path = re.sub(r"/(\./|/)+", "/", path)
    if "/../" in path:  # two names of one file would be two clips, one of them perhaps for test
        plain = os.path.normpath(path)
        if os.path.realpath(plain) == os.path.realpath(path):  # else a symbolic link leads elsewhere
            path = plain
    if not path.isascii() and not os.path.lexists(path):
        path = unicode_twin(path) or path
    return path


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _segment(values: Mapping[str, Any], where: str) -> tuple[float, float]:
    """(start, end) in seconds of the part of a file that a row names."""
    start = _seconds(values.get("start"), where)
    end = _seconds(values.get("end"), where)
    duration = _seconds(values.get("duration"), where)
    start = start or 0.0
    if end is None:
        end = math.inf if duration is None else start + duration
    if end <= start:
        raise UserError(f"{where}: the clip ends at {end:g} s, where it begins or before ({start:g} s)")
    return start, end


def _seconds(value: Any, where: str) -> float | None:
    if value is None or _text(value) == "":
        return None
    text = _text(value)
    try:
        seconds = float(text.replace(",", ".") if "." not in text else text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(f"{where}: {text!r} is no number of seconds from 0 on")
    return seconds


def _read_json(path: str, file: TextIO, manifest: Manifest) -> Iterator[Record]:
    try:
        content = json.load(file)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"malformed JSON in {path}: {error}") from error
    rows = content.get("data") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise UserError(f'{path} is not a data set in the SSAST form: {{"data": [{{"wav": path, "labels": "..."}}]}}')
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not any(isinstance(row.get(name), str) and row[name] for name in PATH_COLUMNS):
            raise UserError(f'{path}: entry {number} of "data" has no "wav"')
    numbered = ((f'{path}: entry {number} of "data"', row) for number, row in enumerate(rows))
    yield from _objects(path, numbered, split_columns(rows), manifest)


def _read_json_lines(path: str, file: TextIO, manifest: Manifest) -> Iterator[Record]:
    splits = json_lines_splits(path, file)
    yield from _objects(path, json_lines(path, file), splits, manifest)


def json_lines(path: str, file: TextIO) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, object) of each line.

    Raises:
        UserError: a line that is no JSON object.
    """
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"malformed JSON in {path}, line {number}: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: no JSON object")
        yield f"{path}, line {number}", row


def _objects(
    path: str, rows: Iterable[tuple[str, dict[str, Any]]], splits: tuple[str, ...], manifest: Manifest
) -> Iterator[Record]:
    """Clips of JSON objects, each of which may have fields of its own."""
    known: dict[tuple[str, ...], Columns] = {}
    names: dict[str, None] = {}
    unread: dict[str, None] = {}
    base = os.path.dirname(path)
    for where, row in rows:
        fields = tuple(row)
        columns = known.get(fields)
        if columns is None:
            columns = known[fields] = Columns(fields, where, splits)
            names |= dict.fromkeys(fields)
            unread |= dict.fromkeys(columns.unread)
        yield columns.record(row, base, where)
    manifest.columns = tuple(names)
    manifest.unread = tuple(unread)


def _read_table(path: str, file: TextIO, manifest: Manifest) -> Iterator[Record]:
    columns, header, rows = open_table(path, file)
    if not header:
        return
    manifest.columns, manifest.unread = tuple(header), tuple(columns.unread)
    if not columns.has_path:
        raise UserError(f"{path} has no column {', '.join(PATH_COLUMNS)}; its columns are {', '.join(header)}")
    base = os.path.dirname(path)
    for where, row in rows:
        yield columns.record(row, base, where)


def _read_list(path: str, file: TextIO, manifest: Manifest) -> Iterator[Record]:
    base = os.path.dirname(path)
    yield from (Record(clip_path(base, line.rstrip("\r\n"))) for line in file if line.strip())
