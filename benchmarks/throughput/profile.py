"""Measure the training step of a config and write a throughput report."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ssast.engine.errors import UserError

MEASURE, RACE = "ssast.benchmarks.throughput.measure", "ssast.benchmarks.throughput.baseline_race"
VARIANTS = {
    **{f"ZeRO {stage}": ["step.engine=deepspeed", f"deepspeed.zero_optimization.stage={stage}"] for stage in range(4)},
    "DDP": ["step.engine=ddp"],
}
TURNS = 5


def main(argv: list[str] | None = None) -> int:
    """measure the training step of a config and write a throughput report"""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    import torch

    from ssast.engine.config import Config, load_config
    from ssast.engine.files import PROFILE_FOLDER

    config: Config = load_config(arguments.config, arguments.overrides)
    arguments.ranks = arguments.ranks or max(1, torch.cuda.device_count())
    arguments.engine = config.step.engine
    # the profiler would tell, among the progress, that it starts and stops
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    folder = arguments.out or config.run_dir / PROFILE_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}") from None
    with tempfile.TemporaryDirectory() as scratch:
        children = Children(arguments, Path(scratch))
        report = (compare if arguments.against else profile)(arguments, children, folder)
    print(report)
    return 0


def profile(arguments: argparse.Namespace, children: Children, folder: Path) -> Path:
    """One config, with what stands beside it; the report's path."""
    from ssast.engine.environment import describe_environment
    from ssast.engine.files import write_whole

    from .profile_report import write_throughput_report

    print(f"measuring {arguments.steps} steps on {arguments.ranks} rank(s) ...", file=sys.stderr, flush=True)
    measured = children.measure(out=folder / "measurement.json")
    (folder / "measurement.json").unlink()
    notes, rate = [], _clips_per_s(measured)
    on_gpu = measured["setup"]["device"] == "cuda"
    if measured["setup"]["source"] != "audio files":
        notes.append("Steps were fed with noise from memory; the loader was not measured.")
    baselines = []
    if arguments.baselines:
        names = ["official way", "eager", "torch.compile"] if on_gpu else ["official way", "eager"]
        print(f"racing {', '.join(names)} ...", file=sys.stderr, flush=True)
        baselines = children.race(names)
        if not on_gpu:
            notes.append(
                "torch.compile is no baseline on a CPU: it takes longer to compile than all else here together."
            )
    variants = []
    if arguments.variants:
        for name, overrides in VARIANTS.items():
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            clips_per_s = _clips_per_s(children.measure(overrides, quick=True))
            variants.append({"name": name, "clips_per_s": clips_per_s, "ratio": clips_per_s / rate})
    scaling = []
    if arguments.scaling and arguments.ranks > 1:
        for ranks in [*_powers_of_two_below(arguments.ranks), arguments.ranks]:
            print(f"measuring {ranks} rank(s) ...", file=sys.stderr, flush=True)
            scaling.append({"ranks": ranks, "clips_per_s": _clips_per_s(children.measure(ranks=ranks, quick=True))})
    environment = describe_environment(arguments.ranks)
    contents = {
        "format": 1,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["ssast", "profile", *arguments.given]),
        "environment": {**environment, "gpu": measured.pop("gpu")},
        **measured,
        "scaling": scaling,
        "variants": variants,
        "baselines": baselines,
        "notes": notes,
    }
    write_whole(folder / "profile.json", json.dumps(contents, indent=1) + "\n")
    return write_throughput_report(folder)


def compare(arguments: argparse.Namespace, children: Children, folder: Path) -> Path:
    """Two configs in turns, each turn in processes of its own; prints the verdict, and returns where it is written
    down.
    """
    from ssast.benchmarks.turns import compare_turns, take_turns
    from ssast.engine.files import write_whole

    other = arguments.against
    b = {"overrides": [other]} if "=" in other else {"config": other}

    def measure(side: str, turn: int) -> float:
        print(f"turn {turn + 1} of {arguments.turns}: {side}", file=sys.stderr, flush=True)
        return _clips_per_s(children.measure(quick=True, **(b if side == "B" else {})))

    rates = take_turns("AB", arguments.turns, measure)
    verdict = compare_turns(*rates)
    a_name = shlex.join([arguments.config, *arguments.overrides])
    contents = {
        "a": a_name,
        "b": f"{a_name} {other}" if "=" in other else other,
        "clips_per_s": {"a": rates[0], "b": rates[1]},
        "verdict": verdict.text,
        "command": shlex.join(["ssast", "profile", *arguments.given]),
    }
    path = folder / "comparison.json"
    write_whole(path, json.dumps(contents, indent=1) + "\n")
    print(f"A: {contents['a']}\nB: {contents['b']}\n{verdict.text}")
    return path


class Children:
    """Measurements in processes of their own, so that none inherits another's memory, compiled code or settings."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        self.arguments, self.scratch, self._count = arguments, scratch, 0

    def measure(
        self,
        overrides: list[str] | None = None,
        *,
        config: str | None = None,
        ranks: int | None = None,
        quick: bool = False,
        out: Path | None = None,
    ) -> dict[str, Any]:
        """One measurement of throughput/measure.py; `quick`: only the steps' times.

        Raises:
            UserError: it ended without a result.
        """
        arguments = self.arguments
        options = ["--steps", str(arguments.steps), "--warmup", str(arguments.warmup)]
        options += ["--quick"] * quick + ["--synthetic"] * arguments.synthetic
        overrides = [*arguments.overrides, *(overrides or [])]
        engine = next(
            (item.partition("=")[2] for item in reversed(overrides) if item.startswith("step.engine=")),
            arguments.engine,
        )
        return self._run(
            MEASURE, [config or arguments.config, *overrides, *options], ranks or arguments.ranks, engine, out
        )

    def race(self, names: list[str]) -> list[dict[str, Any]]:
        """On one rank, whatever the run has."""
        arguments = self.arguments
        options = ["--names", *names, "--turns", str(arguments.turns)]
        return self._run(RACE, [arguments.config, *arguments.overrides, *options], 1, arguments.engine)

    def _run(self, module: str, arguments: list[str], ranks: int, engine: str, out: Path | None = None) -> Any:
        from ssast.engine.distributed.launch import launch

        self._count += 1
        out = out or self.scratch / f"{self._count}.json"
        status: int | None
        if ranks == 1:
            status = subprocess.run([sys.executable, "-m", module, str(out), *arguments], check=False).returncode
        else:
            status = launch(ranks, module, [str(out), *arguments], engine=engine)
        if status or not out.exists():
            raise UserError(f"the measurement ended without a result (exit status {status}); what it said stands above")
        return json.loads(out.read_text(encoding="utf-8"))


def _clips_per_s(measured: dict[str, Any]) -> float:
    """Over all timed steps together, as the report has it."""
    seconds = measured["steps"]["seconds"]
    return measured["setup"]["clips_per_step"] * len(seconds) / sum(seconds)


def _powers_of_two_below(ranks: int) -> list[int]:
    return [2**power for power in range(ranks.bit_length()) if 2**power < ranks]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ssast profile",
        description="Measure the training step of a config, without training, and write report.html, report.json, "
        "pictures and a trace for Perfetto into RUN_FOLDER/profile.",
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file or the name of a preset")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="changes to the config, as for ssast pretrain"
    )
    parser.add_argument("--ranks", type=int, help="processes on this machine; default one for each visible GPU, or one")
    parser.add_argument("--steps", type=int, default=30, help="steps that are timed (default 30)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them that are not (default 5)")
    parser.add_argument(
        "--auto-batch", action="store_true", help="with the largest micro-batch that fits (step.auto_batch=true)"
    )
    parser.add_argument("--synthetic", action="store_true", help="feed noise from memory instead of data.train")
    parser.add_argument(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="race the official way and plain PyTorch",
    )
    parser.add_argument("--variants", action="store_true", help="also measure ZeRO 0 to 3 and DDP")
    parser.add_argument("--scaling", action="store_true", help="also measure 1, 2, 4, ... ranks")
    parser.add_argument(
        "--against",
        metavar="B",
        help="measure CONFIG and B, another config or one override of CONFIG (key=value), in turns, and judge",
    )
    parser.add_argument(
        "--turns", type=int, default=TURNS, help=f"of --against, and beside the baselines (default {TURNS})"
    )
    parser.add_argument("--out", type=Path, help="folder to write into, instead of RUN_FOLDER/profile")
    arguments = parser.parse_intermixed_args(argv)
    for name, least in (("ranks", 1), ("steps", 2), ("warmup", 3), ("turns", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    arguments.given = argv
    if arguments.auto_batch:
        arguments.overrides.append("step.auto_batch=true")
    return arguments


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"ssast: {error}")
