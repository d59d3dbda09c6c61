"""`ssast pretrain CONFIG [key.sub=value ...]`; under a launcher: `deepspeed --module ssast.engine.pretrain CONFIG ...`, or torchrun."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml

from .config import Config, differences, dump_config, list_presets, load_config
from .cost import FLOP_FORMULA, count_parameters, flops_per_clip, memory_estimate
from .environment import describe_environment, source_diff
from .errors import UserError
from .model import SSAST, build_model, resize
from .ranks import join_ranks, launched_rank
from .weights import load_model

# What may differ between the config of a run folder and that of the command that goes on with it.
_MAY_CHANGE = """
run.name run.folder run.wandb train.steps train.log_every train.keep_last data.num_threads data.prefetch data.cache_dir
data.max_bad_fraction deepspeed.steps_per_print deepspeed.wall_clock_breakdown
"""
MAY_CHANGE = frozenset(_MAY_CHANGE.split())


def main(argv: list[str] | None = None) -> int:
    """Command-line entry; returns the exit status."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            print(describe_run(config))
            return 0
        if "RANK" not in os.environ:
            check_run_dir(config)
            ranks = arguments.ranks or max(1, torch.cuda.device_count())
            if ranks > 1:
                return launch(ranks, arguments.config, arguments.overrides)
        return run(config)
    except UserError as error:
        if error.every_rank or launched_rank() == 0:
            print(f"ssast: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def run(config: Config) -> int:
    """Pretrain on the ranks that there are. 0 when finished, or when asked to stop and saved."""
    from .data.dataset import open_dataset
    from .interrupt import StopRequest
    from .trainer import Trainer

    _quiet_libraries()
    ranks = join_ranks()
    run_dir = config.run_dir
    finished = ranks.once(lambda: prepare_run_dir(config, ranks.world_size))
    if finished:
        if ranks.is_first:
            print(f"{run_dir}: already finished; the report is {run_dir / 'report.html'}")
        return 0
    data = ranks.once(lambda: open_dataset(config.data, num_mel_bins=config.model.num_mel_bins, num_samples=config.num_samples))
    if ranks.is_first:
        _write_data_summary(run_dir, data)
    torch.manual_seed(config.run.seed)
    trainer = Trainer(config, data, start_model(config), ranks)
    with StopRequest() as stop_request:
        try:
            done = trainer.train(stop_request)
        except RuntimeError:
            if stop_request.asked:  # another rank has gone already; the last checkpoint is whole
                return 128 + signal.SIGTERM
            raise
    if ranks.is_first:
        _finish(config, data, run_dir, trainer.step, done)
    return 0


def start_model(config: Config) -> SSAST:
    """A fresh model, or the weights of `model.init_from` fitted to this config's input."""
    wanted = config.model_config_
    if config.model.init_from is None:
        return build_model(wanted, config.run.seed)
    model = load_model(config.model.init_from, heads=wanted.heads)
    if not model.config.pretraining_heads:
        raise UserError(f"{config.model.init_from}: is a fine-tuned model without pretraining heads; it cannot be pretrained on")
    try:
        return resize(model, wanted)
    except ValueError as error:
        raise UserError(f"{config.model.init_from}: does not fit model.*: {error} (file: {model.config})") from None


def prepare_run_dir(config: Config, world_size: int) -> bool:
    """Make the run folder, or check that it belongs to this config; return whether the run in it is finished."""
    from .checkpoint import checkpoint_steps, remove_incomplete

    check_run_dir(config)
    run_dir = config.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        remove_incomplete(run_dir)
        (run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        environment = run_dir / "environment.json"
        environment.write_text(json.dumps(describe_environment(world_size), indent=2) + "\n", encoding="utf-8")
        (run_dir / "source.diff").write_text(source_diff(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{run_dir}: the run folder cannot be written: {error.strerror}") from None
    steps = checkpoint_steps(run_dir)
    return bool(steps) and steps[-1] >= config.train.steps and (run_dir / "report.html").is_file()


def check_run_dir(config: Config) -> None:
    """Raise UserError if the run folder holds another run, or something that is no run."""
    run_dir = config.run_dir
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir}: is a file; choose another run.name or run.folder")
    if not run_dir.is_dir() or not any(run_dir.iterdir()):
        return
    saved = run_dir / "config.yaml"
    if not saved.is_file():
        raise UserError(f"{run_dir}: holds files but no run (no config.yaml); choose another run.name or run.folder")
    old, new = yaml.safe_load(saved.read_text(encoding="utf-8")) or {}, config.model_dump(mode="json")
    changed = [f"{key} was {before}, is now {after}" for key, before, after in differences(old, new) if key not in MAY_CHANGE]
    if changed:
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise UserError(
            f"{run_dir}: holds a run with another config ({'; '.join(changed[:4])}{more}); "
            "choose another run.name, or move that folder away"
        )


def describe_run(config: Config) -> str:
    """The resolved config and what it costs, without touching data or devices."""
    model_config = config.model_config_
    parameters = count_parameters(build_model(model_config))
    passes = 2 if config.objective.masks == "separate" else 1
    flops = flops_per_clip(model_config, config.mask.num_masked, objective=config.objective.name, passes=passes)
    section = config.deepspeed
    world_size = max(1, torch.cuda.device_count())
    micro_batch = section.get("train_micro_batch_size_per_gpu") or max(1, section["train_batch_size"] // world_size)
    memory = memory_estimate(
        model_config,
        parameters,
        micro_batch=micro_batch,
        bf16=config.bf16,
        stage=config.zero_stage,
        world_size=world_size,
    )
    grid = model_config.grid
    lines = [
        dump_config(config).rstrip(),
        "",
        f"parameters      {parameters:,}",
        f"tokens          {model_config.num_patches + 2} ({grid[0]}x{grid[1]} patches + 2), {config.mask.num_masked} masked, "
        f"{config.valid_num_masked} in validation",
        f"window          {config.num_samples} samples, {config.num_samples / config.data.sample_rate:.2f} s",
        f"FLOPs per clip  forward {flops.forward / 1e9:.2f} G, training {flops.train / 1e9:.2f} G",
        f"                {FLOP_FORMULA}",
        f"memory          {sum(memory.values()) / 2**30:.2f} GiB on each of {world_size} device(s), micro-batch {micro_batch}: "
        + ", ".join(f"{name} {value / 2**30:.2f}" for name, value in memory.items()),
    ]
    return "\n".join(lines)


def launch(ranks: int, config: str, overrides: list[str]) -> int:
    """Start `ranks` processes on this machine through the deepspeed launcher, pass signals on, and return its exit status."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_accelerators", str(ranks)]
    command += ["--master_port", str(_free_port()), "--module", "ssast.engine.pretrain", config, *overrides]
    environment = {**os.environ, "DS_ACCELERATOR": "cuda" if torch.cuda.is_available() else "cpu"}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    child = subprocess.Popen(command, env=environment)
    asked = False

    def pass_on(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        child.send_signal(number)  # the ranks see the launcher go, save and leave

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        _wait_for_ranks()
        return 0
    return status


def _wait_for_ranks() -> None:
    """Until the ranks that the launcher left behind have saved and gone; they were this process's grandchildren."""
    import psutil

    session = os.getpgid(0)
    while True:
        left = []
        for process in psutil.process_iter():
            try:
                if (
                    os.getpgid(process.pid) == session
                    and "ssast.engine.pretrain" in process.cmdline()
                    and process.pid != os.getpid()
                ):
                    left.append(process)
            except (psutil.Error, ProcessLookupError):
                continue
        if not left:
            return
        time.sleep(0.2)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _write_data_summary(run_dir: Path, data: Any) -> None:
    from .data.check import write_skipped

    write_skipped(run_dir / "skipped.csv", data.skipped)
    (run_dir / "data.json").write_text(json.dumps(data.summary(), indent=2) + "\n", encoding="utf-8")
    print(
        f"{len(data.train)} clips to train on and {len(data.valid)} to validate on, {data.train.hours + data.valid.hours:.2f} h; "
        f"mean {data.mean:.4f}, std {data.std:.4f}"
    )
    if data.skipped:
        print(f"warning: {len(data.skipped)} clips cannot be used; {run_dir / 'skipped.csv'} says why")


def _finish(config: Config, data: Any, run_dir: Path, step: int, done: bool) -> None:
    from .preview import write_preview
    from .report import write_report

    write_preview(config, data, run_dir, step)
    report = write_report(run_dir)
    if done:
        print(f"finished {step} steps; report: {report}")
    else:
        print(f"stopped at step {step} of {config.train.steps}, saved; run the same command to go on; report so far: {report}")


def _quiet_libraries() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ssast pretrain",
        description="Pretrain an audio spectrogram transformer on unlabeled audio.",
        epilog=f"presets: {', '.join(list_presets())}",
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file or the name of a preset")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="changes to the config, e.g. data.train=/audio train.steps=1000"
    )
    parser.add_argument("--ranks", type=int, help="processes on this machine; default one for each visible GPU, or one")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config, parameters, FLOPs and memory, and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # set by the deepspeed launcher
    return parser.parse_args(argv)


if __name__ == "__main__":
    status = main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(status)
