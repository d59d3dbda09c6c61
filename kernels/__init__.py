"""GPU operators of the engine. They know tensors, nothing of training, files or configs.

One file an operator, read downward: the plain-PyTorch reference - exact, differentiable, running anywhere, the baseline
that the kernel is held against - then the Triton kernels, the `torch.library` operator, the public function.
docs/kernels.md explains each.

Legend of the shapes in all files:
    B clips   S samples   T frames   F mel bins   f, t  patch rows (frequency) and columns (time) of the grid
    P = f * t patches   K values of a patch (256)   M masked patches   V = P - M visible ones   D model width
    H heads   N = 2 + P tokens   d = D / H

Names in the kernels of all files:
    x_ptr, x_ptrs    a tensor's address, and a tensor of addresses   x_stride_b, _p, _n ...    strides, by dimension
    d_x              gradient of the loss with respect to x (dq, dk, dv: of q, k, v)
    X_2              the next power of two of a size X               BLOCK_X    how much of X a program takes at a time
    COMPUTE          dtype of a product's factors; sums are float32
Tensors come in with their last dimension contiguous (`backend.last_dim_contiguous`), other strides as they are.
"""

from .attention import attention, available_attention
from .choose_attention import AttentionChoice, choose_attention
from .embed import NUM_PREFIX, embed_patches, embed_visible_patches, patchify
from .fbank import fbank
from .fp8 import fp8_linear, fp8_obstacle
from .mask_tokens import insert_mask_tokens
from .mspm_loss import MSPMLoss, found_patches, mspm_loss
from .patch_mask import sample_patch_mask

__all__ = [
    "NUM_PREFIX",
    "AttentionChoice",
    "MSPMLoss",
    "attention",
    "available_attention",
    "choose_attention",
    "embed_patches",
    "embed_visible_patches",
    "fbank",
    "found_patches",
    "fp8_linear",
    "fp8_obstacle",
    "insert_mask_tokens",
    "mspm_loss",
    "patchify",
    "sample_patch_mask",
]
