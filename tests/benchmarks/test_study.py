"""The study's bookkeeping: who is trained and tested on what, and the figures of its rows."""

import csv
import json
from pathlib import Path

import pytest

from ssast.benchmarks import study
from ssast.engine.config import load_config
from ssast.engine.errors import UserError
from ssast.engine.finetune.config import FinetuneConfig


@pytest.fixture
def audio(tmp_path):
    (tmp_path / "audio" / "manifests").mkdir(parents=True)
    for name in study.UNLABELED:
        rows = [
            (f"{name}/{number}.wav", "a", "who", split)
            for number, split in enumerate(("train", "valid", "pretrain", "test"))
        ]
        if name in ("speech", "music_misc"):
            rows = rows[2:3]
        with open(tmp_path / "audio" / "manifests" / f"{name}.csv", "w", newline="") as stream:
            csv.writer(stream).writerows([("path", "label", "speaker", "split"), *rows])
    return tmp_path / "audio"


def test_no_clip_that_is_tested_on_is_pretrained_on(audio, tmp_path):
    count = study.write_manifests(audio, tmp_path / "out")
    pretrained = set((tmp_path / "out" / "unlabeled.txt").read_text().splitlines())
    assert count == len(pretrained) == 2 * 5 + 2
    for task in study.TASKS:
        with open(tmp_path / "out" / f"{task.name}.csv", newline="") as stream:
            rows = list(csv.DictReader(stream))
        tested = {row["path"] for row in rows if row["split"] == "test"}
        assert len(tested) == 2 and not tested & pretrained
        assert {row["label"] for row in rows} == {"who" if task.name == "speakers" else "a"}


def test_missing_manifests_are_named(tmp_path):
    with pytest.raises(UserError, match=r"manifests/esc10\.csv"):
        study.write_manifests(tmp_path, tmp_path / "out")


def test_rows_hold_the_mean_over_seeds_and_the_gain_over_scratch(tmp_path):
    for arm, values in (("scratch", (0.2, 0.3, 0.4)), ("visible", (0.5, 0.6, 0.4))):
        for seed, value in enumerate(values):
            folder = tmp_path / arm / f"seed-{seed}"
            folder.mkdir(parents=True)
            result = {
                "arm": arm,
                "init_from": None if arm == "scratch" else "x",
                "metric": "accuracy",
                "metrics": {"accuracy": value},
            }
            result |= {"clips": {"train": 50, "test": 10}, "classes": [{}, {}], "steps": 5}
            (folder / "results.json").write_text(json.dumps(result))
    scratch, visible = study.measured(study.TASKS[0], "few", tmp_path)
    assert (scratch["arm"], scratch["mean"], scratch["deviation"], scratch["relative_gain"]) == (
        "scratch",
        0.3,
        0.1,
        "",
    )
    assert (visible["mean"], visible["relative_gain"], visible["runs"]) == (0.5, round(2 / 3, 4), 3)


def test_every_arm_is_pretrained_with_its_settings_and_an_equal_budget(audio, tmp_path, monkeypatch):
    """The commands that the study runs, without running them."""
    given = []

    def run(*words):
        given.append([str(word) for word in words])
        if words[0] == "pretrain":
            folder = next(str(word).split("=")[1] for word in words if str(word).startswith("run.folder="))
            name = next(str(word).split("=")[1] for word in words if str(word).startswith("run.name="))
            (Path(folder) / name).mkdir(parents=True)
            row = {"kind": "train", "samples": 640, "seconds": 30.0, "step": 20}
            (Path(folder) / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
            (Path(folder) / name / "environment.json").write_text(json.dumps({"git_commit": "a", "git_dirty": False}))

    rows = [{"arm": arm, "runs": 3} for arm in ("scratch", "all", "visible")]
    monkeypatch.setattr(study, "_ssast", run)
    monkeypatch.setattr(study, "measured", lambda task, labels, folder: iter([dict(row) for row in rows]))
    out = tmp_path / "rows.csv"
    options = ["--work", str(tmp_path / "work"), "--out", str(out), "--jobs", "1", "--tasks", "digits"]
    arms = ["--arms", "scratch", "all", "visible", "--equal", "time", "--minutes", "2"]
    assert study.main([str(audio), *options, *arms]) == 0
    pretrain = [words for words in given if words[0] == "pretrain"]
    assert len(pretrain) == 2 and all(
        "train.minutes=2.0" in words and "train.steps=null" in words for words in pretrain
    )
    assert ["model.encoder_tokens=visible" in words for words in pretrain] == [False, True]
    for words in pretrain:
        load_config(words[1], [word for word in words[2:] if "=" in word])
    compared = [words[words.index("--compare") + 1 :] for words in given if words[0] == "finetune"]
    assert compared[0][0] == "scratch=none" and compared[0][2].startswith("visible=") and len(compared) == 2
    with open(out, newline="") as stream:
        written = list(csv.DictReader(stream))
    assert [(row["arm"], row["equal"], row["pretraining_samples"]) for row in written[:3]] == [
        ("scratch", "time", "0"),
        ("all", "time", "640"),
        ("visible", "time", "640"),
    ]


def test_an_arm_that_others_are_compared_with_must_be_there(audio, capsys):
    with pytest.raises(SystemExit):
        study.main([str(audio), "--arms", "all", "visible"])
    assert "--arms: needs scratch" in capsys.readouterr().err


@pytest.mark.parametrize("scale", study.SCALES)
def test_the_configs_are_valid_at_every_scale(scale):
    for_pretraining, for_tasks = study.SCALES[scale]
    load_config(study.CONFIGS / "pretrain.yaml", for_pretraining)
    for task in study.TASKS:
        config = load_config(study.CONFIGS / f"{task.name}.yaml", for_tasks, FinetuneConfig)
        assert config.task.select == "last" and config.data.valid_fraction == 0, (
            "nothing may be picked on the test clips"
        )
