"""Splits: what the data say comes first, recordings and speakers stay together, the choice depends on names alone."""

import csv
from collections import Counter
from itertools import chain

import numpy as np
import pytest

from ssast.engine.data.record import split_labels
from ssast.engine.errors import UserError
from ssast.engine.finetune.splits import Split, check_leaks, few, fold_names, recordings, split_clips


def split(splits=None, folds_of=None, sources=None, speakers=None, labels=None, **kwargs):
    count = len(next(column for column in (splits, folds_of, sources, speakers, labels) if column is not None))
    sources = sources or [f"/audio/{number}.wav" for number in range(count)]
    columns = [
        splits or [""] * count,
        folds_of or [""] * count,
        sources,
        speakers or [""] * count,
        [split_labels(text) for text in labels or ["a"] * count],
    ]
    options = {"fold": None, "folds": None, "valid_fraction": 0.0, "seed": 0, "group": "recording"} | kwargs
    parts = split_clips(*columns, **options)
    assert sorted(np.concatenate(parts.parts)) == list(range(count))  # each clip in one part
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts.parts)
    return tuple(part.tolist() for part in parts.parts)


def message(**kwargs):
    with pytest.raises(UserError) as caught:
        split(**kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_columns_of_splits_and_folds_win():
    splits = ["train", "Validation", "test", "", "dev", "eval"]
    assert split(splits, valid_fraction=0.5) == ([0, 3], [1, 4], [2, 5])
    assert split(splits, folds_of=list("112233")) == ([0, 3], [1, 4], [2, 5])  # no fold asked for
    folds = ["1", "10", "2", "2", "1", "10"]
    assert fold_names(folds) == ["1", "2", "10"] and fold_names(["b", "a", ""]) == ["a", "b"]
    assert split(splits, folds_of=folds, fold="2") == ([0, 1, 4, 5], [], [2, 3])
    assert split(folds_of=folds, fold="fold2", valid_fold=True) == ([0, 4], [1, 5], [2, 3])
    # the first comes after the last
    assert split(folds_of=folds, fold="10", valid_fold=True) == (
        [2, 3],
        [0, 4],
        [1, 5],
    )
    train, valid, test = split(folds_of=folds, fold="10", valid_fraction=0.25)
    assert (len(train), len(valid), test) == (3, 1, [1, 5])


def test_what_contradicts_itself_is_an_error():
    assert "'testing2' is none of" in message(splits=["train", "testing2"])
    assert "none of 2 clips is for training: 1 are marked for validation, 1 for test" in message(
        splits=["valid", "test"]
    )
    assert "come in folds (1, 2): say which" in message(folds_of=["1", "2"])
    assert "there is no fold 3: the clips have 1, 2" in message(folds_of=["1", "2"], fold="3")
    assert "/audio/1.wav: has no fold" in message(folds_of=["1", "", "2"], fold="1")
    assert "2 folds: too few" in message(folds_of=["1", "2"], fold="1", valid_fold=True)
    assert "the clips have no folds" in message(labels=["a"] * 4, fold="1")
    assert "split by a column" in message(splits=["train", "test"], fold="1", folds=2)
    assert "3 folds of 2 recordings" in message(labels=["a"] * 2, fold="1", folds=3)
    assert "there is no fold 6" in message(labels=["a"] * 12, fold="6", folds=3)
    assert "has no speaker" in message(speakers=["x", ""], group="speaker", valid_fraction=0.5)
    assert "fraction between 0 and 1" in message(labels=["a"] * 2, valid_fraction=1.0)
    assert "none can be held out" in message(labels=["a", "b"], valid_fraction=0.1)


# 20 recordings of 4 takes
ESC = [f"/esc/{number % 3 + 1}-{100 + number // 4}-{'ABCD'[number % 4]}-7.wav" for number in range(80)]


def test_recordings_are_told_by_names_of_esc50_or_by_the_source():
    assert recordings(["/a/1-17-A-3.wav", "/b/5-17-B-40.flac", "/c/x-17-A.wav"]) == ["17", "17", "/c/x-17-A.wav"]


@pytest.mark.parametrize("group", ["recording", "speaker", None])
def test_folds_that_are_made_keep_groups_together_and_classes_even(group):
    speakers = [f"s{number // 8}" for number in range(80)]
    labels = ["dog" if number % 16 < 8 else "rain" for number in range(80)]
    options = {"folds": 5, "group": group, "seed": 3}
    parts = [split(None, None, ESC, speakers, labels, fold=str(fold), **options) for fold in range(1, 6)]
    tests = [test for _, _, test in parts]
    assert sorted(chain(*tests)) == list(range(80))
    for test in tests:
        assert Counter(labels[number] for number in test) == {"dog": 8, "rain": 8}
    if group:
        of = speakers if group == "speaker" else recordings(ESC)
        assert sum(len({of[number] for number in test}) for test in tests) == len(set(of))
    # The order of the clips, which is that of files in a list, does not matter; the seed does.
    order = np.random.default_rng(0).permutation(80)
    shuffled = split(
        None, None, *([column[n] for n in order] for column in (ESC, speakers, labels)), fold="1", **options
    )
    if group:
        assert sorted(order[shuffled[2]].tolist()) == tests[0]
    assert any(
        split(None, None, ESC, speakers, labels, fold="1", **options | {"seed": seed})[2] != tests[0]
        for seed in range(5)
    )


def test_made_folds_of_classes_with_fewer_clips_than_folds():
    parts = [split(labels=["a", "a", "b", "b", "c", "d"], fold=str(fold), folds=3) for fold in (1, 2, 3)]
    assert sorted(chain(*(test for _, _, test in parts))) == list(range(6))
    assert all(test for _, _, test in parts)


def test_held_out_clips_are_even_over_classes_and_survive_added_files():
    labels = ["dog"] * 60 + ["rain"] * 40 + ["rare"] * 2 + ["once"]
    _, valid, test = split(labels=labels, valid_fraction=0.2)
    counts = Counter(labels[number] for number in valid)
    assert test == [] and counts["dog"] == 12 and counts["rain"] == 8 and counts["rare"] <= 1 and not counts["once"]
    sources = [f"/audio/{number}.wav" for number in range(104)]
    more = split(None, None, sources, None, [*labels, "once"], valid_fraction=0.2)[1]
    assert set(valid) - set(more) == set() and len(more) - len(valid) <= 1
    held = split(None, None, ESC, None, ["dog"] * 80, valid_fraction=0.25)[1]
    assert len(held) == 20 and {ESC[number].split("-")[1] for number in held}.isdisjoint(
        {ESC[number].split("-")[1] for number in range(80) if number not in held}
    )
    many = ["a,b", "b,c", "c"] * 20  # several labels each
    assert len(split(labels=many, valid_fraction=0.1)[1]) == 6


def test_leaks():
    parts = Split(np.array([0, 1]), np.array([2]), np.array([3]))
    with pytest.raises(UserError, match=r"train and test share 1 recordings: /1-5-A-3.wav and /2-5-B-3.wav are of one"):
        check_leaks(parts, ["/1-4-A-3.wav", "/1-5-A-3.wav", "/c.wav", "/2-5-B-3.wav"], [""] * 4)
    clean = ["/1-4-A-3.wav", "/1-5-A-3.wav", "/c.wav", "/d.wav"]
    speakers = ["anna", "", "ben", "anna"]
    assert check_leaks(parts, clean, speakers) == []
    assert check_leaks(parts, clean, speakers, by_speaker=True) == [
        "train and test share 1 speakers (anna): the measure will flatter"
    ]


def test_few_picks_so_many_of_each_class():
    clips = np.arange(10, 90)
    labels = [("unused",)] * 10 + [("a",), ("b",), ("c", "a"), ("c",)] * 20
    picked = few(clips, labels, 5, 1)
    counts = Counter(label for number in picked.tolist() for label in labels[number])
    assert set(picked) <= set(clips) and (np.diff(picked) > 0).all() and counts["b"] == 5 and min(counts.values()) >= 5
    assert np.array_equal(picked, few(clips[::-1], labels, 5, 1)) and not np.array_equal(
        picked, few(clips, labels, 5, 2)
    )
    assert set(few(clips, labels, 3, 1)) <= set(picked)
    with pytest.raises(UserError, match="'b' has 20 training clips"):
        few(clips, labels, 21, 1)


def test_real_folds_share_no_recording(real_audio):
    with open(real_audio / "manifests" / "esc10.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    paths, speakers, labels = ([row[name] for row in rows] for name in ("path", "speaker", "label"))
    columns = [paths, speakers, labels]
    tuples = [(label,) for label in labels]
    by_fold = split([""] * len(rows), [row["fold"] for row in rows], *columns, fold="2")
    assert {rows[number]["fold"] for number in by_fold[2]} == {"2"} and len({labels[n] for n in by_fold[2]}) == 10
    for fold in "123":
        made = split_clips(
            [""] * len(rows), [""] * len(rows), paths, speakers, tuples, fold=fold, folds=3, valid_fraction=0.1, seed=0
        )
        for parts in (Split(*map(np.array, by_fold)), made):
            assert check_leaks(parts, paths, speakers) == []
        assert len(made.valid) and len({labels[n] for n in made.train}) == 10
    with pytest.raises(
        UserError, match=r"share \d+ recordings"
    ):  # without groups the takes of a recording are torn apart
        nothing = [""] * len(rows)
        options = {"fold": "1", "folds": 3, "valid_fraction": 0, "seed": 0, "group": None}
        torn = split_clips(nothing, nothing, paths, speakers, tuples, **options)
        check_leaks(torn, paths, speakers)
