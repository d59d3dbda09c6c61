import math

import pytest
import torch

from ssast.kernels import found_patches, mspm_loss


def predictions(clips: int = 2, masked: int = 17, values: int = 256, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
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
    loss = mspm_loss(class_pred, recon_pred, target, softmax_over=softmax_over)
    assert loss.nce.item() == pytest.approx(nce, abs=1e-12)
    assert loss.mse.item() == pytest.approx(mse, abs=1e-12)
    assert loss.accuracy.item() == pytest.approx(found, abs=1e-12)
    assert loss.loss.item() == pytest.approx(nce + 10 * mse, abs=1e-11)
    assert found_patches(class_pred, target, softmax_over).double().mean().item() == pytest.approx(found)


def test_halves_make_the_whole():
    class_pred, recon_pred, target = predictions()
    joint = mspm_loss(class_pred, recon_pred, target, recon_weight=3.0)
    discriminative, generative = mspm_loss(class_pred, None, target), mspm_loss(None, recon_pred, target)
    assert discriminative.loss == joint.nce and generative.loss == joint.mse
    assert joint.loss == joint.nce + 3 * joint.mse
    assert discriminative.mse.isnan() and generative.nce.isnan() and generative.accuracy.isnan()


@pytest.mark.parametrize("softmax_over", ["predictions", "targets"])
def test_gradients(softmax_over):
    class_pred, recon_pred, target = (x[:, :5, :7].contiguous().requires_grad_() for x in predictions())
    assert torch.autograd.gradcheck(lambda c, r: mspm_loss(c, r, target, softmax_over=softmax_over).loss, (class_pred, recon_pred))
    mspm_loss(class_pred, recon_pred, target).loss.backward()
    assert target.grad is None


def test_bf16_is_computed_in_float32():
    rounded = [x.to(torch.bfloat16) for x in predictions()]
    low, exact = mspm_loss(*rounded), mspm_loss(*(x.double() for x in rounded))
    assert low.loss.dtype == torch.float32
    assert low.loss.item() == pytest.approx(exact.loss.item(), rel=1e-6)


def test_extreme_scores_stay_finite():
    class_pred, recon_pred, target = (1e3 * x for x in predictions(dtype=torch.float32))
    loss = mspm_loss(class_pred, recon_pred, target)
    assert all(value.isfinite() for value in loss)


def test_bad_arguments():
    class_pred, recon_pred, target = predictions()
    with pytest.raises(ValueError, match="both None"):
        mspm_loss(None, None, target)
    with pytest.raises(ValueError, match="recon_pred is"):
        mspm_loss(class_pred, recon_pred[:, :3], target)
    with pytest.raises(ValueError, match="softmax_over"):
        mspm_loss(class_pred, recon_pred, target, softmax_over="both")
