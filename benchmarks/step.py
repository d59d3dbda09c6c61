"""How fast a training step is, over batch sizes and backends: `python -m ssast.benchmarks.step [--save] [options]`.

Every case is a config of `ssast pretrain` with some settings of its `step` section, fed with noise from memory, on one
device; beside them stand the baselines of benchmarks/throughput/step_baselines.py. Cases run one after another, each
timed for a few steps after those in which graphs are compiled; a case that does not fit, or cannot run here, becomes a
row that says so. Rows go to results/step.csv with --save, to the file of --out, or to stdout; MFU is model FLOP
(engine/cost.py) over the datasheet's dense bf16 peak.

Exit status: 0; 2 for a mistake on the command line; 3 if the deadline came before the last case.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ssast.engine.config import Config, load_config
from ssast.engine.distributed.ranks import Ranks, join_ranks
from ssast.engine.errors import UserError, first_line
from ssast.engine.model.adapt import build_model
from ssast.engine.model.cost import flops_per_clip

from .deadline import Deadline, DeadlinePassed
from .machine import device_columns, environment_columns, peak_tflops
from .rows import RESULTS, Row, Sink, read_rows
from .throughput.baseline_race import baseline_runner
from .throughput.measure import LOUDNESS, in_memory, nothing_to_read, pretrainer, run_steps, time_steps, undisturbed
from .throughput.step_baselines import step_baselines

FILE = RESULTS / "step.csv"
INCOMPLETE = 3
WARM_UP = 4
BASELINE_SECONDS = 8.0  # for one that is slow
Measured = tuple[list[float], dict[str, str], int]
"""Seconds of each step, how it was computed, and the clips of one."""


@dataclass(frozen=True)
class StepCase:
    """`provider`: "this engine", or a baseline's name."""

    micro_batch: int
    settings: tuple[str, ...] = ()
    provider: str = "this engine"


def cases(batches: list[int], engine: str, on_gpu: bool) -> Iterator[StepCase]:
    """What says most comes first: a deadline cuts off the end."""
    largest = batches[-1]
    base = (f"step.engine={engine}",)
    compile = ("encoder", "blocks") if on_gpu else ()  # on a CPU compiling takes longer than all else
    best = (*base, *(f"step.compile={each}" for each in compile[:1]))
    yield StepCase(largest, best)
    yield StepCase(largest, (*base, "step.compile=off"))
    yield StepCase(largest, provider="eager")
    yield StepCase(largest, provider="official way")
    for each in compile[1:]:
        yield StepCase(largest, (*base, f"step.compile={each}"))
    if engine == "deepspeed":
        for stage in (0, 1, 2):
            yield StepCase(largest, (*base, f"deepspeed.zero_optimization.stage={stage}", "step.compile=off"))
        yield StepCase(largest, ("step.engine=ddp", "step.compile=off"))
        yield StepCase(largest, ("step.engine=ddp", *best[1:]))
    if on_gpu:
        yield StepCase(largest, (*best, "step.fp8_mlp=true"))
        yield StepCase(largest, provider="torch.compile")
    for batch in reversed(batches[:-1]):
        yield StepCase(batch, best)
    for optimizer in ("torch", "torch-fused"):
        yield StepCase(largest, (*best, f"step.optimizer={optimizer}"))
    for kind in ("selective", "block"):
        yield StepCase(largest, (*best, f"step.activation_checkpointing={kind}"))
    if on_gpu:
        yield StepCase(largest, (*best, "step.attention=triton"))
        yield StepCase(largest, (*best, "step.compile_mode=reduce-overhead"))
        yield StepCase(batches[0], (*best, "step.compile_mode=reduce-overhead"))
        yield StepCase(largest, (*best, "step.compile_mode=max-autotune-no-cudagraphs"))
    if engine == "deepspeed":  # last: its state stays in memory
        yield StepCase(largest, (*base, "deepspeed.zero_optimization.stage=3", "step.compile=off"))


class StepBench:
    """Measures one case after another in this process."""

    def __init__(self, config: str, overrides: list[str], ranks: Ranks, steps: int, folder: Path) -> None:
        self.config, self.overrides, self.ranks, self.steps, self.folder = config, overrides, ranks, steps, folder
        self.peak, self.environment = peak_tflops(ranks.device), device_columns(ranks.device)
        self._attention: str | None = None
        """What the first case found fastest: measured again, another might come out ahead, and graphs would be compiled
        anew."""

    def row(self, case: StepCase) -> Row:
        """The case's row; "note" says why it has no figures, if it has none."""
        attention = [f"step.attention={self._attention}"] if self._attention else []
        config: Config = load_config(self.config, [*self.overrides, *attention, *case.settings])
        sizes = {"train_micro_batch_size_per_gpu": case.micro_batch, "gradient_accumulation_steps": 1}
        section = {key: value for key, value in config.deepspeed.items() if key != "train_batch_size"}
        config = undisturbed(config.model_copy(update={"deepspeed": section | sizes}), self.folder)
        seconds: list[float] = []
        described: dict[str, str] = {}
        clips, note = case.micro_batch, ""
        try:
            measured = self._engine(config) if case.provider == "this engine" else self._baseline(config, case.provider)
            seconds, described, clips = measured
        except (UserError, RuntimeError, ImportError) as error:  # torch.OutOfMemoryError is a RuntimeError
            note = first_line(error)[:200]
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.ranks.device.type == "cuda" else None
        torch._dynamo.reset()
        gc.collect()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        return self._as_row(config, case, clips, seconds, described, peak if seconds else None, note)

    def _engine(self, config: Config) -> Measured:
        trainer = pretrainer(config, nothing_to_read(config), self.ranks)
        if config.step.attention == "auto":
            self._attention = trainer.training_step.attention
        batches = iter(in_memory(trainer, self.ranks.device))
        try:
            run_steps(trainer, batches, WARM_UP)
            self._forget_peak()
            seconds, _ = run_steps(trainer, batches, self.steps)
            return seconds, trainer.training_step.describe(), trainer.training_step.micro_batch
        finally:
            trainer.engine.release()

    def _forget_peak(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _baseline(self, config: Config, name: str) -> Measured:
        data, device = nothing_to_read(config), self.ranks.device
        model = build_model(config.architecture, config.run.seed)
        (baseline,) = step_baselines(config, model, device, mean=data.mean, std=data.std, names=[name])
        micro_batch, _ = config.batch_sizes(1)
        generator = torch.Generator().manual_seed(config.run.seed)
        waveform = (LOUDNESS * torch.randn(micro_batch, config.num_samples, generator=generator)).to(torch.int16)
        runner = baseline_runner(baseline, [waveform.pin_memory() if device.type == "cuda" else waveform], device)
        self._forget_peak()
        (first,) = time_steps(runner.step, 1, device)
        count = max(2, min(self.steps, round(BASELINE_SECONDS / first)))
        return time_steps(runner.step, count, device), {"precision": baseline.precision}, runner.clips

    def _as_row(
        self,
        config: Config,
        case: StepCase,
        clips: int,
        seconds: list[float],
        described: dict[str, str],
        peak_gib: float | None,
        note: str,
    ) -> Row:
        clips_per_s = clips * len(seconds) / sum(seconds) if seconds else None
        flops = flops_per_clip(config.architecture, config.mask.num_masked, objective=config.objective.name)
        tflops = clips_per_s * flops.train / 1e12 if clips_per_s else None
        return {
            "preset": self.config,
            "provider": case.provider,
            "micro_batch": clips,
            "asked_batch": case.micro_batch,
            "settings": " ".join(case.settings),
            **{
                key: described.get(key, "")
                for key in ("engine", "precision", "compile", "attention", "optimizer", "norm")
            },
            "steps": len(seconds),
            "p50_ms": _rounded(np.median(seconds) * 1e3) if seconds else "",
            "p95_ms": _rounded(np.quantile(seconds, 0.95) * 1e3) if seconds else "",
            "clips_per_s": _rounded(clips_per_s),
            "tflop_per_clip": _rounded(flops.train / 1e12),
            "tflop_per_s": _rounded(tflops),
            "mfu": _rounded(tflops / self.peak["tflops"]) if tflops and self.peak else "",
            "peak_tflops": self.peak["tflops"] if self.peak else "",
            "peak_gib": _rounded(peak_gib),
            "note": note,
            **self.environment,
        }


def main(argv: list[str] | None = None) -> int:
    """The command; its exit status is described above."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    deadline, sink = Deadline(arguments.deadline), Sink(arguments.out)
    try:
        with deadline.running(), tempfile.TemporaryDirectory() as folder:
            ranks = join_ranks()
            bench = StepBench(arguments.config, arguments.overrides, ranks, arguments.steps, Path(folder))
            done = measured_before(arguments.out, bench)
            print(
                f"{'provider':14}{'batch':>6}  {'clips/s':>9}{'TFLOP/s':>9}{'MFU':>7}  {'peak':>9}  settings",
                file=sys.stderr,
            )
            for case in cases(arguments.batches, arguments.engine, ranks.device.type == "cuda"):
                if (case.provider, case.micro_batch, " ".join(case.settings)) not in done:
                    row = bench.row(case)
                    with deadline.held_off():
                        _show(row)
                        sink.add(row)
    except DeadlinePassed:
        pass
    except UserError as error:
        print(f"ssast: {error}", file=sys.stderr)
        return error.exit_code
    sink.close()
    if deadline.passed:
        print(f"the deadline of {arguments.deadline:g} s came first, after {len(sink.rows)} cases", file=sys.stderr)
    return INCOMPLETE if deadline.passed else 0


def measured_before(file: Path | None, bench: StepBench) -> set[tuple[str, int, str]]:
    """What a run of the same commit, machine and versions, cut off by its deadline, has measured already."""
    if file is None or not file.exists():
        return set()
    now = {
        key: str(value) for key, value in {**environment_columns(), "preset": bench.config}.items() if key != "device"
    }
    rows = [row for row in read_rows(file) if all(row[key] == value for key, value in now.items())]
    return {(row["provider"], int(row["asked_batch"]), row["settings"]) for row in rows}


def _show(row: Row) -> None:
    mfu = f"{float(row['mfu']):.1%}" if row["mfu"] else ""
    peak = f"{float(row['peak_gib']):.1f} GiB" if row["peak_gib"] else ""
    figures = f"{row['clips_per_s'] or '-':>9}{row['tflop_per_s'] or '-':>9}{mfu:>7}  {peak:>9}"
    print(
        f"{row['provider']:14}{row['micro_batch']:6}  {figures}  {row['settings']} {row['note']}",
        file=sys.stderr,
        flush=True,
    )


def _rounded(value: float | None) -> float | str:
    return float(f"{value:.5g}") if value is not None else ""


def _parse(argv: list[str]) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m ssast.benchmarks.step", description=__doc__.split("\n\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument(
        "--config", default="ssast-base-patch-400" if on_gpu else "demo", help="on a GPU the base model, on a CPU demo"
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[64, 128, 256] if on_gpu else [4, 8], help="micro-batches"
    )
    parser.add_argument(
        "--engine", choices=("deepspeed", "ddp"), default="deepspeed", help="step.engine of all cases but the last"
    )
    parser.add_argument("--steps", type=int, default=20 if on_gpu else 5, help="timed steps of a case")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="stop then; rows that are done are kept")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--save", action="store_const", dest="out", const=FILE, help="add the rows to results/step.csv")
    group.add_argument("--out", type=Path, help="CSV to add the rows to")
    arguments = parser.parse_intermixed_args(argv)
    arguments.batches.sort()
    return arguments


if __name__ == "__main__":
    sys.exit(main())
