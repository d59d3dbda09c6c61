"""The law of tolerance (`ssast.kernels.law`) as an assertion, and the error that the order of the sums may cause in
each operator's results: `summation_error` of every product, carried through what follows it to first order.
"""

import math
from collections.abc import Callable

import torch

from ssast.kernels.law import error_and_allowance, summation_error


def assert_lawful(
    name: str,
    actual: torch.Tensor,
    same_dtype: torch.Tensor,
    exact: torch.Tensor,
    order_error: torch.Tensor | float = 0.0,
) -> None:
    """Fail unless `actual` keeps the law; `name` says which output or gradient it is."""
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    assert actual.dtype == same_dtype.dtype, f"{name}: {actual.dtype} instead of {same_dtype.dtype}"
    error, allowed = error_and_allowance(actual, same_dtype, exact, order_error=order_error)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"  # false for NaN, too


def log_softmax_error(scores: torch.Tensor, error: torch.Tensor, dim: int) -> torch.Tensor:
    """Error of log_softmax(scores) where the scores err by `error`: its own, and that of the logarithm of the sum,
    which is the mean of the scores' errors weighted by the softmax, plus what summing the exponentials costs.
    """
    ones = torch.ones(1, scores.shape[dim], dtype=torch.float64, device=scores.device)
    sum_error = summation_error(ones, ones.T / scores.shape[dim]).item()  # relative, the exponentials being positive
    return error + (scores.softmax(dim) * error).sum(dim, keepdim=True) + sum_error


def attention_order_errors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor
) -> dict[str, torch.Tensor]:
    """By name, for `out`, `dq`, `dk` and `dv` of attention; all [B, H, N, d]."""
    q, k, v, dout = (x.detach().double() for x in (q, k, v, dout))
    scale = 1 / math.sqrt(q.shape[3])
    scores = q @ k.mT * scale
    p = scores.softmax(3)
    p_error = p * log_softmax_error(scores, summation_error(q, k.mT) * scale, 3)
    out_error = p_error @ v.abs() + summation_error(p, v)
    dp = dout @ v.mT
    delta = (dout * (p @ v)).sum(3, keepdim=True)
    delta_error = (dout.abs() * out_error).sum(3, keepdim=True)
    ds = p * (dp - delta)
    ds_error = p_error * (dp - delta).abs() + p * (summation_error(dout, v.mT) + delta_error)
    return {
        "out": out_error,
        "dq": scale * (ds_error @ k.abs() + summation_error(ds, k)),
        "dk": scale * (ds_error.mT @ q.abs() + summation_error(ds.mT, q)),
        "dv": p_error.mT @ dout.abs() + summation_error(p.mT, dout),
    }


def embed_order_errors(
    given: dict[str, torch.Tensor], mask: torch.Tensor | None, upstream: torch.Tensor
) -> dict[str, torch.Tensor | float]:
    """By name, for the tokens and the gradients of `embed_patches`."""
    given = {name: value.detach().double() for name, value in given.items()}
    patches, grad = given["patches"], upstream.double()  # [B, P, K], [B, 2 + P, D]
    tokens_error = summation_error(patches, given["weight"].T)
    rows = grad[:, 2:].clone()
    if mask is not None:
        rows[torch.arange(len(mask))[:, None], mask] = 0.0
    rows, values = rows.flatten(0, 1), patches.flatten(0, 1)
    ones = torch.ones(1, grad.shape[0] * grad.shape[1], dtype=torch.float64, device=grad.device)
    return {
        "tokens": tokens_error,
        "weight": summation_error(rows.T, values),
        "patches": summation_error(rows, given["weight"]),
        "bias": summation_error(ones, grad.flatten(0, 1)),
        "mask_token": summation_error(ones, grad.flatten(0, 1)),
        "prefix": summation_error(ones, grad.flatten(0, 1)),
        "position": summation_error(ones[:, : grad.shape[0]], grad.flatten(1)),
    }


def loss_order_errors(
    class_pred: torch.Tensor,
    target: torch.Tensor,
    objective: Callable,
    softmax_over: str,
    *,
    exact_scores: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For `nce`, for the gradient of class_pred, and for each log-probability [B, M targets, M predictions].

    Args:
        class_pred, target: [B, M, K].
        objective: nce -> what is differentiated.
        exact_scores: the scores are exact in any order, being sums of few-bit numbers.
    """
    class_pred, target = class_pred.detach().double(), target.detach().double()
    dim = 2 if softmax_over == "predictions" else 1
    scores = target @ class_pred.mT
    score_error = torch.zeros_like(scores) if exact_scores else summation_error(target, class_pred.mT)
    log_error = log_softmax_error(scores, score_error, dim)
    p = scores.softmax(dim)
    nce = -scores.log_softmax(dim).diagonal(dim1=1, dim2=2).mean()
    nce.requires_grad_()
    (upstream,) = torch.autograd.grad(objective(nce) + 0.0 * nce, nce)
    difference = p - torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
    gradient_error = (p * log_error).mT @ target.abs() + summation_error(difference.mT, target)
    gradient_error *= upstream.abs() / (p.shape[0] * p.shape[1])
    return log_error.diagonal(dim1=1, dim2=2).mean(), gradient_error, log_error
