"""Clips as columns: rows, subsets and joins say the same of every clip."""

import numpy as np
import pytest

from ssast.engine.data.clips import Clips
from ssast.engine.data.record import Record


def make_clips(name: str, count: int, *, offset: int = 0) -> Clips:
    """Clips of which every column tells the row apart; with an `offset` they lie in one shard."""
    rows = np.arange(count)
    return Clips(
        paths=[f"{name}/shard.tar" if offset else f"{name}/{row}.wav" for row in rows],
        sources=[f"{name}/{row}.wav" for row in rows],
        labels=[f"label {row}" for row in rows],
        splits=[("train", "valid", "")[row % 3] for row in rows],
        frames=1000 * (rows + 1),
        sample_rates=np.full(count, 16000),
        channels=1 + rows % 2,
        sizes=2000 * (rows + 1),
        offsets=offset * (rows + 1) if offset else None,
        speakers=[f"speaker {row % 2}" for row in rows],
        folds=[str(row % 5) for row in rows],
    )


def rows_of(clips: Clips) -> list[tuple]:
    """All columns but the number of the data set, a tuple for each clip."""
    names = [name for name in Clips.__dataclass_fields__ if name != "datasets"]
    return list(zip(*(list(getattr(clips, name)) for name in names), strict=True))


@pytest.mark.parametrize("index", [[3, 0, 0, 5], [], [True, False, True, False, False, True]])
def test_a_subset_takes_the_same_rows_of_every_column(index):
    index = np.array(index, dtype=bool if True in index else np.int64)
    clips = make_clips("a", 6)
    numbers = np.flatnonzero(index) if index.dtype == bool else index
    assert rows_of(clips.subset(index)) == [rows_of(clips)[number] for number in numbers]
    assert len(clips.subset(index)) == len(numbers)


def test_a_subset_of_a_subset_is_one_of_the_whole():
    clips, first, second = make_clips("a", 9), np.array([8, 6, 4, 2, 0]), np.array([4, 1])
    assert rows_of(clips.subset(first).subset(second)) == rows_of(clips.subset(first[second]))


def test_joined_parts_follow_one_another_and_are_numbered():
    parts = [make_clips("a", 3), make_clips("b", 0), make_clips("c", 2, offset=512)]
    joined = Clips.joined(parts)
    assert rows_of(joined) == [row for part in parts for row in rows_of(part)]
    assert joined.datasets.tolist() == [0, 0, 0, 2, 2]
    last = joined.subset(np.array([4, 1]))
    assert last.datasets.tolist() == [2, 0] and last.sources[0] == "c/1.wav"
    assert joined.in_shards.tolist() == [False] * 3 + [True] * 2


def test_columns_that_are_left_out_are_empty():
    clips = Clips(["a.wav"], ["a.wav"], [""], [""], *np.ones((4, 1), dtype=np.int64))
    assert (clips.speakers[0], clips.folds[0], clips.offsets[0], clips.datasets[0]) == ("", "", 0, 0)


def test_rows_name_what_to_open():
    """A file by what it was made from, a clip in a shard by where it lies."""
    plain, sharded = make_clips("a", 2).records(), make_clips("b", 2, offset=512).records()
    assert list(plain)[1] == Record("a/1.wav", ("label 1",), "valid", "speaker 1", "1")
    expected = Record("b/shard.tar", ("label 1",), "valid", "speaker 1", "1", "b/1.wav", offset=1024, size=4000)
    assert list(sharded)[1] == expected


def test_only_files_with_another_path_are_converted():
    clips = Clips(["a.wav", "cache/b.wav", "s.tar"], ["a.wav", "b.mp3", "c.wav"], *[["", "", ""]] * 2, *np.ones((4, 3)))
    assert clips.converted.tolist() == [False, True, True]
    in_shard = Clips(*(getattr(clips, name) for name in list(Clips.__dataclass_fields__)[:8]), np.array([0, 0, 512]))
    assert in_shard.converted.tolist() == [False, True, False]


def test_hours_count_every_rate_by_itself():
    clips = Clips(
        ["a", "b"], ["a", "b"], *[["", ""]] * 2, np.array([16000, 96000]), np.array([16000, 48000]), *np.ones((2, 2))
    )
    assert clips.hours == pytest.approx(3 / 3600)


@pytest.mark.parametrize("offset", [0, 512])
def test_the_fingerprint_sees_clips_and_their_order(offset):
    clips = make_clips("a", 4, offset=offset)
    others = [clips.subset(np.array([1, 0, 2, 3])), clips.subset(np.arange(3)), make_clips("b", 4, offset=offset)]
    prints = [tuple(each.fingerprint) for each in (clips, *others)]
    assert len(set(prints)) == 4
    assert clips.fingerprint == make_clips("a", 4, offset=offset).fingerprint
