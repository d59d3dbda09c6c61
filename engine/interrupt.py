"""Being asked to stop: SIGTERM, Ctrl-C, or the launcher's end."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType, TracebackType

import psutil


class StopRequest:
    """While entered, the first SIGTERM or SIGINT only sets `asked`, so that the loop can save and leave; a second one ends the process.

    DeepSpeed's launcher is two processes, of which the outer one passes no signal on: killed alone, it would leave the ranks training
    on for ever. The end of either counts as a request, too.
    """

    def __init__(self) -> None:
        self._asked = False
        self._launchers = _deepspeed_launchers()

    @property
    def asked(self) -> bool:
        self._asked = self._asked or not all(process.is_running() for process in self._launchers)
        return self._asked

    def wait(self, seconds: float) -> bool:
        """Whether the request comes within so many seconds."""
        deadline = time.monotonic() + seconds
        while not self.asked and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.asked

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            sys.exit(128 + number)
        self._asked = True


def _deepspeed_launchers() -> list[psutil.Process]:
    """The launcher's process on this machine, and the command that started it; empty under torchrun or no launcher."""
    try:
        inner = psutil.Process(os.getppid())
        command = inner.cmdline()
        if not any(part == "deepspeed.launcher.launch" or part.endswith("deepspeed/launcher/launch.py") for part in command):
            return []
        return [process for process in (inner, inner.parent()) if process is not None]
    except psutil.Error:
        return []
