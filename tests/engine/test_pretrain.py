"""The command as a user meets it: mistakes, kill -9, SIGTERM, a full disk, real audio."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from training_runs import SMALL, free_port

from ssast.engine.training.runlog import read_rows

SSAST = [sys.executable, "-m", "ssast.engine.cli"]


@pytest.fixture
def small(tmp_path) -> Path:
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump({**SMALL, "run": {"name": "small", "folder": str(tmp_path / "runs")}}))
    return config


def command(small: Path, *arguments: str) -> list[str]:
    return [*SSAST, "pretrain", str(small), f"data.cache_dir={small.parent / 'cache'}", *arguments]


def run(small: Path, *arguments: str, timeout: int = 240) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(small, *arguments), capture_output=True, text=True, timeout=timeout, env=environment)


def refused(result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode == 2, result.stderr + result.stdout
    lines = [line for line in result.stderr.splitlines() if line.startswith("ssast:")]
    assert len(lines) == 1 and "Traceback" not in result.stderr + result.stdout, result.stderr
    for word in words:
        assert word in lines[0], lines[0]


def losses(run_dir: Path) -> list[tuple]:
    return [
        (row["kind"], row["step"], row["loss"], row["accuracy"])
        for row in read_rows(run_dir / "metrics.jsonl")
        if row["kind"] != "event"
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.train=NOWHERE"], ["NOWHERE", "no such file"]),
        (["data.train=EMPTY"], ["EMPTY", "no audio files"]),
        (["data.train=TEXT"], ["TEXT", "no audio files"]),
        (["data.train=BROKEN"], ["none of 2 audio files can be used", "empty file"]),
        (["data.train=ONE"], ["one clip alone"]),
        ([], ["data.train is not set"]),
        (["data.train=MIXED", "data.strict=true"], ["strict", "bad.wav"]),
        (
            ["data.train=MIXED", "deepspeed.train_batch_size=7", "deepspeed.train_micro_batch_size_per_gpu=4"],
            ["do not fit"],
        ),
        (["mask.num_masked=32"], ["mask.num_masked", "32 of 32"]),
        (["data.train=MIXED", "model.init_from=FRAME"], ["patch_shape"]),
        (["data.train=MIXED", "model.init_from=NOWHERE"], ["NOWHERE", "no such file"]),
        (["data.train=MIXED", "run.folder=FILE"], ["FILE"]),
        (["data.train=MIXED", "run.folder=FOREIGN"], ["holds files but no run"]),
        (["data.train=MIXED", "deepspeed.optimizer.params.momentum=1"], ["momentum"]),
    ],
)
def test_mistakes(small, tmp_path, arguments, words):
    from ssast.engine import ModelConfig, save_model
    from ssast.engine.model.adapt import build_model

    for folder in ("EMPTY", "TEXT", "BROKEN", "ONE", "MIXED", "FOREIGN/small"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "TEXT" / "notes.txt").write_text("hello")
    (tmp_path / "BROKEN" / "a.wav").write_bytes(b"")
    (tmp_path / "BROKEN" / "b.flac").write_bytes(b"fLaC nonsense")
    (tmp_path / "MIXED" / "bad.wav").write_bytes(b"RIFF")
    (tmp_path / "FILE").write_text("")
    (tmp_path / "FOREIGN" / "small" / "thesis.tex").write_text("all I have")
    rng = np.random.default_rng(0)
    for path in ("ONE/a.wav", *(f"MIXED/{number}.wav" for number in range(9))):
        soundfile.write(tmp_path / path, 0.1 * rng.standard_normal(8000), 16000)
    frame = ModelConfig(depth=1, input_frames=64, patch_shape=(128, 2), stride=(128, 2))
    save_model(build_model(frame), tmp_path / "FRAME")
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    for name in ("NOWHERE", "EMPTY", "TEXT", "BROKEN", "ONE", "MIXED", "FRAME", "FILE", "FOREIGN"):
        arguments = [argument.replace(f"={name}", f"={tmp_path / name}") for argument in arguments]
    refused(run(small, *arguments), *words)
    assert (tmp_path / "FOREIGN" / "small" / "thesis.tex").read_text() == "all I have"
    after = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    assert after == before


def test_a_run_folder_is_not_overwritten_by_another_config(small, corpus):
    assert run(small, f"data.train={corpus}", "train.steps=4").returncode == 0
    folder = small.parent / "runs" / "small"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refused(
        run(small, f"data.train={corpus}", "train.steps=4", "mask.num_masked=10"),
        "mask.num_masked was 20, is now 10",
        "run.name",
    )
    again = run(small, f"data.train={corpus}", "train.steps=4")
    assert again.returncode == 0 and "already finished" in again.stdout
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    longer = run(small, f"data.train={corpus}", "train.steps=6")
    assert longer.returncode == 0 and "resuming from step 4" in longer.stdout


@pytest.mark.slow
def test_kill_9_in_the_middle_changes_nothing(small, corpus):
    """Two ranks that read shards, through the launcher, all killed twice at a moment of no one's choosing; the log is
    that of an undisturbed run.
    """
    shards = small.parent / "shards"
    assert subprocess.run([*SSAST, "prepare", str(corpus), "--out", str(shards)], capture_output=True).returncode == 0
    settings = [
        f"data.train={shards}",
        "train.steps=40",
        "train.checkpoint_every=3",
        "deepspeed.zero_optimization.stage=1",
    ]
    assert run(small, *settings, "run.name=whole", "--ranks", "2").returncode == 0
    folder = small.parent / "runs" / "killed"
    for at_step in (5, 20):
        process = subprocess.Popen(
            command(small, *settings, "run.name=killed", "--ranks", "2"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _wait_until(lambda at_step=at_step: any(row["step"] >= at_step for row in read_rows(folder / "metrics.jsonl")))
        _kill_tree(process.pid)
    (folder / "checkpoints" / "incomplete-step-39").mkdir()
    (folder / "checkpoints" / "incomplete-step-39" / "half").write_text("written")
    result = run(small, *settings, "run.name=killed", "--ranks", "2")
    assert result.returncode == 0 and "resuming from step" in result.stdout, result.stdout + result.stderr
    assert losses(folder) == losses(small.parent / "runs" / "whole")
    assert not (folder / "checkpoints" / "incomplete-step-39").exists()


@pytest.mark.slow
@pytest.mark.parametrize("to", ["front door", "deepspeed", "a rank"])
def test_sigterm_saves_and_leaves(small, corpus, to):
    """Whichever process a scheduler or a person ends: all ranks save at one and the same step, and go."""
    settings = [f"data.train={corpus}", "train.steps=100000", "train.checkpoint_every=100000"]
    folder = small.parent / "runs" / "small"
    if to == "deepspeed":
        launcher = [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--num_accelerators",
            "2",
            "--master_port",
            free_port(),
            "--module",
        ]
        line = [*launcher, "ssast.engine.pretrain", str(small), f"data.cache_dir={small.parent / 'cache'}", *settings]
    else:
        line = command(small, *settings, "--ranks", "2")
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    _wait_until(lambda: any(row["step"] >= 3 for row in read_rows(folder / "metrics.jsonl")))
    if to == "a rank":
        import psutil

        ranks = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "ssast.engine.pretrain" in child.cmdline()[:5]
        ]
        os.kill(ranks[-1].pid, signal.SIGTERM)
    else:
        process.terminate()
    output = process.communicate(timeout=120)[0]
    _wait_until(lambda: (folder / "report.html").exists())
    if to != "deepspeed":
        assert process.returncode == 128 + signal.SIGTERM, output
    assert "Traceback" not in output
    stops = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "event" and row["event"] == "stop"]
    kept = [path.name for path in (folder / "checkpoints").glob("step-*")]
    assert len(stops) == 1 and kept == [f"step-{stops[0]['step']}"]


@pytest.mark.slow
def test_ctrl_c_before_the_first_step_leaves_nothing_running(small, tmp_path):
    """While files are checked there is nothing to save: all processes are gone within seconds."""
    import psutil

    (tmp_path / "many").mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        soundfile.write(tmp_path / "many" / f"{number}.wav", 0.1 * rng.standard_normal(16000 * 60), 44100)
    line = command(small, f"data.train={tmp_path / 'many'}", "train.steps=100000", "--ranks", "2")
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    _wait_until(lambda: any("ssast.engine.pretrain" in p.cmdline()[:5] for p in _descendants(process.pid)))
    ranks = _descendants(process.pid)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert "Traceback" not in output
    _wait_until(lambda: not [p for p in ranks if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], seconds=20)


def test_ctrl_c_in_one_process_before_the_first_step_is_one_line(small, tmp_path):
    """No launcher stands between the keyboard and the process then."""
    (tmp_path / "many").mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        soundfile.write(tmp_path / "many" / f"{number}.wav", 0.1 * rng.standard_normal(16000 * 60), 44100)
    line = command(small, f"data.train={tmp_path / 'many'}", "--ranks", "1")
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    cache = small.parent / "cache"
    _wait_until(lambda: cache.exists() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in errors and errors.count("ssast:") == 1


def test_a_full_disk_is_one_line_and_keeps_what_was_whole(small, corpus):
    """Files may not grow past 2 MB: the first checkpoint cannot be written."""
    line = " ".join(f"'{part}'" for part in command(small, f"data.train={corpus}"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        ["bash", "-c", f"ulimit -f 2000; {line}"], capture_output=True, text=True, timeout=240, env=environment
    )
    refused(result, "could not be written")
    assert not list((small.parent / "runs" / "small" / "checkpoints").glob("step-*"))
    assert run(small, f"data.train={corpus}").returncode == 0


def test_torchrun_works_too(small, corpus):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        free_port(),
        "-m",
        "ssast.engine.pretrain",
    ]
    line = [*launcher, str(small), f"data.train={corpus}", f"data.cache_dir={small.parent / 'cache'}", "train.steps=4"]
    result = subprocess.run(
        line, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    environment = json.loads((small.parent / "runs" / "small" / "environment.json").read_text())
    assert environment["world_size"] == 2


@pytest.mark.slow
def test_real_audio_messy_and_corrupt_included(small, real_audio):
    """Everything readable is trained on, everything else listed with its reason, and the loss falls."""
    settings = [
        f"data.train={real_audio}",
        "train.steps=40",
        "train.warmup_steps=5",
        "train.schedule=constant",
        "train.valid_every=10",
    ]
    # which clips are held out depends on where the audio lies: enough of them that any choice tells the same
    result = run(small, *settings, "data.valid_fraction=0.2", timeout=400)
    assert result.returncode == 0, result.stderr + result.stdout
    folder = small.parent / "runs" / "small"
    data = json.loads((folder / "data.json").read_text())
    assert data["clips"] > 1600 and data["skipped"] >= 70
    skipped = (folder / "skipped.csv").read_text(encoding="utf-8", errors="surrogateescape")
    assert "corrupt/empty.wav" in skipped and "float_one_nan.wav" in skipped
    valid = [row["loss"] for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "valid"]
    assert len(valid) == 4 and min(valid[1:]) < 0.98 * valid[0]


def _wait_until(condition, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def _descendants(pid: int) -> list:
    import psutil

    try:
        return [
            child for child in psutil.Process(pid).children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE
        ]
    except psutil.Error:
        return []


def _kill_tree(pid: int) -> None:
    import psutil

    process = psutil.Process(pid)
    for victim in [process, *process.children(recursive=True)]:
        victim.kill()
    process.wait()
