"""Masked spectrogram patch modelling: InfoNCE among the masked patches of one clip, and their reconstruction.

S[j, i] = x_j . c_i of one clip, with targets x and predictions c, is an M x M matrix that the kernels make block by
block and never store. Per clip of M = 400 patches of K = 256 values it takes 2 M^2 K = 82 MFLOP a time:

    forward   softmax over predictions: one launch over rows of targets (normaliser and loss), then one over rows of
              predictions (accuracy needs every normaliser first). Softmax over targets: one launch over rows of
              predictions gives all. At last one program sums up.
    backward  one launch over rows of predictions: S again, then the product of its softmax with the targets.

The squared error of the second head rides along in the first launch, its gradient in the backward one.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .backend import TRITON_DTYPE, last_dim_contiguous, resolve_backend

_MAX_VALUES = 512  # of a patch: with more, 32 rows and 32 columns in fp32 no longer fit into shared memory together


class MSPMLoss(NamedTuple):
    """Scalars. `loss`, `nce` and `mse` have gradients; `accuracy` is the fraction of masked patches found, by the
    official rule.

    A half of the objective that was not asked for is NaN.
    """

    loss: torch.Tensor
    nce: torch.Tensor
    mse: torch.Tensor
    accuracy: torch.Tensor


def _reference(
    class_pred: torch.Tensor | None,
    recon_pred: torch.Tensor | None,
    target: torch.Tensor,
    mask: torch.Tensor | None,
    softmax_over: str,
    recon_weight: float,
) -> MSPMLoss:
    precision = torch.promote_types(target.dtype, torch.float32)
    target = _masked_rows(target.detach(), mask).to(precision)  # [B, M, K]
    nce = mse = accuracy = target.new_full((), float("nan"))
    if class_pred is not None:
        log_probability = _log_probability(class_pred.to(precision), target, softmax_over)
        nce = -log_probability.diagonal(dim1=1, dim2=2).mean()
        accuracy = _picks_own_target(log_probability.detach()).to(nce.dtype).mean()
    if recon_pred is not None:
        mse = (recon_pred.to(precision) - target).square().mean()
    if class_pred is None:
        return MSPMLoss(mse, nce, mse, accuracy)
    if recon_pred is None:
        return MSPMLoss(nce, nce, mse, accuracy)
    return MSPMLoss(nce + recon_weight * mse, nce, mse, accuracy)


def _masked_rows(target: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return target if mask is None else target.gather(1, mask[..., None].expand(-1, -1, target.shape[2]))


def _log_probability(class_pred: torch.Tensor, target: torch.Tensor, softmax_over: str) -> torch.Tensor:
    """[B, M targets, M predictions] logarithm of the softmax in the direction chosen."""
    with torch.autocast(class_pred.device.type, enabled=False):
        scores = target @ class_pred.transpose(1, 2)
    return scores.log_softmax(dim=2 if softmax_over == "predictions" else 1)


def _picks_own_target(log_probability: torch.Tensor) -> torch.Tensor:
    best_target = log_probability.argmax(dim=1)  # [B, M]: for each prediction, the target of the largest probability
    return best_target == torch.arange(best_target.shape[1], device=best_target.device)


@triton.jit
def _scores_kernel(
    class_ptr,  # [B, M, K], or None: L_g alone
    recon_ptr,  # [B, M, K], or None: leave the squares out
    target_ptr,  # [B, M, K], or [B, P, K] with a mask
    mask_ptr,  # [B, M] int64, or None
    highest_ptr,  # [B, M] fp32: highest score of each softmax
    log_sum_ptr,  # [B, M] fp32: log(sum(exp(score - highest)))
    partial_ptr,  # [3, programs] fp32: sum of L_d's terms, number found, sum of squares
    class_stride_b,
    class_stride_m,
    recon_stride_b,
    recon_stride_m,
    target_stride_b,
    target_stride_p,
    M: tl.constexpr,
    K: tl.constexpr,
    K_2: tl.constexpr,  # the next power of two
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,  # type of the factors
    # rows are targets, columns predictions; else the other way round, and predictions are looked for
    TARGET_ROWS: tl.constexpr,
    # `highest` and `log_sum` are those of the columns and known; else those of the rows, to be found
    IS_NORMALISED: tl.constexpr,
):
    """One program for BLOCK_ROWS rows of S (or of its transpose) against all columns.

    The squares come last: before the loop their pointers would hold registers that the loop needs.
    """
    TILES: tl.constexpr = (M + BLOCK_ROWS - 1) // BLOCK_ROWS
    program = tl.program_id(0)
    clip = (program // TILES).to(tl.int64)  # blocks of one clip side by side: they share its columns in the cache
    row = (program % TILES) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < M
    target_ptr += clip * target_stride_b
    if mask_ptr is not None:
        mask_ptr += clip * M

    if class_ptr is not None:
        class_ptr += clip * class_stride_b
        highest_ptr += clip * M
        log_sum_ptr += clip * M
        if TARGET_ROWS:
            own = _load(_row_ptrs(target_ptr, mask_ptr, row, target_stride_p, M), is_row, K, K_2).to(COMPUTE)
        else:
            own = _load(_row_ptrs(class_ptr, None, row, class_stride_m, M), is_row, K, K_2).to(COMPUTE)
        highest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_ROWS,), tl.float32)
        # Reduced along the columns after the loop: inside, every block would cost shuffles between threads.
        true = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), float("-inf"), tl.float32)  # the diagonal of S
        before = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), float("-inf"), tl.float32)  # the best to the left of it
        after = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), float("-inf"), tl.float32)  # the best to the right of it
        for start in range(0, M, BLOCK_COLUMNS):
            column = start + tl.arange(0, BLOCK_COLUMNS)
            is_column = column < M
            if TARGET_ROWS:
                others = _load(_row_ptrs(class_ptr, None, column, class_stride_m, M), is_column, K, K_2).to(COMPUTE)
            else:
                ptrs = _row_ptrs(target_ptr, mask_ptr, column, target_stride_p, M)
                others = _load(ptrs, is_column, K, K_2).to(COMPUTE)
            score = tl.dot(own, tl.trans(others), input_precision="ieee")  # [BLOCK_ROWS, BLOCK_COLUMNS]
            if IS_NORMALISED:
                score -= tl.load(highest_ptr + column, mask=is_column, other=0.0)[None, :]
                log_sum = tl.load(log_sum_ptr + column, mask=is_column, other=0.0)
                score -= log_sum[None, :]
                # With an infinity or a NaN a softmax is all NaN, which PyTorch's argmax takes for the largest.
                outside = tl.where(is_column, float("inf"), float("-inf"))
                score = tl.where((is_column & (log_sum == log_sum))[None, :], score, outside[None, :])
            else:
                score = tl.where(is_column[None, :], score, float("-inf"))
            if not IS_NORMALISED:
                raised = tl.maximum(highest, tl.max(score, axis=1))
                total = total * tl.exp(highest - raised) + tl.sum(tl.exp(score - raised[:, None]), axis=1)
                highest = raised
            true = tl.where(column[None, :] == row[:, None], score, true)
            if not TARGET_ROWS:
                before = tl.where(column[None, :] < row[:, None], tl.maximum(before, score), before)
                after = tl.where(column[None, :] > row[:, None], tl.maximum(after, score), after)
        true = tl.max(true, axis=1)
        if not IS_NORMALISED:
            log_sum = tl.log(total)
            tl.store(highest_ptr + row, highest, mask=is_row)
            tl.store(log_sum_ptr + row, log_sum, mask=is_row)
            tl.store(partial_ptr + program, tl.sum(tl.where(is_row, (highest - true) + log_sum, 0.0)))
        if not TARGET_ROWS:
            # The first of equals is the best: the true one must beat those before it and match those after it. Beyond M
            # it is -inf and beats none.
            is_found = (tl.max(before, axis=1) < true) & (tl.max(after, axis=1) <= true)
            if not IS_NORMALISED:  # a softmax with an infinity or a NaN is all NaN, and the first of equals the best
                is_found = ((log_sum == log_sum) & is_found) | ((log_sum != log_sum) & (row == 0))
            tl.store(partial_ptr + tl.num_programs(0) + program, tl.sum(is_found.to(tl.float32)))

    if recon_ptr is not None:
        recon = _load(_row_ptrs(recon_ptr + clip * recon_stride_b, None, row, recon_stride_m, M), is_row, K, K_2)
        target = _load(_row_ptrs(target_ptr, mask_ptr, row, target_stride_p, M), is_row, K, K_2)
        difference = recon.to(tl.float32) - target.to(tl.float32)  # [BLOCK_ROWS, K_2]
        tl.store(partial_ptr + 2 * tl.num_programs(0) + program, tl.sum(difference * difference))


@triton.jit
def _row_ptrs(ptr, mask_ptr, row, stride, M: tl.constexpr):
    """[R] pointers to the masked patches `row` [R] of a clip: rows of a tensor, picked through the mask where there is
    one.
    """
    if mask_ptr is not None:
        row = tl.load(mask_ptr + row, mask=row < M, other=0)
    return ptr + row.to(tl.int64) * stride


@triton.jit
def _load(ptrs, is_row, K: tl.constexpr, K_2: tl.constexpr):
    """[R, K_2], zero outside."""
    value = tl.arange(0, K_2)
    return tl.load(ptrs[:, None] + value[None, :], mask=is_row[:, None] & (value < K)[None, :], other=0.0)


@triton.jit
def _store(ptr, row, block, M: tl.constexpr, K: tl.constexpr, K_2: tl.constexpr):
    """block [R, K_2] to the rows `row` [R] of [M, K], rounded to its type."""
    value = tl.arange(0, K_2)
    inside = (row < M)[:, None] & (value < K)[None, :]
    tl.store(ptr + row[:, None] * K + value[None, :], block.to(ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["programs", "count"])
def _finish_kernel(
    loss_ptr,  # scalars, fp32
    nce_ptr,
    mse_ptr,
    accuracy_ptr,
    partial_ptr,  # [3, programs] fp32
    programs,
    count,  # B * M
    recon_weight,
    K: tl.constexpr,
    HAS_CLASS: tl.constexpr,
    HAS_RECON: tl.constexpr,
):
    """One program, so that the order of the sums is fixed; in float64, so that it hardly matters and counts are
    exact.
    """
    nan = float("nan")
    if HAS_CLASS:
        nce = _sum(partial_ptr, programs) / count.to(tl.float64)
        tl.store(nce_ptr, nce.to(tl.float32))
        tl.store(accuracy_ptr, (_sum(partial_ptr + programs, programs) / count.to(tl.float64)).to(tl.float32))
    else:
        tl.store(nce_ptr, nan)
        tl.store(accuracy_ptr, nan)
    if HAS_RECON:
        mse = _sum(partial_ptr + 2 * programs, programs) / (count.to(tl.float64) * K)
        tl.store(mse_ptr, mse.to(tl.float32))
    else:
        tl.store(mse_ptr, nan)
    if HAS_CLASS and HAS_RECON:
        tl.store(loss_ptr, (nce + recon_weight * mse).to(tl.float32))
    elif HAS_CLASS:
        tl.store(loss_ptr, nce.to(tl.float32))
    else:
        tl.store(loss_ptr, mse.to(tl.float32))


@triton.jit
def _sum(ptr, count):
    total = tl.zeros((1024,), tl.float64)
    for start in range(0, count, 1024):
        index = start + tl.arange(0, 1024)
        total += tl.load(ptr + index, mask=index < count, other=0.0).to(tl.float64)
    return tl.sum(total)


@triton.jit
def _gradients_kernel(
    class_ptr,  # [B, M, K], or None: no gradient wanted
    recon_ptr,  # [B, M, K], or None: no gradient wanted
    target_ptr,  # [B, M, K], or [B, P, K] with a mask
    mask_ptr,  # [B, M] int64, or None
    highest_ptr,  # [B, M] fp32, as the forward pass left them
    log_sum_ptr,  # [B, M] fp32
    d_loss_ptr,  # scalars, fp32; None: no gradient came
    d_nce_ptr,
    d_mse_ptr,
    d_class_ptr,  # [B, M, K]
    d_recon_ptr,  # [B, M, K]
    class_stride_b,
    class_stride_m,
    recon_stride_b,
    recon_stride_m,
    target_stride_b,
    target_stride_p,
    recon_weight,
    nce_scale,  # 1 / (B M)
    mse_scale,  # 2 / (B M K)
    M: tl.constexpr,
    K: tl.constexpr,
    K_2: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
    # `highest` and `log_sum` belong to the targets, which are the columns; else to the rows
    OVER_PREDICTIONS: tl.constexpr,
):
    """One program for BLOCK_ROWS predictions of a clip: d c_i = scale * sum over j of (softmax[j, i] - [i = j]) x_j."""
    TILES: tl.constexpr = (M + BLOCK_ROWS - 1) // BLOCK_ROWS
    clip = (tl.program_id(0) // TILES).to(tl.int64)
    row = (tl.program_id(0) % TILES) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < M
    target_ptr += clip * target_stride_b
    if mask_ptr is not None:
        mask_ptr += clip * M

    if class_ptr is not None:
        highest_ptr += clip * M
        log_sum_ptr += clip * M
        own_ptrs = _row_ptrs(class_ptr + clip * class_stride_b, None, row, class_stride_m, M)
        own = _load(own_ptrs, is_row, K, K_2).to(COMPUTE)
        if not OVER_PREDICTIONS:
            highest = tl.load(highest_ptr + row, mask=is_row, other=0.0)[:, None]
            log_sum = tl.load(log_sum_ptr + row, mask=is_row, other=0.0)[:, None]
        total = tl.zeros((BLOCK_ROWS, K_2), tl.float32)
        for start in range(0, M, BLOCK_COLUMNS):
            column = start + tl.arange(0, BLOCK_COLUMNS)
            is_column = column < M
            others = _load(_row_ptrs(target_ptr, mask_ptr, column, target_stride_p, M), is_column, K, K_2).to(COMPUTE)
            score = tl.dot(own, tl.trans(others), input_precision="ieee")  # [BLOCK_ROWS, BLOCK_COLUMNS]
            if OVER_PREDICTIONS:
                highest = tl.load(highest_ptr + column, mask=is_column, other=0.0)[None, :]
                log_sum = tl.load(log_sum_ptr + column, mask=is_column, other=0.0)[None, :]
            # Columns past M: exp(0 - highest) can be infinite, and infinite times a target of zero is no longer
            # nothing.
            # S is computed anew, its products summed in another order: what was the highest may come out higher.
            below = tl.minimum(score - highest, 0.0, propagate_nan=tl.PropagateNan.ALL)
            probability = tl.exp(tl.where(is_column[None, :], below - log_sum, float("-inf")))
            # Less one before it is rounded to COMPUTE: next to one, bf16 would leave nothing of a small difference.
            residual = tl.where(column[None, :] == row[:, None], probability - 1.0, probability)
            total = tl.dot(residual.to(COMPUTE), others, total, input_precision="ieee")
        scale = _upstream(d_loss_ptr, 1.0, d_nce_ptr) * nce_scale
        _store(d_class_ptr + clip * M * K, row, scale * total, M, K, K_2)

    if recon_ptr is not None:
        recon = _load(_row_ptrs(recon_ptr + clip * recon_stride_b, None, row, recon_stride_m, M), is_row, K, K_2)
        target = _load(_row_ptrs(target_ptr, mask_ptr, row, target_stride_p, M), is_row, K, K_2)
        difference = recon.to(tl.float32) - target.to(tl.float32)
        scale = _upstream(d_loss_ptr, recon_weight, d_mse_ptr) * mse_scale
        _store(d_recon_ptr + clip * M * K, row, scale * difference, M, K, K_2)


@triton.jit
def _upstream(d_loss_ptr, weight, d_part_ptr):
    """Gradient of one part of the loss: what came for the loss, times the weight of the part in it, and what came for
    the part.
    """
    total = 0.0
    if d_loss_ptr is not None:
        total += weight * tl.load(d_loss_ptr)
    if d_part_ptr is not None:
        total += tl.load(d_part_ptr)
    return total


def _blocks(product: torch.dtype, values_2: int, *, is_backward: bool) -> dict[str, int]:
    """The launch. Fixed, so that every rank computes the same bits. At K = 256 in bf16 it spills no registers on
    compute capability 8.0, 9.0 and 10.0 and leaves room for two programs on a multiprocessor of 9.0, so that one
    multiplies while the other reduces.

    Many rows, since every program reads all columns of its clip: 205 KB at M = 400 in bf16. Few columns, which waste
    least of M and keep a stage of the pipeline small (16 KB). The backward pass also holds sums [rows, K] in registers:
    half the rows. Products in fp32 run on the ordinary units, which take all their factors from registers: small
    blocks.
    """
    if product == torch.float32:
        rows, columns, warps, stages = 32, 32, 8, 1
    elif values_2 > 256:
        rows, columns, warps, stages = 64, 32, 8, 3
    elif is_backward:
        rows, columns, warps, stages = 64, 32, 4, 3
    else:
        rows, columns, warps, stages = 128, 32, 8, 3
    return {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "num_warps": warps, "num_stages": stages}


def _predictions_shape(class_pred: torch.Tensor | None, recon_pred: torch.Tensor | None) -> torch.Size:
    """[B, M, K], of predictions one of which may be missing."""
    pred = recon_pred if class_pred is None else class_pred
    assert pred is not None  # `mspm_loss` refuses two missing ones
    return pred.shape


def _strides(*tensors: torch.Tensor | None) -> list[int]:
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[:2])]


def _product_type(class_pred: torch.Tensor | None, target: torch.Tensor) -> torch.dtype:
    return target.dtype if class_pred is None else torch.promote_types(class_pred.dtype, target.dtype)


@torch.library.custom_op("ssast::mspm_loss_forward", mutates_args=())
def _forward_op(
    class_pred: torch.Tensor | None,
    recon_pred: torch.Tensor | None,
    target: torch.Tensor,
    mask: torch.Tensor | None,
    over_predictions: bool,
    recon_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, nce, mse, accuracy, and the normaliser of each softmax [2, B, M]: highest score and logarithm of the sum.

    These two stay apart. PyTorch's log_softmax takes them off one after the other, too; with scores in the hundreds
    their sum would round away what is left of a softmax that is all but one.
    """
    class_pred, recon_pred = last_dim_contiguous(class_pred), last_dim_contiguous(recon_pred)
    target = last_dim_contiguous(target)
    mask = None if mask is None else mask.contiguous()
    batch, masked, values = _predictions_shape(class_pred, recon_pred)
    loss, nce, mse, accuracy = (target.new_empty((), dtype=torch.float32) for _ in range(4))
    normaliser = target.new_empty((0 if class_pred is None else 2, batch, masked), dtype=torch.float32)
    highest, log_sum = (None, None) if class_pred is None else normaliser
    product, values_2 = _product_type(class_pred, target), max(16, triton.next_power_of_2(values))
    blocks = _blocks(product, values_2, is_backward=False)
    programs = batch * triton.cdiv(masked, blocks["BLOCK_ROWS"])
    partial = target.new_empty((3, programs), dtype=torch.float32)

    def launch(squares_of: torch.Tensor | None, *, target_rows: bool, is_normalised: bool) -> None:
        if programs:
            _scores_kernel[(programs,)](
                *(class_pred, squares_of, target, mask, highest, log_sum, partial),
                *_strides(class_pred, squares_of, target),
                M=masked,
                K=values,
                K_2=values_2,
                COMPUTE=TRITON_DTYPE[product],
                TARGET_ROWS=target_rows,
                IS_NORMALISED=is_normalised,
                **blocks,
            )

    with torch.cuda.device_of(target):
        launch(recon_pred, target_rows=over_predictions, is_normalised=False)
        if over_predictions and class_pred is not None:
            launch(None, target_rows=False, is_normalised=True)
        _finish_kernel[(1,)](
            *(loss, nce, mse, accuracy, partial, programs, batch * masked, recon_weight),
            K=values,
            HAS_CLASS=class_pred is not None,
            HAS_RECON=recon_pred is not None,
        )
    return loss, nce, mse, accuracy, normaliser


@_forward_op.register_fake
def _(class_pred, recon_pred, target, mask, over_predictions, recon_weight):
    scalars = [target.new_empty((), dtype=torch.float32) for _ in range(4)]
    batch, masked, _ = _predictions_shape(class_pred, recon_pred)
    return *scalars, target.new_empty((0 if class_pred is None else 2, batch, masked), dtype=torch.float32)


@torch.library.custom_op("ssast::mspm_loss_backward", mutates_args=())
def _backward_op(
    class_pred: torch.Tensor | None,
    recon_pred: torch.Tensor | None,
    target: torch.Tensor,
    mask: torch.Tensor | None,
    normaliser: torch.Tensor,
    d_loss: torch.Tensor | None,
    d_nce: torch.Tensor | None,
    d_mse: torch.Tensor | None,
    over_predictions: bool,
    recon_weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the two predictions; empty for one that is None."""
    class_pred, recon_pred = last_dim_contiguous(class_pred), last_dim_contiguous(recon_pred)
    target = last_dim_contiguous(target)
    mask = None if mask is None else mask.contiguous()
    batch, masked, values = _predictions_shape(class_pred, recon_pred)
    d_class, d_recon = _new_gradient(class_pred, target), _new_gradient(recon_pred, target)
    highest, log_sum = (None, None) if class_pred is None else normaliser
    product, values_2 = _product_type(class_pred, target), max(16, triton.next_power_of_2(values))
    blocks = _blocks(product, values_2, is_backward=True)
    if batch * masked == 0:
        return d_class, d_recon
    with torch.cuda.device_of(target):
        _gradients_kernel[(batch * triton.cdiv(masked, blocks["BLOCK_ROWS"]),)](
            *(class_pred, recon_pred, target, mask, highest, log_sum, d_loss, d_nce, d_mse, d_class, d_recon),
            *_strides(class_pred, recon_pred, target),
            recon_weight,
            1.0 / (batch * masked),
            2.0 / (batch * masked * values),
            M=masked,
            K=values,
            K_2=values_2,
            COMPUTE=TRITON_DTYPE[product],
            OVER_PREDICTIONS=over_predictions,
            **blocks,
        )
    return d_class, d_recon


@_backward_op.register_fake
def _(class_pred, recon_pred, target, mask, normaliser, d_loss, d_nce, d_mse, over_predictions, recon_weight):
    return _new_gradient(class_pred, target), _new_gradient(recon_pred, target)


def _new_gradient(pred: torch.Tensor | None, target: torch.Tensor) -> torch.Tensor:
    return target.new_empty(0) if pred is None else pred.new_empty(pred.shape)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    class_pred, recon_pred, target, mask, over_predictions, recon_weight = inputs
    _, nce, mse, accuracy, normaliser = output
    ctx.save_for_backward(class_pred, recon_pred, target, mask, normaliser)
    ctx.over_predictions = over_predictions
    ctx.recon_weight = 1.0 if class_pred is None else recon_weight  # of the mse within the loss
    ctx.set_materialize_grads(False)
    constants = [*([nce] if class_pred is None else []), *([mse] if recon_pred is None else [])]
    ctx.mark_non_differentiable(accuracy, normaliser, *constants)


def _backward(ctx: Any, d_loss: Any, d_nce: Any, d_mse: Any, d_accuracy: None, d_normaliser: None) -> tuple:
    class_pred, recon_pred, target, mask, normaliser = ctx.saved_tensors
    wants_class = ctx.needs_input_grad[0] and (d_loss is not None or d_nce is not None)
    wants_recon = ctx.needs_input_grad[1] and (d_loss is not None or d_mse is not None)
    d_class = d_recon = None
    if wants_class or wants_recon:
        d_class, d_recon = _backward_op(
            class_pred if wants_class else None,
            recon_pred if wants_recon else None,
            *(target, mask, normaliser, d_loss, d_nce, d_mse, ctx.over_predictions, ctx.recon_weight),
        )
    return d_class if wants_class else None, d_recon if wants_recon else None, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)


def mspm_loss(
    class_pred: torch.Tensor | None,  # [B, M, K]
    recon_pred: torch.Tensor | None,  # [B, M, K]
    target: torch.Tensor,  # [B, M, K], or [B, P, K] with a mask
    *,
    mask: torch.Tensor | None = None,  # [B, M]
    softmax_over: str = "predictions",
    recon_weight: float = 10.0,
    backend: str | None = None,
) -> MSPMLoss:
    """L = L_d + lambda L_g of SSAST, equations 1 to 3.

    With c_i = class_pred, r_i = recon_pred, x_i = target of one clip and S[j, i] = x_j . c_i (no temperature, no
    normalisation, negatives from the same clip only):

        predictions  L_d = -mean_i log( exp S[i, i] / sum_k exp S[i, k] ): for each target, a softmax over the
                     predictions; what the official code computes and the published weights were trained with
        targets      L_d = -mean_i log( exp S[i, i] / sum_j exp S[j, i] ): for each prediction, a softmax over the
                     targets; equation 1

    L_g is the mean square error over all elements. Accuracy is the fraction of predictions i whose largest entry over
    the targets j of the softmax (in the direction chosen) is j = i; ties go to the first.

    The result is float32 (float64 for float64 targets), each gradient of the type of its prediction. The reference
    computes in that precision throughout. The kernels take bf16, fp16 and fp32 in any mixture and sum in fp32: S from
    products in the wider type of class_pred and target (fp32 does without the matrix units), its softmax rounded to
    that type for the gradient. They are differentiable once.

    Args:
        class_pred: None leaves L_d out (generative only: loss = L_g).
        recon_pred: None leaves L_g out (discriminative only: loss = L_d).
        target: raw normalised patches; never receives a gradient.
        mask: int64 patch numbers in [0, P): x_i of clip b is target[b, mask[b, i]], and `target` holds all patches of
            the clips.
        softmax_over: "predictions" or "targets".
        recon_weight: lambda.
        backend: None, "torch" or "triton".

    Raises:
        ValueError: neither prediction, shapes that differ, an unknown `softmax_over`, or what the kernels do not take:
            K above 512, other types.
    """
    _check(class_pred, recon_pred, target, mask, softmax_over)
    if class_pred is None and recon_pred is None:
        raise ValueError("class_pred and recon_pred are both None: nothing to learn")
    if resolve_backend(backend, class_pred, recon_pred, target, mask) == "torch":
        return _reference(class_pred, recon_pred, target, mask, softmax_over, recon_weight)
    if target.shape[2] > _MAX_VALUES or any(
        x is not None and x.dtype not in TRITON_DTYPE for x in (class_pred, recon_pred, target)
    ):
        raise ValueError(
            f"the kernels take up to {_MAX_VALUES} values a patch of bf16, fp16 or fp32; for others use backend='torch'"
        )
    return MSPMLoss(
        *_forward_op(class_pred, recon_pred, target, mask, softmax_over == "predictions", float(recon_weight))[:4]
    )


def found_patches(
    class_pred: torch.Tensor,  # [B, M, K]
    target: torch.Tensor,  # [B, M, K], or [B, P, K] with a mask
    softmax_over: str = "predictions",
    *,
    mask: torch.Tensor | None = None,  # [B, M]
) -> torch.Tensor:  # [B, M]
    """Which masked patches were found, as bool, by the rule of `mspm_loss`'s accuracy; arguments and errors as there.

    PyTorch on every device: pictures and reports ask for it, not training.
    """
    _check(class_pred, None, target, mask, softmax_over)
    precision = torch.promote_types(target.dtype, torch.float32)
    rows = _masked_rows(target, mask).to(precision)
    return _picks_own_target(_log_probability(class_pred.to(precision), rows, softmax_over))


def _check(
    class_pred: torch.Tensor | None,
    recon_pred: torch.Tensor | None,
    target: torch.Tensor,
    mask: torch.Tensor | None,
    softmax_over: str,
) -> None:
    if softmax_over not in ("predictions", "targets"):
        raise ValueError(f"softmax_over must be 'predictions' or 'targets', not {softmax_over!r}")
    if target.ndim != 3:
        raise ValueError(f"target must be [B, M, K], or [B, P, K] with a mask, not {tuple(target.shape)}")
    if mask is not None and (mask.dtype != torch.int64 or mask.ndim != 2 or mask.shape[0] != target.shape[0]):
        raise ValueError(f"mask must be int64 [B, M] for {target.shape[0]} clips, not {mask.dtype} {tuple(mask.shape)}")
    shape = tuple(target.shape) if mask is None else (*mask.shape, target.shape[2])
    for name, pred in (("class_pred", class_pred), ("recon_pred", recon_pred)):
        if pred is not None and tuple(pred.shape) != shape:
            raise ValueError(
                f"{name} is {tuple(pred.shape)} and the masked patches of target are {shape}: they must be of one shape"
            )
