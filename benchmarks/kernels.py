"""How fast the operators are: `python -m ssast.benchmarks.kernels [OPERATOR ...] [options]`.

Every provider of a case is first checked against the exact result in float64, outputs and gradients. One that fails is
said to, is never timed, and makes the exit status 1. The others are timed side by side (timing.py tells how) in three
modes: `forward`, `backward` (of a forward pass that is not timed) and `both`. Each becomes a row with all that it was
measured under. Rates have the numerators of formulas.py; `copy_share` and `matmul_share` hold them against a large copy
and a large matrix product (bfloat16 on a GPU, float32 on a CPU) measured in the same run, which have rows of their own.

The table goes to stderr as it grows; the rows go to results/kernels.csv with --save, to the file of --out, or to
stdout. On a GPU the shapes are those of training, on a CPU small ones. Exit status: 0; 1 if a provider was wrong; 2 for
a mistake on the command line; 3 if the deadline came first.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ssast.engine.errors import UserError, first_line

from .cases import CEILING, COPY, MATMUL, OPERATORS, Case, Provider, Setting, ceiling_cases
from .deadline import Deadline, DeadlinePassed
from .gate import Gate, Verdict, as_tuple
from .machine import device_columns
from .rows import RESULTS, Row, Sink
from .timing import Job, Timing, measure

FILE = RESULTS / "kernels.csv"
MODES = ("forward", "backward", "both")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RED, INCOMPLETE = 1, 3


def say(text: str) -> None:
    """To stderr: stdout is for rows."""
    print(text, file=sys.stderr, flush=True)


# ---- one case --------------------------------------------------------------------------------------------------------


class Bench:
    """A case with its inputs on the device: checks providers, then makes jobs of them for each mode."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        self.case, self.device, self.seed = case, device, seed
        first = case.make_inputs(seed)
        size = sum(value.numel() * value.element_size() for value in first.values())
        self.sets = (
            1 if case.operator == CEILING else 2 if device.type == "cpu" else max(3, min(8, (4 << 30) // max(size, 1)))
        )
        self.inputs = [first, *(case.make_inputs(seed + i) for i in range(1, self.sets))]
        self.gradients: list[torch.Tensor | None] = [None] * self.sets

    def judge(
        self, providers: Sequence[Provider], reference: Provider
    ) -> Iterator[tuple[Provider, dict[str, Verdict] | str]]:
        """Each provider with its verdicts, or with what it raised."""
        try:
            if self.case.learned:
                with torch.no_grad():
                    output = as_tuple(reference.run(**self.inputs[0]))[0]
                self.gradients = [self._gradient(output, self.seed + i) for i in range(self.sets)]
            gate = Gate(self.case, reference, self.inputs[0], self.gradients[0])
        except Exception as error:
            for provider in providers:
                yield provider, f"the reference itself cannot run: {type(error).__name__}: {first_line(error)}"
            return
        for provider in providers:
            try:
                yield provider, gate.judge(provider)
            except Exception as error:
                yield provider, f"{type(error).__name__}: {first_line(error)}"

    def _gradient(self, output: torch.Tensor, seed: int) -> torch.Tensor:
        """A loss's own is 1."""
        generator = torch.Generator(self.device).manual_seed(seed)
        drawn = torch.randn(output.shape, generator=generator, device=self.device).to(output.dtype)
        return drawn if output.ndim else torch.ones_like(output)

    def job(self, provider: Provider, mode: str) -> Job:
        """The provider in one mode, as a job that can be timed."""
        learned = self.case.learned
        leaves = [
            {name: value.detach().requires_grad_(name in learned) for name, value in inputs.items()}
            for inputs in self.inputs
        ]

        def forward(i: int, _: Any = None) -> torch.Tensor:
            return as_tuple(provider.run(**leaves[i]))[0]

        def backward(i: int, output: torch.Tensor) -> Any:
            return torch.autograd.grad(output, [leaves[i][name] for name in learned], self.gradients[i])

        def both(i: int, _: Any) -> Any:
            return backward(i, forward(i))

        make = functools.partial(Job, provider.name, self.sets, loops_on_host=provider.loops_on_host)
        if mode == "backward":
            return make(run=backward, prepare=forward)
        return make(run=forward if mode == "forward" else both)

    def peak_mib(self, job: Job) -> float | None:
        """Memory that a call takes beyond its inputs, its forward pass included; unknown on the CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        job.run(0, job.prepared(0))
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20


# ---- rows ------------------------------------------------------------------------------------------------------------


def make_row(
    case: Case,
    provider: Provider,
    mode: str,
    timing: Timing,
    verdict: Verdict | None,
    peak: float | None,
    ceilings: dict[str, float],
) -> Row:
    """Without the environment. `ceilings`: bytes and operations a second, as far as they are known."""
    need, median = case.needs[mode], timing.quantile(0.5)
    rates = {COPY: need.bytes / median, MATMUL: need.flop / median}
    has = {COPY: case.operator != CEILING or COPY in case.shape, MATMUL: need.flop > 0}
    fractions = {name: rates[name] / ceilings[name] if has[name] and name in ceilings else None for name in rates}
    return {
        "operator": case.operator,
        "provider": provider.name,
        "mode": mode,
        "shape": case.shape,
        "dtype": case.dtype,
        "p20_ms": _figures(timing.quantile(0.2) * 1e3),
        "p50_ms": _figures(median * 1e3),
        "p80_ms": _figures(timing.quantile(0.8) * 1e3),
        "samples": len(timing.samples),
        "method": timing.method,
        "needed_bytes": need.bytes,
        "needed_flop": need.flop,
        "gb_per_s": _figures(rates[COPY] / 1e9 if has[COPY] else None),
        "tflop_per_s": _figures(rates[MATMUL] / 1e12 if has[MATMUL] else None),
        "copy_share": _figures(fractions[COPY]),
        "matmul_share": _figures(fractions[MATMUL]),
        "peak_mib": _figures(peak),
        "checked": verdict.checked if verdict else "",
        "error": _figures(verdict.error if verdict else None),
        "allowed": _figures(verdict.allowed if verdict else None),
        "note": "; ".join(text for text in (provider.note, timing.remark) if text),
    }


def _figures(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


# ---- the command -----------------------------------------------------------------------------------------------------


class Run:
    """All that is measured in one call of the command."""

    def __init__(self, setting: Setting, sink: Sink, deadline: Deadline, *, seconds: float, seed: int) -> None:
        self.setting, self.sink, self.deadline, self.seconds, self.seed = setting, sink, deadline, seconds, seed
        self.environment = device_columns(setting.device)
        self.ceilings: dict[str, float] = {}
        self.red: list[str] = []
        self.done: set[tuple[str, str, str]] = set()  # operator, shape, mode

    def measure(self, case: Case, providers: Sequence[Provider], modes: Sequence[str]) -> None:
        """Check the providers of a case, time those that are right, and hand on their rows."""
        say(f"\n{case.operator}  {case.shape}  {case.dtype}")
        bench = Bench(case, self.setting.device, self.seed)
        verdicts: dict[str, dict[str, Verdict]] = {}
        for provider, judged in bench.judge(providers, case.providers[0]) if case.exact else ():
            if isinstance(judged, str):
                self._refuse(case, provider, judged)
            elif wrong := [mode for mode in judged if judged[mode].is_red]:
                worst = judged[wrong[0]]
                self._refuse(case, provider, f"{worst.checked} errs {worst.error:.3g}, allowed {worst.allowed:.3g}")
            else:
                verdicts[provider.name] = judged
        green = [provider for provider in providers if provider.name in verdicts or not case.exact]
        for mode in modes:
            jobs = [bench.job(provider, mode) for provider in green]
            peaks = [bench.peak_mib(job) for job in jobs]
            timings = measure(jobs, self.setting.device, self.seconds) if jobs else {}
            rows = []
            for provider, peak in zip(green, peaks, strict=True):
                verdict = verdicts[provider.name][mode] if case.exact else None
                rows.append(make_row(case, provider, mode, timings[provider.name], verdict, peak, self.ceilings))
            with self.deadline.held_off():
                for row in rows:
                    self.sink.add({**row, **self.environment})
                self.done.add((case.operator, case.shape, mode))
            say_rows(mode, rows)
        if case.operator == CEILING:
            kind, need, median = case.shape.split()[0], case.needs["forward"], timings["torch"].quantile(0.5)
            self.ceilings[kind] = (need.bytes if kind == COPY else need.flop) / median

    def _refuse(self, case: Case, provider: Provider, reason: str) -> None:
        if self.deadline.passed:  # interrupted, and not its fault
            raise DeadlinePassed
        self.red.append(f"{case.operator} {case.shape}: {provider.name}")
        say(f"  RED, not timed: {provider.name}: {reason}")


def say_rows(mode: str, rows: Sequence[Row]) -> None:
    """A line for each row, the fastest first."""
    for row in sorted(rows, key=lambda row: float(row["p50_ms"])):
        texts = [f"  {mode:9}{row['provider']:15}{row['p50_ms']:>9} ms [{row['p20_ms']}, {row['p80_ms']}]".ljust(58)]
        for rate, unit, fraction, name in (
            ("gb_per_s", "GB/s", "copy_share", COPY),
            ("tflop_per_s", "TFLOP/s", "matmul_share", MATMUL),
        ):
            of = f" ({float(row[fraction]):.1%} of {name})" if row[fraction] else ""
            texts.append((f"{float(row[rate]):.3g} {unit}{of}" if row[rate] else "").ljust(30))
        texts.append(f"{row['peak_mib']:>6} MiB" if row["peak_mib"] else "")
        texts.append(f"err {row['error']} of {row['allowed']} ({row['checked']})" if row["checked"] else "")
        say(" ".join(texts).rstrip() + (f"  {row['samples']} x {row['method']}" if row["operator"] == CEILING else ""))


def targets(rows: Sequence[Row], ceilings: dict[str, float]) -> list[str]:
    """The project's own targets beside what was measured. They are for an H200-class GPU; other machines are not
    judged.
    """
    if not rows or "H200" not in rows[0]["device"]:
        return []
    lines = []

    def state(what: str, value: float, unit: str, limit: float, *, at_least: bool = False) -> None:
        met = value >= limit if at_least else value <= limit
        lines.append(
            f"{'pass' if met else 'MISS'}  {what}: {value:.3g} {unit}, target {'>=' if at_least else '<='} "
            f"{limit:.3g} {unit}"
        )

    ours = [row for row in rows if row["provider"] == "triton"]
    for row in ours:
        micros, name = float(row["p50_ms"]) * 1e3, f"{row['operator']} {row['shape']}"
        if row["operator"] == "fbank":
            state(name, micros, "us", 140)
            if COPY in ceilings:
                state(f"{name}, times its floor", micros * 1e-6 * ceilings[COPY] / row["needed_bytes"], "x", 4)
        if row["operator"] == "mask":
            state(name, micros, "us", 20)
        if row["operator"] == "loss" and row["mode"] == "both":
            same = [
                other for other in rows if all(other[key] == row[key] for key in ("operator", "shape", "dtype", "mode"))
            ]
            compiled = [float(other["p50_ms"]) * 1e3 for other in same if other["provider"].startswith("compiled")]
            if compiled:
                state(f"{name}, faster than the best compiled", min(compiled) / micros, "x", 2, at_least=True)
    return lines


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: an unknown operator, or options that contradict each other.
    """
    parser = argparse.ArgumentParser(
        prog="python -m ssast.benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("operators", nargs="*", metavar="OPERATOR", help=f"of {', '.join(OPERATORS)}; all by default")
    add("--save", action="store_true", help="add the rows to benchmarks/results/kernels.csv")
    add("--out", type=Path, metavar="FILE", help="add the rows to this CSV file")
    add("--plot", type=Path, metavar="DIR", help="draw bar charts and a roofline into this folder")
    add("--modes", nargs="+", choices=MODES, default=MODES)
    add("--providers", nargs="+", metavar="NAME", help="only these; all that there are by default")
    add("--dtype", choices=DTYPES, help="bfloat16 by default on a GPU, float32 on a CPU")
    add("--small", action="store_true", help="small shapes on a GPU, too")
    add("--compiled", action=argparse.BooleanOptionalAction, help="torch.compile baselines; by default on a GPU only")
    add(
        "--seconds",
        type=float,
        metavar="S",
        help="time each case and mode for so long, all providers together; 1 on a GPU, 0.4 on a CPU",
    )
    add(
        "--deadline",
        type=float,
        metavar="S",
        help="stop after so many seconds, keep what there is, and say what is missing",
    )
    add("--seed", type=int, default=0, help="of the inputs")
    arguments = parser.parse_intermixed_args(argv)
    for operator in arguments.operators:
        if operator not in OPERATORS:
            raise UserError(f"unknown operator {operator!r}; there are {', '.join(OPERATORS)}")
    if arguments.save and arguments.out:
        raise UserError("--save and --out name two files: give one of them")
    for option in ("seconds", "deadline"):
        if (value := getattr(arguments, option)) is not None and not value > 0:
            raise UserError(f"--{option} {value:g}: must be above 0")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status is described above."""
    try:
        return run(parse(argv))
    except UserError as error:
        say(f"kernels: {error}")
        return error.exit_code


def run(arguments: argparse.Namespace) -> int:
    """Measure what the command line asks for; the exit status.

    Raises:
        UserError: a provider that there is not.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    setting = Setting(
        device=device,
        dtype=DTYPES[arguments.dtype or ("bfloat16" if on_gpu else "float32")],
        production=on_gpu and not arguments.small,
        with_triton=on_gpu,
        with_compiled=on_gpu if arguments.compiled is None else arguments.compiled,
    )
    cases = [case for name in arguments.operators or OPERATORS for case in OPERATORS[name].cases(setting)]
    names = {provider.name for case in cases for provider in case.providers}
    names_asked = set(arguments.providers or names)
    if unknown := sorted(names_asked - names - {"triton"}):
        raise UserError(f"no provider {unknown[0]!r} here; there are {', '.join(sorted(names))}")
    plan = [(case, list(case.providers), ["forward"]) for case in ceiling_cases(setting)]
    for case in cases:
        providers = [provider for provider in case.providers if provider.name in names_asked]
        plan += [(case, providers, [mode for mode in arguments.modes if mode in case.needs])] if providers else []

    sink, deadline = Sink(FILE if arguments.save else arguments.out), Deadline(arguments.deadline)
    work = Run(setting, sink, deadline, seconds=arguments.seconds or (1.0 if on_gpu else 0.4), seed=arguments.seed)
    say(", ".join(f"{name} {value}" for name, value in work.environment.items() if value != ""))
    if not on_gpu:
        say("no GPU: reference rows at small shapes; Triton kernels run on a GPU only and are absent here")
    with deadline.running():
        for case, providers, modes in plan:
            with _own_stream(device):
                work.measure(case, providers, modes)
            _forget(device, setting.with_compiled)

    say("")
    for line in targets(sink.rows, work.ceilings):
        say(line)
    if arguments.plot and sink.rows:
        from .plots import plot

        for file in plot(sink.rows, arguments.plot):
            say(f"drawn: {file}")
    sink.close()
    missing = [
        f"{case.operator} {case.shape} {mode}"
        for case, _, modes in plan
        for mode in modes
        if (case.operator, case.shape, mode) not in work.done
    ]
    if missing:
        say(f"the deadline of {arguments.deadline:g} s came first; not measured: {'; '.join(missing)}")
    if work.red:
        say(f"wrong, and therefore not timed: {'; '.join(work.red)}")
    return RED if work.red else INCOMPLETE if missing else 0


def _own_stream(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()


def _forget(device: torch.device, with_compiled: bool) -> None:
    """Free a case's memory and compiled code before the next one."""
    gc.collect()
    if with_compiled:
        torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
