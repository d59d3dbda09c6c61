"""The study's bookkeeping: who is trained and tested on what, and the figures of its rows."""

import csv
import json

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
    for arm, values in (("scratch", (0.2, 0.3, 0.4)), ("pretrained", (0.5, 0.6, 0.4))):
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
    scratch, pretrained = study.measured(study.TASKS[0], "few", tmp_path)
    assert (scratch["arm"], scratch["mean"], scratch["deviation"], scratch["relative_gain"]) == (
        "scratch",
        0.3,
        0.1,
        "",
    )
    assert (pretrained["mean"], pretrained["relative_gain"], pretrained["runs"]) == (0.5, round(2 / 3, 4), 3)


@pytest.mark.parametrize("scale", study.SCALES)
def test_the_configs_are_valid_at_every_scale(scale):
    for_pretraining, for_tasks = study.SCALES[scale]
    load_config(study.CONFIGS / "pretrain.yaml", for_pretraining)
    for task in study.TASKS:
        config = load_config(study.CONFIGS / f"{task.name}.yaml", for_tasks, FinetuneConfig)
        assert config.task.select == "last" and config.data.valid_fraction == 0, (
            "nothing may be picked on the test clips"
        )
