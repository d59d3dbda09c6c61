"""Starting the ranks of one machine through the deepspeed launcher, and what a rank does when its work cannot go on."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType

import psutil
import torch

from ssast.engine.errors import UserError, first_line
from ssast.engine.process import settle_process

from .interrupt import LEADER_VARIABLE, StopRequest
from .ranks import speaks_for_its_node

_PR_SET_PDEATHSIG = 1
LAUNCHER_NOTICES_S = 3.0


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    """How many processes a command that trains is to start, and what DeepSpeed's launcher tells each of them."""
    parser.add_argument("--ranks", type=int, help="processes on this machine; default one for each visible GPU, or one")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def count_ranks(asked: int | None) -> int:
    """Processes to start on this machine; by default one for each visible GPU, or one.

    Raises:
        UserError: fewer than one was asked for.
    """
    ranks = asked if asked is not None else max(1, torch.cuda.device_count())
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: at least one process is needed")
    return ranks


def one_line_errors(
    work: Callable[[], int], *, on_interrupt: str = "ssast: stopped; run the same command to resume"
) -> int:
    """The exit status of `work`. A user's mistake is one line, of one rank where all make it, and so is Ctrl-C, unless
    `on_interrupt` is empty.
    """
    settle_process()
    try:
        return work()
    except UserError as error:
        if error.every_rank or speaks_for_its_node():
            print(f"ssast: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:  # before there is a step to finish and save
        if on_interrupt and speaks_for_its_node():
            print(on_interrupt, file=sys.stderr, flush=True)
        return 128 + signal.SIGINT


def supervised(train: Callable[[StopRequest], int]) -> int:
    """The exit status of `train`, with errors explained that are not of its making.

    Raises:
        UserError: out of GPU memory.
    """
    stop_request = StopRequest()
    try:
        return train(stop_request)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory ({first_line(error)}); a smaller deepspeed.train_micro_batch_size_per_gpu (`ssast "
            "pretrain --auto-batch` finds it) or step.activation_checkpointing=block takes less",
            every_rank=True,
        ) from None
    except RuntimeError as error:
        # when another rank fails or leaves, collectives break here, and the launcher then ends this rank: its error is
        # not the story
        if stop_request.wait(LAUNCHER_NOTICES_S):
            rank = os.environ.get("RANK", "0")
            print(f"rank {rank} leaves without saving: {first_line(error)}", file=sys.stderr)
            return 128 + signal.SIGTERM
        raise
    finally:
        stop_request.close()


def launch(ranks: int, module: str, arguments: list[str], *, engine: str = "deepspeed") -> int | None:
    """Run a module in `ranks` processes on this machine and return their exit status; None if they were asked to stop,
    and have gone.

    `engine` is `step.engine`: without DeepSpeed, torchrun launches.

    DeepSpeed's launcher passes no signal on to them. Asked to stop, this process ends the launcher, whose end is what
    the ranks take as the request (`ssast.engine.distributed.interrupt`), and waits for them; if it is itself killed
    outright, the kernel ends the launcher.
    """
    devices = _devices(ranks)
    if engine == "deepspeed":
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical", *devices]
        command += ["--master_port", str(_free_port()), "--module", module, *arguments]
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--master-port", str(_free_port()), "-m", module, *arguments]
    environment = {"DS_ACCELERATOR": "cuda" if torch.cuda.is_available() else "cpu", **os.environ}
    environment[LEADER_VARIABLE] = "1"
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    child = subprocess.Popen(command, env=environment, process_group=0, preexec_fn=_end_with_parent)
    is_stopping = False

    def end_launcher(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopping
        if is_stopping:
            os.killpg(child.pid, signal.SIGTERM)  # asked twice: at once, without saving
        is_stopping = True
        child.terminate()

    before = {number: signal.signal(number, end_launcher) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        status = child.wait()
        while is_stopping and _group_is_alive(child.pid):
            time.sleep(0.1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return None if is_stopping else status


def _devices(ranks: int) -> list[str]:
    """The launcher's words for which GPUs, keeping to CUDA_VISIBLE_DEVICES, which it would pass over; on a CPU how many
    processes.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not torch.cuda.is_available():
        return ["--num_accelerators", str(ranks)]
    if ranks > torch.cuda.device_count():
        raise UserError(f"--ranks {ranks}: there are {torch.cuda.device_count()} GPUs")
    numbers = visible.split(",")
    if not all(number.strip().isdigit() for number in numbers):
        return ["--num_accelerators", str(ranks)]
    return ["--include", "localhost:" + ",".join(number.strip() for number in numbers[:ranks])]


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _group_is_alive(group: int) -> bool:
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
        except (psutil.Error, ProcessLookupError):
            continue
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
