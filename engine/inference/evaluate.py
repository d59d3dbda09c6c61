"""`ssast evaluate MODEL --data DATA`: a fine-tuned model on a test set, or with `--probe` the embeddings of any model.

A probe is a k-nearest-neighbours or a linear classifier on clip embeddings, which are standardised by the training
part. What is tested on: the clips that DATA marks so, its folds in turn, or else five folds made of it.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from ssast.engine.data.record import Record
from ssast.engine.errors import UserError
from ssast.engine.files import expand_path, path_argument, write_whole
from ssast.engine.finetune.config import MAIN
from ssast.engine.finetune.labels import Vocabulary, examine, read_labelled
from ssast.engine.finetune.metrics import class_metrics, write_predictions
from ssast.engine.finetune.splits import Split, check_leaks, fold_names, split_clips
from ssast.engine.model.ssast import SSAST

from .embed import embed_recordings
from .inference import encode_recordings
from .options import (
    add_embedding_options,
    add_run_options,
    embedding_options,
    open_model,
    require_some,
    to_stderr,
    writing,
)
from .predict import class_encoder
from .probes import choose_strength, knn_scores, linear_scores
from .windows import End, prediction_windows

PROBES = ("knn", "linear")
MADE_FOLDS = 5
UNMEASURED = "classes_without_clips"  # what `class_metrics` counts beside its metrics
INNER_FOLDS = 3  # The training part is cut into so many folds to choose a probe's strength.


@dataclass(frozen=True)
class Data:
    """N clips, and their columns as `ssast.engine.finetune.splits` takes them."""

    recordings: list[Record]

    @functools.cached_property
    def sources(self) -> list[str]:
        """The source of each clip [N]."""
        return [record.source for record in self.recordings]

    @functools.cached_property
    def labels(self) -> list[tuple[str, ...]]:
        """The labels of each clip [N]."""
        return [record.labels for record in self.recordings]

    @functools.cached_property
    def splits(self) -> list[str]:
        """The split of each clip [N]: train, valid, test or "" for none."""
        return [record.split for record in self.recordings]

    @functools.cached_property
    def folds(self) -> list[str]:
        """The fold of each clip [N], "" for none."""
        return [record.fold for record in self.recordings]

    @functools.cached_property
    def speakers(self) -> list[str]:
        """The speaker of each clip [N], "" for none."""
        return [record.speaker for record in self.recordings]

    def subset(self, numbers: Sequence[int]) -> Data:
        """The clips of these numbers, in their order."""
        return Data([self.recordings[number] for number in numbers])


@dataclass(frozen=True)
class Answer:
    """What was answered for the test clips `numbers`: scores and targets [n, C], and how the classifier was made."""

    name: str
    numbers: np.ndarray
    scores: np.ndarray
    targets: np.ndarray
    description: str = ""


def main(argv: list[str] | None = None) -> int:
    """Measure a fine-tuned model on a test set, or the embeddings of any by a probe."""
    options = _parser().parse_args(argv)
    if options.out is not None and options.out.exists() and any(options.out.iterdir()):
        raise UserError(f"--out {options.out} is not empty: choose a new folder")
    data = read_data(options.data)
    model = open_model(options.model, options.device, options.window, options.labels)
    try:
        if options.probe:
            rejected = _evaluate_probes(model, data, options)
        else:
            rejected = _evaluate_classifier(model, data, options)
    except ValueError as error:
        raise UserError(str(error)) from None
    return 1 if rejected and options.strict else 0


def read_data(sources: Sequence[str]) -> Data:
    """The labelled clips of manifests, folders and prepared folders.

    Raises:
        UserError: as `ssast.engine.finetune.labels.read_labelled`.
    """
    notes: list[str] = []
    data = Data(read_labelled(list(sources), notes=notes))
    for note in notes:
        to_stderr(note)
    return data


# A fine-tuned model


def _evaluate_classifier(model: SSAST, data: Data, options: argparse.Namespace) -> int:
    encode, windows = class_encoder(model), prediction_windows(model, options.hop)
    if model.card.labels is None:
        raise UserError(f"{options.model}: does not say what its classes are called: name a list of them by --labels")
    vocabulary = Vocabulary.read(options.labels) if options.labels else Vocabulary(model.card.labels)
    data, description = _choose_clips(data, options)
    data, targets = _targets(data, vocabulary, model.card.multi_label, options.unseen)
    scores: dict[int, np.ndarray] = {}
    rejected: list[tuple[str, str]] = []
    parts: list[np.ndarray] = []
    for event in encode_recordings(
        model, data.recordings, windows, encode, batch_size=options.batch_size, workers=options.workers
    ):
        if not isinstance(event, End):
            parts.append(event.row.cpu().numpy())
            continue
        if event.error:
            rejected.append((data.sources[event.clip], event.error))
        else:
            scores[event.clip] = np.mean(parts, axis=0)
        parts = []
    _tell_rejected(len(data.recordings), rejected)
    numbers = np.array(list(scores))
    answer = Answer(description, numbers, np.stack(list(scores.values())), targets[numbers])
    print(f"{options.model} on {description}: {len(numbers)} clips, {len(vocabulary)} classes")
    _report("classifier", [answer], data, vocabulary.labels, model.card.multi_label, options.out)
    return len(rejected)


def _choose_clips(data: Data, options: argparse.Namespace) -> tuple[Data, str]:
    """The clips to measure on, and what they are."""
    if options.fold is not None:
        fold = options.fold.lower().removeprefix("fold")
        if fold not in fold_names(data.folds):
            raise UserError(
                f"there is no fold {fold}: the clips have {', '.join(fold_names(data.folds)) or 'no folds'}"
            )
        return data.subset([number for number, name in enumerate(data.folds) if name == fold]), f"fold {fold}"
    of = data.splits
    if options.split is None and any(data.folds) and not any(data.splits):
        raise UserError(
            "the clips come in folds, of which the model was trained on most: name the one it was tested on by "
            "--fold, or --split all"
        )
    if options.split == "all" or (options.split is None and not any(data.splits)):
        return data, "all clips"
    split = options.split or "test"
    numbers = [number for number, name in enumerate(of) if name == split]
    if not numbers:
        there = ", ".join(f"{count} {name or 'without split'}" for name, count in Counter(of).items())
        raise UserError(f"no clip is marked {split} (there are {there}): choose by --split")
    return data.subset(numbers), f"the {split} split"


def _targets(data: Data, vocabulary: Any, multi_label: bool, unseen: str) -> tuple[Data, np.ndarray]:
    """The clips that have a label which the model knows, and their targets [N, C]."""
    numbers = [vocabulary.numbers(labels) for labels in data.labels]
    unknown = sorted({label for _, others in numbers for label in others})
    if unknown and unseen == "error":
        raise UserError(
            f"the model knows no class {', '.join(map(repr, unknown[:5]))}{' ...' if len(unknown) > 5 else ''}: it has "
            f"{', '.join(map(repr, vocabulary.labels[:5]))} ...; leave out the clips of other labels by --unseen drop"
        )
    clips = [number for number, (classes, _) in enumerate(numbers) if classes]
    if len(clips) < len(numbers):
        to_stderr(f"{len(numbers) - len(clips)} clips without a label that the model knows are left out")
    if not clips:
        raise UserError("no clip has a label that the model knows")
    several = next((number for number in clips if len(numbers[number][0]) > 1), None)
    if several is not None and not multi_label:
        raise UserError(f"{data.sources[several]}: has several labels, but the model was trained with one a clip")
    targets = np.zeros((len(clips), len(vocabulary)), dtype=np.int64)
    for row, number in zip(targets, clips, strict=True):
        row[numbers[number][0]] = 1
    return data.subset(clips), targets


# Probes


@dataclass(frozen=True)
class _Plan:
    """What is trained and tested on, and in words; `group` is what clips are kept together by."""

    vocabulary: Any
    parts: list[Any]
    description: str
    group: str
    remarks: list[str]


def _evaluate_probes(model: SSAST, data: Data, options: argparse.Namespace) -> int:
    plan = _make_plan(data, options)  # before the work, so that what is wrong with the labels is said at once
    embeddings, rejected = _embeddings(model, data, options)
    _tell_rejected(len(data.recordings), rejected)
    if rejected:
        data = data.subset(list(embeddings))
        plan = _make_plan(data, options)
    values = np.stack(list(embeddings.values()))
    for remark in dict.fromkeys(plan.remarks):
        to_stderr(remark)
    labels, size = plan.vocabulary.labels, f"{len(data.sources)} clips, {len(plan.vocabulary)} classes"
    print(f"{options.model} on {plan.description}: {size}, embeddings of {values.shape[1]} values")
    for probe in options.probe:
        answers = [_probe(probe, number, values, data, plan, options) for number in range(len(plan.parts))]
        title = {"knn": f"{options.k} nearest neighbours", "linear": "linear probe"}[probe]
        _report(title, answers, data, labels, options.multi_label, options.out and options.out / probe)
    return len(rejected)


def _make_plan(data: Data, options: argparse.Namespace) -> _Plan:
    splits, description, group = _splits(data, options)
    vocabulary = Vocabulary.from_clips(data.labels, options.labels)
    parts, remarks = [], []
    for split in splits:
        remarks += check_leaks(split, data.sources, data.speakers, by_speaker=True)
        examination = examine(
            data.labels, data.sources, vocabulary, split, multi_label=options.multi_label, unseen=options.unseen
        )
        if not len(examination.split.test):
            raise UserError("there is no clip to test on")
        parts.append(examination)
        remarks += examination.remarks
    return _Plan(vocabulary, parts, description, group, remarks)


def _embeddings(
    model: SSAST, data: Data, options: argparse.Namespace
) -> tuple[dict[int, np.ndarray], list[tuple[str, str]]]:
    embeddings: dict[int, np.ndarray] = {}
    rejected = []
    for end, clip in embed_recordings(model, data.recordings, **embedding_options(options)):
        if clip is None:
            rejected.append((data.sources[end.clip], end.error))
        else:
            embeddings[end.clip] = clip.cpu().numpy()
    return embeddings, rejected


def _splits(data: Data, options: argparse.Namespace) -> tuple[list[Any], str, str]:
    """What is trained and tested on, in words, and by what clips are kept together."""
    folds = options.folds
    if folds is None and not any(data.splits) and not any(data.folds):
        folds = MADE_FOLDS
    group: Any = options.group or _natural_group(data, folds or len(fold_names(data.folds)))
    nothing = [""] * len(data.sources)  # folds that are made take the place of what the data say
    columns = (data.splits, data.folds) if folds is None else (nothing, nothing)

    def split(fold: str | None) -> Split:
        columns_of_clips = (*columns, data.sources, data.speakers, data.labels)
        return split_clips(
            *columns_of_clips, fold=fold, folds=folds, valid_fraction=0.0, seed=options.seed, group=group
        )

    if folds is None and options.fold is None and any(data.splits):
        only = split(None)
        if len(only.test):
            return [only], "the test split", group
        if not len(only.valid):
            raise UserError("no clip is marked for test or validation: mark some, or make folds, with --folds 5")
        return [Split(only.train, only.test, only.valid)], "the validation split (there is no test split)", group
    names = fold_names(data.folds) if folds is None else [str(number + 1) for number in range(folds)]
    description = f"its own {len(names)} folds" if folds is None else f"{folds} folds made by {group}"
    if options.fold is not None:
        return [split(options.fold)], f"fold {options.fold} of {description}", group
    return [split(name) for name in names], f"{description}, tested on in turn", group


def _natural_group(data: Data, folds: int) -> str:
    """By speaker where all clips have one and each class has enough of them, else by recording."""
    speakers = defaultdict(set)
    for labels, speaker in zip(data.labels, data.speakers, strict=True):
        speakers[labels].add(speaker)
    enough = all(data.speakers) and all(len(names) >= folds for names in speakers.values())
    return "speaker" if enough else "recording"


def _probe(probe: str, number: int, values: np.ndarray, data: Data, plan: _Plan, options: argparse.Namespace) -> Answer:
    split, targets = plan.parts[number].split, plan.parts[number].targets.astype(np.int64)
    train, test = split.train, split.test
    if probe == "knn":
        scores, description = (
            knn_scores(values[train], targets[train], values[test], options.k),
            f"k={min(options.k, len(train))}",
        )
    else:
        inner = _inner_splits(data.subset(train.tolist()), plan.group, options.seed)
        strength = choose_strength(values[train], targets[train], inner, options.multi_label)
        scores, converged = linear_scores(
            values[train], targets[train], values[test], strength or 1.0, options.multi_label
        )
        description = (
            f"C={strength or 1.0:g}"
            + ("" if strength else ", too few clips to choose it")
            + ("" if converged else ", not converged")
        )
    name = f"fold {number + 1}" if len(plan.parts) > 1 else "test"
    return Answer(name, test, scores, targets[test], description)


def _inner_splits(data: Data, group: str, seed: int) -> list[Split]:
    """Folds of the training part; none if it has fewer groups than folds."""
    nothing = [""] * len(data.sources)
    columns = (nothing, nothing, data.sources, data.speakers, data.labels)
    options: dict[str, Any] = {"folds": INNER_FOLDS, "valid_fraction": 0.0, "seed": seed, "group": group}
    try:
        return [split_clips(*columns, fold=str(fold + 1), **options) for fold in range(INNER_FOLDS)]
    except UserError:
        return []


def _chance(targets: np.ndarray, multi_label: bool) -> float:
    """What a constant answer gets on targets [N, C]: the fraction of the most frequent class, or for mAP that of a
    class on average.
    """
    frequencies = targets.mean(axis=0)
    return float(frequencies[frequencies > 0].mean() if multi_label else frequencies.max())


# Reports


def _report(
    title: str, answers: list[Answer], data: Data, labels: Sequence[str], multi_label: bool, out: Path | None
) -> None:
    main_metric = MAIN[multi_label]
    results = [class_metrics(answer.scores, answer.targets, labels, multi_label) for answer in answers]
    clips = sum(len(answer.numbers) for answer in answers)
    values = [result[main_metric] for result in results]
    if len(answers) > 1:
        for answer, value in zip(answers, values, strict=True):
            print(
                f"  {answer.name}: {main_metric} {value:.1%} of {len(answer.numbers)} "
                f"clips{answer.description and f', {answer.description}'}"
            )
    chance = _chance(np.concatenate([answer.targets for answer in answers]), multi_label)
    spread = f" +- {stdev(values):.1%} over {len(values)} folds" if len(values) > 1 else ""
    others = [
        f"{name} {mean(result[name] for result in results):.3f}"
        for name in results[0]
        if name not in (main_metric, UNMEASURED)
    ]
    others += (
        [f"{results[0][UNMEASURED]:g} classes without clips"] if len(results) == 1 and results[0][UNMEASURED] else []
    )
    only = f" ({answers[0].description})" if len(answers) == 1 and answers[0].description else ""
    print(
        f"{title}{only}: {main_metric} {mean(values):.1%}{spread}, {clips} clips, chance {chance:.1%}; "
        f"{', '.join(others)}"
    )
    if out is not None:
        with writing(out):
            _write(out, title, answers, results, data, labels, multi_label)
        print(f"{out}: metrics.json, predictions.csv and pictures")


def _write(
    out: Path,
    title: str,
    answers: list[Answer],
    results: list[dict[str, float]],
    data: Data,
    labels: Sequence[str],
    multi_label: bool,
) -> None:
    from ssast.engine.finetune.pictures import write_pictures  # brings matplotlib along

    out.mkdir(parents=True, exist_ok=True)
    scores, targets = (np.concatenate([getattr(answer, name) for answer in answers]) for name in ("scores", "targets"))
    rows = []
    for answer, result in zip(answers, results, strict=True):
        # JSON has no numbers that are not finite.
        metrics = {name: value if math.isfinite(value) else None for name, value in result.items()}
        rows.append({"part": answer.name, "how": answer.description, "clips": len(answer.numbers), **metrics})
    content = {"evaluated": title, "chance": _chance(targets, multi_label), "results": rows}
    write_whole(out / "metrics.json", json.dumps(content, indent=1) + "\n")
    sources = [data.sources[number] for answer in answers for number in answer.numbers.tolist()]
    write_predictions(out / "predictions.csv", sources, scores, targets, labels)
    write_pictures(out, scores, targets, labels, multi_label)


def _tell_rejected(count: int, rejected: list[tuple[str, str]]) -> None:
    """Write what was left out to standard error.

    Raises:
        UserError: nothing is left.
    """
    for path, reason in rejected:
        to_stderr(f"left out: {path}: {reason}")
    require_some(count, rejected)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssast evaluate",
        description="Measure a fine-tuned model on a test set, or with --probe the embeddings of any. DATA is a "
        "manifest with labels, "
        "a folder of a known layout or with a sub-folder for each class, or what ssast prepare wrote.",
    )
    add = parser.add_argument
    add("model", type=expand_path, metavar="MODEL", help="a checkpoint, ours or official, or a run folder")
    add("--data", required=True, nargs="+", type=expand_path, metavar="DATA")
    add(
        "--probe",
        nargs="+",
        choices=PROBES,
        help="measure embeddings: k nearest neighbours, or a linear classifier on them",
    )
    add(
        "--split",
        choices=("train", "valid", "test", "all"),
        help="of a fine-tuned model: clips to measure on (default: test)",
    )
    add("--fold", metavar="F", help="the fold of DATA to test on (default with --probe: each in turn)")
    add(
        "--folds", type=_folds, metavar="N", help=f"make N folds of DATA (default where it marks nothing: {MADE_FOLDS})"
    )
    add(
        "--group",
        choices=("recording", "speaker"),
        help="what no two folds share (default: speakers where that can be)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of folds that are made (default: 0)")
    add("--k", type=_neighbours, default=5, metavar="N", help="neighbours that vote (default: %(default)s)")
    add("--multi-label", action="store_true", help="of a probe: clips may have several labels")
    add(
        "--unseen",
        choices=("error", "drop"),
        default="error",
        help="clips of labels that training had not (default: error)",
    )
    add(
        "--labels",
        type=path_argument,
        metavar="FILE",
        help="names of the classes: a list, or AudioSet's class_labels_indices.csv",
    )
    add("--out", type=path_argument, metavar="FOLDER", help="write metrics.json, predictions.csv and pictures")
    add_embedding_options(parser)
    add_run_options(parser)
    return parser


def _at_least(least: int, text: str) -> int:
    number = int(text)
    if number < least:
        raise ValueError
    return number


def _folds(text: str) -> int:
    return _at_least(2, text)


def _neighbours(text: str) -> int:
    return _at_least(1, text)


_folds.__name__, _neighbours.__name__ = "number of folds, at least 2,", "number of at least 1"  # as argparse calls them


if __name__ == "__main__":
    sys.exit(main())
