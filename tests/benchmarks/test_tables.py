from pathlib import Path

import pytest

from ssast.benchmarks import rows, tables
from ssast.engine.errors import UserError


def test_documents_show_what_the_rows_give(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_figure_is_noticed():
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    start = text.index("<!-- table: demo -->") + len("<!-- table: demo -->\n")
    forged = text[:start] + "| 99% |" + text[start:]
    assert tables.render(forged) == text


def test_rows_keep_their_columns(tmp_path):
    file = tmp_path / "results" / "x.csv"
    rows.append_row(file, {"a": 1, "b": "one, two"})
    rows.append_row(file, {"b": "three", "a": 2})
    assert rows.read_rows(file) == [{"a": "1", "b": "one, two"}, {"a": "2", "b": "three"}]
    with pytest.raises(UserError, match="rows of this kind"):
        rows.append_row(file, {"a": 3})


def kernel_row(operator, provider, micros, **more):
    row = {"operator": operator, "provider": provider, "mode": "forward", "shape": "B=2", "dtype": "bfloat16"}
    row |= {
        "p20_ms": micros * 0.9e-3,
        "p50_ms": micros * 1e-3,
        "p80_ms": micros * 1.1e-3,
        "gb_per_s": "",
        "tflop_per_s": "",
    }
    row |= {
        "copy_share": 0.25,
        "matmul_share": "",
        "kind": "cuda",
        "power_limit_w": "700",
        "driver": "580.1",
        "device": "GPU X",
    }
    return row | {"torch": "2.11", "triton": "3.6", "commit": "abc", "date": "2026-01-02"} | more


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)

    def write(name, *lines):
        for line in lines:
            rows.append_row(tmp_path / name, line)

    return write


def test_kernels_table_is_of_gpus_only(results):
    assert (
        tables.render("<!-- table: kernels -->\n?\n<!-- end -->")
        == "<!-- table: kernels -->\nnot measured yet\n<!-- end -->"
    )
    results("kernels.csv", kernel_row("mask", "torch", 100.0, kind="cpu"))
    assert tables.kernels_table() == "not measured yet"


def test_kernels_table(results):
    results(
        "kernels.csv",
        kernel_row("ceiling", "torch", 1.0, shape="copy 4096 MiB", gb_per_s=4300, copy_share=""),
        kernel_row("ceiling", "torch", 1.0, shape="matmul 8192^3", tflop_per_s=780, copy_share=""),
        kernel_row("mask", "triton", 30.0, commit="older"),
        kernel_row("mask", "official loop", 9.0, commit="older"),  # of another run: not held against this one's kernel
        kernel_row("mask", "triton", 10.0),
        kernel_row("mask", "torch", 125.0),
        kernel_row("mask", "compiled", 2500.0),
        kernel_row("loss", "torch", 50.0, kind="cpu", device="CPU Y"),
    )
    lines = tables.kernels_table().splitlines()
    cells = "**10 µs** [9 µs, 11 µs] | 25% |  | torch 125 µs (12 x), compiled 2.5 ms (250 x)"
    assert lines[2:4] == [f"| mask | B=2, bfloat16 | forward | {cells} |", ""]
    assert lines[4].startswith("GPU X. Median") and "(last 4.30 TB/s and 780 TFLOP/s)" in lines[4]
    assert lines[4].endswith("700 W, driver 580.1, torch 2.11, triton 3.6, commit abc, 2026-01-02.") and len(lines) == 5


def test_compile_table(results):
    assert tables.compile_table() == "not measured yet"
    common = {"kernel": "_k", "operator": "loss", "case": "B=16", "arguments": "x", "spills": 0, "triton": "3.7"}
    results(
        "compile.csv",
        {
            "variant": "A=1",
            **common,
            "target": "sm_80",
            "registers": 128,
            "shared_bytes": 2048,
            "hmma": 8,
            "hgmma": 0,
            "utchmma": 0,
        },
        {
            "variant": "A=1",
            **common,
            "target": "sm_90",
            "registers": 96,
            "shared_bytes": 2048,
            "hmma": 0,
            "hgmma": 2,
            "utchmma": 0,
        },
        {
            "variant": "A=2",
            **common,
            "target": "sm_90",
            "registers": 90,
            "shared_bytes": 0,
            "hmma": 0,
            "hgmma": 0,
            "utchmma": 0,
        },
    )
    assert tables.compile_table().splitlines() == [
        "| operator | kernel | first launched at | sm_80 | sm_90 |",
        "|---|---|---|---|---|",
        "| loss | _k A=1 | B=16 | 128 regs, 2 KiB, 8 HMMA | 96 regs, 2 KiB, 2 HGMMA |",
        "| loss | _k A=2 | B=16 |  | 90 regs, 0 KiB |",
        "",
        "Registers a thread, shared memory of a block, matrix instructions. 3 kernels, none of them spilling "
        "registers; triton 3.7.",
    ]


def test_precision_table(results):
    assert tables.precision_table() == "not measured yet"
    row = {"arithmetic": "one tf32 product", "clips": 8, "max": "4.7e-01", "p999": "1.2e-01", "mean": "1.0e-03"}
    results("precision.csv", {**row, "torch": "2.13", "commit": "abc", "date": "2026-01-02"})
    lines = tables.precision_table().splitlines()
    assert lines[2] == "| one tf32 product | 4.7e-01 | 1.2e-01 | 1.0e-03 |"
    assert lines[-1] == "8 clips; torch 2.13, commit abc, 2026-01-02."


def test_encoder_tokens_table(results):
    """Of each size the last run."""
    assert tables.encoder_tokens_table() == "not measured yet"
    common = {"batch": 8, "patches": 512, "masked": 400, "objective": "joint", "turns": 5}
    common |= {"cores": 2, "device": "CPU X", "torch": "2.13", "commit": "abc", "date": "2026-01-02"}

    def row(variant, decoder, clips_per_s, times, low, high):
        figures = {"clips_per_processor_s": clips_per_s, "peak_gib": 2.5, "gflop_per_processor_s": 80.1, "threads": 1}
        for name, more in (("times", 0), ("processor_times", 0.25)):
            figures |= {name: times + more, f"{name}_low": low + more, f"{name}_high": high + more}
        return {"size": "base", "variant": variant, "decoder": decoder, **figures, "times_by_flop": 2.626, **common}

    results("encoder_tokens.csv", row("all", "", 9, 1, 1, 1), row("visible", "2 x 768", 9, 9, 9, 9))
    results("encoder_tokens.csv", row("all", "", 0.3, 1, 1, 1), row("visible", "2 x 768", 0.75, 2.5, 2.25, 2.7512))
    lines = tables.encoder_tokens_table().splitlines()
    assert lines[2].startswith("| base | all | none | 0.3 | 1 | 1 |")
    assert lines[3] == (
        "| base | visible | 2 x 768 | 0.75 | **2.75** [2.50, 3.00] | 2.50 [2.25, 2.75] | 2.63 | 80 | 2.50 GiB |"
    )
    assert len(lines) == 6 and lines[5].endswith("2 cores of CPU X, torch 2.13, commit abc, 2026-01-02.")
