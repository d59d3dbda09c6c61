"""What the clips of a task are labelled with: read from manifests, folders and prepared folders, turned into targets,
and looked over.
"""

from __future__ import annotations

import csv
import functools
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ssast.engine.data.clips import Clips
from ssast.engine.data.layouts import read_source, speech_commands_12
from ssast.engine.data.manifest import Entry, read_manifest
from ssast.engine.data.shards import is_prepared, open_shards
from ssast.engine.errors import UserError

from .splits import Split, read_split

_NAMED_AT_MOST = 5  # labels or clips in a message
SPEECH_COMMANDS_12 = "speech_commands_12"


@dataclass(frozen=True)
class Labelled:
    """A clip and what is known of it, "" for nothing. `path` is the file, or for a clip of a prepared folder what it
    was made from.
    """

    path: str
    labels: tuple[str, ...]
    split: str
    speaker: str
    fold: str

    @property
    def entry(self) -> Entry:
        """As `check_clips` takes it."""
        return Entry(self.path, ",".join(self.labels), self.split, self.speaker, self.fold)


# Reading


def read_labelled(sources: list[str], *, layout: str = "auto", cache_dir: Path | None = None) -> list[Labelled]:
    """The clips of manifests (.json, .csv, .tsv), folders, and folders that `ssast prepare` wrote, in that order.

    A folder is read by the layout that it has (data/layouts.py); one of no known layout holds a folder for each class,
    with or without folders train, valid, test above them. `layout` "speech_commands_12" reads Speech Commands as ten
    words, others and silence, and keeps the pieces of silence in `cache_dir`. Folds are the column `fold` of a
    manifest, or a split called fold1, fold2 ...

    A file that is named again with the same labels is left out, with a warning that counts them.

    Raises:
        UserError: a source that cannot be read, that carries no labels, or that names a file twice with different
            labels.
    """
    found: list[Labelled] = []
    pieces: list[Labelled] = []
    for source in sources:
        if is_prepared(Path(source)):
            pieces += of_clips(open_shards(Path(source)), [])
        else:
            found += map(_labelled, _read(source, layout, cache_dir))
    return _without_duplicates(found) + pieces


def of_clips(clips: Clips, labelled: Iterable[Labelled]) -> list[Labelled]:
    """For each clip what is known of it: of a file what `labelled` says of its source, of a clip in a shard what its
    index says.

    Raises:
        KeyError: a file that is not among `labelled`.
    """
    by_path = {item.path: item for item in labelled}
    texts = zip(clips.sources, clips.labels, clips.splits, clips.speakers, clips.in_shards.tolist(), strict=True)
    return [
        _labelled(Entry(source, label, split, speaker)) if in_shard else by_path[source]
        for source, label, split, speaker, in_shard in texts
    ]


def _labelled(entry: Entry) -> Labelled:
    split, fold = entry.split.strip(), entry.fold.strip()
    if named := re.fullmatch(r"fold[ _-]?(\w+)", split, re.IGNORECASE):
        split, fold = "", fold or named[1]
    return Labelled(entry.path, parse(entry.label), split, entry.speaker.strip(), re.sub(r"(?i)^fold[ _-]?", "", fold))


def parse(text: str) -> tuple[str, ...]:
    """The labels in a text, by commas."""
    return tuple(label for part in text.split(",") if (label := part.strip()))


def _read(source: str, layout: str, cache_dir: Path | None) -> list[Entry]:
    path = Path(os.path.abspath(source))
    if path.suffix.lower() in (".json", ".csv", ".tsv") and path.is_file():
        return _require_labels(source, read_manifest(path), "it needs a column or field with the label of each clip")
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"no such file or folder: {path}")
        raise UserError(
            f"{source} carries no labels: name a .csv, .tsv or .json manifest or a folder; make a tar one by ssast "
            "prepare"
        )
    if layout == SPEECH_COMMANDS_12:
        remarks: list[str] = []
        entries = list(speech_commands_12(path, remarks, cache_dir))
        kind = layout
    else:
        found = read_source(source, layout)
        kind, remarks = found.kind, found.remarks
        entries = [Entry(r.path, r.label, r.split, r.speaker) for r in found.recordings]
    for remark in remarks:
        warnings.warn(f"{source}: {remark}", stacklevel=4)
    if kind == "folder":
        entries = [_by_folder(path, entry.path) for entry in entries]
        return _require_labels(source, entries, "a folder of no known layout needs a sub-folder for each class")
    return _require_labels(source, entries, f"{kind} comes without")


def _by_folder(root: Path, path: str) -> Entry:
    """ROOT/CLASS/... or ROOT/SPLIT/CLASS/..."""
    *folders, _ = os.path.relpath(path, root).split("/")
    split = folders.pop(0) if len(folders) > 1 and read_split(folders[0]) else ""
    return Entry(path, folders[0] if folders else "", split)


def _require_labels(source: str, entries: list[Entry], why: str) -> list[Entry]:
    if not any(entry.label.strip() for entry in entries):
        raise UserError(f"{source}: none of {len(entries)} clips has a label; {why}")
    return entries


def _without_duplicates(labelled: list[Labelled]) -> list[Labelled]:
    first: dict[str, Labelled] = {}
    for item in labelled:
        known = first.setdefault(item.path, item)
        if set(known.labels) != set(item.labels):
            was, now = (", ".join(labels) or "none" for labels in (known.labels, item.labels))
            raise UserError(f"{item.path}: named twice with different labels, {was} and {now}; keep one row of it")
        if (known.split, known.fold) != (item.split, item.fold):
            was, now = (f"split {which.split!r} and fold {which.fold!r}" for which in (known, item))
            raise UserError(f"{item.path}: named twice, in {was} and in {now}; keep one row of it")
    if len(first) < len(labelled):
        repeated = next(path for path, count in Counter(item.path for item in labelled).items() if count > 1)
        warnings.warn(f"{len(labelled) - len(first)} repeated rows left out; the first is of {repeated}", stacklevel=3)
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
        object.__setattr__(
            self, "_index", {**self.aliases, **{label: number for number, label in enumerate(self.labels)}}
        )

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def from_clips(cls, label_texts: Iterable[str], labels: Sequence[str] | Path | None = None) -> Vocabulary:
        """The classes that are given, as a list or a file (`read`), or else those of the texts: sorted, by number if
        all are numbers.
        """
        if isinstance(labels, Path):
            return cls.read(labels)
        if labels is not None:
            return cls(tuple(labels))
        found = {label for text in dict.fromkeys(label_texts) for label in parse(text)}
        return cls(
            tuple(sorted(found, key=(lambda label: (float(label), label)) if all(map(_is_number, found)) else None))
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

    def numbers(self, text: str) -> tuple[list[int], list[str]]:
        """(the classes named in a text, what is in it that no class is called).

        Labels stand between commas; a class whose name has commas in it is found as well.
        """
        known, unknown = [], []
        parts = [part.strip() for part in text.split(",")]
        while parts:
            joined = ((count, self._index.get(", ".join(parts[:count]))) for count in range(len(parts), 0, -1))
            count, number = next(((count, number) for count, number in joined if number is not None), (1, None))
            if number is not None:
                known.append(number)
            elif parts[0]:
                unknown.append(parts[0])
            del parts[:count]
        return list(dict.fromkeys(known)), unknown

    def encode(self, label_texts: Iterable[str]) -> np.ndarray:
        """float32 [N, C], 1 for each class that a text names.

        Raises:
            UserError: a label that is no class.
        """
        texts = list(label_texts)
        rows = {text: np.zeros(len(self), dtype=np.float32) for text in dict.fromkeys(texts)}
        for text, row in rows.items():
            known, unknown = self.numbers(text)
            if unknown:
                raise UserError(f"label {_some(unknown)}: no class of this task, which are {_some(self.labels)}")
            row[known] = 1
        return np.stack([rows[text] for text in texts]) if texts else np.zeros((0, len(self)), dtype=np.float32)


def targets(clips_labels: Sequence[str], vocabulary: Vocabulary) -> np.ndarray:
    """float32 [N, C] of the labels of clips, row by clip number."""
    return vocabulary.encode(clips_labels)


def _is_number(text: str) -> bool:
    try:
        return np.isfinite(float(text))
    except ValueError:
        return False


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(map(repr, names[:_NAMED_AT_MOST])) + (f" and {more} more" if more > 0 else "")


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
    label_texts: Sequence[str],
    sources: Sequence[str],
    vocabulary: Vocabulary,
    split: Split,
    *,
    multi_label: bool,
    unseen: str = "error",
    strict: bool = False,
) -> Examined:
    """Look over the labels of a task before it begins; `label_texts` and `sources` [N] are of all clips.

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
    chosen = np.concatenate(split.parts).tolist()
    encoded, foreign = np.zeros((len(label_texts), len(vocabulary)), dtype=bool), {}
    numbers = functools.cache(vocabulary.numbers)
    for number in chosen:
        known, unknown = numbers(label_texts[number])
        encoded[number, known] = True
        if unknown:
            foreign[number] = unknown
    if foreign:
        names = list(dict.fromkeys(label for labels in foreign.values() for label in labels))
        told = (
            f"{len(foreign)} clips have labels that are no class: {_some(names)}; the first is "
            f"{sources[next(iter(foreign))]}"
        )
        if unseen == "error":
            raise UserError(f"{told}; add them to the list of labels, or drop unseen labels")
        remarks.append(f"{told}; these labels are taken away")
    if not multi_label:
        several = [number for number in chosen if encoded[number].sum() > 1]
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
        told = f"clips without a label: {counted}; the first is {sources[first]}"
        if strict:
            raise UserError(f"{told}; label them, or let them be left out (strict is set)")
        remarks.append(f"{told}; they are left out")

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
    told = (
        f"validation and test have labels that no training clip has: {_some(names)}, in {len(hit)} clips, the "
        f"first {sources[hit[0]]}"
    )
    if unseen == "error":
        raise UserError(f"{told}; add training clips of them, or drop unseen labels")
    encoded[np.ix_(measured, is_unseen)] = False
    empty = measured[~encoded[measured].any(axis=1)]
    remarks.append(f"{told}; these labels are taken away, and {len(empty)} clips with them")
    return split.without(empty)


def _require_learnable(counts: np.ndarray, clips: int, vocabulary: Vocabulary) -> None:
    if not clips:
        raise UserError("no training clip has a label: nothing can be learned")
    if len(vocabulary) < 2 or (counts > 0).sum() < 2:
        held = _some([vocabulary.labels[at] for at in np.flatnonzero(counts)])
        raise UserError(
            f"all {clips} training clips are of one class, {held}: there is nothing to tell apart; add clips of others"
        )
    if len(vocabulary) > clips:
        raise UserError(
            f"{len(vocabulary)} classes but {clips} training clips: every class needs clips of its own; add some"
        )
