"""Whether B is faster than A, or whether the machine's noise explains what is seen.

Best are turns: A and B take turns on one machine, and only the ratio within a turn counts, so that what drifts slowly
drops out. Two finished profiles can be compared too, step time by step time, but the machine may have changed between
them, and the verdict says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
FEWEST_TURNS, FEWEST_STEPS = 3, 20
RESAMPLES = 2000
NOT_INTERLEAVED = "not measured in turns, so a drift of the machine between the two is not excluded"


@dataclass(frozen=True)
class Verdict:
    """`change` is the speed of B over that of A, less 1, with its interval at CONFIDENCE; None where it cannot be
    told.
    """

    decided: str  # "faster", "slower", "no difference" or "cannot tell"
    change: float | None
    low: float | None
    high: float | None
    text: str


def compare_turns(a: Sequence[float], b: Sequence[float]) -> Verdict:
    """The verdict on clips/s of A and B, a[i] and b[i] measured in turn i on the same machine.

    The mean of the log ratios with Student's t interval: with the 3 to 10 turns that one can afford, a bootstrap would
    draw intervals that are far too narrow.

    Raises:
        ValueError: different numbers of turns, or a rate that is not above 0.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} turns of A and {len(b)} of B: a turn has one of each")
    ratios, count = _logs(b) - _logs(a), len(a)
    turns = f"{count} turn{'' if count == 1 else 's'}"
    if count < FEWEST_TURNS:
        return _cannot_tell(f"{turns} measured, at least {FEWEST_TURNS} are needed")
    margin = t_quantile(count - 1) * ratios.std(ddof=1) / math.sqrt(count)
    return _verdict(ratios.mean(), ratios.mean() - margin, ratios.mean() + margin, f"over {turns}")


def compare_steps(a_seconds: Sequence[float], b_seconds: Sequence[float]) -> Verdict:
    """The verdict on the median step times of two finished profiles, in seconds (or in seconds a clip where the batches
    differ).

    A bootstrap of blocks of neighbouring steps, since a slow step rarely comes alone: single steps drawn at random
    would make the interval too narrow.

    Raises:
        ValueError: a time that is not above 0.
    """
    sides, counts = (_logs(a_seconds), _logs(b_seconds)), f"{len(a_seconds)} and {len(b_seconds)} steps"
    if min(len(side) for side in sides) < FEWEST_STEPS:
        return _cannot_tell(f"{counts} timed, at least {FEWEST_STEPS} of each are needed; {NOT_INTERLEAVED}")
    generator = np.random.default_rng(0)
    medians_a, medians_b = (_resampled_medians(side, generator) for side in sides)
    low, high = np.quantile(medians_a - medians_b, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    change = np.median(sides[0]) - np.median(sides[1])
    return _verdict(change, low, high, f"by median step time over {counts}", NOT_INTERLEAVED)


def t_quantile(freedom: int) -> float:
    """What Student's |t| stays below with probability CONFIDENCE.

    With t = sqrt(freedom) tan(angle) the density is cos(angle)^(freedom - 1) up to a factor, and easily summed up.
    """
    angles = np.linspace(0, np.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))
    return math.sqrt(freedom) * math.tan(np.interp(CONFIDENCE * below[-1], below, angles))


def _logs(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, float)
    if not (np.isfinite(array) & (array > 0)).all():
        raise ValueError("rates and times must be numbers above 0")
    return np.log(array)


def _resampled_medians(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Medians [RESAMPLES] of series of the same length put together from blocks, which may run over the end into the
    beginning.
    """
    block = math.ceil(math.sqrt(values.size))
    starts = generator.integers(values.size, size=(RESAMPLES, math.ceil(values.size / block), 1))
    chosen = (starts + np.arange(block)).reshape(RESAMPLES, -1)[:, : values.size] % values.size
    return np.median(values[chosen], axis=1)


def _cannot_tell(why: str) -> Verdict:
    return Verdict("cannot tell", None, None, None, f"cannot tell: {why}")


def _verdict(change: float, low: float, high: float, over: str, caution: str = "") -> Verdict:
    """Of logarithms of the speed ratio."""
    change, low, high = (math.expm1(value) for value in (change, low, high))
    decided = "faster" if low > 0 else "slower" if high < 0 else "no difference"
    if decided == "no difference":
        text = f"no difference beyond the noise: B is {change:+.1%} as measured [{low:+.1%}, {high:+.1%}] {over}"
    else:
        near, far = (low, high) if low > 0 else (-high, -low)
        text = f"B is {abs(change):.1%} {decided} [{near:.1%}, {far:.1%}] {over}"
    return Verdict(decided, change, low, high, f"{text}; {caution}" if caution else text)
