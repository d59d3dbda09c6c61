"""A command that ends when it was told to."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class DeadlinePassed(BaseException):
    """Not an Exception, so that nothing on the way takes it for a failure of its own."""


class Deadline:
    """Interrupts what runs within it when its seconds are over, and again each second until it gets through."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.passed = False
        self._is_held_off = False

    def _ring(self, *_: Any) -> None:
        if not self._is_held_off:
            self.passed = True
            raise DeadlinePassed

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Swallows the interruption; `passed` tells."""
        if self.seconds is None:
            yield
            return
        before = signal.signal(signal.SIGALRM, self._ring)
        try:
            signal.setitimer(signal.ITIMER_REAL, max(self.seconds, 1e-3), 1.0)
            yield
        except (DeadlinePassed, Exception):
            if not self.passed:
                raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    @contextlib.contextmanager
    def held_off(self) -> Iterator[None]:
        """Nothing is interrupted halfway here."""
        self._is_held_off = True
        try:
            yield
        finally:
            self._is_held_off = False
