"""Which clips there are: from a folder, the official SSAST JSON, a CSV/TSV with a header, or a plain list, into `Entry`
rows.
"""

from __future__ import annotations

import csv
import json
import os
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ssast.engine.errors import UserError

CACHE_FILE = "checked.sqlite"  # beside it, the folder of converted copies is no part of a data set
CONVERTED = "converted"

_KNOWN = """
3gp aac ac3 aif aifc aiff amr ape asf au avi caf flac flv gsm m4a m4b m4v mka mkv mov mp2 mp3 mp4 mpc mpeg
mpg nist oga ogg ogv opus ra rf64 rm sph spx tta voc w64 wav wave webm wma wmv wv
"""
AUDIO_EXTENSIONS = frozenset(_KNOWN.split())
PATH_COLUMNS = ("path", "wav", "file", "filename", "audio", "audio_path")
LABEL_COLUMNS = ("label", "labels", "category")
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
NOTED_COLUMNS = (LABEL_COLUMNS, ("split",), SPEAKER_COLUMNS, ("fold",))  # in the order of the fields of `Entry`

# The starts of audio containers; EBML is Matroska and WebM, 30 26 B2 75 is ASF (wma).
_MAGIC = (b"RIFF", b"RF64", b"RIFX", b"BW64", b"riff", b"fLaC", b"OggS", b"ID3", b"FORM", b".snd", b"caff", b"NIST_1A")
_MAGIC += (b"\x1aE\xdf\xa3", b"0&\xb2u", b"wvPk", b"MAC ", b"TTA1", b"#!AMR")
# The second byte after FF: MPEG audio layers III and II, and ADTS. FF FE is left out: it is the byte order mark of
# UTF-16 text.
_MPEG_SYNC = frozenset(b"\xfb\xfa\xf3\xf2\xe3\xe2\xfd\xfc\xf5\xf4\xf1\xf9\xf0\xf8")


@dataclass(frozen=True, slots=True)
class Entry:
    """One clip of a manifest: its absolute path (symbolic links kept), comma-separated labels, split, speaker and fold,
    "" for none.
    """

    path: str
    label: str = ""
    split: str = ""
    speaker: str = ""
    fold: str = ""


def read_manifest(source: str | Path) -> list[Entry]:
    """The clips named by `source`: a folder, or a .json, .csv, .tsv, .txt or .lst file.

    A folder is searched recursively through symbolic links and sorted by path; its audio files are told by extension,
    or by their first bytes where the extension says nothing. In a manifest, relative paths start at the manifest's
    folder; whether the files exist is not looked at. Bytes that are not UTF-8 become surrogate escapes, as in
    `os.fsdecode`.

    Raises `UserError` if there is no such path, no clip in it, or it cannot be understood.
    """
    path = os.path.abspath(source)
    if os.path.isdir(path):
        return [Entry(clip) for clip in _folder_clips(path)]
    readers = {".json": _read_json, ".csv": _read_table, ".tsv": _read_table, ".txt": _read_list, ".lst": _read_list}
    reader = readers.get(os.path.splitext(path)[1].lower())
    if not os.path.exists(path):
        raise UserError(f"no such file or folder: {path}")
    if reader is None or not os.path.isfile(path):
        raise UserError(f"{path} is neither a folder nor a manifest ({', '.join(readers)})")
    base = os.path.dirname(path)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            entries = [Entry(os.path.join(base, clip), *notes) for clip, *notes in reader(path, file)]
    except OSError as error:
        raise UserError(f"cannot read the manifest {path}: {error.strerror}") from error
    if not entries:
        raise UserError(f"the manifest {path} is empty: it lists no audio file")
    return entries


def _folder_clips(root: str) -> list[str]:
    unreadable: list[str] = []
    found = list(_walk(root, unreadable))
    clips = [path for path, may_be_clip in found if may_be_clip]
    if unreadable:
        warnings.warn(f"{len(unreadable)} unreadable folders left out, the first is {unreadable[0]}", stacklevel=3)
    if not clips:
        raise UserError(f"no audio files found in {root} ({len(found)} other files seen)")
    return sorted(clips)


def _walk(root: str, unreadable: list[str]) -> Iterator[tuple[str, bool]]:
    """Every file below `root` and whether it may be a clip. Each folder is entered once, however many links lead to
    it.
    """
    seen: set[tuple[int, int]] = set()
    # Real folders are taken before linked ones, each in the order of names: which path a folder is met by is the same
    # everywhere.
    real, linked = [root], deque[str]()
    while real or linked:
        folder = real.pop() if real else linked.popleft()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            items = sorted(os.scandir(folder), key=lambda item: item.name, reverse=True)
        except OSError:
            unreadable.append(folder)
            continue
        if any(item.name == CACHE_FILE for item in items):
            items = [item for item in items if item.name != CONVERTED]
        below = [item.path for item in items if item.is_dir(follow_symlinks=False)]
        links = [item.path for item in reversed(items) if item.is_symlink() and os.path.isdir(item.path)]
        real.extend(below)
        linked.extend(links)
        folders = {*below, *links}
        yield from ((item.path, _may_be_clip(item.path)) for item in items if item.path not in folders)


def _may_be_clip(path: str) -> bool:
    # With an audio extension, dangling links and pipes are candidates too: the check names them, here they would vanish
    # silently.
    if os.path.splitext(path)[1][1:].lower() in AUDIO_EXTENSIONS:
        return True
    try:
        if not os.path.isfile(path):  # opening a pipe would block
            return False
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return (
        head.startswith(_MAGIC)
        or head[4:8] == b"ftyp"
        or (head[:1] == b"\xff" and head[1:2] != b"" and head[1] in _MPEG_SYNC)
    )


def _read_json(path: str, file: TextIO) -> Iterator[tuple[str, ...]]:
    try:
        content = json.load(file)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"malformed JSON in {path}: {error}") from error
    rows = content.get("data") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise UserError(f'{path} is not a data set in the SSAST form: {{"data": [{{"wav": path, "labels": "..."}}]}}')
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("wav"), str) or not row["wav"]:
            raise UserError(f'{path}: entry {number} of "data" has no "wav"')
        yield row["wav"], *(_text(row.get(name)) for name in ("labels", "split", "speaker", "fold"))


def _text(value: Any) -> str:
    """Labels as one string; lists are taken too."""
    return ",".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def _read_table(path: str, file: TextIO) -> Iterator[tuple[str, ...]]:
    # Strict: a quote that is never closed would otherwise swallow the rest of the file without a word.
    rows = csv.reader(file, delimiter="\t" if path.lower().endswith(".tsv") else ",", strict=True)
    try:
        header = next(rows, None)
        if header is None:
            return
        names = [name.strip().lower() for name in header]
        where = next((names.index(name) for name in PATH_COLUMNS if name in names), None)
        if where is None:
            raise UserError(f"{path} has no column {', '.join(PATH_COLUMNS)}; its columns are {', '.join(header)}")
        notes = [next((names.index(name) for name in known if name in names), -1) for known in NOTED_COLUMNS]
        for row in rows:
            if not any(row):
                continue
            if len(row) <= where or not row[where]:
                raise UserError(f"{path}, line {rows.line_num}: the path is missing")
            yield row[where], *(row[at] if 0 <= at < len(row) else "" for at in notes)
    except csv.Error as error:
        raise UserError(f"malformed table {path}, line {rows.line_num}: {error}") from error


def _read_list(path: str, file: TextIO) -> Iterator[tuple[str, ...]]:
    yield from ((line.rstrip("\r\n"),) for line in file if line.strip())
