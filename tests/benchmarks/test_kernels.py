import csv
import dataclasses
import io
import math
import time

import pytest
import torch
from PIL import Image

from ssast.benchmarks import cases, kernels, plots
from ssast.benchmarks.cases import OPERATORS, Provider
from ssast.benchmarks.rows import read_rows
from ssast.kernels import law

QUICK = ["--seconds", "0.005"]


@pytest.fixture(autouse=True)
def _on_the_cpu_with_small_ceilings(monkeypatch):
    """The real ones take a second."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    real = cases.ceiling_cases

    def quick(setting):
        for case in real(setting):
            yield dataclasses.replace(
                case, make_inputs=lambda seed: {}, providers=(Provider("torch", lambda: torch.zeros(1)),)
            )

    monkeypatch.setattr(kernels, "ceiling_cases", quick)


def add_provider(monkeypatch, operator, provider):
    """To each case of the operator, and its last."""
    real = OPERATORS[operator]

    def more(setting):
        for case in real.cases(setting):
            yield dataclasses.replace(case, providers=(*case.providers, provider))

    monkeypatch.setitem(OPERATORS, operator, dataclasses.replace(real, cases=more))


def test_rows_are_complete(tmp_path):
    file = tmp_path / "new" / "rows.csv"
    assert kernels.main(["embed", "loss", "--out", str(file), *QUICK]) == 0
    rows = read_rows(file)
    assert [row["shape"].split()[0] for row in rows if row["operator"] == "ceiling"] == ["copy", "matmul"]
    measured = {(row["operator"], row["provider"], row["mode"]) for row in rows}
    assert {("embed", "torch", mode) for mode in kernels.MODES} <= measured
    assert {("loss", name, mode) for name in ("torch", "official loop") for mode in kernels.MODES} <= measured
    for row in rows:
        assert row["kind"] == "cpu" and row["power_limit_w"] == row["driver"] == ""
        for name in (
            "shape",
            "dtype",
            "method",
            "needed_bytes",
            "date",
            "commit",
            "device",
            "cores",
            "torch",
            "triton",
        ):
            assert row[name], name
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) and int(row["samples"]) >= 5
        if row["operator"] != "ceiling":
            seconds = float(row["p50_ms"]) / 1e3
            assert float(row["gb_per_s"]) == pytest.approx(int(row["needed_bytes"]) / seconds / 1e9, rel=1e-3)
            assert float(row["tflop_per_s"]) == pytest.approx(int(row["needed_flop"]) / seconds / 1e12, rel=1e-3)
            assert float(row["copy_share"]) > 0 and float(row["matmul_share"]) > 0
            assert 0 <= float(row["error"]) <= float(row["allowed"]) and row["checked"]
    # a second run adds to the file
    assert kernels.main(["mask", "--out", str(file), *QUICK]) == 0
    assert read_rows(file)[: len(rows)] == rows and {row["operator"] for row in read_rows(file)[len(rows) :]} == {
        "ceiling",
        "mask",
    }


def test_without_a_file_the_rows_go_to_stdout(capsys):
    assert kernels.main(["mask", "--providers", "torch", *QUICK]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["operator"] for row in rows] == ["ceiling", "ceiling", "mask", "mask"]


def test_pictures(tmp_path, capsys):
    assert kernels.main(["embed", "mask", "--modes", "forward", "--plot", str(tmp_path / "plots"), *QUICK]) == 0
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == ["embed.png", "mask.png", "roofline.png"]
    for name in names:
        with Image.open(tmp_path / "plots" / name) as image:
            assert image.width >= 1000 and len(image.convert("L").getcolors()) > 10


@pytest.mark.parametrize("flaw", ["output", "gradient", "dtype", "exception"])
def test_a_wrong_provider_is_never_timed(flaw, monkeypatch, tmp_path, capsys):
    calls = []

    def wrong(**inputs):
        calls.append(flaw)
        tokens = OPERATORS["embed"].function(**inputs, backend="torch")
        if flaw == "exception":
            raise RuntimeError("out of order\nat length")
        if flaw == "dtype":
            return tokens.double()
        if flaw == "gradient":  # of the bias alone, and not of much
            return tokens + 1e-3 * (inputs["bias"] - inputs["bias"].detach())
        return tokens + 1e-3 * torch.nn.functional.one_hot(torch.tensor(5), tokens.shape[2])

    add_provider(monkeypatch, "embed", Provider("wrong", wrong))
    file = tmp_path / "rows.csv"
    assert kernels.main(["embed", "--out", str(file), *QUICK]) == kernels.RED
    error = capsys.readouterr().err
    assert len(calls) == 1  # the check
    reason = {
        "output": "output errs 0.001",
        "gradient": "gradient of bias errs",
        "dtype": "output errs inf",
        "exception": "RuntimeError: out of order",
    }
    assert f"RED, not timed: wrong: {reason[flaw]}" in error
    assert {row["provider"] for row in read_rows(file) if row["operator"] == "embed"} == {"torch"}


def test_masks_must_be_equal(monkeypatch, capsys):
    def off_by_one(**_):
        mask = OPERATORS["mask"].function(32, seed=1, backend="torch")
        mask[3, 7] += 1
        return mask

    add_provider(monkeypatch, "mask", Provider("wrong", off_by_one))
    assert kernels.main(["mask", *QUICK]) == kernels.RED
    assert "RED" in capsys.readouterr().err


def test_the_deadline_is_kept(monkeypatch, tmp_path, capsys):
    def slow(**inputs):
        time.sleep(0.3)
        return OPERATORS["mask"].function(32, seed=1, backend="torch")

    add_provider(monkeypatch, "mask", Provider("slow", slow))
    file, began = tmp_path / "rows.csv", time.perf_counter()
    assert (
        kernels.main(["embed", "mask", "--modes", "forward", "--deadline", "1.5", "--out", str(file), *QUICK])
        == kernels.INCOMPLETE
    )
    assert time.perf_counter() - began < 6
    error = capsys.readouterr().err
    assert "mask B=32 8x64 M=400 official forward" in error.splitlines()[-1], "what is missing is named"
    rows = read_rows(file)
    assert {row["operator"] for row in rows} == {"ceiling", "embed"} and all(None not in row.values() for row in rows)


def test_law():
    exact = torch.tensor([1.0, -3.0], dtype=torch.float64)
    same = (exact + torch.tensor([0.0, 0.01])).to(torch.bfloat16)
    ulp = 2 * 2.0**-7  # of bfloat16 at 3
    error = (same.double() - exact).abs().max().item()
    assert law.error_and_allowance(same, same, exact) == (error, pytest.approx(2 * error + 2 * ulp))
    assert law.error_and_allowance(same.float(), same, exact)[0] == math.inf
    assert law.error_and_allowance(same[:1], same, exact)[0] == math.inf
    assert law.error_and_allowance(same * torch.nan, same, exact)[0] == math.inf


def test_mistakes_are_one_line(tmp_path, capsys):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.csv").write_text("")
    taken = tmp_path / "taken"
    taken.write_text("")
    for argv, named in [
        (["blur"], "'blur'"),
        (["mask", "--providers", "cuda"], "'cuda'"),
        (["mask", "--save", "--out", "x"], "--save and --out"),
        (["mask", "--seconds", "0"], "--seconds 0"),
        (["mask", "--out", str(taken / "rows.csv"), *QUICK], f"{taken}/rows.csv"),
        (["mask", "--out", str(tmp_path), *QUICK], f"{tmp_path}: cannot be written"),
        (["mask", "--out", str(tmp_path / "other.csv"), *QUICK], f"{tmp_path}/other.csv"),
        (["mask", "--out", str(tmp_path / "empty.csv"), *QUICK], f"{tmp_path}/empty.csv"),
        (["mask", "--plot", str(taken), *QUICK], f"--plot {taken}"),
    ]:
        assert kernels.main(argv) == 2, argv
        error = capsys.readouterr().err
        assert named in error.splitlines()[-1] and "Traceback" not in error, error
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"


def row(operator, provider, mode, micros, **more):
    given = {
        "operator": operator,
        "provider": provider,
        "mode": mode,
        "shape": "B=1",
        "dtype": "bfloat16",
        "p50_ms": f"{micros / 1e3}",
    }
    return {**given, "device": "NVIDIA H200", "needed_bytes": 4_000_000, **more}


def test_targets_are_judged_on_their_gpu_only():
    rows = [
        row("fbank", "triton", "forward", 120.0),  # the floor at 1e11 bytes/s is 40 us
        row("mask", "triton", "forward", 21.0),
        row("loss", "triton", "both", 100.0),
        row("loss", "compiled", "both", 300.0),
        row("loss", "compiled bmm", "both", 190.0),
    ]
    assert kernels.targets(rows, {"copy": 1e11}) == [
        "pass  fbank B=1: 120 us, target <= 140 us",
        "pass  fbank B=1, times its floor: 3 x, target <= 4 x",
        "MISS  mask B=1: 21 us, target <= 20 us",
        "MISS  loss B=1, faster than the best compiled: 1.9 x, target >= 2 x",
    ]
    assert kernels.targets([{**each, "device": "NVIDIA A100"} for each in rows], {"copy": 1e11}) == []


@pytest.mark.parametrize("operator", OPERATORS)
def test_production_cases_are_well_formed(operator):
    """Small stand-ins are what runs here; the shapes of a GPU are at least built, and their needs add up."""
    setting = cases.Setting(torch.device("cpu"), torch.bfloat16, production=True, with_triton=True, with_compiled=False)
    found = list(OPERATORS[operator].cases(setting))
    assert len({case.shape for case in found}) == len(found)
    for case in found:
        assert case.providers[0].name == "torch" and case.providers[-1].name != "torch"
        assert "triton" in [provider.name for provider in case.providers]
        assert set(case.needs) == (set(kernels.MODES) if case.learned else {"forward"})
        assert all(need.bytes > 0 and need.flop >= 0 for need in case.needs.values())


def test_colours_differ():
    names = [f"provider {i}" for i in range(6)]
    assert (
        len(set(plots._colours([{"provider": name} for name in [*names, "triton", "torch", "compiled"]]).values())) == 9
    )
