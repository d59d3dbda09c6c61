"""Masked spectrogram patch modelling: InfoNCE among the masked patches of one clip, and their reconstruction."""

from typing import NamedTuple

import torch

from .backend import resolve_backend


class MSPMLoss(NamedTuple):
    """Scalars. `loss` has a gradient; `accuracy` is the share of masked patches that were found, by the official rule.

    A half of the objective that was not asked for is NaN.
    """

    loss: torch.Tensor
    nce: torch.Tensor
    mse: torch.Tensor
    accuracy: torch.Tensor


def mspm_loss(
    class_pred: torch.Tensor | None,  # [B, M, K]
    recon_pred: torch.Tensor | None,  # [B, M, K]
    target: torch.Tensor,  # [B, M, K]
    *,
    softmax_over: str = "predictions",
    recon_weight: float = 10.0,
    backend: str | None = None,
) -> MSPMLoss:
    """L = L_d + lambda L_g of SSAST, equations 1 to 3. All arithmetic is float32 (float64 for float64 input).

    With c_i = class_pred, r_i = recon_pred, x_i = target of one clip and S[j, i] = x_j . c_i (no temperature, no normalisation,
    negatives from the same clip only):

        predictions  L_d = -mean_i log( exp S[i, i] / sum_k exp S[i, k] ): for each target, a softmax over the predictions; what the
                     official code computes and the published weights were trained with
        targets      L_d = -mean_i log( exp S[i, i] / sum_j exp S[j, i] ): for each prediction, a softmax over the targets; equation 1

    L_g is the mean square error over all elements. Accuracy is the share of predictions i whose largest entry over the targets j of
    the softmax (in the direction chosen) is j = i; ties go to the first.

    Args:
        class_pred: None leaves L_d out (generative only: loss = L_g).
        recon_pred: None leaves L_g out (discriminative only: loss = L_d).
        target: raw normalised patches; never receives a gradient.
        softmax_over: "predictions" or "targets".
        recon_weight: lambda.
        backend: None, "torch" or "triton".

    Raises:
        ValueError: neither prediction, shapes that differ, or an unknown `softmax_over`.
    """
    if softmax_over not in ("predictions", "targets"):
        raise ValueError(f"softmax_over must be 'predictions' or 'targets', not {softmax_over!r}")
    if class_pred is None and recon_pred is None:
        raise ValueError("class_pred and recon_pred are both None: nothing to learn")
    for name, pred in (("class_pred", class_pred), ("recon_pred", recon_pred)):
        if pred is not None and pred.shape != target.shape:
            raise ValueError(f"{name} is {tuple(pred.shape)} and target {tuple(target.shape)}: they must be of one shape [B, M, K]")
    resolve_backend(backend, target.device, has_triton=False)

    precision = torch.promote_types(target.dtype, torch.float32)
    target = target.detach().to(precision)
    nce = mse = accuracy = target.new_full((), float("nan"))
    if class_pred is not None:
        nce, accuracy = _info_nce(class_pred.to(precision), target, softmax_over)
    if recon_pred is not None:
        mse = (recon_pred.to(precision) - target).square().mean()
    if class_pred is None:
        return MSPMLoss(mse, nce, mse, accuracy)
    if recon_pred is None:
        return MSPMLoss(nce, nce, mse, accuracy)
    return MSPMLoss(nce + recon_weight * mse, nce, mse, accuracy)


def found_patches(class_pred: torch.Tensor, target: torch.Tensor, softmax_over: str = "predictions") -> torch.Tensor:
    """[B, M] bool: which masked patches were found, by the rule of `mspm_loss`'s accuracy; arguments as there."""
    return _is_found(_log_share(class_pred, target, softmax_over))


def _info_nce(class_pred: torch.Tensor, target: torch.Tensor, softmax_over: str) -> tuple[torch.Tensor, torch.Tensor]:
    log_share = _log_share(class_pred, target, softmax_over)
    nce = -log_share.diagonal(dim1=1, dim2=2).mean()
    return nce, _is_found(log_share.detach()).to(nce.dtype).mean()


def _log_share(class_pred: torch.Tensor, target: torch.Tensor, softmax_over: str) -> torch.Tensor:
    """[B, M targets, M predictions] logarithm of the softmax in the direction chosen."""
    with torch.autocast(class_pred.device.type, enabled=False):
        scores = target @ class_pred.transpose(1, 2)
    return scores.log_softmax(dim=2 if softmax_over == "predictions" else 1)


def _is_found(log_share: torch.Tensor) -> torch.Tensor:
    best_target = log_share.argmax(dim=1)  # [B, M]: for each prediction, the target with the largest share
    return best_target == torch.arange(best_target.shape[1], device=best_target.device)
