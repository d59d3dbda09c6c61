"""Patches to tokens: projection, mask token, position and prefix tokens."""

import torch

from .backend import resolve_backend


def embed_patches(
    patches: torch.Tensor,  # [B, P, K]
    weight: torch.Tensor,  # [D, K]
    bias: torch.Tensor,  # [D]
    position: torch.Tensor,  # [2 + P, D]
    prefix: torch.Tensor,  # [2, D]
    mask_token: torch.Tensor | None = None,  # [D]
    mask: torch.Tensor | None = None,  # [B, M]
    *,
    backend: str | None = None,
) -> torch.Tensor:  # [B, 2 + P, D]
    """Tokens [cls, dist, patch 0, patch 1, ...] of SSAST, section "Patch embedding": E_i + P_i, with E_mask in place of masked E_i.

    Args:
        patches: flattened patches, value index = frequency offset * patch width in frames + frame offset.
        weight, bias: the projection.
        position: trained position embedding, its first two rows belong to the prefix tokens.
        prefix: the cls and the dist token.
        mask_token: learned embedding that stands in for masked patches.
        mask: int64 patch numbers without the offset of the prefix tokens; None masks nothing.
        backend: None, "torch" or "triton".

    Raises:
        ValueError: a mask without a mask token, or shapes that do not belong together.
    """
    if mask is not None and mask_token is None:
        raise ValueError("mask was given without mask_token")
    if position.shape[0] != patches.shape[1] + prefix.shape[0]:
        raise ValueError(
            f"position has {position.shape[0]} rows for {prefix.shape[0]} prefix tokens and {patches.shape[1]} patches"
        )
    resolve_backend(backend, patches.device, has_triton=False)

    tokens = torch.nn.functional.linear(patches, weight, bias)  # [B, P, D]
    if mask is not None and mask_token is not None:
        is_masked = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device).scatter_(1, mask, True)
        tokens = torch.where(is_masked[..., None], mask_token.to(tokens.dtype), tokens)
    prefix = prefix.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
    return torch.cat((prefix, tokens), dim=1) + position
