"""Visible tokens back to whole clips: mask tokens where patches are masked, the decoder's positions on all."""

import torch
import triton
import triton.language as tl

from .backend import resolve_backend
from .embed import NUM_PREFIX, sum_parts, visible_rows


def _reference(
    encoded: torch.Tensor, mask_token: torch.Tensor, position: torch.Tensor, slot: torch.Tensor
) -> torch.Tensor:
    number = visible_rows(slot, encoded.shape[1] - NUM_PREFIX)  # [B, V]
    prefix_rows = torch.arange(NUM_PREFIX, device=slot.device).expand(slot.shape[0], -1)
    rows = torch.cat((prefix_rows, NUM_PREFIX + number), dim=1)  # [B, 2 + V]
    # by embedding(), whose gradient is summed in a fixed order where that of indexing is not
    tokens = encoded + torch.nn.functional.embedding(rows, position)  # [B, 2 + V, D]
    masked = (mask_token + position).to(tokens.dtype).expand(slot.shape[0], -1, -1)
    return masked.scatter(1, rows[..., None].expand(-1, -1, position.shape[1]), tokens)


# --- the kernels ------------------------------------------------------------------------------------------------------
#
# A program takes a tile of a clip's tokens and finds each one's source by its slot, so every token is written once and
# in order. The backward pass reads the gradient once: it gathers the encoder's part and sums the rest over clips.

_ROWS = 16  # tokens a program
_COLUMNS = 128  # of the width D
_PROGRAMS = 512  # about four for each multiprocessor: into how many the sums over clips are split


@triton.jit
def _insert_kernel(
    encoded_ptr,  # [B, 2 + V, D]
    mask_token_ptr,  # [D]
    position_ptr,  # [2 + P, D]
    slot_ptr,  # [B, P] int32
    out_ptr,  # [B, 2 + P, D]
    P: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program for BLOCK_ROWS tokens of one clip, all of their width."""
    clip = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_patch = (token >= 2) & (token < 2 + P)
    slot = tl.load(slot_ptr + clip * P + token - 2, mask=is_patch, other=-1)
    is_encoded = (token < 2) | ((slot >= 0) & (slot < V))
    row = tl.where(is_patch, 2 + slot, token)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        keep = (token < 2 + P)[:, None] & (d < D)[None, :]
        encoded_ptrs = encoded_ptr + clip * (2 + V) * D + row[:, None] * D + d[None, :]
        # [BLOCK_ROWS, BLOCK_D]
        encoded = tl.load(encoded_ptrs, mask=keep & is_encoded[:, None], other=0.0).to(tl.float32)
        mask_token = tl.load(mask_token_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        place = token[:, None] * D + d[None, :]
        tokens = tl.load(position_ptr + place, mask=keep, other=0.0).to(tl.float32)
        tokens += tl.where(is_encoded[:, None], encoded, mask_token[None, :])
        tl.store(out_ptr + clip * (2 + P) * D + place, tokens.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _insert_gradients_kernel(
    d_out_ptr,  # [B, 2 + P, D]
    slot_ptr,  # [B, P] int32
    d_encoded_ptr,  # [B, 2 + V, D]
    position_ptr,  # [SPLITS, 2 + P, D] float32: sums over a split's clips
    masked_ptr,  # [SPLITS * token tiles, D] float32: sums over masked patches
    B,
    P: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(2)
    token = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_patch = (token >= 2) & (token < 2 + P)
    place = token[:, None] * D + d[None, :]
    keep = (token < 2 + P)[:, None] & (d < D)[None, :]
    every = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    masked = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for clip in range(split, B, SPLITS):
        slot = tl.load(slot_ptr + tl.cast(clip, tl.int64) * P + token - 2, mask=is_patch, other=-1)
        is_encoded = (token < 2) | ((slot >= 0) & (slot < V))
        row = tl.where(is_patch, 2 + slot, token)
        d_out = tl.load(d_out_ptr + tl.cast(clip, tl.int64) * (2 + P) * D + place, mask=keep, other=0.0)
        d_encoded_ptrs = d_encoded_ptr + tl.cast(clip, tl.int64) * (2 + V) * D + row[:, None] * D + d[None, :]
        d_encoded = d_out.to(d_encoded_ptr.dtype.element_ty)
        tl.store(d_encoded_ptrs, d_encoded, mask=keep & is_encoded[:, None])
        every += d_out.to(tl.float32)
        masked += tl.where(is_encoded[:, None], 0.0, d_out.to(tl.float32))
    tl.store(position_ptr + tl.cast(split, tl.int64) * (2 + P) * D + place, every, mask=keep)
    part = (tl.cast(split, tl.int64) * tl.num_programs(0) + tile) * D + d
    tl.store(masked_ptr + part, tl.sum(masked, axis=0), mask=d < D)


@torch.library.custom_op("ssast::insert_mask_tokens", mutates_args=())
def _insert_op(
    encoded: torch.Tensor, mask_token: torch.Tensor, position: torch.Tensor, slot: torch.Tensor
) -> torch.Tensor:
    out = _new_output(encoded, position)
    batch, (num_tokens, width) = encoded.shape[0], position.shape
    if batch == 0:
        return out
    with torch.cuda.device_of(encoded):
        _insert_kernel[(triton.cdiv(num_tokens, _ROWS), batch)](
            encoded.contiguous(),
            mask_token.contiguous(),
            position.contiguous(),
            slot.contiguous(),
            out,
            P=num_tokens - NUM_PREFIX,
            V=encoded.shape[1] - NUM_PREFIX,
            D=width,
            BLOCK_ROWS=_ROWS,
            BLOCK_D=_COLUMNS,
            num_warps=4,
        )
    return out


@_insert_op.register_fake
def _(encoded, mask_token, position, slot):
    return _new_output(encoded, position)


def _new_output(encoded: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(encoded.dtype, position.dtype)
    return encoded.new_empty(encoded.shape[0], *position.shape, dtype=dtype)


@torch.library.custom_op("ssast::insert_mask_tokens_backward", mutates_args=())
def _insert_backward_op(
    d_out: torch.Tensor,
    mask_token: torch.Tensor,
    position: torch.Tensor,
    slot: torch.Tensor,
    num_visible: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of encoded (in `dtype`), mask token and position."""
    d_encoded, d_mask_token, d_position = _new_gradients(d_out, mask_token, position, num_visible, dtype)
    batch, (num_tokens, width) = d_out.shape[0], position.shape
    if batch == 0:
        return d_encoded, d_mask_token.zero_(), d_position.zero_()
    d_out = d_out.contiguous()
    with torch.cuda.device_of(d_out):
        row_tiles, column_tiles = triton.cdiv(num_tokens, _ROWS), triton.cdiv(width, _COLUMNS)
        splits = min(batch, max(1, _PROGRAMS // (row_tiles * column_tiles)))
        position_parts = torch.empty(splits, num_tokens, width, dtype=torch.float32, device=d_out.device)
        masked_parts = torch.empty(splits * row_tiles, width, dtype=torch.float32, device=d_out.device)
        _insert_gradients_kernel[(row_tiles, column_tiles, splits)](
            d_out,
            slot.contiguous(),
            d_encoded,
            position_parts,
            masked_parts,
            batch,
            P=num_tokens - NUM_PREFIX,
            V=num_visible,
            D=width,
            SPLITS=splits,
            BLOCK_ROWS=_ROWS,
            BLOCK_D=_COLUMNS,
            num_warps=4,
        )
        return d_encoded, sum_parts(masked_parts, mask_token), sum_parts(position_parts, position)


@_insert_backward_op.register_fake
def _(d_out, mask_token, position, slot, num_visible, dtype):
    return _new_gradients(d_out, mask_token, position, num_visible, dtype)


def _new_gradients(
    d_out: torch.Tensor, mask_token: torch.Tensor, position: torch.Tensor, num_visible: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        d_out.new_empty(d_out.shape[0], NUM_PREFIX + num_visible, d_out.shape[2], dtype=dtype),
        torch.empty_like(mask_token, memory_format=torch.contiguous_format),
        torch.empty_like(position, memory_format=torch.contiguous_format),
    )


def _setup_context(ctx, inputs, output) -> None:
    encoded, *saved = inputs
    ctx.num_visible, ctx.dtype = encoded.shape[1] - NUM_PREFIX, encoded.dtype
    ctx.save_for_backward(*saved)


def _backward(ctx, d_out):
    return *_insert_backward_op(d_out, *ctx.saved_tensors, ctx.num_visible, ctx.dtype), None


_insert_op.register_autograd(_backward, setup_context=_setup_context)


def insert_mask_tokens(
    encoded: torch.Tensor,  # [B, 2 + V, D]
    mask_token: torch.Tensor,  # [D]
    position: torch.Tensor,  # [2 + P, D]
    slot: torch.Tensor,  # [B, P]
    *,
    backend: str | None = None,
) -> torch.Tensor:  # [B, 2 + P, D]
    """What a decoder of masked autoencoders reads: the encoder's tokens in their places, the mask token in all others,
    positions added to every one (MAE-AST, Baade, Peng and Harwath 2022; He et al. 2021, section 3).

    The kernel sums in float32 and rounds once, to the wider of the dtypes of `encoded` and `position`.

    Args:
        encoded: two prefix tokens and the V visible patches' tokens, as `embed_visible_patches` orders them.
        mask_token: learned embedding that stands in for masked patches.
        position: trained position embedding, its first two rows belong to the prefix tokens.
        slot: int32, each patch's place among its clip's visible ones, -1 where it is masked; as
            `embed_visible_patches` gives it.
        backend: None, "torch" or "triton".

    Raises:
        ValueError: shapes that do not belong together.
    """
    batch, num_patches, width = encoded.shape[0], slot.shape[1], encoded.shape[2]
    expected = {"mask_token": (width,), "position": (NUM_PREFIX + num_patches, width), "slot": (batch, num_patches)}
    for (name, shape), value in zip(expected.items(), (mask_token, position, slot), strict=True):
        if value.shape != shape:
            raise ValueError(
                f"{name} is {tuple(value.shape)} and must be {shape}: {batch} clips of {num_patches} patches, width "
                f"{width}"
            )
    if not NUM_PREFIX < encoded.shape[1] <= NUM_PREFIX + num_patches:
        raise ValueError(
            f"encoded has {encoded.shape[1]} tokens for {num_patches} patches and {NUM_PREFIX} prefix tokens"
        )
    if resolve_backend(backend, encoded, mask_token, position) == "torch":
        return _reference(encoded, mask_token, position, slot)
    return _insert_op(encoded, mask_token, position, slot)
