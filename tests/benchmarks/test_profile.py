"""`ssast profile` as a user meets it, and the measuring beneath it."""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from ssast.benchmarks import report, step
from ssast.benchmarks.rows import append_row, read_rows
from ssast.benchmarks.tables import step_table
from ssast.benchmarks.throughput import profile
from ssast.benchmarks.throughput.baseline_race import Runner, race
from ssast.engine.config import Config
from ssast.engine.distributed.ranks import Ranks
from ssast.engine.errors import UserError
from ssast.engine.training.rundir import check_run_dir

ROOT = Path(__file__).parents[2]
SMALL = {
    "run": {"name": "small"},
    "model": {"size": "tiny", "depth": 1, "input_frames": 64},
    "mask": {"num_masked": 20},
    "data": {"valid_fraction": 0.2, "num_threads": 1},
    "train": {"steps": 9, "warmup_steps": 3},
    "deepspeed": {"train_batch_size": 8, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}},
}


@pytest.fixture
def small(tmp_path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "run": {"name": "small", "folder": str(tmp_path / "runs")}}))
    return file


def ssast(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ssast.engine.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
def test_a_profile_of_two_ranks(small, corpus):
    """Parts add up, rates follow from the steps, every rank leaves a trace, and the run folder stays free for the
    run.
    """
    given = [f"data.train={corpus}", f"data.cache_dir={small.parent / 'cache'}"]
    done = ssast("profile", str(small), *given, "--ranks", "2", "--steps", "6", "--warmup", "3", "--turns", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = small.parent / "runs" / "small" / "profile"
    assert done.stdout.strip() == str(folder / "report.html")
    measured = json.loads((folder / "profile.json").read_text())
    assert measured["setup"]["world_size"] == 2 and measured["setup"]["clips_per_step"] == 8
    assert len(measured["steps"]["seconds"]) == len(measured["steps"]["data_wait_seconds"]) == 6
    parts = measured["parts"]
    assert sum(parts["seconds"].values()) == pytest.approx(parts["step_seconds"], rel=1e-9)
    busy = ("fbank", "mask + embed", "encoder forward", "heads + loss", "backward", "optimizer", "communication")
    assert all(parts["seconds"][part] > 0 for part in busy)
    assert parts["seconds"]["backward"] > parts["seconds"]["heads + loss"]
    memory = measured["memory"]
    assert memory["parameters"] == 4 * measured["setup"]["parameters"] == memory["gradients"]
    assert memory["optimizer state"] == pytest.approx(2 * memory["parameters"], rel=0.01) and memory["activations"] > 0
    products = [row for row in measured["kernels"] if row["name"] == "aten::mm"]
    assert products and products[0]["floor_seconds"] > 0
    assert {row["name"] for row in measured["baselines"]} == {"official way", "eager fp32"}
    assert measured["peak"] is None and measured["device_state"] == []
    assert measured["config"]["run"]["folder"] == str(small.parent / "runs")
    summary = json.loads((folder / "report.json").read_text())
    assert summary["total"]["clips_per_s"] == pytest.approx(48 / sum(measured["steps"]["seconds"]))
    assert sorted(path.name for path in (folder / "traces").iterdir()) == ["rank0.json.gz", "rank1.json.gz"]
    assert not (folder / "measurement.json").exists()
    check_run_dir(Config.model_validate(measured["config"]))  # raises if the folder were taken for something else
    (folder / "report.html").unlink()
    assert report.main([str(folder.parent)]) == 0 and (folder / "report.html").is_file()


@pytest.mark.slow
def test_steps_can_be_fed_from_memory_without_deepspeed_and_dali(small, tmp_path):
    """As on a machine that has neither: importing them fails."""
    for name in ("deepspeed", "nvidia"):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text("raise ImportError('not here')")
    command = [sys.executable, "-m", "ssast.benchmarks.throughput.measure", str(tmp_path / "out.json"), str(small)]
    command += ["--synthetic", "--steps", "3", "--warmup", "3", "step.engine=ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "out.json").read_text())
    assert measured["setup"]["engine"] == "plain PyTorch, DDP" and measured["setup"]["source"] == "noise, in memory"
    assert set(measured["ceilings"]) == {"model only"}
    refused = subprocess.run([*command[:-1], "--quick"], capture_output=True, text=True, timeout=200, env=environment)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "step.engine=ddp" in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["demo", "--steps", "1"], "--steps 1"), (["nowhere"], "nowhere"), (["demo", "--ranks", "0"], "--ranks 0")],
)
def test_mistakes_are_one_line(arguments, word, tmp_path):
    with pytest.raises(UserError, match=word):
        profile.main([*arguments, "--out", str(tmp_path / "out")])


class FakeChildren:
    """Runs of B are `faster` times as fast as those of A, with noise."""

    def __init__(self, faster: float) -> None:
        self.faster, self.noise, self.asked = faster, itertools.cycle([1.0, 1.01, 0.99, 1.005]), []

    def measure(self, overrides: list | None = None, *, config: str | None = None, quick: bool = False) -> dict:
        is_b = bool(overrides or config)
        self.asked.append("AB"[is_b])
        rate = 100 * (self.faster if is_b else 1.0) * next(self.noise)
        return {"setup": {"clips_per_step": 10}, "steps": {"seconds": [10 / rate] * 4}}


@pytest.mark.parametrize(("faster", "word"), [(1.2, "faster"), (0.8, "slower"), (1.0, "no difference")])
def test_comparing_takes_turns_and_judges(tmp_path, faster, word):
    children = FakeChildren(faster)
    given = argparse.Namespace(against="step.compile=off", turns=5, config="demo", overrides=[], given=["demo"])
    result = json.loads(profile.compare(given, children, tmp_path).read_text())
    assert word in result["verdict"] and result["b"] == "demo step.compile=off"
    assert "".join(children.asked) == "ABBAABBAAB", "neither always on the warmer machine"


def test_a_race_compares_within_turns():
    """The machine slows down by half from turn to turn; the ratio does not care."""
    clock = itertools.count()

    class Paced(Runner):
        def clips_per_s(self, seconds: float) -> float:
            return self.clips / 2 ** (next(clock) // 2)

    cpu = torch.device("cpu")
    ours, theirs = Paced("ours", "", 30, lambda: None, cpu), Paced("theirs", "what", 10, lambda: None, cpu)
    (row,) = race([ours, theirs], turns=3)
    assert row["ratio"] == 3.0 and row["clips_per_s"] == 5.0 and row["what"] == "what"


@pytest.fixture
def bench(tmp_path, small):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield step.StepBench(str(small), [], Ranks(0, 1, torch.device("cpu"), dist.group.WORLD), 2, tmp_path)
    dist.destroy_process_group()


def test_step_rows(bench, tmp_path):
    cases = [
        step.StepCase(4, ("step.engine=ddp",)),
        step.StepCase(4, provider="official way"),
        step.StepCase(2, ("step.engine=ddp", "step.optimizer=apex")),
    ]
    rows = [bench.row(case) for case in cases]
    ours, official, refused = rows
    assert ours["optimizer"] == "torch-fused" and ours["steps"] == official["steps"] == 2
    assert float(ours["clips_per_s"]) * float(ours["tflop_per_clip"]) == pytest.approx(
        float(ours["tflop_per_s"]), rel=1e-3
    )
    assert ours["mfu"] == "", "a CPU has no known peak"
    assert refused["clips_per_s"] == "" and "apex.optimizers.FusedAdam" in refused["note"]
    for row in rows:
        append_row(tmp_path / "rows.csv", row)
    assert step_table(tmp_path / "rows.csv") == "not measured yet", "no GPU, no table"
    on_gpu = [{**row, "kind": "cuda", "device": "NVIDIA X"} for row in read_rows(tmp_path / "rows.csv")]
    for row in on_gpu:
        append_row(tmp_path / "gpu.csv", row)
    ratio = float(ours["clips_per_s"]) / float(official["clips_per_s"])
    drawn = step_table(tmp_path / "gpu.csv")
    assert f"| {ratio:.2g} x |" in drawn and "apex" in drawn and drawn.count("\n| ") == 3


def test_the_step_benchmark_begins_with_what_says_most():
    found = list(step.cases([64, 256], "deepspeed", on_gpu=True))
    assert [case.provider for case in found[:4]] == ["this engine", "this engine", "eager", "official way"]
    assert "step.compile=encoder" in found[0].settings and "deepspeed.zero_optimization.stage=3" in found[-1].settings
    assert all(
        "step.engine=ddp" in case.settings
        for case in step.cases([4], "ddp", on_gpu=False)
        if case.provider == "this engine"
    )


def test_the_gpu_script_says_that_there_is_no_gpu(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    script = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    done = subprocess.run([*script, str(tmp_path / "out")], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "gpu.sh: no GPU here"
    assert subprocess.run(script, capture_output=True, env=environment).returncode == 2
