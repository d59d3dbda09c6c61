"""Runs the tests as other machines would: `python tests/machines.py [--quick] [PYTEST ARGUMENT ...]`.

What a float32 product rounds to depends on the processor: OpenBLAS, NumPy's matrix library, and PyTorch's own kernels
choose their code by its instruction sets. Environment variables choose it instead. A line is printed for each machine;
the exit status is 1 if the tests failed on any. --quick runs the tests marked `rounding` under two kernels of OpenBLAS;
`make test` does. Off x86, where these names mean nothing, only the number of threads varies.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "machines"


class Machine(NamedTuple):
    blas: str  # OPENBLAS_CORETYPE
    aten: str | None  # ATEN_CPU_CAPABILITY; None: what the processor has
    threads: int

    def __str__(self) -> str:
        return f"{self.blas} {self.aten or 'native'} {self.threads} thread{'s' if self.threads > 1 else ''}"


# Every kernel of OpenBLAS, every capability of PyTorch, one and two threads, and the pairs that processors have.
MACHINES = [
    Machine("Haswell", "avx2", 1),
    Machine("Zen", "avx2", 2),
    Machine("SkylakeX", None, 1),
    Machine("SkylakeX", "avx2", 2),
    Machine("Prescott", "default", 1),
    Machine("Haswell", "default", 2),
]
QUICK = [Machine("Haswell", "avx2", 1), Machine("Prescott", "default", 1)]
NEEDS = {"Haswell": {"avx2", "fma"}, "Zen": {"avx2", "fma"}, "SkylakeX": {"avx512f", "avx512bw", "avx512dq"}}


def obstacle(machine: Machine) -> str | None:
    """Why this computer cannot stand for that one."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None if machine in MACHINES[:2] else f"no difference on {platform.machine()}"
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return None
    flags = set(re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)[1].split())
    missing = sorted(NEEDS.get(machine.blas, set()) - flags)
    return f"this processor has no {', '.join(missing)}" if missing else None


def run(machine: Machine, arguments: list[str]) -> bool:
    environment = {**os.environ, "OPENBLAS_CORETYPE": machine.blas, "OMP_NUM_THREADS": str(machine.threads)}
    environment.pop("ATEN_CPU_CAPABILITY", None)
    if machine.aten:
        environment["ATEN_CPU_CAPABILITY"] = machine.aten
    log = LOGS / f"{str(machine).replace(' ', '-')}.log"
    began = time.monotonic()
    with log.open("w") as stream:
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *arguments]
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT).returncode
    text = log.read_text()
    last = text.splitlines()[-1] if text else "nothing was printed"
    result = "ok    " if status == 0 else "FAILED"
    print(f"{result} {machine!s:<28} {last.strip('= ')} ({time.monotonic() - began:.0f} s)", flush=True)
    if status:
        print("\n".join(f"    {line}" for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))))
        print(f"    {log.relative_to(ROOT)}", flush=True)
    return status == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tests marked `rounding`, on two machines")
    options, arguments = parser.parse_known_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    if options.quick:
        arguments = ["-m", "rounding", "tests/kernels", "tests/engine/model", *arguments]
    failed = False
    for machine in QUICK if options.quick else MACHINES:
        reason = obstacle(machine)
        if reason:
            print(f"left out {machine}: {reason}", flush=True)
        else:
            failed |= not run(machine, arguments)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
