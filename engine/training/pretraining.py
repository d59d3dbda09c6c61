"""Pretraining: the paper's joint objective of search (InfoNCE) and reconstruction (MSE) over masked patches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ssast.engine.config import Config
from ssast.engine.data.dataset import Dataset
from ssast.engine.data.loader import Batch
from ssast.engine.distributed.ranks import Ranks
from ssast.engine.model.config import LossConfig, ModelCard
from ssast.engine.model.front_end import FrontEnd
from ssast.engine.random_streams import Stream, key_of
from ssast.engine.spans import span
from ssast.kernels import sample_patch_mask

from .objective import ModelEngine

if TYPE_CHECKING:
    from ssast.engine.model.ssast import SSAST


class Pretraining:
    """The paper's joint objective, or one half of it (`config.objective`)."""

    metrics = ("loss", "nce", "mse", "accuracy")

    def __init__(self, config: Config, data: Dataset, ranks: Ranks) -> None:
        self.config, self.device, self.patch_shape = config, ranks.device, config.architecture.patch_shape
        card = ModelCard(config.data.sample_rate, data.mean, data.std)
        self.front_end = FrontEnd.of(config.architecture, card)
        section = config.objective
        self.loss = LossConfig(section.name, section.softmax_over, section.recon_weight)
        self.all_used = config.objective.name == "joint" and config.objective.masks == "shared"

    def losses(self, engine: ModelEngine, batch: Batch, *, validation: bool = False) -> Sequence[torch.Tensor]:
        """The loss of a micro-batch, then its parts (`metrics`); the mask depends on the batch's position alone."""
        config = self.config
        with span("copy"):  # on a GPU the loader has sent them ahead
            waveform, lengths = (each.to(self.device, non_blocking=True) for each in (batch.waveform, batch.lengths))
        with span("fbank"):
            # also what is predicted, so in bf16 runs a bf16 factor of the loss's products
            dtype = torch.bfloat16 if config.bf16 else torch.float32
            patches = self.front_end.features(waveform, lengths, dtype=dtype, patch=self.patch_shape)  # [B, P, K]
        with span("mask + embed"):
            mask = self._mask(batch, Stream.VALIDATION_MASK if validation else Stream.MASK, validation)
            recon_mask = None
            if config.objective.masks == "separate" and not validation:
                recon_mask = self._mask(batch, Stream.RECONSTRUCTION_MASK, validation)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.uses_autocast):
            return engine(lambda model: model.pretrain_patches(patches, mask, recon_mask, self.loss))

    def validate(self, engine: ModelEngine, batches: Iterable[tuple[Batch, int]]) -> dict[str, float]:
        """Means over all validation clips. The masks are the same every time, and 400 of 512 patches whatever training
        masks.
        """
        sums = torch.zeros(len(self.metrics) + 1, dtype=torch.float64, device=self.device)
        for batch, clips in batches:
            losses = self.losses(engine, batch, validation=True)
            if clips:
                sums[:-1] += torch.stack([value.double() for value in losses]) * clips
                sums[-1] += clips
        dist.all_reduce(sums)
        return dict(zip(self.metrics, (sums[:-1] / sums[-1]).tolist(), strict=True))

    def judge(self, metrics: dict[str, float]) -> tuple[str, float]:
        """By pretext accuracy, or, where nothing is discriminated, by the reconstruction's error."""
        if self.config.objective.name == "generative":
            return "mse", -metrics["mse"]
        return "accuracy", metrics["accuracy"]

    def chance(self, metrics: dict[str, float]) -> str | None:
        """InfoNCE over M masked patches is ln M where all look alike."""
        masked = self.config.valid_num_masked
        if self.config.objective.name == "generative" or metrics["nce"] < 0.995 * math.log(masked):
            return None
        return f"InfoNCE {metrics['nce']:.3f} of ln {masked} = {math.log(masked):.3f}"

    def validation_row(self, metrics: dict[str, float]) -> dict[str, Any]:
        """The metrics that the objective trains, and how many patches were masked."""
        untrained = {"discriminative": ("mse",), "generative": ("nce", "accuracy")}.get(self.config.objective.name, ())
        return {"num_masked": self.config.valid_num_masked} | {
            key: metrics[key] for key in metrics if key not in untrained
        }

    def keep_epoch(self, step: int) -> int | None:
        """None: pretraining averages no epochs."""
        return None

    def parameter_groups(self, model: SSAST) -> list[dict[str, Any]]:
        """One group of all parameters."""
        return [{"params": list(model.parameters()), "lr_scale": 1.0}]

    def _mask(self, batch: Batch, stream: Stream, validation: bool) -> torch.Tensor:
        config = self.config
        return sample_patch_mask(
            batch.waveform.shape[0],
            grid=config.architecture.grid,
            num_masked=config.valid_num_masked if validation else config.mask.num_masked,
            cluster=config.mask.cluster,
            algorithm=config.mask.algorithm,
            seed=key_of(config.run.seed, stream),
            offset=batch.position,
            device=self.device,
        )
