"""Which implementation of an operator runs: "torch" (the reference) or "triton"."""

import os

import torch


def resolve_backend(name: str | None, device: torch.device, *, has_triton: bool) -> str:
    """Return "torch" or "triton".

    None picks Triton for tensors on a CUDA device or under TRITON_INTERPRET=1 where the operator has a Triton kernel, else PyTorch.

    Raises:
        ValueError: an unknown name, or "triton" asked of an operator that has no Triton kernel. Never a silent fall-back.
    """
    if name not in (None, "torch", "triton"):
        raise ValueError(f"backend must be None, 'torch' or 'triton', not {name!r}")
    if name == "triton" and not has_triton:
        raise ValueError("backend='triton': this operator has a PyTorch implementation only; use backend=None or 'torch'")
    if name is not None:
        return name
    wants_triton = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return "triton" if has_triton and wants_triton else "torch"
