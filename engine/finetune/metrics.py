"""What a classifier's scores are worth, by scikit-learn: over all classes, and class by class.

Classes without a clip to measure on are left out of all averages over classes; `classes_without_clips` says how many
they are.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np

from ssast.engine.errors import UserError
from ssast.engine.files import write_whole

"""The metric that a task goes by, by whether it is multi-label."""


def class_metrics(
    scores: np.ndarray, targets: np.ndarray, labels: Sequence[str], multi_label: bool
) -> dict[str, float]:
    """The metrics of `scores` [N, C] (softmax or sigmoid) against `targets` [N, C] of 0 and 1.

    One label a clip: accuracy, balanced_accuracy (mean recall of the classes) and macro_f1, where the highest score is
    the answer. Several: mAP (mean of the average precisions), AUC (mean of the areas under the ROC curves) and d_prime,
    which is sqrt(2) times the normal quantile of that mean AUC, as in the official code, and infinite for an AUC of 1.
    A class that every clip has is left out of AUC; where no class is left AUC and d_prime are NaN.

    Raises:
        UserError: scores that are not finite, or no clip to measure on.
        ValueError: shapes that differ, targets that are not 0 or 1, or other than one label a clip where `multi_label`
            is false.
    """
    from sklearn.metrics import accuracy_score, f1_score, recall_score

    scores, targets = _checked(scores, targets, labels, multi_label)
    present = np.flatnonzero(targets.any(axis=0))
    without = {"classes_without_clips": len(labels) - len(present)}
    if multi_label:
        area = _mean(_areas(scores, targets))
        return {"mAP": _mean(_average_precisions(scores, targets)), "AUC": area, "d_prime": _d_prime(area), **without}
    truth, answer = targets.argmax(axis=1), scores.argmax(axis=1)
    average = {"labels": present, "average": "macro", "zero_division": 0}
    return {
        "accuracy": float(accuracy_score(truth, answer)),
        "balanced_accuracy": float(recall_score(truth, answer, **average)),
        "macro_f1": float(f1_score(truth, answer, **average)),
        **without,
    }


def per_class(
    scores: np.ndarray, targets: np.ndarray, labels: Sequence[str], multi_label: bool
) -> list[dict[str, str | int | float | None]]:
    """A row for each class: label, clips, and recall, precision, f1, or where multi-label average_precision and auc.

    What is not defined for a class (without clips, or for auc with all) is None; the precision of a class never
    answered is 0.

    Raises as `class_metrics`.
    """
    from sklearn.metrics import precision_recall_fscore_support

    scores, targets = _checked(scores, targets, labels, multi_label)
    clips = targets.sum(axis=0)
    if multi_label:
        columns = {"average_precision": _average_precisions(scores, targets), "auc": _areas(scores, targets)}
    else:
        numbers = np.arange(len(labels))
        values = precision_recall_fscore_support(
            targets.argmax(axis=1), scores.argmax(axis=1), labels=numbers, average=None, zero_division=0
        )
        by_name = dict(zip(("precision", "recall", "f1"), values, strict=False))
        columns = {name: np.where(clips > 0, by_name[name], np.nan) for name in ("recall", "precision", "f1")}
    return [
        {
            "label": label,
            "clips": int(clips[number]),
            **{name: None if math.isnan(column[number]) else float(column[number]) for name, column in columns.items()},
        }
        for number, label in enumerate(labels)
    ]


def write_predictions(
    path: Path, sources: Sequence[str], scores: np.ndarray, targets: np.ndarray, labels: Sequence[str]
) -> None:
    """Write what was answered for each clip, and what was right; the file appears whole or not at all.

    A .csv has columns path, target and answer (labels by name; several targets by semicolons, the answer is the highest
    score), then the score of each class. An .npz has sources [N], scores float32 [N, C], targets uint8 [N, C] and
    labels [C], and is what many clips of many classes fit in.

    Raises:
        UserError: a path that ends in neither, or that cannot be written.
    """
    scores, targets = np.asarray(scores), np.asarray(targets)
    if path.suffix == ".npz":
        file = io.BytesIO()
        np.savez_compressed(
            file,
            sources=np.array(list(sources), dtype=str),
            labels=np.array(list(labels), dtype=str),
            scores=scores.astype(np.float32),
            targets=targets.astype(np.uint8),
        )
        content: str | bytes = file.getvalue()
    elif path.suffix == ".csv":
        table = io.StringIO(newline="")
        writer = csv.writer(table)
        writer.writerow(["path", "target", "answer", *labels])
        for source, row, target in zip(sources, scores, targets, strict=True):
            named = ";".join(labels[number] for number in np.flatnonzero(target).tolist())
            writer.writerow([source, named, labels[int(row.argmax())], *(f"{score:.6g}" for score in row.tolist())])
        content = table.getvalue()
    else:
        raise UserError(f"{path}: predictions are written as .csv or .npz")
    try:
        write_whole(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _checked(
    scores: np.ndarray, targets: np.ndarray, labels: Sequence[str], multi_label: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(scores, targets as bool)."""
    scores, targets = np.asarray(scores), np.asarray(targets)
    if scores.ndim != 2 or scores.shape != targets.shape or scores.shape[1] != len(labels):
        raise ValueError(f"scores {scores.shape}, targets {targets.shape} and {len(labels)} labels do not go together")
    if not len(scores):
        raise UserError("there is no clip to measure on")
    broken = ~np.isfinite(scores).all(axis=1)
    if broken.any():
        raise UserError(
            f"the scores of {broken.sum()} of {len(scores)} clips are not finite, the first is clip "
            f"{broken.argmax()}: the model has "
            "diverged; lower the learning rate"
        )
    if not np.isin(targets, (0, 1)).all():
        raise ValueError("targets to measure against are 0 or 1")
    targets = targets.astype(bool)
    if not multi_label and (targets.sum(axis=1) != 1).any():
        raise ValueError("one label a clip is expected: set multi_label where there are several or none")
    return scores, targets


def _average_precisions(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """float64 [C], NaN for classes without clips."""
    from sklearn.metrics import average_precision_score

    pairs = zip(targets.T, scores.T, strict=True)
    return np.array([average_precision_score(truth, score) if truth.any() else np.nan for truth, score in pairs])


def _areas(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """float64 [C], NaN for classes that no clip has, or all."""
    from sklearn.metrics import roc_auc_score

    pairs = zip(targets.T, scores.T, strict=True)
    return np.array(
        [roc_auc_score(truth, score) if truth.any() and not truth.all() else np.nan for truth, score in pairs]
    )


def _mean(values: np.ndarray) -> float:
    measured = values[~np.isnan(values)]
    return float(measured.mean()) if len(measured) else math.nan


def _d_prime(area: float) -> float:
    if 0 < area < 1:
        return math.sqrt(2) * NormalDist().inv_cdf(area)
    return math.nan if math.isnan(area) else math.copysign(math.inf, area - 0.5)
