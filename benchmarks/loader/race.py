"""Contestants in processes of their own, on the same cores, in turn: all but the one that is measured are stopped
(SIGSTOP).
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
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


class Lane:
    """A process that runs lane.race on `cores`, in a process group of its own with all that it starts, stopped between
    its rounds. Should this process die, so does the fork server, and the kernel hangs up on groups that are stopped and
    have lost their parent.
    """

    def __init__(self, job: Job, cores: Sequence[int]) -> None:
        context = multiprocessing.get_context("forkserver")  # imports are done once
        context.set_forkserver_preload([lane.__name__])
        self.job = job
        self._here, there = context.Pipe()
        self.process = context.Process(target=lane.race, args=(job, list(cores), there))
        self.process.start()
        there.close()

    def answer(self) -> Job:
        """Raises UserError if the process has ended instead."""
        try:
            return self._here.recv()
        except EOFError:
            self.process.join()
            raise UserError(
                f"{self.job['contestant']}, {self.job['codec']}: ended with status {self.process.exitcode}"
            ) from None

    def round(self, seconds: float) -> Job:
        os.killpg(self.process.pid, signal.SIGCONT)
        self._here.send(seconds)
        answer = self.answer()
        self.stop()
        return answer

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError, BrokenPipeError):
            os.killpg(self.process.pid, signal.SIGCONT)
            self._here.send(None)
        self.process.join(CLOSING_S)
        for kill in (os.killpg, os.kill):  # it may not have come to form its group
            with contextlib.suppress(ProcessLookupError):
                kill(self.process.pid, signal.SIGKILL)
        self.process.join()
        self._here.close()


def run_race(jobs: Sequence[Job], cores: Sequence[int], *, rounds: int, seconds: float) -> list[tuple[Job, list[Job]]]:
    """(what each said of itself, its rounds) for every job; who cannot run says {"left_out": why} and has no rounds."""
    lanes: list[Lane] = []
    try:
        said: list[Job] = []
        for job in jobs:
            lanes.append(Lane(job, cores))
            said.append(lanes[-1].answer())
            if "left_out" not in said[-1]:
                lanes[-1].stop()
        running = [lane for lane, answer in zip(lanes, said, strict=True) if "left_out" not in answer]
        measured = iter(take_turns(running, rounds, lambda lane, _: lane.round(seconds)))
        return [(answer, [] if "left_out" in answer else next(measured)) for answer in said]
    finally:
        for each in lanes:
            each.close()


def run_alone(what: str, job: Job, cores: Sequence[int]) -> Iterator[Job]:
    """Answers of a process that starts from nothing and measures by itself; "started" is when, by the clock of all
    processes.
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", lane.__name__, what, json.dumps(job)]
    with pinned(cores):
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True)
    with process:
        try:
            for line in process.stdout:
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
