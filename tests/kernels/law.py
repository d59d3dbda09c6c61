"""The law of tolerance: a kernel may err at most twice as much as PyTorch does in the same dtype, plus 2 ulp.

Both errors are the largest over all elements, against the same computation in float64; an ulp is that of the dtype at the largest
magnitude of the exact result. The rule is flash-attention's.
"""

import math

import torch


def assert_lawful(name: str, actual: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor) -> None:
    """Fail unless `actual` keeps the law; `name` says which output or gradient it is."""
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    assert actual.dtype == same_dtype.dtype, f"{name}: {actual.dtype} instead of {same_dtype.dtype}"
    exact = exact.double()
    assert torch.isfinite(actual).all() or not torch.isfinite(exact).all(), f"{name}: not finite"
    peak = exact.abs().max().item()
    ulp = 2.0 ** math.floor(math.log2(peak)) * torch.finfo(actual.dtype).eps if peak else 0.0
    error, allowed = (actual - exact).abs().max().item(), 2 * (same_dtype - exact).abs().max().item() + 2 * ulp
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} (largest magnitude {peak:.3g})"
