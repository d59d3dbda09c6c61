"""What the other tests cannot see: timing on a GPU (SSAST_TEST_DEVICE=cuda)."""

import os

import pytest
import torch

from ssast.benchmarks import kernels
from ssast.benchmarks.rows import read_rows

pytestmark = pytest.mark.skipif(os.environ.get("SSAST_TEST_DEVICE") != "cuda", reason="needs a GPU and SSAST_TEST_DEVICE=cuda")


def test_kernels_are_right_and_timed_in_graphs(tmp_path, capsys):
    file = tmp_path / "rows.csv"
    status = kernels.main(["--small", "--no-compiled", "--seconds", "0.05", "--out", str(file)])
    assert status == 0, capsys.readouterr().err
    rows = [row for row in read_rows(file) if row["operator"] != "ceiling"]
    kernel_rows = [row for row in rows if row["provider"] == "triton"]
    assert {row["operator"] for row in kernel_rows} == {"fbank", "mask", "embed", "loss", "attention"}
    for row in kernel_rows:
        assert (
            row["kind"] == "cuda" and row["device"] == torch.cuda.get_device_name() and row["driver"] and float(row["peak_mib"]) > 0
        )
        assert row["method"] == "graph" and "no CUDA graph" not in row["note"], row
    assert {row["method"] for row in rows if row["provider"] == "official loop"} == {"events"}
