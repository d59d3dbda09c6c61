"""`ssast embed`, `predict` and `evaluate` on files, good and bad."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import soundfile
import torch

from ssast.engine import load_model, save_model
from ssast.engine.data import sound
from ssast.engine.data.prepare import Settings, prepare
from ssast.engine.errors import UserError
from ssast.engine.inference import embed as embed_module
from ssast.engine.inference import evaluate, predict
from ssast.engine.inference.embed import embed as embed_waves
from ssast.engine.inference.predict import predict as predict_waves
from ssast.engine.model.adapt import build_model
from ssast.engine.model.config import ModelCard, ModelConfig

RATE = 16000
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
CLASSES = ("high", "low", "middle")
PITCH = {"low": 250.0, "middle": 900.0, "high": 3500.0}


def wave(label="low", seed=0, seconds=0.6, rate=RATE):
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    tone = np.sin(2 * np.pi * PITCH[label] * rng.uniform(0.9, 1.1) * time)
    return np.rint((0.3 * tone + 0.02 * rng.standard_normal(len(time))) * 20_000).astype(np.int16)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A pretrained model, and one with a classifier."""
    folder = tmp_path_factory.mktemp("models")
    config = ModelConfig(width=32, depth=1, heads=1, input_frames=64)
    save_model(build_model(config, seed=1), folder / "pretrained.safetensors")
    config = ModelConfig(width=32, depth=1, heads=1, input_frames=64, num_classes=3, pretraining_heads=False)
    model = build_model(config, seed=1)
    with torch.no_grad():
        model.classifier[1].weight.mul_(20)
    model.card = ModelCard(labels=CLASSES)
    save_model(model, folder / "tuned.safetensors")
    return folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Folders of the three classes, 12 clips each, easily told apart."""
    folder = tmp_path_factory.mktemp("classes")
    for number, label in enumerate(PITCH):
        (folder / label).mkdir()
        for clip in range(12):
            soundfile.write(folder / label / f"{clip:02}.wav", wave(label, 100 * number + clip), RATE)
    return folder


@pytest.fixture
def audio(tmp_path):
    """Seven files and a manifest of them, of which three are good."""
    folder = tmp_path / "audio"
    folder.mkdir()
    soundfile.write(folder / "a, short.wav", wave(), RATE)
    soundfile.write(
        folder / "b stereo.flac", np.stack([wave("high", rate=44_100), wave("low", rate=44_100)], axis=1), 44_100
    )
    soundfile.write(folder / "c empty.wav", np.zeros(0, np.int16), RATE)
    soundfile.write(folder / "d one sample.wav", np.zeros(1, np.int16), RATE)
    soundfile.write(folder / "e nan.wav", np.array([0.1] * 9999 + [np.nan]), RATE, subtype="FLOAT")
    (folder / "f noise.mp3").write_bytes(os.urandom(1000))
    soundfile.write(folder / "g long.wav", wave("middle", seconds=3), RATE)
    with open(folder / "h truncated.wav", "wb") as file:
        file.write((folder / "g long.wav").read_bytes()[:60_000])
    with open(tmp_path / "all.csv", "w", newline="") as file:
        rows = [(f"audio/{path.name}", f"label {path.name[0]}", "me") for path in sorted(folder.iterdir())]
        csv.writer(file).writerows([("path", "label", "speaker"), *rows, ("audio/missing.wav", "", "")])
    return folder


def run(verb, *arguments):
    return verb.main([str(argument) for argument in arguments])


def test_embed_npz_and_parquet(audio, models, tmp_path, capsys):
    out = tmp_path / "x.npz"
    options = ("--model", models / "pretrained.safetensors", "--frames", "--tokens", "--batch-size", 3, "--workers", 2)
    assert run(embed_module, tmp_path / "all.csv", *options, "--out", out) == 0
    assert "3 recordings" in capsys.readouterr().out
    found = np.load(out)
    assert [os.path.basename(path) for path in found["path"]] == ["a, short.wav", "b stereo.flac", "g long.wav"]
    assert found["label"].tolist() == ["label a", "label b", "label g"] and found["speaker"].tolist() == ["me"] * 3
    np.testing.assert_allclose(found["seconds"], [0.6, 0.6, 3.0])
    model = load_model(models / "pretrained.safetensors")
    for number, path in enumerate(found["path"]):
        samples, rate = soundfile.read(path, always_2d=True)
        expected = embed_waves(model, [samples.T], rate, tokens=True)
        # stereo at another rate goes through 16 bits, as in `ssast prepare`
        tolerance = {"rtol": 0.01, "atol": 0.01} if rate != RATE else TOLERANCE
        first, last = found["offsets"][number : number + 2]
        np.testing.assert_allclose(found["clip"][number], expected.clip[0], **tolerance)
        np.testing.assert_allclose(found["frames"][first:last], expected.frames[0], **tolerance)
        np.testing.assert_allclose(found["tokens"][first:last], expected.tokens[0], **tolerance)
    assert len(found["frames"]) == found["offsets"][-1]

    with open(tmp_path / "x.rejected.csv", newline="") as file:
        rejected = {os.path.basename(row["path"])[0]: row["reason"] for row in csv.DictReader(file)}
    reasons = {
        "c": "no samples",
        "d": "too short: 1 samples",
        "e": "NaN",
        "f": "not audio",
        "h": "truncated",
        "m": "no such file",
    }
    assert rejected.keys() == reasons.keys()
    for letter, reason in reasons.items():
        assert reason in rejected[letter]

    parquet = pytest.importorskip("pyarrow.parquet")
    assert run(embed_module, tmp_path / "all.csv", *options, "--out", tmp_path / "x.parquet", "--strict") == 1
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table["path"].to_pylist() == found["path"].tolist()
    np.testing.assert_array_equal(np.array(table["clip"].to_pylist(), np.float32), found["clip"])
    for name in ("frames", "tokens"):
        rows = np.concatenate([np.array(rows, np.float32) for rows in table[name].to_pylist()])
        np.testing.assert_array_equal(rows.reshape(found[name].shape), found[name])
    assert {path.name for path in tmp_path.iterdir()} == {"audio", "all.csv", "x.npz", "x.parquet", "x.rejected.csv"}


def test_embed_options_and_mistakes(audio, models, tmp_path):
    model = models / "pretrained.safetensors"
    good = audio / "a, short.wav"
    for name, options in {"layer": ("--layer", "0"), "window": ("--window", "0.3"), "padding": ("--padding",)}.items():
        assert run(embed_module, good, "--model", model, "--out", tmp_path / f"{name}.npz", *options) == 0
    samples, _ = soundfile.read(good)
    at_zero = embed_waves(load_model(model), samples, RATE, layer=0).clip[0]
    np.testing.assert_allclose(np.load(tmp_path / "layer.npz")["clip"][0], at_zero, **TOLERANCE)
    fitted = embed_waves(load_model(model, input_frames=30), samples, RATE).clip[0]
    np.testing.assert_allclose(np.load(tmp_path / "window.npz")["clip"][0], fitted, **TOLERANCE)

    def refused(message, *arguments, out="new.npz"):
        (tmp_path / "new.rejected.csv").unlink(missing_ok=True)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        with pytest.raises(UserError, match=message):
            run(embed_module, *arguments, "--model", model, "--out", tmp_path / out)
        after = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != "new.rejected.csv"}
        assert after == before

    refused("is there already", good, out="layer.npz")
    refused("ends in .npz or .parquet", good, out="x.csv")
    refused("there is no folder", good, out="no/x.npz")
    refused("no such file", tmp_path / "nothing")
    refused("layer must be", good, "--layer", "9")
    refused("hop must be", good, "--hop", "-1")
    refused("--device nonsense", good, "--device", "nonsense")
    refused("--window -1", good, "--window=-1")
    for name in ("new.npz", "new.parquet"):
        refused(
            "none of 2 recordings can be used, see .*new.rejected.csv; the first: ",
            *sorted(audio.glob("[cd]*")),
            out=name,
        )


def test_order_and_workers(tmp_path):
    """As many streams as recordings, each the right one, whatever the number of processes, and if some are not read to
    the end.
    """
    for number in range(7):
        soundfile.write(tmp_path / f"{number}.wav", np.full(40_000, number, np.int16), RATE)
    (tmp_path / "3.wav").write_bytes(b"RIFF, but no more")
    recordings = sound.find_recordings([str(tmp_path), str(tmp_path / "2.wav")])  # named twice
    for workers in (1, 3):
        heard = []
        for number, blocks in enumerate(sound.read_recordings(recordings, RATE, workers=workers)):
            try:
                first = next(blocks)
                if number != 1:
                    assert len(first) + sum(map(len, blocks)) == 40_000
                heard.append(int(first[0]))
            except sound.UnreadableError:
                heard.append(-1)
        assert heard == [0, 1, 2, -1, 4, 5, 6]


@pytest.mark.parametrize(
    ("act", "reason"), [(signal.SIGKILL, "decoder crashed .SIGKILL"), (signal.SIGSTOP, "took longer than 1 s")]
)
def test_a_crash_or_a_hang_costs_one_recording(tmp_path, act, reason, monkeypatch):
    for number in range(4):
        # more than a pipe holds
        soundfile.write(tmp_path / f"{number}.wav", np.full(2_000_000, number, np.int16), RATE)
    started = []

    class Watched(sound.Worker):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            started.append(self.process)

    monkeypatch.setattr(sound, "Worker", Watched)
    heard = []
    for number, blocks in enumerate(sound.read_recordings(sound.find_recordings([str(tmp_path)]), RATE, timeout_s=1.0)):
        try:
            next(blocks)
            if number == 1:
                os.kill(started[-1].pid, act)
            heard.append(sum(map(len, blocks)) > 1_000_000)
        except sound.UnreadableError as error:
            heard.append(str(error))
    assert heard[0] is heard[2] is heard[3] is True
    assert re.match(reason, heard[1])
    assert all(process.poll() is not None for process in started)


def test_the_decoders_do_without_torch(tmp_path):
    soundfile.write(tmp_path / "a.wav", wave(), RATE)
    code = "import sys, runpy; sys.argv = ['sound.py', '{\"sample_rate\": 16000, \"memory\": 4294967296}']\n"
    code += f"runpy.run_path({sound.__file__!r}, run_name='__main__')\nprint('torch' in sys.modules, file=sys.stderr)"
    job = json.dumps([str(tmp_path / "a.wav"), -1, (tmp_path / "a.wav").stat().st_size])
    done = subprocess.run([sys.executable, "-c", code], input=job + "\n", capture_output=True, text=True, check=True)
    assert done.stderr.strip().endswith("False") and '"end": true' in done.stdout


@pytest.mark.slow
def test_an_hour_in_bounded_memory(tmp_path):
    """What the peak of a process grows by from five minutes of sound to an hour, with all that is written of it."""
    model = build_model(ModelConfig(width=32, depth=1, heads=1, num_mel_bins=16, input_frames=1024), seed=1)
    model.card = ModelCard(sample_rate=8000)  # half the work
    save_model(model, tmp_path / "model.safetensors")
    block = wave("middle", seconds=60.0, rate=8000)
    for name, minutes in (("hour.wav", 60), ("short.wav", 5)):
        with soundfile.SoundFile(tmp_path / name, "w", 8000, 1, "PCM_16") as file:
            for _ in range(minutes):
                file.write(block)
    code = """if True:
        import resource, sys
        from ssast.engine.inference.embed import main
        folder = sys.argv[1]
        for name in ("short", "hour"):
            options = ["--tokens", "--hop", "10.24", "--device", "cpu", "--batch-size", "4"]
            options += ["--model", f"{folder}/model.safetensors", "--out", f"{folder}/{name}.npz"]
            main([f"{folder}/{name}.wav", *options])
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True, env=env)
    short, hour = (int(line) / 1024 for line in done.stdout.splitlines() if line.isdigit())
    found, shorter = np.load(tmp_path / "hour.npz"), np.load(tmp_path / "short.npz")
    assert found["seconds"].tolist() == [3600.0] and found["tokens"].shape == (22_500, 1, 32)
    np.testing.assert_allclose(found["clip"], shorter["clip"], atol=0.05)
    assert hour - short < 40  # MiB; the samples alone are 55, as float 110


def test_prepared_folders_are_the_files_they_were_made_of(classes, models, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare(
            Settings([str(classes)], layout="plain", max_length=3600.0), tmp_path / "shards", workers=1, progress=False
        )
    options = ("--model", models / "pretrained.safetensors", "--out")
    assert run(embed_module, tmp_path / "shards", *options, tmp_path / "shards.npz") == 0
    assert run(embed_module, classes, *options, tmp_path / "files.npz") == 0
    shards, files = np.load(tmp_path / "shards.npz"), np.load(tmp_path / "files.npz")
    assert sorted(shards["path"]) == files["path"].tolist() and len(files["path"]) == 36
    np.testing.assert_allclose(shards["clip"][np.argsort(shards["path"])], files["clip"], **TOLERANCE)


def test_predict(audio, models, tmp_path, capsys):
    model = load_model(models / "tuned.safetensors")
    long = audio / "g long.wav"
    options = (long, audio / "c empty.wav", "--model", models / "tuned.safetensors")
    assert run(predict, *options, "--out", tmp_path / "x.json", "--top", 2) == 0
    shown = capsys.readouterr()
    assert "c empty.wav: no samples" in shown.err
    expected = predict_waves(model, soundfile.read(long)[0], RATE)
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [(row["label"], row["start"], row["end"]) for row in rows] == [
        (label, 0, 3) for label, _ in expected.top(2)[0]
    ]
    assert [row["probability"] for row in rows] == pytest.approx([value for _, value in expected.top(2)[0]], abs=1e-4)
    assert rows[0]["label"] in shown.out and f"{rows[0]['probability']:.1%}" in shown.out

    assert run(predict, *options, "--out", tmp_path / "x.csv", "--timeline", "0.5", "--strict") == 1
    with open(tmp_path / "x.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = predict_waves(model, soundfile.read(long)[0], RATE, hop=0.5)
    assert [float(row["start"]) for row in rows] == pytest.approx(expected.times[0][:, 0].tolist(), abs=1e-4)
    assert [float(row["probability"]) for row in rows] == pytest.approx(
        expected.windows[0].amax(dim=1).tolist(), abs=1e-4
    )
    assert float(rows[-1]["end"]) == pytest.approx(3.0, abs=0.03) and len(rows) == 6

    for message, arguments in {
        "fine-tune it first": (long, "--model", models / "pretrained.safetensors"),
        "is there already": (*options, "--out", tmp_path / "x.csv"),
        "ends in .csv or .json": (*options, "--out", tmp_path / "x.txt"),
        "hop must be": (*options, "--timeline", "99"),
        "expected at least 1": (*options, "--top", "-2"),
        "none of 1 recordings": (audio / "c empty.wav", *options[2:]),
    }.items():
        with pytest.raises(UserError, match=message):
            run(predict, *arguments)


def test_a_folder_of_classes_is_enough_to_probe(classes, models, tmp_path, capsys):
    assert (
        run(
            evaluate,
            models / "pretrained.safetensors",
            "--data",
            classes,
            "--probe",
            "knn",
            "linear",
            "--out",
            tmp_path / "o",
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "5 folds made by recording" in shown and shown.count("36 clips, chance 33.3%") == 2
    for probe in ("knn", "linear"):
        results = json.loads((tmp_path / "o" / probe / "metrics.json").read_text())["results"]
        assert len(results) == 5 and np.mean([result["accuracy"] for result in results]) > 0.9
        with open(tmp_path / "o" / probe / "predictions.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len({row["path"] for row in rows}) == 36 and all(f"/{row['target']}/" in row["path"] for row in rows)


def manifest(path, rows, header=("path", "label", "split")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_labels_that_mean_nothing_are_not_learned(classes, models, tmp_path):
    """The control of the probe: a leak from the test part would show here."""
    files = sorted(classes.glob("*/*.wav"))
    labels = np.random.default_rng(5).permutation([number % 3 for number in range(len(files))])
    data = manifest(tmp_path / "x.csv", [(file, f"l{label}", "") for file, label in zip(files, labels, strict=True)])
    assert (
        run(
            evaluate,
            models / "pretrained.safetensors",
            "--data",
            data,
            "--probe",
            "knn",
            "linear",
            "--out",
            tmp_path / "o",
        )
        == 0
    )
    for probe in ("knn", "linear"):
        results = json.loads((tmp_path / "o" / probe / "metrics.json").read_text())["results"]
        assert np.mean([result["accuracy"] for result in results]) < 0.62  # 1/3, and more than three deviations


def test_what_is_tested_on(classes, models, tmp_path, capsys):
    files = sorted(classes.glob("*/*.wav"))
    splits = ["train", "train", "test", "valid"]
    rows = [(file, file.parent.name, splits[number % 4], number % 3) for number, file in enumerate(files)]
    data = manifest(tmp_path / "x.csv", rows, ("path", "label", "split", "fold"))
    model = models / "pretrained.safetensors"

    def told(*options):
        assert run(evaluate, model, "--data", data, "--probe", "knn", *options) == 0
        return capsys.readouterr().out

    assert re.search("on the test split(.|\n)* 9 clips, chance 33.3%", told())
    assert re.search("on fold 2 of its own 3 folds(.|\n)* 12 clips, chance 33.3%", told("--fold", "2"))
    assert re.search("4 folds made by recording(.|\n)* 36 clips, chance 33.3%", told("--folds", "4"))
    data = manifest(tmp_path / "y.csv", [(*row[:2], "", row[3]) for row in rows], ("path", "label", "split", "fold"))
    assert "its own 3 folds" in told()


def test_a_fine_tuned_model_is_measured_by_its_own_answers(classes, models, tmp_path, capsys):
    tuned = models / "tuned.safetensors"
    assert run(evaluate, tuned, "--data", classes, "--out", tmp_path / "o") == 0
    files = sorted(classes.glob("*/*.wav"))
    answers = predict_waves(load_model(tuned), [soundfile.read(file)[0] for file in files], RATE).probabilities.argmax(
        dim=1
    )
    right = np.mean([CLASSES[answer] == file.parent.name for answer, file in zip(answers.tolist(), files, strict=True)])
    result = json.loads((tmp_path / "o" / "metrics.json").read_text())["results"][0]
    assert result["accuracy"] == pytest.approx(right) and result["clips"] == 36
    assert f"accuracy {right:.1%}, 36 clips" in capsys.readouterr().out


def test_evaluate_refuses_what_would_mean_nothing(classes, models, tmp_path):
    files = sorted(classes.glob("*/*.wav"))
    pretrained, tuned = models / "pretrained.safetensors", models / "tuned.safetensors"
    flat = tmp_path / "flat"
    flat.mkdir()
    soundfile.write(flat / "a.wav", wave(), RATE)
    one_class = manifest(tmp_path / "one.csv", [(file, "same", "") for file in files])
    unseen = manifest(
        tmp_path / "unseen.csv", [(file, file.parent.name, "test" if "low" in str(file) else "train") for file in files]
    )
    twice = manifest(tmp_path / "twice.csv", [(files[0], "a", "train"), (files[0], "b", "test")])
    several = manifest(tmp_path / "several.csv", [(file, "low,high", "") for file in files])
    foreign = manifest(tmp_path / "foreign.csv", [(file, "whale", "test") for file in files])
    for message, arguments in {
        "sub-folder for each class": (pretrained, "--data", flat, "--probe", "knn"),
        "one class": (pretrained, "--data", one_class, "--probe", "knn"),
        "no training clip has": (pretrained, "--data", unseen, "--probe", "knn"),
        "different labels": (pretrained, "--data", twice, "--probe", "knn"),
        "several labels, .* but the task": (pretrained, "--data", several, "--probe", "knn"),
        "there is no fold 9": (pretrained, "--data", classes, "--probe", "knn", "--folds", "3", "--fold", "9"),
        "fine-tune it first": (pretrained, "--data", classes),
        "knows no class 'whale'": (tuned, "--data", foreign),
        "several labels, but the model": (tuned, "--data", several),
        "no clip is marked test": (tuned, "--data", manifest(tmp_path / "t.csv", [(files[0], "low", "train")])),
    }.items():
        with pytest.raises(UserError, match=message):
            run(evaluate, *arguments)


def test_several_labels_a_clip(classes, models, tmp_path, capsys):
    files = sorted(classes.glob("*/*.wav"))
    rows = [(file, file.parent.name + (",loud" if number % 2 else ""), "") for number, file in enumerate(files)]
    data = manifest(tmp_path / "x.csv", rows)
    assert (
        run(
            evaluate,
            models / "pretrained.safetensors",
            "--data",
            data,
            "--probe",
            "knn",
            "linear",
            "--multi-label",
            "--fold",
            "1",
        )
        == 0
    )
    assert len(re.findall("mAP [0-9.]+%, 8 clips", capsys.readouterr().out)) == 2


def test_real_audio_of_all_kinds(real_audio, models, tmp_path):
    """Every file is either embedded, to finite numbers, or listed with a reason."""
    sources = [real_audio / "messy", real_audio / "corrupt", real_audio / "music_misc"]
    assert (
        run(
            embed_module,
            *sources,
            "--model",
            models / "pretrained.safetensors",
            "--out",
            tmp_path / "x.npz",
            "--workers",
            2,
        )
        == 0
    )
    found = np.load(tmp_path / "x.npz")
    with open(tmp_path / "x.rejected.csv", newline="") as file:
        rejected = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    named = [recording.source for recording in sound.find_recordings([str(source) for source in sources])]
    assert sorted([*found["path"].tolist(), *rejected]) == sorted(named)
    assert np.isfinite(found["clip"]).all() and len(found["clip"]) > 130
    expected = {}
    for name in ("messy", "corrupt"):
        with open(real_audio / "manifests" / f"{name}.csv", newline="") as file:
            expected |= {str(real_audio / row["path"]): row["expect"] for row in csv.DictReader(file)}
    embedded = [path for path in found["path"] if expected.get(path) in ("reject", "reject cleanly")]
    # FFmpeg finds the rate of this one in the frames
    assert [os.path.basename(path) for path in embedded] == ["rate_zero.flac"]
    assert all(reason.startswith("too short:") for path, reason in rejected.items() if expected.get(path) == "decode")
