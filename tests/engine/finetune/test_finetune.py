"""`ssast finetune` as a whole: every recipe on a small tree of its data set, resuming, comparing, choosing weights, and
mistakes.
"""

import csv
import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from ssast.engine import load_model
from ssast.engine.config import list_presets, load_config
from ssast.engine.data.order import WeightedOrder
from ssast.engine.finetune import finetune_report, pictures, run
from ssast.engine.finetune.config import FinetuneConfig
from ssast.engine.finetune.dataset import _balancing, open_task, read_task
from ssast.engine.finetune.finetune_report import write_summary
from ssast.engine.finetune.objective import FineTuning, classification_loss
from ssast.engine.finetune.results import RESULTS_FILE
from ssast.engine.model.adapt import build_model, resize_position
from ssast.engine.model.config import ModelConfig
from ssast.engine.model.weights import save_model
from ssast.engine.training.runlog import read_rows
from ssast.engine.training.schedule import Schedule
from ssast.kernels import fbank

SECONDS, FRAMES = 0.3, 32  # of clips, which fit whole into the input
SMALL = (
    f"model.size=tiny model.depth=1 model.input_frames={FRAMES} deepspeed.train_batch_size=4 data.num_threads=1 "
    "train.log_every=1"
)
FP32, PLAIN = "deepspeed.bf16.enabled=false", "step.engine=ddp"
PICTURE = bytes.fromhex("89504e470d0a1a0a")  # the start of a PNG


@pytest.fixture(scope="module", autouse=True)
def one_process_group():
    """Commands of this file run in this process, one after another, in a group that the first of them makes."""
    kept = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(kept)


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes longer than such training; those who leave this out see that it is done."""
    monkeypatch.setattr(pictures, "_save", lambda figure, path: (path.write_bytes(PICTURE), path)[1])


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def finetune(tmp_path, cache):
    """Runs a command into tmp_path/runs and returns its exit status; settings are texts of several, split at blanks."""

    def command(task: str, *settings: str) -> int:
        given = [part for text in settings for part in text.split()]
        options = [part for part in given if part.startswith("-")]
        at = given.index(options[0]) if options else len(given)
        places = [f"run.folder={tmp_path / 'runs'}", f"data.cache_dir={cache}"]
        return run.main([task, *places, *SMALL.split(), *given[:at], *given[at:]])

    return command


def tone(path: Path, number: int, seconds: float = SECONDS) -> Path:
    """A clip that no other number has: a tone in noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).standard_normal(round(seconds * 16000))
    sound = 0.3 * np.sin(np.arange(len(noise)) * 0.02 * (1 + number % 7)) + 0.05 * noise
    soundfile.write(path, sound.clip(-1, 1), 16000, subtype="PCM_16")
    return path


def write_csv(path: Path, rows: list[tuple], header: str = "path,label") -> Path:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header.split(","), *rows])
    path.write_text(text.getvalue(), encoding="utf-8")
    return path


def tones(folder: Path, classes: int = 3, each: int = 6, tests: int = 2) -> Path:
    """A CSV of path, label and split: so many clips a class, the last of them for test."""
    rows = []
    for label in range(classes):
        for number in range(each):
            path = tone(folder / f"{label}-{number}.wav", 7 * number + label)
            rows.append((path.name, f"class {label}", "test" if number >= each - tests else "train"))
    return write_csv(folder / "clips.csv", rows, "path,label,split")


def weights(path: Path, **changes) -> Path:
    """Of a pretraining model."""
    config = {"width": 192, "heads": 3, "depth": 2, "input_frames": 64, **changes}
    save_model(build_model(ModelConfig(**config), seed=3), path)
    return path


def results(folder: Path) -> dict:
    return json.loads((folder / RESULTS_FILE).read_text(), parse_constant=pytest.fail)


def table(folder: Path) -> list[dict]:
    with open(folder / "results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def predictions(folder: Path) -> list[dict]:
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def steps(folder: Path) -> list[tuple]:
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    return [(row["step"], row["loss"], row["lr"], row["grad_norm"]) for row in rows]


# ---- recipes ---------------------------------------------------------------------------------------------------------

TEN_WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")


def esc50(root: Path) -> dict[str, set[str]]:
    rows = []
    for fold in range(1, 6):
        for label, name in enumerate(("dog", "rain")):
            for take in range(2):
                file = f"{fold}-{fold}{label}{take}-A-{label}.wav"
                tone(root / "audio" / file, 10 * fold + 3 * label + take)
                rows.append((file, fold, label, name))
    (root / "meta").mkdir()
    write_csv(root / "meta" / "esc50.csv", rows, "filename,fold,target,category")
    return {str(fold): {str(root / "audio" / row[0]) for row in rows if row[1] == fold} for fold in range(1, 6)}


def audioset(root: Path) -> dict[str, set[str]]:
    mids, names = ("/m/1", "/m/2", "/m/3"), ("Speech", "Dog, barking", "Music")
    write_csv(
        root / "class_labels_indices.csv", list(zip(range(3), mids, names, strict=True)), "index,mid,display_name"
    )
    tested = set()
    for split, count in (("balanced_train", 12), ("eval", 5)):
        lines = ["# YTID, start_seconds, end_seconds, positive_labels"]
        for number in range(count):
            name = f"{split[:4]}{number:07d}"
            path = tone(root / split / f"Y{name}.wav", number + 50 * (split == "eval"))
            labels = {mids[number % 3], mids[number % 2]}
            lines.append(f'{name}, 0.000, 10.000, "{",".join(sorted(labels))}"')
            tested |= {str(path)} if split == "eval" else set()
        (root / f"{split}_segments.csv").write_text("\n".join(lines) + "\n")
    return {"": tested}


def speech_commands(root: Path, words: tuple[str, ...] = ("yes", "no", "tree")) -> dict[str, set[str]]:
    lists: dict[str, list[str]] = {"train": [], "validation": [], "testing": []}
    for number, word in enumerate(words):
        for speaker, split in enumerate(("train", "train", "validation", "testing")):
            name = f"{word}/{speaker}{speaker}_nohash_0.wav"
            tone(root / name, 5 * number + speaker)
            lists[split].append(name)
    for split in ("validation", "testing"):
        (root / f"{split}_list.txt").write_text("".join(f"{name}\n" for name in lists[split]))
    tone(root / "_background_noise_" / "hum.wav", 99, seconds=6.0)
    return {"": {str(root / name) for name in lists["testing"]}}


def speech_commands_12(root: Path) -> dict[str, set[str]]:
    """With the test set in an archive of its own."""
    speech_commands(root / "train", (*TEN_WORDS, "bed", "tree"))
    labels = (*TEN_WORDS, "_unknown_", "_silence_")
    return {"": {str(tone(root / "test" / label / "a_nohash_0.wav", 300 + n)) for n, label in enumerate(labels)}}


def voxceleb1(root: Path) -> dict[str, set[str]]:
    lines, tested = [], set()
    for speaker in range(3):
        for take, split in enumerate((1, 1, 2, 3)):
            name = f"id1000{speaker}/vid{take}/00001.wav"
            path = tone(root / "wav" / name, 9 * speaker + take)
            lines.append(f"{split} {name}\n")
            tested |= {str(path)} if split == 3 else set()
    (root / "iden_split.txt").write_text("".join(lines))
    return {"": tested}


def iemocap(root: Path) -> dict[str, set[str]]:
    folds: dict[str, set[str]] = {}
    for session in range(1, 6):
        lines = []
        for gender in "FM":
            for number, emotion in enumerate(("neu", "exc", "sad", "ang", "xxx")):
                turn = f"Ses0{session}{gender}_impro01_{gender}00{number}"
                path = root / f"Session{session}/sentences/wav/Ses0{session}{gender}_impro01/{turn}.wav"
                tone(path, 20 * session + 2 * number + (gender == "F"))
                lines.append((gender, f"[{number}.2901 - {number}.8357]\t{turn}\t{emotion}\t[2.5, 2.5, 2.5]\n"))
                if emotion != "xxx":
                    folds.setdefault(str(session), set()).add(str(path))
        folder = root / f"Session{session}/dialog/EmoEvaluation"
        folder.mkdir(parents=True)
        for gender in "FM":
            (folder / f"Ses0{session}{gender}_impro01.txt").write_text(
                "".join(line for who, line in lines if who == gender)
            )
    return folds


def custom(root: Path) -> dict[str, set[str]]:
    tones(root)
    return {"": {str(root / f"{label}-{number}.wav") for label in range(3) for number in (4, 5)}}


TREES = {
    "esc50": (esc50, "", ["dog", "rain"]),
    "audioset": (audioset, "task.labels={root}/class_labels_indices.csv", ["Speech", "Dog, barking", "Music"]),
    "speech-commands-v2": (speech_commands, "", ["no", "tree", "yes"]),
    "speech-commands-v1": (
        speech_commands_12,
        "data.train={root}/train data.test={root}/test",
        sorted([*TEN_WORDS, "_unknown_", "_silence_"]),
    ),
    "voxceleb1": (voxceleb1, "", ["id10000", "id10001", "id10002"]),
    "iemocap": (iemocap, "", ["ang", "hap", "neu", "sad"]),
    "custom": (custom, "data.train={root}/clips.csv", ["class 0", "class 1", "class 2"]),
}
STEPS = "train.steps=2 train.valid_every=2 train.checkpoint_every=2"
MASKS = "augment.time_mask=16"
AVERAGE = "train.epochs=2 task.average_from=1"
EPOCH = "train.epochs=1"
# recipe: settings that make it small. DeepSpeed and plain PyTorch, bf16 (the recipes' own) and fp32 both come up.
RECIPES = {
    "audioset-20k": f"{AVERAGE} {MASKS}",
    "audioset-20k-frame": f"{AVERAGE} {MASKS} {PLAIN} {FP32}",
    "audioset-2m": f"{AVERAGE} {MASKS} {PLAIN} data.valid_fraction=0.1",
    "custom": f"{EPOCH} {MASKS} {PLAIN} {FP32}",
    "esc50": f"{EPOCH} {MASKS} {PLAIN} {FP32}",
    "esc50-frame": f"{EPOCH} {MASKS} task.fold=3",
    "iemocap": f"{STEPS} {PLAIN} {FP32} task.fold=2",
    "iemocap-frame": f"{STEPS} {PLAIN} task.fold=5",
    "speech-commands-v1-12": f"{STEPS} {PLAIN} {FP32}",
    "speech-commands-v1-12-frame": f"{STEPS} {PLAIN}",
    "speech-commands-v2-35": f"{EPOCH} {MASKS} {PLAIN}",
    "speech-commands-v2-35-frame": f"{EPOCH} {MASKS} {PLAIN} {FP32}",
    "voxceleb1": f"{STEPS} {PLAIN} {FP32}",
    "voxceleb1-frame": f"{STEPS} {PLAIN}",
}
DRAWN = ("custom", "audioset-20k-frame")  # with pictures, which take longer than the rest


def test_every_recipe_is_tested():
    assert sorted(RECIPES) == list_presets(FinetuneConfig)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_from_end_to_end(recipe, tmp_path, finetune, request):
    if recipe not in DRAWN:
        request.getfixturevalue("no_pictures")
    build, settings, labels = next(tree for name, tree in TREES.items() if recipe.startswith(name))
    config = load_config(recipe, [], FinetuneConfig)
    root = tmp_path / "data"
    root.mkdir()
    tested = build(root)
    settings = f"{RECIPES[recipe]} {settings.format(root=root)}"
    if "data.train" not in settings:
        settings += f" data.train={root}"
    assert finetune(recipe, settings) == 0

    top = tmp_path / "runs" / recipe
    folds = re.findall(r"task\.fold=(\d)", settings) or sorted(tested)
    assert (top / "report.html").stat().st_size > 3000
    assert ("| *the paper: " in (top / "results.md").read_text()) == bool(config.paper)
    assert sorted(row["fold"] for row in table(top)) == folds
    for fold in folds:
        folder = top / f"fold-{fold}" if len(folds) > 1 else top
        found, rows = results(folder), predictions(folder)
        assert (folder / "classes.png").read_bytes().startswith(PICTURE)
        assert (folder / "confusion.png").is_file() == (not config.task.multi_label)
        assert {row["path"] for row in rows} == tested[fold] and len(rows) == len(tested[fold]) == found["clips"][
            "test"
        ]
        model = load_model(folder)
        assert list(model.card.labels) == labels and model.config.num_classes == len(labels)
        scores = np.array([[float(row[label]) for label in labels] for row in rows])
        precise = FP32 in settings
        expected = probabilities(model, [row["path"] for row in rows])
        assert scores == pytest.approx(expected, abs=1e-4 if precise else 2e-2)
        assert (scores.sum(axis=1) == pytest.approx(1, abs=1e-4)) == (not model.card.multi_label)
        if not model.card.multi_label:
            assert found["metrics"]["accuracy"] == pytest.approx(
                np.mean([row["target"] == row["answer"] for row in rows])
            )
        assert ("average of 2 epochs" in found["weights"]) == (config.task.select == "average")


def probabilities(model, paths: list[str]) -> np.ndarray:
    """What the model says, by a way of its own from the files on."""
    samples = [torch.from_numpy(soundfile.read(path, dtype="int16")[0]) for path in paths]
    config, card = model.config, model.card
    waveform = torch.nn.utils.rnn.pad_sequence(
        [each[: 16000 * SECONDS.__ceil__()] for each in samples], batch_first=True
    )
    features = fbank(
        waveform,
        sample_rate=card.sample_rate,
        num_mel_bins=config.num_mel_bins,
        lengths=torch.tensor([len(each) for each in samples]),
        num_frames=config.input_frames,
        mean=card.mean,
        std=card.std,
    )
    with torch.no_grad():
        logits = model.classify(features)
    return (logits.sigmoid() if card.multi_label else logits.softmax(dim=1)).numpy()


def test_splits_are_those_of_the_data_set(tmp_path, cache):
    """Training and validation, too; the tests above look at what is tested on."""
    marks = {}
    for recipe in ("speech-commands-v2-35", "speech-commands-v1-12", "voxceleb1", "iemocap", "esc50"):
        build, settings, _ = next(tree for name, tree in TREES.items() if recipe.startswith(name))
        root = tmp_path / recipe
        root.mkdir()
        build(root)
        given = settings.format(root=root) or f"data.train={root}"
        fold = {"iemocap": ["task.fold=2"], "esc50": ["task.fold=2"]}.get(recipe, [])
        config = load_config(
            recipe, [*given.split(), f"data.cache_dir={cache}", "model.input_frames=32", *fold, MASKS], FinetuneConfig
        )
        data = open_task(config, read_task(config))
        marks[recipe] = [
            [str(Path(path).relative_to(root)) for path in part.sources if str(root) in path]
            for part in (data.train, data.valid)
        ]
        assert not set(marks[recipe][0]) & {os.path.relpath(path, root) for path in data.test.sources}
        if recipe == "speech-commands-v1-12":
            silence = {Path(path).name for path in data.train.sources if str(cache) in path}
            assert silence == {"hum_train_000.wav"} and any(
                "left out: data.test names others" in text for text in data.remarks
            )
            assert data.draw_weights is not None
    train, valid = marks["speech-commands-v2-35"]
    assert {Path(name).name[:2] for name in train} == {"00", "11"} and {Path(name).name[:2] for name in valid} == {"22"}
    train, valid = marks["voxceleb1"]
    assert {name.split("/")[2] for name in train} == {"vid0", "vid1"} and {name.split("/")[2] for name in valid} == {
        "vid2"
    }
    train, valid = ({re.search(r"Ses0\d[FM]", name)[0] for name in part} for part in marks["iemocap"])
    assert valid and not train & valid and not {who for who in train | valid if who.startswith("Ses02")}
    train, valid = marks["esc50"]
    assert len(train) == 16 and all(Path(name).name.startswith("2-") for name in valid), (
        "the paper trains on all other folds"
    )


# ---- going on --------------------------------------------------------------------------------------------------------

ALL_ON = "augment.mixup=0.5 augment.freq_mask=24 augment.time_mask=8 augment.noise=true data.balanced=true"


class StopsAfter:
    """A StopRequest that comes after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def asked(self) -> bool:
        self.left -= 1
        return self.left < 0

    def __enter__(self) -> "StopsAfter":
        return self

    def __exit__(self, *details: object) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("engine", ["step.engine=ddp", "step.engine=deepspeed"])
def test_an_interrupted_run_goes_on_to_the_same_bits_and_a_finished_one_is_left_alone(
    engine, tmp_path, finetune, monkeypatch, no_pictures
):
    settings = f"data.train={tones(tmp_path / 'data')} train.epochs=3 task.select=average {ALL_ON} {engine}"
    assert finetune("custom", settings, "run.name=whole") == 0
    asked = [StopsAfter(4)]
    monkeypatch.setattr(
        "ssast.engine.distributed.launch.StopRequest", lambda: asked.pop() if asked else StopsAfter(10**9)
    )
    assert finetune("custom", settings, "run.name=parts") == 128 + signal.SIGTERM
    whole, parts = tmp_path / "runs" / "whole", tmp_path / "runs" / "parts"
    assert 0 < len(steps(parts)) < len(steps(whole)) and not (parts / RESULTS_FILE).exists()
    assert finetune("custom", settings, "run.name=parts") == 0
    assert steps(parts) == steps(whole)
    assert steps(whole)[-1][1] != steps(whole)[0][1]
    assert (parts / "predictions.csv").read_text() == (whole / "predictions.csv").read_text()
    ours, theirs = load_file(parts / "model.safetensors"), load_file(whole / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    if "deepspeed" in engine:
        return
    before = {path: path.stat().st_mtime_ns for path in parts.iterdir() if path.is_file()}
    assert finetune("custom", settings, "run.name=parts --seeds 2") == 0
    after = {path: path.stat().st_mtime_ns for path in before}
    again = {path.name for path in before if before[path] != after[path]}
    assert again <= {"results.csv", "results.md", "report.html", "learning.png", ".lock"}, again
    assert [row["seed"] for row in table(parts)] == ["0", "1"]
    assert steps(parts / "seed-1")[0][1] != steps(parts)[0][1]


def test_more_steps_go_on_and_fewer_are_refused(tmp_path, finetune, capsys, no_pictures):
    settings = (
        f"data.train={tones(tmp_path / 'data')} train.epochs=null {PLAIN} {MASKS} train.schedule=constant "
        "train.warmup_steps=0"
    )
    assert finetune("custom", settings, "train.steps=2") == 0
    assert finetune("custom", settings, "train.steps=4") == 0
    folder = tmp_path / "runs" / "custom"
    assert results(folder)["steps"] == 4 and [step for step, *_ in steps(folder)] == [1, 2, 3, 4]
    assert finetune("custom", settings, "train.steps=3") == 2
    assert "finished run of 4 steps, not 3" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_see_and_learn_what_one_does(tmp_path, cache, finetune, no_pictures):
    """In fp32, without mixup, whose partner is one of the micro-batch. With weighted layers the final norm learns
    nothing.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    settings = (
        f"data.train={tones(tmp_path / 'data')} train.epochs=2 {ALL_ON} augment.mixup=0 {PLAIN} {FP32} "
        "model.layer_weights=true"
    )
    places = [f"run.folder={tmp_path / 'runs'}", f"data.cache_dir={cache}", "run.name=two"]
    command = ["custom", *places, *SMALL.split(), *settings.split(), "deepspeed.train_batch_size=4"]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "ssast.engine.finetune.run", *command],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert finetune("custom", settings, "run.name=one deepspeed.train_micro_batch_size_per_gpu=2") == 0
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)[-4000:]
    one, two = tmp_path / "runs" / "one", tmp_path / "runs" / "two"
    assert len(steps(one)) == 6
    for ours, theirs in zip(steps(one), steps(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    pairs = zip(predictions(one), predictions(two), strict=True)
    for ours, theirs in pairs:
        assert ours["path"] == theirs["path"] and float(ours["class 0"]) == pytest.approx(
            float(theirs["class 0"]), abs=1e-4
        )


# ---- comparing -------------------------------------------------------------------------------------------------------


def test_arms_of_a_comparison_have_equal_budgets_and_the_same_size(tmp_path, finetune, no_pictures, capsys):
    pretrained = weights(tmp_path / "pretrained.safetensors")
    settings = f"data.train={tones(tmp_path / 'data')} train.epochs=1 {MASKS} {PLAIN}"
    # a setting after --compare is still one
    assert finetune("custom", settings, f"--compare scratch=none ssast={pretrained} run.name=arms") == 0
    top = tmp_path / "runs" / "arms"
    scratch, ssast = load_model(top / "scratch"), load_model(top / "ssast")
    assert scratch.config == ssast.config and scratch.config.depth == 2
    rows = table(top)
    assert [(row["arm"], row["init_from"]) for row in rows] == [("scratch", ""), ("ssast", str(pretrained))]
    same = ("steps", "train_clips", "valid_clips", "test_clips", "seed")
    assert [rows[0][name] for name in same] == [rows[1][name] for name in same]
    assert "against scratch" in capsys.readouterr().out or float(rows[0]["accuracy"]) == 0
    before = (top / "ssast" / RESULTS_FILE).stat().st_mtime_ns
    assert (
        finetune("custom", settings, f"--compare scratch=none ssast={pretrained} again={pretrained} run.name=arms") == 0
    )
    assert [row["arm"] for row in table(top)] == ["scratch", "ssast", "again"]
    assert (top / "ssast" / RESULTS_FILE).stat().st_mtime_ns == before


def test_a_bad_arm_is_found_before_any_is_trained(tmp_path, finetune, capsys):
    frame = weights(tmp_path / "frame.safetensors", patch_shape=(128, 2), stride=(128, 2))
    settings = f"data.train={tones(tmp_path / 'data')} {MASKS} model.patch_shape=[16,16]"
    for arm, message in (
        (frame, "take a recipe for 128x2 (NAME-frame)"),
        (tmp_path / "gone", "no such file or folder"),
    ):
        assert finetune("custom", settings, f"--compare scratch=none other={arm}") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "runs" / "custom" / "scratch").exists()
    for options, message in (
        ("--compare a=none a=none", "another arm called a"),
        ("--compare none", "NAME=PATH"),
        ("--seeds 0", "--seeds 0"),
        (f"--from {frame} --compare a=none", "give one of the two"),
    ):
        assert finetune("custom", settings, options) == 2
        assert message in capsys.readouterr().err


def test_figures_of_a_comparison(tmp_path, monkeypatch):
    """By hand: scratch 40, 50, 60 -> 50 ± 10; ssast 70, 80 -> 75 ± 7.07, half as much again; other 50 of one run."""
    monkeypatch.setattr(finetune_report, "write_report", lambda config, folders: config.run_dir / "report.html")
    made = [("scratch", 0.4), ("scratch", 0.5), ("scratch", 0.6), ("ssast", 0.7), ("ssast", 0.8), ("other", 0.5)]
    folders = []
    for number, (arm, value) in enumerate(made):
        folder = tmp_path / "runs" / "esc50" / str(number)
        folder.mkdir(parents=True)
        run_of = {
            "arm": arm,
            "seed": 0,
            "fold": str(number),
            "init_from": None if arm == "scratch" else f"/{arm}",
            "steps": 3,
        }
        run_of |= {"weights": "last", "clips": {"train": 1, "valid": 2, "test": 3}, "metric": "accuracy"}
        run_of |= {"metrics": {"accuracy": value, "macro_f1": None}}
        (folder / RESULTS_FILE).write_text(json.dumps(run_of))
        folders.append(folder)
    config = load_config("esc50", [f"run.folder={tmp_path / 'runs'}"], FinetuneConfig)
    write_summary(config, [*folders, tmp_path / "not yet done"])
    lines = (tmp_path / "runs" / "esc50" / "results.md").read_text().splitlines()
    assert lines[2:5] == [
        "| scratch | scratch | 50.00 | ± 10.00 | 3 |  |",
        "| ssast | `/ssast` | 75.00 | ± 7.07 | 2 | +50.0% |",
        "| other | `/other` | 50.00 |  | 1 | +0.0% |",
    ]
    assert lines[5:] == [
        "| *the paper: scratch* | | *41.9* | | |  |",
        "| *the paper: SSAST 250* | | *86.7* | | | *+106.9%* |",
        "| *the paper: SSAST 400* | | *88.8* | | | *+111.9%* |",
    ]
    rows = table(tmp_path / "runs" / "esc50")
    assert [(row["arm"], float(row["accuracy"]), row["macro_f1"]) for row in rows] == [
        (arm, value, "nan") for arm, value in made
    ]


# ---- what is trained, how, and which weights are tested --------------------------------------------------------------


def test_the_tested_weights_are_the_chosen_ones(tmp_path, finetune, monkeypatch, no_pictures):
    """The first validation is made to look best."""
    settings = (
        f"data.train={tones(tmp_path / 'data')} train.epochs=3 {MASKS} {PLAIN} {FP32} "
        "deepspeed.optimizer.params.lr=1e-3"
    )
    found = {}
    for select in ("average", "best", "last"):
        values = iter((0.9, 0.5, 0.4))
        monkeypatch.setattr(FineTuning, "judge", lambda self, metrics, values=values: ("accuracy", next(values)))
        assert finetune("custom", settings, f"run.name={select} task.select={select} task.average_from=1") == 0
        found[select] = load_file(tmp_path / "runs" / select / "model.safetensors")
    folder = tmp_path / "runs" / "average" / "checkpoints" / "epochs"
    epochs = [load_file(folder / f"{number}.safetensors") for number in (1, 2, 3)]
    for name, value in found["average"].items():
        assert torch.equal(found["best"][name], epochs[0][name]), name
        assert torch.equal(found["last"][name], epochs[2][name]), name
        assert torch.allclose(value, sum(epoch[name].double() for epoch in epochs).float() / 3, atol=1e-7), name
    assert not torch.equal(found["best"]["classifier.1.weight"], found["last"]["classifier.1.weight"])
    chosen = [results(tmp_path / "runs" / select)["weights"] for select in found]
    assert chosen == ["average of 3 epochs, 1 to 3", "best validation accuracy, step 3", "last, step 9"]


@pytest.mark.parametrize(
    "precision",
    [f"{PLAIN} {FP32}", "step.engine=deepspeed", "step.engine=deepspeed deepspeed.zero_optimization.stage=3"],
)
def test_a_probe_leaves_the_encoder_as_it_was_and_learns_to_weigh_layers(precision, tmp_path, finetune, no_pictures):
    pretrained = weights(tmp_path / "pretrained.safetensors", input_frames=FRAMES)
    settings = f"data.train={tones(tmp_path / 'data')} train.epochs=2 {MASKS} {precision} model.train=head"
    settings += " deepspeed.optimizer.params.lr=1e-2"
    assert finetune("custom", settings, f"model.layer_weights=true --from {pretrained}") == 0
    before, after = load_file(pretrained), load_file(tmp_path / "runs" / "custom" / "model.safetensors")
    encoder = [name for name in after if not name.startswith(("classifier", "layer_weights"))]
    assert len(encoder) > 20 and all(torch.equal(before[name], after[name]) for name in encoder)
    assert after["layer_weights"].shape == (3,) and after["layer_weights"].abs().min() > 0
    model = load_model(tmp_path / "runs" / "custom")
    assert model.config.layer_weights and torch.equal(model.layer_weights, after["layer_weights"])
    rows = predictions(tmp_path / "runs" / "custom")
    scores = [float(row["class 1"]) for row in rows]
    expected = probabilities(model, [row["path"] for row in rows])[:, 1]
    assert scores == pytest.approx(expected.tolist(), abs=1e-4 if FP32 in precision else 3e-2)


def test_the_learning_rate_of_the_head_is_a_multiple(tmp_path, finetune, no_pictures):
    """Adam's first step is as long as the learning rate wherever the gradient is not all but zero."""
    pretrained = weights(tmp_path / "pretrained.safetensors", input_frames=FRAMES)
    settings = (
        f"data.train={tones(tmp_path / 'data')} {PLAIN} {FP32} {MASKS} model.init_from={pretrained} "
        "train.head_lr_scale=10"
    )
    optimizer = (
        "deepspeed.optimizer.params.lr=1e-4 deepspeed.optimizer.params.weight_decay=0 train.warmup_steps=0 "
        "task.select=last"
    )
    assert finetune("custom", settings, optimizer, "train.epochs=null train.steps=1 run.seed=0") == 0
    assert (
        finetune("custom", settings, optimizer, "train.epochs=null train.steps=1 run.name=one train.head_lr_scale=1")
        == 0
    )
    before = load_file(pretrained)
    ten, one = (load_file(tmp_path / "runs" / name / "model.safetensors") for name in ("custom", "one"))
    assert (ten["blocks.0.mlp.fc1.weight"] - before["blocks.0.mlp.fc1.weight"]).abs().max().item() == pytest.approx(
        1e-4, rel=0.02
    )
    assert torch.equal(ten["blocks.0.mlp.fc1.weight"], one["blocks.0.mlp.fc1.weight"])
    # both from the same fresh classifier: the steps go the same way, one ten times as far
    assert (ten["classifier.1.weight"] - one["classifier.1.weight"]).abs().median().item() == pytest.approx(
        9e-4, rel=0.02
    )


@pytest.mark.parametrize("recipe", ["esc50", "audioset-20k", "speech-commands-v2-35"])
def test_decay_is_that_of_the_official_scripts(recipe):
    config = load_config(recipe, ["train.epochs=30", "train.warmup_steps=0"], FinetuneConfig)
    train = config.timed(3 * config.deepspeed["train_batch_size"], 1).train
    assert (train.steps, train.steps_per_epoch) == (90, 3)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], lr=2e-4)
    milestones = list(range(train.decay_from, 1000, train.decay_every))
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=train.decay)
    schedule = Schedule(train, 2e-4)
    for epoch in range(30):
        for step in range(3):
            assert schedule.lr(3 * epoch + step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), epoch
        optimizer.step()
        scheduler.step()


def test_a_warm_up_is_short_where_training_is():
    config = load_config("custom", ["train.epochs=30", "deepspeed.train_batch_size=32"], FinetuneConfig)
    assert config.train.warmup_steps == 100
    assert config.timed(40, 1).train.warmup_steps == 6  # of 60 steps
    assert config.timed(32000, 1).train.warmup_steps == 100


def test_balanced_sampling_balances():
    classes = np.repeat([0, 1, 2], [90, 9, 1])
    targets = np.eye(3, dtype=bool)[classes]
    drawn, _ = WeightedOrder(_balancing(targets), seed=1).clips_at(0, 30000)
    shares = np.bincount(classes[drawn], minlength=3) / 30000
    assert shares == pytest.approx([1 / 3] * 3, abs=0.015)
    targets[0] = True  # of several classes: the sum
    assert _balancing(targets)[0] == pytest.approx(1 / 90 + 1 / 10 + 1 / 2)


def test_the_model_that_training_starts_from(tmp_path):
    pretrained = weights(tmp_path / "pretrained.safetensors")
    data = SimpleNamespace(labels=("a", "b", "c"), mean=-1.0, std=2.0)

    def start(*settings: str):
        config = load_config(
            "custom", [f"model.init_from={pretrained}", "model.input_frames=96", MASKS, *settings], FinetuneConfig
        )
        return run.start_model(config, data)

    saved = load_model(pretrained)
    model = start("model.stride=[10,10]", "model.pool=cls")
    assert model.config.stride == (10, 10) and model.config.grid == (12, 9) and saved.config.grid == (8, 4)
    position = {
        name: resize_position(saved.embedding.position, (8, 4), (12, 9), name) for name in ("exact", "official")
    }
    assert torch.equal(model.embedding.position, position["exact"])
    assert torch.equal(
        start("model.stride=[10,10]", "model.position_resize=official").embedding.position, position["official"]
    )
    assert model.card.labels == ("a", "b", "c") and (model.card.mean, model.card.std, model.card.pool) == (
        -1.0,
        2.0,
        "cls",
    )
    features = torch.randn(2, 96, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model.encode(features)
        assert torch.equal(model.classify(features), model.classifier(tokens[:, :2].mean(dim=1)))
        model = start("model.stride=[10,10]")
        assert torch.equal(model.classify(features), model.classifier(tokens[:, 2:].mean(dim=1)))
    assert not torch.equal(start("run.seed=1").classifier[1].weight, model.classifier[1].weight)
    assert torch.equal(start("run.seed=1").blocks[0].mlp.fc1.weight, saved.blocks[0].mlp.fc1.weight)

    # a fine-tuned one with as many classes, which are others, and with a weighing of layers
    with torch.no_grad():
        model.classifier[1].weight.fill_(7.0)
    tuned = run.resize(model, run.dataclasses.replace(model.config, layer_weights=True))
    with torch.no_grad():
        tuned.layer_weights.fill_(3.0)
    save_model(tuned, tmp_path / "tuned.safetensors")
    for layers in (False, True):
        again = start(f"model.init_from={tmp_path / 'tuned.safetensors'}", f"model.layer_weights={layers}")
        assert again.config.num_classes == 3 and again.classifier[1].weight.abs().max() < 1
        assert again.config.layer_weights == layers and (not layers or not again.layer_weights.any())


def test_losses_by_hand():
    logits, targets = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    log = math.log
    cross_entropy = (log(1 + math.exp(-2)) + log(2)) / 2
    binary = (log(1 + math.exp(-2)) + log(2) + log(2) + log(2)) / 4
    assert classification_loss(logits, targets, "ce").item() == pytest.approx(cross_entropy, rel=1e-6)
    assert classification_loss(logits, targets, "bce").item() == pytest.approx(binary, rel=1e-6)


def test_few_clips_a_class(tmp_path, finetune, no_pictures):
    settings = f"data.train={tones(tmp_path / 'data')} train.epochs=1 {MASKS} {PLAIN} task.per_class=2"
    assert finetune("custom", settings) == 0
    assert results(tmp_path / "runs" / "custom")["clips"]["train"] == 6


# ---- mistakes --------------------------------------------------------------------------------------------------------


def mistakes(folder: Path) -> dict[str, tuple[str, str]]:
    """{name: (settings, what the error says)}."""
    good = [tone(folder / f"{number}.wav", number) for number in range(8)]
    broken = folder / "broken.wav"
    broken.write_bytes(b"RIFF")

    def table_of(name: str, rows: list[tuple], header: str = "path,label") -> str:
        return f"data.train={write_csv(folder / f'{name}.csv', rows, header)}"

    labels = ["a", "b"] * 4
    plain = list(zip(good, labels, strict=True))
    folded = [(path, name, 1 + number // 2) for number, (path, name) in enumerate(plain)]
    marked = [(path, name, "test" if number > 5 else "train") for number, (path, name) in enumerate(plain)]
    recordings = [tone(folder / f"{fold}-77-A-{number}.wav", number) for number, fold in enumerate((1, 2, 1, 2))]
    shared = list(zip(recordings, "aabb", "1212", strict=True))
    one = write_csv(folder / "one.csv", plain)
    return {
        "nothing named": ("", "data.train is not set"),
        "no such file": (f"data.train={folder / 'gone.csv'}", "no such file"),
        "no column of labels": (table_of("nolabel", [(path,) for path in good], "path"), "none of 8 clips has a label"),
        "empty labels": (table_of("empty", [(path, "") for path in good]), "none of 8 clips has a label"),
        "no rows": (table_of("norows", []), "lists no audio file"),
        "some without a label, strictly": (
            f"{table_of('some', [*plain[:7], (good[7], '')])} data.strict=true",
            "without a label",
        ),
        "a label that training never sees": (
            table_of(
                "unseen",
                [*((p, n, "train") for p, n in plain[:6]), (good[6], "c", "test"), (good[7], "a", "test")],
                "path,label,split",
            ),
            "no training clip has: 'c'",
        ),
        "a label that is no class": (
            f"{table_of('foreign', plain)} task.labels=[a,c]",
            "labels that are no class: 'b'",
        ),
        "named twice with different labels": (
            table_of("twice", [*plain, (good[0], "b")]),
            "named twice with different labels",
        ),
        "one class only": (table_of("oneclass", [(path, "a") for path in good]), "are of one class"),
        "several labels": (table_of("several", [(good[0], "a,b"), *plain[1:]]), "set multi_label"),
        "more classes than clips": (f"{table_of('many', plain)} task.labels=[a,b,c,d,e,f,g,h,i,j]", "10 classes but"),
        "a class with one clip, over folds": (
            f"{table_of('single', [*plain[:7], (good[7], 'c')])} task.folds=2 data.valid_fraction=0",
            ": validation and test have labels that no training clip has: 'c'",
        ),
        "folds that share a recording": (
            f"{table_of('shared', shared, 'path,label,fold')} task.folds=2 data.valid_fraction=0",
            "share 1 recordings",
        ),
        "other folds than asked for": (
            f"{table_of('folds', folded, 'path,label,fold')} task.folds=5",
            "the clips come in 4 folds",
        ),
        "folds, and a column that says what is tested": (
            f"{table_of('both', marked, 'path,label,split')} task.folds=2",
            "2 folds are asked for, but the clips are split by a column",
        ),
        "folds, and clips named for test": (
            f"data.train={one} task.folds=2 data.test={one}",
            "either folds or named clips",
        ),
        "trained and tested on": (f"data.train={one} data.test={one}", "named for training and for test"),
        "a split of no known spelling": (
            table_of("spelling", [(p, n, "tset") for p, n in plain], "path,label,split"),
            "'tset' is none of",
        ),
        "all files corrupt": (table_of("corrupt", [(broken, "a"), (broken, "a")]), "none of 1 audio files can be used"),
        "an unknown key": (f"data.train={one} train.epoch=3", "did you mean train.epochs?"),
        "an unknown choice": (f"data.train={one} model.pool=max", "model.pool"),
        "a mask wider than the input": (f"data.train={one} augment.time_mask=96", "augment.time_mask: 96 is wider"),
        "validations that miss the ends of epochs": (
            f"data.train={one} task.select=average train.valid_every=5",
            "task.select=average; leave it out",
        ),
        "mixup of one": (f"data.train={one} augment.mixup=0.5 deepspeed.train_batch_size=1", "augment.mixup"),
    }


def test_mistakes_are_one_line_and_leave_nothing_in_the_way(tmp_path, finetune, capsys, no_pictures):
    """All in the same run folder, in which the last command, without a mistake, trains."""
    for name, (settings, message) in mistakes(tmp_path).items():
        status = finetune("custom", MASKS, PLAIN, settings)
        told = capsys.readouterr().err
        assert status == 2 and message in told, (name, status, told)
        assert told.startswith("ssast: ") and told.count("\n") == 1 and "Traceback" not in told, (name, told)
    assert finetune("custum", "data.train=x") == 2
    assert "custum: no such config file, and no preset of that name (audioset-20k," in capsys.readouterr().err
    frame = weights(tmp_path / "frame.safetensors", patch_shape=(128, 2), stride=(128, 2))
    good = f"data.train={tmp_path / 'one.csv'} train.epochs=1 {MASKS} {PLAIN}"
    assert [path.name for path in (tmp_path / "runs" / "custom").iterdir()] in ([], [".lock"])
    assert finetune("custom", good, f"model.patch_shape=[16,16] --from {frame}") == 2
    assert "has patches of 128x2" in capsys.readouterr().err
    assert finetune("custom", good) == 0
    notes = results(tmp_path / "runs" / "custom")["notes"]
    assert any("no clips are marked for test" in note for note in notes)


def test_a_test_clip_that_is_gone_since_the_check_is_left_out_and_told(tmp_path, finetune, monkeypatch, no_pictures):
    prepare = run.prepare_run_dir

    def prepare_and_lose_one(*arguments):
        prepare(*arguments)
        (tmp_path / "data" / "1-5.wav").unlink()

    monkeypatch.setattr(run, "prepare_run_dir", prepare_and_lose_one)
    settings = f"data.train={tones(tmp_path / 'data')} train.epochs=1 {MASKS} {PLAIN} data.max_bad_fraction=1"
    assert finetune("custom", settings) == 0
    found, rows = results(tmp_path / "runs" / "custom"), predictions(tmp_path / "runs" / "custom")
    assert found["clips"]["test"] == len(rows) == 5
    assert "1 test clips could not be read any more" in found["notes"][-1] and "1-5.wav" in found["notes"][-1]


def test_a_table_from_a_spreadsheet(tmp_path, finetune, no_pictures):
    """A byte order mark, quotes, commas in labels, letters beyond ASCII, upper-case columns, repeated rows, and a clip
    without a label.
    """
    rows = ["\ufeffPath,Label,Split"]
    for number in range(12):
        name = f"Größe {number}, “take”.wav"
        tone(tmp_path / name, number)
        rows.append(f'"{name}",{"чай" if number % 2 else "café"},{"test" if number > 8 else ""}')
    rows += [rows[1], f'"{tone(tmp_path / "x.wav", 77).name}",,']
    (tmp_path / "clips.csv").write_text("\r\n".join(rows) + "\r\n", encoding="utf-8")
    assert finetune("custom", f"data.train={tmp_path / 'clips.csv'} train.epochs=1 {MASKS} {PLAIN}") == 0
    folder = tmp_path / "runs" / "custom"
    assert load_model(folder).card.labels == ("café", "чай")
    assert {Path(row["path"]).name for row in predictions(folder)} == {
        f"Größe {number}, “take”.wav" for number in (9, 10, 11)
    }
    notes = " ".join(results(folder)["notes"])
    assert "1 repeated rows left out" in notes and "clips without a label: 1 in train" in notes
