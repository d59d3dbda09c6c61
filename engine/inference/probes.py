"""Probes of embeddings: k nearest neighbours, and logistic regression, on values standardised by the training part."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np

from ssast.engine.finetune.config import MAIN
from ssast.engine.finetune.metrics import class_metrics
from ssast.engine.finetune.splits import Split

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # inverse, C of scikit-learn's LogisticRegression
MAX_ITERATIONS = 1000


def knn_scores(train: np.ndarray, targets: np.ndarray, test: np.ndarray, k: int) -> np.ndarray:
    """[n, C] fractions of the k nearest of train [N, D] by the cosine of standardised values, each weighted by (1 +
    cosine) / 2.
    """
    from sklearn.neighbors import NearestNeighbors
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train)
    neighbours = NearestNeighbors(n_neighbors=min(k, len(train)), metric="cosine").fit(scaler.transform(train))
    distances, numbers = neighbours.kneighbors(scaler.transform(test))  # [n, k]
    weights = np.maximum(1 - distances / 2, 1e-9)
    return (weights[..., None] * targets[numbers]).sum(axis=1) / weights.sum(axis=1, keepdims=True)


def linear_scores(
    train: np.ndarray, targets: np.ndarray, test: np.ndarray, strength: float, multi_label: bool
) -> tuple[np.ndarray, bool]:
    """[n, C] probabilities by logistic regression on standardised values, and whether it converged; 0 for classes never
    seen.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classes = np.flatnonzero(targets.any(axis=0))
    regression: Any = LogisticRegression(C=strength, max_iter=MAX_ITERATIONS)
    regression = OneVsRestClassifier(regression) if multi_label else regression
    labels = targets[:, classes] if multi_label else targets.argmax(axis=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        probabilities = make_pipeline(StandardScaler(), regression).fit(train, labels).predict_proba(test)
    scores = np.zeros((len(test), targets.shape[1]))
    scores[:, classes] = probabilities.reshape(len(test), -1)[:, -len(classes) :]
    return scores, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def choose_strength(
    values: np.ndarray, targets: np.ndarray, splits: Sequence[Split], multi_label: bool
) -> float | None:
    """The C that does best on splits of the training part: values [N, D], targets [N, C]; None if there are too few
    clips to tell.
    """
    if not splits or any(targets[split.train].any(axis=0).sum() < 2 or not len(split.test) for split in splits):
        return None
    names = [str(number) for number in range(targets.shape[1])]

    def measure(strength: float) -> float:
        results = []
        for split in splits:
            train, test = split.train, split.test
            scores, _ = linear_scores(values[train], targets[train], values[test], strength, multi_label)
            results.append(class_metrics(scores, targets[test], names, multi_label))
        return mean(result[MAIN[multi_label]] for result in results)

    return max(STRENGTHS, key=measure)  # the strongest regularisation of equal ones
