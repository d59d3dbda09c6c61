"""Training as a whole: the same losses for any ZeRO stage, number of ranks and interruption."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ssast.engine import load_model
from ssast.engine.runlog import read_rows

WORKER = Path(__file__).with_name("ranks_worker.py")
SMALL = {
    "run": {"name": "small"},
    "model": {"size": "tiny", "depth": 1, "input_frames": 64},  # 8 x 4 patches
    "mask": {"num_masked": 20},
    "data": {"valid_fraction": 0.2, "num_threads": 1, "crop": "random"},
    "train": {
        "steps": 9,
        "schedule": "plateau",
        "warmup_steps": 3,
        "plateau_patience": 0,
        "valid_every": 2,
        "checkpoint_every": 4,
        "keep_last": 3,
        "log_every": 1,
    },
    "deepspeed": {
        "train_batch_size": 8,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.95, 0.999], "weight_decay": 5e-7}},
        "gradient_clipping": 1.0,
    },
}


class Runs:
    """Writes jobs down, runs them on so many ranks, and reads what they logged."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder, self.corpus = folder, corpus
        self.config = folder / "small.yaml"
        self.config.write_text(yaml.safe_dump(SMALL))

    def job(self, name: str, *overrides: str) -> dict:
        given = [
            f"run.name={name}",
            f"run.folder={self.folder}",
            f"data.train={self.corpus}",
            f"data.cache_dir={self.folder / 'cache'}",
        ]
        return {"config": str(self.config), "overrides": [*given, *overrides]}

    def interrupted(self, name: str, of: str, step: int) -> dict:
        return {"copy": [str(self.folder / of), str(self.folder / name), step]}

    def run(self, ranks: int, jobs: list[dict]) -> None:
        file = self.folder / f"jobs-{ranks}-{len(jobs)}.json"
        file.write_text(json.dumps(jobs))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, str(WORKER), str(file)],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(ranks)
        ]
        outputs = [process.communicate(timeout=600)[0] for process in processes]
        assert all(process.returncode == 0 for process in processes), "\n".join(outputs)[-6000:]

    def rows(self, name: str, kind: str) -> list[dict]:
        return [row for row in read_rows(self.folder / name / "metrics.jsonl") if row["kind"] == kind]

    def losses(self, name: str, kind: str = "train") -> list[tuple]:
        return [(row["step"], row["loss"], row["nce"], row["mse"], row["accuracy"]) for row in self.rows(name, kind)]


STAGES = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus) -> Runs:
    """All jobs of this file: on two ranks every ZeRO stage in both precisions, whole and interrupted; on one rank with accumulation."""
    runs = Runs(tmp_path_factory.mktemp("runs"), corpus)
    two, one = [], []
    for stage, precision in STAGES:
        name = f"zero{stage}-{precision}"
        overrides = [f"deepspeed.zero_optimization.stage={stage}", f"deepspeed.bf16.enabled={precision == 'bf16'}"]
        two += [runs.job(name, *overrides), runs.interrupted(f"{name}-again", name, 4)]
        two += [runs.job(f"{name}-again", *overrides, f"run.name={name}-again")]
    two += [
        runs.job("objective-separate", "objective.masks=separate"),
        runs.job("objective-generative", "objective.name=generative"),
    ]
    two += [runs.job("objective-discriminative", "objective.name=discriminative", "objective.softmax_over=targets")]
    two += [runs.job("two-accumulate", "deepspeed.train_micro_batch_size_per_gpu=2")]
    for precision in ("fp32", "bf16"):
        for stage in (0, 1, 2):
            overrides = [f"deepspeed.zero_optimization.stage={stage}", f"deepspeed.bf16.enabled={precision == 'bf16'}"]
            one += [runs.job(f"one-{stage}-{precision}", *overrides, "deepspeed.train_micro_batch_size_per_gpu=4")]
    one += [runs.job("one-frame", "model.patch_shape=[128,2]", "mask.cluster=null")]
    one += [runs.job("continued", f"model.init_from={runs.folder / 'zero1-fp32'}", "train.steps=4")]
    runs.run(2, two)
    runs.run(1, one)
    return runs


def test_zero_stages_agree(runs):
    """fp32: the same arithmetic in another order of summation."""
    whole = runs.losses("zero0-fp32")
    assert len(whole) == 9 and whole[-1][1] < whole[0][1]
    for stage in (1, 2, 3):
        for ours, theirs in zip(runs.losses(f"zero{stage}-fp32"), whole, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), stage
    for stage in (0, 1, 2, 3):
        for ours, theirs in zip(runs.losses(f"zero{stage}-bf16"), whole, strict=True):
            assert ours[1] == pytest.approx(theirs[1], rel=5e-3), stage


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_one_rank_with_accumulation_equals_two_ranks(runs, stage):
    for kind in ("train", "valid"):
        for ours, theirs in zip(runs.losses(f"one-{stage}-fp32", kind), runs.losses(f"zero{stage}-fp32", kind), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
        # bf16: gradients are summed in fp32, so all that differs is rounding within a micro-batch
        for ours, theirs in zip(runs.losses(f"one-{stage}-bf16", kind), runs.losses(f"zero{stage}-bf16", kind), strict=True):
            assert ours[1] == pytest.approx(theirs[1], rel=1e-3)
    for ours, theirs in zip(runs.losses("two-accumulate"), runs.losses("zero0-fp32"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_interrupted_equals_uninterrupted(runs, stage, precision):
    """Bit for bit, training and validation, learning rate and gradient norm, from the checkpoint on and in the log before it."""
    name = f"zero{stage}-{precision}"
    resumed = [row for row in runs.rows(f"{name}-again", "event") if row["event"] == "resume"]
    assert [row["step"] for row in resumed] == [4]
    for kind in ("train", "valid"):
        assert runs.losses(f"{name}-again", kind) == runs.losses(name, kind)
    for ours, theirs in zip(runs.rows(f"{name}-again", "train"), runs.rows(name, "train"), strict=True):
        assert (ours["lr"], ours["grad_norm"], ours["samples"]) == (theirs["lr"], theirs["grad_norm"], theirs["samples"])


@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_checkpoints_hold_the_whole_model_in_fp32(runs, stage, precision):
    """Whatever the stage, `load_model` gives the same weights, and the resumed run's are bit-equal."""
    name = f"zero{stage}-{precision}"
    ours, again, plain = (load_model(runs.folder / run / "checkpoints" / "step-9") for run in (name, f"{name}-again", "zero0-fp32"))
    for (key, value), resumed, reference in zip(
        ours.state_dict().items(), again.state_dict().values(), plain.state_dict().values(), strict=True
    ):
        assert value.equal(resumed), key
        tolerance = 2e-4 if precision == "fp32" else 2e-2
        assert (value - reference).abs().max() < tolerance, key


def test_gradient_norm_is_logged_at_every_stage(runs):
    norms = {name: [row["grad_norm"] for row in runs.rows(name, "train")] for name in ("zero0-fp32", "zero1-fp32", "zero3-fp32")}
    assert all(norm > 0 for norm in norms["zero0-fp32"])
    for name in ("zero1-fp32", "zero3-fp32"):
        assert norms[name] == pytest.approx(norms["zero0-fp32"], rel=1e-4)


def test_learning_rate_warms_up_and_halves(runs):
    rates = [row["lr"] for row in runs.rows("zero0-fp32", "train")]
    assert rates[:3] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    assert set(rates[3:]) <= {1e-3 * 0.5**halvings for halvings in range(5)}


def test_objectives(runs):
    for row in runs.rows("objective-generative", "train"):
        assert row["nce"] is None and row["accuracy"] is None and row["loss"] == row["mse"]
    for row in runs.rows("objective-discriminative", "train"):
        assert row["mse"] is None and row["loss"] == row["nce"]
    separate, shared = runs.losses("objective-separate"), runs.losses("zero0-fp32")
    assert separate[0][2] == pytest.approx(shared[0][2], abs=1e-5) and separate[0][3] != shared[0][3]
    best = json.loads((runs.folder / "objective-generative" / "checkpoints" / "best" / "best.json").read_text())
    assert best["metric"] == "mse"


def test_frame_model_trains(runs):
    losses = runs.losses("one-frame")
    assert losses[-1][1] < losses[0][1]


def test_continued_pretraining_starts_where_the_other_run_ended(runs):
    """Its first loss is that of a trained model, far below that of a fresh one."""
    assert runs.losses("continued")[0][1] < runs.losses("zero1-fp32")[0][1] - 1.0


def test_run_folder_is_complete(runs):
    folder = runs.folder / "zero1-bf16"
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "skipped.csv", "data.json", "report.html", "source.diff"):
        assert (folder / name).is_file(), name
    assert list((folder / "tensorboard").iterdir())
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["best", "step-4", "step-8", "step-9"]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["world_size"] == 2 and environment["torch"]
    best = json.loads((folder / "checkpoints" / "best" / "best.json").read_text())
    values = {row["step"]: row["accuracy"] for row in runs.rows("zero1-bf16", "valid")}
    assert best["value"] == values[best["step"]] == max(values.values())
