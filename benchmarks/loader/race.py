"""Contestants in processes of their own, on the same cores, in turn: all but the one that is measured are stopped
(SIGSTOP).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ssast.benchmarks.turns import take_turns
from ssast.engine.errors import UserError

from . import lane

CLOSING_S = 10.0
Job = dict[str, Any]


def start(what: str, job: Job, **options: Any) -> subprocess.Popen[str]:
    """A process of lane.py, which answers in lines of JSON."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", lane.__name__, what, json.dumps(job)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True, **options)


class Lane:
    """A process that runs lane.race on `cores`, in a process group of its own with all that it starts, stopped between
    its rounds. Should this process die, the kernel hangs up on groups that are stopped and have lost their parent.
    """

    def __init__(self, job: Job, cores: Sequence[int]) -> None:
        self.job = job
        self.process = start("race", job | {"cores": list(cores)}, stdin=subprocess.PIPE, process_group=0)

    def answer(self) -> Job:
        """The next thing that it says.

        Raises:
            UserError: the process has ended instead.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise UserError(f"{self.job['contestant']}, {self.job['codec']}: ended with status {status}")
        return json.loads(line)

    def round(self, seconds: float) -> Job:
        """Wake the process, let it read for so many seconds, stop it again; what it measured.

        Raises:
            UserError: the process has ended instead.
        """
        os.killpg(self.process.pid, signal.SIGCONT)
        print(seconds, file=self.process.stdin, flush=True)
        answer = self.answer()
        self.stop()
        return answer

    def stop(self) -> None:
        """Stop the process and all that it has started."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def close(self) -> None:
        """End the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError, BrokenPipeError):
            os.killpg(self.process.pid, signal.SIGCONT)
            if self.process.stdin is not None:
                self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(CLOSING_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def run_race(jobs: Sequence[Job], cores: Sequence[int], *, rounds: int, seconds: float) -> list[tuple[Job, list[Job]]]:
    """(what each said of itself, its rounds) for every job; who cannot run says {"left_out": why} and has no rounds."""
    lanes = [Lane(job, cores) for job in jobs]  # imports take seconds: all at once
    try:
        said: list[Job] = []
        for each in lanes:
            said.append(each.answer())
            if "left_out" not in said[-1]:
                each.stop()
        running = [lane for lane, answer in zip(lanes, said, strict=True) if "left_out" not in answer]
        measured = iter(take_turns(running, rounds, lambda lane, _: lane.round(seconds)))
        return [(answer, [] if "left_out" in answer else next(measured)) for answer in said]
    finally:
        for each in lanes:
            each.close()


def run_alone(what: str, job: Job, cores: Sequence[int]) -> Iterator[Job]:
    """Answers of a process that starts from nothing and measures by itself; "started" is when, by the clock of all
    processes.

    Raises:
        UserError: the process failed.
    """
    with pinned(cores):
        started = time.monotonic()
        process = start(what, job)
    with process:
        try:
            for line in process.stdout or ():
                yield json.loads(line) | {"started": started}
        finally:
            process.kill()  # it has said all, or nobody listens any more
    if process.returncode not in (0, -signal.SIGKILL):
        raise UserError(f"measuring {what}: the process ended with status {process.returncode}")


@contextlib.contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """What is started meanwhile runs on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
