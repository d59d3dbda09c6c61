"""What is known of a clip before it is read: one row type for every source, the one list of split names, and how labels
are written as text.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ssast.engine.errors import UserError

SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Every spelling of a split, case and blanks aside; a clip of none ("") is trained on."""
KNOWN = ("", *SPLITS)
"""What the split of a clip may be where it matters."""

_SPLIT_OF = {spelling: split for split, spellings in SPLITS.items() for spelling in spellings} | {"": ""}
_FOLD = re.compile(r"fold[ _-]?(\w+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Record:
    """One clip of a source.

    `path` is the file that is opened, absolute, symbolic links kept: the audio file itself, or a tar of which `size`
    bytes at `offset` are the audio file (offset -1: the whole file). Of the sound, what lies between `start` and `end`
    seconds is the clip. `source` is its name for people, the path unless given otherwise. `split` is train, valid, test
    or ""; the name of none of them is kept as it was written.
    """

    path: str
    labels: tuple[str, ...] = ()
    split: str = ""
    speaker: str = ""
    fold: str = ""
    source: str = ""
    offset: int = -1
    size: int = -1
    start: float = 0.0
    end: float = math.inf

    def __post_init__(self) -> None:
        if not self.source:
            object.__setattr__(self, "source", self.path)

    @property
    def is_segment(self) -> bool:
        """Whether the clip is a part of the sound in its file."""
        return self.start > 0 or self.end < math.inf

    @property
    def place(self) -> tuple[str, int, float, float]:
        """What no two clips have in common."""
        return self.path, self.offset, self.start, self.end

    @property
    def label_text(self) -> str:
        """The labels as `split_labels` reads them."""
        return join_labels(self.labels)

    @property
    def split_text(self) -> str:
        """The split, or the fold where there is none, as `split_and_fold` reads them: prepared folders have one
        column for both.
        """
        return self.split or (f"fold{self.fold}" if self.fold else "")


def find_split(text: str) -> str | None:
    """train, valid, test or "" for the name of a split in any spelling; None for what is none."""
    return _SPLIT_OF.get(text.strip().lower())


def unknown_split(text: str, where: str) -> UserError:
    """What is raised where a split matters and `text` is the name of none; `where` says what it stands in."""
    names = "; ".join(", ".join(spellings) for spellings in SPLITS.values())
    return UserError(f"{where}: split {text!r} is none of {names}; correct it, or leave it empty for training")


def find_fold(text: str) -> str:
    """The fold that fold1, fold_1 or Fold 1 names: 1. "" for other texts."""
    named = _FOLD.fullmatch(text.strip())
    return named[1] if named else ""


@functools.lru_cache(maxsize=1024)
def split_and_fold(text: str) -> tuple[str, str]:
    """(split, fold) of a text that names one of both. A text that names neither stays as it is: what makes use of a
    split refuses it (`unknown_split`).
    """
    fold = find_fold(text)
    split = find_split(text)
    return ("", fold) if fold else (text.strip() if split is None else split, "")


@functools.lru_cache(maxsize=1 << 16)
def split_labels(text: str) -> tuple[str, ...]:
    """The labels in a text. A comma separates them, unless it stands between double quotes around a label."""
    if '"' not in text:
        return tuple(label for part in text.split(",") if (label := part.strip()))
    labels, rest = [], text
    while rest:
        quoted = re.match(r'\s*"((?:[^"]|"")*)"\s*(?:,|$)', rest)
        if quoted:
            label, rest = quoted[1].replace('""', '"'), rest[quoted.end() :]
        else:
            label, _, rest = rest.partition(",")
        if label.strip():
            labels.append(label.strip())
    return tuple(labels)


def labels_of(value: Any, where: str) -> tuple[str, ...]:
    """The labels that a value out of a table or out of JSON says: of a text by commas, of a list its items as they are,
    a number as it is written. null and blanks are no label.

    Raises:
        UserError: true, false, an object, a list in a list, or a number that is not finite; `where` is named.
    """
    if isinstance(value, str):
        return split_labels(value)
    labels = []
    for item in value if isinstance(value, list) else [value]:
        is_number = (isinstance(item, float) and math.isfinite(item)) or type(item) is int
        if not (item is None or isinstance(item, str) or is_number):
            raise UserError(
                f"{where}: {_shown(item)} is no label: a label is a text or a number, several are a list of those, and "
                "null or an empty text is none"
            )
        labels.append("" if item is None else str(item).strip())
    return tuple(filter(None, labels))


def _shown(value: Any) -> str:
    """A value as JSON has it, shortened."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def join_labels(labels: Iterable[str]) -> str:
    """Labels as one text, which `split_labels` takes apart again: those with a comma or a quote in them stand between
    double quotes.
    """
    return ",".join('"' + label.replace('"', '""') + '"' if set(label) & set(',"') else label for label in labels)
