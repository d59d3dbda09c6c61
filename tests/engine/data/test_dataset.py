import hashlib

import numpy as np
import pytest
import soundfile
import torch

from ssast.engine.config import load_config
from ssast.engine.data.dataset import _picked, open_dataset
from ssast.engine.data.prepare import main as prepare
from ssast.engine.errors import UserError
from ssast.kernels import fbank


def config(tmp_path, *overrides):
    return load_config("demo", [f"data.train={tmp_path / 'audio'}", f"data.cache_dir={tmp_path / 'cache'}", *overrides])


def opened(config, measured=None):
    """The data set of a run."""
    return open_dataset(config.data, config.model.num_mel_bins, config.num_samples, measured)


@pytest.fixture
def audio(tmp_path):
    """Twenty clips of noise of different loudness and length."""
    rng = np.random.default_rng(0)
    (tmp_path / "audio").mkdir()
    for number in range(20):
        samples = 0.02 * (1 + number) * rng.standard_normal(8000 + 3000 * number)
        soundfile.write(tmp_path / "audio" / f"{number:02}.flac", np.clip(samples, -1, 1), 16000)
    return tmp_path


def test_held_out_clips_stay_held_out_when_files_are_added(audio):
    before = opened(config(audio, "data.valid_fraction=0.2"))
    assert len(before.valid) == 4 and len(before.train) == 16
    assert not set(before.valid.sources) & set(before.train.sources)
    for number in range(20, 24):
        (audio / "audio" / f"{number}.flac").write_bytes((audio / "audio" / "03.flac").read_bytes())
    after = opened(config(audio, "data.valid_fraction=0.2"))
    # Lowest hashes are held out, and hashes depend on where the audio lies. Wherever that is: of the clips that there
    # were, none takes the place of another, and each that left made room for a clip that is new.
    held_out, old, kept = set(before.valid.sources), set(before.train.sources), set(after.valid.sources)
    assert len(kept) == 5
    assert held_out <= kept or not kept & old
    assert len(held_out - kept) <= len(kept - old - held_out)


def test_splits_of_a_manifest_are_kept(audio):
    splits = ["train"] * 10 + ["valid"] * 6 + ["test"] * 4
    lines = ["path,split", *(f"{number:02}.flac,{split}" for number, split in enumerate(splits))]
    (audio / "audio" / "m.csv").write_text("\n".join(lines))
    data = opened(config(audio, f"data.train={audio / 'audio' / 'm.csv'}"))
    assert len(data.train) == 10 and len(data.valid) == 6
    (audio / "audio" / "m.csv").write_text(
        "path,split\n" + "\n".join(f"{n:02}.flac,{'Test ' if n < 5 else 'train'}" for n in range(20))
    )
    data = opened(config(audio, f"data.train={audio / 'audio' / 'm.csv'}"))
    assert len(data.train) + len(data.valid) == 15, "test rows are left alone, also where none is marked for validation"
    (audio / "audio" / "m.csv").write_text("path,split\n00.flac,valid\n01.flac,test")
    with pytest.raises(UserError, match="none for training"):
        opened(config(audio, f"data.train={audio / 'audio' / 'm.csv'}"))


def test_several_sources_and_a_validation_set_of_their_own(audio):
    sources = [str(audio / "audio" / f"{number:02}.txt") for number in range(3)]
    for number, source in enumerate(sources):
        with open(source, "w") as stream:
            stream.write(f"{number:02}.flac\n{number + 3:02}.flac\n")
    data = opened(
        config(audio, f"data.train=[{sources[0]}, {sources[1]}]", f"data.valid={sources[2]}", "data.valid_clips=1")
    )
    assert len(data.train) == 4 and len(data.valid) == 1
    data = opened(config(audio, f"data.train=[{sources[0]}, {sources[1]}]", f"data.valid={sources[1]}"))
    assert len(data.train) == 2 and len(data.valid) == 2, "a clip named for both is validated on alone"


def test_statistics_are_those_of_the_sounding_frames(audio):
    """Against all frames of all training clips, one at a time; padding does not count."""
    data = opened(config(audio))
    frames = [
        fbank(torch.from_numpy(soundfile.read(path, dtype="float32")[0])[None, :41200])[0].flatten()
        for path in data.train.sources
    ]
    values = torch.cat(frames).double()
    assert data.mean == pytest.approx(values.mean().item(), abs=2e-3)
    assert data.std == pytest.approx(values.std().item(), abs=2e-3)
    assert opened(config(audio), measured=(1.0, 2.0)).std == 2.0
    assert opened(config(audio, "data.mean=-4.0", "data.std=5.0")).mean == -4.0


def test_each_weight_needs_a_data_set_with_clips(audio):
    train = [str(audio / "audio" / f"{number}.txt") for number in range(2)]
    for number, source in enumerate(train):
        with open(source, "w") as stream:
            stream.writelines(f"{clip:02}.flac\n" for clip in range(10 * number, 10 * number + 10))
    data = opened(
        config(audio, f"data.train=[{train[0]}, {train[1]}]", "data.weights=[0.7, 0.3]", "data.valid_fraction=0.2")
    )
    assert sum(data.train_sizes) == 16 and data.train_sizes == np.bincount(data.train.datasets).tolist()
    for row, source in enumerate(data.train.sources):
        assert (int(source[-7:-5]) >= 10) == data.train.datasets[row]
    with pytest.raises(UserError, match=r"0\.txt: no clips to train on, but data\.weights"):
        opened(
            config(audio, f"data.train=[{train[0]}, {train[1]}]", "data.weights=[0.7, 0.3]", f"data.valid={train[0]}")
        )
    for weights, message in [
        ("[1]", "1 weights for 2 entries"),
        ("[1, 0]", "positive"),
        ("[1, 0.0001]", "never be read"),
    ]:
        with pytest.raises(UserError, match=f"data.weights: .*{message}"):
            config(audio, f"data.train=[{train[0]}, {train[1]}]", f"data.weights={weights}")


def test_held_out_files_are_those_of_before_shards(audio):
    """By BLAKE2b of the path: a run that goes on must not find its validation clips in training."""
    data = opened(config(audio, "data.valid_fraction=0.2"))
    paths = sorted(str(path) for path in (audio / "audio").iterdir())
    lowest = sorted(paths, key=lambda path: hashlib.blake2b(path.encode(), digest_size=8).digest())[:4]
    assert data.valid.sources == sorted(lowest)


def test_measured_clips_follow_the_weights_of_their_data_sets():
    datasets = np.repeat(np.arange(3, dtype=np.int32), [1000, 10, 500])
    picked = _picked(datasets, [1.0, 1.0, 2.0])
    assert np.bincount(datasets[picked]).tolist() == [128, 128, 256]
    assert len(np.unique(picked[datasets[picked] == 1])) == 10, "all of a small data set, repeatedly, as in training"
    assert np.bincount(datasets[_picked(datasets, None)]).tolist() == pytest.approx([339, 3, 170], abs=1)


@pytest.mark.parametrize("form", ["m.csv", "folder", "shards"])
def test_clips_marked_for_test_are_never_trained_on(audio, form):
    """In whatever spelling, from a table, from folders, or after `ssast prepare`."""
    names = ["train", "Training", " test", "testing", "eval", "Evaluation", "val", "dev", "validation", ""]
    source = audio / "m.csv"
    rows = [f"audio/{number:02}.flac,{names[number % 10]}" for number in range(20)]
    source.write_text("\n".join(["path,split", *rows]))
    if form == "folder":
        source = audio / "by_folder"
        for number in range(20):
            folder = source / (names[number % 10].strip() or "noise")
            folder.mkdir(parents=True, exist_ok=True)
            (audio / "audio" / f"{number:02}.flac").rename(folder / f"{number:02}.flac")
    if form == "shards":
        assert prepare([str(source), "--out", str(audio / "prepared"), "--workers", "1"]) == 0
        source = audio / "prepared"
    data = opened(config(audio, f"data.train={source}"))
    train, valid = ([int(path[-7:-5]) % 10 for path in clips.sources] for clips in data.parts())
    assert set(train) == {0, 1, 9} and set(valid) == {6, 7, 8}
    assert len(train) == 6 and len(valid) == 6


def test_clips_marked_for_test_are_not_validated_on_either(audio):
    table = audio / "audio" / "valid.csv"
    table.write_text("path,split\n00.flac,\n01.flac,valid\n02.flac,Testing\n03.flac,train\n")
    data = opened(config(audio, f"data.valid={table}"))
    assert {source[-7:-5] for source in data.valid.sources} == {"00", "01", "03"} and len(data.train) == 17
    table.write_text("path,split\n00.flac,test\n")
    with pytest.raises(UserError, match=r"valid\.csv: all clips are marked for test"):
        opened(config(audio, f"data.valid={table}"))


def test_splits_and_parts_that_cannot_be_trained_on_are_errors(audio):
    table = audio / "audio" / "m.csv"
    table.write_text("path,split\n00.flac,train\n01.flac,tset\n")
    with pytest.raises(UserError, match=r"m\.csv: .*01\.flac: split 'tset' is none of train, training; valid"):
        opened(config(audio, f"data.train={table}"))
    table.write_text("path,start,end\n00.flac,0,0.2\n01.flac,0.1,0.3\n")
    with pytest.raises(UserError, match=r"start and end .*cut them by ssast prepare"):
        opened(config(audio, f"data.train={table}"))
