"""What an encoder of visible patches saves: `python -m ssast.benchmarks.encoder_tokens [--save] [options]`.

`model.encoder_tokens: all` and `visible`, the latter with a decoder of the encoder's width and one of half of it, train
on the same noise from memory with the same objective and optimizer, each in a process of its own. They take turns, one
step at a time while the others wait, so that the machine is the same to all. A row for each says clips/s, the peak of
its memory, and how many times as fast as `all` it is, turn by turn: on the clock; in processor time, which a neighbour
that takes the processor away does not add to; and as the model's operations (engine/model/cost.py) would have it. On a
machine that others use, OMP_NUM_THREADS=1: threads that wait for each other count as work.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ssast.engine.config import Config, load_config
from ssast.engine.errors import UserError
from ssast.engine.model.config import HEAD_DIM, WIDTHS
from ssast.engine.model.cost import Flops, flops_per_clip

from .machine import environment_columns
from .rows import RESULTS, Row, Sink
from .turns import FEWEST_TURNS, Verdict, compare_turns, take_turns

FILE = RESULTS / "encoder_tokens.csv"
WARM_UP = 2  # steps; by then the optimizer's state and every buffer exist


def variants(size: str) -> dict[str, tuple[str, ...]]:
    """Settings by name; the first is what the others are compared with."""
    visible = "model.encoder_tokens=visible"
    return {
        "all": ("model.encoder_tokens=all",),
        "visible": (visible,),
        "visible, half-width decoder": (visible, f"model.decoder_width={_half(size)}"),
    }


def _half(size: str) -> int:
    """Of the encoder's width, or as near as whole attention heads of 64 come to it from above."""
    return -(-WIDTHS[size] // (2 * HEAD_DIM)) * HEAD_DIM


def config_of(size: str, batch: int, settings: tuple[str, ...], overrides: list[str]) -> Config:
    """The published preset of that size in fp32 on one process, with those settings."""
    fixed = [
        "step.engine=ddp",
        "deepspeed.bf16.enabled=false",
        f"deepspeed.train_batch_size={batch}",
        f"deepspeed.train_micro_batch_size_per_gpu={batch}",
        "deepspeed.gradient_accumulation_steps=1",
    ]
    return load_config(f"ssast-{size}-patch-400", [*fixed, *settings, *overrides])


def _child(pipe: Connection, config: Config, folder: str) -> None:
    """Builds a trainer, then computes a step whenever told to and says how long it took; at last its memory."""
    from ssast.engine.distributed.ranks import join_ranks

    from .throughput.measure import in_memory, nothing_to_read, pretrainer, run_steps, undisturbed

    ranks = join_ranks()
    config = undisturbed(config, Path(folder))
    before = _peak_bytes()
    trainer = pretrainer(config, nothing_to_read(config), ranks)
    batches = iter(in_memory(trainer, ranks.device))
    run_steps(trainer, batches, WARM_UP)
    pipe.send(trainer.engine.num_parameters())
    while pipe.recv():
        before_step = time.process_time()
        seconds, _ = run_steps(trainer, batches, 1)
        pipe.send((seconds[0], time.process_time() - before_step))
    pipe.send(_peak_bytes() - before)


def _peak_bytes() -> int:
    """Resident memory of this process at its highest. (What getrusage says begins with its parent's.)"""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


class Contestant:
    """One trainer in a process of its own."""

    def __init__(self, config: Config, folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_child, args=(other, config, folder), daemon=True)
        self._process.start()
        other.close()  # so that the end of the child is the end of the pipe
        self.parameters: int = self._receive()

    def step(self) -> tuple[float, float]:
        """Seconds of one more step, on the clock and of the processor's."""
        self._pipe.send(True)
        return self._receive()

    def finish(self) -> int:
        """Bytes of memory that it had at most, beyond its libraries."""
        self._pipe.send(False)
        return self._receive()

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.terminate()
        self._process.join()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise UserError(f"a process of the comparison ended with {code}, likely for want of memory") from None


def measure(size: str, batch: int, turns: int, overrides: list[str]) -> list[Row]:
    """A row for each variant.

    Raises:
        UserError: a process has ended before its time.
    """
    configs = {name: config_of(size, batch, each, overrides) for name, each in variants(size).items()}
    contestants: list[Contestant] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            contestants.extend(Contestant(config, folder) for config in configs.values())
            parameters = [each.parameters for each in contestants]
            seconds = take_turns(contestants, turns, lambda each, turn: each.step())
            peaks = [each.finish() for each in contestants]
        finally:
            for each in contestants:
                each.close()
    on_clock, on_processor = (
        [[batch / each[kind] for each in times] for times in seconds] for kind in (0, 1)
    )  # clips a second, by variant and turn
    rows: list[Row] = []
    reference: Flops | None = None  # the first one's
    for number, (name, config) in enumerate(configs.items()):
        model, masked = config.architecture, config.mask.num_masked
        passes = 2 if config.objective.masks == "separate" else 1
        flops = flops_per_clip(model, masked, objective=config.objective.name, passes=passes)
        reference = reference or flops
        clock, processor = (compare_turns(rates[0], rates[number]) for rates in (on_clock, on_processor))
        rows.append(
            {
                "size": size,
                "variant": name,
                "decoder": f"{model.decoder_depth} x {model.head_width}" if model.has_decoder else "",
                "parameters": parameters[number],
                "batch": batch,
                "patches": model.num_patches,
                "masked": masked,
                "objective": config.objective.name,
                "turns": turns,
                "threads": int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))),
                "clips_per_s": round(statistics.median(on_clock[number]), 4),
                "clips_per_processor_s": round(statistics.median(on_processor[number]), 4),
                "peak_gib": round(peaks[number] / 2**30, 3),
                "gflop_per_clip": round(flops.train / 1e9, 3),
                "gflop_per_processor_s": round(flops.train / 1e9 * statistics.median(on_processor[number]), 1),
                **_times("times", clock),
                **_times("processor_times", processor),
                "times_by_flop": round(reference.train / flops.train, 3),
                **environment_columns(),
            }
        )
    return rows


def _times(name: str, verdict: Verdict) -> dict[str, float]:
    values = {name: verdict.change, f"{name}_low": verdict.low, f"{name}_high": verdict.high}
    return {key: round(1 + (value or 0.0), 3) for key, value in values.items()}


def main(argv: list[str] | None = None) -> int:
    """Time the steps in turn and print or add rows; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ssast.benchmarks.encoder_tokens", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings of all of them")
    parser.add_argument("--sizes", nargs="+", choices=list(WIDTHS), default=["tiny", "base"])
    parser.add_argument("--batch", type=int, default=8, help="clips of a step")
    parser.add_argument("--turns", type=int, default=5, help="steps that each of them is timed for")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--save", action="store_const", dest="out", const=FILE, help=f"add rows to results/{FILE.name}")
    group.add_argument("--out", type=Path, help="CSV to add the rows to")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.turns < FEWEST_TURNS:
        parser.error(f"--turns {arguments.turns}: at least {FEWEST_TURNS}, or nothing can be said")
    sink = Sink(arguments.out)
    try:
        for size in arguments.sizes:
            for row in measure(size, arguments.batch, arguments.turns, arguments.overrides):
                print(
                    f"{size:6}{row['variant']:28} {row['clips_per_s']:9.3f} clips/s {row['peak_gib']:6.2f} GiB  "
                    f"{row['times']:.2f} x [{row['times_low']:.2f}, {row['times_high']:.2f}] on the clock, "
                    f"{row['processor_times']:.2f} x [{row['processor_times_low']:.2f}, "
                    f"{row['processor_times_high']:.2f}] in processor time, by operations {row['times_by_flop']:.2f} x",
                    file=sys.stderr,
                    flush=True,
                )
                sink.add(row)
    except UserError as error:
        print(f"ssast: {error}", file=sys.stderr)
        return error.exit_code
    sink.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
