"""What the clips of a task are labelled with: read from manifests, folders and prepared folders, turned into targets,
and looked over.
"""

from __future__ import annotations

import csv
import functools
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ssast.engine.data.clips import Clips
from ssast.engine.data.manifest import LABEL_COLUMNS
from ssast.engine.data.record import Record
from ssast.engine.data.shards import is_prepared
from ssast.engine.data.sources import Source, read_source
from ssast.engine.errors import UserError

from .splits import Split

_MAX_NAMES = 5  # A message names at most so many labels or clips.


# Reading


def read_labelled(
    sources: list[str], *, layout: str = "auto", cache_dir: Path | None = None, notes: list[str] | None = None
) -> list[Record]:
    """The clips of manifests (.json, .jsonl, .csv, .tsv), folders, and folders that `ssast prepare` wrote, in that
    order.

    A folder is read by the layout that it has (data/layouts.py); one of no known layout has lists of metadata, or a
    folder for each class, with or without folders of splits above or below them. `layout` "speech_commands_12" reads
    Speech Commands as ten words, others and silence, and keeps the pieces of silence in `cache_dir`. Lines that are
    worth a note, but no warning, are added to `notes`.

    A file that is named again with the same labels is left out, with a warning that counts them.

    Raises:
        UserError: a source that cannot be read, that carries no labels, or that names a file twice with different
            labels; a split that is none.
    """
    files: list[Record] = []
    pieces: list[Record] = []
    for source in sources:
        content = _read(source, layout, cache_dir)
        content.check_splits()
        for remark in content.remarks:
            warnings.warn(f"{source}: {remark}", stacklevel=2)
        if notes is not None:
            notes += [f"{source}: {note}" for note in content.notes]
        if content.clips is None:
            files += _require_labels(content)
        else:
            pieces += content.records
    return _without_duplicates(files) + pieces


def of_clips(clips: Clips, records: Iterable[Record]) -> list[Record]:
    """For each clip its row: of a file that of `records` with its path, of a clip in a shard what its index says.

    Raises:
        KeyError: a file that is not among `records`.
    """
    by_path = {record.path: record for record in records}
    return [record if record.offset >= 0 else by_path[record.path] for record in clips.records()]


def _read(source: str, layout: str, cache_dir: Path | None) -> Source:
    if is_prepared(Path(source)):
        return read_source(source)
    path = Path(os.path.abspath(source))
    if path.is_file() and path.suffix.lower() not in (".json", ".jsonl", ".csv", ".tsv"):
        raise UserError(
            f"{source} carries no labels: name a .csv, .tsv or .json manifest or a folder; make a tar one by ssast "
            "prepare"
        )
    return read_source(source, "auto" if path.is_file() else layout, classes=True, cache_dir=cache_dir)


def _require_labels(source: Source) -> list[Record]:
    if any(record.labels for record in source.rows):
        return source.rows
    if source.kind == "manifest":
        why = f"it needs a column or field with the label of each clip ({', '.join(LABEL_COLUMNS)})"
        why += f"; its columns are {', '.join(source.columns)}" if source.columns else ""
    elif source.kind == "folder":
        why = "a folder of no known layout needs a sub-folder for each class, or a metadata.csv of file_name and label"
    else:
        why = f"{source.kind} comes without"
    raise UserError(f"{source.name}: none of {len(source.rows)} clips has a label; {why}")


def _without_duplicates(records: list[Record]) -> list[Record]:
    first: dict[tuple[str, int, float, float], Record] = {}
    for record in records:
        before = first.setdefault(record.place, record)
        if set(before.labels) != set(record.labels):
            was, now = (", ".join(labels) or "none" for labels in (before.labels, record.labels))
            raise UserError(f"{record.path}: named twice with different labels, {was} and {now}; keep one row of it")
        if (before.split, before.fold) != (record.split, record.fold):
            was, now = (f"split {which.split!r} and fold {which.fold!r}" for which in (before, record))
            raise UserError(f"{record.path}: named twice, in {was} and in {now}; keep one row of it")
    if len(first) < len(records):
        repeated = next(place[0] for place, count in Counter(r.place for r in records).items() if count > 1)
        warnings.warn(f"{len(records) - len(first)} repeated rows left out; the first is of {repeated}", stacklevel=3)
    return list(first.values())


# Classes


@dataclass(frozen=True)
class Vocabulary:
    """The classes of a task in the order of the logits; `aliases` are other names of them, such as AudioSet's mids."""

    labels: tuple[str, ...]
    aliases: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        repeated = [label for label, count in Counter(self.labels).items() if count > 1]
        if repeated:
            raise UserError(f"labels: {_some(repeated)} named twice; each class needs a name of its own")

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        return {**self.aliases, **{label: number for number, label in enumerate(self.labels)}}

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def from_clips(
        cls, clip_labels: Iterable[tuple[str, ...]], labels: Sequence[str] | Path | None = None
    ) -> Vocabulary:
        """The classes that are given, as a list or a file (`read`), or else those of the clips: sorted, by number if
        all are numbers.
        """
        if isinstance(labels, Path):
            return cls.read(labels)
        if labels is not None:
            return cls(tuple(labels))
        classes = {label for of_clip in dict.fromkeys(clip_labels) for label in of_clip}
        return cls(
            tuple(sorted(classes, key=(lambda label: (float(label), label)) if all(map(_is_number, classes)) else None))
        )

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """From a CSV with columns index, mid and display_name, as AudioSet's class_labels_indices.csv, or a text of one
        label a line.

        Where a display name comes twice, the classes are called by their mids.

        Raises:
            UserError: the file cannot be read or is of another form.
        """
        try:
            text = path.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: the list of labels cannot be read: {error}") from None
        if path.suffix.lower() != ".csv":
            return cls(tuple(line.strip() for line in text.splitlines() if line.strip()))
        rows = list(csv.DictReader(text.splitlines()))
        if not rows or not all(
            (row.get(name) or "").strip() for row in rows for name in ("index", "mid", "display_name")
        ):
            raise UserError(
                f"{path}: expected a header and rows of index, mid and display_name, as in class_labels_indices.csv"
            )
        if [row["index"].strip() for row in rows] != [str(number) for number in range(len(rows))]:
            raise UserError(f"{path}: the column index must count the rows from 0")
        mids, names = ([row[column].strip() for row in rows] for column in ("mid", "display_name"))
        labels, others = (names, mids) if len(set(names)) == len(names) else (mids, names)
        return cls(tuple(labels), {other: number for number, other in enumerate(others) if others.count(other) == 1})

    def numbers(self, labels: tuple[str, ...]) -> tuple[list[int], list[str]]:
        """(the classes of a clip, which of its labels no class is called).

        Where not all labels are classes, a class with commas in its name is also found in labels that follow one
        another: a table in which commas separate labels has taken it apart.
        """
        if all(label in self._index for label in labels):
            return list(dict.fromkeys(self._index[label] for label in labels)), []
        numbers, unknown = [], []
        parts = list(labels)
        while parts:
            joined = ((count, self._index.get(", ".join(parts[:count]))) for count in range(len(parts), 0, -1))
            count, number = next(((count, number) for count, number in joined if number is not None), (1, None))
            if number is not None:
                numbers.append(number)
            else:
                unknown.append(parts[0])
            del parts[:count]
        return list(dict.fromkeys(numbers)), unknown


def _is_number(text: str) -> bool:
    try:
        return np.isfinite(float(text))
    except ValueError:
        return False


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMES
    return ", ".join(map(repr, names[:_MAX_NAMES])) + (f" and {more} more" if more > 0 else "")


# Looking over what there is to learn and to measure


@dataclass(frozen=True)
class Examined:
    """What can be trained and measured on: the split without the clips left out, targets bool [N, C], and remarks for
    people.

    Bool, because millions of clips with hundreds of classes are gigabytes in any other type.
    """

    split: Split
    targets: np.ndarray
    remarks: list[str]


def examine(
    clip_labels: Sequence[tuple[str, ...]],
    sources: Sequence[str],
    vocabulary: Vocabulary,
    split: Split,
    *,
    multi_label: bool,
    unseen: str = "error",
    strict: bool = False,
) -> Examined:
    """Look over the labels of a task before it begins; `clip_labels` and `sources` [N] are of all clips.

    Clips without a label are left out and counted; `strict` makes them an error. Labels in validation or test that no
    training clip has are an error; with `unseen` "drop" they are taken away and counted, and clips that have no other
    label are left out. Labels that are no class of a given vocabulary are treated the same in all three parts. A class
    with one training clip is a remark.

    Raises:
        UserError: as said, or nothing left to train on, fewer than two classes, more classes than training clips, or a
            clip with several labels where `multi_label` is false.
    """
    if unseen not in ("error", "drop"):
        raise ValueError(f'unseen is "error" or "drop", not {unseen!r}')
    remarks: list[str] = []
    clips = np.concatenate(split.parts).tolist()
    encoded, foreign = np.zeros((len(clip_labels), len(vocabulary)), dtype=bool), {}
    numbers = functools.cache(vocabulary.numbers)
    for number in clips:
        classes, unknown = numbers(clip_labels[number])
        encoded[number, classes] = True
        if unknown:
            foreign[number] = unknown
    if foreign:
        names = list(dict.fromkeys(label for labels in foreign.values() for label in labels))
        message = (
            f"{len(foreign)} clips have labels that are no class: {_some(names)}; the first is "
            f"{sources[next(iter(foreign))]}"
        )
        if unseen == "error":
            raise UserError(f"{message}; add them to the list of labels, or drop unseen labels")
        remarks.append(f"{message}; these labels are taken away")
    if not multi_label:
        several = [number for number in clips if encoded[number].sum() > 1]
        if several:
            names = [vocabulary.labels[at] for at in np.flatnonzero(encoded[several[0]])]
            raise UserError(
                f"{sources[several[0]]}: has several labels, {_some(names)} ({len(several)} such clips), but the task "
                "has one a clip; "
                "set multi_label"
            )

    unlabelled = {name: part[~encoded[part].any(axis=1)] for name, part in split.named()}
    split = split.without(np.concatenate(list(unlabelled.values())))
    counted = ", ".join(f"{len(part)} in {name}" for name, part in unlabelled.items() if len(part))
    if counted:
        first = next(int(part[0]) for part in unlabelled.values() if len(part))
        message = f"clips without a label: {counted}; the first is {sources[first]}"
        if strict:
            raise UserError(f"{message}; label them, or let them be left out (strict is set)")
        remarks.append(f"{message}; they are left out")

    counts = encoded[split.train].sum(axis=0)  # [C] training clips of each class
    split = _drop_unseen(split, encoded, counts, vocabulary, unseen, sources, remarks)
    _require_learnable(counts, len(split.train), vocabulary)
    single = np.flatnonzero(counts == 1)
    if len(single):
        remarks.append(
            f"{len(single)} classes have one training clip: {_some([vocabulary.labels[at] for at in single])}"
        )
    return Examined(split, encoded, remarks)


def _drop_unseen(
    split: Split,
    encoded: np.ndarray,
    counts: np.ndarray,
    vocabulary: Vocabulary,
    unseen: str,
    sources: Sequence[str],
    remarks: list[str],
) -> Split:
    """Without clips that only have labels which training never sees; those labels are cleared in `encoded` [N, C]."""
    measured = np.concatenate([split.valid, split.test])
    is_unseen = (counts == 0) & encoded[measured].any(axis=0)  # [C]
    if not is_unseen.any() or not len(split.train):
        return split
    hit = measured[encoded[measured][:, is_unseen].any(axis=1)]
    names = [vocabulary.labels[at] for at in np.flatnonzero(is_unseen)]
    message = (
        f"validation and test have labels that no training clip has: {_some(names)}, in {len(hit)} clips, the "
        f"first {sources[hit[0]]}"
    )
    if unseen == "error":
        raise UserError(f"{message}; add training clips of them, or drop unseen labels")
    encoded[np.ix_(measured, is_unseen)] = False
    empty = measured[~encoded[measured].any(axis=1)]
    remarks.append(f"{message}; these labels are taken away, and {len(empty)} clips with them")
    return split.without(empty)


def _require_learnable(counts: np.ndarray, clips: int, vocabulary: Vocabulary) -> None:
    if not clips:
        raise UserError("no training clip has a label: nothing can be learned")
    if len(vocabulary) < 2 or (counts > 0).sum() < 2:
        names = _some([vocabulary.labels[at] for at in np.flatnonzero(counts)])
        raise UserError(
            f"all {clips} training clips are of one class, {names}: there is nothing to tell apart; add clips of others"
        )
    if len(vocabulary) > clips:
        raise UserError(
            f"{len(vocabulary)} classes but {clips} training clips: every class needs clips of its own; add some"
        )
