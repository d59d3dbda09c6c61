import csv
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ssast.engine.data import synth
from ssast.engine.data.synth import CLASSES, main, synthesize, write_corpus
from ssast.engine.errors import UserError

CLIPS = 13


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synth") / "corpus"
    write_corpus(folder, clips=CLIPS, seed=3, progress=False)
    return folder


@pytest.fixture(scope="module")
def clips():
    return {label: [synthesize(label, 0, index) for index in range(12)] for label in CLASSES}


def read_manifest(folder):
    with open(folder / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def modification_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def log_spectrum_features(audio):
    """Mean and deviation over time of the log energies in 32 bands, and of their changes, with the level taken out."""
    frames = np.lib.stride_tricks.sliding_window_view(audio, 512)[::256] * np.hanning(512)
    edges = np.unique(np.geomspace(2, 256, 33).astype(int))
    energy = np.add.reduceat(np.abs(np.fft.rfft(frames))[:, :256] ** 2, edges[:-1], axis=1)
    logs = np.log(energy / energy.max() + 1e-6)
    return np.concatenate([logs.mean(0), logs.std(0), np.abs(np.diff(logs, axis=0)).mean(0)])


def nearest_centroid_accuracy(clips):
    features = np.array([[log_spectrum_features(audio) for audio in clips[label]] for label in CLASSES])
    train, test = features[:, ::2], features[:, 1::2]
    scale = train.std(axis=(0, 1))
    distances = np.linalg.norm((test[:, :, None] - train.mean(axis=1)) / scale, axis=-1)
    return (distances.argmin(axis=-1) == np.arange(len(CLASSES))[:, None]).mean()


def test_a_clip_depends_only_on_its_label_seed_and_index(clips):
    for label in reversed(CLASSES):
        np.testing.assert_array_equal(synthesize(label, 0, 5), clips[label][5])


@pytest.mark.parametrize("label", CLASSES)
def test_clips_of_a_class_differ(label, clips):
    assert len({audio.tobytes() for audio in clips[label]}) == 12
    assert synthesize(label, 1, 0).tobytes() != clips[label][0].tobytes()


@pytest.mark.parametrize("label", CLASSES)
def test_clips_are_sound_16_bit_audio(label, clips):
    for audio in clips[label]:
        steps = audio * 32_768
        assert audio.dtype == np.float32 and audio.ndim == 1
        assert np.isfinite(audio).all()
        assert np.array_equal(steps, np.rint(steps))
        assert 2.0 <= len(audio) / 16_000 <= 6.0
        assert -30.1 < 20 * np.log10(np.abs(audio).max()) < -2.9
        assert np.abs(audio.mean()) < 0.1 * audio.std()


def test_length_and_level_vary(clips):
    every = [audio for label in CLASSES for audio in clips[label]]
    seconds = [len(audio) / 16_000 for audio in every]
    peaks = [20 * np.log10(np.abs(audio).max()) for audio in every]
    assert min(seconds) < 2.5 and max(seconds) > 5.5
    assert min(peaks) < -27 and max(peaks) > -6


def test_a_higher_sample_rate_keeps_the_length_and_the_level():
    for label in CLASSES:
        low, high = synthesize(label, 0, 1), synthesize(label, 0, 1, sample_rate=24_000)
        assert abs(len(high) - 1.5 * len(low)) <= 1
        assert np.isfinite(high).all() and np.abs(high).max() < 1.0


@pytest.mark.parametrize(
    "arguments",
    [("whistle", 0, 0), ("bell", -1, 0), ("bell", 2**64, 0), ("bell", 0, -1), ("bell", 0, 2**32), ("bell", 0, 0, 8000)],
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        synthesize(*arguments)


def test_extreme_seeds_and_indices_are_accepted():
    first, last = synthesize("burst", 0, 0), synthesize("burst", 2**64 - 1, 2**32 - 1)
    assert first.tobytes() != last.tobytes()


def test_classes_are_separable_by_simple_features(clips):
    assert nearest_centroid_accuracy(clips) >= 0.6


def test_files_hold_the_clips_exactly(corpus):
    for row in read_manifest(corpus):
        path = corpus / row["path"]
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.format, info.subtype) == (16_000, 1, "FLAC", "PCM_16")
        audio, _ = soundfile.read(path, dtype="float32")
        np.testing.assert_array_equal(audio, synthesize(row["label"], 3, int(path.stem.rsplit("-")[-1])))


def test_manifest_lists_every_file_and_balances_the_classes(corpus):
    rows = read_manifest(corpus)
    assert {corpus / row["path"] for row in rows} == set(corpus.rglob("*.flac"))
    counts = Counter(row["label"] for row in rows)
    assert set(counts) == set(CLASSES) and sum(counts.values()) == CLIPS
    assert max(counts.values()) - min(counts.values()) == 1


@pytest.mark.parametrize(("clips", "expected"), [(10, (1, 0, 0)), (30, (1, 1, 1)), (100, (8, 1, 1)), (300, (24, 3, 3))])
def test_splits_of_a_class(clips, expected):
    counts = Counter((label, split) for label, _, split in synth._plan(clips))
    for label in CLASSES:
        assert tuple(counts[label, split] for split in ("train", "valid", "test")) == expected


def test_finished_corpus_is_left_as_it_is(corpus, monkeypatch):
    monkeypatch.setattr(synth, "synthesize", lambda *arguments: pytest.fail("a finished corpus was redone"))
    before = modification_times(corpus)
    assert write_corpus(corpus, clips=CLIPS, seed=3) == corpus / "manifest.csv"
    assert modification_times(corpus) == before


def test_interrupted_corpus_is_completed(tmp_path, corpus):
    whole = snapshot(corpus)
    folder = tmp_path / "corpus"
    write_corpus(folder, clips=CLIPS, seed=3, progress=False)
    (folder / "corpus.json").rename(folder / "corpus.json.part")
    (folder / "bell" / "bell-0000.flac").unlink()
    kept = modification_times(folder / "rain")
    write_corpus(folder, clips=CLIPS, seed=3, progress=False)
    assert snapshot(folder) == whole
    assert modification_times(folder / "rain") == kept


def test_failure_half_way_leaves_only_whole_files_and_can_be_resumed(tmp_path, corpus, monkeypatch):
    replace, renames = os.replace, iter(range(8))

    def run_out(*arguments):
        if next(renames, None) is None:
            raise OSError("no space left")
        replace(*arguments)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no space left"):
        patch.setattr(os, "replace", run_out)
        write_corpus(tmp_path, clips=CLIPS, seed=3, progress=False)
    left, whole = snapshot(tmp_path), snapshot(corpus)
    assert left.pop(Path("corpus.json.part")) == whole[Path("corpus.json")] and Path("corpus.json") not in left
    assert len(left) == 7 and left.items() <= whole.items()
    killed = tmp_path / "bell" / ".bell-0000.flac.12345.tmp"
    killed.parent.mkdir(exist_ok=True)
    killed.write_bytes(b"left by a killed run")
    write_corpus(tmp_path, clips=CLIPS, seed=3, progress=False)
    killed.unlink()
    assert snapshot(tmp_path) == whole


@pytest.mark.parametrize(
    "name", ["notes.txt", "manifest.csv", "corpus.json", "bell/bell-0000.flac", "bell/more.flac", "cats/one.flac"]
)
def test_foreign_folder_is_refused_and_untouched(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("something else")
    with pytest.raises(UserError) as caught:
        write_corpus(tmp_path, clips=10, progress=False)
    assert str(tmp_path) in str(caught.value) and name.split("/")[0] in str(caught.value)
    assert list(snapshot(tmp_path).values()) == [b"something else"]


@pytest.mark.parametrize("other", [{"clips": CLIPS + 1, "seed": 3}, {"clips": CLIPS, "seed": 4}])
@pytest.mark.parametrize("record", ["corpus.json", "corpus.json.part", None])
def test_another_corpus_is_refused(tmp_path, corpus, other, record):
    folder = tmp_path / "corpus"
    for name, content in snapshot(corpus).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if record is None:
        (folder / "corpus.json").unlink()
    else:
        (folder / "corpus.json").rename(folder / record)
    before = snapshot(folder)
    with pytest.raises(UserError, match="another folder"):
        write_corpus(folder, **other, progress=False)
    assert snapshot(folder) == before


@pytest.mark.parametrize("name", ["notes.txt", "bell/more.flac", "cats/one.flac"])
def test_an_interrupted_corpus_with_foreign_files_is_refused(tmp_path, corpus, name):
    folder = tmp_path / "corpus"
    for path, content in {**snapshot(corpus), Path(name): b"something else"}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    (folder / "corpus.json").rename(folder / "corpus.json.part")
    before = snapshot(folder)
    with pytest.raises(UserError, match="another folder"):
        write_corpus(folder, clips=CLIPS, seed=3, progress=False)
    assert snapshot(folder) == before


@pytest.mark.parametrize("arguments", [{"clips": 9}, {"seed": -1}, {"seed": 2**64}])
def test_corpus_arguments_out_of_range_are_refused(tmp_path, arguments):
    with pytest.raises(UserError):
        write_corpus(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(UserError, match="file"):
        write_corpus(path, clips=10)
    assert path.read_text() == "mine"


def test_command_line(tmp_path, capsys):
    assert main([str(tmp_path / "corpus"), "--clips", "10", "--seed", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "corpus" / "manifest.csv") and printed.err == ""
    assert json.loads((tmp_path / "corpus" / "corpus.json").read_text())["clips"] == 10
    assert main([str(tmp_path / "corpus"), "--clips", "9"]) == UserError.exit_code
    assert capsys.readouterr().err.startswith("ssast: ")
