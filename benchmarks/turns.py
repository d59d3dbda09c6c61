"""Measuring in turns: what takes part is measured one after the other on the same machine, round after round, and only
what lies within one turn is compared, so that a clock that drifts or a neighbour that wakes up drops out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

CONFIDENCE = 0.95
FEWEST_TURNS = 3

Contestant = TypeVar("Contestant")
Measured = TypeVar("Measured")


def take_turns(
    contestants: Sequence[Contestant], turns: int, measure: Callable[[Contestant, int], Measured]
) -> list[list[Measured]]:
    """`measure(contestant, turn)` for each contestant in each turn; the results of each contestant, turn by turn.

    Every other turn runs backward, so that none is always measured on the warmer machine.
    """
    measured: list[list[Measured]] = [[] for _ in contestants]
    for turn in range(turns):
        order = range(len(contestants))
        for number in order if turn % 2 == 0 else reversed(order):
            measured[number].append(measure(contestants[number], turn))
    return measured


@dataclass(frozen=True)
class Verdict:
    """Whether B is faster than A.

    change, low, high: the speed of B over that of A, less 1, and its interval at CONFIDENCE; None with too few turns.
    """

    decision: str  # "faster", "slower", "no difference" or "cannot tell"
    change: float | None
    low: float | None
    high: float | None
    text: str


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The median of a[i] / b[i], measured in turn i each."""
    return float(np.median(np.divide(a, b)))


def compare_turns(a: Sequence[float], b: Sequence[float]) -> Verdict:
    """The verdict on clips/s of A and B, a[i] and b[i] measured in turn i: the mean of the logarithms of the ratios
    with Student's t interval. (With the 3 to 10 turns that one can afford, a bootstrap's intervals are far too narrow.)

    Raises:
        ValueError: different numbers of turns, or a rate that is not above 0.
    """
    from scipy import stats  # taking turns needs none of it, and a bare machine with a GPU may lack it

    if len(a) != len(b):
        raise ValueError(f"{len(a)} turns of A and {len(b)} of B: a turn has one of each")
    rates = np.array([a, b], float)
    if not (np.isfinite(rates) & (rates > 0)).all():
        raise ValueError("rates must be numbers above 0")
    ratios = np.log(rates[1] / rates[0])
    turns = f"{len(a)} turn{'' if len(a) == 1 else 's'}"
    if len(a) < FEWEST_TURNS:
        text = f"cannot tell: {turns} measured, at least {FEWEST_TURNS} are needed"
        return Verdict("cannot tell", None, None, None, text)
    error = stats.sem(ratios)
    low, high = stats.t.interval(CONFIDENCE, len(a) - 1, ratios.mean(), error) if error else [ratios.mean()] * 2
    change, low, high = (float(np.expm1(value)) for value in (ratios.mean(), low, high))
    if low <= 0 <= high:
        text = f"no difference beyond the noise: B is {change:+.1%} as measured [{low:+.1%}, {high:+.1%}] over {turns}"
        return Verdict("no difference", change, low, high, text)
    decision, (near, far) = ("faster", (low, high)) if low > 0 else ("slower", (-high, -low))
    text = f"B is {abs(change):.1%} {decision} [{near:.1%}, {far:.1%}] over {turns}"
    return Verdict(decision, change, low, high, text)
