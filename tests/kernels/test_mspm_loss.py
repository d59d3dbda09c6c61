import functools
import math

import pytest
import torch
from law import assert_lawful, loss_order_errors

from ssast.kernels import found_patches, mspm_loss
from ssast.kernels.mspm_loss import MSPMLoss, _backward_op, _forward_op

reference = functools.partial(mspm_loss, backend="torch")
fused = functools.partial(mspm_loss, backend="triton")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def predictions(
    clips: int = 2, masked: int = 17, values: int = 256, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.3 * torch.randn(clips, masked, values, generator=generator, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("softmax_over", ["predictions", "targets"])
def test_equals_the_definition_written_out(softmax_over):
    """Equation 1 and the official code's transpose of it, clip by clip and patch by patch."""
    class_pred, recon_pred, target = predictions()
    nce = found = 0.0
    for c, x in zip(class_pred, target, strict=True):
        score = [[float(x[j] @ c[i]) for i in range(17)] for j in range(17)]  # S[j][i]
        for i in range(17):
            others = score[i] if softmax_over == "predictions" else [score[j][i] for j in range(17)]
            nce -= math.log(math.exp(score[i][i]) / sum(map(math.exp, others))) / 34
            if softmax_over == "predictions":
                column = [math.exp(score[j][i]) / sum(map(math.exp, score[j])) for j in range(17)]
            else:
                column = [score[j][i] for j in range(17)]
            found += (column.index(max(column)) == i) / 34
    mse = float(((recon_pred - target) ** 2).mean())
    loss = reference(class_pred, recon_pred, target, softmax_over=softmax_over)
    assert loss.nce.item() == pytest.approx(nce, abs=1e-12)
    assert loss.mse.item() == pytest.approx(mse, abs=1e-12)
    assert loss.accuracy.item() == pytest.approx(found, abs=1e-12)
    assert loss.loss.item() == pytest.approx(nce + 10 * mse, abs=1e-11)
    assert found_patches(class_pred, target, softmax_over).double().mean().item() == pytest.approx(found)


def test_halves_make_the_whole():
    class_pred, recon_pred, target = predictions()
    joint = reference(class_pred, recon_pred, target, recon_weight=3.0)
    discriminative, generative = reference(class_pred, None, target), reference(None, recon_pred, target)
    assert discriminative.loss == joint.nce and generative.loss == joint.mse
    assert joint.loss == joint.nce + 3 * joint.mse
    assert discriminative.mse.isnan() and generative.nce.isnan() and generative.accuracy.isnan()


@pytest.mark.parametrize("softmax_over", ["predictions", "targets"])
def test_gradients(softmax_over):
    class_pred, recon_pred, target = (x[:, :5, :7].contiguous().requires_grad_() for x in predictions())
    assert torch.autograd.gradcheck(
        lambda c, r: reference(c, r, target, softmax_over=softmax_over).loss, (class_pred, recon_pred)
    )
    reference(class_pred, recon_pred, target).loss.backward()
    assert target.grad is None


def test_a_mask_picks_the_targets():
    class_pred, recon_pred, _ = predictions()
    patches = predictions(masked=63)[2]
    mask = masks(2, 17, 63)
    target = torch.stack([x[rows] for x, rows in zip(patches, mask, strict=True)])
    assert reference(class_pred, recon_pred, patches, mask=mask) == reference(class_pred, recon_pred, target)
    assert torch.equal(found_patches(class_pred, patches, mask=mask), found_patches(class_pred, target))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bf16_is_computed_in_float32(backend, device):
    rounded = [x.to(device, BF16) for x in predictions()]
    low, exact = mspm_loss(*rounded, backend=backend), reference(*(x.double() for x in rounded))
    assert low.loss.dtype == torch.float32
    assert low.loss.item() == pytest.approx(exact.loss.item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # in rows past M, which are never stored
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("softmax_over", ["predictions", "targets"])
@pytest.mark.parametrize("scale", [4.0, 1e3, "low"])
def test_extreme_scores_stay_finite(scale, softmax_over, backend, device):
    """Scores in the hundreds, in the hundreds of thousands, and all of them below -200: the zeros beside the matrix,
    which blocks reach into, are then the largest scores by far.
    """
    class_pred, recon_pred, target = (x.to(device) for x in predictions(masked=40, dtype=FP32))
    if scale == "low":
        target = target.abs()
        class_pred = -40 * target
    else:
        class_pred, recon_pred, target = scale * class_pred, scale * recon_pred, scale * target
    class_pred.requires_grad_()
    loss = mspm_loss(class_pred, recon_pred, target, softmax_over=softmax_over, backend=backend)
    assert all(value.isfinite() for value in loss)
    loss.loss.backward()
    assert class_pred.grad.isfinite().all()


@pytest.mark.rounding
@pytest.mark.parametrize("softmax_over", ["predictions", "targets"])
@pytest.mark.parametrize(("scale", "kind"), [(1e3, BF16), (1e15, FP32)])
@pytest.mark.parametrize("backend", ["triton"])
def test_gradients_at_extreme_scores(scale, kind, softmax_over, backend, device):
    """Scores of 1e7 and 1e31, where the order of a sum alone moves a score by many times what an exponential forgives.
    The backward pass computes them anew, in another order: a fraction may then be anything from 0 to 1, but not more,
    which it would be of a score above the highest. A row of the gradient is a mean of targets by such fractions.
    """
    generator = torch.Generator().manual_seed(0)
    class_pred, target = (scale * torch.randn(2, 2, 37, 64, generator=generator)).to(device, kind)
    results = []
    for precision, loss_of in ((kind, fused), (kind, reference), (torch.float64, reference)):
        leaf = class_pred.to(precision, copy=True).requires_grad_()
        loss = loss_of(leaf, None, target.to(precision), softmax_over=softmax_over)
        results.append(torch.autograd.grad(loss.loss, leaf)[0])
    any_fractions = 2 * target.double().abs().max().item() / (2 * 37)
    assert_lawful("gradient", *results, order_error=any_fractions)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of arithmetic with infinities
@pytest.mark.parametrize("softmax_over", ["predictions", "targets"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("backend", ["triton"])
def test_accuracy_of_broken_values(bad, softmax_over, backend, device):
    """A softmax with an infinity or a NaN is NaN, which PyTorch's argmax takes for the largest."""
    generator = torch.Generator().manual_seed(0)
    for broken in ("prediction", "target"):
        for patch in (0, 3, 39):
            class_pred = torch.randn(2, 40, 64, generator=generator).to(device)
            target = class_pred.clone()
            (class_pred if broken == "prediction" else target)[0, patch, 5] = bad
            loss, expected = (
                loss_of(class_pred, None, target, softmax_over=softmax_over) for loss_of in (fused, reference)
            )
            assert loss.accuracy == expected.accuracy, (broken, patch)
            assert loss.nce.isnan() and expected.nce.isnan()


def test_bad_arguments(device):
    class_pred, recon_pred, target = (x.to(device) for x in predictions())
    mask = masks(2, 17, 17).to(device)
    with pytest.raises(ValueError, match="both None"):
        mspm_loss(None, None, target)
    with pytest.raises(ValueError, match="recon_pred is"):
        mspm_loss(class_pred, recon_pred[:, :3], target)
    with pytest.raises(ValueError, match="class_pred is"):
        mspm_loss(class_pred, recon_pred, target, mask=mask[:, :3])
    with pytest.raises(ValueError, match="class_pred is"):
        found_patches(class_pred, target, mask=mask[:, :3])
    with pytest.raises(ValueError, match="mask must be int64"):
        mspm_loss(class_pred, recon_pred, target, mask=mask.int())
    with pytest.raises(ValueError, match="for 2 clips"):
        mspm_loss(class_pred, recon_pred, target, mask=mask[:1])
    with pytest.raises(ValueError, match="target must be"):
        mspm_loss(class_pred[0], recon_pred[0], target[0])
    with pytest.raises(ValueError, match="softmax_over"):
        mspm_loss(class_pred, recon_pred, target, softmax_over="both")
    with pytest.raises(ValueError, match="float64"):
        fused(class_pred, recon_pred, target)
    with pytest.raises(ValueError, match="up to 512 values"):
        fused(*(x.float().repeat(1, 1, 3) for x in (class_pred, recon_pred, target)))
    with pytest.raises(ValueError, match="bf16, fp16 or fp32"):
        fused(class_pred.float(), recon_pred.float(), target.int())


# --- the kernels against the reference --------------------------------------------------------------------------------


def masks(clips: int, masked: int, patches: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(patches, generator=generator)[:masked].sort().values for _ in range(clips)])


def inputs(device, clips, masked, patches, values, class_type, recon_type, target_type):
    """class_pred, recon_pred, target, mask. Predictions resemble their targets somewhat: some are found, some are
    not.
    """
    generator = torch.Generator().manual_seed(2)
    target = 0.5 * torch.randn(clips, patches or masked, values, generator=generator)
    mask = masks(clips, masked, patches) if patches else None
    wanted = target if mask is None else target.gather(1, mask[..., None].expand(-1, -1, values))
    noise = [torch.randn(clips, masked, values, generator=generator) for _ in range(2)]
    class_pred, recon_pred = 0.1 * wanted + 0.3 * noise[0], 0.7 * wanted + 0.2 * noise[1]
    preds = [
        None if kind is None else pred.to(device, kind).requires_grad_()
        for pred, kind in ((class_pred, class_type), (recon_pred, recon_type))
    ]
    return *preds, target.to(device, target_type), None if mask is None else mask.to(device)


def assert_all_lawful(
    class_pred, recon_pred, target, *, mask=None, objective=lambda loss: loss.loss, exact_scores=False, **options
) -> None:
    """loss, nce, mse and both gradients of `objective` keep the law; accuracy is equal but for the predictions whose
    target is ahead of the next one, or behind it, by less than the order of the sums may change.

    exact_scores: the scores are exact in any order of summation, so equal scores are equal and nothing is forgiven.
    """
    results = []
    for loss_of, precision in ((fused, None), (reference, None), (reference, torch.float64)):
        preds = [
            None
            if x is None
            else x.detach().to(precision or x.dtype, memory_format=torch.preserve_format).requires_grad_()
            for x in (class_pred, recon_pred)
        ]
        loss = loss_of(*preds, target.to(precision or target.dtype), mask=mask, **options)
        given = [x for x in preds if x is not None]
        gradients = iter(torch.autograd.grad(objective(loss), given, allow_unused=True))
        results.append((loss, [None if x is None else next(gradients) for x in preds]))
    (actual, actual_grads), (same_dtype, same_dtype_grads), (exact, exact_grads) = results
    order_errors = {"loss": 0.0, "nce": 0.0, "class_pred": 0.0}
    if class_pred is not None:
        order_errors, undecided = order_of_sums(class_pred, target, mask, exact, objective, exact_scores, **options)
        assert (actual.accuracy - same_dtype.accuracy).abs() <= undecided
    else:
        assert actual.accuracy.isnan() and same_dtype.accuracy.isnan()
    for name in ("loss", "nce", "mse"):
        if getattr(exact, name).isnan():
            assert getattr(actual, name).isnan() and not getattr(actual, name).requires_grad, name
        else:
            values = (getattr(each, name) for each in (actual, same_dtype, exact))
            assert_lawful(name, *values, order_errors.get(name, 0.0))
    assert not actual.accuracy.requires_grad
    for name, *grads in zip(("class_pred", "recon_pred"), actual_grads, same_dtype_grads, exact_grads, strict=True):
        assert len({gradient is None for gradient in grads}) == 1, name
        if grads[0] is not None:
            assert_lawful(f"gradient of {name}", *grads, order_errors.get(name, 0.0))


def order_of_sums(
    class_pred, target, mask, exact, objective, exact_scores, *, softmax_over="predictions", recon_weight=10.0
) -> tuple[dict[str, torch.Tensor], float]:
    """What the order of the sums may change: of each result by name, and the fraction of predictions of which it may
    change whether they are counted as right.
    """
    rows = target if mask is None else target.gather(1, mask[..., None].expand(-1, -1, target.shape[2]))
    mse = exact.mse.detach()

    def of_nce(nce: torch.Tensor) -> torch.Tensor:
        loss = nce if mse.isnan() else nce + recon_weight * mse
        return objective(MSPMLoss(loss, nce, mse, exact.accuracy))

    nce_error, gradient_error, log_error = loss_order_errors(
        class_pred, rows, of_nce, softmax_over, exact_scores=exact_scores
    )
    scores = rows.detach().double() @ class_pred.detach().double().mT
    log_p = scores.log_softmax(2 if softmax_over == "predictions" else 1)
    true = log_p.diagonal(dim1=1, dim2=2)  # [B, M]
    others = log_p.masked_fill(torch.eye(log_p.shape[1], dtype=torch.bool, device=log_p.device), -math.inf)
    is_close = (true - others.amax(dim=1)).abs() <= 2 * log_error.amax(dim=1)
    undecided = 0.0 if exact_scores else is_close.double().mean().item()
    return {"loss": nce_error, "nce": nce_error, "class_pred": gradient_error}, undecided


# clips, masked, patches (None: no mask), values, type of class_pred, recon_pred (None: missing), target. Why each:
LAWFUL = [
    (1, 400, 512, 256, BF16, BF16, BF16),  # as in production: whole blocks and a ragged one, of rows and of columns
    (3, 17, 63, 256, BF16, BF16, BF16),  # one ragged block; several clips; an odd number of patches
    (3, 70, None, 256, FP32, FP32, FP32),  # the smaller blocks of fp32, three by three, the last ragged
    (3, 17, None, 256, FP16, FP16, FP16),
    (1, 1, 63, 96, FP32, FP32, FP32),  # one patch has nothing to be told from: loss and gradient 0
    (2, 17, 63, 96, BF16, BF16, FP32),  # what autocast makes of features in fp32; K between powers of two
    (2, 17, None, 96, FP16, BF16, BF16),  # fp16 and bf16 have no common type but fp32
    (2, 17, None, 100, FP32, BF16, FP16),  # three types; rows that no vector load divides
    (1, 70, 80, 512, BF16, BF16, BF16),  # the widest rows: other blocks
    (2, 33, None, 300, FP32, FP32, FP32),  # the same in fp32, one row more than a block
    (2, 17, 63, 7, BF16, BF16, BF16),  # K below the smallest matrix instruction
    (3, 17, 63, 256, BF16, None, BF16),  # halves of the objective
    (3, 17, None, 256, FP32, None, FP32),
    (3, 17, 63, 256, None, BF16, BF16),
    (3, 140, None, 256, None, FP32, FP32),
]


@pytest.mark.rounding
@pytest.mark.parametrize("case", LAWFUL, ids=str)
@pytest.mark.parametrize("softmax_over", ["predictions", "targets"])
@pytest.mark.parametrize("backend", ["triton"])
def test_keeps_the_law(case, softmax_over, backend, device):
    class_pred, recon_pred, target, mask = inputs(device, *case)
    assert_all_lawful(class_pred, recon_pred, target, mask=mask, softmax_over=softmax_over)


OBJECTIVES = {
    "nce": lambda loss: loss.nce,
    "mse": lambda loss: loss.mse,
    "half the loss": lambda loss: loss.loss / 2,
    "all three": lambda loss: 3 * loss.loss - 5 * loss.nce + loss.mse * loss.nce.detach(),
}


@pytest.mark.rounding
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", [FP32, BF16])
@pytest.mark.parametrize("backend", ["triton"])
def test_gradients_of_every_output(objective, kind, backend, device):
    class_pred, recon_pred, target, mask = inputs(device, 2, 17, 63, 256, kind, kind, kind)
    assert_all_lawful(class_pred, recon_pred, target, mask=mask, objective=OBJECTIVES[objective], recon_weight=3.7)


@pytest.mark.rounding
@pytest.mark.parametrize("objective", ["nce", "mse", "half the loss"])
@pytest.mark.parametrize("missing", ["class_pred", "recon_pred"])
def test_gradients_of_a_half_alone(objective, missing, device):
    kinds = (None, BF16) if missing == "class_pred" else (BF16, None)
    class_pred, recon_pred, target, mask = inputs(device, 2, 17, 63, 256, *kinds, BF16)
    if objective == ("nce" if missing == "class_pred" else "mse"):
        loss = fused(class_pred, recon_pred, target, mask=mask)
        assert not getattr(loss, objective).requires_grad
    else:
        assert_all_lawful(class_pred, recon_pred, target, mask=mask, objective=OBJECTIVES[objective], recon_weight=3.7)


def thirty_twos(device, kind, clips: int, masked: int, values: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions 8 (-1, 0 or 1) and targets 4 (-1, 0 or 1): every score is a multiple of 32, exact in any order of
    summation, and of two scores that differ the smaller adds nothing to the softmax (exp(-32) = 1e-14), whose logarithm
    is then that of a whole number: ties are ties on every machine.
    """
    generator = torch.Generator().manual_seed(2)
    signs = torch.randint(-1, 2, (2, clips, masked, values), generator=generator)
    return (8 * signs[0]).to(device, kind), (4 * signs[1]).to(device, kind)


@pytest.mark.rounding
@pytest.mark.parametrize("softmax_over", ["predictions", "targets"])
@pytest.mark.parametrize("kind", [FP32, BF16])
@pytest.mark.parametrize("backend", ["triton"])
def test_scores_in_the_hundreds(kind, softmax_over, backend, device):
    class_pred, target = thirty_twos(device, kind, 2, 40, 64)
    class_pred[:, ::2] = 2 * target[:, ::2]  # right with certainty, the others wrong with certainty
    assert_all_lawful(class_pred.requires_grad_(), None, target, softmax_over=softmax_over, exact_scores=True)


@pytest.mark.rounding
@pytest.mark.parametrize("softmax_over", ["predictions", "targets"])
@pytest.mark.parametrize("kind", [FP32, BF16])
@pytest.mark.parametrize("backend", ["triton"])
def test_small_losses_beside_large_scores(kind, softmax_over, backend, device):
    """S is 268.25 on the diagonal and 256 elsewhere, exactly: losses of 2e-4, seven steps of fp32 at 256."""
    target = torch.zeros(2, 40, 256, device=device, dtype=kind)
    target[..., 0] = 16
    target[:, range(40), range(1, 41)] = 3.5
    assert_all_lawful(target, None, target, softmax_over=softmax_over, exact_scores=True)


@pytest.mark.rounding
@pytest.mark.parametrize("softmax_over", ["predictions", "targets"])
@pytest.mark.parametrize("kind", [FP32, BF16])
@pytest.mark.parametrize("backend", ["triton"])
def test_the_first_of_equal_targets_is_the_one_found(kind, softmax_over, backend, device):
    _, target = thirty_twos(device, kind, 2, 150, 64)
    for first, *later in ((2, 5, 40, 149), (31, 32, 130), (127, 128)):  # within a block and across blocks
        target[:, later] = target[:, first, None]
    class_pred = 2 * target
    loss = fused(class_pred, None, target, softmax_over=softmax_over)
    assert loss.accuracy.item() == pytest.approx(1 - 6 / 150)
    assert loss.accuracy == reference(class_pred, None, target, softmax_over=softmax_over).accuracy
    alone = fused(torch.zeros_like(target), None, target, softmax_over=softmax_over)  # all scores are equal
    assert alone.accuracy.item() == pytest.approx(1 / 150)


@pytest.mark.parametrize("softmax_over", ["predictions", "targets"])
@pytest.mark.parametrize("backend", ["triton"])
def test_tensors_that_lie_anyhow_in_memory(softmax_over, backend, device):
    class_pred, recon_pred, target, mask = inputs(device, 3, 17, 63, 96, BF16, BF16, BF16)
    gaps = torch.full((3, 126, 100), float("nan"), device=device, dtype=BF16)
    gaps[:, ::2, :96] = target
    spread = torch.full((3, 17, 192), float("nan"), device=device, dtype=BF16)
    spread[..., ::2] = recon_pred.detach()
    clips_inside = class_pred.detach().transpose(0, 1).contiguous().transpose(0, 1)  # [B, M, K] stored as [M, B, K]
    masks_inside = mask.T.contiguous().T
    strange = clips_inside, spread[..., ::2], gaps[:, ::2, :96]
    assert not any(x.is_contiguous() for x in (*strange, masks_inside))
    assert_all_lawful(*strange, mask=masks_inside, softmax_over=softmax_over)
    one_clip = target[:1].expand(3, -1, -1)
    assert_all_lawful(class_pred, recon_pred, one_clip, mask=mask, softmax_over=softmax_over)


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # 0 / 0 is what is wanted
def test_no_clips(device):
    class_pred, recon_pred, target, _ = inputs(device, 0, 17, None, 256, BF16, BF16, BF16)
    loss = fused(class_pred, recon_pred, target)
    assert all(value.isnan() for value in loss)
    gradients = torch.autograd.grad(loss.loss, (class_pred, recon_pred))
    assert [gradient.shape for gradient in gradients] == [(0, 17, 256), (0, 17, 256)]


@pytest.mark.parametrize("softmax_over", ["predictions", "targets"])
def test_launches(softmax_over, launches, device):
    """No more launches than needed, and none for a gradient that nobody asked for."""
    class_pred, recon_pred, target, mask = inputs(device, 2, 17, 63, 256, BF16, BF16, BF16)
    loss = fused(class_pred, recon_pred, target, mask=mask, softmax_over=softmax_over)
    rounds = 2 if softmax_over == "predictions" else 1
    assert launches == ["_scores_kernel"] * rounds + ["_finish_kernel"]
    loss.loss.backward()
    assert launches[rounds + 1 :] == ["_gradients_kernel"]
    launches.clear()
    loss = fused(class_pred.detach(), recon_pred, target, mask=mask, softmax_over=softmax_over)
    assert torch.autograd.grad(loss.nce, recon_pred, allow_unused=True) == (None,)
    assert launches == ["_scores_kernel"] * rounds + ["_finish_kernel"]


@pytest.mark.parametrize("softmax_over", ["predictions", "targets"])
@pytest.mark.parametrize("backend", ["triton"])
def test_same_bits_every_time(softmax_over, backend, device):
    class_pred, recon_pred, target, mask = inputs(device, 2, 150, 512, 256, BF16, BF16, BF16)

    def run() -> list[torch.Tensor]:
        loss = fused(class_pred, recon_pred, target, mask=mask, softmax_over=softmax_over)
        return [*loss, *torch.autograd.grad(loss.loss, (class_pred, recon_pred))]

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


@pytest.mark.parametrize("kinds", [(BF16, BF16), (None, BF16), (BF16, None)], ids=str)
@pytest.mark.parametrize("backend", ["triton"])
def test_compiles_without_graph_breaks(kinds, backend, device):
    class_pred, recon_pred, target, mask = inputs(device, 2, 17, 63, 256, *kinds, BF16)
    given = [x for x in (class_pred, recon_pred) if x is not None]

    def step(class_pred, recon_pred, target, mask) -> MSPMLoss:
        return fused(
            None if class_pred is None else 2 * class_pred,
            None if recon_pred is None else 2 * recon_pred,
            target,
            mask=mask,
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for run in (step, compiled):
        loss = run(class_pred, recon_pred, target, mask)
        total = loss.loss + sum(0.5 * value for value in (loss.nce, loss.mse) if value.requires_grad)
        results.append([*loss, *torch.autograd.grad(total, given)])
    for eager, same in zip(*results, strict=True):
        assert torch.equal(eager, same) or (eager.isnan() and same.isnan())


def test_the_operators_are_registered_properly(device):
    class_pred, recon_pred, target, mask = inputs(device, 2, 17, 63, 96, BF16, BF16, FP32)
    torch.library.opcheck(_forward_op, (class_pred, recon_pred, target, mask, True, 10.0))
    class_pred, recon_pred = class_pred.detach(), recon_pred.detach()
    normaliser = _forward_op(class_pred, recon_pred, target, mask, False, 10.0)[4]
    d_loss = torch.ones((), device=device)
    torch.library.opcheck(
        _backward_op, (class_pred, recon_pred, target, mask, normaliser, d_loss, None, d_loss, False, 10.0)
    )


def test_no_second_derivatives(device):
    """An error, not a wrong result."""
    class_pred, recon_pred, target, _ = inputs(device, 1, 17, None, 96, FP32, FP32, FP32)
    (gradient,) = torch.autograd.grad(fused(class_pred, recon_pred, target).loss, class_pred, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


def test_autocast_changes_nothing(device):
    class_pred, recon_pred, target, mask = inputs(device, 2, 17, 63, 256, BF16, BF16, FP32)
    plain = fused(class_pred, recon_pred, target, mask=mask)
    with torch.autocast(device.type, BF16):
        inside = fused(class_pred, recon_pred, target, mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
