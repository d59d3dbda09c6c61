"""GPU operators of the engine. They know tensors, nothing of training, files or configs.

One file an operator. So far each has its plain-PyTorch reference: exact, differentiable, running anywhere. It is the path on every device
for now, and the baseline that every faster kernel will be held against; `backend="triton"` is refused until there is one.

Legend of the shapes in all files:
    B clips   S samples   T frames   F mel bins   f, t  patch rows (frequency) and columns (time) of the grid   P = f * t patches
    K values of a patch (256)   M masked patches   D model width   H heads   N = 2 + P tokens   d = D / H
"""

from .attention import attention
from .embed import embed_patches, patchify
from .fbank import fbank
from .mspm_loss import MSPMLoss, found_patches, mspm_loss
from .patch_mask import sample_patch_mask

__all__ = ["MSPMLoss", "attention", "embed_patches", "fbank", "found_patches", "mspm_loss", "patchify", "sample_patch_mask"]
