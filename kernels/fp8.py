"""A linear layer whose three matrix products are computed in FP8: y = x W^T + b, dx = dy W and dw = dy^T x.

Each factor gets one scale, found anew in every call: s = largest magnitude / largest number of the format, stored value
= factor / s, rounded to nearest. x and W become e4m3 (4 exponent and 3 mantissa bits, up to 448), dy becomes e5m2 (5
and 2, up to 57344), as in "FP8 Formats for Deep Learning" (Micikevicius et al. 2022). Gradients spread over more powers
of two than activations and weights do, and what falls out of the format's range becomes zero: e5m2 keeps its precision
down to 2^-30 of the largest magnitude, e4m3 down to 2^-15.

The cost in accuracy, for normally distributed values: rounding to e4m3 adds noise of 2.6% (RMS), to e5m2 of 5.3%, so y
errs by 3.7% of its RMS, dx and dw by 5.9%. A scale is shared by a whole tensor, but precision is relative: an outlier
takes none from the rest until it is 2^15 (in a gradient 2^30) times larger than they are. From there on it does, and
2^4 (2^3) further they are zero.

All but the products is plain PyTorch in a `torch.autograd.Function`, through which torch.compile traces; an operator of
`torch.library` would be opaque to it. So Inductor finds the largest magnitude in the kernel that makes x (LayerNorm,
GELU) or dy (GELU's backward pass), computes GELU again where it casts instead of writing it out, and casts and
transposes in one pass. Uncompiled, each of these is a pass over memory of its own. Whether FP8 gains anything at a
model's widths has to be measured.
"""

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

_MULTIPLE = 16  # of which both widths, and the rows that dw is summed over, must be multiples: cuBLASLt's rule
# far below any gradient; from here on no scale, nor its inverse, leaves the normal numbers of float32
_LEAST_PEAK = 2.0**-100


def fp8_obstacle(device: torch.device) -> str | None:
    """Why a device cannot multiply in FP8, to follow "FP8" in a sentence; None: it can."""
    if device.type != "cuda":
        return f"needs an NVIDIA GPU, and this device is {device.type!r}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"needs compute capability 8.9 or higher (Ada, Hopper, Blackwell), and this GPU has {major}.{minor}"
    return None


# What torch.compiler.assume_constant_result does: compiled code takes the answer for a constant. The decorator itself
# imports torch._dynamo, which takes longer than all the rest of this package.
fp8_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined] # functions take attributes


def _resolve(name: str | None, x: torch.Tensor) -> str:
    """The backend that runs; "scaled_mm" off the GPU, where PyTorch emulates it, only if it is asked for."""
    if name not in (None, "torch", "scaled_mm"):
        raise ValueError(f"backend must be None, 'torch' or 'scaled_mm', not {name!r}")
    if name == "torch" or (name is None and x.dtype == torch.float64):
        return "torch"
    if x.dtype == torch.float64:
        raise ValueError("backend='scaled_mm' sums in float32; for float64 use backend='torch'")
    obstacle = fp8_obstacle(x.device)
    if name is None:
        return "torch" if obstacle else "scaled_mm"
    if obstacle and x.device.type == "cuda":
        raise ValueError(f"backend='scaled_mm': FP8 {obstacle}")
    return name


def _quantise(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, n] -> [rows, n] contiguous, in FP8, and the scale (float32, no dimensions) that multiplies it back.

    No clamp: formats round to their largest number all that is up to 1.03 times larger, and no product comes to more,
    also when compiled code compares values rounded to bf16 and casts them unrounded. A NaN or an infinity makes the
    scale NaN or infinite and, as zero times infinity, its own stored value NaN; from there it reaches every product. A
    diverged run must not look sound.
    """
    peak = tensor.abs().amax(dim=1).amax()  # rows first: so Inductor can join it to a kernel that works on rows
    # in float64, as compiled code divides float32 inexactly and would round otherwise
    peak = peak.double().clamp(min=_LEAST_PEAK)
    largest = torch.finfo(dtype).max
    stored = (tensor.float() * (largest / peak).float()).to(dtype)
    return stored.contiguous(), (peak / largest).float()


def _transpose(matrix: torch.Tensor) -> torch.Tensor:
    """[rows, n] -> [n, rows] contiguous, with columns of zeros up to a multiple of 16."""
    padding = -matrix.shape[0] % _MULTIPLE
    if padding:
        matrix = torch.nn.functional.pad(matrix, (0, 0, 0, padding))
    return matrix.t().contiguous()


def _product(
    a: torch.Tensor,  # [m, k] FP8, contiguous
    b: torch.Tensor,  # [n, k] FP8, contiguous: Hopper takes the second factor in no other layout
    scales: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    backend: str,
    *,
    bias: torch.Tensor | None = None,  # [n]
    fast: bool = False,
) -> torch.Tensor:  # [m, n]
    """a b^T + bias. `fast` leaves partial sums in the matrix units, which keep fewer bits of them than float32 does."""
    # Autocast would cast the factors of the reference's product, and of the one inside PyTorch's emulation on the CPU.
    with torch.autocast(a.device.type, enabled=False):
        if backend == "torch":
            wide = torch.promote_types(dtype, torch.float32)
            sums = (a.to(wide) @ b.to(wide).t()) * scales[0] * scales[1]
            return (sums if bias is None else sums + bias).to(dtype)
        # cuBLASLt adds no bias to a float32 result
        joined = bias.to(dtype) if bias is not None and dtype != torch.float32 else None
        result = torch._scaled_mm(a, b.t(), *scales, bias=joined, out_dtype=dtype, use_fast_accum=fast)
        return result if bias is None or joined is not None else result + bias


class _FP8Linear(torch.autograd.Function):
    """Keeps what the backward pass multiplies as the forward pass stored it: in FP8, transposed. When compiled,
    Inductor may keep what it was made of instead and make it anew.
    """

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,  # [rows, in]
        weight: torch.Tensor,  # [out, in]
        bias: torch.Tensor | None,  # [out]
        backend: str,
    ) -> torch.Tensor:  # [rows, out]
        x8, x_scale = _quantise(x, E4M3)
        weight8, weight_scale = _quantise(weight, E4M3)
        ctx.save_for_backward(_transpose(x8), x_scale, _transpose(weight8), weight_scale)
        ctx.backend, ctx.weight_dtype, ctx.bias_dtype = backend, weight.dtype, None if bias is None else bias.dtype
        return _product(x8, weight8, (x_scale, weight_scale), x.dtype, backend, bias=bias, fast=True)

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x8_t, x_scale, weight8_t, weight_scale = ctx.saved_tensors
        dy8, dy_scale = _quantise(dy, E5M2)
        dx = _product(dy8, weight8_t, (dy_scale, weight_scale), dy.dtype, ctx.backend)
        dweight = _product(_transpose(dy8), x8_t, (dy_scale, x_scale), ctx.weight_dtype, ctx.backend)
        dbias = None if ctx.bias_dtype is None else dy.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dweight, dbias, None


def fp8_linear(
    x: torch.Tensor,  # [..., in]
    weight: torch.Tensor,  # [out, in]
    bias: torch.Tensor | None = None,  # [out]
    *,
    backend: str | None = None,
) -> torch.Tensor:  # [..., out]
    """x W^T + b with FP8 products in both directions, differentiable once. The top of this file says what is rounded to
    what.

    Args:
        x: bf16 or fp32, of any strides; float64 is quantised the same way and multiplied in float64. Under autocast it
            is cast first.
        weight, bias: of any of these dtypes. The bias and its gradient are never quantised; that gradient is summed in
            float32.
        backend: None is "scaled_mm" on a GPU that multiplies in FP8 (see `fp8_obstacle`), "torch" elsewhere.
            "torch"      the reference: multiplies the same stored values in float32
            "scaled_mm"  torch._scaled_mm: cuBLASLt on a GPU, an emulation on the CPU

    Returns:
        In the dtype of x, under autocast in the autocast dtype. A NaN or an infinity in x or weight makes all of it
        NaN, one in its gradient all of their gradients.

    Raises:
        ValueError: widths that are no multiples of 16, shapes that do not belong together, an empty x, or a backend
            that is unknown or cannot run here.
    """
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = ", ".join(str(None if each is None else tuple(each.shape)) for each in (x, weight, bias))
        raise ValueError(f"x, weight and bias must be [..., in], [out, in] and [out] (or None), not {shapes}")
    if weight.shape[0] % _MULTIPLE or weight.shape[1] % _MULTIPLE or x.numel() == 0:
        raise ValueError(
            f"FP8 products need widths that are multiples of {_MULTIPLE}, and at least one row: "
            f"x is {tuple(x.shape)}, weight {tuple(weight.shape)}"
        )
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))  # as nn.Linear does; LayerNorm leaves float32
    rows = _FP8Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, _resolve(backend, x))
    return rows.reshape(*x.shape[:-1], weight.shape[0])
