"""Patches to tokens: projection, mask token, position and prefix tokens, written once; of all patches, or of the
visible ones only.
"""

import torch
import triton
import triton.language as tl

from .backend import TRITON_DTYPE, last_dim_contiguous, resolve_backend

NUM_PREFIX = 2  # cls and dist


def patchify(features: torch.Tensor, patch_shape: tuple[int, int], stride: tuple[int, int]) -> torch.Tensor:
    """[B, T, F] -> [B, P, K]; value index within a patch = mel offset * patch frames + frame offset."""
    windows = features.transpose(1, 2).unfold(1, patch_shape[0], stride[0]).unfold(2, patch_shape[1], stride[1])
    return windows.reshape(windows.shape[0], windows.shape[1] * windows.shape[2], -1)


def _reference(
    patches: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    position: torch.Tensor,
    prefix: torch.Tensor,
    mask_token: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    tokens = torch.nn.functional.linear(patches.to(weight.dtype), weight, bias)  # [B, P, D]
    if mask is not None and mask_token is not None:
        tokens = torch.where(_is_masked(mask, patches.shape[1])[..., None], mask_token.to(tokens.dtype), tokens)
    prefix = prefix.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
    return torch.cat((prefix, tokens), dim=1) + position


def _is_masked(mask: torch.Tensor, num_patches: int) -> torch.Tensor:
    """[B, M] patch numbers -> [B, P] bool."""
    flags = torch.zeros(mask.shape[0], num_patches, dtype=torch.bool, device=mask.device)
    return flags.scatter_(1, mask, True)


def visible_rows(slot: torch.Tensor, num_visible: int) -> torch.Tensor:
    """[B, P] slots, as `embed_visible_patches` gives them -> [B, V] int64, the visible patches' numbers, ascending."""
    return (slot < 0).to(torch.int8).sort(dim=1, stable=True).indices[:, :num_visible]


def _visible_reference(
    patches: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    position: torch.Tensor,
    prefix: torch.Tensor,
    mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    is_masked = _is_masked(mask, patches.shape[1])
    slot = ((~is_masked).cumsum(dim=1) - 1).masked_fill(is_masked, -1).to(torch.int32)
    number = visible_rows(slot, patches.shape[1] - mask.shape[1])  # [B, V]
    patches = patches.gather(1, number[..., None].expand(-1, -1, patches.shape[2]))
    # by embedding(), whose gradient is summed in a fixed order where that of indexing is not
    position_rows = torch.nn.functional.embedding(NUM_PREFIX + number, position)
    tokens = torch.nn.functional.linear(patches.to(weight.dtype), weight, bias) + position_rows
    prefix = (prefix + position[:NUM_PREFIX]).expand(tokens.shape[0], -1, -1).to(tokens.dtype)
    return torch.cat((prefix, tokens), dim=1), slot


# --- the kernels ------------------------------------------------------------------------------------------------------
#
# Masked patches, 400 of 512, need no projection: forward and backward multiply the rows of visible patches only,
# gathered by their numbers. Every token is written once, with everything added to it; gradients are sums over clips of
# what is read once. Where only visible tokens are wanted, the same kernels run with VISIBLE_ONLY: token 2 + i of a clip
# is then its i-th visible patch, and the programs for masked ones are not launched.

# tokens a program: a tile of visible patches is the left factor of a product, of which Hopper takes no fewer rows
_ROWS = 64
_SUM_ROWS = 16  # tokens a program in the sums over clips
_SUM_COLUMNS = 128  # of the width D
_PROGRAMS = 128  # about one for each multiprocessor: into how many the sums over clips are split


def _blocks(compute: torch.dtype) -> dict[str, dict[str, int]]:
    """Rows and columns of the products' results, and how much of the dimension that is summed over at a time. float32
    is multiplied outside the matrix units, which takes all factors from registers: small tiles.
    """
    if compute == torch.float32:
        return {
            "tokens": {"BLOCK_ROWS": 32, "BLOCK_D": 32, "BLOCK_K": 32},
            "weight": {"BLOCK_D": 32, "BLOCK_K": 32, "BLOCK_ROWS": 32},
        }
    return {
        "tokens": {"BLOCK_ROWS": _ROWS, "BLOCK_D": 128, "BLOCK_K": 64},
        "weight": {"BLOCK_D": 128, "BLOCK_K": 256, "BLOCK_ROWS": 64},
    }


@triton.jit
def _partition_kernel(
    mask_ptr,  # [B, M] int64
    visible_ptr,  # [B, P - M] int32
    slot_ptr,  # [B, P] int32
    P: tl.constexpr,
    M: tl.constexpr,
    P_2: tl.constexpr,
):
    """One program a clip: the numbers of its visible patches, ascending, and each patch's place among them (-1: it is
    masked).
    """
    clip = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, P_2)
    hits = tl.zeros((P_2,), tl.int32)
    for m0 in range(0, M, 32):
        m = m0 + tl.arange(0, 32)
        masked = tl.load(mask_ptr + clip * M + m, mask=m < M, other=-1).to(tl.int32)
        hits += tl.sum((number[:, None] == masked[None, :]).to(tl.int32), axis=1)
    is_visible = (hits == 0) & (number < P)
    slot = tl.cumsum(is_visible.to(tl.int32)) - 1
    is_visible &= slot < P - M  # a mask that repeats itself leaves more than there is room for
    tl.store(slot_ptr + clip * P + number, tl.where(is_visible, slot, -1), mask=number < P)
    tl.store(visible_ptr + clip * (P - M) + slot, number, mask=is_visible)


@triton.jit
def _embed_kernel(
    patches_ptr,  # [B, P, K]
    weight_ptr,  # [D, K]
    bias_ptr,  # [D]
    position_ptr,  # [2 + P, D]
    prefix_ptr,  # [2, D]
    mask_token_ptr,  # [D]
    mask_ptr,  # [B, M] int64, or None
    visible_ptr,  # [B, P - M] int32, or None: all are visible
    out_ptr,  # [B, 2 + P, D]; VISIBLE_ONLY: [B, 2 + P - M, D]
    patches_stride_b,
    patches_stride_p,
    VISIBLE_ONLY: tl.constexpr,
    P: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    COMPUTE: tl.constexpr,  # dtype of the product's factors
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program for BLOCK_ROWS tokens of one clip, all of their width: first tiles of visible patches, then of masked
    ones; the first program of a clip writes its prefix tokens too.
    """
    clip = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    V: tl.constexpr = P - M
    VISIBLE_TILES: tl.constexpr = (V + BLOCK_ROWS - 1) // BLOCK_ROWS
    out_ptr += clip * (2 + (V if VISIBLE_ONLY else P)) * D
    if tile < VISIBLE_TILES:
        row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        is_row = row < V
        number = row
        if visible_ptr is not None:
            number = tl.load(visible_ptr + clip * V + row, mask=is_row, other=0)
        patch_ptrs = patches_ptr + clip * patches_stride_b + number.to(tl.int64) * patches_stride_p  # [BLOCK_ROWS]
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            tokens = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
            for k0 in range(0, K, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                # [BLOCK_ROWS, BLOCK_K]
                patches = tl.load(patch_ptrs[:, None] + k[None, :], mask=is_row[:, None] & (k < K)[None, :], other=0.0)
                weight = tl.load(
                    weight_ptr + d[None, :] * K + k[:, None], mask=(d < D)[None, :] & (k < K)[:, None], other=0.0
                )
                tokens = tl.dot(patches.to(COMPUTE), weight.to(COMPUTE), tokens, input_precision=PRECISION)
            tokens += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            place = (2 + number)[:, None] * D + d[None, :]
            keep = is_row[:, None] & (d < D)[None, :]
            tokens += tl.load(position_ptr + place, mask=keep, other=0.0).to(tl.float32)
            if VISIBLE_ONLY:
                place = (2 + row)[:, None] * D + d[None, :]
            tl.store(out_ptr + place, tokens.to(out_ptr.dtype.element_ty), mask=keep)
    elif M > 0 and not VISIBLE_ONLY:
        row = (tile - VISIBLE_TILES) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        number = tl.load(mask_ptr + clip * M + row, mask=row < M, other=-1).to(tl.int32)
        is_row = (number >= 0) & (number < P)  # nothing is written beyond the clip, whatever the mask says
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            place = (2 + number)[:, None] * D + d[None, :]
            keep = is_row[:, None] & (d < D)[None, :]
            tokens = tl.load(position_ptr + place, mask=keep, other=0.0).to(tl.float32)
            tokens += tl.load(mask_token_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            tl.store(out_ptr + place, tokens.to(out_ptr.dtype.element_ty), mask=keep)
    if tile == 0:
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            place = tl.arange(0, 2)[:, None] * D + d[None, :]
            keep = (d < D)[None, :]
            tokens = tl.load(position_ptr + place, mask=keep, other=0.0).to(tl.float32)
            tokens += tl.load(prefix_ptr + place, mask=keep, other=0.0).to(tl.float32)
            tl.store(out_ptr + place, tokens.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _token_sums_kernel(
    d_out_ptr,  # [B, 2 + P, D]; VISIBLE_ONLY: [B, 2 + V, D]
    slot_ptr,  # [B, P] int32, or None: all are visible
    position_ptr,  # [SPLITS, 2 + P, D] float32: sums over a split's clips
    visible_ptr,  # [SPLITS * token tiles, D] float32: sums over visible patches
    masked_ptr,  # likewise over masked ones
    B,
    VISIBLE_ONLY: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,  # visible patches of a clip
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
        clip_d_out_ptr = d_out_ptr + tl.cast(clip, tl.int64) * (2 + (V if VISIBLE_ONLY else P)) * D
        if VISIBLE_ONLY:  # a masked patch has no token
            slot = tl.load(slot_ptr + tl.cast(clip, tl.int64) * P + token - 2, mask=is_patch, other=-1)
            row = tl.where(is_patch, 2 + slot, token)
            has_token = keep & (~is_patch | (slot >= 0))[:, None]
            every += tl.load(clip_d_out_ptr + row[:, None] * D + d[None, :], mask=has_token, other=0.0).to(tl.float32)
        else:
            d_out = tl.load(clip_d_out_ptr + place, mask=keep, other=0.0).to(tl.float32)
            every += d_out
            if slot_ptr is not None:
                slot = tl.load(slot_ptr + tl.cast(clip, tl.int64) * P + token - 2, mask=is_patch, other=0)
                masked += tl.where((slot < 0)[:, None], d_out, 0.0)
    tl.store(position_ptr + tl.cast(split, tl.int64) * (2 + P) * D + place, every, mask=keep)
    part = (tl.cast(split, tl.int64) * tl.num_programs(0) + tile) * D + d
    visible = tl.where(is_patch[:, None], every - masked, 0.0)
    tl.store(visible_ptr + part, tl.sum(visible, axis=0), mask=d < D)
    tl.store(masked_ptr + part, tl.sum(masked, axis=0), mask=d < D)


@triton.jit
def _weight_sums_kernel(
    d_out_ptr,  # [B, 2 + P, D]; VISIBLE_ONLY: [B, 2 + V, D]
    patches_ptr,  # [B, P, K]
    visible_ptr,  # [B, P - M] int32, or None
    out_ptr,  # [SPLITS, D, K] float32: sums over a split's clips
    B,
    patches_stride_b,
    patches_stride_p,
    VISIBLE_ONLY: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split = tl.program_id(2)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    for clip in range(split, B, SPLITS):
        clip_d_out_ptr = d_out_ptr + tl.cast(clip, tl.int64) * (2 + (V if VISIBLE_ONLY else P)) * D
        clip_patches_ptr = patches_ptr + tl.cast(clip, tl.int64) * patches_stride_b
        for r0 in range(0, V, BLOCK_ROWS):
            row = r0 + tl.arange(0, BLOCK_ROWS)
            number = row
            if visible_ptr is not None:
                number = tl.load(visible_ptr + tl.cast(clip, tl.int64) * V + row, mask=row < V, other=0)
            d_out_ptrs = clip_d_out_ptr + (2 + (row if VISIBLE_ONLY else number))[:, None] * D + d[None, :]
            # [BLOCK_ROWS, BLOCK_D]
            d_out = tl.load(d_out_ptrs, mask=(row < V)[:, None] & (d < D)[None, :], other=0.0).to(COMPUTE)
            patch_ptrs = clip_patches_ptr + number.to(tl.int64)[:, None] * patches_stride_p + k[None, :]
            # [BLOCK_ROWS, BLOCK_K]
            patches = tl.load(patch_ptrs, mask=(row < V)[:, None] & (k < K)[None, :], other=0.0).to(COMPUTE)
            total = tl.dot(tl.trans(d_out), patches, total, input_precision=PRECISION)
    keep = (d < D)[:, None] & (k < K)[None, :]
    tl.store(out_ptr + tl.cast(split, tl.int64) * D * K + d[:, None] * K + k[None, :], total, mask=keep)


@triton.jit
def _sum_parts_kernel(parts_ptr, out_ptr, num_parts, size, BLOCK_PARTS: tl.constexpr, BLOCK_VALUES: tl.constexpr):
    """parts [num_parts, size] float32 -> their sums [size] in the output's dtype, always in the same order."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)
    total = tl.zeros((BLOCK_PARTS, BLOCK_VALUES), tl.float32)
    for part0 in range(0, num_parts, BLOCK_PARTS):
        part = part0 + tl.arange(0, BLOCK_PARTS)
        keep = (part < num_parts)[:, None] & (place < size)[None, :]
        total += tl.load(parts_ptr + part.to(tl.int64)[:, None] * size + place[None, :], mask=keep, other=0.0)
    tl.store(out_ptr + place, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=place < size)


def sum_parts(parts: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[N, ...] -> [...] with the shape and dtype of `like`."""
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    block = 128
    grid = (triton.cdiv(out.numel(), block),)
    _sum_parts_kernel[grid](
        parts, out, parts.numel() // out.numel(), out.numel(), BLOCK_PARTS=16, BLOCK_VALUES=block, num_warps=4
    )
    return out


def _precision(dtype: torch.dtype) -> str:
    # of float32 factors; the others are multiplied exactly in any case
    return "ieee" if dtype == torch.float32 else "tf32"


@torch.library.custom_op("ssast::embed_patches", mutates_args=())
def _embed_op(
    patches: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    position: torch.Tensor,
    prefix: torch.Tensor,
    mask_token: torch.Tensor | None,
    mask: torch.Tensor | None,
    visible_only: bool,
    compute: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, the visible patches' numbers, and each patch's place among them (both empty without a mask)."""
    tokens, visible, slot = _new_outputs(patches, weight, position, mask, visible_only, compute)
    batch, num_patches, values = patches.shape
    num_masked = 0 if mask is None else mask.shape[1]
    patches = last_dim_contiguous(patches)
    if batch == 0:
        return tokens, visible, slot
    with torch.cuda.device_of(patches):
        if mask is not None:
            mask = mask.contiguous()
            num_patches_2 = triton.next_power_of_2(num_patches)
            _partition_kernel[(batch,)](
                mask,
                visible,
                slot,
                P=num_patches,
                M=num_masked,
                P_2=num_patches_2,
                num_warps=max(4, num_patches_2 // 256),
            )
        blocks = _blocks(compute)["tokens"]
        tiles = triton.cdiv(num_patches - num_masked, blocks["BLOCK_ROWS"])
        if not visible_only:
            tiles += triton.cdiv(num_masked, blocks["BLOCK_ROWS"])
        _embed_kernel[(tiles, batch)](
            patches,
            weight.contiguous(),
            bias.contiguous(),
            position.contiguous(),
            prefix.contiguous(),
            None if mask is None or mask_token is None else mask_token.contiguous(),
            mask,
            None if mask is None else visible,
            tokens,
            patches.stride(0),
            patches.stride(1),
            VISIBLE_ONLY=visible_only,
            P=num_patches,
            M=num_masked,
            K=values,
            D=weight.shape[0],
            COMPUTE=TRITON_DTYPE[compute],
            PRECISION=_precision(compute),
            **blocks,
            num_warps=8,
            num_stages=3,
        )
    return tokens, visible, slot


@_embed_op.register_fake
def _(patches, weight, bias, position, prefix, mask_token, mask, visible_only, compute):
    return _new_outputs(patches, weight, position, mask, visible_only, compute)


def _new_outputs(
    patches: torch.Tensor,
    weight: torch.Tensor,
    position: torch.Tensor,
    mask: torch.Tensor | None,
    visible_only: bool,
    compute: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, num_patches = patches.shape[:2]
    num_visible = 0 if mask is None else num_patches - mask.shape[1]
    num_tokens = NUM_PREFIX + (num_visible if visible_only else num_patches)
    dtype = torch.promote_types(compute, position.dtype)
    tokens = patches.new_empty(batch, num_tokens, weight.shape[0], dtype=dtype)
    visible = patches.new_empty(batch, num_visible, dtype=torch.int32)
    return tokens, visible, patches.new_empty(batch, 0 if mask is None else num_patches, dtype=torch.int32)


@torch.library.custom_op("ssast::embed_patches_backward", mutates_args=())
def _embed_backward_op(
    d_out: torch.Tensor,
    patches: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    position: torch.Tensor,
    prefix: torch.Tensor,
    mask_token: torch.Tensor | None,
    visible: torch.Tensor,
    slot: torch.Tensor,
    visible_only: bool,
    compute: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of weight, bias, position, prefix and mask token (empty where there is none)."""
    has_mask = slot.shape[1] > 0
    batch, num_patches, values = patches.shape
    width, tokens = weight.shape[0], position.shape[0]
    if batch == 0:
        like = (weight, bias, position, prefix, bias.new_empty(0) if mask_token is None else mask_token)
        d_weight, d_bias, d_position, d_prefix, d_mask_token = (
            torch.zeros_like(each, memory_format=torch.contiguous_format) for each in like
        )
        return d_weight, d_bias, d_position, d_prefix, d_mask_token
    d_out = d_out.contiguous()
    patches = last_dim_contiguous(patches)
    with torch.cuda.device_of(d_out):
        column_tiles, row_tiles = triton.cdiv(width, _SUM_COLUMNS), triton.cdiv(tokens, _SUM_ROWS)

        splits = min(batch, max(1, 4 * _PROGRAMS // (row_tiles * column_tiles)))
        position_parts = torch.empty(splits, tokens, width, dtype=torch.float32, device=d_out.device)
        visible_parts = torch.empty(splits * row_tiles, width, dtype=torch.float32, device=d_out.device)
        masked_parts = torch.empty_like(visible_parts)
        _token_sums_kernel[(row_tiles, column_tiles, splits)](
            d_out,
            slot if has_mask else None,
            position_parts,
            visible_parts,
            masked_parts,
            batch,
            VISIBLE_ONLY=visible_only,
            P=num_patches,
            V=visible.shape[1] if has_mask else num_patches,
            D=width,
            SPLITS=splits,
            BLOCK_ROWS=_SUM_ROWS,
            BLOCK_D=_SUM_COLUMNS,
            num_warps=4,
        )

        blocks = _blocks(compute)["weight"]
        grid = (triton.cdiv(width, blocks["BLOCK_D"]), triton.cdiv(values, blocks["BLOCK_K"]))
        splits = min(batch, max(1, _PROGRAMS // (grid[0] * grid[1])))
        weight_parts = torch.empty(splits, width, values, dtype=torch.float32, device=d_out.device)
        _weight_sums_kernel[(*grid, splits)](
            d_out,
            patches,
            visible if has_mask else None,
            weight_parts,
            batch,
            patches.stride(0),
            patches.stride(1),
            VISIBLE_ONLY=visible_only,
            P=num_patches,
            V=visible.shape[1] if has_mask else num_patches,
            K=values,
            D=width,
            SPLITS=splits,
            COMPUTE=TRITON_DTYPE[compute],
            PRECISION=_precision(compute),
            **blocks,
            num_warps=8,
            num_stages=2,
        )
        return (
            sum_parts(weight_parts, weight),
            sum_parts(visible_parts, bias),
            sum_parts(position_parts, position),
            sum_parts(position_parts[:, :NUM_PREFIX].contiguous(), prefix),
            bias.new_empty(0) if mask_token is None else sum_parts(masked_parts, mask_token),
        )


@_embed_backward_op.register_fake
def _(d_out, patches, weight, bias, position, prefix, mask_token, visible, slot, visible_only, compute):
    like = (weight, bias, position, prefix, bias.new_empty(0) if mask_token is None else mask_token)
    return tuple(torch.empty_like(each, memory_format=torch.contiguous_format) for each in like)


def _setup_context(ctx, inputs, output) -> None:
    patches, weight, bias, position, prefix, mask_token, _, ctx.visible_only, ctx.compute = inputs
    _, visible, slot = output
    ctx.save_for_backward(patches, weight, bias, position, prefix, mask_token, visible, slot)
    ctx.mark_non_differentiable(visible, slot)


def _backward(ctx, d_out, _d_visible, _d_slot):
    patches, weight, bias, position, prefix, mask_token, visible, slot = ctx.saved_tensors
    *grads, d_mask_token = _embed_backward_op(
        d_out, patches, weight, bias, position, prefix, mask_token, visible, slot, ctx.visible_only, ctx.compute
    )
    d_patches = None
    if ctx.needs_input_grad[0]:  # never in training: patches are data
        d_patches = torch.nn.functional.linear(d_out[:, NUM_PREFIX:].to(weight.dtype), weight.T)
        if ctx.visible_only:
            d_patches = d_patches.gather(1, slot.clamp(min=0).long()[..., None].expand(patches.shape))
        if slot.shape[1] > 0:
            d_patches = d_patches.masked_fill(slot[..., None] < 0, 0.0)
        d_patches = d_patches.to(patches.dtype)
    return d_patches, *grads, None if mask_token is None else d_mask_token, None, None, None


_embed_op.register_autograd(_backward, setup_context=_setup_context)


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
    """Tokens [cls, dist, patch 0, patch 1, ...] of SSAST, section "Patch embedding": E_i + P_i, with E_mask in place of
    masked E_i.

    The projection's factors are taken in the dtype of `weight`, under autocast in the autocast dtype. The kernel sums
    everything in float32 and rounds once, to the wider of that dtype and the one of `position`.

    Args:
        patches: flattened patches, value index = frequency offset * patch width in frames + frame offset.
        weight, bias: the projection.
        position: trained position embedding, its first two rows belong to the prefix tokens.
        prefix: the cls and the dist token.
        mask_token: learned embedding that stands in for masked patches.
        mask: int64 patch numbers without the offset of the prefix tokens, in any order. Numbers outside [0, P) and
            repeats are not looked for, and what comes of them is undefined. None masks nothing.
        backend: None, "torch" or "triton".

    Raises:
        ValueError: a mask without a mask token, or shapes that do not belong together.
    """
    if mask is not None and mask_token is None:
        raise ValueError("mask was given without mask_token")
    _check_shapes(patches, weight, bias, position, prefix, mask_token, mask)
    if resolve_backend(backend, patches, weight, position) == "torch":
        return _reference(patches, weight, bias, position, prefix, mask_token, mask)
    mask_token = None if mask is None else mask_token
    return _embed_op(patches, weight, bias, position, prefix, mask_token, mask, False, _compute_dtype(weight))[0]


def embed_visible_patches(
    patches: torch.Tensor,  # [B, P, K]
    weight: torch.Tensor,  # [D, K]
    bias: torch.Tensor,  # [D]
    position: torch.Tensor,  # [2 + P, D]
    prefix: torch.Tensor,  # [2, D]
    mask: torch.Tensor,  # [B, M]
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`embed_patches` without the tokens of masked patches: what an encoder of visible patches alone reads (MAE-AST,
    Baade, Peng and Harwath 2022).

    Arguments, dtypes and errors are those of `embed_patches`, backend (None, "torch" or "triton") included.

    Returns:
        Tokens [cls, dist, first visible patch, second ...] [B, 2 + V, D], V = P - M, in the order of patch numbers
        whatever the order of `mask`; and slot [B, P] int32, each patch's place among its clip's visible ones, -1 where
        it is masked, by which `ssast.kernels.insert_mask_tokens` puts them back.
    """
    _check_shapes(patches, weight, bias, position, prefix, None, mask)
    if resolve_backend(backend, patches, weight, position) == "torch":
        return _visible_reference(patches, weight, bias, position, prefix, mask)
    tokens, _, slot = _embed_op(patches, weight, bias, position, prefix, None, mask, True, _compute_dtype(weight))
    return tokens, slot


def _compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """Of the projection's factors."""
    device_type = weight.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype


def _check_shapes(
    patches: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    position: torch.Tensor,
    prefix: torch.Tensor,
    mask_token: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> None:
    """Raises: ValueError: shapes that do not belong together."""
    width, num_tokens = weight.shape[0], NUM_PREFIX + patches.shape[1]
    wanted = {
        "weight": (width, patches.shape[2]),
        "bias": (width,),
        "position": (num_tokens, width),
        "prefix": (NUM_PREFIX, width),
    }
    given = {"weight": weight, "bias": bias, "position": position, "prefix": prefix}
    if mask_token is not None:
        wanted["mask_token"], given["mask_token"] = (width,), mask_token
    for name, shape in wanted.items():
        if given[name].shape != shape:
            raise ValueError(
                f"{name} is {tuple(given[name].shape)} and must be {shape}: {patches.shape[1]} patches of "
                f"{patches.shape[2]} values, "
                f"{NUM_PREFIX} prefix tokens, width {width}"
            )
    if mask is not None and (mask.shape[0] != patches.shape[0] or not 0 < mask.shape[1] < patches.shape[1]):
        raise ValueError(f"mask is {tuple(mask.shape)} for {patches.shape[0]} clips of {patches.shape[1]} patches")
