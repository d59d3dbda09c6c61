"""Processes that decode files: supervised from here, they may crash, hang or run out of memory, and it costs one
file.

Libraries for pools of processes do without one of the three that are needed here: `concurrent.futures` loses the whole
pool with one process that dies, `pebble` forks or imports the parent's main module (a script on standard input has
none, and torch takes seconds and hundreds of megabytes), and neither streams many answers to one job, with a limit of
time from answer to answer.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any


class Worker:
    """A process that runs a script ending in `probe.serve`. Each way go lines of JSON: jobs there, answers back."""

    def __init__(self, script: str, arguments: Sequence[str], timeout_s: float) -> None:
        self.number: Any = None  # what it has in hand
        self.ready = False
        self.timeout_s, self.deadline = timeout_s, time.monotonic() + max(60.0, timeout_s)  # a minute at least to start
        self._stderr, self._rest = tempfile.TemporaryFile(), b""  # noqa: SIM115
        # The child finds the same packages as this process, but not what happens to lie in the current folder; one
        # thread each.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        # A session of its own: Ctrl-C reaches this process alone, which then ends the worker.
        self.process = subprocess.Popen(
            [sys.executable, "-P", script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=env,
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None  # pipes, as asked for
        self._jobs, self.output = self.process.stdin, self.process.stdout
        os.set_blocking(self.output.fileno(), False)

    def send(self, number: Any, job: Any) -> None:
        """Give it a job, to be called once it is ready or has answered all of the one before: it then reads, and the
        pipe empties.
        """
        self.number, self.deadline = number, time.monotonic() + self.timeout_s
        with contextlib.suppress(BrokenPipeError):  # its end is seen by reading
            self._jobs.write(json.dumps(job).encode() + b"\n")
            self._jobs.flush()

    def answers(self) -> list[Any] | None:
        """What has come since the last call, after which the time for the next answer starts anew; None at the
        process's end.
        """
        try:
            data = os.read(self.output.fileno(), 1 << 20)
        except BlockingIOError:
            return []
        *lines, self._rest = (self._rest + data).split(b"\n")
        if lines:
            self.deadline = time.monotonic() + self.timeout_s
        if lines and not self.ready:
            self.ready = True
            del lines[0]
        return [json.loads(line) for line in lines] if data else None

    def stop(self) -> tuple[str, str]:
        """Ends the process: how it ended, and what it complained of."""
        self.process.kill()
        code = self.process.wait()
        self._stderr.seek(0)
        complaint = self._stderr.read()[-2000:].decode(errors="replace").strip()
        with contextlib.suppress(BrokenPipeError):
            self._jobs.close()
        self.output.close()
        self._stderr.close()
        return signal.Signals(-code).name if code < 0 else f"exit status {code}", complaint


class Pool:
    """Workers that run one script; `close` ends them. Each may take `timeout_s` from a job, or an answer, to the next
    answer.
    """

    def __init__(self, script: str, arguments: Sequence[str], timeout_s: float) -> None:
        self.workers: set[Worker] = set()
        self._make = lambda: Worker(script, arguments, timeout_s)
        self._selector = selectors.DefaultSelector()

    def start(self) -> None:
        """Start one more process."""
        worker = self._make()
        self.workers.add(worker)
        self._selector.register(worker.output, selectors.EVENT_READ, worker)

    def wait(self) -> list[tuple[Worker, list[Any], str]]:
        """Waits for something to happen: workers that are ready or have answered, their answers, and how each ended, ""
        if it lives.

        Raises `RuntimeError` if one could not even start.
        """
        patience = min(worker.deadline for worker in self.workers) - time.monotonic()
        heard = {key.data for key, _ in self._selector.select(None if patience == math.inf else max(0.0, patience))}
        events: list[tuple[Worker, list[Any], str]] = []
        for worker in list(self.workers):
            answers = worker.answers() if worker in heard else []
            late = answers is not None and worker.deadline <= time.monotonic()
            if answers is None or late:
                end, complaint = self.stop(worker)
                if not worker.ready:
                    raise RuntimeError(f"a process that decodes audio did not start ({end}): {complaint}")
                events.append(
                    (worker, [], f"took longer than {worker.timeout_s:g} s" if late else f"decoder crashed ({end})")
                )
            elif worker in heard and worker.ready:
                events.append((worker, answers, ""))
        return events

    def stop(self, worker: Worker) -> tuple[str, str]:
        """End a process: how it ended, and what it complained of."""
        self._selector.unregister(worker.output)
        self.workers.remove(worker)
        return worker.stop()

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.stop()
        self._selector.close()
