"""The law of tolerance (`ssast.kernels.law`) as an assertion."""

import torch

from ssast.kernels.law import error_and_allowance


def assert_lawful(name: str, actual: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor) -> None:
    """Fail unless `actual` keeps the law; `name` says which output or gradient it is."""
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    assert actual.dtype == same_dtype.dtype, f"{name}: {actual.dtype} instead of {same_dtype.dtype}"
    error, allowed = error_and_allowance(actual, same_dtype, exact)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"  # false for NaN, too
