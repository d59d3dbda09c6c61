"""Being asked to stop: SIGTERM and Ctrl-C, and the launcher's death."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType

import psutil


class StopRequest:
    """While entered, the first SIGTERM or SIGINT only sets `asked`, so that the loop can save and leave; a second one ends the process.

    DeepSpeed's launcher is two processes, of which the outer one passes no signal on: killed alone it would leave the ranks training
    on. Its death therefore counts as a request, too.
    """

    def __init__(self) -> None:
        self._asked = False
        self._launcher = _outer_launcher()

    @property
    def asked(self) -> bool:
        if not self._asked and self._launcher is not None and not self._launcher.is_running():
            self._asked = True
        return self._asked

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


def _outer_launcher() -> psutil.Process | None:
    try:
        inner = psutil.Process(os.getppid())
        if not any(
            "deepspeed.launcher.launch" in part or part.endswith("deepspeed/launcher/launch.py") for part in inner.cmdline()
        ):
            return None
        return inner.parent()
    except psutil.Error:
        return None
