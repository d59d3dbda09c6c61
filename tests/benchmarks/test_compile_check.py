import csv
import inspect
import os
import subprocess
import sys
from dataclasses import replace

import pytest

import ssast.kernels
from ssast.benchmarks import compile_check
from ssast.benchmarks.cases import OPERATORS
from ssast.benchmarks.compile_check import Compiled, has_dot

KERNEL = Compiled(
    kernel="_k",
    operator="loss",
    case="B=16",
    target="sm_90",
    arguments="x=*bf16:16 BLOCK=64",
    registers=128,
    shared_bytes=1024,
    spills=0,
    local_bytes=0,
    tensor_columns=0,
    hmma=0,
    hgmma=4,
    utchmma=0,
    ldgsts=0,
    instructions=100,
    warps=4,
    stages=3,
    has_dot=True,
    advice="",
    triton="0",
)


def operators_of_kernels() -> set[str]:
    """Public functions whose callers may choose a Triton kernel, as their documentation says."""
    functions = {name: getattr(ssast.kernels, name) for name in ssast.kernels.__all__}
    return {
        name
        for name, function in functions.items()
        if inspect.isfunction(function)
        and "backend" in inspect.signature(function).parameters
        and '"triton"' in function.__doc__
    }


@pytest.mark.slow
def test_every_operator_compiles_for_every_generation(tmp_path):
    """The whole check, in a process of its own: this one may hold interpreted kernels."""
    file = tmp_path / "compile.csv"
    script = (
        "import sys; from pathlib import Path; from ssast.benchmarks import compile_check;"
        "compile_check.FILE = Path(sys.argv[1]); sys.exit(compile_check.main(['--targets', '80', '90', '100', "
        "'--save']))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    with open(file, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    compiled = {(OPERATORS[row["operator"]].function.__name__, row["target"]) for row in rows}
    assert compiled == {(name, target) for name in operators_of_kernels() for target in ("sm_80", "sm_90", "sm_100")}


def test_faults():
    assert KERNEL.faults() == []
    for fault, change in {
        "spills: 3 instructions, 16 bytes": {"spills": 3, "local_bytes": 16},
        "233472 bytes of shared memory, the chip has 227 KiB": {"shared_bytes": 228 * 1024},
        "tl.dot without HGMMA": {"hgmma": 0, "hmma": 8},
        "tl.dot without UTCHMMA or HMMA": {"target": "sm_100"},
        "C7515": {
            "advice": "ptxas info : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized"
        },
        "513 columns of tensor memory": {"target": "sm_100", "tensor_columns": 513},
        "tl.dot without HMMA": {"target": "sm_80"},
    }.items():
        found = replace(KERNEL, **change).faults()
        assert len(found) == 1 and fault in found[0], (fault, found)
    # a warpgroup instruction is out of one warp's reach
    assert replace(KERNEL, hgmma=0, hmma=8, warps=1).faults() == []
    assert replace(KERNEL, hgmma=0, has_dot=False).faults() == []


def test_has_dot():
    dot = "%acc = tt.dot %a, %b, %c{} : tensor<64x32x{}> * tensor<32x64x{}> -> tensor<64x64xf32> loc(#loc)"
    assert has_dot(dot.format("", "bf16", "bf16"))
    assert has_dot(dot.format(", inputPrecision = tf32", "f32", "f32"))
    assert not has_dot(dot.format("", "f32", "f32"))  # plain float32: no matrix unit computes that
    assert not has_dot("%x = arith.addf %a, %b : tensor<64x64xf32>")


def test_table_tells_variants_apart():
    other = replace(KERNEL, arguments="x=*bf16:16 BLOCK=16", hgmma=0, hmma=12, warps=1)
    lines = compile_check.draw_table([KERNEL, other]).splitlines()
    assert "BLOCK=64" in lines[1] and "BLOCK=16" in lines[2] and "*bf16" not in "".join(lines)
    assert "0/4/0" in lines[1] and "12/0/0" in lines[2]


def test_mistakes_are_one_line(capsys):
    for argv, message in [
        (["--targets", "75"], "compile_check: --targets 75: unknown; there are 80, 86,"),
        (["blur"], "compile_check: unknown operator 'blur'; there are fbank,"),
        (["mask", "--save"], "compile_check: --save replaces the whole file: leave out the operators"),
    ]:
        assert compile_check.main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith(message) and error.count("\n") == 1


@pytest.mark.slow
def test_starts_over_without_the_interpreter():
    command = [sys.executable, "-m", "ssast.benchmarks.compile_check", "mask", "--targets", "80", "--jobs", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0 and "_mask_kernel" in done.stdout, done.stdout + done.stderr
