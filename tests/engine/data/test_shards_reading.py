"""Texts and clips as columns, prepared folders opened and read: exact samples, what is broken or unfinished, and 2.2
million clips.
"""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssast.engine.config import load_config
from ssast.engine.data import decode
from ssast.engine.data.clips import Clips
from ssast.engine.data.dataset import check_reachable, open_dataset
from ssast.engine.data.decode import AudioDecoder
from ssast.engine.data.loader import ClipReader
from ssast.engine.data.order import SampleOrder
from ssast.engine.data.shards import open_shards
from ssast.engine.data.texts import Texts
from ssast.engine.data.wav import wav_header
from ssast.engine.errors import UserError

WINDOW, RATE = 4000, 16000


def opened(config, measured=None):
    """The data set of a run."""
    return open_dataset(config.data, config.model.num_mel_bins, config.num_samples, measured)


def write_index(folder: Path, columns: dict[str, np.ndarray], texts: dict[str, list[str]], description: dict) -> None:
    (folder / "index").mkdir(parents=True, exist_ok=True)
    for name, column in columns.items():
        np.save(folder / "index" / f"{name}.npy", column)
    for name, column in texts.items():
        encoded = [text.encode("utf-8", "surrogateescape") for text in column]
        np.save(folder / "index" / f"{name}.offsets.npy", np.cumsum([0, *map(len, encoded)], dtype=np.int64))
        np.save(folder / "index" / f"{name}.utf8.npy", np.frombuffer(b"".join(encoded), dtype=np.uint8))
    (folder / "dataset.json").write_text(json.dumps({"format": 1, "sample_rate": RATE, "settings": {}, **description}))


def write_prepared(
    folder: Path, sounds: list[np.ndarray], *, codec="wav", rate=RATE, per_shard=3, **texts: list[str]
) -> Path:
    """A prepared folder as the format says, by other means than the engine's."""
    (folder / "shards").mkdir(parents=True)
    rows, shards = [], []
    for number, first in enumerate(range(0, len(sounds), per_shard)):
        path = folder / "shards" / f"{number:05}.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for clip in range(first, min(first + per_shard, len(sounds))):
                audio = io.BytesIO()
                soundfile.write(audio, sounds[clip], rate, "PCM_16", format=codec.upper())
                for name, content in ((f"{clip}.json", b"{}"), (f"{clip}.{codec}", audio.getvalue())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    offset = tar.offset + 512
                    tar.addfile(member, io.BytesIO(content))
                rows.append((number, offset, len(content), len(sounds[clip]), zlib.crc32(content)))
        count = min(per_shard, len(sounds) - first)
        shards.append({"name": path.name, "bytes": path.stat().st_size, "clips": count, "sha256": ""})
    names, kinds = ("shard", "offset", "size", "samples", "crc32"), (np.int32, np.int64, np.int64, np.int64, np.uint32)
    columns = {name: np.array(row, kind) for name, kind, row in zip(names, kinds, zip(*rows, strict=True), strict=True)}
    numbers = [str(clip) for clip in range(len(sounds))]
    texts = (
        {name: [""] * len(sounds) for name in ("label", "speaker", "split")}
        | {"key": numbers, "source": numbers}
        | texts
    )
    write_index(folder, columns, texts, {"codec": codec, "clips": len(sounds), "shards": shards, "sample_rate": rate})
    return folder


def noise(count=8, seed=0) -> list[np.ndarray]:
    """Of 1500, 2500 ... samples."""
    rng = np.random.default_rng(seed)
    return [rng.integers(-9000, 9000, 1500 + 1000 * number, dtype=np.int16) for number in range(count)]


def open_decoder(clips: Clips, **options) -> AudioDecoder:
    return AudioDecoder(
        clips, **{"num_samples": WINDOW, "sample_rate": RATE, "batch_size": 8, "num_threads": 2, **options}
    )


def padded(values: np.ndarray) -> np.ndarray:
    return np.pad(values[:WINDOW], (0, max(0, WINDOW - len(values))))


def no_decoder(monkeypatch) -> None:
    def refuse(*arguments):
        raise AssertionError("DALI was asked")

    monkeypatch.setattr(decode, "_build_pipeline", refuse)


# --- texts and columns ------------------------------------------------------------------------------------------------


names = st.lists(st.text(max_size=30) | st.binary(max_size=30).map(os.fsdecode), max_size=30)


@settings(max_examples=30, deadline=None)
@given(first=names, second=names, data=st.data())
def test_texts_are_a_list_of_texts(first, second, data):
    first = [text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") for text in first]
    both = Texts.joined([Texts.from_list(first), Texts.from_list(second)])
    expected = first + second
    assert list(both) == expected and len(both) == len(expected) and both == expected and both[1:4] == expected[1:4]
    assert [both[i] for i in range(-len(both), len(both))] == expected * 2
    index = np.array(data.draw(st.lists(st.integers(0, len(expected) - 1))) if expected else [], dtype=np.int64)
    subset = both.subset(index)
    assert list(subset) == [expected[i] for i in index] and list(pickle.loads(pickle.dumps(subset))) == list(subset)
    assert len(set(both.hashes().tolist())) == len({text.encode("utf-8", "surrogateescape") for text in expected})
    assert np.array_equal(subset.hashes(), Texts.from_list(list(subset)).hashes()), (
        "a hash is of the text, wherever it stands"
    )


def test_half_a_surrogate_pair_is_no_crash():
    assert list(Texts.from_list(["\ud83d", "whole"])) == ["?", "whole"]


def test_hashes_see_every_byte():
    texts = ["", "\0", "\0\0", *("a" * n for n in range(1, 40)), *("a" * n + "b" + "a" * (20 - n) for n in range(21))]
    assert len(set(Texts.from_list(texts).hashes().tolist())) == len(texts)
    with_neighbours = Texts.from_list([piece for text in texts for piece in (text, "\xff" * 3)])
    assert np.array_equal(with_neighbours.hashes()[::2], Texts.from_list(texts).hashes())


# --- opening ----------------------------------------------------------------------------------------------------------


def test_clips_of_a_prepared_folder(tmp_path):
    sounds, names = noise(), [f"süd/{n}\udcff" for n in range(8)]
    folder = write_prepared(tmp_path / "set", sounds, label=list("abcdefgh"), source=names, speaker=["x", "y"] * 4)
    clips = open_shards(folder)
    assert clips.sources == names and clips.labels == list("abcdefgh") and clips.speakers == ["x", "y"] * 4
    assert [os.path.basename(path) for path in clips.paths] == [f"0000{n // 3}.tar" for n in range(8)]
    assert clips.frames.tolist() == [len(sound) for sound in sounds] and set(clips.sample_rates.tolist()) == {RATE}
    assert clips.hours == pytest.approx(sum(map(len, sounds)) / RATE / 3600)
    for path, offset, size, sound in zip(clips.paths, clips.offsets, clips.sizes, sounds, strict=True):
        content = Path(path).read_bytes()[offset : offset + size]
        assert content[:44] == wav_header(len(sound), RATE) and content[44:] == sound.tobytes()
    some = clips.subset(np.array([6, 1]))
    assert (
        some.sources == [names[6], names[1]]
        and some.frames.tolist() == [7500, 2500]
        and some.offsets[1] == clips.offsets[1]
    )
    sent = pickle.loads(pickle.dumps(some))
    assert sent.sources == some.sources and np.array_equal(sent.offsets, some.offsets)
    assert sent.fingerprint == some.fingerprint != clips.subset(np.array([1, 6])).fingerprint
    both = Clips.joined([clips, some])
    assert both.sources == [*names, names[6], names[1]] and both.datasets.tolist() == [0] * 8 + [1] * 2
    assert os.path.basename(both.paths[8]) == "00002.tar" and len(both.paths.used()) == 5


def broken_folders() -> dict[str, tuple]:
    def edit(**changes):
        def change(folder):
            path = folder / "dataset.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return change

    def save(name, column):
        return lambda folder: np.save(folder / "index" / name, column)

    return {
        "unfinished": (
            lambda folder: (folder / "dataset.json").unlink(),
            "not finished.*run the same ssast prepare again",
        ),
        "begun": (
            lambda folder: [
                (folder / "dataset.json").rename(folder / "unfinished.json"),
                shutil.rmtree(folder / "shards"),
            ],
            "not finished.*run the same ssast prepare again",
        ),
        "not JSON": (lambda folder: (folder / "dataset.json").write_text("{"), r"dataset.json: content: Invalid JSON"),
        "other format": (edit(format=2), "format: Input should be 1"),
        "no shards": (edit(shards=None), "shards: "),
        "other count": (edit(clips=9), "9 clips, 8 of them in shards"),
        "shard gone": (lambda folder: (folder / "shards" / "00001.tar").unlink(), "00001.tar: the shard is missing"),
        "shard cut": (
            lambda folder: os.truncate(folder / "shards" / "00001.tar", 9000),
            "00001.tar: the shard has 9000 bytes",
        ),
        "column gone": (lambda folder: (folder / "index" / "size.npy").unlink(), "size.npy: the index cannot be read"),
        "column empty": (
            lambda folder: (folder / "index" / "size.npy").write_bytes(b""),
            "size.npy: the index cannot be read",
        ),
        "column short": (save("samples.npy", np.ones(7, np.int64)), r"samples.npy: int64 \[7\] instead of int64 \[8\]"),
        "column of another kind": (save("offset.npy", np.ones(8, np.int32)), "offset.npy: int32"),
        "texts short": (
            save("label.offsets.npy", np.zeros(8, np.int64)),
            r"label.offsets.npy: int64 \[8\] instead of int64 \[9\]",
        ),
        "texts longer than their bytes": (
            save("source.utf8.npy", np.zeros(3, np.uint8)),
            "source.utf8.npy: 3 bytes instead of 8",
        ),
        "beyond the shard": (save("size.npy", np.full(8, 10**6)), "names clips outside the shards"),
        "unknown shard": (save("shard.npy", np.full(8, 3, np.int32)), "names clips outside the shards"),
    }


@pytest.mark.parametrize("how", broken_folders())
def test_what_is_wrong_with_a_prepared_folder_is_said_in_a_line(tmp_path, how):
    folder = write_prepared(tmp_path / "set", noise())
    damage, message = broken_folders()[how]
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        opened(load_config("demo", [f"data.train={folder}", f"data.cache_dir={tmp_path / 'cache'}"]))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["wav", "flac"])
def test_windows_are_the_samples_bit_for_bit(tmp_path, codec, monkeypatch):
    """Heads, random crops, beginnings up to the end; short clips padded. No decoder is asked for WAV."""
    sounds = noise(20)
    decoder = open_decoder(open_shards(write_prepared(tmp_path / "set", sounds, codec=codec)), batch_size=20)
    if codec == "wav":
        no_decoder(monkeypatch)
    used_before = SimpleNamespace(
        int16=torch.int16, empty=lambda shape, **kind: torch.full(shape, 77, dtype=torch.int16)
    )
    monkeypatch.setattr(decode, "torch", used_before)  # memory of a new batch is not silent by itself
    lengths = np.array([len(sound) for sound in sounds])
    order = SampleOrder(20, seed=3)
    starts = [np.zeros(20, dtype=np.int64), lengths - 1, lengths]
    starts += [order.crop_starts(np.arange(20), np.full(20, epoch), lengths, WINDOW) for epoch in range(5)]
    assert len(set(np.concatenate(starts[3:]).tolist())) > 50
    for start in starts:
        decoded = decoder.decode(np.arange(20), start)
        assert decoded.waveform.dtype == np.int16 and decoded.waveform.shape == (20, WINDOW) and not decoded.broken
        for row, sound in enumerate(sounds):
            assert np.array_equal(decoded.waveform[row], padded(sound[start[row] :]))
        assert np.array_equal(decoded.lengths, np.clip(lengths - start, 0, WINDOW))
    decoder.close()


def test_plain_wav_files_need_no_decoder_either(tmp_path, monkeypatch):
    (tmp_path / "audio").mkdir()
    for number, sound in enumerate(noise()):
        soundfile.write(tmp_path / "audio" / f"{number}.wav", sound, RATE)
    data = opened(load_config("demo", [f"data.train={tmp_path / 'audio'}", f"data.cache_dir={tmp_path / 'cache'}"]))
    no_decoder(monkeypatch)
    start = np.maximum(data.train.frames - 3000, 0)
    decoded = open_decoder(data.train).decode(np.arange(len(data.train)), start)
    for row, path in enumerate(data.train.paths):
        assert np.array_equal(decoded.waveform[row], padded(soundfile.read(path, dtype="int16")[0][start[row] :]))


def test_shards_of_another_rate_are_resampled(tmp_path):
    time = np.arange(24000) / 24000
    tone = np.round(8000 * np.sin(2 * np.pi * 440 * time)).astype(np.int16)
    folder = write_prepared(tmp_path / "set", [tone], rate=24000)
    decoded = open_decoder(open_shards(folder), num_samples=16000).decode(np.array([0]), np.array([0]))
    expected = 8000 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert decoded.lengths[0] == 16000 and np.abs(decoded.waveform[0] - expected)[200:-200].max() < 30


def test_more_shards_than_may_be_open(tmp_path):
    sounds = noise(12)
    decoder = open_decoder(open_shards(write_prepared(tmp_path / "set", sounds, per_shard=1)), batch_size=12)
    decoder._files._limit = 5

    def open_shard_files() -> int:
        opened = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.exists(entry.path)]
        return sum(path.startswith(str(tmp_path / "set" / "shards")) for path in opened)

    for _ in range(2):
        decoded = decoder.decode(np.arange(12), np.zeros(12, dtype=np.int64))
        assert open_shard_files() == 5 and not decoded.broken
        assert all(
            np.array_equal(window, padded(sound)) for window, sound in zip(decoded.waveform, sounds, strict=True)
        )
    decoder.close()
    assert open_shard_files() == 0


def overwrite(path: str, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize(
    ("codec", "how"),
    [
        ("wav", "header gone"),
        ("wav", "header of fewer"),
        ("wav", "shard cut"),
        ("flac", "bit rot"),
        ("flac", "of another length"),
    ],
)
def test_a_clip_that_breaks_in_its_shard_costs_only_itself(tmp_path, codec, how):
    """The shards keep their sizes, so that only reading can tell; cut short after opening, too."""
    sounds = noise()
    clips = open_shards(write_prepared(tmp_path / "set", sounds, codec=codec))
    path, offset, size = clips.paths[5], int(clips.offsets[5]), int(clips.sizes[5])
    if how == "header of fewer":
        overwrite(path, offset, wav_header(100, RATE))
    elif how == "of another length":
        other = io.BytesIO()
        soundfile.write(other, sounds[5][:-50], RATE, "PCM_16", format="FLAC")
        overwrite(path, offset, other.getvalue())
    elif how == "shard cut":
        os.truncate(path, offset + 1000)
    else:
        overwrite(path, offset if how == "header gone" else offset + 200, os.urandom(size - 200))
    found = []
    batch = ClipReader(open_decoder(clips), None, on_bad=found.append).read(0, 8)
    assert [bad.path for bad in found] == [clips.sources[5]] and f"(byte {offset} of {path})" in found[0].reason
    for row in range(8):
        assert np.array_equal(batch.waveform[row].numpy(), padded(sounds[6 if row == 5 else row]))
    assert batch.lengths.tolist() == [min(len(sounds[6 if row == 5 else row]), WINDOW) for row in range(8)]


# --- as data of a run -------------------------------------------------------------------------------------------------


def run_config(tmp_path, *overrides):
    return load_config("demo", [f"data.cache_dir={tmp_path / 'cache'}", *overrides])


def test_files_and_shards_in_one_list(tmp_path):
    (tmp_path / "audio").mkdir()
    for number, sound in enumerate(noise(6)):
        soundfile.write(tmp_path / "audio" / f"{number}.flac", sound, RATE)
    first = write_prepared(tmp_path / "one", noise(8, 1), source=[f"one/{n}" for n in range(8)], codec="flac")
    second = write_prepared(tmp_path / "two", noise(10, 2), source=[f"two/{n}" for n in range(10)])
    sources = f"data.train=[{first}, {tmp_path / 'audio'}, {second}]"
    data = opened(run_config(tmp_path, sources, "data.valid_fraction=0.2"))
    assert len(data.train) + len(data.valid) == 24 and len(data.valid) == 5 and sum(data.train_sizes) == len(data.train)
    assert data.train.datasets.tolist() == sorted(data.train.datasets) and not set(data.train.sources) & set(
        data.valid.sources
    )
    check_reachable(data)
    truth = {f"one/{n}": sound for n, sound in enumerate(noise(8, 1))} | {
        f"two/{n}": sound for n, sound in enumerate(noise(10, 2))
    }
    truth |= {str(tmp_path / "audio" / f"{n}.flac"): sound for n, sound in enumerate(noise(6))}
    decoded = open_decoder(data.train, batch_size=19).decode(np.arange(19), np.zeros(19, dtype=np.int64))
    for row, source in enumerate(data.train.sources):
        assert np.array_equal(decoded.waveform[row], padded(truth[source]))
    (second / "shards" / "00002.tar").unlink()
    with pytest.raises(UserError, match=r"00002\.tar: not on this machine"):
        check_reachable(data)


def test_pieces_of_a_recording_are_on_one_side(tmp_path):
    folder = write_prepared(tmp_path / "set", noise(40), source=[f"recording {number // 4}" for number in range(40)])
    data = opened(run_config(tmp_path, f"data.train={folder}", "data.valid_fraction=0.33"))
    assert not set(data.valid.sources) & set(data.train.sources) and (len(data.train), len(data.valid)) == (28, 12)
    one = write_prepared(tmp_path / "one", noise(8), source=["the only one"] * 8)
    data = opened(run_config(tmp_path, f"data.train={one}", "data.valid_fraction=0.25"))
    assert (len(data.train), len(data.valid)) == (6, 2)


def test_splits_and_short_clips(tmp_path):
    splits = ["train", "Valid ", "test", "train", "", "dev", "train", "train"]
    folder = write_prepared(tmp_path / "set", noise(), split=splits)
    data = opened(run_config(tmp_path, f"data.train={folder}", "data.min_seconds=0.1"))
    assert data.train.sources == ["3", "4", "6", "7"] and data.valid.sources == ["1", "5"]
    assert [(item.path, item.reason) for item in data.skipped] == [
        ("0", "too short: 1500 samples, one frame needs 1600")
    ]
    with pytest.raises(UserError, match=r"0: too short: 1500 samples"):
        opened(run_config(tmp_path, f"data.train={folder}", "data.min_seconds=0.1", "data.strict=true"))


def test_statistics_of_a_prepared_folder_are_not_measured_again(tmp_path):
    one, two = (
        write_prepared(tmp_path / name, noise(), source=[f"{name}/{n}" for n in range(8)]) for name in ("one", "two")
    )
    auto = ["data.mean=auto", "data.std=auto"]
    (one / "stats.json").write_text(json.dumps({"mean": -3.25, "std": 2.5}))
    data = opened(run_config(tmp_path, f"data.train={one}", *auto))
    assert (data.mean, data.std) == (-3.25, 2.5)
    measured = opened(run_config(tmp_path, f"data.train=[{one}, {two}]", *auto))
    assert measured.mean != -3.25
    assert (
        opened(run_config(tmp_path, f"data.train={one}", "model.num_mel_bins=64", "mask.num_masked=20", *auto)).mean
        != -3.25
    )
    assert opened(run_config(tmp_path, f"data.train={two}", *auto)).mean != -3.25
    (two / "stats.json").write_text('{"mean": null}')
    with pytest.raises(UserError, match=r"stats.json: no mean and std"):
        opened(run_config(tmp_path, f"data.train={two}", *auto))


BIG = """
import resource, sys, time
from pathlib import Path
from ssast.engine.config import load_config
from ssast.engine.data.shards import open_shards
from ssast.engine.data.dataset import open_dataset
from ssast.engine.data.decode import AudioDecoder
from ssast.engine.data.loader import ClipReader
from ssast.engine.data.order import SampleOrder
resident = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
config = load_config("demo", [f"data.train={sys.argv[1]}", "data.mean=-4.0", "data.std=4.0"])
before, began = resident(), time.perf_counter()
clips = open_shards(Path(sys.argv[1]))
print(time.perf_counter() - began)
began = time.perf_counter()
data = open_dataset(config.data, config.model.num_mel_bins, config.num_samples)
decoder = AudioDecoder(data.train, num_samples=160000, sample_rate=16000, batch_size=24, num_threads=1)
batch = ClipReader(decoder, SampleOrder(len(data.train), 0), random_crop=True).read(3 * len(data.train) - 12, 24)
print(time.perf_counter() - began)
print(resident() - before)
print(len(clips), len(data.train) + len(data.valid), batch.lengths.min().item())
"""


@pytest.mark.slow
def test_two_million_clips_open_in_a_second(tmp_path):
    """In a process of its own, whose peak of resident memory counts. Every clip is the one at the head of its shard."""
    count, shards = 2_200_000, 500
    (tmp_path / "shards").mkdir()
    for number in range(shards):
        with open(tmp_path / "shards" / f"{number:05}.tar", "wb") as file:
            file.write(bytes(512) + wav_header(160000, RATE))
            file.truncate(10**6)
    (tmp_path / "index").mkdir()
    described = [{"name": f"{number:05}.tar", "bytes": 10**6, "clips": count // shards} for number in range(shards)]
    columns = {"shard": np.repeat(np.arange(shards, dtype=np.int32), count // shards), "offset": np.full(count, 512)}
    columns |= {"size": np.full(count, 44 + 320000), "samples": np.full(count, 160000)}
    write_index(tmp_path, columns, {}, {"clips": count, "shards": described})
    digits = np.arange(count)[:, None] // 10 ** np.arange(6, -1, -1) % 10 + ord("0")
    sources = np.tile(np.frombuffer(b"/data/audioset/unbalanced/0000000.flac", np.uint8), (count, 1))
    sources[:, 26:33] = digits
    contents = {
        "source": sources.tobytes(),
        "label": b"/m/09x0r,/m/05zppz_" * count,
        "split": b"train" * count,
        "speaker": b"",
    }
    for name, content in contents.items():
        np.save(tmp_path / "index" / f"{name}.offsets.npy", np.arange(count + 1) * (len(content) // count))
        np.save(tmp_path / "index" / f"{name}.utf8.npy", np.frombuffer(content, np.uint8))
    done = subprocess.run([sys.executable, "-c", BIG, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    opened, first_batch, gigabytes, counts = done.stdout.splitlines()
    assert counts == f"{count} {count} 160000"
    assert float(opened) < 2 and float(first_batch) < 10 and float(gigabytes) < 1
