"""How data sets are mixed by weight: the rule that the config checks and the order of samples follows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BLOCK = 1000
"""Positions in each block of the order; every block holds the same number of clips of each data set."""


def block_shares(weights: Sequence[float]) -> np.ndarray:
    """Positions of each data set in a block, int64, 1000 in all: the weights' fractions of them,
    rounded by largest remainder.

    Raises:
        ValueError: a weight is not positive, or its fraction is less than one position.
    """
    exact = np.array(weights, dtype=np.float64)
    if not len(exact) or not np.isfinite(exact).all() or exact.min() <= 0:
        raise ValueError("weights must be positive numbers")
    exact *= BLOCK / exact.sum()
    if exact.min() < 1 - 1e-9:
        raise ValueError(f"a weight of less than 1 in {BLOCK} of their sum would never be read")
    counts = np.floor(exact + 1e-9).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]
    counts[largest] += 1
    return counts
