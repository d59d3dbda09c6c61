"""Which clips are trained, validated and tested on.

What the data say comes first:

1. With `fold` given, that fold is tested on. Where the clips have folds of their own these are taken; otherwise `folds`
   of them are made, alike in their classes, and no recording (or speaker, as `group` says) is in two. With `valid_fold`
   the fold after the tested one is for validation. All else is trained on.
2. Without it, a split column: train, valid and test in their usual spellings; clips with none are trained on.
3. Where this leaves no clip for validation, `valid_fraction` of the training clips are held out: of every class the
   recordings (or speakers) whose names hash lowest, so that the choice survives added files. With a fraction of 0 there
   is no validation.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ssast.engine.data.record import SPLITS, find_split, unknown_split
from ssast.engine.errors import UserError
from ssast.engine.random_streams import Stream
from ssast.kernels.random import philox

Group = Literal["recording", "speaker"]
_SEVERAL = (",",)  # the stratum of all clips with more than one label
_ESC50_NAME = re.compile(r"[1-9]-(\d+)-[A-Z]-\d+\.\w+")  # fold, recording, take, class


@dataclass(frozen=True)
class Split:
    """Numbers of the clips of each part, int64, ascending."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray

    @property
    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The numbers of the clips to train, validate and test on."""
        return self.train, self.valid, self.test

    def named(self) -> Iterator[tuple[str, np.ndarray]]:
        """Each part with its name."""
        return zip(("train", "valid", "test"), self.parts, strict=True)

    def without(self, clips: np.ndarray) -> Split:
        """The same split without some clips, which are given by their numbers."""
        return Split(*(part[~np.isin(part, clips)] for part in self.parts))


def split_clips(
    splits: Sequence[str],
    folds_of: Sequence[str],
    sources: Sequence[str],
    speakers: Sequence[str],
    labels: Sequence[tuple[str, ...]],
    *,
    fold: str | None,
    folds: int | None,
    valid_fraction: float,
    seed: int,
    group: Group | None = "recording",
    valid_fold: bool = False,
) -> Split:
    """Split N clips, of each of which the split, fold, source and speaker are given as texts, "" for none, and the
    labels as a tuple; see above.

    `seed` is that of folds which are made; these are called "1", "2" ...

    Raises:
        UserError: a spelling of split or a fold that there is not, folds asked for where only a split column is, or the
            other way round, more folds than groups, nothing to train on, or `group` "speaker" with a clip of no
            speaker.
    """
    if not 0 <= valid_fraction < 1:
        raise UserError(f"valid_fraction: {valid_fraction}, expected a fraction between 0 and 1 of the training clips")
    groups = _groups(sources, speakers, group)
    own = any(folds_of)
    if fold is not None:
        if not own:
            if folds is None:
                raise UserError(
                    f"fold {fold} is asked for, but the clips have no folds: add a column fold, or say how many to make"
                )
            if any(splits):
                raise UserError(
                    f"{folds} folds are asked for, but the clips are split by a column: leave out the one or the other"
                )
            folds_of = _make_folds(folds, groups, labels, seed)
        train, valid, test = _by_fold(folds_of, fold, valid_fold, sources)
    elif own and not any(splits):
        raise UserError(f"the clips come in folds ({', '.join(fold_names(folds_of))}): say which one is tested on")
    else:
        part = np.array([_part(split, source) for split, source in zip(splits, sources, strict=True)], dtype=object)
        train, valid, test = (np.flatnonzero(part == name) for name in SPLITS)
    if not len(train):
        raise UserError(
            f"none of {len(splits)} clips is for training: {len(valid)} are marked for validation, {len(test)} for test"
        )
    if not len(valid) and valid_fraction:
        valid = _hold_out(train, groups, labels, valid_fraction)
        train = np.setdiff1d(train, valid)
    return Split(train, valid, test)


def fold_names(folds_of: Sequence[str]) -> list[str]:
    """The folds there are, in order, by number if all are numbers."""
    names = {name for name in folds_of if name}
    return sorted(names, key=int if all(name.isdecimal() for name in names) else None)


def _part(split: str, source: str) -> str:
    name = find_split(split)
    if name is None:
        raise unknown_split(split, source)
    return name or "train"


def _groups(sources: Sequence[str], speakers: Sequence[str], group: Group | None) -> list[str]:
    if group == "speaker":
        nameless = next((source for source, speaker in zip(sources, speakers, strict=True) if not speaker), None)
        if nameless is not None:
            raise UserError(f"{nameless}: has no speaker, but clips are to be grouped by speaker; add a column speaker")
        return list(speakers)
    return (
        recordings(sources) if group == "recording" else [f"{number} {source}" for number, source in enumerate(sources)]
    )


def recordings(sources: Sequence[str]) -> list[str]:
    """What recording each clip is from: the one that ESC-50 has in its file names, or else the source itself."""
    return [match[1] if (match := _ESC50_NAME.fullmatch(source.rpartition("/")[2])) else source for source in sources]


def _by_fold(folds_of: Sequence[str], fold: str, valid_fold: bool, sources: Sequence[str]) -> tuple[np.ndarray, ...]:
    """The numbers of the clips to train, validate and test on, where `fold` is tested on."""
    names = fold_names(folds_of)
    fold = re.sub(r"(?i)^fold[ _-]?", "", str(fold).strip())
    if fold not in names:
        raise UserError(f"there is no fold {fold}: the clips have {', '.join(names)}")
    if len(names) < 2 + valid_fold:
        raise UserError(
            f"{len(names)} folds: too few to train on one and test on another{' and validate on a third' * valid_fold}"
        )
    nowhere = next((source for source, name in zip(sources, folds_of, strict=True) if not name), None)
    if nowhere is not None:
        raise UserError(f"{nowhere}: has no fold, though other clips do; fill in the column fold")
    of = np.array(folds_of, dtype=object)
    is_test = of == fold
    is_valid = of == (names[(names.index(fold) + 1) % len(names)] if valid_fold else None)
    return tuple(np.flatnonzero(part) for part in (~is_test & ~is_valid, is_valid, is_test))


def _make_folds(folds: int, groups: Sequence[str], labels: Sequence[tuple[str, ...]], seed: int) -> list[str]:
    """The fold of each clip, "1" to str(folds), alike in their classes; clips with several labels count by the
    first.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    different = len(set(groups))
    if folds < 2 or different < folds:
        raise UserError(
            f"{folds} folds of {different} recordings or speakers: expected 2 or more folds, and that many to deal out"
        )
    of = np.zeros(len(groups), dtype=np.int64)
    strata = [of_clip[0] if of_clip else "" for of_clip in labels]
    # Sorted by group, so that the order in which the clips are named does not matter.
    order = np.array(sorted(range(len(groups)), key=lambda number: groups[number]))
    with warnings.catch_warnings():
        # Some classes have fewer clips than there are folds; `examine` reports what follows from that.
        warnings.simplefilter("ignore", UserWarning)
        counts = Counter(strata)
        # scikit-learn refuses if no class has as many clips as there are folds; then there is nothing to be alike in.
        classes = (
            np.unique(strata, return_inverse=True)[1]
            if max(counts.values()) >= folds
            else np.zeros(len(strata), dtype=int)
        )
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed % 2**32)
        parts = splitter.split(np.zeros(len(order)), classes[order], np.asarray(groups, dtype=object)[order])
        for number, (_, test) in enumerate(parts, 1):
            of[order[test]] = number
    return [str(number) for number in of.tolist()]


def _hold_out(
    clips: np.ndarray, groups: Sequence[str], labels: Sequence[tuple[str, ...]], fraction: float
) -> np.ndarray:
    """About `fraction` of the clips, ascending: whole groups, from each class in proportion, and never all of a
    class.
    """
    strata: dict[tuple[str, ...], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    of_group: dict[str, tuple[str, ...]] = {}
    for number in clips.tolist():  # a group goes by the class of its first clip
        stratum = of_group.setdefault(groups[number], labels[number] if len(labels[number]) < 2 else _SEVERAL)
        strata[stratum][groups[number]].append(number)
    numbers: list[int] = []
    expected = 0.0
    for _, members in sorted(strata.items()):
        count = sum(map(len, members.values()))
        expected += fraction * count  # carried over the classes, so that small ones are held out of together
        for name in sorted(members, key=_hash)[:-1]:
            if len(numbers) + len(members[name]) / 2 > expected:
                break
            numbers += members[name]
    if not numbers:
        raise UserError(
            f"{len(clips)} training clips: none can be held out for validation without taking all of a class; "
            "mark some as valid, or set valid_fraction to 0"
        )
    return np.array(sorted(numbers), dtype=np.int64)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def check_leaks(
    split: Split, sources: Sequence[str], speakers: Sequence[str], *, by_speaker: bool = False
) -> list[str]:
    """Raise if the parts of a split share a recording; remarks about speakers that they share if `by_speaker`.

    Recordings are identified by the source and, where file names are those of ESC-50, by what these say; the sound
    itself is not compared.

    Raises:
        UserError: a recording in two parts.
    """
    of_recording = recordings(sources)
    remarks = []
    parts = list(split.named())
    for at, (name, part) in enumerate(parts):
        for other_name, other in parts[at + 1 :]:
            shared = _shared(of_recording, part, other)
            if shared:
                one, two = shared[0]
                raise UserError(
                    f"{name} and {other_name} share {len(shared)} recordings: {sources[one]} and {sources[two]} are "
                    "of one; "
                    "put all clips of a recording into one fold or split"
                )
            shared = _shared(speakers, part, other) if by_speaker else []
            if shared:
                who = ", ".join(sorted({speakers[one] for one, _ in shared})[:5])
                remarks.append(
                    f"{name} and {other_name} share {len(shared)} speakers ({who}): the measure will flatter"
                )
    return remarks


def _shared(names: Sequence[str], one: np.ndarray, other: np.ndarray) -> list[tuple[int, int]]:
    """A clip of each part for every name that is in both; "" is no name."""
    first, second = ({names[number]: number for number in reversed(part.tolist())} for part in (one, other))
    return [(first[name], second[name]) for name in first if name and name in second]


def few(clips: np.ndarray, labels: Sequence[tuple[str, ...]], per_class: int, seed: int) -> np.ndarray:
    """`per_class` of the clips for each class, ascending; a clip of several labels counts for each, so that of these
    there may be more.

    Args:
        clips: int64 numbers, of the training clips.
        labels: those of all clips, so that labels[clips[0]] is that of the first.

    Raises:
        UserError: a class with fewer clips.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for number in clips.tolist():
        for label in set(labels[number]):
            members[label].append(number)
    for label, numbers in members.items():
        if len(numbers) < per_class:
            raise UserError(f"{per_class} clips a class are asked for, but {label!r} has {len(numbers)} training clips")
    number = torch.from_numpy(np.ascontiguousarray(clips, dtype=np.int64))
    zero = torch.zeros_like(number)
    words = philox(seed, number & 0xFFFFFFFF, number >> 32, zero, zero + Stream.FEW_CLIPS)[0].tolist()
    rank = dict(zip(clips.tolist(), words, strict=True))
    picked = {
        number for numbers in members.values() for number in sorted(numbers, key=lambda n: (rank[n], n))[:per_class]
    }
    return np.array(sorted(picked), dtype=np.int64)
