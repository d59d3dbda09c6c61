"""Being asked to stop: SIGTERM, Ctrl-C, or the launcher's end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

import psutil

# Set by `ssast.engine.distributed.launch`: the outer launcher leads the process group of the ranks, so it is known even
# after it has ended.
LEADER_VARIABLE = "SSAST_LAUNCHER_LEADS_GROUP"

STOPPED = 128 + signal.SIGTERM
"""Exit status of training that was asked to stop and has saved: what comes after it must not take it for finished."""


class StopRequest:
    """While entered, the first SIGTERM or SIGINT only sets `asked`, so that the loop can save and leave; a second one
    ends the process.

    DeepSpeed's launcher is two processes, of which the outer one passes no signal on: killed alone, it would leave the
    ranks training on for ever. The end of either counts as a request, too.
    """

    def __init__(self) -> None:
        launchers = _deepspeed_launchers()
        self._asked = launchers is None
        self._launchers = launchers or []
        self._entered = threading.Event()
        self._interrupted = False  # by Ctrl-C before it was entered
        self._early = signal.signal(signal.SIGINT, self._on_early_interrupt)
        if self._launchers or self._asked:
            threading.Thread(target=self._leave_with_launcher, name="launcher-watch", daemon=True).start()

    @property
    def asked(self) -> bool:
        """Whether a signal has come or a launcher has ended."""
        self._asked = self._asked or not all(_is_alive(process) for process in self._launchers)
        return self._asked

    def wait(self, seconds: float) -> bool:
        """Whether the request comes within so many seconds."""
        deadline = time.monotonic() + seconds
        while not self.asked and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.asked

    def _leave_with_launcher(self) -> None:
        """Until there is something to save, the launcher's end is simply the end."""
        while not self._entered.wait(0.5):
            if self.asked:
                os._exit(128 + signal.SIGTERM)

    def close(self) -> None:
        """Leave Ctrl-C to whom it was before."""
        signal.signal(signal.SIGINT, self._early)

    def _on_early_interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def __enter__(self) -> StopRequest:
        if (
            self._interrupted
        ):  # a library has swallowed the exception, as Python itself does in finalizers and callbacks
            raise KeyboardInterrupt
        self._entered.set()
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            sys.exit(128 + number)
        self._asked = True


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _deepspeed_launchers() -> list[psutil.Process] | None:
    """The launcher's process on this machine, and the one that started it; none under torchrun or no launcher, None if
    one has ended.
    """
    try:
        inner = psutil.Process(os.getppid())
        command = inner.cmdline()
        if not any(
            part == "deepspeed.launcher.launch" or part.endswith("deepspeed/launcher/launch.py") for part in command
        ):
            return []
        outer = psutil.Process(os.getpgid(0)) if LEADER_VARIABLE in os.environ else inner.parent()
        return [process for process in (inner, outer) if process is not None]
    except psutil.NoSuchProcess:
        return None
    except psutil.Error:
        return []
