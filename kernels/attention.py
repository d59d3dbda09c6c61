"""Softmax attention without mask: one door to whichever implementation serves, and a Triton kernel of our own.

The kernel is FlashAttention-2 (Dao 2023) with tiles cut for 512 patches + 2 tokens. Tiles of one size waste what the
last of them holds beyond N: at N = 514, tiles of 128 x 128 compute 640 x 640 logits, of which 64.5 % exist, and 128 x
64 compute 640 x 576, 71.7 %. Here whole tiles cover N // tile * tile rows and keys without any bounds check, and what
is left goes into one tile of the next power of two, 16 at least: 528 x 528 logits, 94.8 %, in the forward pass and in
each product of the backward pass.
"""

import functools
import importlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from .backend import last_dim_contiguous, resolve_backend

HEAD_DIMS = (16, 32, 64, 128)  # of the Triton kernel


def _reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v)


# --- the kernels ------------------------------------------------------------------------------------------------------

_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _load_rows(ptr, first, stride, N, BLOCK_ROWS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """[BLOCK_ROWS, D] from row `first` on; MASKED: rows past N are zero."""
    row = first + tl.arange(0, BLOCK_ROWS)
    ptrs = ptr + row[:, None] * stride + tl.arange(0, D)[None, :]
    if MASKED:
        tile = tl.load(ptrs, mask=(row < N)[:, None], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def _store_rows(ptr, tile, first, stride, N, BLOCK_ROWS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    row = first + tl.arange(0, BLOCK_ROWS)
    ptrs = ptr + row[:, None] * stride + tl.arange(0, D)[None, :]
    if MASKED:
        tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=(row < N)[:, None])
    else:
        tl.store(ptrs, tile.to(ptr.dtype.element_ty))


@triton.jit
def _attend(
    acc, total, peak, q, k_ptr, v_ptr, first, k_stride_n, v_stride_n, N,
    BLOCK_KEYS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax; logits are in units of log 2, since exp2 is what the hardware has."""
    k = _load_rows(k_ptr, first, k_stride_n, N, BLOCK_KEYS, D, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_ROWS, BLOCK_KEYS]
    if MASKED:
        s = tl.where((first + tl.arange(0, BLOCK_KEYS) < N)[None, :], s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, axis=1) * (SCALE * _LOG2_E))
    p = tl.exp2(s * (SCALE * _LOG2_E) - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(p, axis=1)
    v = _load_rows(v_ptr, first, v_stride_n, N, BLOCK_KEYS, D, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, new_peak


@triton.jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [B, N, H, d]
    lse_ptr,  # [B, H, N] fp32: log2 of the sum of the exponentials
    first,
    tiles,
    N,
    H,
    q_stride_b, q_stride_h, q_stride_n,
    k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,  # keys of the last tile, 0: none
    D: tl.constexpr,
    MASKED: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    """Rows `first` + i * BLOCK_ROWS ... of each head, i < tiles. Programs of one head follow each other, so its keys
    stay in the L2 cache.
    """
    head = (tl.program_id(0) // tiles).to(tl.int64)
    first += tl.program_id(0) % tiles * BLOCK_ROWS
    clip, h = head // H, head % H
    q_ptr += clip * q_stride_b + h * q_stride_h
    k_ptr += clip * k_stride_b + h * k_stride_h
    v_ptr += clip * v_stride_b + h * v_stride_h
    out_ptr += (clip * N * H + h) * D
    lse_ptr += head * N

    q = _load_rows(q_ptr, first, q_stride_n, N, BLOCK_ROWS, D, MASKED)
    peak = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    acc = tl.zeros((BLOCK_ROWS, D), tl.float32)
    # The tail comes first: after the loop it makes the assembler wait for every matrix instruction in it (C7515).
    if BLOCK_TAIL > 0:
        acc, total, peak = _attend(
            acc, total, peak, q, k_ptr, v_ptr, N // BLOCK_KEYS * BLOCK_KEYS, k_stride_n, v_stride_n, N,
            BLOCK_TAIL, D, True, SCALE,
        )  # fmt: skip
    for tile in tl.range(N // BLOCK_KEYS, disable_licm=True):  # hoisted out of the loop, q would sit in registers
        acc, total, peak = _attend(
            acc, total, peak, q, k_ptr, v_ptr, tile * BLOCK_KEYS, k_stride_n, v_stride_n, N, BLOCK_KEYS, D, False, SCALE
        )

    _store_rows(out_ptr, acc / total[:, None], first, H * D, N, BLOCK_ROWS, D, MASKED)
    row = first + tl.arange(0, BLOCK_ROWS)
    tl.store(lse_ptr + row, peak + tl.log2(total), mask=row < N)


@triton.jit
def _add_dq(
    dq, q, d_out, lse, delta, k_ptr, v_ptr, first, k_stride_n, v_stride_n, N,
    BLOCK_KEYS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """dQ + dS K of one tile of keys, its probabilities computed again from the saved lse (Dao 2023, algorithm 2)."""
    k = _load_rows(k_ptr, first, k_stride_n, N, BLOCK_KEYS, D, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_ROWS, BLOCK_KEYS]
    p = tl.exp2(s * (SCALE * _LOG2_E) - lse[:, None])
    if MASKED:  # a key past N has logit 0, which may be far above the others
        p = tl.where((first + tl.arange(0, BLOCK_KEYS) < N)[None, :], p, 0.0)
    v = _load_rows(v_ptr, first, v_stride_n, N, BLOCK_KEYS, D, MASKED)
    dp = tl.dot(d_out, tl.trans(v), input_precision="ieee")  # [BLOCK_ROWS, BLOCK_KEYS]
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _dq_kernel(
    d_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [B, N, H, d]
    lse_ptr,  # [B, H, N] fp32
    delta_ptr,  # [B, H, N] fp32, written: rowsum(dO * O)
    d_qkv_ptr,  # [B, N, 3, H, d]
    first,
    tiles,
    N,
    H,
    d_out_stride_b, d_out_stride_h, d_out_stride_n,
    q_stride_b, q_stride_h, q_stride_n,
    k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    """dQ of the same rows as in `_forward_kernel`, and their delta: dO is at hand here, and O is needed nowhere
    else.
    """
    head = (tl.program_id(0) // tiles).to(tl.int64)
    first += tl.program_id(0) % tiles * BLOCK_ROWS
    clip, h = head // H, head % H
    d_out_ptr += clip * d_out_stride_b + h * d_out_stride_h
    q_ptr += clip * q_stride_b + h * q_stride_h
    k_ptr += clip * k_stride_b + h * k_stride_h
    v_ptr += clip * v_stride_b + h * v_stride_h
    out_ptr += (clip * N * H + h) * D
    dq_ptr = d_qkv_ptr + (clip * N * 3 * H + h) * D
    lse_ptr += head * N
    delta_ptr += head * N

    row = first + tl.arange(0, BLOCK_ROWS)
    d_out = _load_rows(d_out_ptr, first, d_out_stride_n, N, BLOCK_ROWS, D, MASKED)
    out = _load_rows(out_ptr, first, H * D, N, BLOCK_ROWS, D, MASKED)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), axis=1)
    tl.store(delta_ptr + row, delta, mask=row < N)

    q = _load_rows(q_ptr, first, q_stride_n, N, BLOCK_ROWS, D, MASKED)
    lse = tl.load(lse_ptr + row, mask=row < N, other=0.0)
    dq = tl.zeros((BLOCK_ROWS, D), tl.float32)
    if BLOCK_TAIL > 0:
        dq = _add_dq(
            dq, q, d_out, lse, delta, k_ptr, v_ptr, N // BLOCK_KEYS * BLOCK_KEYS, k_stride_n, v_stride_n, N,
            BLOCK_TAIL, D, True, SCALE,
        )  # fmt: skip
    for tile in tl.range(N // BLOCK_KEYS, disable_licm=True):
        dq = _add_dq(
            dq, q, d_out, lse, delta, k_ptr, v_ptr, tile * BLOCK_KEYS, k_stride_n, v_stride_n, N,
            BLOCK_KEYS, D, False, SCALE,
        )  # fmt: skip
    _store_rows(dq_ptr, dq * SCALE, first, 3 * H * D, N, BLOCK_ROWS, D, MASKED)


@triton.jit
def _add_dkv(
    dk, dv, k, v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, first, q_stride_n, d_out_stride_n, N,
    BLOCK_ROWS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Everything is transposed, keys x rows: the probabilities then go from one product into the next without leaving
    the registers. Rows past N add nothing, their q, dO and delta being zero; keys past N may overflow, each in a row of
    its own that is not stored.
    """
    row = first + tl.arange(0, BLOCK_ROWS)
    q = _load_rows(q_ptr, first, q_stride_n, N, BLOCK_ROWS, D, MASKED)
    d_out = _load_rows(d_out_ptr, first, d_out_stride_n, N, BLOCK_ROWS, D, MASKED)
    if MASKED:
        lse = tl.load(lse_ptr + row, mask=row < N, other=0.0)
        delta = tl.load(delta_ptr + row, mask=row < N, other=0.0)
    else:
        lse = tl.load(lse_ptr + row)
        delta = tl.load(delta_ptr + row)
    s = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_KEYS, BLOCK_ROWS]
    p = tl.exp2(s * (SCALE * _LOG2_E) - lse[None, :])
    dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(d_out), input_precision="ieee")  # [BLOCK_KEYS, BLOCK_ROWS]
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _dkv_kernel(
    d_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,  # [B, H, N] fp32
    delta_ptr,  # [B, H, N] fp32
    d_qkv_ptr,  # [B, N, 3, H, d]
    first,
    tiles,
    N,
    H,
    d_out_stride_b, d_out_stride_h, d_out_stride_n,
    q_stride_b, q_stride_h, q_stride_n,
    k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,  # rows of the last tile, 0: none
    D: tl.constexpr,
    MASKED: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    """dK and dV of keys `first` + i * BLOCK_KEYS ... of each head, i < tiles."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    first += tl.program_id(0) % tiles * BLOCK_KEYS
    clip, h = head // H, head % H
    d_out_ptr += clip * d_out_stride_b + h * d_out_stride_h
    q_ptr += clip * q_stride_b + h * q_stride_h
    k_ptr += clip * k_stride_b + h * k_stride_h
    v_ptr += clip * v_stride_b + h * v_stride_h
    dk_ptr = d_qkv_ptr + (clip * N * 3 * H + H + h) * D
    dv_ptr = dk_ptr + H * D
    lse_ptr += head * N
    delta_ptr += head * N

    k = _load_rows(k_ptr, first, k_stride_n, N, BLOCK_KEYS, D, MASKED)
    v = _load_rows(v_ptr, first, v_stride_n, N, BLOCK_KEYS, D, MASKED)
    dk = tl.zeros((BLOCK_KEYS, D), tl.float32)
    dv = tl.zeros((BLOCK_KEYS, D), tl.float32)
    tail = N // BLOCK_ROWS * BLOCK_ROWS
    if BLOCK_TAIL > 0 and not MASKED:
        dk, dv = _add_dkv(
            dk, dv, k, v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, tail, q_stride_n, d_out_stride_n, N,
            BLOCK_TAIL, D, True, SCALE,
        )  # fmt: skip
    for tile in tl.range(N // BLOCK_ROWS, disable_licm=True):
        dk, dv = _add_dkv(
            dk, dv, k, v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, tile * BLOCK_ROWS, q_stride_n, d_out_stride_n, N,
            BLOCK_ROWS, D, False, SCALE,
        )  # fmt: skip
    # One warp has no such matrix instructions, and would spill registers on sm_100 with the tail in front.
    if BLOCK_TAIL > 0 and MASKED:
        dk, dv = _add_dkv(
            dk, dv, k, v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, tail, q_stride_n, d_out_stride_n, N,
            BLOCK_TAIL, D, True, SCALE,
        )  # fmt: skip
    _store_rows(dk_ptr, dk * SCALE, first, 3 * H * D, N, BLOCK_KEYS, D, MASKED)
    _store_rows(dv_ptr, dv, first, 3 * H * D, N, BLOCK_KEYS, D, MASKED)


# --- the launches -----------------------------------------------------------------------------------------------------

# Launches: rows (or keys) of which a program computes the result, keys (or rows) that it takes at a time, warps. They
# are fixed, not tuned at run time, so that all ranks and all runs compute the same. Chosen from what the compiler says
# for sm_80, sm_90 and sm_100: nothing spills, and on sm_90 at d = 64 a multiprocessor holds two programs of dQ (122
# registers, 8 warps) and three of dK and dV (140, 4 warps), but one of the forward pass (156, 8 warps). 64 keys at a
# time there would let it hold two, and spill on sm_80.
_NARROW = {"forward": (128, 128, 8), "dq": (128, 64, 8), "dkv": (64, 32, 4)}  # bf16 and fp16, d <= 64
# At d = 128 the accumulators take twice the registers. Nobody trains with it here: its tails spill a little.
_WIDE = {"forward": (128, 64, 8), "dq": (128, 32, 8), "dkv": (128, 16, 8)}
# fp32 multiplies outside the tensor cores, from registers. It is for checking: at d = 128 it spills.
_SINGLE = {"forward": (32, 32, 8), "dq": (32, 32, 8), "dkv": (32, 32, 8)}
# one tile on its way while one is computed on; with a third, no second program of the forward kernel would fit beside
_STAGES = 2
_TAIL_OTHER = 32  # a tail tile has fewer warps to hold what it takes
_SMALLEST = 16  # rows, columns and depth of a tile that the tensor cores take


class _Launch(NamedTuple):
    """`tiles` tiles of `own` rows (keys, in `_dkv_kernel`) from `first` on, for every head."""

    first: int
    tiles: int
    own: int
    other: int
    is_tail: bool
    warps: int


def _launches(kernel: str, N: int, D: int, dtype: torch.dtype) -> Iterator[_Launch]:
    """The whole tiles, then the tail: a launch of its own, because among eight warps each would compute the same 16
    rows again.
    """
    is_single = dtype == torch.float32
    own, other, warps = (_SINGLE if is_single else _NARROW if D <= 64 else _WIDE)[kernel]
    whole, rest = divmod(N, own)
    if whole:
        yield _Launch(0, whole, own, other, False, warps)
    if rest:
        tail = _tail(rest)
        yield _Launch(
            whole * own, 1, tail, min(other, _TAIL_OTHER), True, warps if is_single else min(warps, tail // _SMALLEST)
        )


def _tail(length: int) -> int:
    return max(_SMALLEST, triton.next_power_of_2(length)) if length else 0


def _run(kernel: triton.JITFunction, name: str, strided: tuple[torch.Tensor, ...], *others: torch.Tensor) -> None:
    """`strided` are [B, H, N, d] with any strides of the first three dimensions; they come first among the kernel's
    arguments.
    """
    q = strided[-1]
    B, H, N, D = q.shape
    strides = [stride for tensor in strided for stride in tensor.stride()[:3]]
    with torch.cuda.device_of(q):
        for each in _launches(name, N, D, q.dtype) if B else ():
            rows, keys = (each.other, each.own) if name == "dkv" else (each.own, each.other)
            kernel[(B * H * each.tiles,)](
                *strided,
                *others,
                each.first,
                each.tiles,
                N,
                H,
                *strides,
                BLOCK_ROWS=rows,
                BLOCK_KEYS=keys,
                BLOCK_TAIL=_tail(N % each.other),
                D=D,
                MASKED=each.is_tail,
                SCALE=1 / math.sqrt(D),
                num_warps=each.warps,
                num_stages=_STAGES,
            )


# --- the operator -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("ssast::attention_forward", mutates_args=())
def _forward_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, H, N, d] output, laid out as [B, N, H, d], and [B, H, N] fp32 log2 of the softmax's denominators."""
    q, k, v = (last_dim_contiguous(x) for x in (q, k, v))
    out, lse = _empty_outputs(q)
    _run(_forward_kernel, "forward", (q, k, v), out, lse)
    return out, lse


@_forward_op.register_fake
def _(q, k, v):
    return _empty_outputs(q)


def _empty_outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    B, H, N, D = q.shape
    return q.new_empty(B, N, H, D).transpose(1, 2), q.new_empty(B, H, N, dtype=torch.float32)


@torch.library.custom_op("ssast::attention_backward", mutates_args=())
def _backward_op(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> torch.Tensor:
    """[B, N, 3, H, d]: dQ, dK and dV, laid out as the projection that made q, k and v lays those out."""
    d_out, q, k, v = (last_dim_contiguous(x) for x in (d_out, q, k, v))
    out = out.transpose(1, 2).contiguous()  # [B, N, H, d], as it was made: nothing is copied
    grad = _empty_gradient(q)
    delta = torch.empty_like(lse)
    _run(_dq_kernel, "dq", (d_out, q, k, v), out, lse, delta, grad)
    _run(_dkv_kernel, "dkv", (d_out, q, k, v), lse, delta, grad)
    return grad


@_backward_op.register_fake
def _(d_out, q, k, v, out, lse):
    return _empty_gradient(q)


def _empty_gradient(q: torch.Tensor) -> torch.Tensor:
    B, H, N, D = q.shape
    return q.new_empty(B, N, 3, H, D)


def _setup_context(ctx, inputs, output):
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, out, lse)


def _backward(ctx, d_out, _):
    if d_out is None:
        return None, None, None
    grad = _backward_op(d_out, *ctx.saved_tensors)
    return grad.permute(2, 0, 3, 1, 4).unbind()


_forward_op.register_autograd(_backward, setup_context=_setup_context)


# --- the other implementations, and which of them can run -------------------------------------------------------------


def _math(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return functional.scaled_dot_product_attention(q, k, v)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return functional.scaled_dot_product_attention(q, k, v)


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return functional.scaled_dot_product_attention(q, k, v)


def _flash_attn_2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from flash_attn import flash_attn_func

    return _tokens_before_heads(flash_attn_func, q, k, v)


def _flash_attn_3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from flash_attn_interface import flash_attn_func

    return _tokens_before_heads(flash_attn_func, q, k, v)


def _flash_attn_4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from flash_attn.cute import flash_attn_func

    return _tokens_before_heads(flash_attn_func, q, k, v)


def _tokens_before_heads(function: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    out = out[0] if isinstance(out, tuple) else out  # some versions return the log-sum-exp, too
    return out.transpose(1, 2)


def _triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return _forward_op(q, k, v)[0]


BACKENDS = {
    "torch": _reference,
    "math": _math,
    "flash": _flash,
    "cudnn": _cudnn,
    "flash-attn-2": _flash_attn_2,
    "flash-attn-3": _flash_attn_3,
    "flash-attn-4": _flash_attn_4,
    "triton": _triton,
}
_FLASH_ATTN_MODULES = {
    "flash-attn-2": "flash_attn",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn-4": "flash_attn.cute",
}


def obstacle(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend of `attention` cannot run, to follow its name in a sentence; None: it can."""
    if name not in BACKENDS:
        return "is unknown"
    if name in ("torch", "math") or (name == "flash" and device.type == "cpu"):
        return None
    if name != "triton":
        return _cuda_obstacle(name, device, dtype, head_dim) if device.type == "cuda" else "needs a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32) or head_dim not in HEAD_DIMS:
        return f"takes bf16, fp16 and fp32 with a head dimension in {HEAD_DIMS}, not {dtype} with {head_dim}"
    try:
        resolve_backend(name, device)
    except ValueError:
        return "needs a CUDA device, or TRITON_INTERPRET=1 in the environment from the start"
    return None


@functools.cache
def _cuda_obstacle(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if name in _FLASH_ATTN_MODULES:
        return _flash_attn_obstacle(name, torch.cuda.get_device_capability(device), dtype)
    x = torch.empty(1, 1, 128, head_dim, dtype=dtype, device=device, requires_grad=True)
    can_use = {
        "flash": torch.backends.cuda.can_use_flash_attention,
        "cudnn": torch.backends.cuda.can_use_cudnn_attention,
    }[name]
    return (
        None
        if can_use(torch.backends.cuda.SDPAParams(x, x, x, None, 0.0, False, False))
        else "is refused by PyTorch here"
    )


def _flash_attn_obstacle(name: str, capability: tuple[int, int], dtype: torch.dtype) -> str | None:
    """The packages share names, so each is known by the function it has: `import flash_attn` also works where only 4 is
    installed.
    """
    oldest, newest = {
        "flash-attn-2": ((8, 0), (99, 0)),
        "flash-attn-3": ((9, 0), (9, 0)),
        "flash-attn-4": ((9, 0), (99, 0)),
    }[name]
    if not oldest <= capability <= newest:
        return f"is not made for compute capability {capability[0]}.{capability[1]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bf16 and fp16, not {dtype}"
    try:
        module = importlib.import_module(_FLASH_ATTN_MODULES[name])
    except Exception as error:  # whatever a half-working installation raises
        return f"is not installed ({type(error).__name__}: {first_line(error)})"
    return (
        None if hasattr(module, "flash_attn_func") else f"is not installed ({module.__name__} has no flash_attn_func)"
    )


def first_line(error: Exception) -> str:
    """Of an error's message; empty where it has none."""
    return next(iter(str(error).splitlines()), "")


def check_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Check that a backend of `attention` can run.

    Raises:
        ValueError: it cannot; the message says why, and which ones can.
    """
    reason = obstacle(name, device, dtype, head_dim)
    if reason is not None:
        available = ", ".join(available_attention(device, dtype, head_dim))
        raise ValueError(f"attention backend {name!r} {reason}; available: {available}")


# --- the public functions ---------------------------------------------------------------------------------------------


def attention(
    q: torch.Tensor,  # [B, H, N, d]
    k: torch.Tensor,  # [B, H, N, d]
    v: torch.Tensor,  # [B, H, N, d]
    *,
    backend: str | None = None,
) -> torch.Tensor:  # [B, H, N, d]
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, equation 1), differentiable once.

    Args:
        q, k, v: of one shape and dtype; strided as they come, views of one projection included.
        backend:
            "torch", None    PyTorch's scaled_dot_product_attention, which chooses among its own kernels: the reference
            "math", "flash", "cudnn"    one of those kernels
            "flash-attn-2", "flash-attn-3", "flash-attn-4"    the installed package of that generation
            "triton"  the kernel of this file: bf16, fp16 or fp32 with fp32 sums; d of 16, 32, 64 or 128; no atomics, so
                      the same bits in every run. None never means it, in Triton's interpreter neither: it must first
                      win a measurement.

    Returns:
        In the dtype of q. Most backends lay it out as [B, N, H, d], so that joining the heads moves nothing.

    Raises:
        ValueError: shapes or dtypes that differ, an unknown backend, or one that cannot run here.
    """
    if q.ndim != 4 or not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        given = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (q, k, v))
        raise ValueError(f"q, k and v must be [B, H, N, d] of one shape and dtype, not {given}")
    name = backend or "torch"
    if name != "torch" and not torch.compiler.is_compiling():  # the check is not traceable, nor needed twice
        check_backend(name, q.device, q.dtype, q.shape[3])
    return BACKENDS[name](q, k, v)


def available_attention(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Names of the backends of `attention` that can run with tensors of this dtype and head dimension d, "torch"
    first.
    """
    device = torch.device(device)
    return [name for name in BACKENDS if obstacle(name, device, dtype, head_dim) is None]
