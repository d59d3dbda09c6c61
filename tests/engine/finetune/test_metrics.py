"""Metrics against values worked out by hand, the files of predictions, and that pictures can be drawn of all sizes."""

import csv
import math

import numpy as np
import pytest
from PIL import Image

from ssast.engine.errors import UserError
from ssast.engine.finetune.metrics import class_metrics, per_class, write_predictions
from ssast.engine.finetune.pictures import confusion, most_confused, write_learning_curve, write_pictures

ABC = ["a", "b", "c"]


def one_hot(answers, classes=3):
    return np.eye(classes)[answers]


def test_one_label_by_hand():
    truth, answer = [0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 2]
    metrics = class_metrics(one_hot(answer), one_hot(truth), ABC, False)
    f1_a, f1_b = 2 * 1 * 0.75 / 1.75, 0.5  # precision 1 and recall 3/4; 1/2 and 1/2
    assert metrics == pytest.approx(
        {
            "accuracy": 4 / 6,
            "balanced_accuracy": (0.75 + 0.5) / 2,
            "macro_f1": (f1_a + f1_b) / 2,
            "classes_without_clips": 1,
        }
    )
    rows = per_class(one_hot(answer), one_hot(truth), ABC, False)
    assert rows[0] == {"label": "a", "clips": 4, "recall": 0.75, "precision": 1.0, "f1": pytest.approx(f1_a)}
    assert rows[1] == {"label": "b", "clips": 2, "recall": 0.5, "precision": 0.5, "f1": pytest.approx(0.5)}
    assert rows[2] == {"label": "c", "clips": 0, "recall": None, "precision": None, "f1": None}
    counts = confusion(one_hot(answer), one_hot(truth))
    assert counts.tolist() == [[3, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert most_confused(counts, ABC) == [("a", "b", 1, 4), ("b", "c", 1, 2)]
    assert most_confused(counts, ABC, most=1) == [("a", "b", 1, 4)]


def test_several_labels_by_hand():
    # a: right ones at ranks 1 and 3 of 4: AP (1 + 2/3) / 2, AUC 3 of 4 pairs; b: at rank 2: AP 1/2, AUC 2 of 3 pairs;
    # c: nowhere.
    scores = np.array([[0.9, 0.8, 0.1], [0.7, 0.6, 0.2], [0.5, 0.4, 0.3], [0.3, 0.2, 0.4]])
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]])
    metrics = class_metrics(scores, targets, ABC, True)
    area = (3 / 4 + 2 / 3) / 2
    assert metrics["mAP"] == pytest.approx((5 / 6 + 1 / 2) / 2) and metrics["AUC"] == pytest.approx(area)
    assert metrics["classes_without_clips"] == 1
    # d' = sqrt(2) z with Phi(z) = AUC, that is 2 erfinv(2 AUC - 1)
    assert math.erf(metrics["d_prime"] / 2) == pytest.approx(2 * area - 1)
    rows = per_class(scores, targets, ABC, True)
    assert [row["average_precision"] for row in rows] == [pytest.approx(5 / 6), 0.5, None]
    assert [row["auc"] for row in rows] == [0.75, pytest.approx(2 / 3), None] and [row["clips"] for row in rows] == [
        2,
        1,
        0,
    ]


def test_edges_of_the_area():
    scores = np.array([[0.9, 0.1], [0.1, 0.9]])
    assert class_metrics(scores, np.eye(2), ["a", "b"], True)["d_prime"] == math.inf
    assert class_metrics(scores, 1 - np.eye(2), ["a", "b"], True)["d_prime"] == -math.inf
    every = class_metrics(scores, np.ones((2, 2)), ["a", "b"], True)  # no clip without the label: an AUC there is not
    assert every["mAP"] == 1 and math.isnan(every["AUC"]) and math.isnan(every["d_prime"])
    assert per_class(scores, np.ones((2, 2)), ["a", "b"], True)[0]["auc"] is None


def test_many_random_clips_against_other_formulas():
    rng = np.random.default_rng(0)
    scores, targets = rng.random((300, 40)), rng.random((300, 40)) < 0.05
    scores[targets] += 0.3
    scores = scores.round(1)  # many ties
    metrics = class_metrics(scores, targets, [str(number) for number in range(40)], True)
    areas, precisions = [], []
    for score, truth in zip(scores.T, targets.T, strict=True):
        above = score[truth][:, None] - score[~truth][None, :]
        areas.append(((above > 0) + 0.5 * (above == 0)).mean())
        # Precision at every threshold, weighted by the recall gained there.
        gained = [
            (truth & (score >= t)).sum() / (score >= t).sum() * (truth & (score == t)).sum() for t in np.unique(score)
        ]
        precisions.append(sum(gained) / truth.sum())
    assert metrics["AUC"] == pytest.approx(np.mean(areas)) and metrics["mAP"] == pytest.approx(np.mean(precisions))


def test_what_cannot_be_measured_is_an_error():
    scores = one_hot([0, 1]).astype(float)
    broken = scores.copy()
    broken[1, 2] = np.nan
    with pytest.raises(UserError, match="of 1 of 2 clips are not finite, the first is clip 1"):
        class_metrics(broken, scores, ABC, False)
    with pytest.raises(UserError, match="no clip to measure on"):
        class_metrics(np.zeros((0, 3)), np.zeros((0, 3)), ABC, False)
    with pytest.raises(ValueError, match="one label a clip"):
        class_metrics(scores, np.ones((2, 3)), ABC, False)
    with pytest.raises(ValueError, match="0 or 1"):
        class_metrics(scores, scores / 2, ABC, True)
    with pytest.raises(ValueError, match="do not go together"):
        class_metrics(scores, scores, ["a"], False)


def test_predictions_are_written_whole(tmp_path):
    sources, labels = ["/x/a, b.wav", "/x/\udcff.wav"], ["Speech, male", "dog"]
    scores, targets = np.array([[0.25, 0.75], [1, 1e-7]]), np.array([[True, True], [True, False]])
    write_predictions(tmp_path / "p.csv", sources, scores, targets, labels)
    with open(tmp_path / "p.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "target", "answer", *labels]
    assert rows[1] == [sources[0], "Speech, male;dog", "dog", "0.25", "0.75"] and rows[2][3:] == ["1", "1e-07"]
    write_predictions(tmp_path / "p.npz", sources, scores, targets, labels)
    held = np.load(tmp_path / "p.npz")
    assert held["sources"].tolist() == sources and held["labels"].tolist() == labels
    assert np.array_equal(held["scores"], scores.astype(np.float32)) and np.array_equal(held["targets"], targets)
    with pytest.raises(UserError, match="are written as"):
        write_predictions(tmp_path / "p.txt", sources, scores, targets, labels)
    with pytest.raises(UserError, match="cannot be written"):
        write_predictions(tmp_path / "gone" / "p.csv", sources, scores, targets, labels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.csv", "p.npz"]


@pytest.mark.parametrize("classes", [2, 60])
def test_pictures(tmp_path, classes):
    rng = np.random.default_rng(0)
    # the last one has no clip
    scores, targets = (
        rng.random((200, classes)),
        np.eye(classes)[rng.integers(0, classes - 1, 200)],
    )
    labels = [f"a rather long name of a class, number {number}, $x_1^$" for number in range(classes)]
    pictures = write_pictures(tmp_path / "one", scores, targets, labels, False)
    assert [path.name for path in pictures] == ["confusion.png", "classes.png"]
    assert [path.name for path in write_pictures(tmp_path / "many", scores, targets, labels, True)] == ["classes.png"]
    rows = [{"kind": "train", "epoch": 1, "loss": 2.0}, {"kind": "valid", "epoch": 1, "loss": None, "mAP": 0.5}]
    for path in (*pictures, write_learning_curve(tmp_path / "curve.png", rows, ["loss", "mAP", "gone"])):
        with Image.open(path) as image:
            assert min(image.size) > 100 and len(np.unique(np.asarray(image.convert("L")))) > 20
