"""The law of tolerance, in numbers: a kernel may err at most twice as much as PyTorch does in the same dtype, plus 2
ulp, plus what the order of its sums may cost.

The errors are the largest over all elements, against the same computation in float64; an ulp is that of the dtype at
the largest magnitude of the exact result. This much of the rule is flash-attention's.

The order of the sums. A matrix product sums K products in float32, and each library, block size and processor adds
them in another order (fused multiply-adds and partial sums in vector lanes included). Two right programs then differ,
and the one whose error sets the tolerance may happen to be the luckier. Standard model of rounding: fl(x + y) =
(x + y)(1 + e), |e| <= u = 2^-24. In any order, each of the K products passes through at most K roundings, each of which
rounds a partial sum that is no larger than T = sum_k |a_k| |b_k|. If the roundings all pointed one way, the error would
be K u T (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, eq. 3.3). Rounding errors that are independent
and of mean zero add up as a random walk instead, to sqrt(K) u T (Higham and Mary, "A New Approach to Probabilistic
Rounding Error Analysis", SIAM J. Sci. Comput. 41, 2019, theorem 2.4). `summation_error` is the latter.

It forgives no product that loses precision: factors rounded to TF32 (u = 2^-11) before they are multiplied err by about
2^-11 T / sqrt(K), which is 2^13 / K = 32 times as much at K = 256. tests/kernels/test_law.py shows that the law breaks
there. It is for sums of which the order is free; where a test's sums are exact in any order, the term is left out.
"""

from __future__ import annotations

import math

import torch

_UNIT_ROUNDOFF = 2.0**-24  # of float32


def summation_error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What the order of summation in float32 may cost each element of a @ b: sqrt(K) u |a| @ |b|.

    Args:
        a: [..., m, K] factors as they are multiplied, in any dtype.
        b: [..., K, n]

    Returns:
        [..., m, n] float64, absolute errors.
    """
    return math.sqrt(a.shape[-1]) * _UNIT_ROUNDOFF * (a.double().abs() @ b.double().abs())


def largest_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute error over all elements; infinite where `actual` is not finite."""
    return (actual.double() - exact.double()).abs().nan_to_num(nan=math.inf).max().item()


def ulp_at_peak(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """Distance of neighbouring numbers of `dtype` at the largest magnitude of `exact`."""
    peak = exact.double().abs().max().item()
    return 2.0 ** math.floor(math.log2(peak)) * torch.finfo(dtype).eps if peak else 0.0


def error_and_allowance(
    actual: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor, *, order_error: torch.Tensor | float = 0.0
) -> tuple[float, float]:
    """What `actual` errs and what the law allows it; a result of another shape or dtype errs infinitely.

    Args:
        actual: a kernel's result.
        same_dtype: PyTorch's in the same dtype.
        exact: the result in float64.
        order_error: what the order of the kernel's sums may cost, at most or element by element; see `summation_error`.
    """
    allowed = 2 * largest_error(same_dtype, exact) + 2 * ulp_at_peak(exact, same_dtype.dtype)
    allowed += order_error.max().item() if isinstance(order_error, torch.Tensor) else order_error
    if actual.shape != exact.shape or actual.dtype != same_dtype.dtype:
        return math.inf, allowed
    return largest_error(actual, exact), allowed
