"""The law of tolerance, in numbers: a kernel may err at most twice as much as PyTorch does in the same dtype, plus 2
ulp.

Both errors are the largest over all elements, against the same computation in float64; an ulp is that of the dtype at
the largest magnitude of the exact result. The rule is flash-attention's.
"""

from __future__ import annotations

import math

import torch


def largest_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Over all elements; infinite where `actual` is not finite."""
    return (actual.double() - exact.double()).abs().nan_to_num(nan=math.inf).max().item()


def ulp_at_peak(exact: torch.Tensor, dtype: torch.dtype) -> float:
    peak = exact.double().abs().max().item()
    return 2.0 ** math.floor(math.log2(peak)) * torch.finfo(dtype).eps if peak else 0.0


def error_and_allowance(actual: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """What `actual` errs and what the law allows it; a result of another shape or dtype errs infinitely."""
    allowed = 2 * largest_error(same_dtype, exact) + 2 * ulp_at_peak(exact, same_dtype.dtype)
    if actual.shape != exact.shape or actual.dtype != same_dtype.dtype:
        return math.inf, allowed
    return largest_error(actual, exact), allowed
