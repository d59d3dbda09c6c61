"""The clips of a task: read, checked, split, and looked over, with the targets of each."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ssast.engine.data.check import check_clips
from ssast.engine.data.clips import Clips, Skipped
from ssast.engine.data.dataset import CONVERTED_RATE, Dataset, cache_folder, clip_statistics, require_whole_files
from ssast.engine.data.record import KNOWN, Record, unknown_split
from ssast.engine.data.shards import is_prepared, open_shards, print_remarks
from ssast.engine.data.texts import Texts
from ssast.engine.errors import UserError

from .config import FinetuneConfig, FinetuneDataSection
from .labels import Vocabulary, examine, of_clips, read_labelled
from .splits import check_leaks, few, fold_names, split_clips


@dataclass(frozen=True)
class LabelledClips:
    """All clips of a task that can be read, before they are split; `records` [N] is the row of each."""

    clips: Clips
    records: list[Record]
    skipped: list[Skipped]
    remarks: tuple[str, ...] = ()

    def folds(self) -> list[str]:
        """The folds that the clips come in; an empty list if they have none."""
        return fold_names([record.fold for record in self.records])


@dataclass(frozen=True, kw_only=True)
class TaskData(Dataset):
    """What one run trains, validates and tests on; targets are bool [N, C]."""

    test: Clips
    labels: tuple[str, ...]
    train_targets: np.ndarray
    valid_targets: np.ndarray
    test_targets: np.ndarray
    remarks: tuple[str, ...] = ()

    def parts(self) -> tuple[Clips, ...]:
        """All clips, as they are read."""
        return self.train, self.valid, self.test

    def summary(self) -> dict[str, int | float]:
        """What environment.json and the log say of the data."""
        return super().summary() | {"test_clips": len(self.test), "classes": len(self.labels)}


def read_task(config: FinetuneConfig) -> LabelledClips:
    """The clips that a task names, each checked once.

    Raises:
        UserError: nothing named or usable, or what `read_labelled` finds wrong.
    """
    data = config.data
    if not data.train:
        raise UserError(
            "data.train is not set: name the folder of the data set, or a CSV of path and label: data.train=/path"
        )
    sources_by_split = [(data.train, ""), (data.valid, "valid"), (data.test, "test")]
    records: list[Record] = []
    parts: list[Clips] = []
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for sources, split in sources_by_split:
            plain = [source for source in sources if not is_prepared(Path(source))]
            rows: list[Record] = []
            if plain:
                rows = read_labelled(plain, layout=config.task.layout, cache_dir=cache_folder(data), notes=notes)
            require_whole_files(", ".join(plain), rows)
            if split:
                records += [replace(record, split=split) for record in rows]
            else:
                records += itertools.compress(rows, _keep_mask([record.split for record in rows], data))
            for source in sources:
                if is_prepared(Path(source)):
                    clips = open_shards(Path(source))
                    print_remarks(Path(source))
                    wrong = next((name for name in set(clips.splits) if name not in KNOWN), None)
                    if wrong is not None and not split:
                        raise unknown_split(wrong, source)
                    if split:
                        parts.append(replace(clips, splits=Texts.from_list([split] * len(clips))))
                    else:
                        parts.append(clips.subset(_keep_mask(list(clips.splits), data)))
    _refuse_twice(records)
    skipped: list[Skipped] = []
    if records:
        files, skipped = check_clips(records, cache_dir=cache_folder(data), min_seconds=data.min_seconds)
        parts.insert(0, files)
    clips = Clips.joined(parts)
    if not len(clips):
        first = f"; the first: {skipped[0].path}: {skipped[0].reason}" if skipped else ""
        raise UserError(f"{', '.join(data.train)}: none of {len(records)} audio files can be used{first}")
    if data.strict and skipped:
        raise UserError(
            f"{skipped[0].path}: {skipped[0].reason} (the first of {len(skipped)} unusable clips; data.strict is set)"
        )
    remarks = (*(str(warning.message) for warning in warned), *dict.fromkeys(notes))
    return LabelledClips(clips, of_clips(clips, records), skipped, remarks)


def open_task(config: FinetuneConfig, read: LabelledClips, measured: tuple[float, float] | None = None) -> TaskData:
    """Split the clips as `config` says; `measured` is the mean and std that "auto" stands for, if known already.

    Raises:
        UserError: splits or labels that cannot be learned from.
    """
    task, data = config.task, config.data
    records = read.records
    labels = [record.labels for record in records]
    sources = [record.source for record in records]
    class_labels = Path(task.labels) if isinstance(task.labels, str) else task.labels
    split = split_clips(
        [record.split for record in records],
        [record.fold for record in records],
        sources,
        [record.speaker for record in records],
        labels,
        fold=task.fold,
        folds=task.folds,
        valid_fraction=0.0 if task.fold is not None and task.valid_fold else data.valid_fraction,
        seed=0,  # folds are those of the data, not of a run
        group=task.group,
        valid_fold=task.valid_fold,
    )
    vocabulary = Vocabulary.from_clips(labels, class_labels)
    examined = examine(
        labels, sources, vocabulary, split, multi_label=task.multi_label, unseen=task.unseen, strict=data.strict
    )
    split = examined.split
    speakers = [record.speaker for record in records]
    remarks = [
        *read.remarks,
        *examined.remarks,
        *check_leaks(split, sources, speakers, by_speaker=task.group == "speaker"),
    ]
    if task.per_class is not None:
        split = replace(split, train=few(split.train, labels, task.per_class, config.run.seed))
    if not len(split.test):
        split = replace(split, test=split.valid)
        remarks.append(
            "no clips are marked for test: the validation clips are tested on, so the result is not one on unseen "
            "choices"
        )
    if not len(split.valid):
        split = replace(split, valid=split.test)
        if task.select == "best":
            remarks.append(
                "nothing is held out for validation: the best weights are picked on the test clips, as the official "
                "code does"
            )
    if not len(split.valid):
        raise UserError(
            "no clips to validate or test on: mark some in a split column, name data.test, or set data.valid_fraction"
        )
    train, valid, test = (read.clips.subset(part) for part in split.parts)
    if data.sample_rate > CONVERTED_RATE and read.clips.converted.any():
        raise UserError(
            f"data.sample_rate: {data.sample_rate}, but some files are in formats that are converted to "
            f"{CONVERTED_RATE} Hz"
        )
    mean, std = data.mean, data.std
    if isinstance(mean, str) or isinstance(std, str):
        mean, std = measured or clip_statistics(
            train, data.sample_rate, config.model.num_mel_bins, config.num_samples, data.num_threads
        )
    targets = [examined.targets[part] for part in split.parts]
    return TaskData(
        train,
        valid,
        read.skipped,
        mean,
        std,
        [len(train)],
        _balancing(targets[0]) if data.balanced else None,
        test=test,
        labels=vocabulary.labels,
        train_targets=targets[0],
        valid_targets=targets[1],
        test_targets=targets[2],
        remarks=tuple(remarks),
    )


def _balancing(targets: np.ndarray) -> np.ndarray:
    """Weight of each clip [N]: the sum over its classes of one over the class's clips, as the official code draws
    AudioSet.
    """
    counts = targets.sum(axis=0)
    return targets @ (1.0 / np.maximum(counts, 1))


def _keep_mask(splits: list[str], data: FinetuneDataSection) -> np.ndarray:
    """Bool [N], true for the clips of data.train to keep: not those that it marks for validation where data.valid names
    other clips, nor those that it marks for test where data.test does.
    """
    mask = np.ones(len(splits), dtype=bool)
    for name, sources in (("valid", data.valid), ("test", data.test)):
        is_replaced = np.array([bool(sources) and split == name for split in splits], dtype=bool)
        if is_replaced.any():
            warnings.warn(
                f"{is_replaced.sum()} clips of data.train are marked for {name} and left out: data.{name} names others",
                stacklevel=2,
            )
        mask &= ~is_replaced
    return mask


def _refuse_twice(records: list[Record]) -> None:
    """A file named in data.train and in data.test would be trained and tested on."""
    split_by_path: dict[str, str] = {}
    for record in records:
        before = split_by_path.setdefault(record.path, record.split)
        if before != record.split:
            raise UserError(
                f"{record.path}: named for {before or 'training'} and for {record.split or 'training'}; keep one of "
                "them"
            )
