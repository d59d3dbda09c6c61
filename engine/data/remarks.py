"""What is worth saying of recordings that can be used: silence, channels that cancel, sizes that no header gave.

One line for each kind, with a count and an example, however many recordings there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

SILENT = "silent: all of its samples are alike"
CANCELLED = "channels cancel: their mean, which is what is heard, has less than a ten-thousandth of their power"
FLAT = "std 0: all features of this data are alike, as of silence; nothing can be learned from it"
_STEP = 2 / 32768  # samples are alike to one step of 16 bits to either side
_CANCELLED_POWER = 1e-4


class Ear:
    """Hears a recording block by block: whether its mean of channels is silence, and whether its channels are."""

    def __init__(self) -> None:
        self.header = ""
        self._mono, self._all = (np.inf, -np.inf), (np.inf, -np.inf)
        self._mono_power, self._power = 0.0, 0.0

    def hear(self, block: np.ndarray, mono: np.ndarray | None) -> None:
        """`block` float32 or int16 of any shape, `mono` the mean of its channels; None for a block of one channel."""
        if not block.size:
            return
        scale = 1 / 32768 if block.dtype == np.int16 else 1.0
        self._all = _wider(self._all, block, scale)
        if mono is None:
            self._mono = self._all
            return
        self._mono = _wider(self._mono, mono, scale if mono.dtype == np.int16 else 1.0)
        self._mono_power += float(np.square(mono, dtype=np.float64).mean()) * len(mono)
        self._power += float(np.square(block, dtype=np.float64).mean()) * scale**2 * len(mono)

    def remarks(self) -> list[str]:
        """What there is to say; "" of the header first."""
        silent = self._mono[1] - self._mono[0] <= _STEP
        loud = self._all[1] - self._all[0] > _STEP
        cancelled = loud and (silent or self._mono_power < _CANCELLED_POWER * self._power)
        return [text for text in (self.header, CANCELLED if cancelled else SILENT if silent else "") if text]


def _wider(bounds: tuple[float, float], samples: np.ndarray, scale: float) -> tuple[float, float]:
    return min(bounds[0], float(samples.min()) * scale), max(bounds[1], float(samples.max()) * scale)


@dataclass
class _Kind:
    text: str
    example: str
    count: int = 0


class Remarks:
    """Counts remarks by kind: what stands before the colon."""

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}

    def add(self, source: str, texts: Iterable[str], count: int = 1) -> None:
        """Remarks on the recording `source`, or on `count` recordings of which it is the first."""
        for text in texts:
            self._kinds.setdefault(text.partition(":")[0], _Kind(text, source)).count += count

    def lines(self, what: str = "recordings") -> list[str]:
        """A line for people for each kind."""
        return [f"warning: {kind.count} {what}, {kind.example} for one: {kind.text}" for kind in self._kinds.values()]

    def as_json(self) -> list[dict[str, Any]]:
        """For stats.json; `add_json` reads it."""
        return [vars(kind).copy() for kind in self._kinds.values()]

    def add_json(self, content: Any) -> None:
        """What `as_json` wrote; anything else is passed over."""
        for row in content if isinstance(content, list) else []:
            if isinstance(row, dict) and isinstance(row.get("text"), str) and isinstance(row.get("count"), int):
                self.add(str(row.get("example", "")), [row["text"]], row["count"])
