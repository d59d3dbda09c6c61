"""Softmax attention without mask: one door to whichever implementation serves."""

import torch


def attention(
    q: torch.Tensor,  # [B, H, N, d]
    k: torch.Tensor,  # [B, H, N, d]
    v: torch.Tensor,  # [B, H, N, d]
    *,
    backend: str | None = None,
) -> torch.Tensor:  # [B, H, N, d]
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, equation 1).

    Args:
        backend: None or "torch": PyTorch's scaled_dot_product_attention, which chooses among its own kernels.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in (None, "torch"):
        raise ValueError(f"attention backend must be None or 'torch', not {backend!r}")
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)
