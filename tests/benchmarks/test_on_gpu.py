"""What the other tests cannot see: timing on a GPU, and a training step on one (SSAST_TEST_DEVICE=cuda)."""

import os

import pytest
import torch
import torch.distributed as dist

from ssast.benchmarks import kernels
from ssast.benchmarks.cases import OPERATORS
from ssast.benchmarks.rows import read_rows
from ssast.benchmarks.throughput.measure import (
    in_memory,
    memory_split,
    nothing_to_read,
    pretrainer,
    run_steps,
    trace_steps,
    undisturbed,
)
from ssast.benchmarks.throughput.timeline import busy_seconds, read_trace, step_parts, top_kernels
from ssast.engine.config import load_config
from ssast.engine.distributed.ranks import Ranks

pytestmark = pytest.mark.skipif(
    os.environ.get("SSAST_TEST_DEVICE") != "cuda", reason="needs a GPU and SSAST_TEST_DEVICE=cuda"
)


def test_kernels_are_right_and_timed_in_graphs(tmp_path, capsys):
    file = tmp_path / "rows.csv"
    status = kernels.main(["--small", "--no-compiled", "--seconds", "0.05", "--out", str(file)])
    assert status == 0, capsys.readouterr().err
    rows = [row for row in read_rows(file) if row["operator"] != "ceiling"]
    kernel_rows = [row for row in rows if row["provider"] == "triton"]
    assert {row["operator"] for row in kernel_rows} == set(OPERATORS)
    for row in kernel_rows:
        assert (
            row["kind"] == "cuda"
            and row["device"] == torch.cuda.get_device_name()
            and row["driver"]
            and float(row["peak_mib"]) > 0
        )
        assert row["method"] == "graph" and "no CUDA graph" not in row["note"], row
    assert {row["method"] for row in rows if row["provider"] == "official loop"} == {"events"}


@pytest.fixture
def trainer(tmp_path):
    """A small bf16 run on plain PyTorch, compiled, fed from the host's memory."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    ranks = Ranks(0, 1, torch.device("cuda", 0), dist.new_group(backend="gloo"))
    settings = ["step.engine=ddp", "deepspeed.bf16.enabled=true", "data.mean=-4", "data.std=4"]
    config = undisturbed(load_config("demo", settings), tmp_path)
    yield pretrainer(config, nothing_to_read(config), ranks)
    dist.destroy_process_group()


def test_a_step_compiles_once_learns_and_never_waits_for_the_device(trainer):
    batches = iter(in_memory(trainer, trainer.ranks.device))
    run_steps(trainer, batches, 4)
    first = trainer.run_step(batches, trainer.new_clock()).losses["loss"]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        clock = trainer.new_clock()
        for _ in range(20):
            metrics = trainer.run_step(batches, clock)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.training_step.describe()["compile"].startswith("encoder") and metrics.losses["loss"] < first


def test_a_trace_of_the_gpu_accounts_for_the_whole_step(trainer, tmp_path):
    batches = iter(in_memory(trainer, torch.device("cpu")))
    run_steps(trainer, batches, 4)
    trace = read_trace(trace_steps(trainer, batches, tmp_path))
    parts = step_parts(trace)
    assert trace.on_device and sum(parts.seconds.values()) == pytest.approx(parts.step_seconds, rel=1e-9)
    for part in ("copy", "fbank", "mask + embed", "encoder forward", "heads + loss", "backward", "optimizer"):
        assert parts.seconds[part] > 0, part
    idle = parts.seconds["data wait"] + parts.seconds["host gaps"]
    assert busy_seconds(trace) == pytest.approx(parts.step_seconds - idle, rel=0.02)
    assert any(row.flop for row in top_kernels(trace, 50) if row.part == "backward"), (
        "no product of the backward pass is known"
    )


def test_memory_on_the_gpu_adds_up_to_the_peak(trainer):
    torch.cuda.reset_peak_memory_stats()
    run_steps(trainer, iter(in_memory(trainer, torch.device("cpu"))), 4)
    split = memory_split(trainer)
    parts = ("parameters", "gradients", "optimizer state", "activations", "other")
    assert sum(split[part] for part in parts) == split["peak"] == torch.cuda.max_memory_allocated()
    assert split["optimizer state"] == pytest.approx(2 * split["parameters"], rel=0.05)
