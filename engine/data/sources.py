"""What a source of clips may be, and the one door to all: an audio file, a manifest, a tar, a folder, in one of the
layouts of known data sets or plain, or a folder that `ssast prepare` wrote.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ssast.engine.errors import UserError
from ssast.engine.twins import missing_file, unicode_twin

from .clips import Clips
from .folder import (
    Listing,
    by_folders,
    is_like_split,
    list_folder,
    read_metadata,
    stray_split,
    strays_beside_splits,
)
from .layouts import LAYOUTS, speech_commands_12
from .manifest import EXTENSIONS, read_manifest
from .record import KNOWN, SPLITS, Record, unknown_split
from .shards import is_prepared, open_shards
from .tars import read_tar
from .texts import Texts

SPEECH_COMMANDS_12 = "speech_commands_12"
_PACKED = tuple(".tar.gz .tgz .tar.bz2 .tbz2 .tar.xz .txz .tar.zst .zip .7z .rar .gz .bz2 .xz .zst".split())


@dataclass
class Source:
    """A source that was read: how, its clips, and what people should know about the reading.

    `kind` is file, manifest, tar, folder, prepared or the name of a layout. `columns` are those of a manifest, of
    which `unread` mean nothing here. The clips of a prepared folder are in `clips`, columns mapped from its index.
    """

    name: str
    kind: str
    rows: list[Record] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    columns: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    clips: Clips | None = None

    @property
    def notes(self) -> list[str]:
        """What is usual, and named once all the same."""
        return [f"columns that are not read: {', '.join(self.unread)}"] if self.unread else []

    def check_splits(self) -> None:
        """Raise UserError for a clip whose split is the name of none."""
        if self.clips is None:
            wrong = next((record for record in self.rows if record.split not in KNOWN), None)
            if wrong is not None:
                raise unknown_split(wrong.split, f"{self.name}: {wrong.source}")
        else:
            is_wrong = ~np.isin(self.clips.splits.hashes(), Texts.from_list(KNOWN).hashes())
            if is_wrong.any():
                number = int(is_wrong.argmax())
                raise unknown_split(self.clips.splits[number], f"{self.name}: {self.clips.sources[number]}")

    @property
    def records(self) -> list[Record]:
        """The clips, a row each."""
        return self.rows if self.clips is None else list(self.clips.records())


def read_source(source: str, layout: str = "auto", *, classes: bool = False, cache_dir: Path | None = None) -> Source:
    """The clips of a source.

    Args:
        source: a path.
        layout: of a folder; "auto": told by the files that it has; "plain": names of folders and lists say nothing.
        classes: whether in a folder of no known layout the folders are classes, where no list of metadata says them.
        cache_dir: where the layout speech_commands_12 keeps pieces of silence.

    Raises:
        UserError: there is nothing of the kind, no clip in it, or it contradicts itself.
    """
    path = os.path.abspath(source)
    if not os.path.exists(path):
        path = unicode_twin(path) or path
    if os.path.isdir(path):
        if layout == "auto" and is_prepared(Path(path)):
            return Source(source, "prepared", clips=open_shards(Path(path)))
        return _read_folder(source, path, layout, classes, cache_dir)
    if layout not in ("auto", "plain"):
        raise UserError(f"{source}: --layout {layout} is for folders; this is none")
    name = path.lower()
    if not os.path.exists(path):
        raise UserError(missing_file(path, f"no such file or folder: {path}"))
    if name.endswith(EXTENSIONS):
        manifest = read_manifest(path)
        return Source(source, "manifest", manifest.records, manifest.remarks, manifest.columns, manifest.unread)
    remarks: list[str] = []
    if name.endswith(".tar"):
        return Source(source, "tar", read_tar(path, remarks), remarks)
    if name.endswith(_PACKED):
        raise UserError(f"{path} is compressed, so that nothing can be read from its middle: unpack it first")
    return Source(source, "file", [Record(path)])


def read_all(source: str) -> Source:
    """As `read_source`, for training without labels: of a folder in the layout of a known data set also what its labels
    leave out, and of each clip the split.
    """
    found = read_source(source)
    if found.kind not in LAYOUTS:
        return found
    listed = {record.path: record for record in found.rows}
    everything = read_source(source, "plain")
    found.rows = [listed.get(record.path, record) for record in everything.rows]
    found.remarks = everything.remarks
    return found


def _read_folder(source: str, path: str, layout: str, classes: bool, cache_dir: Path | None) -> Source:
    root = Path(path)
    remarks: list[str] = []
    reader: Callable[[Path, list[str]], Iterator[Record]]
    layouts = ("auto", "plain", *LAYOUTS, SPEECH_COMMANDS_12)
    if layout not in layouts:
        raise UserError(f"layout {layout!r} is none of {', '.join(layouts)}")
    if layout == SPEECH_COMMANDS_12:
        return Source(source, layout, list(speech_commands_12(root, remarks, cache_dir)), remarks)
    if layout == "auto":
        layout = next((name for name, (is_one, _) in LAYOUTS.items() if is_one(root)), "folder")
    elif layout != "plain" and not LAYOUTS[layout][0](root):
        raise UserError(
            f"{root} does not look like {layout}: see docs/data.md for what is expected, or use --layout plain"
        )
    if layout in ("plain", "folder"):
        listing = list_folder(path)
        remarks += listing.remarks
        if layout == "plain":
            rows = [Record(clip) for clip in listing.clips]
        else:
            rows = _plain_folder(path, listing, classes, remarks)
        return Source(source, "folder", rows, remarks)
    reader = LAYOUTS[layout][1]
    rows = list(reader(root, remarks))
    if not rows:
        raise UserError(f"{root}: laid out like {layout}, but there is no recording in it")
    return Source(source, layout, rows, remarks)


def _plain_folder(root: str, listing: Listing, classes: bool, remarks: list[str]) -> list[Record]:
    """Clips with what lists of metadata say of them, and the names of the folders that they lie in."""
    listed = read_metadata(listing, remarks)
    folders = [os.path.relpath(clip, root).split("/")[:-1] for clip in listing.clips]
    marks = by_folders(folders)
    has_labels = any(record.labels for records in listed.values() for record in records)
    rows = []
    for clip, (labels, split, fold) in zip(listing.clips, marks, strict=True):
        for record in listed.get(clip) or [Record(clip)]:
            if not record.split and not record.fold:
                record = replace(record, split=split, fold=fold)
            if classes and not has_labels:
                record = replace(record, labels=labels)
            rows.append(record)
    says_splits = any(record.split or record.fold for records in listed.values() for record in records)
    for stray, marked, is_typo in () if says_splits else strays_beside_splits(folders):
        if is_typo or (classes and not has_labels):
            raise stray_split(root, stray, marked)
        remarks.append(f"the folder {stray} lies beside {marked}, and is named after no split: it is trained on")
    unlisted = sum(clip not in listed for clip in listing.clips)
    if listed and unlisted:
        remarks.append(f"{unlisted} audio files are in no metadata list")
    if classes and not has_labels:
        _require_classes(root, rows, [remark for remark in remarks if "metadata" in remark])
    return rows


def _require_classes(root: str, rows: list[Record], remarks: list[str]) -> None:
    """Raises UserError if clips lie in the folder of a split or a fold, and in that of no class, or if all classes are
    called like splits; `remarks` are those about lists of metadata.
    """
    stray = next((row.path for row in rows if not row.labels and (row.split or row.fold)), None)
    if stray is not None:
        raise UserError(
            f"{os.path.relpath(stray, root)}: lies in the folder of a split or fold of {root}, and in that of no class;"
            " put a folder for each class between them, or name the clips in a CSV of path, label and split, or in a "
            "metadata.csv of file_name and label" + "".join(f" ({remark})" for remark in remarks[:1])
        )
    found = {label for row in rows for label in row.labels}
    if len(found) > 1 and all(map(is_like_split, found)):
        names = "; ".join(", ".join(spellings) for spellings in SPLITS.values())
        raise UserError(
            f"{root}: its folders {', '.join(sorted(found))} look like splits, which are called {names}; rename them, "
            "or name the clips in a CSV of path, label and split"
        )
