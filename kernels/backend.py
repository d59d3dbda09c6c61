"""Which implementation of an operator runs: "torch" (the reference) or "triton"."""

from typing import overload

import torch
import triton.language as tl
from triton import knobs

INTERPRETED = knobs.runtime.interpret
"""Whether Triton kernels run in its interpreter, on CPU tensors: TRITON_INTERPRET=1 in the environment before triton is
imported."""

ASSUMED_CAPABILITY = (9, 0)
"""Of the GPU that CPU tensors stand for, in the interpreter and where kernels are compiled without a GPU."""


TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def capability(device: torch.device) -> tuple[int, int]:
    """CUDA compute capability: (8, 0) A100, (9, 0) H100 and H200, (10, 0) B200."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else ASSUMED_CAPABILITY


@overload
def last_dim_contiguous(x: torch.Tensor) -> torch.Tensor: ...
@overload
def last_dim_contiguous(x: torch.Tensor | None) -> torch.Tensor | None: ...
def last_dim_contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor as the kernels read it: its last dimension in one piece, all others with strides of their own. A copy
    only where it is not so already; None stays None.
    """
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def resolve_backend(name: str | None, *tensors: torch.Tensor | torch.device | None) -> str:
    """Return "torch" or "triton" for an operator on these tensors (or on a device).

    None picks Triton on CUDA devices and, under TRITON_INTERPRET=1, on the CPU; else PyTorch. float64 tensors always
    pick PyTorch: the kernels compute in float32, and whoever asks for float64 wants the reference.

    Raises:
        ValueError: an unknown name, or "triton" where no Triton kernel can run. Never a silent fall-back.
    """
    if name not in (None, "torch", "triton"):
        raise ValueError(f"backend must be None, 'torch' or 'triton', not {name!r}")
    if name == "torch":
        return name
    present = [each for each in tensors if each is not None]
    devices = [each if isinstance(each, torch.device) else each.device for each in present]
    can_run = all(device.type == "cuda" or (INTERPRETED and device.type == "cpu") for device in devices)
    has_double = any(isinstance(each, torch.Tensor) and each.dtype == torch.float64 for each in present)
    if name == "triton" and not can_run:
        raise ValueError(
            "backend='triton' needs tensors on a CUDA device, or TRITON_INTERPRET=1 in the environment from the start"
        )
    if name == "triton" and has_double:
        raise ValueError("backend='triton' computes in float32; for float64 use backend='torch'")
    return "triton" if can_run and not has_double else "torch"
