"""Compile every Triton kernel that the operators launch, for GPUs that are not here: `python -m
ssast.benchmarks.compile_check [--save]`.

The public operators are called forward and backward with backend="triton" at the shapes of training, on CPU tensors.
Each launch on the way goes through Triton's own specialisation of its arguments and its compiler, for every target in
turn, and stops short of running: what is compiled is exactly what a GPU of that kind would be given. Batches are small,
since nothing depends on them but whether they divide by 16: 16 clips stand for those that do, and 24, in the first case
of each operator, for those that do not. Likewise float32.

It fails if a kernel spills registers, needs more shared or tensor memory than the chip has, or multiplies matrices
without the chip's matrix instructions, if the assembler warns of a loss of speed, and if an operator launches nothing.
--save replaces results/compile.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from ssast.engine.errors import UserError
from ssast.kernels import backend

from .cases import OPERATORS, Case, Provider, Setting
from .gate import as_tuple
from .rows import RESULTS

FILE = RESULTS / "compile.csv"
# type, clips, how many of the cases
ROUNDS = (
    (torch.bfloat16, 16, None),
    (torch.bfloat16, 24, 1),
    (torch.float32, 16, 1),
)
SHARED_LIMIT = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
"""KiB of shared memory that a block may have, by compute capability (CUDA C++ Programming Guide, "Technical
Specifications")."""
TENSOR_COLUMNS = 512  # of tensor memory, on datacentre Blackwell


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target, as the assembler made it. `hmma`, `hgmma`, `utchmma`: matrix instructions of Ampere,
    Hopper and datacentre Blackwell; `ldgsts`: asynchronous copies into shared memory.
    """

    kernel: str
    operator: str
    case: str
    target: str
    arguments: str  # what it is compiled for
    registers: int
    shared_bytes: int
    spills: int  # instructions that load from or store to local memory
    local_bytes: int
    tensor_columns: int
    hmma: int
    hgmma: int
    utchmma: int
    ldgsts: int
    instructions: int
    warps: int
    stages: int
    has_dot: bool
    advice: str  # what ptxas says that costs speed
    triton: str

    def faults(self) -> list[str]:
        """What is wrong with it, in words."""
        capability = int(self.target.removeprefix("sm_"))
        # Hopper's matrix instruction is issued by four warps together; fewer have Ampere's
        instructions = {9: ("hgmma",) if self.warps >= 4 else ("hmma",), 10: ("utchmma", "hmma")}.get(
            capability // 10, ("hmma",)
        )
        problems = [self.advice] if self.advice else []
        if self.spills or self.local_bytes:
            problems.append(f"spills: {self.spills} instructions, {self.local_bytes} bytes of local memory a thread")
        if self.shared_bytes > SHARED_LIMIT[capability] * 1024:
            problems.append(
                f"{self.shared_bytes} bytes of shared memory, the chip has {SHARED_LIMIT[capability]} KiB a block"
            )
        if self.tensor_columns > TENSOR_COLUMNS:
            problems.append(
                f"{self.tensor_columns} columns of tensor memory, the chip has {TENSOR_COLUMNS}: it would trap"
            )
        elif self.has_dot and not any(getattr(self, name) for name in instructions):
            problems.append(f"tl.dot without {' or '.join(name.upper() for name in instructions)}")
        return problems


# ---- launches without a GPU ------------------------------------------------------------------------------------------


@dataclass
class Recorder:
    """Stands in for JITFunction.run and for Triton's driver. Every launch is compiled for one target, and not run."""

    target: int
    operator: str = ""
    case: str = ""
    launches: int = 0
    # by hash: operator, case, kernel, compiled
    kernels: dict[str, tuple[str, str, str, Any]] = field(default_factory=dict)
    errors: dict[str, None] = field(default_factory=dict)  # a set in order

    # from here what the compiler asks of a driver

    def get_current_target(self) -> GPUTarget:
        """The GPU that is compiled for."""
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:
        """A number by which Triton keeps compiled kernels apart."""
        return self.target  # kernels are cached by device, and must not be across targets

    def get_current_stream(self, device: int) -> int:
        """None is there; nothing is launched."""
        return 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Kernels that are launched within are compiled and kept, not run."""
        compile_and_run = JITFunction.run

        def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            self.launches += 1
            try:
                compiled = compile_and_run(kernel, *args, grid=grid, warmup=True, **options)
            except Exception as error:
                self._fail(f"{kernel.fn.__name__} for sm_{self.target} does not compile: {_last_line(error)}")
            else:
                self.kernels.setdefault(compiled.hash, (self.operator, self.case, kernel.fn.__name__, compiled))

        def tune(tuner: Autotuner, *args: Any, **options: Any) -> None:
            """Any of its configurations could be the one chosen."""
            tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
            for config in tuner.prune_configs(options):
                tuner.fn.run(*args, **options, **config.all_kwargs())

        before = JITFunction.run, Autotuner.run, driver._active, backend.INTERPRETED, backend.ASSUMED_CAPABILITY
        JITFunction.run, Autotuner.run = run, tune
        driver.set_active(self)
        # take CPU tensors for such a GPU's
        backend.INTERPRETED, backend.ASSUMED_CAPABILITY = True, divmod(self.target, 10)
        try:
            yield
        finally:
            JITFunction.run, Autotuner.run, driver._active, backend.INTERPRETED, backend.ASSUMED_CAPABILITY = before

    def launch(self, name: str) -> None:
        """Everything that an operator launches."""
        self.operator, before = name, self.launches
        for dtype, batch, cases in ROUNDS:
            setting = Setting(
                torch.device("cpu"), dtype, production=True, with_triton=True, with_compiled=False, batch=batch
            )
            for case in itertools.islice(OPERATORS[name].cases(setting), cases):
                self.case = f"{case.shape} {case.dtype}"
                try:
                    _call(case, next(provider for provider in case.providers if provider.name == "triton"))
                except Exception as error:
                    self._fail(_last_line(error))
        if self.launches == before:
            self.case = "all cases"
            self._fail("no Triton kernel is launched")

    def _fail(self, what: str) -> None:
        self.errors[f"{self.operator} {self.case}: {what}"] = None


def _call(case: Case, provider: Provider) -> None:
    """Forward and backward; the numbers are whatever memory held."""
    inputs = {name: value.requires_grad_(name in case.learned) for name, value in case.make_inputs(0).items()}
    output = as_tuple(provider.run(**inputs))[0]
    if case.learned:
        torch.autograd.grad(output, [inputs[name] for name in case.learned], torch.ones_like(output))


def _last_line(error: Exception) -> str:
    """Triton ends with what is wrong, after the source."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"


# ---- what the assembler made -----------------------------------------------------------------------------------------


def inspect(operator: str, case: str, name: str, compiled: Any) -> Compiled:
    """What the machine code of a compiled kernel says of it."""
    usage, sass = _disassemble(compiled.asm["cubin"])
    names = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", sass, re.MULTILINE)
    count = {name: names.count(name) for name in set(names)}
    metadata = compiled.metadata
    return Compiled(
        kernel=name,
        operator=operator,
        case=case,
        target=f"sm_{metadata.target.arch}",
        arguments=_arguments(compiled.src),
        registers=usage["REG"],
        shared_bytes=metadata.shared + usage["SHARED"],
        spills=count.get("STL", 0) + count.get("LDL", 0),
        local_bytes=usage["STACK"] + usage["LOCAL"],
        tensor_columns=getattr(metadata, "tmem_size", None) or 0,
        hmma=count.get("HMMA", 0),
        hgmma=count.get("HGMMA", 0),
        utchmma=count.get("UTCHMMA", 0),
        ldgsts=count.get("LDGSTS", 0),
        instructions=len(names),
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        has_dot=has_dot(compiled.asm["ttir"]),
        advice=_advice(compiled.asm["ptx"], metadata.target.arch) if count.get("HGMMA") else "",
        triton=triton.__version__,
    )


def _arguments(source: Any) -> str:
    """NAME=VALUE for constants, NAME=TYPE for the others, with :16 for a number or address known to divide by 16."""
    texts = []
    for i, (name, kind) in enumerate(source.signature.items()):
        value = source.constants.get((i,))
        divides = ":16" if any(attribute[0] == "tt.divisibility" for attribute in source.attrs.get((i,), ())) else ""
        texts.append(f"{name}={getattr(value, '__name__', value) if kind == 'constexpr' else kind + divides}")
    return " ".join(texts)


def has_dot(ttir: str) -> bool:
    """Whether it multiplies matrices in a precision that the matrix units have: any but float32 without a tf32 or bf16
    split.
    """
    dots = re.findall(r"= tt\.dot.*", ttir)
    return any("inputPrecision" in dot or not re.search(r": tensor<[0-9x]+xf32>", dot) for dot in dots)


@functools.cache
def _disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:\d+ STACK:\d+ SHARED:\d+ LOCAL:\d+", text)
    if usage is None:
        raise ValueError(f"{command[0]}: no line on the use of registers and memory")
    return {name: int(value) for name, value in (pair.split(":") for pair in usage[0].split())}, text


@functools.cache
def _advice(ptx: str, target: int) -> str:
    """ptxas' first remark on a "Potential Performance Loss", such as C7515: every wgmma waits for the one before.
    Triton reads what ptxas says only where it fails, so it is run again; Hopper alone has such remarks.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, ptxas = Path(folder, "kernel.ptx"), get_ptxas(target).path
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={sm_arch_from_capability(target)}", source, "-o", Path(folder, "cubin")]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    remark = re.search(r"^.*Potential Performance Loss.*$", log, re.MULTILINE)
    return remark[0].strip() if remark else ""


# ---- the command -----------------------------------------------------------------------------------------------------

COLUMNS = {
    "kernel": "kernel",
    "operator": "operator",
    "case": "case",
    "variant": "variant",
    "target": "target",
    "registers": "regs",
    "shared": "shared KiB",
    "spills": "spills",
    "matrix": "HMMA/HGMMA/UTCHMMA",
    "ldgsts": "LDGSTS",
    "instructions": "instr",
    "warps": "warps",
    "stages": "stages",
}


def draw_table(kernels: Sequence[Compiled]) -> str:
    """A line for each kernel, to be read in a terminal."""
    rows = [list(COLUMNS.values())]
    variants = tell_apart(kernels)
    for each in kernels:
        matrix = f"{each.hmma}/{each.hgmma}/{each.utchmma}" if each.has_dot else "-"
        cells = asdict(each) | {
            "variant": variants[each],
            "shared": f"{each.shared_bytes / 1024:.1f}",
            "matrix": matrix,
        }
        rows.append([str(cells[name]) for name in COLUMNS])
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    left = list(COLUMNS).index("target")
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i <= left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def tell_apart(kernels: Sequence[Compiled]) -> dict[Compiled, str]:
    """Of each kernel the arguments that differ among those of the same name, case and target."""
    groups: dict[tuple[str, ...], list[Compiled]] = {}
    for each in kernels:
        groups.setdefault((each.operator, each.kernel, each.case, each.target), []).append(each)
    return {
        each: " ".join(
            pair for pair in each.arguments.split() if any(pair not in other.arguments.split() for other in group)
        )
        for group in groups.values()
        for each in group
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Compile all kernels and check their machine code; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ssast.benchmarks.compile_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"of {', '.join(OPERATORS)}; all by default")
    parser.add_argument(
        "--targets", type=int, nargs="+", metavar="CC", default=[80, 90, 100], help="compute capabilities"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", default=len(os.sched_getaffinity(0)), help="processes; the cores by default"
    )
    parser.add_argument("--save", action="store_true", help="replace benchmarks/results/compile.csv")
    arguments = parser.parse_intermixed_args(argv)
    try:
        return _check(arguments)
    except UserError as error:
        print(f"compile_check: {error}", file=sys.stderr)
        return error.exit_code


def _check(arguments: argparse.Namespace) -> int:
    for target in arguments.targets:
        if target not in SHARED_LIMIT:
            raise UserError(f"--targets {target}: unknown; there are {', '.join(map(str, SHARED_LIMIT))}")
    for operator in arguments.operators:
        if operator not in OPERATORS:
            raise UserError(f"unknown operator {operator!r}; there are {', '.join(OPERATORS)}")
    if arguments.save and arguments.operators:
        raise UserError("--save replaces the whole file: leave out the operators")
    began = time.perf_counter()
    kernels, failures, launches = [], [], 0
    for found, errors, count in _compile(arguments.operators or list(OPERATORS), arguments.targets, arguments.jobs):
        kernels += found
        failures += errors
        launches += count
    print(draw_table(kernels))
    failures += [
        f"{each.operator} {each.case}: {each.kernel} for {each.target}: {fault}"
        for each in kernels
        for fault in each.faults()
    ]
    for failure in failures:
        print(f"FAILED  {failure}")
    if arguments.save:
        _save(kernels)
    print(
        f"\n{launches} launches, {len(kernels)} kernels for "
        f"{', '.join(f'sm_{target}' for target in arguments.targets)}, "
        f"{len(failures)} failures; triton {triton.__version__}, {time.perf_counter() - began:.0f} s"
    )
    return 1 if failures else 0


def _compile(
    operators: Sequence[str], targets: Sequence[int], jobs: int
) -> list[tuple[list[Compiled], list[str], int]]:
    tasks = list(itertools.product(operators, targets))
    if jobs == 1:
        return [compile_operator(*task) for task in tasks]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(compile_operator, *zip(*tasks, strict=True)))


def compile_operator(operator: str, target: int) -> tuple[list[Compiled], list[str], int]:
    """Its distinct kernels, what went wrong, and how many launches there were."""
    recorder = Recorder(target)
    with recorder.listening():
        recorder.launch(operator)
    return [inspect(*entry) for entry in recorder.kernels.values()], list(recorder.errors), recorder.launches


def _save(kernels: Sequence[Compiled]) -> None:
    try:
        with open(FILE, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["variant", *Compiled.__dataclass_fields__])
            writer.writeheader()
            writer.writerows({"variant": variant, **asdict(each)} for each, variant in tell_apart(kernels).items())
    except OSError as error:
        raise UserError(f"{FILE}: cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    if knobs.runtime.interpret:  # @triton.jit has made interpreted functions of the kernels: start over
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        os.execve(sys.executable, [sys.executable, "-m", "ssast.benchmarks.compile_check", *sys.argv[1:]], environment)
    sys.exit(main())
